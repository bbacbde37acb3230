"""The unfinished build beside an output: sorted runs of rows that are complete or absent, and a manifest.

``corpus.h5`` is built by way of the folder ``corpus.h5.partial``::

    lock               held by the one process that writes
    manifest.json      what build this is, how far each file was read, and which runs are complete
    run-000-00000.bin  rows of file 0, by ascending key

The key of a row is the SipHash of its id under the build's seed. Ascending keys are the shuffled order of the corpus;
rows of one protein, from whatever file, have the same key. So a range of keys, taken from all runs, is a part of the
final order that can be put together without any other part: memory depends on the size of the part alone.

A run is written under another name, flushed to the disk and renamed; then the folder is flushed; then the manifest,
itself replaced as a whole, names the run. What no manifest names is deleted by the next build.
"""

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from proteinbert_fast._records import gather_bytes, gather_ints, hash_texts
from proteinbert_fast.data.claim import MANIFEST, Claim
from proteinbert_fast.data.corpus.sources import Batch, Source
from proteinbert_fast.data.disk import flush_folder, remove, write_all
from proteinbert_fast.errors import InputError, ProteinBertError

SCHEMA = 1
RUN_BYTES = 1 << 26  # of rows in memory before they are written as a run
RANGES = 4096  # of keys: the finest parts in which runs can be read

ORDER, IDENTITY, SPLIT = range(3)  # what a hash is for: the second word of SipHash's key
_ROW = np.dtype(
    [
        ("key", "<u8"),
        ("identity", "<u8"),
        ("line", "<i8"),
        ("id_bytes", "<i4"),
        ("data_bytes", "<i4"),
        ("n_go", "<i4"),
        ("mark", "u1"),
    ]
)
_INDEX = np.dtype([("row", "<i8"), ("id", "<i8"), ("data", "<i8"), ("go", "<i8")])

