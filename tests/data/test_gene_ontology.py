"""The Gene Ontology: terms, ancestors, ids that are no longer in use, and one clear line for what is refused."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteinbert_fast.data.gene_ontology import OBSOLETE, UNKNOWN, GeneOntology
from proteinbert_fast.errors import InputError

fastobo = pytest.importorskip("fastobo")


def ancestors_of(ontology: GeneOntology, go_id: str, relations: str = "part_of") -> set[str]:
    indices, offsets = ontology.ancestors(relations)  # type: ignore[arg-type]
    i = ontology.find(go_id)
    mine = indices[offsets[i] : offsets[i + 1]]
    assert (np.diff(mine) > 0).all()
    return {ontology.terms[k].id for k in mine}


def read(folder: Path, text: str | bytes) -> GeneOntology:
    path = folder / "x.obo"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return GeneOntology.read(path)


def refusal(folder: Path, text: str | bytes) -> str:
    with pytest.raises(InputError) as error:
        read(folder, text)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{folder}/x.obo")
    return line.removeprefix(f"{folder}/x.obo")


def test_terms_ascend_and_know_their_parents(obo: Path) -> None:
    ontology = GeneOntology.read(obo)
    assert [(term.id, term.name, term.aspect) for term in ontology] == [
        ("GO:0000001", "root", "P"),
        ("GO:0000002", "left", "P"),
        ("GO:0000003", "right", "P"),
        ("GO:0000004", "bottom", "F"),
    ]
    assert ontology.terms[3].is_a == (1,)
    assert ontology.terms[3].part_of == (2,)


def test_ancestors_by_relation(obo: Path) -> None:
    ontology = GeneOntology.read(obo)
    every = {"GO:0000001", "GO:0000002", "GO:0000003", "GO:0000004"}
    assert ancestors_of(ontology, "GO:0000004") == every
    assert ancestors_of(ontology, "GO:0000004", "is_a") == {"GO:0000001", "GO:0000002", "GO:0000004"}
    assert ancestors_of(ontology, "GO:0000004", "none") == {"GO:0000004"}
    # What regulates a process is no part of it.
    assert ancestors_of(ontology, "GO:0000003") == {"GO:0000001", "GO:0000003"}


def test_ids_that_are_no_longer_in_use(obo: Path) -> None:
    ontology = GeneOntology.read(obo)
    assert ontology.find("GO:0000011") == 0  # alternative
    assert ontology.find("GO:0000005") == 1  # replaced by what was replaced itself
    assert ontology.find("GO:0000007") == OBSOLETE
    assert ontology.find("GO:0000099") == UNKNOWN
    table = ontology.index_of_number
    assert table[[1, 5, 7, 11, 99]].tolist() == [0, 1, OBSOLETE, 0, UNKNOWN]


def test_real_ontology(real_obo: Path) -> None:
    ontology = GeneOntology.read(real_obo)
    assert len(ontology) > 500
    cytoplasm = ontology.terms[ontology.find("GO:0005737")]
    assert (cytoplasm.name, cytoplasm.aspect) == ("cytoplasm", "C")
    assert ancestors_of(ontology, "GO:0005737") == {
        "GO:0005737", "GO:0044424", "GO:0044464", "GO:0005623", "GO:0005622", "GO:0005575",
    }  # fmt: skip
    # The cytoplasm is part of the intracellular, and that is what is_a alone does not see.
    assert "GO:0005622" not in ancestors_of(ontology, "GO:0005737", "is_a")
    assert ontology.obsolete
    assert any(i not in ontology.obsolete for i in ontology.synonyms)
    ids = [term.id for term in ontology]
    assert ids == sorted(ids)


def test_obo_1_4(tmp_path: Path) -> None:
    ontology = read(
        tmp_path,
        """format-version: 1.4
data-version: releases/2023-01-01
ontology: go
property_value: terms:license http://creativecommons.org/licenses/by/4.0/

[Term]
id: CHEBI:15377
name: water

[Term]
id: GO:0000001
name: one \\{1\\}
namespace: cellular_component
def: "A thing." [GOC:x] {source="y"}
xref: Wikipedia:One "one"
property_value: skos:exactMatch "x" xsd:string

[Term]
id: GO:0000002
name: two
namespace: cellular_component
is_a: GO:0000001 {gci_relation="part_of", gci_filler="NCBITaxon:2"} ! one
is_a: CHEBI:15377 ! water
intersection_of: GO:0000001 ! one
intersection_of: BFO:0000050 GO:0000001 ! one
relationship: BFO:0000050 GO:0000001 {source="z"} ! one
created_by: someone
creation_date: 2009-04-28T10:29:11Z

