"""Cases whose first run the parent process watches: it samples which instructions they execute.

The measuring process announces a run on its standard output, a line of JSON each, and reads what was seen from its
standard input. Nothing is watched while it is timed.
"""

import ctypes
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from benchmarks.sets.encodings import in_words
from benchmarks.sets.holding import InstructionSet
from proteinbert_fast.benchmark.cases import Case, Ready

LEAST_SECONDS = 0.3
BEYOND = "BEYOND"  # before the name of the set, where instructions were seen that it lacks
Result = TypeVar("Result")


class Channel:
    """To the parent process."""

    def say(self, line: str) -> None:
        """Tells what goes on."""
        self._send({"say": line})

    def done(self, file: str) -> None:
        """Tells where the results are."""
        self._send({"done": file})

    def watch(
        self, run: Callable[[], Result], seconds: float = LEAST_SECONDS
    ) -> tuple[Result, Counter[str], list[str]]:
        """Runs something, again and again if it is short, while the parent takes samples.

        Args:
            run: does the work once.
            seconds: for which it runs at least.

        Returns:
            The first result, how many samples there were of each encoding, and what libraries printed meanwhile.
        """
        self._send({"watch": True})
        started = time.perf_counter()
        result = run()  # the first one is checked: a training step's weights move
        while time.perf_counter() - started < seconds:
            run()
        # Libraries that print leave their lines in C's buffer, which is not Python's.
        ctypes.CDLL(None).fflush(None)
        self._send({"watched": True})
        seen = json.loads(sys.stdin.readline())
        return result, Counter(seen["counts"]), seen["lines"]

    @staticmethod
    def _send(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)


class Alone(Channel):
    """Where nobody watches."""

    def say(self, line: str) -> None:
        """Nobody listens."""

    def watch(
        self, run: Callable[[], Result], seconds: float = LEAST_SECONDS
    ) -> tuple[Result, Counter[str], list[str]]:
        """Runs it once; there are no samples."""
        return run(), Counter(), []


def watched(case: Case, channel: Channel, seen: dict[str, Counter[str]]) -> Case:
    """The case, whose first run is watched.

    Args:
        case: any.
        channel: to the watching process.
        seen: takes the samples, by the case's label.
    """

    def prepare() -> Ready[Any]:
        ready = case.prepare()

        def run() -> Any:
            if case.label in seen:
                return ready.run()
            result, counts, _ = channel.watch(ready.run)
            seen[case.label] = counts
            return result

        return replace(ready, run=run)

    return replace(case, prepare=prepare)


def instructions(counts: Counter[str], held: InstructionSet) -> str:
    """For a report: what was sampled, and whether it lies beyond the set."""
    if not counts:
        return "instructions not sampled"
    beyond = ", ".join(f"{name} {counts[name]}" for name in counts if name in held.beyond)
    return f"instructions sampled: {in_words(counts)}" + (f"; {BEYOND} {held.name}: {beyond}" if beyond else "")