Build = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A complete run, as the manifest names it.

    Its file holds the index (RANGES + 1: where each range of keys begins in what follows), the rows, their ids, their
    data, and their GO numbers.
    """

    file: str
    source: int
    rows: int
    id_bytes: int
    data_bytes: int
    n_go: int

    @property
    def starts(self) -> tuple[int, int, int, int, int]:
        """Where rows, ids, data and GO numbers begin, and where the file ends."""
        rows = _INDEX.itemsize * (RANGES + 1)
        ids = rows + _ROW.itemsize * self.rows
        data = ids + self.id_bytes
        go = data + self.data_bytes
        return rows, ids, data, go, go + 4 * self.n_go


@dataclass
class Progress:
    """How far a file was read.

    Attributes:
        name, bytes, mtime_ns: of the file when reading began.
        rows: in complete runs.
        sha256: of the file, when it was read to its end.
    """

    name: str
    bytes: int
    mtime_ns: int
    rows: int = 0
    sha256: str = ""


@dataclass
class _State:
    files: list[Progress] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


class PartialBuild(Claim):
    """The claim of one process on an output, and the runs that this or an earlier process has completed.

    Use as a context. Afterwards the folder stays for a later resume, unless `finish` was called or there is nothing in
    it. Threads may add runs at the same time.
    """

    NOUN = "build"
    MANIFEST_SCHEMA = SCHEMA

    def __init__(self, output: str, *, resume: bool, overwrite: bool) -> None:
        super().__init__(output, resume=resume, overwrite=overwrite)
        self.build: Build = {}
        self._state = _State()
        self._changing = threading.Lock()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with suppress(OSError):
                if self.build:  # else nothing was begun, and what is there is not ours to judge
                    self._tidy()
                    if not self.runs:
                        remove(self.path(MANIFEST))
                self._leave_folder()
        finally:
            self._lock.close()

    def begin(self, build: Build, sources: Sequence[Source], done: Build | None) -> bool:
        """Starts the build, or goes on with it.

        Args:
            build: what decides the bytes of the output.
            sources: the files.
            done: the build that made the file which is there already, if it is a corpus.

        Returns:
            Whether the output is already complete.

        Raises:
            InputError: what is there belongs to another build, or a file has changed.
            ProteinBertError: the disk cannot be written to.
        """
        build = json.loads(json.dumps(build))
        files = [_progress(source) for source in sources]
        manifest = self._read_manifest()
        if self._resume and os.path.exists(self.output):
            difference = "it is no corpus of this version" if done is None else _difference(done, build)
            if not difference:
                self.build = build
                self.finish()
                return True
            self._refuse_other_output(manifest, difference)
        if manifest is not None:
            if difference := _difference(manifest["build"], build):
                raise InputError(f"{self.output}: cannot resume: {difference}; start again with --overwrite")
            self._overwrite = manifest["overwrite"]
            before = [Progress(**file) for file in manifest["files"]]
            for was, now, source in zip(before, files, sources, strict=True):
                if (was.bytes, was.mtime_ns) != (now.bytes, now.mtime_ns):
                    raise InputError(
                        f"{source.path}: has changed since the build was interrupted; start again with --overwrite"
                    )
            files = before
            runs = [Run(**run) for run in manifest["runs"]]
            for run in runs:
                path = self.path(run.file)
                if not os.path.exists(path) or os.path.getsize(path) != run.starts[-1]:
                    raise InputError(f"{path}: is missing or damaged; start again with --overwrite")
            self._state = _State(files, runs)
        else:
            self._state = _State(files)
        self.build = build
        try:
            self._write_manifest(self._state)
            self._tidy()
        except OSError as error:
            raise self.unwritable(error) from error
        return False

    @property
    def files(self) -> list[Progress]:
        """How far each file was read."""
        return self._state.files

    @property
    def runs(self) -> list[Run]:
        """The complete runs."""
        return self._state.runs

    def add_run(self, source: int, rows: Batch, seed: int) -> None:
        """Writes rows of a file as a run.

        Args:
            source: number of the file.
            rows: the next rows of it.
            seed: of the order.

        Raises:
            ProteinBertError: the disk cannot be written to.
        """
        number = sum(run.source == source for run in self.runs)
        name = f"run-{source:03d}-{number:05d}.bin"
        temporary = self.path(name + ".tmp")
        try:
            run = _write_run(temporary, name, source, rows, seed)
            os.replace(temporary, self.path(name))
            flush_folder(self.folder)
            with self._changing:
                files = [
                    Progress(**(asdict(file) | {"rows": file.rows + len(rows)})) if i == source else file
                    for i, file in enumerate(self.files)
                ]
                self._write_manifest(_State(files, [*self.runs, run]))
        except OSError as error:
            raise self.unwritable(error) from error

    def complete_file(self, source: int, sha256: str) -> None:
        """Notes that a file was read to its end.

        Raises:
            ProteinBertError: the disk cannot be written to.
        """
        try:
            with self._changing:
                files = [
                    Progress(**(asdict(file) | {"sha256": sha256})) if i == source else file
                    for i, file in enumerate(self.files)
                ]
                self._write_manifest(_State(files, self.runs))
        except OSError as error:
            raise self.unwritable(error) from error

    def _write_manifest(self, state: _State) -> None:
        files, runs = ([asdict(item) for item in items] for items in (state.files, state.runs))
        self._replace_manifest({"build": self.build, "files": files, "runs": runs})
        self._state = state

    def finish(self) -> None:
        """Forgets everything, after the output has its name. The folder goes when the context is left."""
        super().finish()
        self._state = _State()

    def _safe(self) -> str:
        return f"{sum(run.rows for run in self.runs):,} rows" if self.runs else ""

    def _tidy(self) -> None:
        self._remove_leftovers(("run-", "corpus.tmp"), {run.file for run in self.runs})


def _progress(source: Source) -> Progress:
    found = os.stat(source.path)
    return Progress(source.name, found.st_size, found.st_mtime_ns)


def _difference(old: Build, new: Build) -> str:
    """What is different between two builds, or nothing."""
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            return f"{key} was {json.dumps(old.get(key))}, now {json.dumps(new.get(key))}"
    return ""


def _write_run(path: str, name: str, source: int, batch: Batch, seed: int) -> Run:
    keys = hash_texts(batch.ids, batch.id_offsets, seed, ORDER)
    order = np.argsort(keys, kind="stable")
    ids, id_offsets = gather_bytes(batch.ids, batch.id_offsets, order)
    data, data_offsets = gather_bytes(batch.data, batch.data_offsets, order)
    go, go_offsets = gather_ints(batch.go, batch.go_offsets, order)
    rows = np.empty(len(batch), _ROW)
    rows["key"] = keys[order]
    rows["identity"] = hash_texts(ids, id_offsets, seed, IDENTITY)
    rows["line"] = batch.lines[order]
    rows["id_bytes"] = np.diff(id_offsets)
    rows["data_bytes"] = np.diff(data_offsets)
    rows["n_go"] = np.diff(go_offsets)
    rows["mark"] = batch.marks[order]
    index = np.empty(RANGES + 1, _INDEX)
    first = np.searchsorted(rows["key"] >> np.uint64(52), np.arange(RANGES + 1, dtype=np.uint64))
    index["row"] = first
    index["id"] = id_offsets[first]
    index["data"] = data_offsets[first]
    index["go"] = go_offsets[first]
    handle = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
    try:
        for part in (index, rows, ids, data, go):
            write_all(handle, part.view(np.uint8).data)
        os.fsync(handle)
    finally:
        os.close(handle)
    return Run(name, source, len(batch), ids.nbytes, data.nbytes, len(go))


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a range of keys from all runs, in the order of the corpus, rows of one id next to each other.

    Attributes:
        rows: (n,) key, identity, line and mark.
        sources: (n,) number of the file that each comes from.
        lengths: (n,) bytes of the data of each, whether it was asked for or not.
        ids, data, go: packed, with offsets (n + 1,). ``data`` of proteins is empty when it was not asked for.
    """

    rows: npt.NDArray[Any]
    sources: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    ids: npt.NDArray[np.uint8]
    id_offsets: npt.NDArray[np.int64]
    data: npt.NDArray[np.uint8]
    data_offsets: npt.NDArray[np.int64]
    go: npt.NDArray[np.int32]
    go_offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


