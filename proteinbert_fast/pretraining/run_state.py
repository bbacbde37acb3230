"""Checkpoints of a run: complete or absent, and refused where they belong to another run.

A checkpoint is a directory ``step-00001000``: tensors in safetensors files, written by torch.distributed.checkpoint and
the same for any number of ranks, and ``run.json`` with everything that is no tensor, and digests of the files. It is
written under another name, flushed, and renamed; what a kill leaves behind has that other name and is swept away later.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from proteinbert_fast._version import __version__
from proteinbert_fast.checkpoints.files import flush_directory, flush_file, one_line, sha256_of, write_atomically
from proteinbert_fast.errors import CheckpointError

FORMAT = "proteinbert_fast pretraining checkpoint"
VERSION = 3  # 2 counted starts and ends of proteins as residues
T = TypeVar("T")

_NAME = re.compile(r"step-(\d{8,})")
_RUN = "run.json"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class RunState:
    """Everything that a run needs to go on.

    Attributes:
        tensors: by name.
        facts: what JSON can hold.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(folder: Path, step: int, state: RunState) -> Path:
    """Writes a checkpoint. All ranks call this; it returns when the checkpoint is on the disk.

    Raises:
        CheckpointError: it cannot be written, for instance because the disk is full. Older ones are as they were.
    """
    target = folder / f"step-{step:08d}"
    error = _write(target, step, state) if is_first() else None
    # All ranks hold the same, so one writes; all of them hear how that went.
    if error := from_first(error):
        raise CheckpointError(f"{target}: cannot be written: {error}")
    return target


def _write(target: Path, step: int, state: RunState) -> str | None:
    """Writes a checkpoint; why that failed, or None."""
    partial = target.with_name(target.name + _PARTIAL)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with _quiet():
            save(dict(state.tensors), storage_writer=HuggingFaceStorageWriter(str(partial)), no_dist=True)
        files = sorted(partial.iterdir())
        for path in files:
            flush_file(path)
        digests = {path.name: sha256_of(path) for path in files}
        facts = {
            "format": FORMAT, "format_version": VERSION, "version": __version__, "step": step, "sha256": digests,
            **state.facts,
        }  # fmt: skip
        facts["own_sha256"] = _own_digest(facts)
        write_atomically(partial / _RUN, [(json.dumps(facts, indent=1) + "\n").encode()])
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        flush_directory(target.parent)
    except (OSError, CheckpointError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        return _reason(error)
    return None


def load_state(path: Path) -> RunState:
    """Reads a checkpoint. Every rank reads all of it.

    Raises:
        CheckpointError: it is damaged, or of a version that this one does not know.
    """
    try:
        facts = json.loads((path / _RUN).read_bytes())
        if facts["format"] != FORMAT or facts["format_version"] != VERSION:
            raise CheckpointError(f"{path / _RUN}: is a checkpoint of another format than {VERSION}")
        if facts.pop("own_sha256") != _own_digest(facts):
            raise CheckpointError(f"{path / _RUN}: is damaged: it is not what was written")
        for name, digest in facts["sha256"].items():
            if sha256_of(path / name) != digest:
                raise CheckpointError(f"{path / name}: is damaged: it is not what was written")
        reader = HuggingFaceStorageReader(str(path))
        tensors: dict[str, Any] = {
            name: torch.empty(item.size, dtype=item.properties.dtype)
            for name, item in reader.read_metadata().state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
        }
        with _quiet():
            load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, KeyError, TypeError, ValueError, CheckpointException) as error:
        raise CheckpointError(f"{path}: is damaged or cannot be read: {_reason(error)}") from error
    return RunState(tensors, facts)


def _own_digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """One process reads and writes, which torch need not remark on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and paths of the complete checkpoints in a folder, oldest first."""
    found = [(m, p) for p in (folder.iterdir() if folder.is_dir() else ()) if (m := _NAME.fullmatch(p.name))]
    return sorted((int(match[1]), path) for match, path in found if (path / _RUN).is_file())


def sweep(folder: Path, keep_last: int, keep_every: int, keep: Container[int]) -> None:
    """Removes checkpoints that the policy does not keep, and what was left half written.

    Args:
        folder: with the checkpoints.
        keep_last: how many of the newest stay.
        keep_every: those whose step is a multiple of it stay; 0 for none.
        keep: steps that stay for another reason.
    """
    if not folder.is_dir():
        return
    found = checkpoints(folder)
    for step, path in found[: max(len(found) - keep_last, 0)]:
        if step not in keep and not (keep_every and step % keep_every == 0):
            # Renamed first: half a checkpoint never has a name that counts.
            gone = path.with_name(path.name + _PARTIAL)
            path.rename(gone)
    for path in folder.glob(f"step-*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return not is_distributed() or dist.get_rank() == 0


def from_first(value: T) -> T:
    """What the first rank has; waits for it."""
    if not is_distributed():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)
