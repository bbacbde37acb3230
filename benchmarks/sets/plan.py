"""What is measured with one instruction set: cases of the groups `forward`, `train` and `embed`, and products.

Without instructions for bfloat16, PyTorch's own bfloat16 is 15 times as slow as its float32, and more. There, others
run in bfloat16 on a few proteins only, next to ours, and neither train nor embed in it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.sets import products
from benchmarks.sets.holding import InstructionSet
from benchmarks.sets.watch import Channel, watched
from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case
from proteinbert_fast.benchmark.groups import embed, forward, train
from proteinbert_fast.benchmark.registry import Group
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.benchmark.setup import Setup, States
from proteinbert_fast.config import ProteinBertConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "proteins.fasta"
FEW, MODEL_ALONE = "a few proteins", "example proteins, the model alone"
ANSWERS = "answers.pt"


@dataclass(frozen=True)
class Plan:
    """Settings of each stage.

    Attributes:
        forward: the batch of real lengths, one protein, the products.
        few: bfloat16 of others without instructions for it.
        train: a training step.
        embed: end to end.
    """

    forward: Settings
    few: Settings
    train: Settings
    embed: Settings


def plan(size: str, rounds: int | None = None) -> Plan:
    """A plan of a size.

    Args:
        size: "full"; "quick", to see that everything works; "tiny", for tests: a small model too.
        rounds: timings of each case, half as many where a run takes long; 5 (1, 2) when None.
    """
    n = rounds or {"full": 5, "quick": 1, "tiny": 2}[size]
    base = Settings(rounds=n, batch_tokens=(2048, 4096), checked=3)
    long = replace(base, rounds=(n + 1) // 2, batch_tokens=(4096, 16_384))
    full = Plan(
        forward=replace(base, proteins=40),
        few=replace(base, rounds=min(n, 2), proteins=2, batch_tokens=(1,), compile=False, dtypes=("bfloat16",)),
        train=replace(long, proteins=40),
        embed=replace(long, proteins=1000, fasta=str(EXAMPLES)),
    )
    if size == "full":
        return full
    small: dict[str, object] = {"compile": False, "batch_tokens": (4096,), "checked": 2, "is_quick": True}
    if size == "tiny":
        small["config"] = ProteinBertConfig(n_annotations=30, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16)
    matrices = (64,) if size == "tiny" else (1024,)
    return Plan(
        forward=replace(full.forward, proteins=4, matrix_sizes=matrices, **small),
        few=replace(full.few, rounds=1, proteins=1, **small | {"batch_tokens": (1,)}),
        train=replace(full.train, proteins=2, **small),
        embed=replace(full.embed, proteins=4, **small),
    )


class Stages:
    """The stages of a plan, each as a group of cases, in the order in which they are measured.

    Training comes after the forward passes: an optimizer's step drops all prepared weights, which a model alone keeps.

    Args:
        sizes: settings of each stage.
        held: the set that this process is held to.
        channel: to the process that watches.
        folder: where answers of the float64 reference are kept for other sets.
        others: makes further cases beside the forward passes.

    Attributes:
        setup: of the forward passes.
        evidence: what is known of each product, by the case's label.
        seen: samples of each other case's instructions, by its label.
    """

    def __init__(
        self,
        sizes: Plan,
        held: InstructionSet,
        channel: Channel,
        folder: Path,
        others: Callable[[Setup], Sequence[Case]] = lambda _: (),
    ) -> None:
        self.sizes, self.held, self.channel, self.folder, self.others = sizes, held, channel, folder, others
        self.setup = Setup(sizes.forward)
        self.evidence: dict[str, str] = {}
        self.seen: dict[str, Counter[str]] = {}

    def __iter__(self) -> Iterator[tuple[Group, list[Case], int]]:
        yield Group("forward", "Model: forward pass, tokens to states"), self._forward(), self.sizes.forward.rounds
        yield Group("train", "Training: one step, forward and backward"), self._train(), self.sizes.train.rounds
        yield Group("embed", "Embedding: the example proteins, FASTA to HDF5"), self._embed(), self.sizes.embed.rounds

    def _forward(self) -> list[Case]:
        found = [case for case in forward.cases(self.setup) if self._affordable(case)]
        if not self.held.has_bfloat16:
            few = [case for case in forward.cases(Setup(self.sizes.few)) if case.table == forward.MANY]
            found += [replace(case, table=FEW) for case in few if case.probe is None]
        found = [watched(case, self.channel, self.seen) for case in found] + list(self.others(self.setup))
        return found + products.cases(self.sizes.forward, self.held, self.channel, self.evidence, products.PRODUCTS)

    def _train(self) -> list[Case]:
        dtypes = self.sizes.train.dtypes if self.held.has_bfloat16 else ("float32",)
        cases = train.cases(Setup(replace(self.sizes.train, dtypes=dtypes)))
        return [watched(case, self.channel, self.seen) for case in cases if case.table != machine.TABLE]

    def _embed(self) -> list[Case]:
        setup = Setup(self.sizes.embed)
        share_answers(setup, self.folder / ANSWERS)
        alone = [case for case in forward.cases(setup) if case.ours and case.table == forward.MANY]
        cases = embed.cases(setup) + [replace(case, table=MODEL_ALONE) for case in alone]
        return [watched(case, self.channel, self.seen) for case in cases if self._affordable(case)]

    def _affordable(self, case: Case) -> bool:
        if case.table == machine.TABLE:
            return False
        return case.ours or case.dtype == "float32" or self.held.has_bfloat16


def share_answers(setup: Setup, file: Path) -> None:
    """Takes the float64 reference's answers from a file, or computes them and writes it: titin takes half a minute."""
    if file.exists():
        stored = torch.load(file, weights_only=True)
        setup.answers = {i: States(i, *states) for i, states in stored.items()}
    else:
        torch.save({i: (states.local, states.global_state) for i, states in setup.answers.items()}, file)
