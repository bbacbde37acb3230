"""The original's HDF5 dataset: text for residues, and a row of booleans for each protein's GO terms.

Datasets ``uniprot_ids`` and ``seqs`` (N, text), ``seq_lengths`` (N, int32), ``included_annotations`` (terms, GO ids),
``annotation_masks`` (N, terms, bool) and, where a test set was chosen, ``test_set_mask`` (N, bool). It takes a byte for
each protein and term: about 1 TB for UniRef90. So it is read at any size and written for small sets only.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np

from proteinbert_fast.errors import InputError

ROWS = 1000  # in memory at a time: 9 MB of booleans
MALFORMED_GO = -1

_SHAPES = {
    "uniprot_ids": ("N",),
    "seqs": ("N",),
    "seq_lengths": ("N",),
    "included_annotations": ("T",),
    "annotation_masks": ("N", "T"),
}


def is_dense(file: Any) -> bool:
    """Whether an open HDF5 file has the original's layout."""
    return all(name in file for name in ("uniprot_ids", "seqs", "annotation_masks"))


class Dense:
    """An open dataset of the original.

    Attributes:
        n_records: proteins in it.
        numbers: GO number of each column, -1 where the name is no GO id.
    """

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path
        self._check()
        self.n_records = len(file["uniprot_ids"])
        names = [_text(name) for name in file["included_annotations"][:]]
        self.numbers = np.array(
            [int(name[3:]) if name.startswith("GO:") and name[3:].isdecimal() else MALFORMED_GO for name in names],
            np.int64,
        )

    def _check(self) -> None:
        sizes: dict[str, int] = {}
        for name, axes in _SHAPES.items():
            dataset = self._file.get(name)
            if not isinstance(dataset, h5py.Dataset):
                raise InputError(f"{self._path}: {name}: is missing: this is no dataset of the original ProteinBERT")
            if len(dataset.shape) != len(axes) or any(
                sizes.setdefault(axis, size) != size for axis, size in zip(axes, dataset.shape, strict=True)
            ):
                raise InputError(f"{self._path}: {name}: its shape {dataset.shape} does not fit the other datasets")

    def records(self, first: int) -> Iterator[tuple[bytes, bytes, list[int], bool]]:
        """Id, residues, GO numbers and whether it is in the test set, of `ROWS` records from ``first`` on.

        Raises:
            InputError: a record is damaged.
        """
        file, name = self._file, ""
        stop = min(first + ROWS, self.n_records)
        try:
            parts = []
            for name in ("uniprot_ids", "seqs", "seq_lengths", "annotation_masks"):
                parts.append(file[name][first:stop])
            ids, sequences, lengths, masks = parts
            tests = file["test_set_mask"][first:stop] if "test_set_mask" in file else np.zeros(stop - first, bool)
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self._path}: {name}: cannot be read ({_one_line(error)})") from error
        for i in range(stop - first):
            row_id, sequence = _text(ids[i]), _text(sequences[i])
            place = f"{self._path}: record {first + i}"
            if not row_id or not sequence:
                raise InputError(f"{place}: the {'sequence' if row_id else 'id'} is empty")
            if len(sequence) != lengths[i]:
                raise InputError(f"{place}: has {len(sequence)} residues where seq_lengths says {lengths[i]}")
            residues = sequence.encode("ascii", "replace")  # what is no residue becomes one unknown residue
            yield row_id.encode(), residues, self.numbers[np.flatnonzero(masks[i])].tolist(), bool(tests[i])


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Dense]:
    """The dataset at a path, for a context.

    Raises:
        InputError: it cannot be read, or is none of the original's.
    """
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(
            f"{os.fspath(path)}: cannot be read as HDF5: cut short or damaged ({_one_line(error)})"
        ) from error
    with file:
        yield Dense(file, os.fspath(path))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
