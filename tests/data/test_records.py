"""UniRef XML, UniProtKB XML and flat files: the same records from every form, and nothing malformed passes."""

import gzip
import random
import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path
from xml.parsers import expat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast._records import RecordReader, close_terms, gather_bytes, gather_ints, hash_texts
from proteinbert_fast.data.corpus.sources import TOKENS, Role, open_source, read_rows
from proteinbert_fast.errors import InputError
from proteinbert_fast.tokenizer import VOCABULARY
from tests.data.conftest import XML_END, XML_HEAD, xml, xml_entry

Record = tuple[str, bytes, list[int], int]  # id, tokens, GO numbers, line
DATA = Path(__file__).parent / "corpus"


def tokens(sequence: str) -> bytes:
    return sequence.encode().translate(TOKENS)


def read(text: bytes, form: str, cuts: tuple[int, ...] = ()) -> list[Record]:
    """Records of a text that comes in pieces."""
    reader = RecordReader(form, "x", TOKENS)  # type: ignore[arg-type]
    found: list[Record] = []
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    for piece, last in [*((piece, False) for piece in pieces), (b"", True)]:
        while True:
            ids, id_offsets, data, data_offsets, go, go_offsets, lines = reader.feed(piece, last)
            piece = b""
            if not len(lines):
                break
            for i, line in enumerate(lines.tolist()):
                found.append(
                    (
                        ids[id_offsets[i] : id_offsets[i + 1]].tobytes().decode(),
                        data[data_offsets[i] : data_offsets[i + 1]].tobytes(),
                        go[go_offsets[i] : go_offsets[i + 1]].tolist(),
                        line,
                    )
                )
    return found


def refusal(text: bytes | str, form: str = "uniref-xml") -> str:
    text = text.encode() if isinstance(text, str) else text
    with pytest.raises(InputError) as whole:
        read(text, form)
    with pytest.raises(InputError) as pieces:
        read(text, form, tuple(range(0, len(text), 7)))
    line = str(whole.value)
    assert "\n" not in line
    # Where text ends matters only to what is said of an unfinished tag.
    assert str(pieces.value) == line
    return line


def test_real_uniref() -> None:
    ((name, sequence, go, line),) = read((DATA / "UniRef50_Q9EPI6.xml").read_bytes(), "uniref-xml")
    assert (name, go, line) == ("UniRef50_Q9EPI6", [48306, 48168, 5737], 3)
    assert len(sequence) == 532
    assert sequence.startswith(tokens("MGAAASRRRALRSEAMSSVAAKVRAARAFGEYLSQSHPENRNGADHLLADAYSGHEGSPEMQ"))
    ((name, sequence, go, _),) = read((DATA / "UniRef90_P99999.xml").read_bytes(), "uniref-xml")
    assert (name, len(sequence), go) == ("UniRef90_P99999", 105, [])


def test_uniprot_says_the_same_as_xml_and_as_text() -> None:
    ((name, sequence, go, line),) = read((DATA / "Q13639.txt").read_bytes(), "uniprot-text")
    ((name2, sequence2, go2, line2),) = read((DATA / "Q13639.xml").read_bytes(), "uniprot-xml")
    assert (name, sequence, sorted(go)) == (name2, sequence2, sorted(go2))
    assert (name, len(sequence), len(go), line, line2) == ("Q13639", 388, 5, 1, 3)
    both = (DATA / "Q13639.txt").read_bytes() + (DATA / "H2CNN8.txt").read_bytes()
    assert [(name, line) for name, _, _, line in read(both, "uniprot-text")] == [
        ("Q13639", 1),
        ("H2CNN8", (DATA / "Q13639.txt").read_bytes().count(b"\n") + 1),
    ]
    assert read(both, "uniprot-text") == read(both.replace(b"\n", b"\r\n"), "uniprot-text")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["UniRef50_Q9EPI6.xml:uniref-xml", "Q13639.xml:uniprot-xml", "Q13639.txt:uniprot-text"]),
    st.lists(st.integers(0, 10**6), max_size=40).map(tuple),
)
def test_pieces_of_any_size(source: str, cuts: tuple[int, ...]) -> None:
    name, form = source.split(":")
    text = (DATA / name).read_bytes()
    assert read(text, form, cuts) == read(text, form)


