"""The parts of a GPU report, in the order they run. A new one is a module here and a line in `SECTIONS`.

A section's module has ``rows(bench)``, which gives a `timing.Row` for everything it would measure, also for what cannot
be measured here. Its rows appear under ``TITLE``. What may take long or fail comes last.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proteinbert_fast.benchmark.gpu.bench import Bench
    from proteinbert_fast.benchmark.timing import Row

SECTIONS = (
    "checks", "machine", "kernels", "long", "latency", "forward", "training", "gradients", "compiled", "profile",
)  # fmt: skip


def title(name: str) -> str:
    """Of a section, in reports."""
    found: str = import_module(f"{__name__}.{name}").TITLE
    return found


def rows(name: str, bench: "Bench") -> "Sequence[Row]":
    """What a section finds."""
    found: Sequence[Row] = import_module(f"{__name__}.{name}").rows(bench)
    return found
