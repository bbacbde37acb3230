"""`verify_corpus`: reads a corpus from one end to the other and names what is broken."""

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from proteinbert_fast.data.corpus import layout
from proteinbert_fast.data.corpus.reader import open_corpus, read_report
from proteinbert_fast.errors import InputError

_LAST_TOKEN, _LAST_SPLIT = 22, 2


def verify_corpus(path: str | os.PathLike[str], on_bytes: Callable[[int], object] = lambda n: None) -> list[str]:
    """Compares every value with its digest, and checks that the datasets fit each other.

    Memory does not depend on the size of the corpus.

    Args:
        path: of the corpus.
        on_bytes: is told of bytes that were read.

    Returns:
        A line for each broken dataset, with its name first; empty if the corpus is whole.

    Raises:
        InputError: it is no corpus of this version, or cannot be opened.
    """
    with open_corpus(os.fspath(path)) as file:
        return list(_Check(file, on_bytes).broken())


# What HDF5 and h5py raise about a damaged file.
_DAMAGE = (KeyError, OSError, RuntimeError, ValueError)


class _Check:
    def __init__(self, file: Any, on_bytes: Callable[[int], object]) -> None:
        self._file = file
        self._on_bytes = on_bytes
        self._data: dict[str, Any] = {}  # datasets that can be opened, and have the right shape and type
        self._digests: dict[str, str] = {}
        self._types: dict[str, str] = {}

    def broken(self) -> Iterator[str]:
        problems = {column.name: self._open(column) for column in layout.COLUMNS}
        if not any(problems.values()):
            problems = self._sizes() or problems
        for column in layout.COLUMNS:
            if not problems.get(column.name):
                problems[column.name] = self._values(column)
        if not any(problems.values()) and (wrong := self._go_terms()):
            problems["go_indices"] = wrong
        for name, problem in problems.items():
            if problem:
                yield f"{name}: {problem}"
        if not any(problems.values()):
            expected = _attribute(self._file, "fingerprint")
            if layout.fingerprint(self._digests, self._types) != expected:
                yield "fingerprint: is not that of the datasets"
        try:
            read_report(self._file, "")
        except InputError as error:
            yield str(error).removeprefix(": ")

    def _open(self, column: layout.Column) -> str:
        try:
            dataset = self._file[column.name]
            shape, dtype = getattr(dataset, "shape", None), getattr(dataset, "dtype", None)
        except _DAMAGE as error:
            return "is missing" if "doesn't exist" in str(error) else f"cannot be opened ({_one_line(error)})"
        if shape is None or dtype is None or len(shape) != 1:
            return "is no dataset of one dimension"
        if column.dtype is not None and dtype != np.dtype(column.dtype):
            return f"has values of type {dtype}, not {np.dtype(column.dtype)}"
        if column in (layout.IDS, layout.TERM_IDS, layout.TERM_NAMES) and dtype.kind != "S":
            return f"has values of type {dtype}, not text of fixed width"
        if column is layout.GO_INDICES and dtype not in (np.dtype("<u2"), np.dtype("<u4")):
            return f"has values of type {dtype}, not uint16 or uint32"
        if _attribute(dataset, "sha256") is None:
            return "has no digest"
        self._data[column.name] = dataset
        return ""

    def _sizes(self) -> dict[str, str]:
        n, terms = len(self._data["split"]), len(self._data["terms/ids"])
        wanted = {
            "offsets": n + 1,
            "go_offsets": n + 1,
            "ids": n,
            "terms/names": terms,
            "terms/aspects": terms,
            "terms/counts": terms,
        }
        return {
            name: f"has {len(self._data[name]):,} values where the other datasets want {size:,}"
            for name, size in wanted.items()
            if len(self._data[name]) != size
        }

    def _values(self, column: layout.Column) -> str:
        dataset = self._data[column.name]
        digest = hashlib.sha256()
        judge = _Judge(self._data, column)
        wrong = ""
        at = 0
        try:
            for piece in layout.digest_pieces(dataset):
                digest.update(np.ascontiguousarray(piece).view(np.uint8).data)
                wrong = wrong or judge.look(piece)
                at += len(piece)
                self._on_bytes(piece.nbytes)
            wrong = wrong or judge.finish()
        except _DAMAGE as error:
            return f"cannot be read behind value {at:,}: cut short or damaged ({_one_line(error)})"
        self._digests[column.name] = digest.hexdigest()
        self._types[column.name] = layout.type_name(dataset.dtype)
        if digest.hexdigest() != _attribute(dataset, "sha256"):
            return "its values are not those that were written: the digest differs"
        return wrong

    def _go_terms(self) -> str:
        """Terms of each protein ascend, and are counted in the table."""
        data = self._data
        counts = np.zeros(len(data["terms/ids"]), np.int64)
        offsets, indices = data["go_offsets"], data["go_indices"]
        step = 1 << 16
        for first in range(0, len(offsets) - 1, step):
            here = offsets[first : first + step + 1]
            terms = indices[here[0] : here[-1]].astype(np.int64)
            counts += np.bincount(terms, minlength=len(counts))
            steps = np.diff(terms, prepend=-1)
            starts = here[:-1][np.diff(here) > 0] - here[0]
            steps[starts] = 1
            if (steps <= 0).any():
                return f"the terms of a protein do not ascend, behind protein {first:,}"
        if not np.array_equal(counts, data["terms/counts"][:]):
            return "the proteins of a term are not as many as terms/counts says"
        return ""


def _attribute(thing: Any, name: str) -> Any:
    try:
        return layout.attribute(thing, name)
    except _DAMAGE:
        return None


class _Judge:
    """What values of a column may be."""

    def __init__(self, data: dict[str, Any], column: layout.Column) -> None:
        self._data = data
        self._name = column.name
        self._last: Any = None

    def look(self, piece: npt.NDArray[Any]) -> str:
        if not len(piece):
            return ""
        match self._name:
            case "tokens":
                return "has values that are no residue" if piece.max() > _LAST_TOKEN else ""
            case "split":
                return "has values that are no set" if piece.max() > _LAST_SPLIT else ""
            case "go_indices":
                known = self._data.get("terms/ids")
                return "has values that are no term" if known is not None and piece.max() >= len(known) else ""
            case "offsets" | "go_offsets":
                # Every protein has residues, but not every one has terms.
                least = 1 if self._name == "offsets" else 0
                steps = np.diff(piece) if self._last is None else np.diff(piece, prepend=self._last)
                wrong = (steps < least).any() or (self._last is None and piece[0] != 0)
                self._last = piece[-1]
                return "does not ascend from 0" if wrong else ""
            case "terms/ids":
                ordered = all(a < b for a, b in zip(piece[:-1].tolist(), piece[1:].tolist(), strict=True))
                return "" if ordered else "does not ascend"
        return ""

    def finish(self) -> str:
        values = {"offsets": "tokens", "go_offsets": "go_indices"}.get(self._name)
        if values is None or values not in self._data:
            return ""
        n = len(self._data[values])
        last = 0 if self._last is None else int(self._last)
        return "" if last == n else f"ends at {last:,} where {values} has {n:,} values"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