def test_what_xml_allows() -> None:
    entry = xml_entry("A", "MKT", ("GO:0000001", "GO:12", "GO:0000004"))
    wanted = [("A", tokens("MKT"), [1, -1, 4], 3)]
    assert read(xml(entry).encode(), "uniref-xml") == wanted
    for old, new in [
        ('id="A"', "id = 'A'"),
        ('id="A"', 'id="&#65;"'),
        ('id="A"', 'id="&#x41;"'),
        ("MKT", "M<![CDATA[KT]]>"),
        ("MKT", "M\n KT\n"),
        ("MKT", "M<!-- > -- -->KT".replace(" -- ", " - ")),
        ("<name>", "<?skip > this?><name>"),
        ("&lt;A&gt;", "é &amp; \U0001f9ec"),
        ("&lt;A&gt;", "a > b ]] >"),
        ("</entry>", "</entry  >"),
        ("<representativeMember>", "<representativeMember\t>"),
        (XML_HEAD.splitlines()[0], ""),
        (XML_HEAD.splitlines()[0], "<?xml version='1.0'?>"),
        (XML_HEAD.splitlines()[0], "\ufeff" + XML_HEAD.splitlines()[0]),
        ("http://uniprot.org", "https://uniprot.org"),
        (XML_END, XML_END + " <!-- end --> \n"),
    ]:
        assert old in xml(entry), old
        text = xml(entry).replace(old, new, 1).encode()
        assert read(text, "uniref-xml") == wanted, new
        assert read(text, "uniref-xml", tuple(range(len(text)))) == wanted, new


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("<name>", "", "x:4:19: </name> where </entry> was expected, opened in line 3"),
        ("</entry>", "", "x:15:1: </UniRef90> where </entry> was expected, opened in line 3"),
        (XML_END, "", "x:15:1: the file ends within <UniRef90>, opened in line 2"),
        (XML_END, "</UniRef", "x:15:1: the file ends within a tag"),
        (XML_END, XML_END + XML_END, "x:16:1: </UniRef90> closes nothing"),
        (XML_END, XML_END + "<a/>", "x:16:1: a second root element <a>"),
        (XML_END, XML_END + "more", "x:16:1: text outside of any element: is this XML?"),
        ('id="A"', 'id="A" id="B"', "x:3:15: the attribute id occurs twice"),
        ('id="A"', "id=A", "x:3:11: the value of the attribute id is not in quotes"),
        ('id="A"', "id", "x:3:11: the attribute id has no value"),
        ('id="A"', 'id="A"b="c"', "x:3:14: a malformed tag <entry>"),
        ('id="A"', 'id="<"', "x:3:12: '<' in the value of an attribute"),
        ('id="A"', 'id="', "x:3:22: a malformed tag <entry>"),
        ('id="A"', 'id="&who;"', "x:3:12: the reference &who; is not known"),
        ('id="A"', 'id="&#0;"', "x:3:12: the reference &#0; is no character"),
        ('id="A"', 'name="A"', "x:3:1: an entry without an id"),
        ("&lt;A", "&lt A", "x:4:16: the reference &lt A&gt; is not known"),
        ("&lt;A", "]]>", "x:4:16: ']]>' in text"),
        ("&lt;A", "<!-- a--b -->", "x:4:22: '--' in a comment"),
        ("&lt;A", "< A", "x:4:16: '<' that opens no tag"),
        ("&lt;A", "\x01", "x:4:16: a control character, which XML does not allow"),
        ("&lt;A", "<?xml version='1.0'?>", "x:4:16: an XML declaration that is not at the start"),
        ("UTF-8", "UTF-16", "x:1:1: the encoding UTF-16 is not read: UTF-8 is"),
        (
            "<UniRef90",
            "<!DOCTYPE a []>\n<UniRef90",
            "x:2:1: a document type declaration, which is not read",
        ),
        ("<entry ", "<cluster ", "x:3:1: <cluster> where UniRef XML has <entry>"),
        ("uniprot.org/uniref", "example.org", "x:2:1: the root element <UniRef90> is not that of UniRef XML"),
        ("<UniRef90", "<html", "x:2:1: the root element <html> is not that of UniRef XML"),
        ('length="3"', 'length="4"', "x:9:53: entry A: the sequence has 3 residues where its length says 4"),
        ('length="3"', 'length="x"', "x:9:1: the length x is no number"),
        (">MKT<", "><", "x:9:50: entry A: the sequence is empty"),
        (">MKT<", ">M1T<", "x:9:53: entry A: the sequence has a character that is no letter: '1'"),
        (">MKT<", ">M<b/>T<", "x:9:51: an element within a sequence of entry A"),
        ("representativeMember", "member", "x:14:1: entry A has no representative member"),
    ],
)
def test_refused_with_line_and_column(old: str, new: str, says: str) -> None:
    text = xml(xml_entry("A", "MKT"))
    assert old in text
    count = -1 if old == "representativeMember" else 1
    assert refusal(text.replace(old, new, count)) == says


def test_not_utf8_and_empty() -> None:
    text = xml(xml_entry("A", "MKT")).encode()
    assert refusal(text.replace(b"&lt;A", b"\xff")) == "x:4:16: is not UTF-8 text that XML allows"
    assert refusal(text.replace(b"&lt;A", b"\xed\xa0\x80")) == "x:4:16: is not UTF-8 text that XML allows"
    assert refusal(b"") == "x:1:1: the file holds no XML element"
    assert refusal(b"hello") == "x:1:1: text outside of any element: is this XML?"


