"""Each kernel alone, beside what the cost model predicts; and one forward pass, kernel by kernel."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from proteinbert_fast.benchmark import cost_model
from proteinbert_fast.benchmark.cases import Case, Ready, Unavailable, Work
from proteinbert_fast.benchmark.gpu.bench import KERNELS, Bench
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS, Inputs, Operation, Tensors, compared, same, tile_rows
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.setup import OURS
from proteinbert_fast.benchmark.timing import Row, percentiles
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

TITLE = "Kernels"
PROFILE = "one forward pass, kernel by kernel"
_SHOWN = 14  # kernels of a profile; the others are added up
_COMPARED_ROWS = 2000  # residues whose results are compared with the reference again, at the beginning of the batch


def rows(bench: Bench) -> list[Row]:
    """A row per kernel and precision, then one per kernel of a forward pass."""
    lengths = kernel_lengths(bench)
    found = []
    for precision in bench.precisions:
        inputs = cache(partial(Inputs, bench.settings.config, lengths, precision, bench.device, bench.device))
        for row, operation in zip(
            bench.measure([_case(bench, o, precision, inputs, lengths) for o in OPERATIONS]), OPERATIONS, strict=True
        ):
            if row.seconds:
                row.values = _beside_prediction(bench, row, operation, inputs())
            found.append(row)
        inputs.cache_clear()
        bench.tidy()
    return found + [row for precision in bench.precisions[:1] for row in _profile(bench, precision, lengths)]


def kernel_lengths(bench: Bench) -> list[int]:
    """Residues of real proteins, repeated until there are enough tokens."""
    residues = [len(protein.sequence) for protein in bench.setup.proteins]
    lengths: list[int] = []
    tokens = 0
    while tokens < bench.settings.kernel_tokens:
        lengths.append(residues[len(lengths) % len(residues)])
        tokens += lengths[-1] + 2
    return lengths


def _case(
    bench: Bench, operation: Operation, precision: Precision, inputs: Callable[[], Inputs], lengths: list[int]
) -> Case:
    def prepare() -> Ready[Tensors]:
        made = inputs()

        def run() -> Tensors:
            with torch.inference_mode(), precision.active():
                return operation.run(made)

        plain = run()
        captured, note = bench.captured(run)

        def check(found: Tensors) -> Any:
            few = _first_proteins(made, lengths)
            right = operation.exact(few.exact())
            with torch.inference_mode(), precision.active():
                outcome = compared(operation.run(few), right, precision.name)
            if outcome.passed and not same(found, plain):
                return type(outcome)(False, "the graph's result differs from a launch")
            return outcome

        return Ready(captured, check, "; ".join(part for part in (operation.note, note) if part))

    tokens = sum(lengths) + 2 * len(lengths)
    return Case(
        table=KERNELS,
        name=operation.name,
        what=f"{len(lengths):,} proteins, {tokens:,} tokens; weights prepared in each call",
        owner=OURS,
        ours=True,
        work=Work(proteins=len(lengths), residues=sum(lengths), tokens=tokens),
        unit="tokens/s",
        prepare=prepare,
        dtype=precision.name,
    )


def _first_proteins(made: Inputs, lengths: list[int]) -> Inputs:
    """The same weights on the first proteins alone, with states of their own."""
    few, residues = [], 0
    for n in lengths:
        few.append(n)
        residues += n
        if residues > _COMPARED_ROWS:
            break
    return Inputs(made.config, few, made.precision, made.device, torch.device("cpu"))


def _beside_prediction(bench: Bench, row: Row, operation: Operation, inputs: Inputs) -> dict[str, Any]:
    """What the kernel does, as fractions of the device's peaks, and what the cost model says it takes."""
    seconds, tokens = percentiles(row.seconds)["p50"], row.case.work.tokens
    cost, peaks = operation.cost(inputs), bench.peaks
    times = cost.times(peaks, inputs.precision.name)
    return {
        "ns_per_token": 1e9 * seconds / tokens,
        "us_per_launch": 1e6 * seconds,
        "flops_per_token": cost.flops / tokens,
        "hbm_bytes_per_token": cost.hbm_bytes / tokens,
        "l2_bytes_per_token": cost.l2_bytes / tokens,
        "of_matrix_peak": times.by_bound["matrix"] / seconds,
        "of_hbm_peak": times.by_bound["HBM"] / seconds,
        "of_l2_peak": times.by_bound["L2"] / seconds,
        "of_instruction_peak": times.by_bound["instructions"] / seconds,
        "bound_by": times.bound_by,
        "predicted_ns_per_token": 1e9 * times.least / tokens,
        "predicted_serial_ns_per_token": 1e9 * times.serial / tokens,
        "measured_over_predicted": seconds / times.least,
        "peaks": peaks.source,
    }


