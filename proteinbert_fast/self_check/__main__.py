"""The process of a self-check: reads a job, prints JSON lines; see ``apart.py``."""

import ctypes
import json
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.self_check.compare import Kind, measure


def main() -> int:
    """Runs the job on standard input; returns the exit code."""
    _end_with_parent()
    job = json.loads(sys.stdin.read())
    output = sys.stdout

    def say(**values: Any) -> None:
        # In one piece, behind a line break: whatever the compiler prints must not end up in it.
        output.write("\n" + json.dumps(values | {"token": job["token"]}) + "\n")
        output.flush()

    say(begun="compile")
    kind = _kind(job, say)
    if kind is None:
        return 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is filled with NaN
    if not kind.is_exact:
        torch.set_float32_matmul_precision("high")
    try:
        _compile(kind, say)
        say(begun="check")
        measured = measure(kind, lengths=job["lengths"])
        if kind.device.type == "cuda":
            torch.cuda.synchronize(kind.device)
    except torch.OutOfMemoryError as error:
        say(unable=f"out of memory on {kind.device}: {_line(error)}")
    except Exception as error:  # whatever the compiler or the driver raises
        say(failed=f"{type(error).__name__}: {_line(error)}")
    else:
        say(measured=list(measured))
    return 0


def _end_with_parent() -> None:
    """Whoever waits for this check may be killed: then a kernel that hangs must not go on for good."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _kind(job: dict[str, Any], say: Callable[..., None]) -> Kind | None:
    """What is to be checked, on this process's name of the device; None where it cannot be used, which is said."""
    device = torch.device(job["device"])
    if device.type == "cuda":
        try:
            found = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
            if job["uuid"] not in found:
                say(unable=f"another process does not see GPU {job['uuid']}")
                return None
            device = torch.device("cuda", found.index(job["uuid"]))
            torch.cuda.set_device(device)
            torch.zeros(1, device=device)
        except Exception as error:  # in exclusive-process mode, or full
            say(unable=f"another process cannot use the GPU: {_line(error)}")
            return None
    return Kind(
        device, ProteinBertConfig.from_dict(job["config"]), getattr(torch, job["dtype"]),
        getattr(torch, job["parameters"]), job["is_exact"], job["gradients"],
    )  # fmt: skip


def _compile(kind: Kind, say: Callable[..., None]) -> None:
    """Compiles in threads what the check, and the passes after it, would compile one after the other."""
    from proteinbert_fast.ops.kernels import warm
    from proteinbert_fast.ops.kernels.launching import is_interpreted

    if not is_interpreted():
        warm.compile_for(
            kind.device, kind.config, kind.dtype, kind.parameters, kind.gradients,
            lambda done, of: say(compiled=done, of=of),
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
