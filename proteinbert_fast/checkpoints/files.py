"""Reading and writing whole files so that what is on the disk is complete or absent."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from proteinbert_fast.errors import CheckpointError

# Twenty times the published file; larger ones are no ProteinBERT, and would fill the memory.
MAX_BYTES = 4 * 2**30


def one_line(error: BaseException) -> str:
    """The reason of an error of another library in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file.

    Raises:
        CheckpointError: it is missing, not a regular file, not readable, empty, or over ``max_bytes``.
    """
    return _read(path, max_bytes, max_bytes)


def read_beginning(path: Path) -> bytes:
    """The first kilobyte of a regular file of a checkpoint's size.

    Raises:
        CheckpointError: it is missing, not a regular file, not readable, empty, or too large.
    """
    return _read(path, MAX_BYTES, 1024)


def _read(path: Path, max_bytes: int, count: int) -> bytes:
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file")
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: over {max_bytes:,} bytes, more than such a file can hold")
        with path.open("rb") as file:
            data = file.read(min(count, size + 1))  # a larger number would be reserved as memory at once
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error
    if not data:
        raise CheckpointError(f"{path}: the file is empty")
    return data


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {one_line(error)}") from error


def flush_file(path: Path) -> None:
    """Returns when a file that another library wrote is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_directory(directory: Path) -> None:
    """Make a rename in ``directory`` survive a power cut."""
    if os.name == "nt":  # Windows has no handle on a directory to flush
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, pieces: Iterable[bytes]) -> str:
    """Write ``pieces`` to ``path``, which holds its old content or all of the new; returns the SHA-256.

    Raises:
        CheckpointError: the file cannot be written, for instance because the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    digest = hashlib.sha256()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {one_line(error)}") from error
    return digest.hexdigest()


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which appears as ``path`` when the block ends and never half full.

    Where ``path`` is a directory with content already, that directory itself is given, to replace files in.

    Raises:
        CheckpointError: the directory cannot be made, or ``path`` is a file.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: a file is in the way of the directory")
    try:
        if path.is_dir() and any(path.iterdir()):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            os.replace(temporary, path)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(temporary), str(path))) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        flush_directory(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {one_line(error)}") from error
