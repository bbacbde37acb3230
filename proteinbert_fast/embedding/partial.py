"""The unfinished run beside an output: shards that are complete or absent, and a manifest that names them.

``embeddings.h5`` is written by way of the folder ``embeddings.h5.partial``::

    lock              held by the one process that writes
    manifest.json     what run this is, and which shards are complete
    shard-000000.bin  the embeddings of some records in a row, in input order

A shard is written under another name, flushed to the disk and renamed; then the folder is flushed; then the
manifest, itself replaced as a whole, names the shard. So a process may be killed at any moment: what the
manifest names is there, and the rest is deleted by the next run. Shards are plain bytes written with plain
system calls: the HDF5 library cannot be trusted when a disk is full (it crashes the process when it closes
the file).
"""

import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import h5py
import numpy as np
import numpy.typing as npt

from proteinbert_fast.data.claim import MANIFEST, Claim
from proteinbert_fast.data.disk import flush_folder, remove, write_all
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops.instruction_sets import MIXED, UNKNOWN, check_resumed

logger = logging.getLogger("proteinbert_fast")

Run = dict[str, Any]

SCHEMA = 1
SHARD_BYTES = 1 << 30
SHARD_SECONDS = 60.0  # at most this much work is lost when a process is killed

OPEN_SHARD = "shard-open.tmp"

# Names of the same weights may differ between two runs: the weights themselves are compared.
# Kernels have a check of their own.
_NOT_COMPARED = {"model", "model_sha256", "kernels"}


@dataclass(frozen=True)
class Shard:
    """A complete shard, as the manifest names it.

    Its file holds the rows, then int64 lengths, then int64 full lengths, then the ids, a line end between
    them.

    Attributes:
        file: name in the folder.
        records: records in it.
        row_bytes: bytes of all rows.
        id_bytes: bytes of all ids.
        crc32: of the whole file.
        n_overflowed: records with a value too large for float16.
    """

    file: str
    records: int
    row_bytes: int
    id_bytes: int
    crc32: int
    n_overflowed: int

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.row_bytes + 16 * self.records + self.id_bytes


