"""The device itself: its matrix rate, memory rate and L2 rate, in the same run as everything else."""

from collections.abc import Callable
from dataclasses import replace

import torch

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case, Check, Probe, Ready, Unavailable, Unit, Work
from proteinbert_fast.benchmark.gpu.bench import Bench, gpu_state
from proteinbert_fast.benchmark.gpu.operations import error
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.timing import Row, best_probe, percentiles

TITLE = "The device itself"
_COPIES = 16  # of the cached buffer, one after the other
_READS = 64  # of a block, by each program of the reading loop


def rows(bench: Bench) -> list[Row]:
    """Products by precision, copies through memory, and copies and reads within the L2 cache."""
    reads = cached_reads(bench, bench.settings.cached_bytes)
    found = bench.measure([*matrix_probes(bench), copy_probe(bench), _cached_copies(bench), reads])
    measured = [row for row in found if row.seconds]
    peaks = bench.peaks
    matrix = dict(peaks.matrix)
    for precision in bench.precisions:
        best = max(
            (_rate(r) for r in measured if (r.case.probe, r.case.dtype) == ("matrix", precision.name)), default=0.0
        )
        matrix[precision.name] = best or matrix[precision.name]
    memory = next((_rate(row) for row in measured if row.case.probe == "copy"), peaks.hbm)
    cache = max((_rate(row) for row in measured if row.case.probe == "cache"), default=peaks.l2)
    if measured:
        bench.peaks = replace(peaks, matrix=matrix, hbm=memory, l2=cache, source="measured in the same run")
    if bench.on_gpu and measured:
        name = bench.environment["gpu"]
        count = bench.environment["multiprocessors"]
        bench.peaks = replace(bench.peaks, name=name, multiprocessors=count, clock=_clock(bench.peaks.clock))
        # Still warm: what the clocks are under load, as nearly as another process can see.
        bench.environment["gpu_state_after_products"] = gpu_state()
    return found


def _clock(otherwise: float) -> float:
    """Of the multiprocessors at most, Hz. It falls under load: predictions by it are the shortest there can be."""
    words = gpu_state().get("clocks.max.sm", "").split()
    return float(words[0]) * 1e6 if words and words[0].isdigit() else otherwise


def _rate(row: Row) -> float:
    work = row.case.work
    return (work.flops or work.bytes) / percentiles(row.seconds)["p50"]


def matrix_probes(bench: Bench, *only: str) -> list[Case]:
    """Products of large matrices: of all sizes in 16 bits, of one size otherwise.

    Args:
        bench: the run.
        only: precisions; all when there are none.
    """
    sizes = bench.settings.matrix_sizes
    found = []
    for precision in bench.precisions:
        if only and precision.name not in only:
            continue
        for n in sizes if precision.dtype.itemsize == 2 else sizes[len(sizes) // 2 :][:1]:
            found.append(_product(bench, n, precision))
    return found


def best_matrix_probe(bench: Bench, rows: list[Row], precision: str) -> Row | None:
    """The fastest product in a precision among rows."""
    return best_probe(rows, "matrix", matrix_probes(bench, precision)[0])


def _product(bench: Bench, n: int, precision: Precision) -> Case:
    def prepare() -> Ready[torch.Tensor]:
        a, b = (torch.randn(n, n, device=bench.device).to(precision.dtype) for _ in range(2))
        out = torch.empty(n, n, dtype=precision.dtype, device=bench.device)

        def run() -> torch.Tensor:
            with precision.active():
                return torch.mm(a, b, out=out)

        return Ready(run, None)

    return _case("matrix", f"product of {n} x {n} matrices", "torch.mm", Work(flops=2.0 * n**3), "GFLOP/s", prepare,
                 precision.name)  # fmt: skip


def copy_probe(bench: Bench) -> Case:
    """A copy through memory; bytes read and written both count."""
    n = bench.settings.copied_bytes

    def prepare() -> Ready[torch.Tensor]:
        source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        return Ready(lambda: target.copy_(source), lambda out: Check(torch.equal(out, source), "equal"))

    what = f"{n / 1e6:,.0f} MB read and as much written"
    return _case("copy", "copy through memory", what, Work(bytes=2.0 * n), "GB/s", prepare)


def _cached_copies(bench: Bench) -> Case:
    n = bench.settings.cached_bytes // 2

    def prepare() -> Ready[torch.Tensor]:
        source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)

        def copies() -> torch.Tensor:
            for _ in range(_COPIES):
                target.copy_(source)
            return target

        run, note = bench.captured(copies)
        return Ready(run, lambda out: Check(torch.equal(out, source), "equal"), note)

    what = f"{_COPIES} copies of {n / 1e6:.1f} MB, read and written bytes counted"
    return _case("cache", "copies within the L2 cache", what, Work(bytes=2.0 * n * _COPIES), "GB/s", prepare)


def cached_reads(bench: Bench, cached_bytes: int) -> Case:
    """Every program reads blocks of one buffer, past the L1 caches.

    Args:
        bench: the run.
        cached_bytes: of the buffer, which stays in the L2 cache.
    """
    block = 4096 if bench.on_gpu else 256
    blocks = cached_bytes // (4 * block)
    programs = 8 * bench.environment.get("multiprocessors", 1)

    def prepare() -> Ready[torch.Tensor]:
        try:
            from proteinbert_fast.benchmark.gpu.reading import read_loop_kernel
        except ImportError as problem:
            raise Unavailable(f"needs triton: {problem}") from problem
        numbers = torch.randn(blocks, block, device=bench.device)
        out = torch.empty(programs, block, device=bench.device)

        def run() -> torch.Tensor:
            read_loop_kernel[(programs,)](numbers, out, blocks, READS=_READS, BLOCK=block, num_warps=8)
            return out

        def check(out: torch.Tensor) -> Check:
            steps = (
                torch.arange(_READS, device=bench.device)[None, :]
                + torch.arange(programs, device=bench.device)[:, None]
            )
            right = numbers.double()[steps % blocks].sum(1)
            worst = error((out,), (right,))
            return Check(worst <= 1e-5, f"largest error {worst:.1e}, allowed 1e-05")

        return Ready(run, check)

    read = 4.0 * programs * _READS * block
    what = f"a loop over {cached_bytes / 1e6:.1f} MB past the L1 caches"
    return _case("cache", "reads from the L2 cache", what, Work(bytes=read), "GB/s", prepare, owner="triton")


def _case(
    probe: Probe,
    name: str,
    what: str,
    work: Work,
    unit: Unit,
    prepare: Callable[[], Ready[torch.Tensor]],
    dtype: str | None = None,
    owner: str = f"torch {torch.__version__}",
) -> Case:
    return Case(
        table=machine.TABLE, name=name, what=what, owner=owner, ours=False, work=work, unit=unit, prepare=prepare,
        dtype=dtype, probe=probe,
    )  # fmt: skip
