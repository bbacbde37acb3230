"""A module of this package in a process of its own, so that a fault of the device there ends nothing here."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import proteinbert_fast


class Ended(NamedTuple):
    """What a process printed, and how it ended.

    Attributes:
        output: lines of its standard output.
        errors: lines of its standard error.
        end: in words.
    """

    output: list[str]
    errors: list[str]
    end: str


def run(module: str, job: Any, seconds: float) -> Ended:
    """Runs ``python -m module`` with a job on its standard input, as JSON, and waits for its end.

    Args:
        module: its name.
        job: what JSON can hold.
        seconds: after which the process is ended.
    """
    paths = [str(Path(proteinbert_fast.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=errors,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        )
        try:
            process.communicate(json.dumps(job), timeout=seconds)
            end = f"its process ended with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            end = f"its process was ended after {seconds:.0f} s"
        out.seek(0)
        errors.seek(0)
        return Ended(out.read().splitlines(), errors.read().strip().splitlines(), end)
