"""FASTA files, read as a stream: plain, gzip or zstandard, from files, pipes or standard input.

What is accepted, and how it is read:

- Compression is told by the first bytes of a file, not by its name. Several gzip members or zstandard frames
  in a row are one file (``cat a.gz b.gz``, bgzip).
- Line ends may be LF, CRLF or a lone CR. Blank lines are skipped, as are lines that start with ``;``, the
  comments of the oldest FASTA form. A UTF-8 byte order mark at the start is skipped.
- The id is the first word after ``>``; the rest of the line is the description. Ids are UTF-8; ``/`` is fine.
- Blanks and tabs within sequence lines are dropped, and so is ``*`` at the end of a sequence (a stop codon).
- Every other printable character is kept: the tokenizer reads what is no residue as OTHER, as the original
  model does. Lower case is such a character, unless ``lowercase="upper"``.

What is kept although it is no residue, what was dropped, and files that look like DNA are collected in
`FastaNotes`, so that they can be said once.

Refused, with a line that names file, line and record: a file without records, text before the first header,
a header without an id, an empty sequence, ``>`` within a sequence (a missing line end), NUL and other control
characters, characters outside ASCII in a sequence, headers that are not UTF-8, truncated or damaged gzip and
zstandard files, other compression and binary files, directories and missing files.
"""

import errno
import hashlib
import os
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from proteinbert_fast.errors import InputError

__all__ = ["FastaFile", "FastaNotes", "FastaRecord", "FastaScan", "read_fasta", "scan_fasta"]

Duplicates = Literal["refuse", "keep", "first"]
Lowercase = Literal["other", "upper"]
Path = str | os.PathLike[str]
Fingerprint = dict[str, str | int]  # name, bytes, sha256

_CHUNK = 1 << 20  # bytes of plain text per step
_COMPRESSED_CHUNK = 1 << 16  # small: one step of gzip can grow a thousandfold
_UPPER = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LOWER = frozenset(_UPPER.lower())
_BLANKS = b" \t\x0b\x0c"
_NUCLEOTIDES = b"ACGTUNacgtun"
_DNA_SAMPLE = 1000  # records per file
_DNA_RESIDUES = 50  # fewer say nothing: "ACG" is a peptide as well
_OTHER_FORMATS = (
    (b"BZh", "bzip2-compressed: decompress it first"),
    (b"\xfd7zXZ\x00", "xz-compressed: decompress it first"),
    (b"PK\x03\x04", "a zip archive: unpack it first"),
    (b"\xff\xfe", "UTF-16 text: save it as plain text"),
    (b"\xfe\xff", "UTF-16 text: save it as plain text"),
    (b"\x89HDF", "an HDF5 file, not FASTA"),
    (b"@", "not FASTA: it starts with '@', like FASTQ"),
    (b"<", "not FASTA: it starts with '<', like XML or HTML"),
)


@dataclass(slots=True)
class FastaRecord:
    """One protein of a FASTA file.

    Attributes:
        id: first word of the header.
        description: rest of the header, may be empty.
        sequence: residues, without line ends and blanks.
        file: name of the file, as it was given.
        line: line of the header in the file, from 1.
    """

    id: str
    description: str
    sequence: bytes
    file: str
    line: int

    @property
    def place(self) -> str:
        """Where the record stands, for messages."""
        return f"{self.file}:{self.line}: record {self.id}"


@dataclass(frozen=True, slots=True)
class FastaFile:
    """A file to read, and the name that messages and fingerprints give it (a pipe is read from a copy).

    ``path`` "-" is standard input.
    """

    path: str
    name: str

    @classmethod
    def at(cls, path: "Path | FastaFile") -> "FastaFile":
        """The file at ``path``, called by its path."""
        if isinstance(path, FastaFile):
            return path
        return cls(os.fspath(path), "standard input" if os.fspath(path) == "-" else os.fspath(path))


@dataclass(slots=True)
class _Note:
    place: str
    count: int = 0
    characters: set[int] = field(default_factory=set)


