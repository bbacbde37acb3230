"""Corpus: UniRef XML to a dataset for pretraining, beside the original's route on the same file.

The original's route, written again without its package: lxml's iterparse with XPath expressions for each entry, rows
of JSON in SQLite, then a dataset of text and of a boolean for each protein and term. What is not of its essence is
taken from the faster side: rows go to SQLite without pandas, sequences come from the XML itself and not from a second
file, and masks are written many at a time.
"""

import gzip
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.setup import OURS, Setup
from proteinbert_fast.data.corpus import Corpus, build_corpus
from proteinbert_fast.errors import InputError
from proteinbert_fast.tokenizer import VOCABULARY

TABLE = "UniRef XML to a dataset"
MIN_COUNT = 5
_MEMBERS = 3  # of a cluster besides its representative, about as in UniRef90
_TERMS = 3000
_CATEGORIES = ("GO Molecular Function", "GO Biological Process", "GO Cellular Component")
_NAMESPACE = "{http://uniprot.org/uniref}"
_SPACES = {"u": "http://uniprot.org/uniref"}

Content = dict[str, tuple[str, frozenset[str]]]  # residues and terms of each id


@dataclass(frozen=True)
class _Input:
    """Files, and what is in them.

    Attributes:
        xml: gzip-compressed UniRef XML.
        obo: an ontology.
        content: of each entry: its residues and own terms.
        ancestors: of each term, itself included.
    """

    xml: Path
    obo: Path
    content: Content
    ancestors: dict[str, frozenset[str]]

    def expected(self, with_ancestors: bool) -> Content:
        """What a dataset must hold: terms of at least MIN_COUNT proteins."""
        closed = {
            name: (sequence, frozenset().union(*(self.ancestors[t] for t in terms)) if with_ancestors else terms)
            for name, (sequence, terms) in self.content.items()
        }
        counts = Counter(term for _, terms in closed.values() for term in terms)
        return {
            name: (sequence, frozenset(t for t in terms if counts[t] >= MIN_COUNT))
            for name, (sequence, terms) in closed.items()
        }


def cases(setup: Setup) -> list[Case]:
    """Ours without and with ancestors, and the original's route."""

    @cache
    def data() -> _Input:
        return make_input(setup)

    def work() -> Work:
        n = setup.settings.corpus_entries
        lengths = [len(protein.sequence) for protein in setup.proteins]
        residues = sum(lengths[i % len(lengths)] for i in range(n))
        return Work(proteins=n, residues=residues)

    def ours(ancestors: Any) -> Ready[Path]:
        files = data()
        output = setup.folder / f"corpus-{ancestors}.h5"
        try:
            build(files, output, ancestors)
        except InputError as error:
            raise Unavailable(str(error)) from error
        expected = files.expected(ancestors != "none")
        return Ready(lambda: build(files, output, ancestors), lambda path: _check(_corpus(path), expected))

    def original() -> Ready[Path]:
        try:
            from lxml import etree
        except ImportError as error:
            raise Unavailable("lxml is not installed") from error
        files = data()
        # The original drops the term whose index is 0; the ontology's first term is used by no protein, so that the
        # results can be compared.
        expected = files.expected(False)
        return Ready(
            lambda: _original(files, setup.folder, etree),
            lambda path: _check(_dense(path), expected),
            "without pandas, sequences from the XML",
        )

    def case(name: str, what: str, owner: str, prepare: Callable[[], Ready[Any]]) -> Case:
        return Case(TABLE, name, what, owner, owner == OURS, work(), "residues/s", prepare)

    return [
        case("ours", "build_corpus(ancestors='none')", OURS, lambda: ours("none")),
        case("ours, with ancestors", "build_corpus()", OURS, lambda: ours("part_of")),
        case("original's route", "lxml iterparse, XPath, JSON in SQLite, dense masks", _lxml(), original),
        *machine.probes(setup.settings, "copy"),
    ]


def _lxml() -> str:
    from importlib import metadata

    try:
        return f"lxml {metadata.version('lxml')}"
    except metadata.PackageNotFoundError:
        return "lxml"


def build(files: _Input, output: Path, ancestors: Any) -> Path:
    build_corpus(
        files.xml, output, ontology=files.obo, ancestors=ancestors, min_count=MIN_COUNT, overwrite=True, progress=False
    )
    return output


