"""The original's HDF5 dataset: text for residues, and a row of booleans for each protein's GO terms.

Datasets ``uniprot_ids`` and ``seqs`` (N, text), ``seq_lengths`` (N, int32), ``included_annotations`` (terms, GO ids),
``annotation_masks`` (N, terms, bool) and, where a test set was chosen, ``test_set_mask`` (N, bool). It takes a byte for
each protein and term: about 1 TB for UniRef90. So it is read at any size and written for small sets only.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any

import h5py
import numpy as np

from proteinbert_fast._tokenizer import VOCABULARY
from proteinbert_fast.data.disk import Sink, flush_folder, remove
from proteinbert_fast.data.gene_ontology import GO_ID
from proteinbert_fast.errors import InputError, ProteinBertError

ROWS = 1000  # in memory at a time: 9 MB of booleans
MALFORMED_GO = -1
LARGEST = 10_000_000_000  # bytes of booleans to write
_LETTERS = VOCABULARY.encode().ljust(256, b"?")

_SHAPES = {
    "uniprot_ids": ("N",),
    "seqs": ("N",),
    "seq_lengths": ("N",),
    "included_annotations": ("T",),
    "annotation_masks": ("N", "T"),
    "test_set_mask": ("N",),
}
_OPTIONAL = {"test_set_mask"}


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
        self.numbers = np.array([int(name[3:]) if GO_ID.fullmatch(name) else MALFORMED_GO for name in names], np.int64)

    def _check(self) -> None:
        sizes: dict[str, int] = {}
        for name, axes in _SHAPES.items():
            dataset = self._file.get(name)
            if name in _OPTIONAL and dataset is None:
                continue
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


def write_dense(corpus: Any, output: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Writes a corpus as a dataset of the original.

    Unknown residues become "?", which the original reads as unknown too: a corpus does not keep which letter it was.
    The original knows a test set, and no validation set: proteins held out for validation are written as the rest.

    Args:
        corpus: an open `Corpus`.
        output: HDF5 file to write.
        overwrite: replace an existing file.

    Raises:
        InputError: the output exists, or would have more than 10 GB of booleans.
        ProteinBertError: the disk cannot be written to.
    """
    path = os.fspath(output)
    n, terms = len(corpus), len(corpus.terms)
    if n * terms > LARGEST:
        raise InputError(f"{path}: would take {n * terms / 1e9:,.0f} GB, a byte for each protein and term: too large")
    if os.path.exists(path) and not overwrite:
        raise InputError(f"{path}: exists; replace it with --overwrite")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with Sink(temporary) as sink:
            try:
                with h5py.File(sink, "w") as file:
                    _write(file, corpus, n, terms, sink.check)
            except Exception:
                sink.check()
                raise
            sink.check()
            sink.flush_to_disk()
        os.replace(temporary, path)
        flush_folder(os.path.dirname(os.path.abspath(path)))
    except OSError as error:
        raise ProteinBertError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            remove(temporary)


def _write(file: Any, corpus: Any, n: int, terms: int, check: Callable[[], None]) -> None:
    text = h5py.string_dtype()
    file.create_dataset("included_annotations", data=[term.id for term in corpus.terms], dtype=text, track_times=False)
    ids = file.create_dataset("uniprot_ids", (n,), text, track_times=False)
    sequences = file.create_dataset("seqs", (n,), text, track_times=False)
    lengths = file.create_dataset("seq_lengths", (n,), np.int32, track_times=False)
    chunks = (min(n, 64), terms) if terms else None
    masks = file.create_dataset(
        "annotation_masks", (n, terms), bool, track_times=False, chunks=chunks, compression="gzip" if terms else None
    )
    tests = file.create_dataset("test_set_mask", (n,), bool, track_times=False)
    for first in range(0, n, ROWS):
        part = corpus.read(first, min(first + ROWS, n))
        stop = first + len(part)
        offsets = part.offsets.tolist()
        letters = part.tokens.tobytes().translate(_LETTERS).decode()
        ids[first:stop] = part.ids.tolist()
        sequences[first:stop] = [letters[a:b] for a, b in pairwise(offsets)]
        lengths[first:stop] = np.diff(part.offsets)
        rows = np.zeros((len(part), terms), bool)
        rows[np.repeat(np.arange(len(part)), np.diff(part.go_offsets)), part.go_indices] = True
        masks[first:stop] = rows
        tests[first:stop] = part.split == 2
        check()
