"""Published weights by name: where they lie, how they are recognised, and fetching them once into a cache."""

import http.client
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from proteinbert_fast._version import __version__
from proteinbert_fast.checkpoints.files import flush_directory, one_line, sha256_of
from proteinbert_fast.checkpoints.foreign import refuse_foreign_file
from proteinbert_fast.errors import CheckpointError

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0
# A connection may break this often without a byte gained before the next place is tried.
TRIES_WITHOUT_PROGRESS = 3
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A weights file that lies on the internet.

    Attributes:
        file_name: its name in the cache.
        urls: places to fetch it from, tried in order.
        size: in bytes.
        sha256: in hex; a file with another one is never used.
        page: where a person can download it by hand.
    """

    file_name: str
    urls: tuple[str, ...]
    size: int
    sha256: str
    page: str


PUBLISHED: dict[str, PublishedCheckpoint] = {
    # The same file under two names: https://doi.org/10.5281/zenodo.10371965 and
    # nadavbra/proteinbert_data_files.
    "proteinbert": PublishedCheckpoint(
        file_name="epoch_92400_sample_23500000.pkl",
        urls=(
            "https://zenodo.org/records/10371965/files/full_go_epoch_92400_sample_23500000.pkl?download=1",
            "https://media.githubusercontent.com/media/nadavbra/proteinbert_data_files/master/"
            "epoch_92400_sample_23500000.pkl",
        ),
        size=191_800_918,
        sha256="cffb53e237e49fa91f19a4c8bc0898dcfd75fd12eab7833d6e95b36c02ebacbf",
        page="https://zenodo.org/records/10371965",
    ),
}


def is_offline(offline: bool | None = None) -> bool:
    """Whether nothing may be fetched: as said, or else by PROTEINBERT_FAST_OFFLINE or HF_HUB_OFFLINE."""
    if offline is not None:
        return offline
    yes = {"1", "true", "yes", "on"}
    return any(os.environ.get(name, "").lower() in yes for name in ("PROTEINBERT_FAST_OFFLINE", "HF_HUB_OFFLINE"))


def fetch_published(name: str, *, offline: bool, cache_dir: Path) -> Path:
    """The file of published weights in the cache, fetched if it is not there yet; size and SHA-256 are checked.

    A cut download goes on where it stopped, also in a later call. Several processes may call this at once: one
    fetches, the others wait.

    Raises:
        CheckpointError: it is not in the cache and cannot be fetched, or the file there is not the published one.
    """
    published = PUBLISHED[name]
    path = cache_dir / published.file_name
    by_hand = f"download {published.page} by hand ({published.size:,} bytes) and give the path of the file"
    if not path.exists():
        if offline:
            raise CheckpointError(f"{name}: not in the cache ({path}), and offline: {by_hand}")
        with _lock(path):
            if not path.exists():  # another process may have fetched it while this one waited
                _fetch(name, published, path, by_hand)
    if (found := _wrongness(path, published)) is not None:
        raise CheckpointError(f"{path}: not the published file: {found}; delete it and try again, or {by_hand}")
    return path


def _fetch(name: str, published: PublishedCheckpoint, path: Path, by_hand: str) -> None:
    part = path.with_name(f"{path.name}.part")
    failures = []
    for url in published.urls:
        host = urlsplit(url).hostname
        logger.info("fetching %s (%.1f MB) from %s into %s", name, published.size / 1e6, host, path.parent)
        try:
            _fetch_from(url, part, name, published)
        except _MirrorError as error:
            failures.append(f"{host}: {error}")
            continue
        except OSError as error:
            raise CheckpointError(
                f"{part}: cannot be written: {one_line(error)}; {published.size:,} bytes are needed there, "
                "and another place can be set with PROTEINBERT_FAST_CACHE"
            ) from error
        try:
            os.replace(part, path)
            flush_directory(path.parent)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {one_line(error)}") from error
        return
    raise CheckpointError(f"{name}: could not be fetched ({'; '.join(failures)}); {by_hand}")


class _MirrorError(Exception):
    """One place did not give the file; the next one is tried."""


def _fetch_from(url: str, part: Path, name: str, published: PublishedCheckpoint) -> None:
    """Fill ``part`` from one place, going on where an earlier try stopped, and check it.

    Raises:
        _MirrorError: the place cannot be reached or has another file.
        OSError: the disk cannot take it.
    """
    started_with = furthest = _size(part)
    idle_tries = 0
    while _size(part) < published.size:
        try:
            _fetch_some(url, part, name, published)
            reason = "the connection broke"
        except _BrokenConnectionError as error:
            reason = str(error)
        if _size(part) > furthest:
            furthest, idle_tries = _size(part), 0
        elif (idle_tries := idle_tries + 1) >= TRIES_WITHOUT_PROGRESS:
            _refuse_other_file(part)
            raise _MirrorError(reason)
    found = _wrongness(part, published)
    if found is None:
        return
    other = _what_it_is(part)
    part.unlink()
    if started_with > 0:  # the earlier part may be the wrong one, not what this place gave
        _fetch_from(url, part, name, published)
        return
    raise _MirrorError(other or found)


class _BrokenConnectionError(Exception):
    """The connection failed or broke; trying again may help."""


def _fetch_some(url: str, part: Path, name: str, published: PublishedCheckpoint) -> None:
    """One request: append to ``part`` what the server gives, or start it anew if the server cannot go on."""
    start = _size(part)
    headers = {"User-Agent": f"proteinbert-fast/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # the part is longer than the server's file
            _refuse_other_file(part)
            part.unlink()
            raise _BrokenConnectionError("it refused to go on at the place reached") from error
        if error.code in (408, 429) or error.code >= 500:
            raise _BrokenConnectionError(f"HTTP {error.code} {error.reason}") from error
        raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (http.client.HTTPException, OSError) as error:
        raise _BrokenConnectionError(_network_reason(error)) from error
    with response:
        start = _check_answer(response, start, published)
        with part.open("ab" if start else "wb") as file, _progress(name, url, start, published.size) as bar:
            position = start
            while position <= published.size:
                try:
                    block = response.read(BLOCK_BYTES)
                except http.client.IncompleteRead as error:
                    block = error.partial
                    file.write(block)
                    raise _BrokenConnectionError("the connection broke") from error
                except (http.client.HTTPException, OSError) as error:
                    raise _BrokenConnectionError(_network_reason(error)) from error
                if not block:
                    break
                file.write(block)
                position += len(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())


def _check_answer(response: Any, start: int, published: PublishedCheckpoint) -> int:
    """Where in the file the answer starts: at ``start`` or, from a server that knows no ranges, at 0.

    Raises:
        _MirrorError: the answer announces another size than the published one.
    """
    total = response.headers.get("Content-Length")
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise _MirrorError("it answered with another part of the file than asked for")
        total = match[2] if match[2] != "*" else None
    else:
        start = 0
    if total is not None and total.isdecimal() and int(total) != published.size:
        beginning = response.read(1024) if start == 0 else b""
        what = _describe(beginning)
        raise _MirrorError(what or f"its file has {int(total):,} bytes, expected {published.size:,}")
    return start


def _refuse_other_file(part: Path) -> None:
    """Remove what arrived if it is plainly something else than the weights.

    Raises:
        _MirrorError: it is.
    """
    if (what := _what_it_is(part)) is not None:
        part.unlink()
        raise _MirrorError(what)


def _what_it_is(path: Path) -> str | None:
    if _size(path) == 0:
        return None
    with path.open("rb") as file:
        return _describe(file.read(1024))


def _describe(beginning: bytes) -> str | None:
    """What else than a pickle these first bytes begin, in one phrase."""
    try:
        refuse_foreign_file(Path("it"), beginning)
    except CheckpointError as error:
        return str(error).removeprefix("it: ")
    return None


def _wrongness(path: Path, published: PublishedCheckpoint) -> str | None:
    """In what a file is not the published one; None where it is."""
    if (size := _size(path)) != published.size:
        return f"it has {size:,} bytes, expected {published.size:,}"
    if (digest := sha256_of(path)) != published.sha256:
        return f"its SHA-256 is {digest}, expected {published.sha256}"
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _network_reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    return one_line(error)


def _progress(name: str, url: str, start: int, size: int) -> Any:
    from tqdm import tqdm

    label = f"{name} from {urlsplit(url).hostname}"
    return tqdm(desc=label, initial=start, total=size, unit="B", unit_scale=True, disable=None)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock on a file of the cache, whose directory is made if need be."""
    from filelock import FileLock

    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    except (OSError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path.parent}: cannot be used as a cache: {one_line(error)}; "
            "another place can be set with PROTEINBERT_FAST_CACHE"
        ) from error
    try:
        yield
    finally:
        held.release()