class RunReader:
    """Reads ranges of keys from all runs.

    Args:
        build: that has the runs.
        with_data: numbers of the files whose data is read when residues are not asked for.
    """

    def __init__(self, build: PartialBuild, with_data: frozenset[int]) -> None:
        self._build = build
        self._with_data = with_data

    def ranges(self, n_bytes: int) -> list[tuple[int, int]]:
        """Ranges of keys, each of about so many bytes, that together are all."""
        sizes = np.zeros(RANGES, np.int64)
        for run in self._build.runs:
            index = self._index(run, 0, RANGES)
            sizes += _ROW.itemsize * np.diff(index["row"]) + np.diff(index["id"]) + np.diff(index["data"])
            sizes += 4 * np.diff(index["go"])
        found, first, size = [], 0, 0
        for i in range(RANGES):
            if size and size + sizes[i] > n_bytes:
                found.append((first, i))
                first, size = i, 0
            size += int(sizes[i])
        return [*found, (first, RANGES)]

    def read(self, first: int, stop: int, *, residues: bool) -> Rows:
        """Rows whose keys lie in the ranges from ``first`` to ``stop``.

        Raises:
            ProteinBertError: a run cannot be read.
        """
        parts: list[list[npt.NDArray[Any]]] = [[], [], [], [], [], []]
        for run in self._build.runs:
            begin, end = self._index(run, first, stop)[[0, -1]]
            if begin["row"] == end["row"]:
                continue
            starts = run.starts
            with open(self._build.path(run.file), "rb") as file:

                def part(name: str, at: int, dtype: Any, file: Any = file, begin: Any = begin, end: Any = end) -> Any:
                    dtype = np.dtype(dtype)
                    file.seek(at + int(begin[name]) * dtype.itemsize)
                    wanted = int(end[name] - begin[name])
                    values = np.fromfile(file, dtype, wanted)
                    if len(values) != wanted:
                        raise ProteinBertError(f"{file.name}: is damaged; start again with --overwrite")
                    return values

                rows = part("row", starts[0], _ROW)
                parts[0].append(rows)
                parts[1].append(part("id", starts[1], np.uint8))
                if residues or run.source in self._with_data:
                    parts[2].append(part("data", starts[2], np.uint8))
                    parts[5].append(rows["data_bytes"])
                else:
                    parts[5].append(np.zeros(len(rows), np.int32))
                parts[3].append(part("go", starts[3], "<i4"))
                parts[4].append(np.full(len(rows), run.source, np.int32))
        if not parts[0]:
            empty = np.empty(0, np.uint8)
            none = np.zeros(1, np.int64)
            ints = np.empty(0, np.int32)
            return Rows(np.empty(0, _ROW), ints, ints, empty, none, empty, none, ints, none)
        rows, ids, go, sources, data_bytes = (np.concatenate(parts[k]) for k in (0, 1, 3, 4, 5))
        data = np.concatenate([np.empty(0, np.uint8), *parts[2]])
        parts.clear()
        order = np.lexsort((rows["line"], sources, rows["identity"], rows["key"]))
        ids, id_offsets = gather_bytes(ids, _cumulated(rows["id_bytes"]), order)
        data, data_offsets = gather_bytes(data, _cumulated(data_bytes), order)
        go, go_offsets = gather_ints(go, _cumulated(rows["n_go"]), order)
        rows = rows[order]
        return Rows(rows, sources[order], rows["data_bytes"], ids, id_offsets, data, data_offsets, go, go_offsets)

    def _index(self, run: Run, first: int, stop: int) -> npt.NDArray[Any]:
        with open(self._build.path(run.file), "rb") as file:
            file.seek(first * _INDEX.itemsize)
            index = np.fromfile(file, _INDEX, stop - first + 1)
        if len(index) != stop - first + 1:
            raise ProteinBertError(f"{self._build.path(run.file)}: is damaged; start again with --overwrite")
        return index


def _cumulated(lengths: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
