"""FASTA: what is read and how, and one clear line for everything that is refused."""

import gzip
import io
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast.data import fasta
from proteinbert_fast.data.fasta import FastaNotes, FastaRecord, read_fasta, scan_fasta
from proteinbert_fast.errors import InputError

zstandard = pytest.importorskip("zstandard")

TWO = b">P1 first protein\nMKTAY\nIAKQR\n>P2\nACDEF\n"


def write(folder: Path, content: bytes, name: str = "in.fasta") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def refusal(path: str, **options: str) -> str:
    """The one line that reading and scanning a file both end with."""
    with pytest.raises(InputError) as read:
        list(read_fasta(path))
    with pytest.raises(InputError) as scanned:
        scan_fasta(path, **options)
    assert str(read.value) == str(scanned.value)
    assert "\n" not in str(read.value)
    return str(read.value)


def pairs(path: str, **options: str) -> list[tuple[str, bytes]]:
    return [(record.id, record.sequence) for record in read_fasta(path, **options)]


def test_records_carry_id_description_sequence_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, TWO)
    assert list(read_fasta(path)) == [
        FastaRecord("P1", "first protein", b"MKTAYIAKQR", path, 1),
        FastaRecord("P2", "", b"ACDEF", path, 4),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gzip", gzip.compress(TWO, mtime=0)),
        ("two gzip members", gzip.compress(TWO[:20], mtime=0) + gzip.compress(TWO[20:], mtime=0)),
        ("gzip and zeros", gzip.compress(TWO, mtime=0) + bytes(512)),
        ("zstandard", zstandard.compress(TWO)),
        ("two zstandard frames", zstandard.compress(TWO[:20]) + zstandard.compress(TWO[20:])),
        ("skippable zstandard frame", b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstandard.compress(TWO)),
        ("CRLF", TWO.replace(b"\n", b"\r\n")),
        ("CR only", TWO.replace(b"\n", b"\r")),
        ("no line end at the end", TWO[:-1]),
        ("CR at the end", TWO[:-1] + b"\r"),
        ("blank lines", b"\n \n" + TWO.replace(b"\n", b"\n\n")),
        ("comments", b"; a comment\n" + TWO.replace(b"MKTAY\n", b";>P9\nMKTAY\n; more\n")),
        ("blanks and tabs in sequences", TWO.replace(b"KT", b"K T").replace(b"CD", b"C\tD ")),
        ("UTF-8 byte order mark", b"\xef\xbb\xbf" + TWO),
        ("blank before the id", TWO.replace(b">", b"> ")),
        ("tab after the id", TWO.replace(b"P1 ", b"P1\t")),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 8, 9, 11])
def test_same_records_from_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, chunk: int
) -> None:
    monkeypatch.setattr(fasta, "_CHUNK", chunk)
    monkeypatch.setattr(fasta, "_COMPRESSED_CHUNK", chunk)
    path = write(tmp_path, content, "name.says.nothing")
    found = list(read_fasta(path))
    assert [(r.id, r.description, r.sequence) for r in found] == [
        ("P1", "first protein", b"MKTAYIAKQR"),
        ("P2", "", b"ACDEF"),
    ]


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(gzip.compress(TWO, mtime=0))

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert [(r.id, r.file) for r in read_fasta("-")] == [("P1", "standard input"), ("P2", "standard input")]


def test_many_files_in_the_order_given(tmp_path: Path) -> None:
    one = write(tmp_path, b">B\nACD\n", "b.fasta")
    two = write(tmp_path, gzip.compress(b">A\nMKT", mtime=0), "a.fasta.gz")
    assert [(r.id, r.file, r.line) for r in read_fasta([one, Path(two)])] == [("B", one, 1), ("A", two, 1)]


