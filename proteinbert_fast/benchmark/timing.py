"""Checks first, then time: rounds over all cases of a group, so that a drift of the machine hits all alike."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable

Status = Literal["measured", "unavailable", "wrong"]


@dataclass
class Target:
    """A number that the project aims at.

    Attributes:
        what: it is, in a few words, without the number.
        wanted: the number.
        unit: it is shown in.
        at_least: larger is better.
        value: that was measured; None where nothing was.
    """

    what: str
    wanted: float
    unit: str
    at_least: bool
    value: float | None = None

    @property
    def reached(self) -> bool | None:
        """None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.wanted if self.at_least else self.value <= self.wanted


@dataclass
class Row:
    """A case and what became of it.

    Attributes:
        case: that was run.
        status: "wrong" and "unavailable" rows have no numbers.
        note: settings, or why there are no numbers.
        check: what the check found; None where nothing was compared.
        seconds: of one run, in each round.
        of_matrix_rate, of_copy_rate: fraction of the machine's own rate, in each round; empty where none applies.
        ours_over_this: our rate over this case's, in each round; empty for ours and where there is none.
        bytes: numbers of a memory case.
        values: whatever else was found, by name.
        targets: what the project aims at here.
    """

    case: Case
    status: Status
    note: str = ""
    check: str | None = None
    seconds: list[float] = field(default_factory=list)
    of_matrix_rate: list[float] = field(default_factory=list)
    of_copy_rate: list[float] = field(default_factory=list)
    ours_over_this: list[float] = field(default_factory=list)
    bytes: dict[str, float] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        """Work per second in each round, in the case's unit."""
        return [self.case.work.amount(self.case.unit) / s for s in self.seconds]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated between values."""
    p20, p50, p80 = np.percentile(np.asarray(values, float), [20, 50, 80])
    return {"p20": float(p20), "p50": float(p50), "p80": float(p80)}


def checked(case: Case) -> tuple[Row, Ready[Any] | None, Any]:
    """Prepares a case, runs it once, and judges the result.

    Returns:
        The row without numbers; the case made ready, or None if it may not be measured; the result.
    """
    try:
        ready = case.prepare()
        result = ready.run()
    except Unavailable as error:
        return Row(case, "unavailable", str(error)), None, None
    check: Check | None = ready.check(result) if ready.check else None
    if check is not None and not check.passed:
        return Row(case, "wrong", ready.note, check.found), None, None
    return Row(case, "measured", ready.note, check.found if check else None), ready, result


def measure(cases: Sequence[Case], rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Checks all cases, then times those that passed.

    Args:
        cases: of one group.
        rounds: timings of each.
        say: is told what goes on, a line each.
    """
    rows, timed = [], []
    for case in cases:
        say(f"checking {case.label}")
        row, ready, _ = checked(case)
        rows.append(row)
        if ready is not None:
            timed.append((row, ready))
    in_rounds(timed, rounds, say, seconds)
    relate(rows)
    return rows


def in_rounds(
    timed: Sequence[tuple[Row, Ready[Any]]],
    rounds: int,
    say: Callable[[str], None],
    clock: Callable[[Ready[Any]], float],
) -> None:
    """Times cases that were made ready, each once a round, into their rows.

    Args:
        timed: rows and what to run for them.
        rounds: timings of each.
        say: is told what goes on, a line each.
        clock: gives the seconds of one run.
    """
    for n in range(rounds):
        say(f"round {n + 1} of {rounds}")
        gc.collect()
        # Each round starts with another case: none always comes after the same neighbour's garbage and cache.
        first = n % max(len(timed), 1)
        for row, ready in [*timed[first:], *timed[:first]]:
            row.seconds.append(clock(ready))


def seconds(ready: Ready[Any]) -> float:
    """Of one run, by the host's clock."""
    gc.disable()
    try:
        started = time.perf_counter()
        for _ in range(ready.calls):
            ready.run()
        return (time.perf_counter() - started) / ready.calls
    finally:
        gc.enable()


def relate(rows: Sequence[Row]) -> None:
    """Fills in fractions of the machine's rates and ratios to ours, round by round."""
    measured = [row for row in rows if row.seconds]
    for row in measured:
        case = row.case
        if case.work.flops:
            row.of_matrix_rate = _quotients(row, best_probe(rows, "matrix", case), "flops")
        if case.work.bytes:
            row.of_copy_rate = _quotients(row, best_probe(rows, "copy", case), "bytes")
        if not case.ours and case.probe is None:
            ours = next((r for r in measured if r.case.ours and _comparable(r.case, case)), None)
            if ours is not None:
                row.ours_over_this = [a / b for a, b in zip(ours.rates, row.rates, strict=True)]


def _comparable(ours: Case, other: Case) -> bool:
    return (ours.table, ours.dtype, ours.cores) == (other.table, other.dtype, other.cores)


def best_probe(rows: Sequence[Row], probe: str, case: Case) -> Row | None:
    """The fastest probe of the machine's rate that fits a case's dtype (matrix) or cores (copy)."""

    def fits(other: Case) -> bool:
        if other.probe != probe:
            return False
        return case.cores in {"all", other.cores} if probe == "copy" else other.dtype == case.dtype

    candidates = [row for row in rows if row.seconds and fits(row.case)]
    return max(candidates, key=lambda row: percentiles(row.rates)["p50"], default=None)


def _quotients(row: Row, probe: Row | None, kind: Literal["flops", "bytes"]) -> list[float]:
    if probe is None:
        return []
    done, possible = getattr(row.case.work, kind), getattr(probe.case.work, kind)
    return [(done / a) / (possible / b) for a, b in zip(row.seconds, probe.seconds, strict=True)]