def test_depth_is_limited() -> None:
    text = xml(xml_entry("A", "MKT")).replace("<name>", "<a>" * 100 + "<name>")
    assert "nested more than 64 deep" in refusal(text)


FLAT = (
    "ID   A_HUMAN                 Reviewed;           3 AA.\nAC   P1; P2;\nDR   GO; GO:0000001; P:x; IEA:y.\n"
    "SQ   SEQUENCE   3 AA;  300 MW;  0123456789ABCDEF CRC64;\n     MK T\n//\n"
)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            "ID   ",
            "XX   ",
            "x:1: not a UniProtKB entry: 'XX   A_HUMAN",
        ),
        ("AC   P1; P2;\n", "", "x:5: entry: no accession (AC line)"),
        ("SEQUENCE   3", "SEQUENCE   4", "x:6: entry P1: the sequence has 3 residues where its length says 4"),
        ("SEQUENCE   3", "SEQUENCE", "x:4: entry P1: an SQ line without a length"),
        ("     MK T\n", "", "x:5: entry P1: the sequence is empty"),
        ("SQ   ", "XX   ", "x:6: entry P1: no sequence (SQ line)"),
        ("//\n", "", "x:6: the file ends within entry P1"),
        ("//\n", FLAT, "x:6: entry P1: 'ID   A_HUMAN                 Reviewed;  ...' within the sequence"),
        ("SQ   ", "ID   ", "x:4: entry P1 has no end (//) before this line"),
        ("MK T", "MK 1", "x:6: entry P1: the sequence has a character that is no letter: '1'"),
    ],
)
def test_flat_files_refused_with_line(old: str, new: str, says: str) -> None:
    assert read(FLAT.encode(), "uniprot-text") == [("P1", tokens("MKT"), [1], 1)]
    assert refusal(FLAT.replace(old, new, 1), "uniprot-text").startswith(says)


def test_records_before_the_damage_come_first() -> None:
    text = xml(xml_entry("A", "MKT"), xml_entry("B", "ACD")).encode()[:-40]
    reader = RecordReader("uniref-xml", "x", TOKENS)
    assert len(reader.feed(text, True)[6]) == 1
    with pytest.raises(InputError, match="the file ends within"):
        reader.feed(b"", True)


# What another XML parser says of the same text.


def by_expat(text: bytes) -> list[tuple[str, bytes, list[int]]] | None:
    """Records, or None if it is no XML or not UniRef's."""
    parser = expat.ParserCreate()
    try:
        parser.Parse(text, True)
        root = ElementTree.fromstring(text)
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError):
        return None
    space = "{http://uniprot.org/uniref}"
    found = []
    for entry in root.iter(space + "entry"):
        sequence = "".join(e.text or "" for e in entry.findall(f"{space}representativeMember/{space}sequence"))
        numbers = [
            int(value[3:]) if re.fullmatch("GO:[0-9]{7}", value) else -1
            for e in entry.findall(space + "property")
            if e.get("type", "").startswith("GO ")
            for value in [e.get("value", "")]
        ]  # fmt: skip
        residues = "".join(sequence.split())
        found.append((entry.get("id", ""), tokens(residues), numbers))
    return found


PIECES = st.sampled_from(
    ["<", ">", "&", ";", '"', "'", "/", "=", "]]>", "<!--", "-->", "--", "<![CDATA[", "<?", "?>", "&amp;", "&#65;",
     "&#x0;", "é", "\x00", "\x0b", "\r\n", " ", "</entry>", "<entry id='B'>", "<a/>", "<a b='c'/>", "xml", "\ufeff",
     "\ufffe", "A"]
)  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 12), PIECES), min_size=1, max_size=4),
    st.lists(st.integers(0, 2000), max_size=5).map(tuple),
)
def test_nothing_passes_that_expat_refuses(changes: list[tuple[int, int, str]], cuts: tuple[int, ...]) -> None:
    text = xml(xml_entry("A", "MKT", ("GO:0000001",)), xml_entry("C", "ACDEF", ("GO:0000002", "GO:0000003")))
    for at, dropped, new in changes:
        text = text[:at] + new + text[at + dropped :]
    expected = by_expat(text.encode())
    try:
        found = [record[:3] for record in read(text.encode(), "uniref-xml", cuts)]
    except InputError:
        return
    assert found == expected


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["uniref-xml", "uniprot-xml", "uniprot-text"]))
def test_any_bytes_are_read_or_refused(noise: bytes, form: str) -> None:
    head = {"uniref-xml": XML_HEAD.encode(), "uniprot-text": b"ID   "}.get(form, b"")
    for text in (noise, head + noise):
        try:
            read(text, form, (3, 50))
        except InputError as error:
            assert str(error).startswith("x:")  # noqa: PT017


