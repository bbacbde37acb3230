"""What a corpus is built from: proteins, GO annotations, clusters and held-out ids, read as columns.

Every file becomes rows with an id; a row of a protein carries its residues and its own GO terms. What belongs
together comes together later, by the id: no file has to be in memory for another to be read.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from proteinbert_fast._records import RecordReader
from proteinbert_fast._tokenizer import OTHER, VOCABULARY
from proteinbert_fast.data.corpus import dense
from proteinbert_fast.data.fasta import (
    DamagedFile,
    FastaFile,
    FastaNotes,
    TextFile,
    check_readable,
    fasta_records,
)
from proteinbert_fast.data.prefetch import Prefetched
from proteinbert_fast.errors import InputError

logger = logging.getLogger("proteinbert_fast")

Format = Literal["uniref-xml", "uniprot-xml", "uniprot-text", "fasta", "dense", "gaf", "tsv", "clusters", "ids"]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]
Longs = npt.NDArray[np.int64]

LONGEST_ID = 255  # bytes: ids are stored at the width of the longest
TOKENS = bytes(VOCABULARY.find(chr(c)) if chr(c) in VOCABULARY else OTHER for c in range(256))
MALFORMED_GO = -1
TRAIN, VALIDATION, TEST = 0, 1, 2

_ROWS = 4096  # per batch, of readers that go row by row
_LONGEST_LINE = 1 << 26
_HDF5 = b"\x89HDF\r\n\x1a\n"
_UNIPROT_ID = re.compile(rb"(?:sp|tr)\|([A-Z0-9-]+)\|")
_GO = re.compile(rb"GO:\w*")
_GO_ID = re.compile(rb"GO:([0-9]{7})")
_HEADERS = {b"accession", b"entry", b"id", b"protein", b"protein_id", b"uniprot_id", b"uniprot_ids"}


class Role(IntEnum):
    """What a file's rows are."""

    PROTEIN = 0  # residues and GO terms
    ENTRY = 1  # GO terms of a protein whose residues come from another file
    SEQUENCE = 2  # these residues
    ANNOTATION = 3  # more GO terms of a protein
    CLUSTER = 4  # a protein and the representative of its cluster
    HELD_OUT = 5  # a protein and the set it is in


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as columns; texts and lists are packed one behind the other.

    Attributes:
        ids: (bytes of all ids,), UTF-8, with ``id_offsets`` (n + 1,).
        data: tokens of residues, or the representative's id of a cluster's row, with ``data_offsets`` (n + 1,).
        go: numbers of GO terms (5737 for GO:0005737), -1 for what is no GO id, with ``go_offsets`` (n + 1,).
        lines: (n,) where the row stands in its file, from 1.
        marks: (n,) the held-out set that the file itself puts it in: 0 says nothing, 1 validation, 2 test.
    """

    ids: Bytes
    id_offsets: Longs
    data: Bytes
    data_offsets: Longs
    go: Ints
    go_offsets: Longs
    lines: Longs
    marks: Bytes

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def n_bytes(self) -> int:
        """Memory of the columns."""
        return sum(getattr(self, name).nbytes for name in self.__slots__)

    def from_row(self, first: int) -> "Batch":
        """The rows from ``first`` on."""

        def cut(values: Any, offsets: Longs) -> tuple[Any, Longs]:
            return values[offsets[first] :], offsets[first:] - offsets[first]

        ids, id_offsets = cut(self.ids, self.id_offsets)
        data, data_offsets = cut(self.data, self.data_offsets)
        go, go_offsets = cut(self.go, self.go_offsets)
        return Batch(ids, id_offsets, data, data_offsets, go, go_offsets, self.lines[first:], self.marks[first:])

    @classmethod
    def joined(cls, batches: Sequence["Batch"]) -> "Batch":
        """All rows of several batches."""

        def together(name: str) -> Any:
            return np.concatenate([getattr(batch, name) for batch in batches])

        def offsets(name: str) -> Longs:
            lengths = [np.diff(getattr(batch, name)) for batch in batches]
            return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(lengths))])

        return cls(
            together("ids"),
            offsets("id_offsets"),
            together("data"),
            offsets("data_offsets"),
            together("go"),
            offsets("go_offsets"),
            together("lines"),
            together("marks"),
        )


@dataclass(frozen=True, slots=True)
class Source:
    """A file, what its rows are, and in which format.

    Attributes:
        path: of a regular file.
        role: of its rows.
        format: told by its first bytes.
        mark: the set that a list of ids is held out in.
    """

    path: str
    role: Role
    format: Format
    mark: int = TRAIN

    @property
    def name(self) -> str:
        """Last part of the path."""
        return os.path.basename(self.path)


@dataclass(slots=True)
class _Rows:
    """Rows on their way to a batch."""

    ids: list[bytes] = field(default_factory=list)
    data: list[bytes] = field(default_factory=list)
    go: list[list[int]] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)

    def add(self, row_id: bytes, line: int, data: bytes = b"", go: list[int] | None = None, mark: int = TRAIN) -> None:
        self.ids.append(row_id)
        self.data.append(data)
        self.go.append(go or [])
        self.lines.append(line)
        self.marks.append(mark)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self) -> Batch:
        ids, id_offsets = _packed(self.ids)
        data, data_offsets = _packed(self.data)
        go = np.array([number for numbers in self.go for number in numbers], np.int32)
        return Batch(
            ids,
            id_offsets,
            data,
            data_offsets,
            go,
            _offsets([len(numbers) for numbers in self.go]),
            np.array(self.lines, np.int64),
            np.array(self.marks, np.uint8),
        )


def _packed(texts: list[bytes]) -> tuple[Bytes, Longs]:
    return np.frombuffer(b"".join(texts), np.uint8), _offsets([len(text) for text in texts])


def _offsets(lengths: list[int]) -> Longs:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def open_source(path: str | os.PathLike[str], role: Role, *, mark: int = TRAIN) -> Source:
    """A file and its format.

    Args:
        path: of a regular file.
        role: what its rows are to be.
        mark: of a list of ids.

    Raises:
        InputError: it is missing, no regular file, or in no format that has such rows.
    """
    path = os.fspath(path)
    check_readable(FastaFile.at(path))
    if path == "-" or not os.path.isfile(path):
        raise InputError(f"{path}: is no regular file: an interrupted build must be able to read it again")
    if role == Role.CLUSTER:
        return Source(path, role, "clusters")
    if role == Role.HELD_OUT:
        return Source(path, role, "ids", mark)
    found = _format(path)
    wanted: dict[Role, tuple[Format, ...]] = {
        Role.PROTEIN: ("uniref-xml", "uniprot-xml", "uniprot-text", "fasta", "dense"),
        Role.SEQUENCE: ("fasta",),
        Role.ANNOTATION: ("gaf", "tsv"),
    }
    if found not in wanted[role]:
        hint = {"gaf": "; give it with --annotations", "tsv": "; a table of GO terms is given with --annotations"}
        named = {
            Role.PROTEIN: "UniRef or UniProtKB XML, a UniProtKB flat file, FASTA, or a dataset of the original",
            Role.SEQUENCE: "FASTA",
            Role.ANNOTATION: "GAF or a table of ids and GO terms",
        }
        raise InputError(f"{path}:1: is not {named[role]}{hint.get(found, '') if role == Role.PROTEIN else ''}")
    return Source(path, role, found)


def _format(path: str) -> Format:
    with open(path, "rb") as file:
        if file.read(8) == _HDF5:
            return "dense"
    head = b""
    try:
        for chunk in TextFile(FastaFile.at(path)):
            head += chunk
            if len(head) > 65_536:
                break
    except DamagedFile as error:
        if not head:
            raise InputError(f"{path}:1: {error}") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        raise InputError(f"{path}: is empty")
    if text.startswith(b"<"):
        return "uniprot-xml" if b"<uniprot" in text else "uniref-xml"
    if text.startswith(b"ID   "):
        return "uniprot-text"
    if text.startswith((b">", b";")):
        return "fasta"
    if text.startswith(b"!"):
        return "gaf"
    return "tsv"


def read_rows(source: Source, on_bytes: Callable[[int], object], digest: Any = None) -> Iterator[Batch]:
    """Rows of a file, batch by batch; memory does not depend on its size.

    Args:
        source: the file.
        on_bytes: is told how far reading is, in bytes of the file as it lies on the disk.
        digest: is updated with all bytes of the file, if given.

    Raises:
        InputError: the file cannot be read; names it and the line.
    """
    file = _Counted(source.path, on_bytes, digest)
    match source.format:
        case "uniref-xml" | "uniprot-xml" | "uniprot-text":
            batches = _records(source, file)
        case "fasta":
            batches = _fasta(source, file)
        case "dense":
            batches = _dense(source, file)
        case "gaf" | "tsv" | "clusters" | "ids":
            batches = _lines(source, file)
    for batch in batches:
        longest = int(np.diff(batch.id_offsets).argmax()) if len(batch) else 0
        if len(batch) and batch.id_offsets[longest + 1] - batch.id_offsets[longest] > LONGEST_ID:
            raise InputError(f"{source.path}:{batch.lines[longest]}: an id of more than {LONGEST_ID} bytes")
        yield batch


class _Counted:
    """A file; tells how much of it was read, and digests it on the way."""

    def __init__(self, path: str, on_bytes: Callable[[int], object], digest: Any) -> None:
        self.path = path
        self._on_bytes = on_bytes
        self._digest = digest

    def text(self) -> TextFile:
        """Its text, decompressed."""
        return TextFile(FastaFile.at(self.path), on_raw=self.note)

    def note(self, raw: bytes) -> None:
        """Counts bytes as they lie on the disk."""
        if self._digest is not None:
            self._digest.update(raw)
        self._on_bytes(len(raw))


def _records(source: Source, file: _Counted) -> Iterator[Batch]:
    """XML and flat files. A thread decompresses while this one parses, and both leave the interpreter to others."""
    reader = RecordReader(cast(Any, source.format), source.path, TOKENS)
    line, found = 1, 0
    with Prefetched(iter(file.text()), ahead=4) as pieces:
        try:
            for piece in pieces:
                for batch in _fed(source, reader, piece, last=False):
                    line, found = int(batch.lines[-1]), found + len(batch)
                    yield batch
        except DamagedFile as error:
            raise InputError(f"{source.path}:{line}: {error}; it was read to the entry of this line") from error
    for batch in _fed(source, reader, b"", last=True):
        found += len(batch)
        yield batch
    if not found:
        raise InputError(f"{source.path}: has no entry in it")


def _fed(source: Source, reader: RecordReader, piece: bytes, last: bool) -> Iterator[Batch]:
    while True:
        ids, id_offsets, data, data_offsets, go, go_offsets, lines = reader.feed(piece, last)
        if not len(lines):
            return
        marks = np.zeros(len(lines), np.uint8)
        if source.role == Role.ENTRY:
            data, data_offsets = data[:0], np.zeros_like(data_offsets)
        else:
            missing = np.flatnonzero(np.diff(data_offsets) == 0)
            if len(missing):
                i = missing[0]
                name = ids[id_offsets[i] : id_offsets[i + 1]].tobytes().decode()
                raise InputError(
                    f"{source.path}:{lines[i]}: entry {name} has no sequence; give the sequences with --sequences"
                )
        yield Batch(ids, id_offsets, data, data_offsets, go, go_offsets, lines, marks)
        # If something is wrong behind these records, this call says so.
        piece = b""


def _fasta(source: Source, file: _Counted) -> Iterator[Batch]:
    notes = FastaNotes()
    for records in fasta_records(file.text(), "other", notes):
        for first in range(0, len(records), _ROWS):
            rows = _Rows()
            for record in records[first : first + _ROWS]:
                row_id = record.id.encode()
                match = _UNIPROT_ID.match(row_id)
                rows.add(match[1] if match else row_id, record.line, record.sequence.translate(TOKENS))
            yield rows.batch()
    for line in notes.lines():
        logger.info("%s", line)


def _dense(source: Source, file: _Counted) -> Iterator[Batch]:
    with open(source.path, "rb") as raw:
        while chunk := raw.read(1 << 20):
            file.note(chunk)
    with dense.opened(source.path) as dataset:
        for first in range(0, dataset.n_records, dense.ROWS):
            rows = _Rows()
            for i, (row_id, sequence, numbers, is_test) in enumerate(dataset.records(first), first + 1):
                rows.add(row_id, i, sequence.translate(TOKENS), numbers, TEST if is_test else TRAIN)
            yield rows.batch()


def _lines(source: Source, file: _Counted) -> Iterator[Batch]:
    """Files of one row per line: GO terms, clusters, ids."""
    add = {"gaf": _gaf_line, "tsv": _tsv_line, "clusters": _cluster_line, "ids": _id_line}[source.format]
    rows = _Rows()
    found = False
    for number, line in enumerate(_text_lines(source, file), 1):
        if not line.strip():
            continue
        try:
            add(rows, line, number, source)
        except ValueError as error:
            raise InputError(f"{source.path}:{number}: {error}") from error
        if len(rows) >= _ROWS:
            found = True
            yield rows.batch()
            rows = _Rows()
    if len(rows):
        yield rows.batch()
    elif not found:
        raise InputError(f"{source.path}: has no row in it")


def _text_lines(source: Source, file: _Counted) -> Iterator[bytes]:
    unfinished = b""
    number = 1
    first = True
    try:
        for chunk in file.text():
            if first:
                chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
            lines = (unfinished + chunk).split(b"\n")
            unfinished = lines.pop()
            if len(unfinished) > _LONGEST_LINE:
                raise InputError(f"{source.path}:{number}: a line of more than {_LONGEST_LINE:,} bytes")
            if b"\0" in chunk:
                raise InputError(f"{source.path}:{number}: a NUL byte (a damaged or binary file)")
            number += len(lines)
            yield from (line.rstrip(b"\r") for line in lines)
    except DamagedFile as error:
        raise InputError(f"{source.path}:{number}: {error}") from error
    yield unfinished.rstrip(b"\r")


def _numbers(text: bytes) -> list[int]:
    found = []
    for go_id in _GO.findall(text):
        match = _GO_ID.fullmatch(go_id)
        found.append(int(match[1]) if match else MALFORMED_GO)
    return found


def _gaf_line(rows: _Rows, line: bytes, number: int, source: Source) -> None:
    """GAF 1 and 2: columns 2 (id), 4 (qualifier) and 5 (GO id) of 15 or more."""
    if line.startswith(b"!"):
        return
    columns = line.split(b"\t")
    if len(columns) < 15 or not columns[1]:
        raise ValueError(f"is not GAF: {len(columns)} columns, and an id in the second of at least 15 is needed")
    if b"NOT" in columns[3].upper().split(b"|"):
        return  # says that the protein does not have the term
    rows.add(columns[1], number, go=_numbers(columns[4]) or [MALFORMED_GO])


def _tsv_line(rows: _Rows, line: bytes, number: int, source: Source) -> None:
    """An id, and GO terms in any of the other columns."""
    if line.startswith(b"#"):
        return
    row_id, tab, rest = line.partition(b"\t")
    if not tab:
        raise ValueError("is no table: an id, a tab and GO terms were expected")
    if number == 1 and row_id.strip().lower() in _HEADERS:
        return
    if not row_id.strip():
        raise ValueError("the first column, the id, is empty")
    rows.add(row_id.strip(), number, go=_numbers(rest))


def _cluster_line(rows: _Rows, line: bytes, number: int, source: Source) -> None:
    """A representative and a member, as of ``mmseqs createtsv``."""
    columns = [column.strip() for column in line.split(b"\t")]
    if len(columns) != 2 or not all(columns):
        raise ValueError("two columns were expected: representative, member")
    rows.add(columns[1], number, data=columns[0])


def _id_line(rows: _Rows, line: bytes, number: int, source: Source) -> None:
    if not line.startswith(b"#"):
        rows.add(line.split()[0], number, mark=source.mark)
