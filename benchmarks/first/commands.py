"""Other programs that a probe runs, with a limit. Standard library only."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

# A tool may say the same thing of every thread.
MOST_CHARACTERS = 400_000


class Output(NamedTuple):
    """What a program printed, both streams together, cut in the middle; how it ended, in words; seconds."""

    text: str
    end: str
    seconds: float

    @property
    def well(self) -> bool:
        """Whether its exit code was 0."""
        return self.end == "exit code 0"


def output_of(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Output:
    """Runs a program and waits for it; it is ended with all that it started when it takes longer than ``seconds``."""
    started = time.monotonic()
    # A file: a process that is left over would keep a pipe open.
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                   env=os.environ | dict(environment or {}), start_new_session=True)  # fmt: skip
        try:
            end = f"exit code {process.wait(max(seconds, 1.0))}"
        except subprocess.TimeoutExpired:
            end = f"ended after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        took = time.monotonic() - started
        size = out.seek(0, os.SEEK_END)
        out.seek(0)
        text = out.read(MOST_CHARACTERS // 2).decode(errors="replace")
        if size > MOST_CHARACTERS:
            out.seek(size - MOST_CHARACTERS // 2)
            text += "\n[...]\n"
        return Output(text + out.read(MOST_CHARACTERS).decode(errors="replace"), end, took)
