"""Matrix products, the fastest of which is an instruction set's measured peak; only those within the set count.

torch.mm is MKL's in float32 and oneDNN's in bfloat16; PyTorch's linear operator for compiled models is oneDNN's in
both. Who computes, and with which kernel, is read from what the library prints; which instructions that executes, from
samples.
"""

import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.sets.encodings import AMX, EVEX, SSE, VEX, in_words
from benchmarks.sets.holding import InstructionSet
from benchmarks.sets.watch import Channel
from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.settings import Settings

Product = Callable[[Tensor, Tensor], Callable[[], Tensor]]  # two matrices to what multiplies them
# The instruction sets in names of oneDNN's kernels, which the set with the longest prefix of these holds.
_ONEDNN_SETS = {
    "sse41": SSE,
    "avx": VEX,
    "avx2": VEX,
    "avx2_vnni": VEX,
    "avx2_vnni_2": VEX,
    "avx512": EVEX,
    "avx10": EVEX,
}
_LEAST_SAMPLES = 20  # of vector instructions
_WATCHED_SECONDS = 1.0
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def mm(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """By whatever PyTorch takes for a product of two matrices."""
    out = torch.empty(len(a), b.shape[1], dtype=a.dtype)
    return lambda: torch.mm(a, b, out=out)


def linear(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """By oneDNN."""
    return _linear(a, b.t().contiguous())


def packed_linear(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """By oneDNN, the second matrix laid out as it likes it beforehand, as in compiled models."""
    return _linear(a, torch.ops.mkldnn._reorder_linear_weight(b.t().contiguous(), len(a)))


def _linear(a: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")


PRODUCTS: dict[str, Product] = {
    "torch.mm": mm,
    "oneDNN linear": linear,
    "oneDNN linear, packed weight": packed_linear,
}


def cases(
    settings: Settings, held: InstructionSet, channel: Channel, evidence: dict[str, str], products: dict[str, Product]
) -> list[Case]:
    """A case for each product, dtype and size; unavailable where it cannot be held to the set.

    Args:
        settings: of the run.
        held: the set that this process is held to.
        channel: to the process that takes samples.
        evidence: takes what is known of each, by the case's label.
        products: by name.
    """
    found = []
    for dtype in settings.dtypes if held.has_bfloat16 else ("float32",):
        for name, product in products.items():
            for n in settings.matrix_sizes:
                case = Case(
                    table=machine.TABLE,
                    name=f"{name}, {n} x {n}",
                    what="product of two matrices, all cores",
                    owner=f"torch {torch.__version__}",
                    ours=False,
                    work=Work(flops=2 * n**3),
                    unit="GFLOP/s",
                    prepare=lambda: Ready(lambda: None, None),
                    dtype=dtype,
                    probe="matrix",
                )
                prepare = _preparation(case.label, product, n, dtype, held, channel, evidence)
                found.append(replace(case, prepare=prepare))
    return found


def _preparation(
    label: str,
    product: Product,
    n: int,
    dtype: str,
    held: InstructionSet,
    channel: Channel,
    evidence: dict[str, str],
) -> Callable[[], Ready[Tensor]]:
    def prepare() -> Ready[Tensor]:
        a, b = (torch.randn(n, n).to(getattr(torch, dtype)) for _ in range(2))
        try:
            with torch.no_grad():
                multiply = product(a, b)

            def run() -> Tensor:
                with torch.no_grad():
                    return multiply()

            printed = _printed(run, channel)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            raise Unavailable(f"cannot run: {str(error).strip().splitlines()[0]}") from error
        _, counts, _ = channel.watch(run, _WATCHED_SECONDS)
        kernel = kernel_of(printed)
        failure = not_held(held, kernel, counts, cpu_features())
        evidence[label] = f"{kernel or 'kernel unknown'}; {in_words(counts) or 'instructions not sampled'}"
        if failure:
            raise Unavailable(f"not held to {held.name}: {failure}")
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        return Ready(
            run, lambda c: _check(a, b, c), evidence[label], calls=max(1, min(16, int(0.1 / max(seconds, 1e-4))))
        )

    return prepare


def _check(a: Tensor, b: Tensor, c: Tensor) -> Check:
    """Of a few rows, in float64. bfloat16 rounds results to 8 bits."""
    right = a[:8].double() @ b.double()
    error, limit = float((c[:8].double() - right).norm() / right.norm()), _TOLERANCE[a.dtype]
    return Check(error <= limit, f"within {error:.0e} of its length, allowed {limit:g}")


def _printed(run: Callable[[], object], channel: Channel) -> list[str]:
    """What MKL and oneDNN say of one run."""
    run()
    with ExitStack() as verbose:
        for library in (torch.backends.mkldnn, torch.backends.mkl):
            if library.is_available():
                verbose.enter_context(library.verbose(1))
        _, _, lines = channel.watch(run)
    return lines


def kernel_of(lines: Sequence[str]) -> str:
    """Library and kernel in what the libraries printed of a run; empty where they said nothing.

    Args:
        lines: "onednn_verbose,...,exec,cpu,inner_product,brg_matmul:avx2,..." or "MKL_VERBOSE SGEMM(...) ... CNR:OFF".
    """
    names = []
    for line in lines:
        if line.startswith("onednn_verbose") and ",exec,cpu," in line:
            primitive, kernel = line.partition(",exec,cpu,")[2].split(",")[:2]
            if primitive != "reorder":
                names.append(f"oneDNN {kernel}")
        elif found := re.match(r"MKL_VERBOSE (\w+)\(.*?(CNR:\w+)", line):
            names.append(f"MKL {found[1].lower()} {found[2]}")
    return ", ".join(dict.fromkeys(names))


def not_held(held: InstructionSet, kernel: str, counts: Counter[str], features: frozenset[str]) -> str:
    """Why a product does not count as one within the set; empty where it verifiably does.

    Args:
        held: the set.
        kernel: as `kernel_of` gives it.
        counts: samples of its instructions.
        features: of this CPU, as Linux names them.
    """
    if not held.environment:
        # On AArch64 nothing caps the libraries and nothing tells instructions apart; NEON is all that some CPUs have.
        wider = sorted(features & {"sve", "sve2", "sme"})
        return f"the CPU has {wider[0].upper()}, which libraries may use" if wider else ""
    if beyond := [name for name in counts if name in held.beyond]:
        return f"it executes {beyond[0]}-encoded instructions"
    if sum(counts[name] for name in (SSE, VEX, EVEX, AMX)) >= _LEAST_SAMPLES:
        return ""
    order = [SSE, VEX, EVEX]
    named = re.findall(r"oneDNN [\w:]*?:(sse41|avx\d*\w*)", kernel)
    allowed = [name for name in order if name not in held.beyond]
    if named and all(_encoding(name) in allowed for name in named):
        return ""
    return "its instructions could not be sampled, and its kernel's name does not tell"


def _encoding(name: str) -> str:
    prefix = max((p for p in _ONEDNN_SETS if name.startswith(p)), key=len)
    return AMX if "amx" in name else _ONEDNN_SETS[prefix]


def cpu_features() -> frozenset[str]:
    """What Linux calls this AArch64 CPU's features; none elsewhere."""
    if platform.machine() != "aarch64":
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("Features"):
            return frozenset(line.partition(":")[2].split())
    return frozenset(("sve",))  # unknown counts as wider