class PartialRun(Claim):
    """The claim of one process on an output, and the shards that this or an earlier process has completed.

    Use as a context. On leaving it, what was added since the last shard is made a shard, also after an error;
    the folder stays for a later resume unless `finish` was called or there is no shard.

    Attributes:
        run: what this run is, once it has begun.
        begun: whether `begin` has found the run to be a new one, or the one that was interrupted.
    """

    NOUN = "run"
    MANIFEST_SCHEMA = SCHEMA

    def __init__(self, output: str, *, resume: bool, overwrite: bool) -> None:
        super().__init__(output, resume=resume, overwrite=overwrite)
        self.run: Run = {}
        self.begun = False
        self._kernels: str | None = None  # of the complete shards, and those of this process
        self._state = _State((), None, True)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._tidy("input-")
        except OSError as error:
            raise self.unwritable(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError):
                self._commit()
        finally:
            try:
                self._tidy_up()
            finally:
                # Closed in any case, also by the collection of this object: it holds the lock.
                self._lock.close()

    def _tidy_up(self) -> None:
        """Leaves the folder with nothing but complete shards and their manifest, or not at all."""
        if self._state.open is not None:
            self._state.open.discard()
        with suppress(OSError):
            if self.begun and not self.shards:
                remove(self.path(MANIFEST))
            self._tidy(*(("shard-", "merged", "input-") if self.begun else ("input-",)))
            self._leave_folder()

    def _tidy(self, *prefixes: str) -> None:
        self._remove_leftovers(prefixes, {shard.file for shard in self.shards})

    def begin(self, run: Run, allow_different_kernels: bool = False) -> bool:
        """Starts the run, or goes on with it. Afterwards ``self.run`` describes it.

        Args:
            run: what is to be made.
            allow_different_kernels: whether shards of other CPU kernels may be there.

        Returns:
            Whether the output is already complete.

        Raises:
            InputError: what is there belongs to another run; names the difference.
            ProteinBertError: the disk cannot be written to.
        """
        run = json.loads(json.dumps(run))
        manifest = self._read_manifest()
        if self._resume and os.path.exists(self.output):
            done = run_of(self.output)
            difference = "it is no embeddings file of this version" if done is None else _difference(done, run)
            if done is not None and not difference:
                # Other kernels may have made what is there, and the manifest may be of a run that is to replace it.
                made = manifest is None or manifest["run"].get("kernels") == done.get("kernels")
                if made or done.get("kernels") == run.get("kernels"):
                    self._accept_kernels(done, run, allow_different_kernels)
                    self.run, self.begun = done, True
                    return True
                difference = f"kernels was {json.dumps(done.get('kernels'))}, now {json.dumps(run.get('kernels'))}"
            self._refuse_other_output(manifest, difference)
        if manifest is None:
            self.run, self._kernels = run, run.get("kernels")
        else:
            if difference := _difference(manifest["run"], run):
                raise InputError(f"{self.output}: cannot resume: {difference}; start again with --overwrite")
            self.run, self._overwrite = manifest["run"], manifest["overwrite"]
            self._state = _State(tuple(Shard(**shard) for shard in manifest["shards"]), None, True)
            self._check_shards()
            self._continue_kernels(run, allow_different_kernels)
        try:
            self.begun = True
            self._write_manifest()
            self._tidy("shard-", "merged")
        except OSError as error:
            raise self.unwritable(error) from error
        return False

    def _accept_kernels(self, done: Run, run: Run, is_allowed: bool) -> None:
        """The output is complete: its kernels are those that would run, or unknown, or allowed to be others."""
        if "kernels" not in run:
            return
        if done.get("kernels") is None:
            logger.warning("%s: is complete, and does not say which kernels computed it", self.output)
        else:
            check_resumed(done["kernels"], run["kernels"], self.output, is_allowed)

    def _continue_kernels(self, run: Run, is_allowed: bool) -> None:
        now = run.get("kernels")
        if now is None:
            return
        self._kernels = now
        if not self.shards:
            self.run["kernels"] = now  # nothing of the others is there
            return
        before = self.run.get("kernels") or UNKNOWN
        self._kernels = check_resumed(before, now, self.output, is_allowed)
        if self._kernels != before:
            logger.warning(MIXED, self.output, self._kernels)

    def _check_shards(self) -> None:
        for shard in self.shards:
            path = self.path(shard.file)
            if not os.path.exists(path) or os.path.getsize(path) != shard.size:
                raise InputError(f"{path}: is missing or damaged; start again with --overwrite")

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The complete shards, in input order."""
        return self._state.shards

    @property
    def records_done(self) -> int:
        """Records in complete shards."""
        return sum(shard.records for shard in self.shards)

    def add_rows(self, rows: npt.NDArray[Any]) -> None:
        """Writes rows of the records that the next `add_records` will name.

        Raises:
            ProteinBertError: the disk cannot be written to; says how many records are safe.
        """
        try:
            if self._state.open is None:
                self._state = self._state._replace(open=_OpenShard(self.path(OPEN_SHARD)))
            assert self._state.open is not None
            self._state.open.write(rows)
        except OSError as error:
            self._give_up(error)

    def add_records(
        self, ids: Sequence[str], lengths: Sequence[int], full_lengths: Sequence[int], n_overflowed: int = 0
    ) -> None:
        """Names the records whose rows were added. From time to time this completes a shard.

        Args:
            ids: one of each record.
            lengths: residues that were embedded.
            full_lengths: residues that the record has.
            n_overflowed: records with a value too large for the storage dtype.

        Raises:
            ProteinBertError: the disk cannot be written to; says how many records are safe.
        """
        shard = self._state.open
        assert shard is not None
        shard.add_records(ids, lengths, full_lengths, n_overflowed)
        if shard.written >= SHARD_BYTES or time.monotonic() - shard.since >= SHARD_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Completes the open shard, if there is one.

        Raises:
            ProteinBertError: the disk cannot be written to; says how many records are safe.
        """
        try:
            self._commit()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        # The rows of unfinished records make room for the rest.
        with suppress(OSError):
            self._commit()
        raise self.unwritable(error) from error

    def _commit(self) -> None:
        shards, shard, _ = self._state
        if shard is not None and shard.is_empty:
            self._state = self._state._replace(open=None)
            shard.discard()
        elif shard is not None:
            done = shard.complete(self.folder, f"shard-{len(shards):06d}.bin")
            # Kernels take part from their first complete shard on.
            if self._kernels is not None:
                self.run["kernels"] = self._kernels
            self._state = _State((*shards, done), None, False)
            shard.close()
        if not self._state.manifest_is_current:
            self._write_manifest()

    def _write_manifest(self) -> None:
        self._replace_manifest({"run": self.run, "shards": [asdict(shard) for shard in self.shards]})
        self._state = self._state._replace(manifest_is_current=True)

    def finish(self) -> None:
        """Removes the shards, after the output has its name."""
        self._state = _State((), None, True)
        super().finish()
        self._tidy("shard-")

    def _safe(self) -> str:
        return f"{self.records_done:,} records" if self.shards else ""


