"""Where sequences come from: FASTA files and pipes, or Python objects. All are looked at before any work."""

import errno
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from proteinbert_fast.data.fasta import (
    Duplicates,
    FastaFile,
    FastaRecord,
    Fingerprint,
    Lowercase,
    check_readable,
    read_fasta,
    scan_fasta,
)
from proteinbert_fast.errors import InputError

Layout = Literal["flat", "uniprot"]

_UNIPROT_HEADER = re.compile(r"(?:sp|tr)\|([A-Z0-9-]+)\|")


@dataclass(frozen=True)
class Scan:
    """What a source holds.

    Attributes:
        lengths: int64 (N,): residues of each record.
        fingerprint: name, size and SHA-256 of each file.
        n_dropped: records left out because an earlier one has their id.
        notes: what there is to say about the records, a line each.
    """

    lengths: npt.NDArray[np.int64]
    fingerprint: list[Fingerprint]
    n_dropped: int
    notes: list[str]


class Source(Protocol):
    """Records that can be read more than once."""

    def check(self) -> None:
        """Refuses at once what can be refused without reading. Raises InputError."""

    def scan(self, on_bytes: Callable[[int], object]) -> Scan:
        """Looks at every record, and tells how far it is. Raises InputError if one cannot be used."""

    def records(self) -> Iterator[FastaRecord]:
        """The records that the scan counted, in order."""


def dataset_name(record_id: str) -> str:
    """The record in the UniProt layout: the accession of a UniProt id (``sp|P12345|NAME``), else the id."""
    match = _UNIPROT_HEADER.match(record_id)
    return match[1] if match else record_id


def _checked_dataset_name(record: FastaRecord) -> str:
    name = dataset_name(record.id)
    if "/" in name or name in {".", ".."}:
        raise InputError(
            f"{record.place}: the uniprot layout names datasets by id, and HDF5 takes '/' for a folder: use layout flat"
        )
    return name


