"""A self-check in a process of its own: a kernel that hangs or reads beyond its memory ends that process, not this one.

    python -m proteinbert_fast.self_check < job.json

The process prints JSON lines, each with the job's token: what was begun, how many kernels are compiled, what was
measured. Lines without it are somebody else's and ignored. What was measured is judged here.
"""

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from proteinbert_fast.self_check import compare
from proteinbert_fast.self_check.compare import Kind, Measured, failure_in

COMMAND = (sys.executable, "-P", "-m", "proteinbert_fast.self_check")
SECONDS = 600.0  # for all of it; of which compiling, on a slow host with an empty cache, is most
CHECK_SECONDS = 120.0  # from the last kernel compiled to the end
_LONGEST_LINE = 1 << 16
_PACKAGES = str(Path(__file__).parents[2])


class Outcome(NamedTuple):
    """How a check ended.

    Attributes:
        failure: what is wrong with the kernels, in words; None where nothing is.
        is_final: whether that holds for later processes too; not where nothing was checked, for want of memory, say.
    """

    failure: str | None
    is_final: bool


class Interrupted(NamedTuple):
    """The process was ended: it took too long."""

    while_doing: str
    seconds: float


def job_of(kind: Kind) -> dict[str, Any]:
    """A check, as plain values."""
    uuid = None
    if kind.device.type == "cuda":
        uuid = str(torch.cuda.get_device_properties(kind.device).uuid)
    return {
        "device": str(kind.device), "uuid": uuid, "config": kind.config.to_dict(), "dtype": _name(kind.dtype),
        "parameters": _name(kind.parameters), "is_exact": kind.is_exact, "gradients": kind.gradients,
        "lengths": list(compare.LENGTHS), "token": secrets.token_hex(8),
    }  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(kind: Kind, hopper: bool, say: Callable[[str, int, int], None]) -> Outcome:
    """Runs a check and judges it.

    Args:
        kind: what is checked.
        hopper: the kernels for Hopper may run.
        say: is told what is done, how much of it, and of how much.
    """
    job = job_of(kind)
    # Deterministic mode, in which new memory is filled with NaN, wants this of cuBLAS.
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([_PACKAGES, *filter(None, [os.environ.get("PYTHONPATH")])])
    if not hopper:
        environment["PROTEINBERT_FAST_HOPPER"] = "0"
    received: dict[str, Any] = {}

    def receive(line: dict[str, Any]) -> None:
        received.update(line)
        if "compiled" in line:
            say("compiling GPU kernels", int(line["compiled"]), int(line["of"]))
        elif line.get("begun") == "check":
            say("checking GPU kernels", 0, 1)

    try:
        end = _run(job, environment, receive)
    except OSError as error:
        return Outcome(f"the process of the self-check could not be started: {error}", False)
    return judged(received, end, kind)


def judged(received: dict[str, Any], end: str | Interrupted | None, kind: Kind) -> Outcome:
    """What a process said, and how it ended, mean.

    Args:
        received: the values of its lines, the last of each name.
        end: how it ended, in words; None for exit code 0.
        kind: what it checked.
    """
    if isinstance(end, Interrupted):
        text = f"the self-check did not end within {end.seconds:.0f} s ({end.while_doing})"
        return Outcome(text, end.while_doing == "checking")
    if "unable" in received:
        return Outcome(f"they could not be checked: {received['unable']}", False)
    if end is not None:
        if "begun" not in received:
            return Outcome(f"the process of the self-check did not begin: {end}", False)
        return Outcome(f"the process of the self-check died: {end}", True)
    if "failed" in received:
        return Outcome(str(received["failed"]), True)
    measured = received.get("measured")
    try:
        error, gradient_error = measured  # type: ignore[misc]
        numbers = Measured(float(error), None if gradient_error is None else float(gradient_error))
    except (TypeError, ValueError):
        return Outcome("the process of the self-check ended without a result", True)
    return Outcome(failure_in(numbers, kind), True)


def _run(
    job: dict[str, Any], environment: dict[str, str], receive: Callable[[dict[str, Any]], None]
) -> str | Interrupted | None:
    """Runs the process; how it ended, None for exit code 0."""
    started = phase_started = time.monotonic()
    doing, limit = "compiling", SECONDS
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment,
            start_new_session=True,
        )  # fmt: skip
        found: queue.Queue[dict[str, Any] | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, job["token"], found), daemon=True)
        reader.start()
        try:
            _send(process, job)
            is_open = True
            while is_open:
                left = phase_started + limit - time.monotonic()
                if left <= 0:
                    return Interrupted(doing, time.monotonic() - started)
                has_ended = process.poll() is not None
                try:
                    line = found.get(timeout=min(left, 0.2))
                except queue.Empty:
                    # What it has started may keep the pipe open after its end.
                    is_open = not has_ended
                    continue
                if line is None:  # it may still run
                    is_open = process.poll() is None and not _ends_within(process, left)
                    continue
                if line.get("begun") == "check" and doing == "compiling":
                    doing, limit, phase_started = "checking", CHECK_SECONDS, time.monotonic()
                receive(line)
            return _ending(process.returncode, errors)
        finally:
            _end(process)
            reader.join(timeout=1)


def _ends_within(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)
    return process.returncode is not None


def _send(process: "subprocess.Popen[bytes]", job: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        with process.stdin as pipe:
            pipe.write(json.dumps(job).encode())
    except BrokenPipeError:  # it ended before it read: its exit code says more
        pass


def _read(pipe: IO[bytes], token: str, found: "queue.Queue[dict[str, Any] | None]") -> None:
    """Passes lines of ours on, and None at the end; whatever else is printed is dropped."""
    with pipe:
        while text := pipe.readline(_LONGEST_LINE):
            if (line := _line(text, token)) is not None:
                found.put(line)
    found.put(None)


def _line(text: bytes, token: str) -> dict[str, Any] | None:
    """A line of ours, or None."""
    if not text.startswith(b"{"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and line.get("token") == token else None


def _ending(code: int, errors: IO[bytes]) -> str | None:
    if code == 0:
        return None
    try:
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        end = f"signal {-code}"
    errors.seek(0, os.SEEK_END)
    errors.seek(max(errors.tell() - 4096, 0))
    said = [line.strip() for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    return f"{end}: {said[-1][:200]}" if said else end


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and whatever it has started, without waiting for a driver that does not let go of it."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