residues = st.text("ACDEFGHIKLMNPQRSTVWYBXZUO", min_size=1, max_size=200)
names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    records=st.lists(st.tuples(names, st.sampled_from(["", "a >b c", "x"]), residues), min_size=1, max_size=8),
    width=st.integers(1, 70),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    chunk=st.integers(8, 300),
)
def test_round_trip_with_lines_as_an_editor_counts_them(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[tuple[str, str, str]],
    width: int,
    end: str,
    chunk: int,
) -> None:
    lines: list[str] = []
    expected = []
    for name, description, sequence in records:
        expected.append((name, description, sequence.encode(), len(lines) + 1))
        lines.append(f">{name} {description}")
        lines += [sequence[i : i + width] for i in range(0, len(sequence), width)]
    path = write(tmp_path_factory.mktemp("round"), end.join([*lines, ""]).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "_CHUNK", chunk)
        found = list(read_fasta(path))
    assert [(r.id, r.description, r.sequence, r.line) for r in found] == expected


def test_no_header(tmp_path: Path) -> None:
    path = write(tmp_path, b"\n\nMKTAY\n>P1\nMKT\n")
    assert refusal(path) == f"{path}:3: no FASTA header: a line with '>' must come before 'MKTAY'"
    path = write(tmp_path, b"; comment\nMKTAY\n>P1\nMKT\n")
    assert refusal(path).startswith(f"{path}:2: no FASTA header")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"; only a comment\n", b" \t", gzip.compress(b"", mtime=0)])
def test_empty_file(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path, content)
    assert refusal(path) == f"{path}: is empty: no FASTA record in it"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b">P1\n>P2\nMKT\n", 1),
        (b">P0\nMKT\n>P1\n\n>P2\nMKT\n", 3),
        (b">P0\nMKT\n>P1\n", 3),
        (b">P0\nMKT\n>P1", 3),
        (b">P0\nMKT\n>P1\n*\n>P2\nA\n", 3),
        (b">P0\nMKT\n>P1\n \t\n>P2\nA\n", 3),
    ],
)
def test_empty_sequence(tmp_path: Path, content: bytes, line: int) -> None:
    path = write(tmp_path, content)
    assert refusal(path) == f"{path}:{line}: record P1: the sequence is empty"


@pytest.mark.parametrize("header", [b">", b"> ", b">\t"])
def test_header_without_an_id(tmp_path: Path, header: bytes) -> None:
    path = write(tmp_path, b">P1\nMKT\n" + header + b"\nMKT\n>P2\nACD\n")
    assert refusal(path) == f"{path}:3: a header without an id: a name must follow '>'"


def test_header_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path, b">P1\nMKT\n>P\xe4 caf\xe9\nMKT\n")
    assert refusal(path) == rf"{path}:3: the header >P\xe4 caf\xe9 is not UTF-8 text"


