"""Each operation of the backward pass alone, in the first precision: what a training step is made of."""

from proteinbert_fast.benchmark.gpu.bench import GRADIENTS as TABLE
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS
from proteinbert_fast.benchmark.gpu.sections.kernels import measured
from proteinbert_fast.benchmark.timing import Row

TITLE = "Gradients"


def rows(bench: Bench) -> list[Row]:
    """A row per operation."""
    return measured(bench, TABLE, GRADIENTS, bench.precisions[:1])
