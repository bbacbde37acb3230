"""Each kernel alone, beside what the cost model predicts."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch

from proteinbert_fast.benchmark import cost_model
from proteinbert_fast.benchmark.cases import Case, Ready, Work
from proteinbert_fast.benchmark.gpu.bench import KERNELS, Bench
from proteinbert_fast.benchmark.gpu.operations import (
    OPERATIONS,
    Inputs,
    Operation,
    Tensors,
    compared,
    same,
    tile_rows,
    tile_stays,
)
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.setup import OURS
from proteinbert_fast.benchmark.timing import Row, percentiles

TITLE = "Kernels"
_COMPARED_ROWS = 2000  # residues whose results are compared with the reference again, at the beginning of the batch


def rows(bench: Bench) -> list[Row]:
    """A row per kernel and precision."""
    return measured(bench, KERNELS, OPERATIONS, bench.precisions)


def measured(bench: Bench, table: str, operations: Sequence[Operation], precisions: Sequence[Precision]) -> list[Row]:
    """A row of a table per operation and precision: checked, timed, beside the prediction."""
    lengths = kernel_lengths(bench)
    found = []
    for precision in precisions:
        inputs = cache(partial(Inputs, bench.settings.config, lengths, precision, bench.device, bench.device))
        for row, operation in zip(
            bench.measure([case(bench, table, o, precision, inputs, lengths) for o in operations]),
            operations,
            strict=True,
        ):
            if row.seconds:
                row.values = _beside_prediction(bench, row, operation, inputs())
            found.append(row)
        inputs.cache_clear()
        bench.tidy()
    return found


def kernel_lengths(bench: Bench) -> list[int]:
    """Residues of real proteins, repeated until there are enough tokens."""
    residues = [len(protein.sequence) for protein in bench.setup.proteins]
    lengths: list[int] = []
    tokens = 0
    while tokens < bench.settings.kernel_tokens:
        lengths.append(residues[len(lengths) % len(residues)])
        tokens += lengths[-1] + 2
    return lengths


def case(
    bench: Bench,
    table: str,
    operation: Operation,
    precision: Precision,
    inputs: Callable[[], Inputs],
    lengths: list[int],
) -> Case:
    """An operation alone: compared with the reference on the first proteins, then timed on all, in a CUDA graph.

    Args:
        bench: the run.
        table: of the row.
        operation: to time.
        precision: to compute in.
        inputs: gives those that it is timed on.
        lengths: residues of their proteins.
    """
    def prepare() -> Ready[Tensors]:
        made = inputs()

        def run() -> Tensors:
            with torch.inference_mode(), precision.active():
                return operation.run(made)

        plain = run()
        captured, note = bench.captured(run)

        def check(found: Tensors) -> Any:
            few = _first_proteins(made, lengths)
            right = operation.defined(few, operation.exact(few.exact()))
            with torch.inference_mode(), precision.active():
                ours = operation.defined(few, operation.run(few))
                outcome = compared(ours, right, precision.name, operation.by_largest)
            # Where results may hold anything, a graph and a launch may find other numbers.
            if outcome.passed and not same(operation.defined(made, found), operation.defined(made, plain)):
                return type(outcome)(False, "the graph's result differs from a launch")
            return outcome

        return Ready(captured, check, "; ".join(part for part in (operation.note, note) if part))

    tokens = sum(lengths) + 2 * len(lengths)
    return Case(
        table=table,
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
    return _prediction(bench, cost_model.forward_seconds, batch_lengths, precision)


def training_prediction(bench: Bench, batch_lengths: list[int], precision: Precision) -> dict[str, float]:
    """The same of a training step."""
    return _prediction(bench, cost_model.training_seconds, batch_lengths, precision)


def _prediction(
    bench: Bench,
    seconds: Callable[..., dict[cost_model.Bound, float]],
    batch_lengths: list[int],
    precision: Precision,
) -> dict[str, float]:
    inputs = Inputs(bench.settings.config, (1,), precision, bench.device, bench.device)
    size = cost_model.Size(
        tokens=sum(batch_lengths) + 2 * len(batch_lengths),
        rows=sum(batch_lengths) + (2 + bench.settings.config.reach) * len(batch_lengths),
        proteins=len(batch_lengths),
        spans=sum(-(-(n + 2) // 512) for n in batch_lengths),
        itemsize=precision.dtype.itemsize,
    )
    found = seconds(bench.settings.config, size, tile_rows(inputs), bench.peaks, precision.name, tile_stays(inputs))
    return {str(bound): seconds for bound, seconds in found.items()}