class FastaNotes:
    """What a reader has to say about records that it accepted: each kind once, with a count."""

    def __init__(self) -> None:
        self._notes: dict[str, _Note] = {}
        self._dna: list[str] = []

    def add(self, kind: str, place: str, characters: Iterable[int] = ()) -> None:
        """Count a record of a kind: "lower", "stop" or "other"."""
        note = self._notes.setdefault(kind, _Note(place))
        note.count += 1
        note.characters.update(characters)

    def add_dna(self, file: str, records: int, sampled: int) -> None:
        """Remember that ``records`` of the first ``sampled`` records of a file are nucleotides only."""
        self._dna.append(
            f"{file}: looks like DNA or RNA: {records} of the first {sampled} records have only "
            "A, C, G, T, U and N, which are read as amino acids; translate it first"
        )

    def lines(self) -> list[str]:
        """One line for each kind of thing that was noted."""
        return self._dna + [self._line(kind, note) for kind, note in self._notes.items()]

    @staticmethod
    def _line(kind: str, note: _Note) -> str:
        where = note.place + (f" and {note.count - 1:,} more" if note.count > 1 else "")
        if kind == "lower":
            return (
                f"{where}: lower-case letters are read as unknown residues, as the original model does; "
                "to read them as residues ask for lowercase upper"
            )
        if kind == "stop":
            return f"{where}: the '*' (stop codon) at the end of the sequence was left out"
        shown = " ".join(chr(c) for c in sorted(note.characters))
        return f"{where}: characters that are no amino acid are read as unknown residues: {shown}"


@dataclass(frozen=True)
class FastaScan:
    """What one pass over FASTA files has found.

    Attributes:
        lengths: int64 (N,): residues of each record that will be read.
        dropped: int64, ascending: numbers (from 0) of records to leave out: an earlier one has their id.
        n_duplicates: records whose id an earlier record has.
        files: name, size in bytes and SHA-256 of each file's text after decompression.
        notes: what there is to say about the records.
    """

    lengths: npt.NDArray[np.int64]
    dropped: npt.NDArray[np.int64]
    n_duplicates: int
    files: tuple[Fingerprint, ...]
    notes: FastaNotes


def read_fasta(
    files: "Path | FastaFile | Iterable[Path | FastaFile]",
    *,
    lowercase: Lowercase = "other",
    notes: FastaNotes | None = None,
    expected: Sequence[Fingerprint] | None = None,
) -> Iterator[FastaRecord]:
    """Records of one or several FASTA files, in order; memory stays at one record and a few MB.

    Ids are not compared with each other: `scan_fasta` does that.

    Args:
        files: paths; "-" is standard input.
        lowercase: "upper" reads lower-case letters as residues; "other" leaves them to become OTHER.
        notes: collects what there is to say about accepted records.
        expected: fingerprints that `scan_fasta` found; each file is compared with its own at its end.

    Raises:
        InputError: a file or a record cannot be used (see the top of this module), or a file has changed.
    """
    check_choice("lowercase", lowercase, ("other", "upper"))
    return _read_files(_file_list(files), lowercase, notes, expected)