class FastaSource:
    """FASTA files. Pipes and standard input are first copied, because they can be read only once.

    Args:
        paths: the files.
        lowercase, duplicates: as for `scan_fasta`.
        layout: "uniprot" wants the dataset names to be unique, "flat" the ids.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        lowercase: Lowercase,
        duplicates: Duplicates,
        layout: Layout,
    ) -> None:
        self._files = [FastaFile.at(path) for path in paths]
        self._lowercase = lowercase
        self._duplicates = duplicates
        self._name_of: Callable[[FastaRecord], str] = _checked_dataset_name if layout == "uniprot" else lambda r: r.id
        self._dropped: set[int] = set()
        self._expected: tuple[Fingerprint, ...] = ()

    def check(self) -> None:
        if not self._files:
            raise InputError("no FASTA file given")
        if [file.path for file in self._files].count("-") > 1:
            raise InputError("standard input (-) is named twice")
        for file in self._files:
            check_readable(file)

    def copy_pipes(self, folder: str) -> None:
        """Copies what can be read only once into a folder.

        Raises:
            InputError: reading fails.
            OSError: writing fails.
        """
        for i, file in enumerate(self._files):
            if file.path != "-" and os.path.isfile(file.path):
                continue
            copy = os.path.join(folder, f"input-{i}")
            with open(copy, "wb") as target:
                for chunk in _chunks(file):
                    target.write(chunk)
            self._files[i] = FastaFile(copy, file.name)

    def scan(self, on_bytes: Callable[[int], object]) -> Scan:
        found = scan_fasta(
            self._files,
            lowercase=self._lowercase,
            duplicates=self._duplicates,
            name_of=self._name_of,
            on_bytes=on_bytes,
        )
        self._dropped = set(found.dropped.tolist())
        self._expected = found.files
        return Scan(found.lengths, list(found.files), len(found.dropped), found.notes.lines())

    def records(self) -> Iterator[FastaRecord]:
        records = read_fasta(self._files, lowercase=self._lowercase, expected=self._expected)
        if not self._dropped:
            return records
        return (record for number, record in enumerate(records) if number not in self._dropped)


def _chunks(file: FastaFile) -> Iterator[bytes]:
    try:
        with nullcontext(sys.stdin.buffer) if file.path == "-" else open(file.path, "rb") as stream:
            while chunk := stream.read(1 << 20):
                yield chunk
    except OSError as error:
        raise InputError(f"{file.name}: cannot be read: {error.strerror or error}") from error


class _Given(FastaRecord):
    """A record that comes from no file."""

    __slots__ = ()

    @property
    def place(self) -> str:
        return self.file


class MemorySource:
    """Sequences that Python holds: a list of sequences or records, or a dict from id to sequence.

    Each sequence is taken literally, one residue per character; a list of bare sequences gets the ids "0",
    "1", ...
    """

    def __init__(
        self,
        sequences: Iterable[Any] | Mapping[str, Any],
        lowercase: Lowercase,
        duplicates: Duplicates,
        layout: Layout,
    ) -> None:
        self._upper = lowercase == "upper"
        self._name_of: Callable[[FastaRecord], str] = _checked_dataset_name if layout == "uniprot" else lambda r: r.id
        self._duplicates = duplicates
        items = sequences.items() if isinstance(sequences, Mapping) else enumerate(sequences)
        self._records = [self._record(number, key, value) for number, (key, value) in enumerate(items)]

    def _record(self, number: int, key: object, value: Any) -> FastaRecord:
        name, sequence = str(key), value
        if hasattr(value, "sequence") and hasattr(value, "id"):
            name, sequence = str(value.id), value.sequence
        where = f"sequence {number}" if name == str(number) else f"sequence {number} ({name})"
        if isinstance(sequence, os.PathLike):
            raise InputError(f"{where}: is a path; give a path, or a list of nothing but paths, for FASTA files")
        if isinstance(sequence, str):
            text = sequence
        elif isinstance(sequence, (bytes, bytearray, memoryview)) or (
            isinstance(sequence, np.ndarray) and sequence.dtype == np.uint8
        ):
            try:
                text = bytes(sequence).decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: is not UTF-8 text ({error})") from error
        else:
            raise TypeError(f"{where}: a sequence is a str or bytes, not {type(sequence).__name__}")
        if not text:
            raise InputError(f"{where}: the sequence is empty")
        if not name or "\n" in name or "\0" in name:
            raise InputError(f"{where}: {name!r} cannot be an id: it is empty or has a line end or NUL in it")
        try:
            residues = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: a character that is not Unicode text ({error.reason})") from error
        return _Given(name, "", residues.upper() if self._upper else residues, where, number)

    def check(self) -> None:
        if not self._records:
            raise InputError("no sequence given")

    def scan(self, on_bytes: Callable[[int], object]) -> Scan:
        digest = hashlib.sha256()
        seen: set[str] = set()
        kept: list[FastaRecord] = []
        for record in self._records:
            name = self._name_of(record)
            if name in seen and self._duplicates == "refuse":
                raise InputError(f"{record.file}: the id {name} was already used; ask for duplicates keep or first")
            if name in seen and self._duplicates == "first":
                continue
            seen.add(name)
            kept.append(record)
            digest.update(b"%d,%d," % (len(record.id.encode()), len(record.sequence)))
            digest.update(record.id.encode() + record.sequence)
        n_dropped, self._records = len(self._records) - len(kept), kept
        lengths = np.array([n_residues(record.sequence) for record in kept], np.int64)
        fingerprint: list[Fingerprint] = [
            {"name": "sequences", "bytes": int(lengths.sum()), "sha256": digest.hexdigest()}
        ]
        return Scan(lengths, fingerprint, n_dropped, [])

    def records(self) -> Iterator[FastaRecord]:
        return iter(self._records)


def n_residues(sequence: bytes) -> int:
    """Residues of UTF-8 text: its code points."""
    return len(sequence) if sequence.isascii() else len(sequence.decode())


def cut(sequence: bytes, residues: int) -> bytes:
    """The first residues of UTF-8 text."""
    return sequence[:residues] if sequence.isascii() else sequence.decode()[:residues].encode()


def open_source(
    sequences: Any, lowercase: Lowercase, duplicates: Duplicates, layout: Layout
) -> "FastaSource | MemorySource":
    """The source for what `embed` was given: paths are FASTA files, everything else is sequences."""
    if isinstance(sequences, str) and not os.path.exists(sequences) and sequences != "-":
        hint = "; to embed a sequence, give a list of sequences" if sequences.isalpha() else ""
        raise InputError(f"{sequences[:80]}: {os.strerror(errno.ENOENT).lower()}{hint}")
    if isinstance(sequences, (str, os.PathLike)):
        return FastaSource([sequences], lowercase, duplicates, layout)
    if isinstance(sequences, (bytes, bytearray)) or not isinstance(sequences, Iterable):
        raise TypeError(f"give a path, or a list or dict of sequences, not {type(sequences).__name__}")
    if not isinstance(sequences, (Mapping, Sequence)):
        sequences = list(sequences)
    if len(sequences) and all(isinstance(item, os.PathLike) for item in sequences):
        return FastaSource(list(sequences), lowercase, duplicates, layout)
    return MemorySource(sequences, lowercase, duplicates, layout)