def _original(files: _Input, folder: Path, etree: Any) -> Path:
    """The original's route."""
    index_of = _terms_of_obo(files.obo)
    database, output = folder / "original.db", folder / "original.h5"
    for path in (database, output):
        path.unlink(missing_ok=True)
    counts: Counter[int] = Counter()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE proteins (name TEXT, tax_id REAL, terms TEXT, flat TEXT, indices TEXT, seq TEXT)")
    rows: list[tuple[Any, ...]] = []

    def save() -> None:
        connection.executemany("INSERT INTO proteins VALUES (?, ?, ?, ?, ?, ?)", rows)
        connection.commit()
        rows.clear()

    with gzip.open(files.xml, "rb") as stream:
        for _, entry in etree.iterparse(stream, tag=_NAMESPACE + "entry", events=("end",)):
            (member,) = entry.xpath("u:representativeMember", namespaces=_SPACES)
            (reference,) = member.xpath("u:dbReference", namespaces=_SPACES)
            (taxon,) = reference.xpath('u:property[@type="NCBI taxonomy"]', namespaces=_SPACES)
            terms = {
                category: list(
                    {p.attrib["value"] for p in entry.xpath(f'u:property[@type="{category}"]', namespaces=_SPACES)}
                )
                for category in _CATEGORIES
            }
            flat = sorted(set().union(*terms.values()))
            indices = sorted(filter(None, map(index_of.get, flat)))
            counts.update(indices)
            (sequence,) = member.xpath("u:sequence", namespaces=_SPACES)
            rows.append(
                (
                    entry.attrib["id"],
                    int(taxon.attrib["value"]),
                    json.dumps(terms),
                    json.dumps(flat),
                    json.dumps(indices),
                    sequence.text,
                )
            )
            if len(rows) >= 100_000:
                save()
            entry.clear()
            for ancestor in entry.xpath("ancestor-or-self::*"):
                while ancestor.getprevious() is not None:
                    del ancestor.getparent()[0]
    save()
    kept = sorted(index for index, times in counts.items() if times >= MIN_COUNT)
    column_of = {index: column for column, index in enumerate(kept)}
    id_of = {index: term for term, index in index_of.items()}
    (n,) = connection.execute("SELECT COUNT(*) FROM proteins").fetchone()
    with h5py.File(output, "w") as file:
        text = h5py.string_dtype()
        file.create_dataset("included_annotations", data=[id_of[index] for index in kept], dtype=text)
        names = file.create_dataset("uniprot_ids", (n,), text)
        sequences = file.create_dataset("seqs", (n,), text)
        lengths = file.create_dataset("seq_lengths", (n,), np.int32)
        masks = file.create_dataset("annotation_masks", (n, len(kept)), bool)
        order = list(range(1, n + 1))
        random.Random(0).shuffle(order)
        for first in range(0, n, 10_000):
            chunk = order[first : first + 10_000]
            marks = ",".join("?" * len(chunk))
            found = connection.execute(f"SELECT name, indices, seq FROM proteins WHERE rowid IN ({marks})", chunk)
            part = found.fetchall()
            stop = first + len(part)
            names[first:stop] = [name for name, _, _ in part]
            sequences[first:stop] = [sequence for _, _, sequence in part]
            lengths[first:stop] = [len(sequence) for _, _, sequence in part]
            mask = np.zeros((len(part), len(kept)), bool)
            for row, (_, indices, _) in enumerate(part):
                mask[row, [column_of[i] for i in json.loads(indices) if i in column_of]] = True
            masks[first:stop] = mask
    connection.close()
    return output


def _terms_of_obo(path: Path) -> dict[str, int]:
    ids = [line[4:] for line in path.read_text().splitlines() if line.startswith("id: ")]
    return {term: index for index, term in enumerate(ids)}