def scan_fasta(
    files: "Path | FastaFile | Iterable[Path | FastaFile]",
    *,
    lowercase: Lowercase = "other",
    duplicates: Duplicates = "refuse",
    name_of: Callable[[FastaRecord], str] = attrgetter("id"),
    on_bytes: Callable[[int], object] | None = None,
) -> FastaScan:
    """Read FASTA files once, to know before any work is done that all of them are good.

    Needs 16 bytes of memory per record, whatever the length of the ids.

    Args:
        files: paths that can be read twice (no pipes).
        lowercase: as for `read_fasta`.
        duplicates: "refuse" a record whose id an earlier one has, "keep" both, or keep the "first".
        name_of: what must be unique, if it is not the id; may raise InputError.
        on_bytes: is told how many bytes of text were read, piece by piece.

    Raises:
        InputError: a record cannot be used, or its id is not unique.
    """
    check_choice("lowercase", lowercase, ("other", "upper"))
    check_choice("duplicates", duplicates, ("refuse", "keep", "first"))
    all_files = _file_list(files)
    notes = FastaNotes()
    lengths, id_hashes = array("q"), array("q")
    fingerprints: list[Fingerprint] = []
    for file in all_files:
        text = TextFile(file, digest=True, on_bytes=on_bytes)
        for records in fasta_records(text, lowercase, notes):
            lengths.extend([len(record.sequence) for record in records])
            id_hashes.extend([hash(name_of(record)) for record in records])
        fingerprints.append(text.fingerprint)
    hashes = np.frombuffer(id_hashes, np.int64)
    repeated = _repeats(all_files, lowercase, name_of, hashes, refuse=duplicates == "refuse")
    dropped = repeated if duplicates == "first" else np.empty(0, np.int64)
    return FastaScan(
        lengths=np.delete(np.frombuffer(lengths, np.int64), dropped),
        dropped=dropped,
        n_duplicates=len(repeated),
        files=tuple(fingerprints),
        notes=notes,
    )


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is not among the known ones.

    Raises:
        InputError: it is not.
    """
    if value not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_readable(file: FastaFile) -> None:
    """Refuse a path that is missing, a directory or not readable, without reading from it.

    Raises:
        InputError: it is.
    """
    if file.path == "-":
        return
    if os.path.isdir(file.path):
        raise InputError(f"{file.name}: is a directory; name the FASTA files in it")
    if not os.path.exists(file.path):
        raise InputError(f"{file.name}: no such file")
    if not os.access(file.path, os.R_OK):
        raise InputError(f"{file.name}: cannot be read: {os.strerror(errno.EACCES)}")


def _file_list(files: "Path | FastaFile | Iterable[Path | FastaFile]") -> list[FastaFile]:
    if isinstance(files, (str, os.PathLike, FastaFile)):
        files = [files]
    found = [FastaFile.at(file) for file in files]
    if not found:
        raise InputError("no FASTA file given")
    for file in found:
        check_readable(file)
    return found


def _read_files(
    files: list[FastaFile],
    lowercase: Lowercase,
    notes: FastaNotes | None = None,
    expected: Sequence[Fingerprint] | None = None,
) -> Iterator[FastaRecord]:
    for i, file in enumerate(files):
        text = TextFile(file, digest=expected is not None)
        yield from chain.from_iterable(fasta_records(text, lowercase, notes))
        if expected is not None and text.fingerprint != expected[i]:
            raise InputError(f"{file.name}: has changed since it was checked a moment ago")


def _repeats(
    files: list[FastaFile],
    lowercase: Lowercase,
    name_of: Callable[[FastaRecord], str],
    hashes: npt.NDArray[np.int64],
    *,
    refuse: bool,
) -> npt.NDArray[np.int64]:
    """Numbers of the records whose id an earlier record has: a second look at ids whose hash occurs twice."""
    ordered = np.sort(hashes)
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not suspects:
        return np.empty(0, np.int64)
    first: dict[str, str] = {}
    repeated = array("q")
    error = ""
    for number, record in enumerate(_read_files(files, lowercase)):
        name = name_of(record)
        if hash(name) not in suspects:
            continue
        if name not in first:
            first[name] = f"{record.file}:{record.line}"
            continue
        if not repeated:
            error = f"{record.place}: {name} was already used at {first[name]}"
        repeated.append(number)
    if repeated and refuse:
        more = f" ({len(repeated) - 1:,} more such records)" if len(repeated) > 1 else ""
        raise InputError(f"{error}{more}; ask for duplicates keep or first")
    return np.frombuffer(repeated, np.int64) if repeated else np.empty(0, np.int64)


class DamagedFile(Exception):
    """A compressed file that ends too early or holds nonsense; the message says which."""


class TextFile:
    """The bytes of a file, decompressed, in chunks; counts and digests them on the way."""

    def __init__(
        self,
        file: FastaFile,
        digest: bool = False,
        on_bytes: Callable[[int], object] | None = None,
        on_raw: Callable[[bytes], object] | None = None,
    ) -> None:
        self.name = file.name
        self.size = 0
        self._path = file.path
        self._digest = hashlib.sha256() if digest else None
        self._on_bytes = on_bytes
        self._on_raw = on_raw  # is given the bytes as they lie on the disk

    @property
    def fingerprint(self) -> Fingerprint:
        """Name, size and SHA-256 of the text; a path counts by its last part."""
        assert self._digest is not None
        return {"name": os.path.basename(self.name), "bytes": self.size, "sha256": self._digest.hexdigest()}

    def __iter__(self) -> Iterator[bytes]:
        """Chunks of text.

        Raises:
            InputError: the file cannot be opened or read, or is compressed in a way that cannot be read.
            DamagedFile: it is compressed and damaged.
        """
        try:
            if self._path == "-":
                yield from self._chunks(sys.stdin.buffer)
            else:
                with open(self._path, "rb") as stream:
                    yield from self._chunks(stream)
        except OSError as error:
            raise InputError(f"{self.name}: cannot be read: {error.strerror or error}") from error

    def _chunks(self, stream: BinaryIO) -> Iterator[bytes]:
        head = stream.read(8)
        if head.startswith(b"\x1f\x8b"):
            chunks = _gunzip(self._raw(head, stream, _COMPRESSED_CHUNK))
        elif head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
            chunks = _unzstd(self._raw(head, stream, _COMPRESSED_CHUNK), self.name)
        else:
            chunks = self._raw(head, stream, _CHUNK)
        for chunk in chunks:
            self.size += len(chunk)
            if self._digest is not None:
                self._digest.update(chunk)
            if self._on_bytes is not None:
                self._on_bytes(len(chunk))
            yield chunk

    def _raw(self, head: bytes, stream: BinaryIO, size: int) -> Iterator[bytes]:
        chunk = head + stream.read(size - len(head))
        while chunk:
            if self._on_raw is not None:
                self._on_raw(chunk)
            yield chunk
            chunk = stream.read(size)


def _inflaters() -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """What makes a gzip decompressor, and the errors it may raise: ISA-L's, several times as fast, if installed."""
    try:
        from isal import isal_zlib
    except ImportError:
        return partial(zlib.decompressobj, wbits=31), (zlib.error,)
    errors: tuple[type[Exception], ...] = (isal_zlib.error, zlib.error)  # type: ignore[assignment]
    return partial(isal_zlib.decompressobj, wbits=31), errors


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    new_member, errors = _inflaters()
    member = new_member()
    started = True
    for chunk in chunks:
        while chunk:
            if not started:
                chunk = chunk.lstrip(b"\0")  # tape blocks pad with zeros
                if not chunk:
                    break
                if not b"\x1f\x8b".startswith(chunk[:2]):
                    raise DamagedFile("the gzip data is damaged (something else follows its end)")
                member, started = new_member(), True
            try:
                text = member.decompress(chunk)
            except errors as error:
                raise DamagedFile(f"the gzip data is damaged ({error})") from error
            if text:
                yield text
            chunk = member.unused_data
            started = not member.eof
    if started:
        raise DamagedFile("the gzip file is truncated")