def test_ids_with_slashes_bars_and_other_scripts(tmp_path: Path) -> None:
    ids = ["sp|P12345|AATM_RABIT", "Q9Y6K9/1-100", "protéine-β", "蛋白"]
    path = write(tmp_path, "".join(f">{i} d\nMKT\n" for i in ids).encode())
    assert [r.id for r in read_fasta(path)] == ids


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b">P0\nA\n>P1\nMK\nT\0A\n", 5, "a NUL byte (a damaged or binary file)"),
        (b">P0\nA\n>P1\nMK\nT\x01A\n>P2\nA\n", 5, "control character 0x01"),
        (b">P0\nA\n>P1\nMK\xc3\xa9\n", 4, "byte 0xc3, which is not ASCII,"),
        (b">P0\nA\n>P1\nMK>P2\nMKT\n", 4, "'>' (the line end before the next header is missing)"),
    ],
)
def test_characters_that_no_sequence_has(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = write(tmp_path, content)
    assert refusal(path) == f"{path}:{line}: record P1: {what} in the sequence"


def test_nul_in_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, b">P0\nA\n>P\x001\nMKT\n>P2\nA\n")
    assert refusal(path) == rf"{path}:3: record 'P\x001': a NUL byte (a damaged or binary file) in the header"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x7fELF\x02\x01\x01\0\0\0\0", "is a binary file, not FASTA"),
        (b"\xc5\x91\xfe\x07 no NUL in it", "is a binary file, not FASTA"),
        (b"BZh91AY&SY", "is bzip2-compressed: decompress it first"),
        (b"\xfd7zXZ\0\0\0", "is xz-compressed: decompress it first"),
        (b"PK\x03\x04abc", "is a zip archive: unpack it first"),
        (">P1\nMKT".encode("utf-16"), "is UTF-16 text: save it as plain text"),
        (b"\x89HDF\r\n\x1a\n\0\0", "is an HDF5 file, not FASTA"),
        (b"@read\nACGT\n+\n!!!!\n", "is not FASTA: it starts with '@', like FASTQ"),
        (b"<?xml version='1.0'?>", "is not FASTA: it starts with '<', like XML or HTML"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = write(tmp_path, content)
    assert refusal(path) == f"{path}: {says}"


def many(n: int) -> bytes:
    noise = np.random.default_rng(0)
    letters = np.frombuffer(b"ACDEFGHIKLMNPQRSTVWY", np.uint8)
    return b"".join(b">P%d\n%s\n" % (i, noise.choice(letters, 300).tobytes()) for i in range(n))


@pytest.mark.parametrize(
    ("compress", "says"), [(gzip.compress, "the gzip file"), (zstandard.compress, "the zstandard file")]
)
@pytest.mark.parametrize("part", [0.5, 0.999])
def test_truncated(tmp_path: Path, compress, says: str, part: float) -> None:  # type: ignore[no-untyped-def]
    whole = compress(many(5000))
    path = write(tmp_path, whole[: int(len(whole) * part)])
    line = refusal(path)
    assert line.endswith(f"{says} is truncated")
    assert line.startswith(f"{path}:")
    assert ": record P" in line


def test_truncated_in_the_gzip_header(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(TWO, mtime=0)[:5])
    assert refusal(path) == f"{path}:1: the gzip file is truncated"


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_damaged_compressed_file(tmp_path: Path, compress) -> None:  # type: ignore[no-untyped-def]
    content = bytearray(compress(many(500)))
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    line = refusal(write(tmp_path, bytes(content)))
    assert "is damaged" in line or "truncated" in line


def test_gzip_with_something_else_behind_it(tmp_path: Path) -> None:
    assert "the gzip data is damaged" in refusal(write(tmp_path, gzip.compress(TWO, mtime=0) + b"MKTAY"))


def test_zstandard_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path, zstandard.compress(TWO))
    line = refusal(path)
    assert line == (f"{path}: is zstandard-compressed, which needs a package: pip install 'proteinbert-fast[zst]'")


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "none.fasta")) == f"{tmp_path}/none.fasta: no such file"
    assert refusal(str(tmp_path)) == f"{tmp_path}: is a directory; name the FASTA files in it"
    with pytest.raises(InputError, match="no FASTA file given"):
        read_fasta([])


def test_duplicates(tmp_path: Path) -> None:
    one = write(tmp_path, b">A\nMKT\n>B\nACD\n>A x\nMKK\n", "one.fasta")
    two = write(tmp_path, b">C\nMKT\n>B\nACDE\n", "two.fasta")
    with pytest.raises(InputError) as error:
        scan_fasta([one, two])
    assert str(error.value) == (
        f"{one}:5: record A: A was already used at {one}:1 (1 more such records); ask for duplicates keep or first"
    )
    kept = scan_fasta([one, two], duplicates="keep")
    assert (kept.lengths.tolist(), kept.dropped.tolist(), kept.n_duplicates) == ([3, 3, 3, 3, 4], [], 2)
    first = scan_fasta([one, two], duplicates="first")
    assert (first.lengths.tolist(), first.dropped.tolist(), first.n_duplicates) == ([3, 3, 3], [2, 4], 2)


def test_ids_that_only_share_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fasta, "hash", lambda text: len(text), raising=False)
    path = write(tmp_path, b">AA\nMKT\n>BB\nACD\n>AA\nMKT\n>CC\nMKT\n")
    assert scan_fasta(path, duplicates="first").dropped.tolist() == [2]


def test_unknown_choices(tmp_path: Path) -> None:
    path = write(tmp_path, TWO)
    with pytest.raises(InputError, match="duplicates must be one of refuse, keep, first, got 'drop'"):
        scan_fasta(path, duplicates="drop")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="lowercase must be one of other, upper, got 'lower'"):
        read_fasta(path, lowercase="lower")  # type: ignore[arg-type]


