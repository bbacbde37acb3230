"""Verdicts of self-checks on disk: a check is run once per GPU, driver, PyTorch, Triton and version of the kernels.

A file holds one verdict, with all that it depends on. One that cannot be read, or is about something else, counts as
none.
"""

import ctypes
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from proteinbert_fast._version import __version__
from proteinbert_fast.cache import cache_directory
from proteinbert_fast.checkpoints.files import write_atomically
from proteinbert_fast.errors import CheckpointError
from proteinbert_fast.ops.switches import HOPPER_ENABLED
from proteinbert_fast.self_check.compare import Kind, reduced

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        failure: why the kernels must not run; None where they may.
        hopper_failure: why those for Hopper must not run; None where they may, or are not for this GPU.
        date: of the check, in ISO form.
        path: the file that holds it; None where it could not be written.
    """

    failure: str | None
    hopper_failure: str | None
    date: str
    path: Path | None = None


def identity(kind: Kind) -> dict[str, Any]:
    """All that a verdict depends on, as plain values."""
    return {
        "format": FORMAT,
        **_machine(kind.device),
        "config": reduced(kind.config).to_dict(),
        "dtype": str(kind.dtype),
        "parameters": str(kind.parameters),
        "is_exact": kind.is_exact,
        "gradients": kind.gradients,
    }


def path_of(about: dict[str, Any]) -> Path:
    """The file of the verdict on an `identity`."""
    name = re.sub(r"[^a-z0-9]+", "-", str(about["device"]).lower()).strip("-")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return cache_directory() / "self_check" / f"{name}-{digest}.json"


def read(kind: Kind) -> Verdict | None:
    """The verdict that holds for a kind, or None. One with gradients holds without them, too."""
    for asked in dict.fromkeys((replace(kind, gradients=True), kind)):
        about = identity(asked)
        path = path_of(about)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning("%s: cannot be read (%s): the kernels are checked again", path, " ".join(str(error).split()))
            continue
        if isinstance(values, dict) and values.get("about") == about and _is_verdict(values):
            # Of a check with gradients, what failed may be those alone.
            if values["failure"] is None or asked == kind:
                return Verdict(values["failure"], values["hopper_failure"], values["date"], path)
        else:
            logger.warning("%s: is no verdict on this machine: the kernels are checked again", path)
    return None


def _is_verdict(values: dict[str, Any]) -> bool:
    texts = values.get("failure", 0), values.get("hopper_failure", 0)
    return all(text is None or isinstance(text, str) for text in texts) and isinstance(values.get("date"), str)


def write(kind: Kind, verdict: Verdict) -> Verdict:
    """Keeps a verdict, where the cache can be written; returns it with its file."""
    about = identity(kind)
    path = path_of(about)
    values = {key: value for key, value in asdict(verdict).items() if key != "path"} | {"about": about}
    try:
        write_atomically(path, [(json.dumps(values, indent=1) + "\n").encode()])
    except CheckpointError as error:
        logger.warning("%s; the kernels are checked again in the next process", error)
        return verdict
    return replace(verdict, path=path)


@contextmanager
def alone(kind: Kind, seconds: float) -> Iterator[None]:
    """One process of this machine checks a kind at a time; others wait, and find its verdict.

    Without a lock where the cache cannot be written, or after so many seconds.

    Args:
        kind: what is checked.
        seconds: to wait at most.
    """
    from filelock import FileLock, Timeout

    path = path_of(identity(kind))
    held = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=seconds)
    except (OSError, NotImplementedError, Timeout) as error:
        logger.debug("no lock on %s: %s", path, error)
    try:
        yield
    finally:
        held.release()


def _machine(device: torch.device) -> dict[str, Any]:
    """Of the GPU, or of the interpreter where there is none, and of the code that runs there."""
    found: dict[str, Any] = {"device": str(device), "capability": None, "driver": None}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found = {
            "device": torch.cuda.get_device_name(device), "capability": f"{major}.{minor}", "driver": _driver_version()
        }  # fmt: skip
    return found | {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "proteinbert_fast": __version__,
        "kernels": _digest_of_kernels(),
        "tuned": _tuned_table(device),
        "hopper": HOPPER_ENABLED,
    }


@cache
def _driver_version() -> str:
    """Of the driver as NVIDIA names it, "580.159.04"; PyTorch's CUDA where that is unknown."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        version = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0 and library.nvmlSystemGetDriverVersion(version, len(version)) == 0:
            return version.value.decode(errors="replace")
    except (OSError, AttributeError):
        pass
    return f"CUDA {torch.version.cuda}"


@cache
def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("triton", "pytorch-triton"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


@cache
def _digest_of_kernels() -> str:
    """Of the source of all operations, which is what changes between two commits of one version."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    beyond = [folder / f"{name}.py" for name in ("model", "packing", "spans")]
    for path in [*sorted((folder / "ops").rglob("*.py")), *beyond]:
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes() + b"\n")
    return digest.hexdigest()


def _tuned_table(device: torch.device) -> str | None:
    """Digest of the tuned configurations in use; None for the shipped ones."""
    if device.type != "cuda":
        return None
    from proteinbert_fast.ops.kernels import tuning

    found = tuning.table(torch.cuda.current_device() if device.index is None else device.index)
    if found is None:
        return None
    return hashlib.sha256(json.dumps(dict(found.configurations), sort_keys=True).encode()).hexdigest()[:16]