# Many records.


def test_siphash() -> None:
    """The test vectors of its authors: key 00 01 .. 0f, messages 00, 00 01, ..."""
    message = np.arange(64, dtype=np.uint8)
    k0, k1 = 0x0706050403020100, 0x0F0E0D0C0B0A0908
    wanted = {0: 0x726FDB47DD0E0E31, 1: 0x74F839C593DC67FD, 8: 0x93F5F5799A932462, 15: 0xA129CA6149BE45E5}
    for n, value in wanted.items():
        assert hash_texts(message, np.array([0, n]), k0, k1).tolist() == [value]


def test_gather() -> None:
    values, offsets = np.frombuffer(b"aabccc", np.uint8), np.array([0, 2, 3, 3, 6])
    out, out_offsets = gather_bytes(values, offsets, np.array([3, 2, 0, 0]))
    assert (out.tobytes(), out_offsets.tolist()) == (b"cccaaaa", [0, 3, 3, 5, 7])
    with pytest.raises(IndexError):
        gather_ints(values.astype(np.int32), offsets, np.array([4]))
    with pytest.raises(ValueError, match="offsets"):
        gather_bytes(values, np.array([0, 9]), np.array([0]))
    with pytest.raises(ValueError, match="offsets"):
        hash_texts(values, np.array([0, 3, 2]), 0, 0)


def test_close_terms_is_the_union_of_ancestors() -> None:
    draw = random.Random(1)
    n_terms = 200
    above = [sorted({t, *(draw.randrange(t + 1) for _ in range(3))}) for t in range(n_terms)]
    ancestors = np.array([a for each in above for a in each], np.int32)
    ancestor_offsets = np.cumsum([0, *map(len, above)])
    table = np.full(1000, -1, np.int32)
    table[::5] = np.arange(200)
    rows = [[draw.randrange(-1, 1000) for _ in range(draw.randrange(6))] for _ in range(300)]
    record_of = np.sort(np.array([draw.randrange(100) for _ in rows]))
    record_of[::7] = -1
    terms, offsets, own, renamed, lost = close_terms(
        np.array([n for row in rows for n in row], np.int32), np.cumsum([0, *map(len, rows)]), record_of, 100, table,
        np.arange(200) * 5, ancestors, ancestor_offsets,
    )  # fmt: skip
    mine: list[set[int]] = [set() for _ in range(100)]
    missing = []
    for record, row in zip(record_of.tolist(), rows, strict=True):
        for number in row if record >= 0 else []:
            if number >= 0 and number % 5 == 0:
                mine[record].add(number // 5)
            else:
                missing.append(number)
    for i in range(100):
        assert terms[offsets[i] : offsets[i + 1]].tolist() == sorted({a for t in mine[i] for a in above[t]})
    assert own == sum(map(len, mine))
    assert renamed == 0
    assert lost.tolist() == missing


# Files.


@pytest.mark.parametrize("without", ["", "isal.isal_zlib"])
def test_gzip_with_and_without_its_fast_reader(tmp_path: Path, without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if without:
        monkeypatch.setitem(sys.modules, "isal", None)
    path = tmp_path / "x.gz"
    half = gzip.compress(FLAT.encode(), mtime=0)
    path.write_bytes(half + gzip.compress(FLAT.replace("P1;", "Q1;").encode()) + bytes(512))
    batches = list(read_rows(open_source(path, Role.PROTEIN), lambda n: None))
    assert b"".join(batch.ids.tobytes() for batch in batches) == b"P1Q1"
    path.write_bytes(half + b"more")
    with pytest.raises(InputError, match="the gzip data is damaged"):
        list(read_rows(open_source(path, Role.PROTEIN), lambda n: None))


@pytest.mark.parametrize("part", [0.3, 0.9, 0.999])
def test_truncated_gzip_names_file_and_line(tmp_path: Path, part: float) -> None:
    entries = [xml_entry(f"A{i}", "".join(random.Random(i).choices(VOCABULARY, k=300))) for i in range(3000)]
    whole = gzip.compress(xml(*entries).encode())
    path = tmp_path / "uniref.xml.gz"
    path.write_bytes(whole[: int(len(whole) * part)])
    sizes: list[int] = []
    with pytest.raises(InputError) as error:
        sizes.extend(map(len, read_rows(open_source(path, Role.PROTEIN), lambda n: None)))
    found = sum(sizes)
    line = int(str(error.value).removeprefix(f"{path}:").split(":")[0])
    assert "the gzip file is truncated" in str(error.value)
    assert 0 < found < 3000
    assert line == 3 + 12 * (found - 1)