def _corpus(path: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    with Corpus(path) as corpus:
        terms = [term.id for term in corpus.terms]
        letters = VOCABULARY.encode().ljust(256, b"?")
        for part in corpus.slices():
            residues = part.tokens.tobytes().translate(letters).decode()
            for i, name in enumerate(part.ids.tolist()):
                own = part.go_indices[part.go_offsets[i] : part.go_offsets[i + 1]].tolist()
                sequence = residues[part.offsets[i] : part.offsets[i + 1]]
                yield name.decode(), sequence, frozenset(terms[k] for k in own)


def _dense(path: Path) -> Iterator[tuple[str, str, frozenset[str]]]:
    with h5py.File(path) as file:
        terms = list(file["included_annotations"].asstr())
        masks = file["annotation_masks"]
        for i, (name, residues) in enumerate(zip(file["uniprot_ids"].asstr(), file["seqs"].asstr(), strict=True)):
            yield name, residues, frozenset(terms[k] for k in np.flatnonzero(masks[i]))


def _check(found: Iterator[tuple[str, str, frozenset[str]]], expected: Content) -> Check:
    seen = 0
    for name, residues, terms in found:
        if expected.get(name) != (residues, terms):
            return Check(False, f"{name} has other residues or terms")
        seen += 1
    return Check(seen == len(expected), f"{seen:,} proteins and their terms equal")


def make_input(setup: Setup) -> _Input:
    """The sample's proteins as entries of UniRef XML, over and over, with terms of an ontology that is made up."""
    draw = random.Random(0)
    ids = [f"GO:{i:07d}" for i in range(1, _TERMS + 1)]
    ancestors: dict[str, frozenset[str]] = {}
    frames = ["format-version: 1.2\nontology: go\n"]
    for i, term in enumerate(ids):
        parents = sorted({ids[draw.randrange(1, i)] for _ in range(2)}) if i > 1 else []
        ancestors[term] = frozenset({term}).union(*(ancestors[parent] for parent in parents))
        lines = [f"is_a: {parent}" for parent in parents]
        frames.append(
            "\n".join(["[Term]", f"id: {term}", f"name: term {i}", "namespace: molecular_function", *lines, ""])
        )
    obo = setup.folder / "corpus.obo"
    obo.write_text("\n".join(frames))
    content: Content = {}
    xml = setup.folder / "corpus.xml.gz"
    with gzip.open(xml, "wt", compresslevel=6) as stream:
        stream.write('<?xml version="1.0" encoding="UTF-8" ?>\n')
        stream.write('<UniRef90 xmlns="http://uniprot.org/uniref" releaseDate="2020-04-22" version="2020_02">\n')
        for i in range(setup.settings.corpus_entries):
            residues = setup.proteins[i % len(setup.proteins)].sequence.decode()
            known = "".join(letter for letter in residues if letter in VOCABULARY)
            terms = [ids[min(int(draw.expovariate(1 / 300)) + 1, _TERMS - 1)] for _ in range(draw.choice((0, 0, 3, 6)))]
            name = f"UniRef90_A{i:07d}"
            content[name] = (known, frozenset(terms))
            stream.write(_entry(name, known, terms, draw))
        stream.write("</UniRef90>\n")
    return _Input(xml, obo, content, ancestors)


def _entry(name: str, residues: str, terms: list[str], draw: random.Random) -> str:
    """An entry as UniRef writes it."""
    go = "".join(f'<property type="{draw.choice(_CATEGORIES)}" value="{term}"/>\n' for term in dict.fromkeys(terms))

    def reference(i: int) -> str:
        accession = f"A0A{draw.randrange(36**7):07X}"
        return (
            f'<dbReference type="UniProtKB ID" id="{accession}_{i}">\n'
            f'<property type="UniProtKB accession" value="{accession}"/>\n'
            f'<property type="UniParc ID" value="UPI{draw.randrange(16**10):010X}"/>\n'
            f'<property type="UniRef100 ID" value="UniRef100_{accession}"/>\n'
            f'<property type="UniRef50 ID" value="UniRef50_{accession}"/>\n'
            '<property type="protein name" value="Nuclear localization sequence binding protein"/>\n'
            f'<property type="source organism" value="Organism {draw.randrange(10**5)} (strain {i})"/>\n'
            f'<property type="NCBI taxonomy" value="{draw.randrange(1, 10**6)}"/>\n'
            f'<property type="length" value="{len(residues)}"/>\n'
            "</dbReference>\n"
        )

    members = "".join(f"<member>\n{reference(i)}</member>\n" for i in range(_MEMBERS))
    return (
        f'<entry id="{name}" updated="2020-04-22">\n'
        "<name>Cluster: Nuclear localization sequence binding protein</name>\n"
        f'<property type="member count" value="{_MEMBERS + 1}"/>\n<property type="common taxon" value="Bacteria"/>\n'
        f'<property type="common taxon ID" value="2"/>\n{go}<representativeMember>\n{reference(_MEMBERS)}'
        f'<sequence length="{len(residues)}" checksum="0000000000000000">{residues}</sequence>\n'
        f"</representativeMember>\n{members}</entry>\n"
    )
