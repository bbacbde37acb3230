"""Runs the process of one instruction set, and samples its instructions where it asks for that."""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.sets.encodings import NotSampled, sample

ROOT = Path(__file__).resolve().parents[2]
MODULE = "benchmarks.sets.measure"
MOST_SAMPLES = 300
_BETWEEN_SAMPLES, _MOST_LINES, _CLEARING_SECONDS = 0.003, 2000, 60


class Failed(Exception):
    """A process did not come to its end; the message says how far it came, in one line."""


class Run:
    """A process, and what it has said.

    Args:
        job: what it reads first, as JSON.
        environment: variables beside this process's own.
        log: takes its standard error.
        say: is told what goes on, a line each.
    """

    def __init__(
        self, job: Mapping[str, Any], environment: Mapping[str, str], log: Path, say: Callable[[str], None]
    ) -> None:
        self.say, self.log = say, log
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = os.environ | dict(environment) | {"PYTHONPATH": os.pathsep.join(paths)}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=variables,
                cwd=ROOT,
            )
        self.rest, self.is_watching, self.last = b"", False, "it began"
        self.counts: Counter[str] = Counter()
        self.lines: list[str] = []
        self._send(job)

    def to_end(self, seconds: float) -> Path:
        """Waits for the results.

        Args:
            seconds: after which the process is ended.

        Returns:
            The file that they are in.

        Raises:
            Failed: there are none.
        """
        assert self.process.stdin
        assert self.process.stdout
        limit = time.monotonic() + seconds
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                while (left := limit - time.monotonic()) > 0:
                    if selector.select(_BETWEEN_SAMPLES if self.is_watching else left):
                        data = os.read(self.process.stdout.fileno(), 1 << 16)
                        if not data:
                            raise Failed(self._failure("ended"))
                        if done := self._take(data):
                            with suppress(subprocess.TimeoutExpired):
                                self.process.wait(_CLEARING_SECONDS)  # it removes its files
                            return done
                    elif self.is_watching:
                        self._sample()
            raise Failed(self._failure(f"was ended after {seconds:.0f} s"))
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            with suppress(BrokenPipeError):
                self.process.stdin.close()

    def _take(self, data: bytes) -> Path | None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            match message:
                case {"say": str(text)}:
                    self.last = text
                    self.say(text)
                case {"watch": True}:
                    self.is_watching, self.counts, self.lines = True, Counter(), []
                case {"watched": True}:
                    self.is_watching = False
                    self._send({"counts": self.counts, "lines": self.lines})
                case {"done": str(file)}:
                    return Path(file)
                case _:
                    if len(self.lines) < _MOST_LINES:
                        self.lines.append(line.decode(errors="replace"))
        return None

    def _sample(self) -> None:
        if sum(self.counts.values()) >= MOST_SAMPLES:
            return
        try:
            self.counts[sample(self.process.pid)] += 1
        except NotSampled as error:
            self.is_watching = False
            self.say(f"instructions are not sampled: {error}")

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # its output ends too, which says more
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _failure(self, how: str) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"its process {how} after: {self.last}" + (f": {lines[-1][:200]}" if lines else "")