def notes_of(path: str, **options: str) -> list[str]:
    notes = FastaNotes()
    list(read_fasta(path, notes=notes, **options))  # type: ignore[arg-type]
    assert notes.lines() == scan_fasta(path, **options).notes.lines()  # type: ignore[arg-type]
    return notes.lines()


def test_lower_case_is_kept_and_said_once(tmp_path: Path) -> None:
    path = write(tmp_path, b">A\nMKT\n>B\nMktA\n>C\nmkt\n")
    assert pairs(path) == [("A", b"MKT"), ("B", b"MktA"), ("C", b"mkt")]
    (line,) = notes_of(path)
    assert line.startswith(f"{path}:3: record B and 1 more: lower-case letters are read as unknown residues")
    assert pairs(path, lowercase="upper") == [("A", b"MKT"), ("B", b"MKTA"), ("C", b"MKT")]
    assert notes_of(path, lowercase="upper") == []


def test_stop_at_the_end_is_left_out_and_said_once(tmp_path: Path) -> None:
    path = write(tmp_path, b">A\nMKT*\n>B\nMK*TA**\n>C\nMKT\n*\n")
    assert pairs(path) == [("A", b"MKT"), ("B", b"MK*TA"), ("C", b"MKT")]
    assert notes_of(path) == [
        f"{path}:1: record A and 2 more: the '*' (stop codon) at the end of the sequence was left out",
        f"{path}:3: record B: characters that are no amino acid are read as unknown residues: *",
    ]


def test_other_characters_are_kept_and_said_once(tmp_path: Path) -> None:
    path = write(tmp_path, b">A\nMK-T.\n>B\n1MK?\n>C\nBJOZUX\n")
    assert pairs(path) == [("A", b"MK-T."), ("B", b"1MK?"), ("C", b"BJOZUX")]
    (line,) = notes_of(path)
    assert line.startswith(f"{path}:1: record A and 1 more: characters that are no amino acid are read as unknown")
    assert line.endswith(": - . 1 ?")


@pytest.mark.parametrize("letters", [b"ACGT", b"acgu", b"ACGTN"])
def test_dna_is_said(tmp_path: Path, letters: bytes) -> None:
    path = write(tmp_path, b"".join(b">G%d\n%s\n" % (i, letters * 30) for i in range(1200)))
    line = notes_of(path)[0]
    assert line.startswith(f"{path}: looks like DNA or RNA: 1000 of the first 1000 records")


def test_short_peptides_of_a_c_g_t_are_not_called_dna(tmp_path: Path) -> None:
    assert notes_of(write(tmp_path, b">A\nACGT\n>B\nMKTA\n>C\nGAG\n")) == []


def test_fingerprint_is_of_the_text_not_of_its_compression(tmp_path: Path) -> None:
    plain = scan_fasta(write(tmp_path, TWO, "x"))
    packed = scan_fasta(write(tmp_path, gzip.compress(TWO, mtime=0), "x"))
    assert plain.files == packed.files
    assert plain.files[0]["bytes"] == len(TWO)
    assert scan_fasta(write(tmp_path, TWO + b"A", "x")).files != plain.files


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(n: int) -> int:
        path = write(tmp_path, many(n))
        tracemalloc.start()
        try:
            assert sum(1 for _ in read_fasta(path)) == n
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(10_000), peak(60_000)
    assert large < small * 1.2


def test_one_very_long_line(tmp_path: Path) -> None:
    sequence = b"MKTAYIAKQR" * 300_000
    path = write(tmp_path, b">long\n" + sequence + b"\n>next\nACD")
    assert pairs(path) == [("long", sequence), ("next", b"ACD")]


def test_a_file_that_changes_after_it_was_scanned(tmp_path: Path) -> None:
    path = write(tmp_path, TWO)
    files = scan_fasta(path).files
    assert len(list(read_fasta(path, expected=files))) == 2
    write(tmp_path, TWO.replace(b"ACDEF", b"ACDEG"))
    with pytest.raises(InputError, match="has changed since it was checked"):
        list(read_fasta(path, expected=files))