def forward_prediction(bench: Bench, batch_lengths: list[int], precision: Precision) -> dict[str, float]:
    """The cost model's seconds of a forward pass over proteins of these residues, by what bounds them."""
    inputs = Inputs(bench.settings.config, (1,), precision, bench.device, bench.device)
    size = cost_model.Size(
        tokens=sum(batch_lengths) + 2 * len(batch_lengths),
        rows=sum(batch_lengths) + (2 + bench.settings.config.reach) * len(batch_lengths),
        proteins=len(batch_lengths),
        spans=sum(-(-(n + 2) // 512) for n in batch_lengths),
        itemsize=precision.dtype.itemsize,
    )
    found = cost_model.forward_seconds(bench.settings.config, size, tile_rows(inputs), bench.peaks, precision.name)
    return {str(bound): seconds for bound, seconds in found.items()}


def _profile(bench: Bench, precision: Precision, lengths: list[int]) -> list[Row]:
    """Device time of each kernel, by the profiler; without asking which kernels there should be."""
    tokens = sum(lengths) + 2 * len(lengths)
    found: dict[str, tuple[int, float]] = {}

    def case(name: str, prepare: Callable[[], Ready[Any]]) -> Case:
        work = Work(proteins=len(lengths), residues=sum(lengths), tokens=tokens)
        return Case(table=PROFILE, name=name, what="device time in torch.profiler", owner=OURS, ours=True, work=work,
                    unit="tokens/s", prepare=prepare, dtype=precision.name)  # fmt: skip

    def prepare() -> Ready[None]:
        model: ProteinBert = bench.model(precision.name)
        batch: PackedBatch = Tokenizer(gap=bench.settings.config.reach)([b"M" * n for n in lengths]).to(bench.device)

        def run() -> None:
            with torch.inference_mode(), precision.active():
                model(batch)
            bench.synchronize()

        if not bench.on_gpu:
            run()
            raise Unavailable("there is no device to profile")
        for _ in range(2):
            run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
        found.update(_device_times(profiler))
        if not found:
            raise Unavailable("the profiler saw no kernel")
        return Ready(lambda: None, None)

    whole, _ = bench.checked(case("all kernels", prepare))
    if whole.status != "measured":
        return [whole]
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    total = sum(seconds for _, (_, seconds) in ordered)
    shown = ordered[:_SHOWN]
    if rest := ordered[_SHOWN:]:
        shown.append((f"{len(rest)} others", (sum(n for _, (n, _) in rest), sum(s for _, (_, s) in rest))))
    whole.seconds, whole.values = [total], {"launches": sum(n for _, (n, _) in ordered), "share": 1.0}
    result = [whole]
    for name, (launches, seconds) in shown:
        row = Row(case(name, lambda: Ready(lambda: None, None)), "measured", seconds=[seconds])
        row.values = {"launches": launches, "share": seconds / total}
        result.append(row)
    for row in result:
        row.values["ns_per_token"] = 1e9 * row.seconds[0] / tokens
    return result


def _device_times(profiler: Any) -> dict[str, tuple[int, float]]:
    """Launches and seconds of each kernel."""
    found = {}
    for event in profiler.key_averages():
        microseconds = getattr(event, "self_device_time_total", 0) or 0
        if microseconds:
            found[event.key.replace("|", "/")[:60]] = (int(event.count), microseconds / 1e6)
    return found
