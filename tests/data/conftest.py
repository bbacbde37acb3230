"""Small real inputs of a corpus, and one that is made up: proteins A..., terms of a diamond."""

from pathlib import Path

import pytest

DATA = Path(__file__).parent

OBO = """format-version: 1.2
ontology: go

[Term]
id: GO:0000001
name: root
namespace: biological_process
alt_id: GO:0000011

[Term]
id: GO:0000002
name: left
namespace: biological_process
is_a: GO:0000001 ! root

[Term]
id: GO:0000003
name: right
namespace: biological_process
relationship: part_of GO:0000001 ! root
relationship: regulates GO:0000002 ! left

[Term]
id: GO:0000004
name: bottom
namespace: molecular_function
is_a: GO:0000002 ! left
relationship: part_of GO:0000003 ! right

[Term]
id: GO:0000005
name: gone
namespace: cellular_component
is_obsolete: true
replaced_by: GO:0000006

[Term]
id: GO:0000006
name: gone too
namespace: cellular_component
is_obsolete: true
replaced_by: GO:0000002

[Term]
id: GO:0000007
name: gone for good
namespace: cellular_component
is_obsolete: true
consider: GO:0000002

[Typedef]
id: part_of
name: part of
"""

XML_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    '<UniRef90 xmlns="http://uniprot.org/uniref" releaseDate="2020-04-22" version="2020_02">\n'
)
XML_END = "</UniRef90>\n"


def xml_entry(name: str, sequence: str | None, terms: tuple[str, ...] = ()) -> str:
    """An entry of UniRef."""
    go = "".join(f'<property type="GO Biological Process" value="{term}"/>\n' for term in terms)
    residues = ""
    if sequence is not None:
        residues = f'<sequence length="{len(sequence)}" checksum="0123456789ABCDEF">{sequence}</sequence>'
    return (
        f'<entry id="{name}" updated="2020-04-22">\n<name>Cluster: &lt;{name}&gt;</name>\n{go}<representativeMember>\n'
        f'<dbReference type="UniProtKB ID" id="{name}_HUMAN">\n<property type="NCBI taxonomy" value="9606"/>\n'
        f"</dbReference>\n{residues}\n</representativeMember>\n"
        f'<member>\n<dbReference type="UniParc ID" id="UPI{name}"/>\n</member>\n</entry>\n'
    )


def xml(*entries: str) -> str:
    return XML_HEAD + "".join(entries) + XML_END


@pytest.fixture
def corpus_data() -> Path:
    return DATA / "corpus"


@pytest.fixture
def obo(tmp_path: Path) -> Path:
    path = tmp_path / "go.obo"
    path.write_text(OBO)
    return path


@pytest.fixture(scope="session")
def real_obo() -> Path:
    return DATA / "corpus" / "go_2013_part.obo.gz"


@pytest.fixture
def real_fasta(tmp_path: Path) -> Path:
    """The first 40 proteins of Swiss-Prot that the ontology's part was made for."""
    rows = (DATA / "swissprot_200.tsv").read_text().splitlines()[1:41]
    path = tmp_path / "swissprot.fasta"
    path.write_text("".join(f">sp|{row.split(chr(9))[0]}|NAME\n{row.split(chr(9))[-1]}\n" for row in rows))
    return path


@pytest.fixture
def real_terms(tmp_path: Path) -> Path:
    """Their GO terms."""
    lines = (DATA / "swissprot_200.tsv").read_text().splitlines()[:41]
    path = tmp_path / "terms.tsv"
    path.write_text("".join("\t".join(line.split("\t")[:4]) + "\n" for line in lines))
    return path