def _unzstd(chunks: Iterator[bytes], name: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            f"{name}: is zstandard-compressed, which needs a package: pip install 'proteinbert-fast[zst]'"
        ) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    started = False
    for chunk in chunks:
        while chunk:
            started = True
            try:
                text = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise DamagedFile(f"the zstandard data is damaged ({error})") from error
            if text:
                yield text
            chunk = b""
            if frame.eof:
                chunk = frame.unused_data
                frame, started = decompressor.decompressobj(), False
    if started:
        raise DamagedFile("the zstandard file is truncated")


def fasta_records(text: TextFile, lowercase: Lowercase, notes: FastaNotes | None) -> Iterator[list[FastaRecord]]:
    """Records of one file, block by block: no step in Python per line or residue."""
    parser = _Parser(text.name, lowercase, notes)
    unfinished: list[bytes] = []  # pieces of a line whose end is still to come
    chunks = iter(text)
    held = b""  # a CR at the end of a chunk: the LF may be in the next one
    while True:
        try:
            chunk = next(chunks, None)
        except DamagedFile as error:
            raise InputError(f"{parser.place}: {error}") from error
        if chunk is None:
            break
        if held:
            chunk = held + chunk
        held = chunk[-1:] if chunk.endswith(b"\r") else b""
        if held:
            chunk = chunk[:-1]
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not parser.started:
            # The first line must be looked at before a file without any line end fills the memory.
            chunk = parser.check_start(b"".join((*unfinished, chunk)))
            unfinished.clear()
        end = chunk.rfind(b"\n") + 1
        if end == 0:
            unfinished.append(chunk)
            continue
        lines = b"".join((b"\n", *unfinished, chunk[:end]))
        unfinished = [chunk[end:]]
        yield parser.feed(lines)
    last = b"".join(unfinished)
    if last or held:
        yield parser.feed(b"\n" + last + b"\n")
    yield [parser.finish()]


