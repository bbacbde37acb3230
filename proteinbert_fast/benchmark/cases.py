"""What a benchmark is made of: cases, the work they do, and the check that comes before any time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from proteinbert_fast.config import ProteinBertConfig

Result = TypeVar("Result")
Unit = Literal["tokens/s", "residues/s", "GB/s", "GFLOP/s"]
Probe = Literal["matrix", "convolution", "copy", "cache"]


class Unavailable(Exception):
    """A case cannot run here; the message says why, in one line."""


@dataclass(frozen=True)
class Work:
    """What one run of a case does. A byte that is read and written counts once, as when copying."""

    proteins: int = 0
    residues: int = 0
    tokens: int = 0
    flops: float = 0
    bytes: float = 0

    def amount(self, unit: Unit) -> float:
        """How much of it there is, in what ``unit`` counts per second."""
        match unit:
            case "tokens/s":
                return self.tokens
            case "residues/s":
                return self.residues
            case "GB/s":
                return self.bytes / 1e9
            case "GFLOP/s":
                return self.flops / 1e9


@dataclass(frozen=True)
class Check:
    """Outcome of comparing a case's result with the right one: what was found, in a few words."""

    passed: bool
    found: str


@dataclass(frozen=True)
class Ready(Generic[Result]):
    """A case that is set up.

    Attributes:
        run: does the work once; this is what is timed.
        check: judges what ``run`` gave; None where there is nothing to compare with, which ``note`` explains.
        note: settings that were chosen and whatever else a reader must know.
        calls: calls of ``run`` that are timed together, for runs of a few milliseconds.
    """

    run: Callable[[], Result]
    check: Callable[[Result], Check] | None
    note: str = ""
    calls: int = 1


@dataclass(frozen=True)
class Case:
    """One row of a report.

    Attributes:
        table: cases of a group that are compared with each other.
        name: within the table and dtype.
        what: it runs, in a line.
        owner: whose code it is, with version.
        ours: whether it is this package's.
        work: of one run.
        unit: its rate is shown in.
        prepare: sets it up; raises Unavailable if it cannot run here.
        dtype: it computes in; None where there is none.
        cores: "one" or "all"; rows are compared with the copy rate of as many.
        probe: which rate of the machine itself it measures; None for all others.
    """

    table: str
    name: str
    what: str
    owner: str
    ours: bool
    work: Work
    unit: Unit
    prepare: Callable[[], Ready[Any]]
    dtype: str | None = None
    cores: Literal["one", "all"] = "all"
    probe: Probe | None = None

    @property
    def label(self) -> str:
        """Table, name and dtype."""
        return " / ".join(part for part in (self.table, self.name, self.dtype) if part)


def flops_per_token(config: ProteinBertConfig) -> int:
    """Floating-point operations of the forward pass per token: 4.92 million at the published sizes.

    Counts the products of the local track and of attention, two for each multiplication with addition. What is done
    once per protein (0.5 % at 350 residues), activations and norms are not counted.
    """
    d, keys, values = config.d_local, config.n_heads * config.d_key, config.d_global
    convolutions = 2 * config.kernel_size * d * d
    dense = d * d
    projections = d * (keys + values)
    attention = keys + values
    return 2 * config.n_blocks * (convolutions + dense + projections + attention)


def state_bytes_per_token(config: ProteinBertConfig, itemsize: int) -> int:
    """Bytes of the local state that any implementation reads and writes once per block, per token."""
    return config.n_blocks * config.d_local * itemsize
