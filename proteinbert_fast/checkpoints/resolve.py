"""From a name or path to a checked checkpoint, and from a model to a checkpoint directory."""

import os
import re
from dataclasses import replace
from pathlib import Path

import torch

from proteinbert_fast.cache import cache_directory
from proteinbert_fast.checkpoints.directories import (
    CONFIG_FILE,
    GO_TERMS_FILE,
    OPTIMIZER_FILE,
    WEIGHTS_FILE,
    read_directory,
    read_single_file,
    write_directory,
)
from proteinbert_fast.checkpoints.files import one_line, read_beginning
from proteinbert_fast.checkpoints.foreign import refuse_foreign_file
from proteinbert_fast.checkpoints.official import read_official
from proteinbert_fast.checkpoints.published import PUBLISHED, fetch_published, is_offline
from proteinbert_fast.checkpoints.restricted_pickle import shown
from proteinbert_fast.checkpoints.values import GoTerm, LoadedCheckpoint, OptimizerState
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import CheckpointError
from proteinbert_fast.weights import SHIPPED, shipped_directory

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    offline: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    optimizer: bool = True,
) -> LoadedCheckpoint:
    """Read a checkpoint and check all of it; no file can run code.

    Args:
        name_or_path: ``"proteinbert-swissprot"``, which comes with this package; ``"proteinbert"``, the original's
            published weights; a directory with config.json and model.safetensors; an official .pkl; a .safetensors
            file; or ``owner/name`` on the Hugging Face hub. The two names go before a directory of that name
            (``./proteinbert``), an existing path before a hub name.
        offline: fetch nothing. None: as PROTEINBERT_FAST_OFFLINE or HF_HUB_OFFLINE say.
        cache_dir: where fetched files are kept. None: PROTEINBERT_FAST_CACHE or ~/.cache/proteinbert_fast,
            and for hub names the hub's own cache.
        optimizer: whether to fetch and return the optimiser state, twice the size of the weights.

    Raises:
        CheckpointError: there is no such checkpoint, it cannot be fetched, or it is damaged, unsafe or of
            another model.
    """
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in SHIPPED:
        return replace(read_directory(shipped_directory(name), optimizer=optimizer), source=name)
    if isinstance(name_or_path, str) and name in PUBLISHED:
        path = fetch_published(name, offline=is_offline(offline), cache_dir=cache_directory(cache_dir))
        return replace(read_official(path, optimizer=optimizer), source=name)
    if not name or "\0" in name:
        raise CheckpointError(f"{shown(name) or 'empty name'}: not a path or name of a checkpoint")
    path = Path(name).expanduser()
    if path.is_dir():
        return read_directory(path, optimizer=optimizer)
    if path.exists():
        return _read_file(path, optimizer)
    if isinstance(name_or_path, str) and _HUB_NAME.fullmatch(name) and path.suffix not in (".pkl", ".safetensors"):
        directory = _fetch_from_hub(name, is_offline(offline), cache_dir, optimizer)
        return replace(read_directory(directory, optimizer=optimizer), source=name)
    raise CheckpointError(
        f"{shown(name)}: no such file or directory, no hub name (owner/name), and not a known name "
        f"({', '.join([*SHIPPED, *PUBLISHED])})"
    )


def save_pretrained(
    model: torch.nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer_state: OptimizerState | None = None,
    go_terms: tuple[GoTerm, ...] | None = None,
) -> None:
    """Write a model as config.json and model.safetensors, which ``from_pretrained`` and the hub read.

    Args:
        model: a ``ProteinBert``, also one wrapped by DDP or ``torch.compile``; weights keep their type.
        directory: made if missing; other files in it are left alone.
        optimizer_state: written beside the weights as optimizer.safetensors.
        go_terms: the term behind each annotation output, written as go_terms.tsv; None: the model's
            ``go_terms``, if it has them.

    Raises:
        CheckpointError: a weight is not finite or not of a type that is kept, or a file cannot be written.
    """
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), torch.nn.Module):
        model = inner
    config = getattr(model, "config", None)
    if not isinstance(config, ProteinBertConfig):
        raise TypeError(f"save_pretrained takes a ProteinBert, not {type(model).__name__}")
    terms = getattr(model, "go_terms", None) if go_terms is None else go_terms
    target = Path(directory).expanduser()
    write_directory(target, LoadedCheckpoint(config, model.state_dict(), None, str(target), optimizer_state, terms))


def _read_file(path: Path, optimizer: bool) -> LoadedCheckpoint:
    """Read a file by what it is: by its first bytes, or a .pkl as a pickle in any case."""
    beginning = read_beginning(path)
    refuse_foreign_file(path, beginning)
    is_pickle = beginning[:1] == b"\x80" and beginning[8:9] != b"{"  # safetensors have JSON from byte 8 on
    return read_official(path, optimizer=optimizer) if is_pickle or path.suffix == ".pkl" else read_single_file(path)


def _fetch_from_hub(name: str, offline: bool, cache_dir: str | os.PathLike[str] | None, optimizer: bool) -> Path:
    """The directory in the hub's cache that holds the files of a repository that we read."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    files = [CONFIG_FILE, WEIGHTS_FILE, GO_TERMS_FILE, *([OPTIMIZER_FILE] if optimizer else [])]
    hub_cache = None if cache_dir is None else Path(cache_dir).expanduser()
    try:
        directory = Path(snapshot_download(name, allow_patterns=files, local_files_only=offline, cache_dir=hub_cache))
    except GatedRepoError as error:
        raise CheckpointError(f"{name}: this hub repository asks for a login: run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{name}: no such path, and no such public repository on the hub") from error
    except LocalEntryNotFoundError as error:
        why = "offline" if offline else "the hub cannot be reached"
        raise CheckpointError(f"{name}: no such path, and not in the hub's cache ({why})") from error
    except Exception as error:  # network errors are those of requests, httpx or httpx2, by the library's version
        raise CheckpointError(f"{name}: cannot be fetched from the hub: {one_line(error)}") from error
    if not (directory / CONFIG_FILE).exists() or not (directory / WEIGHTS_FILE).exists():
        raise CheckpointError(
            f"{name}: this hub repository has no {CONFIG_FILE} and {WEIGHTS_FILE} of a ProteinBERT; "
            'the original\'s weights are "proteinbert"'
        )
    return directory
