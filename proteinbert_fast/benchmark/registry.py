"""The groups of benchmarks, in one place: a new one is a module with ``cases(setup)`` and a line here.

``cases`` gives a list of `Case`. A module may have its own ``measure(cases, rounds, say)``; the others are timed by
`timing.measure`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proteinbert_fast.benchmark.cases import Case
    from proteinbert_fast.benchmark.setup import Setup
    from proteinbert_fast.benchmark.timing import Row


@dataclass(frozen=True)
class Group:
    """A group of benchmarks. Its module is imported when it is used, so that ``--help`` does not wait for torch.

    Attributes:
        name: of the group and of its module.
        title: in reports.
    """

    name: str
    title: str

    @property
    def _module(self) -> Any:
        return import_module(f"proteinbert_fast.benchmark.groups.{self.name}")

    def cases(self, setup: "Setup") -> "list[Case]":
        """The group's cases, not yet prepared."""
        cases: list[Case] = self._module.cases(setup)
        return cases

    def measure(self, cases: "list[Case]", rounds: int, say: Callable[[str], None]) -> "list[Row]":
        """Checks the cases, then measures those that passed; a row for each."""
        from proteinbert_fast.benchmark import timing

        measure: Callable[..., list[Row]] = getattr(self._module, "measure", timing.measure)
        return measure(cases, rounds, say)


GROUPS = {
    group.name: group
    for group in (
        Group("tokenizer", "Tokenizer: residues in memory to packed tokens"),
        Group("forward", "Model: forward pass, tokens to states"),
        Group("train", "Training: one step, forward and backward, on real proteins"),
        Group("embed", "Embedding: FASTA file to HDF5 file"),
        Group("corpus", "Corpus: UniRef XML to a dataset for pretraining"),
        Group("loader", "Loader: a corpus to batches for pretraining"),
        Group("memory", "Memory: peak while embedding one long protein"),
    )
}
