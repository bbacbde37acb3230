"""Each kernel, or each gradient, alone on a million tokens, beside what the cost model predicts."""

from benchmarks.first.process import Context
from proteinbert_fast.benchmark.gpu.bench import GRADIENTS, KERNELS
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS as BACKWARD
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS
from proteinbert_fast.benchmark.gpu.sections import kernels


def run(context: Context) -> None:
    """A line each, as soon as it is timed."""
    if not context.can_run():
        return
    gradients = context.options["what"] == "gradients"
    bench = context.bench(gradients)
    table, operations = (GRADIENTS, BACKWARD) if gradients else (KERNELS, OPERATIONS)
    for operation in operations:
        context.begin(operation.name)
        for row in kernels.measured(bench, table, [operation], bench.precisions):
            context.row(row)