class _State(NamedTuple):
    """How far a run is. Replaced as a whole: an interrupt finds the state before a step or after it."""

    shards: tuple[Shard, ...]
    open: "_OpenShard | None"
    manifest_is_current: bool


class _Added(NamedTuple):
    """Records that were named, and the state of the shard after their rows."""

    ids: Sequence[str]
    lengths: Sequence[int]
    full_lengths: Sequence[int]
    n_overflowed: int
    row_bytes: int
    crc32: int


class _OpenShard:
    """A shard that is being written, under a name that no manifest holds."""

    def __init__(self, path: str) -> None:
        self.since = time.monotonic()
        self.written = 0
        # One list with one entry per call: an interrupt never leaves it half changed.
        self._added: list[_Added] = []
        self._crc32 = 0
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o666)

    @property
    def is_empty(self) -> bool:
        return not self._added

    def write(self, rows: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        self._crc32 = zlib.crc32(data, self._crc32)
        self.written += len(data)
        write_all(self._file, data)

    def add_records(
        self, ids: Sequence[str], lengths: Sequence[int], full_lengths: Sequence[int], n_overflowed: int
    ) -> None:
        self._added.append(_Added(ids, lengths, full_lengths, n_overflowed, self.written, self._crc32))

    def complete(self, folder: str, name: str) -> Shard:
        """Gives the shard its name; it is on the disk then. Rows without a record are left out."""
        ids = list(chain.from_iterable(added.ids for added in self._added))
        lengths = list(chain.from_iterable(added.lengths for added in self._added))
        full_lengths = list(chain.from_iterable(added.full_lengths for added in self._added))
        row_bytes, crc32 = self._added[-1].row_bytes, self._added[-1].crc32
        names = "\n".join(ids).encode()
        tail = np.array([lengths, full_lengths], "<i8").tobytes() + names
        # May be the second time, when an interrupt or a full disk ended the first: every step can be
        # repeated.
        os.ftruncate(self._file, row_bytes)
        os.lseek(self._file, row_bytes, os.SEEK_SET)
        write_all(self._file, memoryview(tail))
        os.fsync(self._file)
        if os.path.exists(self._path):
            os.replace(self._path, os.path.join(folder, name))
        flush_folder(folder)
        n_overflowed = sum(added.n_overflowed for added in self._added)
        return Shard(name, len(ids), row_bytes, len(names), zlib.crc32(tail, crc32), n_overflowed)

    def close(self) -> None:
        os.close(self._file)

    def discard(self) -> None:
        self.close()
        remove(self._path)


def run_of(output: str) -> Run | None:
    """What run made an embeddings file; None if it is not one of this version."""
    try:
        with h5py.File(output, "r") as file:
            if file.attrs.get("schema_version") != SCHEMA:
                return None
            run: Run = json.loads(file.attrs["run"])
            return run
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _difference(old: Run, new: Run) -> str:
    """What is different between two runs, or nothing."""
    for key in [*old, *(key for key in new if key not in old)]:
        was, now = old.get(key), new.get(key)
        if was == now or key in _NOT_COMPARED:
            continue
        if key == "input" and was is not None and now is not None:
            if [file["name"] for file in was] == [file["name"] for file in now]:
                changed = [a["name"] for a, b in zip(was, now, strict=True) if a != b]
                return f"the content of {', '.join(changed)} has changed"
            was, now = ([file["name"] for file in files] for files in (was, now))
        return f"{key} was {json.dumps(was)}, now {json.dumps(now)}"
    return ""
