"""The device itself, and questions that designs of kernels depend on."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace

from benchmarks.first.process import Context
from proteinbert_fast.benchmark.cases import Case
from proteinbert_fast.benchmark.gpu.bench import KERNELS, Bench
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS, Inputs, Operation
from proteinbert_fast.benchmark.gpu.sections import kernels, machine
from proteinbert_fast.benchmark.timing import percentiles

# Of one matrix product; bytes that lie in the L2 cache, and the weights that all multiprocessors read again and again.
_MATRIX, _HOT_BYTES = 8192, 600_000
# 8 shifts tiles by whole groups of rows, the others do not; 5 is the published model's.
DILATIONS = (5, 7, 8)


def run(context: Context) -> None:
    """Rates, or the dilations of the wide convolution, as the options say."""
    if context.can_run():
        {"rates": rates, "dilations": dilations}[context.options["what"]](context)


def rates(context: Context) -> None:
    """Product, copy and L2 rates; the peaks that later predictions go by."""
    bench = context.bench() if context.job["tiny"] else context.bench(matrix_sizes=(_MATRIX,))
    rows = machine.rows(bench)
    for row in rows:
        context.row(row)
    for row in bench.measure([machine.cached_reads(bench, min(_HOT_BYTES, bench.settings.cached_bytes))]):
        context.row(row)
    if any(row.seconds for row in rows):
        peaks = asdict(replace(bench.peaks, matrix={}, source=f"measured in the same run ({bench.peaks.source})"))
        context.emit(True, check="peaks", peaks=peaks | {"matrix": dict(bench.peaks.matrix)},
                     clocks=bench.environment.get("gpu_state_after_products"))  # fmt: skip


def dilations(context: Context) -> None:
    """The local block with taps 5, 7 and 8 rows apart: whether tiles that begin at any row cost more."""
    from proteinbert_fast.ops.kernels.launching import capability_of
    from proteinbert_fast.ops.kernels.local_block import implementation

    bench = context.bench()
    largest = replace(bench.settings.config, wide_dilation=max(DILATIONS))
    lengths = kernels.kernel_lengths(bench)
    made = Inputs(largest, lengths, context.precision, bench.device, bench.device)
    chosen = OPERATIONS[0]
    rows = bench.measure([_case(bench, chosen, made, lengths, dilation, context) for dilation in DILATIONS])
    seconds = {d: percentiles(row.seconds)["p50"] for d, row in zip(DILATIONS, rows, strict=True) if row.seconds}
    for dilation, row in zip(DILATIONS, rows, strict=True):
        if dilation in seconds:
            kernel = implementation(capability_of(made.rows), largest.d_local, made.rows.dtype, largest.kernel_size,
                                    dilation, made.batch.gap)  # fmt: skip
            row.values = {"ns_per_row": 1e9 * seconds[dilation] / made.batch.n_rows, "implementation": kernel,
                          "over_dilation_8": seconds[dilation] / seconds[8] if 8 in seconds else None}  # fmt: skip
        context.row(row, wide_dilation=dilation)


def _case(
    bench: Bench, chosen: Operation, made: Inputs, lengths: Sequence[int], dilation: int, context: Context
) -> Case:
    """The same states, rows and gaps for each; only the taps lie elsewhere."""
    twin = copy.copy(made)
    twin.config = replace(made.config, wide_dilation=dilation)
    named = replace(chosen, note=f"taps of the wide convolution {dilation} rows apart")
    return kernels.case(bench, KERNELS, named, context.precision, lambda: twin, list(lengths))


