"""Shards to the final HDF5 file, in the flat or the UniProt layout.

The same run always gives the same bytes, however often it was interrupted: nothing in the file depends on the
time or on where one shard ends and the next begins.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from proteinbert_fast.embedding.partial import SCHEMA, PartialRun, Shard
from proteinbert_fast.embedding.sources import dataset_name
from proteinbert_fast.errors import ProteinBertError

Int64Array = npt.NDArray[np.int64]

_PIECE = 1 << 24  # bytes of rows in memory at a time
_IDS = 1 << 16  # ids written at a time: always the same, because HDF5 lays them out as they come
_MERGED = "merged.tmp"


@dataclass(frozen=True)
class Contents:
    """What an output file holds.

    Attributes:
        layout: "flat" or "uniprot".
        per_residue: whether a record has a row for each residue, and not one in all.
        n_records: records in all.
        n_rows: rows in all.
        width: columns.
        dtype: of the values.
        truncated: whether records may have been cut, so that their full lengths are written as well.
        attributes: of the root.
    """

    layout: str
    per_residue: bool
    n_records: int
    n_rows: int
    width: int
    dtype: np.dtype[Any]
    truncated: bool
    attributes: dict[str, Any]


def write_output(partial: PartialRun, contents: Contents, on_bytes: Callable[[int], object]) -> None:
    """Merges the shards of a complete run into its output, names it, and only then removes the shards.

    Args:
        partial: the run.
        contents: what the shards hold together.
        on_bytes: is told of every piece that was written.

    Raises:
        ProteinBertError: the disk cannot be written to, or a shard is damaged.
    """
    with partial.new_output(_MERGED) as (file, sink):

        def checked(n_bytes: int) -> None:
            sink.check()
            on_bytes(n_bytes)

        _write_attributes(file, partial, contents)
        write = _write_flat if contents.layout == "flat" else _write_uniprot
        write(file, partial, contents, checked)


def _write_attributes(file: Any, partial: PartialRun, contents: Contents) -> None:
    file.attrs["schema_version"] = SCHEMA
    file.attrs["run"] = json.dumps(partial.run)
    for name, value in contents.attributes.items():
        if value is not None:
            file.attrs[name] = value


def _write_flat(file: Any, partial: PartialRun, contents: Contents, on_bytes: Callable[[int], object]) -> None:
    n = contents.n_records
    ids = file.create_dataset("ids", (n,), h5py.string_dtype(), track_times=False)
    lengths = np.empty(n, np.int64)
    full_lengths = np.empty(n, np.int64)
    embeddings = file.create_dataset("embeddings", (contents.n_rows, contents.width), contents.dtype, track_times=False)
    waiting: list[str] = []
    record = row = 0
    for shard in partial.shards:
        reader = _ShardReader(partial.path(shard.file), shard, contents)
        for rows in reader.pieces():
            embeddings[row : row + len(rows)] = rows
            row += len(rows)
            on_bytes(rows.nbytes)
        lengths[record : record + shard.records] = reader.lengths
        full_lengths[record : record + shard.records] = reader.full_lengths
        record += shard.records
        waiting += reader.ids
        while len(waiting) >= _IDS:
            _write_ids(ids, record - len(waiting), waiting[:_IDS])
            del waiting[:_IDS]
    _write_ids(ids, record - len(waiting), waiting)
    file.create_dataset("lengths", data=lengths, track_times=False)
    if contents.truncated:
        file.create_dataset("full_lengths", data=full_lengths, track_times=False)
    if contents.per_residue:
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        file.create_dataset("offsets", data=offsets, track_times=False)
    on_bytes(0)


def _write_ids(dataset: Any, first: int, ids: list[str]) -> None:
    if ids:
        dataset[first : first + len(ids)] = ids


def _write_uniprot(file: Any, partial: PartialRun, contents: Contents, on_bytes: Callable[[int], object]) -> None:
    for shard in partial.shards:
        reader = _ShardReader(partial.path(shard.file), shard, contents)
        for i, rows in enumerate(reader.records()):
            data = rows if contents.per_residue else rows[0]
            dataset = file.create_dataset(dataset_name(reader.ids[i]), data=data, track_times=False)
            if reader.full_lengths[i] > reader.lengths[i]:
                dataset.attrs["full_length"] = reader.full_lengths[i]
            on_bytes(rows.nbytes)


class _ShardReader:
    """The contents of a shard; raises ProteinBertError at its end if they are not what was written."""

    def __init__(self, path: str, shard: Shard, contents: Contents) -> None:
        self._path = path
        self._shard = shard
        self._contents = contents
        with open(path, "rb") as file:
            file.seek(shard.row_bytes)
            self._tail = file.read()
        numbers = np.frombuffer(self._tail, "<i8", 2 * shard.records).reshape(2, -1)
        self.lengths: Int64Array = numbers[0]
        self.full_lengths: Int64Array = numbers[1]
        self.ids = self._tail[16 * shard.records :].decode(errors="replace").split("\n")

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        """The rows, (some, width) at a time."""
        row_bytes = self._contents.width * self._contents.dtype.itemsize
        return self._read(repeat(max(1, _PIECE // row_bytes)))

    def records(self) -> Iterator[npt.NDArray[Any]]:
        """The rows of each record."""
        return self._read(self.lengths.tolist() if self._contents.per_residue else repeat(1))

    def _read(self, sizes: Iterable[int]) -> Iterator[npt.NDArray[Any]]:
        width, dtype = self._contents.width, self._contents.dtype
        left, crc32 = self._shard.row_bytes, 0
        with open(self._path, "rb", buffering=1 << 20) as file:
            for size in sizes:
                data = file.read(min(size * width * dtype.itemsize, left))
                if not data:
                    break
                left -= len(data)
                crc32 = zlib.crc32(data, crc32)
                yield np.frombuffer(data, dtype).reshape(-1, width)
        if left or zlib.crc32(self._tail, crc32) != self._shard.crc32:
            raise ProteinBertError(f"{self._path}: is damaged on the disk; start again with --overwrite")