[Typedef]
id: BFO:0000050
name: part of
xref: BFO:0000050
is_transitive: true
""",
    )
    assert len(ontology) == 2
    assert ontology.terms[1].is_a == (0,)


HEAD = "format-version: 1.2\n\n"


def term(number: int, *lines: str) -> str:
    return "\n".join([f"[Term]\nid: GO:{number:07d}", f"name: term {number}", *lines]) + "\n\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ": is empty"),
        (" \n", ": is empty"),
        (HEAD, ": no GO term is defined in it"),
        ("hello\n", ":1: is not OBO: expected HeaderClause"),
        (HEAD + "[Term]\nid: GO:0000001\nname x\n", ":5: is not OBO: expected"),
        (HEAD.encode() + b"[Term]\nid: GO:0000001\nname: \xff\n", ":5: is not UTF-8 text"),
        (HEAD + term(1) + term(1), ":8: GO:0000001 is defined twice"),
        (HEAD + term(1, "is_a: GO:0000002"), ":4: GO:0000001 is_a GO:0000002, which is not defined in the file"),
        (
            HEAD + term(2) + term(1, "relationship: part_of GO:0000009"),
            ":8: GO:0000001 part_of GO:0000009, which is not defined in the file",
        ),
        (
            HEAD + term(1, "is_a: GO:0000002") + term(2, "is_obsolete: true"),
            ":4: GO:0000001 is_a GO:0000002, which is obsolete",
        ),
        (HEAD + term(1, "is_a: GO:0000001"), ":4: GO:0000001 is its own ancestor: GO:0000001 -> GO:0000001"),
        (
            HEAD + term(4, "is_a: GO:0000003") + term(3, "is_a: GO:0000002")
            + term(2, "relationship: part_of GO:0000003"),
            ":14: GO:0000002 is its own ancestor: GO:0000002 -> GO:0000003 -> GO:0000002",
        ),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, text: str | bytes, says: str) -> None:
    assert refusal(tmp_path, text).startswith(says)


def test_comments_within_a_term(tmp_path: Path) -> None:
    ontology = read(
        tmp_path, "! x\n" + HEAD + "! one\n" + term(1, "! two", " ! three", "is_a: GO:0000002 ! four") + term(2)
    )
    assert ontology.terms[0].is_a == (1,)


def test_truncated_gzip(tmp_path: Path, real_obo: Path) -> None:
    path = tmp_path / "x.obo"
    path.write_bytes(real_obo.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"x\.obo:\d+: the gzip file is truncated"):
        GeneOntology.read(path)


def test_missing_file_and_missing_package(tmp_path: Path, obo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no such file"):
        GeneOntology.read(tmp_path / "none.obo")
    monkeypatch.setitem(__import__("sys").modules, "fastobo", None)
    with pytest.raises(InputError, match=r"go\.obo: reading OBO files needs a package: pip install"):
        GeneOntology.read(obo)


SNIPPETS = st.sampled_from(
    ["[Term]\n", "id: GO:0000002\n", "is_a: GO:0000004\n", "is_a: ", "relationship: part_of GO:0000004\n", "\n", "!",
     '"', "{", "}", "[", "]", "\\", "\x00", "é", "is_obsolete: true\n", "alt_id: GO:0000003\n", "GO:", ": ", "name"]
)  # fmt: skip


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 30), SNIPPETS), min_size=1, max_size=4))
def test_any_text_is_read_or_refused(tmp_path: Path, obo: Path, changes: list[tuple[int, int, str]]) -> None:
    text = obo.read_text()
    for at, dropped, new in changes:
        text = text[:at] + new + text[at + dropped :]
    try:
        ontology = read(tmp_path, text)
    except InputError:
        return
    indices, offsets = ontology.ancestors()
    for i in range(len(ontology)):
        mine = set(indices[offsets[i] : offsets[i + 1]].tolist())
        assert i in mine
        for parent in ontology.terms[i].is_a + ontology.terms[i].part_of:
            assert set(indices[offsets[parent] : offsets[parent + 1]].tolist()) <= mine


def test_compressed_is_the_same(tmp_path: Path, obo: Path) -> None:
    path = tmp_path / "go.obo.gz"
    path.write_bytes(gzip.compress(obo.read_bytes(), mtime=0))
    assert GeneOntology.read(path).terms == GeneOntology.read(obo).terms
