"""`Corpus`: a corpus file read by record, by slice, or from one end to the other."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from proteinbert_fast.data.corpus import dense, layout
from proteinbert_fast.data.gene_ontology import Aspect
from proteinbert_fast.errors import InputError

SLICE_RESIDUES = 1 << 22


@dataclass(frozen=True, slots=True)
class CorpusTerm:
    """A GO term of a corpus.

    Attributes:
        id: such as "GO:0005737".
        name: of the term.
        aspect: P, F, C, or "" if not known.
        count: proteins of the corpus that have it.
    """

    id: str
    name: str
    aspect: Aspect
    count: int


@dataclass(frozen=True, slots=True)
class CorpusSlice:
    """Proteins of a corpus, packed.

    Attributes:
        tokens: uint8 (residues,): one protein behind the other, without START and END.
        offsets: int64 (n + 1,): where each protein begins in ``tokens``.
        go_indices: integer (annotations,): places in the table of terms, ascending for each protein.
        go_offsets: int64 (n + 1,).
        split: uint8 (n,): 0 train, 1 validation, 2 test.
        ids: n ids, as bytes of fixed width.
    """

    tokens: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    go_indices: npt.NDArray[Any]
    go_offsets: npt.NDArray[np.int64]
    split: npt.NDArray[np.uint8]
    ids: npt.NDArray[np.bytes_]

    def __len__(self) -> int:
        return len(self.split)


@dataclass(frozen=True, slots=True)
class CorpusRecord:
    """One protein.

    Attributes:
        id: of it.
        tokens: uint8 (residues,), without START and END.
        go_indices: places of its terms in the table of terms, ascending.
        split: 0 train, 1 validation, 2 test.
    """

    id: str
    tokens: npt.NDArray[np.uint8]
    go_indices: npt.NDArray[Any]
    split: int


class Corpus:
    """A corpus file, open for reading. Use as a context, or `close` it. Pickled, it opens the file again.

    Args:
        path: of the file.

    Raises:
        InputError: it is missing, cut short, or no corpus of this version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._file = open_corpus(self.path)
        try:
            self._data = {column.name: self._file[column.name] for column in layout.COLUMNS}
        except (KeyError, OSError, RuntimeError) as error:
            self._file.close()
            raise InputError(f"{self.path}: is damaged: {' '.join(str(error).split())}") from error
        self._n = len(self._data["split"])

    def __len__(self) -> int:
        return self._n

    def __enter__(self) -> "Corpus":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type["Corpus"], tuple[str]]:
        return Corpus, (self.path,)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def n_residues(self) -> int:
        """Residues of all proteins."""
        return len(self._data["tokens"])

    @property
    def n_annotations(self) -> int:
        """GO terms of all proteins."""
        return len(self._data["go_indices"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 that names the content."""
        return str(layout.attribute(self._file, "fingerprint"))

    @cached_property
    def report(self) -> dict[str, Any]:
        """What is in it and where that came from (docs/corpus.md lists the fields)."""
        return read_report(self._file, self.path)

    @cached_property
    def terms(self) -> tuple[CorpusTerm, ...]:
        """The table of terms, by ascending id."""
        ids, names, aspects, counts = (
            self._data[column.name][:].tolist()
            for column in (layout.TERM_IDS, layout.TERM_NAMES, layout.TERM_ASPECTS, layout.TERM_COUNTS)
        )
        return tuple(
            CorpusTerm(i.decode(), name.decode(), aspect.decode(), count)
            for i, name, aspect, count in zip(ids, names, aspects, counts, strict=True)
        )

    @cached_property
    def split(self) -> npt.NDArray[np.uint8]:
        """uint8 (N,): 0 train, 1 validation, 2 test."""
        split: npt.NDArray[np.uint8] = self._data["split"][:]
        return split

    @cached_property
    def lengths(self) -> npt.NDArray[np.int32]:
        """int32 (N,): residues of each protein."""
        lengths: npt.NDArray[np.int32] = np.diff(self._data["offsets"][:]).astype(np.int32)
        return lengths

    def ids(self) -> Iterator[npt.NDArray[np.bytes_]]:
        """The ids of all proteins in order, many at a time, as bytes of fixed width."""
        for first in range(0, self._n, 1 << 16):
            yield self._data["ids"][first : first + (1 << 16)]

    def __getitem__(self, i: int) -> CorpusRecord:
        if not -self._n <= i < self._n:
            raise IndexError(f"{self.path}: has {self._n:,} proteins, there is no number {i:,}")
        i = range(self._n)[i]
        one = self.read(i, i + 1)
        return CorpusRecord(one.ids[0].decode(), one.tokens, one.go_indices, int(one.split[0]))

    def read(self, first: int, stop: int) -> CorpusSlice:
        """Proteins from ``first`` to before ``stop``.

        Raises:
            InputError: the file is damaged there.
        """
        name = "offsets"
        data = self._data
        try:
            offsets = data["offsets"][first : stop + 1]
            name = "go_offsets"
            go_offsets = data["go_offsets"][first : stop + 1]
            name = "tokens"
            tokens = data["tokens"][offsets[0] : offsets[-1]]
            name = "go_indices"
            go_indices = data["go_indices"][go_offsets[0] : go_offsets[-1]]
            name = "ids"
            split, ids = data["split"][first:stop], data["ids"][first:stop]
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.path}: {name}: cannot be read ({' '.join(str(error).split())})") from error
        return CorpusSlice(tokens, offsets - offsets[0], go_indices, go_offsets - go_offsets[0], split, ids)

    def read_many(self, numbers: Sequence[int] | npt.NDArray[np.integer]) -> CorpusSlice:
        """Proteins by number, in the order given.

        Chunks are read in the order of the file, so that each is inflated once for proteins that lie close together.
        """
        wanted = np.asarray(numbers, np.int64)
        order = np.argsort(wanted, kind="stable")
        parts: list[CorpusSlice | None] = [None] * len(wanted)
        for place in order.tolist():
            parts[place] = self.read(int(wanted[place]), int(wanted[place]) + 1)
        slices = [part for part in parts if part is not None]
        lengths = [len(part.tokens) for part in slices]
        terms = [len(part.go_indices) for part in slices]
        empty = self.read(0, 0) if not slices else slices[0]
        return CorpusSlice(
            np.concatenate([part.tokens for part in slices] or [empty.tokens]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.concatenate([part.go_indices for part in slices] or [empty.go_indices]),
            np.concatenate([[0], np.cumsum(terms)]).astype(np.int64),
            np.concatenate([part.split for part in slices] or [empty.split]),
            np.concatenate([part.ids for part in slices] or [empty.ids]),
        )

    def slices(self, first: int = 0, residues: int = SLICE_RESIDUES) -> Iterator[CorpusSlice]:
        """All proteins from ``first`` on, in order, about so many residues at a time."""
        step = max(1, int(residues * self._n / max(self.n_residues, 1)))
        for begin in range(first, self._n, step):
            yield from self._parts(begin, min(begin + step, self._n), residues)

    def _parts(self, begin: int, end: int, residues: int) -> Iterator[CorpusSlice]:
        """The proteins at once, or where many long ones come together, in halves."""
        offsets = self._data["offsets"]
        if end - begin > 1 and offsets[end] - offsets[begin] > 4 * residues:
            middle = (begin + end) // 2
            yield from self._parts(begin, middle, residues)
            yield from self._parts(middle, end, residues)
        else:
            yield self.read(begin, end)


def read_report(file: Any, path: str) -> dict[str, Any]:
    """The report of an open corpus.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        dataset = file[layout.REPORT]
        text = dataset[()]
        report = json.loads(text)
        if isinstance(report, dict) and hashlib.sha256(text).hexdigest() == layout.attribute(dataset, "sha256"):
            return report
    except (KeyError, TypeError, ValueError, OSError, RuntimeError):
        pass
    raise InputError(f"{path}: {layout.REPORT}: is missing or damaged")


def open_corpus(path: str) -> Any:
    """An HDF5 file that says that it is a corpus of this version.

    Raises:
        InputError: it does not, or cannot be opened.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'is a directory' if os.path.isdir(path) else 'no such file'}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"{path}: cannot be read as HDF5: cut short, damaged, or another kind of file ({why})"
        ) from error
    try:
        found, version = layout.attribute(file, "format"), layout.attribute(file, "format_version")
        if found == layout.FORMAT and version == layout.VERSION:
            return file
        is_dense = dense.is_dense(file)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        file.close()
        raise InputError(f"{path}: is damaged: {' '.join(str(error).split())}") from error
    file.close()
    if is_dense:
        raise InputError(f"{path}: is a dataset of the original; build-corpus takes it as an input")
    if found == layout.FORMAT:
        raise InputError(f"{path}: is a corpus of format {version}, and this version reads {layout.VERSION}")
    raise InputError(f"{path}: is an HDF5 file, but no corpus: it has no attribute format = {layout.FORMAT!r}")