class _Parser:
    """Turns blocks of whole lines into records; the record at the end of a block waits for the next block."""

    def __init__(self, file: str, lowercase: Lowercase, notes: FastaNotes | None) -> None:
        self._file = file
        self._upper = lowercase == "upper"
        self._notes = notes
        self._line = 1  # of the next block's first line
        self._header: bytes | None = None  # of the record that waits
        self._header_line = 0
        self._body: list[bytes] = []
        self._sampled = self._nucleotides = self._nucleotide_residues = 0
        self.started = False

    @property
    def place(self) -> str:
        """The line and record that reading has come to."""
        where = f"{self._file}:{self._line}"
        if self._header is None:
            return where
        return f"{where}: record {_words(self._header)[0]}"

    def check_start(self, text: bytes) -> bytes:
        """The text less a byte order mark; refuses what cannot be the start of a FASTA file."""
        if text.startswith(b"\xef\xbb\xbf"):
            text = text[3:]
        begin = text.lstrip(b"\n" + _BLANKS)
        if not begin or begin.startswith((b">", b";")):
            self.started = begin.startswith(b">")
            return text
        self._refuse_start(begin, self._line + text[: len(text) - len(begin)].count(b"\n"))
        return text

    def _refuse_start(self, begin: bytes, line: int) -> None:
        for magic, what in _OTHER_FORMATS:
            if begin.startswith(magic):
                raise InputError(f"{self._file}: is {what}")
        shown = begin[:30].split(b"\n")[0].decode("utf-8", "replace")
        if b"\0" in begin[:4096] or not shown.isprintable() or "\ufffd" in shown[:-1]:
            raise InputError(f"{self._file}: is a binary file, not FASTA")
        raise InputError(f"{self._file}:{line}: no FASTA header: a line with '>' must come before {shown!r}")

    def feed(self, lines: bytes) -> list[FastaRecord]:
        """Records that end within a block: a line end, then whole lines."""
        text = np.frombuffer(lines, np.uint8)
        line_ends = np.flatnonzero(text == ord("\n"))
        headers = np.flatnonzero(text[line_ends[:-1] + 1] == ord(">"))  # line end i comes before line i
        first_line = self._line
        self._line += len(line_ends) - 1
        before = lines[1 : int(line_ends[headers[0]]) + 1] if len(headers) else lines[1:]
        if self._header is not None:
            self._body.append(before)
        elif before.strip():
            self._check_before_first(before, first_line)
        if not len(headers):
            return []
        self.started = True
        records = [self._waiting()] if self._header is not None else []
        ends = line_ends[headers].tolist()  # of the lines before the headers
        header_ends = line_ends[headers + 1].tolist()
        numbers = (headers + first_line).tolist()
        bodies = [lines[begin + 1 : end + 1] for begin, end in zip(header_ends, ends[1:], strict=False)]
        sequences = [body.replace(b"\n", b"") for body in bodies]
        # One look at all sequences: nearly always there is nothing but capital letters.
        plain = (
            not b"".join(sequences).translate(None, _UPPER)
            and lines.isascii()
            and b"\0" not in lines
            and (self._notes is None or self._sampled >= _DNA_SAMPLE)
        )
        file, add = self._file, records.append
        for i, sequence in enumerate(sequences):
            header = lines[ends[i] + 2 : header_ends[i]]
            words = header.split(None, 1)
            if plain and sequence and words:
                description = words[1].rstrip().decode() if len(words) > 1 else ""
                add(FastaRecord(words[0].decode(), description, sequence, file, numbers[i]))
            else:
                add(self._record(header, bodies[i], numbers[i]))
        self._header, self._header_line = lines[ends[-1] + 2 : header_ends[-1]], numbers[-1]
        self._body = [lines[header_ends[-1] + 1 :]]
        return records

    def finish(self) -> FastaRecord:
        """The record that the end of the file completes."""
        if self._header is None:
            raise InputError(f"{self._file}: is empty: no FASTA record in it")
        record = self._waiting()
        self._judge_dna()
        return record

    def _check_before_first(self, lines: bytes, first_line: int) -> None:
        for number, line in enumerate(lines.split(b"\n"), first_line):
            if line.strip() and not line.startswith(b";"):
                self._refuse_start(line.lstrip(), number)

    def _waiting(self) -> FastaRecord:
        assert self._header is not None
        header, body = self._header, b"".join(self._body)
        self._header, self._body = None, []
        return self._record(header, body, self._header_line)

    def _record(self, header: bytes, body: bytes, line: int) -> FastaRecord:
        """One record, looked at closely."""
        try:
            name, description = _words(header)
        except UnicodeDecodeError as error:
            shown = header[:40].decode("ascii", "backslashreplace")
            raise InputError(f"{self._file}:{line}: the header >{shown} is not UTF-8 text") from error
        if "\0" in name or "\0" in description:
            what = "a NUL byte (a damaged or binary file)"
            raise InputError(f"{self._file}:{line}: record {name!r}: {what} in the header")
        if not name:
            raise InputError(f"{self._file}:{line}: a header without an id: a name must follow '>'")
        place = f"{self._file}:{line}: record {name}"
        if b"\n;" in b"\n" + body[:1] or b"\n;" in body:
            body = b"\n".join(b"" if text.startswith(b";") else text for text in body.split(b"\n"))
        sequence = body.replace(b"\n", b"")
        if odd := sequence.translate(None, _UPPER):
            sequence = self._clean(sequence, odd, body, place, line, name)
        if not sequence:
            raise InputError(f"{place}: the sequence is empty")
        if self._notes is not None and self._sampled < _DNA_SAMPLE:
            self._sampled += 1
            if not sequence.translate(None, _NUCLEOTIDES):
                self._nucleotides += 1
                self._nucleotide_residues += len(sequence)
            if self._sampled == _DNA_SAMPLE:
                self._judge_dna()
        return FastaRecord(name, description, sequence, self._file, line)

    def _clean(self, sequence: bytes, odd: bytes, body: bytes, place: str, line: int, name: str) -> bytes:
        kinds = set(odd)
        if not kinds.isdisjoint(_BLANKS):
            sequence = sequence.translate(None, _BLANKS)
            kinds -= set(_BLANKS)
        refused = {c for c in kinds if c < 0x20 or c >= 0x7F or c == ord(">")}
        if refused:
            at = min(body.index(c) for c in refused)
            line += 1 + body.count(b"\n", 0, at)
            what = _what_is_wrong_with(body[at])
            raise InputError(f"{self._file}:{line}: record {name}: {what} in the sequence")
        if sequence.endswith(b"*"):
            sequence = sequence.rstrip(b"*")
            if b"*" not in sequence:
                kinds.discard(ord("*"))
            if self._notes is not None:
                self._notes.add("stop", place)
        if not kinds.isdisjoint(_LOWER):
            if self._upper:
                sequence = sequence.upper()
            elif self._notes is not None:
                self._notes.add("lower", place)
            kinds -= _LOWER
        if kinds and self._notes is not None:
            self._notes.add("other", place, kinds)
        return sequence

    def _judge_dna(self) -> None:
        """Said once for each file, after its sample is complete or the file is."""
        if (
            self._notes is not None
            and self._nucleotide_residues >= _DNA_RESIDUES
            and 2 * self._nucleotides > self._sampled
        ):
            self._notes.add_dna(self._file, self._nucleotides, self._sampled)
        self._nucleotide_residues = 0


def _words(header: bytes) -> tuple[str, str]:
    """Id and description."""
    words = header.split(None, 1)
    return (words[0].decode() if words else "", words[1].rstrip().decode() if len(words) > 1 else "")


def _what_is_wrong_with(character: int) -> str:
    if character == ord(">"):
        return "'>' (the line end before the next header is missing)"
    if character == 0:
        return "a NUL byte (a damaged or binary file)"
    if character >= 0x80:
        return f"byte 0x{character:02x}, which is not ASCII,"
    return f"control character 0x{character:02x}"
