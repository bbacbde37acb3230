"""The programs of examples/swissprot, each on a few real proteins."""

import gzip
import hashlib
import importlib
import json
import random
import sys
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from proteinbert_fast import InputError, ProteinBert, ProteinBertConfig, Tokenizer
from proteinbert_fast.pretraining.config import read_config
from proteinbert_fast.pretraining.corruption import corrupt_tokens
from proteinbert_fast.weights import SHIPPED

DATA = Path(__file__).parent / "data"
FOLDER = Path(__file__).parents[1] / "examples" / "swissprot"
OBO = DATA / "corpus" / "go_2013_part.obo.gz"


@pytest.fixture(scope="module")
def programs():
    """The modules by name; they are no package."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    names = ("download", "prepare", "held_out", "probes", "evaluate")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))
    for name in set(names) - before:
        del sys.modules[name]


def write_tables(folder: Path, clusters90: list[tuple[str, str]], clusters50: list[tuple[str, str]]) -> list[str]:
    """The options that name them."""
    for name, rows in (("nr90.tsv", clusters90), ("nr50.tsv", clusters50)):
        (folder / name).write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    return ["--clusters90", str(folder / "nr90.tsv"), "--clusters50", str(folder / "nr50.tsv")]


def sha1_of(text: str) -> int:
    return int(hashlib.sha1(text.encode()).hexdigest(), 16)


class Prepared:
    """30 proteins, two in each 90 % cluster, three of those in each 50 % cluster; and what prepare.py makes of them.

    By their names, the first cluster is for validation and the second for testing.

    The first member of the first cluster is a benchmark's, as is half of the sixth representative's sequence.
    """

    def __init__(self, program: ModuleType, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        lines = (DATA / "swissprot_200.tsv").read_text().splitlines()[:31]
        self.table = folder / "proteins.tsv"
        self.table.write_text("\n".join(lines) + "\n")
        self.ids = [line.split("\t")[0] for line in lines[1:]]
        self.sequences = {line.split("\t")[0]: line.split("\t")[4] for line in lines[1:]}
        self.representatives = self.ids[::2]
        clusters90 = [(self.ids[i // 2 * 2], accession) for i, accession in enumerate(self.ids)]
        named = {k: next(n for i in range(9999) if sha1_of(n := f"R{i}") % 50 == k) for k in (0, 1, 2, 3, 4)}
        self.clusters50 = {a: named[i // 3] for i, a in enumerate(self.representatives)}
        self.options = write_tables(folder, clusters90, [(b, a) for a, b in self.clusters50.items()])
        self.part = self.sequences[self.representatives[5]]
        self.part = self.part[: (len(self.part) - 11) // 2 + 12]  # half of its words, and one for an odd number
        with gzip.open(folder / "a.test.csv.gz", "wt") as file:
            file.write(f"seq,label\n{self.sequences[self.ids[1]]},0\n")
        (folder / "b.valid.csv").write_text(f"label,seq\n007,W{self.part}WWWWW\n1,MKT\n")
        self.command = [str(self.table), *self.options, "--ontology", str(OBO), "--min-count", "2", "-o", str(self.out)]
        benchmarks = ["--benchmarks", str(folder / "a.test.csv.gz"), str(folder / "b.valid.csv")]
        assert program.main([*self.command, *benchmarks]) == 0


@pytest.fixture(scope="module")
def prepared(programs, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    pytest.importorskip("fastobo")
    return Prepared(programs.prepare, tmp_path_factory.mktemp("prepared"))


def test_prepared_corpus(prepared: Prepared):
    from proteinbert_fast.data.corpus import Corpus, verify_corpus

    assert not verify_corpus(prepared.out / "corpus.h5", lambda n: None)
    with Corpus(prepared.out / "corpus.h5") as corpus:
        found = {record.id: record for record in (corpus[i] for i in range(len(corpus)))}
        assert sorted(found) == sorted(prepared.representatives)
        for accession, record in found.items():
            letters = "ACDEFGHIKLMNPQRSTUVWXY?"
            assert "".join(letters[t] for t in record.tokens) == prepared.sequences[accession]
            place = sha1_of(prepared.clusters50[accession]) % 50
            assert record.split == {0: 1, 1: 2}.get(place, 0)
        assert np.bincount(corpus.split).tolist() == [9, 3, 3]
        assert len(corpus.terms) > 10
        assert all(term.count >= 2 for term in corpus.terms)
    hidden = (prepared.out / "hidden_annotations.txt").read_text().split()
    # The whole cluster of the protein with the same sequence, which is no representative itself; of the sixth
    # representative's cluster itself alone, for its words.
    assert hidden == sorted([*prepared.representatives[:3], prepared.representatives[5]])


def test_held_out_rule(programs):
    """Literally the rule of the README, and about one cluster in fifty for each set."""
    sets = [programs.prepare.held_out_set(f"P{i:05d}") for i in range(5000)]
    assert sets[0] == "train"
    assert [f"P{i:05d}" for i in range(150) if sets[i] == "validation"] == [
        f"P{i:05d}" for i in range(150) if sha1_of(f"P{i:05d}") % 50 == 0
    ]
    assert 60 < sets.count("validation") < 140
    assert 60 < sets.count("test") < 140


def test_prepare_again_gives_the_same_bytes(programs, prepared: Prepared, tmp_path: Path, capsys):
    assert programs.prepare.main(prepared.command) == 1
    assert (
        capsys.readouterr().err == f"prepare.py: error: {prepared.out / 'corpus.h5'} exists: --overwrite replaces it\n"
    )
    benchmarks = ["--benchmarks", str(prepared.folder / "b.valid.csv"), str(prepared.folder / "a.test.csv.gz")]
    assert programs.prepare.main([*prepared.command[:-1], str(tmp_path), *benchmarks]) == 0
    for name in ("hidden_annotations.txt", "validation_ids.txt", "test_ids.txt", "proteins.fasta", "annotations.tsv"):
        assert (tmp_path / name).read_bytes() == (prepared.out / name).read_bytes()


def test_sharing_words_is_its_definition(programs, monkeypatch: pytest.MonkeyPatch):
    """Sets of words, compared pair by pair; sequences of pieces of one another, some with unknown residues."""
    monkeypatch.setattr(programs.prepare, "CHUNK", 500)
    rng = random.Random(0)
    base = ["".join(rng.choices("ACDEFGHIKLMNPQRSTVWY", k=150)) for _ in range(6)]

    def made() -> str:
        text = ""
        for _ in range(rng.randint(1, 3)):
            start, source = rng.randrange(140), rng.choice(base)
            text += source[start : start + rng.randint(5, 60)]
        return text[:30] + "X" + text[30:] if rng.random() < 0.3 else text

    sequences, benchmark = [[made() for _ in range(n)] for n in (150, 25)]

    def words(text: str) -> set[str]:
        return {w for i in range(len(text) - 11) if "X" not in (w := text[i : i + 12])}

    wanted = [
        i
        for i, sequence in enumerate(sequences)
        if any(
            (shared := len(words(sequence) & words(other)))
            and 2 * shared >= min(len(words(sequence)), len(words(other)))
            for other in benchmark
        )
    ]
    assert 10 < len(wanted) < 140
    assert programs.prepare.sharing_words(sequences, benchmark) == wanted
    assert programs.prepare.sharing_words(sequences, ["MKT"]) == programs.prepare.sharing_words(sequences, []) == []


HEAD = "accession\tgo_bp\tgo_mf\tgo_cc\tsequence\n"


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("p.tsv", "id\tsequence\n", "p.tsv:1: the columns accession, go_bp, go_mf, go_cc, sequence were expected"),
        ("p.tsv", HEAD, "p.tsv: no proteins"),
        ("p.tsv", HEAD + "A\tMKT\n", "p.tsv:2: 5 columns were expected, the first an accession"),
        ("p.tsv", HEAD + "A\t\t\t\tMKT\nA\t\t\t\tMKT\n", "p.tsv:3: A for the second time"),
        ("p.tsv", HEAD + "A\t\t\t\tMK T\n", "p.tsv:2: the sequence of A is not of capital letters"),
        ("p.tsv", HEAD + "B\t\t\t\tMKT\n", "nr90.tsv: no cluster for B of "),
        ("nr90.tsv", "A A\n", "nr90.tsv:1: representative, a tab, member were expected"),
        ("nr90.tsv", "A\tA\nB\tA\n", "nr90.tsv:2: A is in two clusters"),
        ("nr50.tsv", "", "nr50.tsv: no cluster for A of "),
        ("b.csv", "sequence,label\nMKT,1\n", "b.csv:1: no column seq"),
        ("b.csv", "seq,label\nM1T,1\n", "b.csv: a sequence is not of letters: 'M1T'"),
        ("b.csv", None, "No such file or directory: "),
    ],
)
def test_prepare_refuses(programs, tmp_path: Path, capsys, file: str, text: str | None, line: str):
    options = write_tables(tmp_path, [("A", "A")], [("A", "A")])
    (tmp_path / "p.tsv").write_text(HEAD + "A\t\t\t\tMKT\n")
    if text is not None:
        (tmp_path / file).write_text(text)
    command = [str(tmp_path / "p.tsv"), *options, "--ontology", str(OBO), "-o", str(tmp_path / "out")]
    assert programs.prepare.main([*command, "--benchmarks", str(tmp_path / "b.csv")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: error: ")
    assert error.count("\n") == 1
    assert line in error
    assert not (tmp_path / "out").exists()


def blast_database(folder: Path, proteins: list[tuple[str, str]]) -> None:
    """A BLAST database of version 4, written by its description."""
    code = {letter: i for i, letter in enumerate("-ABCDEFGHIKLMNPQRSTVWXYZU*OJ")}
    headers, residues, header_ends, residue_ends = b"", b"\0", [0], [1]
    for title, sequence in proteins:
        n = len(title)
        length = bytes([n]) if n < 128 else bytes([0x82, n >> 8, n & 255])
        headers += bytes.fromhex("30803080a0801a") + length + title.encode() + bytes(8)
        residues += bytes(code[letter] for letter in sequence) + b"\0"
        header_ends.append(len(headers))
        residue_ends.append(len(residues))

    def number(n: int) -> bytes:
        return n.to_bytes(4, "big")

    index = number(4) + number(1) + number(5) + b"title" + number(8) + b"a  date " + number(len(proteins)) + bytes(8)
    index += number(99) + b"".join(map(number, header_ends)) + b"".join(map(number, residue_ends))
    folder.mkdir(parents=True)
    for suffix, content in (("pin", index), ("phr", headers), ("psq", residues)):
        (folder / f"goasp.fasta.{suffix}").write_bytes(content)


def test_download_reads_the_package(programs, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Three databases with proteins in common, a title of more than 127 bytes; edges and names to an ontology."""
    pytest.importorskip("fastobo")
    from proteinbert_fast.data.gene_ontology import GeneOntology

    own = {"BPO": [("P1|x y", "MKTU"), ("P2|" + "z" * 300, "ACXBZ")], "MFO": [("P1|x y", "MKTU")], "CCO": [("P0", "W")]}
    said = {"BPO": "P1 GO:0000002\n\n", "MFO": "P1 GO:0000004\n", "CCO": ""}

    def unpack(package: Path | None, folder: Path) -> None:
        for aspect, proteins in own.items():
            blast_database(folder / "usr" / "dataset_201401" / aspect, proteins)
            (folder / "usr" / "dataset_201401" / aspect / "goasp_annot.dat").write_text(said[aspect])
        (folder / "goGraph.txt").write_text(
            "GO:0008150\tGO:0000002\t1\tis_a\nGO:0003674\tGO:0000004\t1\tis_a\nGO:0000002\tGO:0000004\t1\tpart_of\n"
            "GO:0000002\tGO:0000004\t1\tregulates\nobsolete_molecular_function\tGO:0000005\t1\tis_a\n"
        )
        names = {"GO:0000002": "two", "GO:0000004": "alpha-{1->4}", "GO:0000005": "gone", "GO:0000009": "nowhere"}
        names |= {"GO:0008150": "biological_process", "GO:0003674": "function", "GO:0005575": "component"}
        (folder / "nameMapping.txt").write_text("".join(f"{a}\t{b}\n" for a, b in names.items()))

    monkeypatch.setattr(programs.download, "unpack", unpack)
    assert programs.download.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}: 3 proteins, 10 residues, 1 with GO terms\n{tmp_path / 'go.obo'}: 5 terms in use, 1 obsolete\n"
    )
    assert (tmp_path / "swissprot_2014.tsv").read_text() == (
        HEAD + "P0\t\t\t\tW\nP1\tGO:0000002\tGO:0000004\t\tMKTU\nP2\t\t\t\tACXBZ\n"
    )
    assert (tmp_path / "swissprot_2014.fasta").read_text() == ">P0\nW\n>P1\nMKTU\n>P2\nACXBZ\n"
    ontology = GeneOntology.read(tmp_path / "go.obo")
    four = ontology.terms[ontology.find("GO:0000004")]
    assert (four.name, four.aspect) == ("alpha-{1->4}", "F")
    assert [ontology.terms[i].id for i in (*four.is_a, *four.part_of)] == ["GO:0003674", "GO:0000002"]
    assert ontology.obsolete == {"GO:0000005"}
    own["CCO"] = [("P1", "OTHER".replace("O", "A").replace("T", "A"))]
    assert programs.download.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "download.py: error: metastudent-data: P1 has two sequences\n"


def test_download_without_a_package(programs, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert programs.download.main([str(tmp_path / "out")]) == 1
    line = "download.py: error: apt-get is not installed: this needs Debian, or a system like it\n"
    assert capsys.readouterr().err == line
    assert list((tmp_path / "out").iterdir()) == []


def test_no_guess_without_neighbours_beats_the_baseline(programs):
    """Its expected loss over pairs of true and shown tokens is below that of any mixture of copy and frequencies."""
    counts = np.random.default_rng(0).integers(1, 10_000, 26)
    counts[25] = 0  # no PAD in a corpus
    p = counts / counts.sum()
    shown = 0.05 / 26 + 0.95 * np.eye(26)  # by true token
    joint = p[:, None] * shown
    tables = {"best": programs.held_out.copying(counts), "frequencies": programs.held_out.unigram(counts)}
    for table in tables.values():
        np.testing.assert_allclose(np.exp(table).sum(1), 1)

    def expected(table: np.ndarray) -> float:
        return -(joint.T * table).sum()

    best = expected(tables["best"])
    for kept in (0.5, 0.9, 0.95, 1 - 0.05 * 25 / 26, 0.97, 0.99):
        assert best < expected(np.log(kept * np.eye(26) + (1 - kept) * (counts + 1) / (counts + 1).sum()))
    assert best < expected(tables["frequencies"])
    assert expected(tables["frequencies"]) == pytest.approx(-(p[:25] * np.log(p[:25])).sum(), abs=1e-3)


@pytest.fixture
def proteins(programs, real_sequences):
    order = np.argsort([len(s) for s in real_sequences])
    sequences = [real_sequences[i] for i in (*order[:3], *order[60:63], *order[170:172], *order[-2:])]
    numbers = np.array([3, 14, 15, 92, 65, 35, 89, 79, 32, 38])
    terms = np.array([0, 2, 1, 3, 5, 0]), np.array([0, 2, 3, 3, 5, 6, 6, 6, 6, 6, 6])
    return programs.held_out.Proteins(numbers, sequences, terms)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_sequence_losses_are_those_of_each_protein_alone(programs, proteins, small_model, monkeypatch, noise):
    monkeypatch.setattr(programs.held_out, "TOKENS_PER_BATCH", 2000)
    table = programs.held_out.copying(np.arange(1, 27))
    told: list[int] = []
    found = programs.held_out.sequence_losses(
        proteins, {"model": small_model}, {"table": table}, 7, torch.no_grad, told.append, noise
    )
    rows = []
    limits = {"128": (0, 128), "512": (128, 512), "1024": (512, 1024), "longer": (1024, 10**9)}
    for number, sequence in zip(proteins.numbers, proteins.sequences, strict=True):
        clean = Tokenizer()([sequence])
        noisy = corrupt_tokens(clean, [number], seed=7, step=0, probability=noise)
        true, shown = clean.unpack(clean.tokens)[0].long(), noisy.unpack(noisy.tokens)[0].long()
        with torch.no_grad():
            logits = noisy.unpack(small_model(noisy).token_logits)[0]
        by_model = torch.nn.functional.cross_entropy(logits, true, reduction="none").double()
        by_table = -torch.from_numpy(table)[shown, true]
        kind = next(name for name, (low, high) in limits.items() if low < len(true) <= high)
        rows.append((kind, by_model, by_table, true != shown))
    assert len({kind for kind, *_ in rows}) >= 3
    assert sum(told) == found["tokens"]["all"] == sum(len(row[1]) for row in rows)
    for kind in ("all", *{row[0] for row in rows}):
        chosen = [row for row in rows if kind in ("all", row[0])]
        wrong = torch.cat([row[3] for row in chosen])
        assert found["proteins"][kind] == len(chosen)
        assert found["corrupted"][kind] == int(wrong.sum())
        for place, name in ((1, "model"), (2, "table")):
            nll = torch.cat([row[place] for row in chosen])
            assert found["losses"][name]["all"][kind] == pytest.approx(nll.mean().item(), rel=1e-5)
            if wrong.any():
                assert found["losses"][name]["corrupted"][kind] == pytest.approx(nll[wrong].mean().item(), rel=1e-5)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_what_the_neighbours_say(programs, noise):
    """With the shown token's evidence taken back, the best guess without neighbours is the frequencies again."""
    counts = np.arange(1, 27)
    shown = torch.arange(26).repeat(3)
    told = torch.from_numpy(programs.held_out.copying(counts, noise)).float()[shown]
    left = programs.held_out.by_neighbours(told, shown, noise)
    expected = torch.from_numpy(programs.held_out.unigram(counts)).float()[shown]
    torch.testing.assert_close(left, expected, atol=1e-5, rtol=1e-5)


def test_tables_that_ignore_the_shown_token_are_left_as_they_are(programs, proteins, small_model):
    unigram, copying = (make(np.arange(1, 27)) for make in (programs.held_out.unigram, programs.held_out.copying))
    tables = {"unigram": unigram, "copying": copying}
    losses = programs.held_out.sequence_losses(proteins, {"m": small_model}, tables, 7, torch.no_grad)["losses"]
    assert losses["unigram"]["by_neighbours"] == losses["unigram"]["corrupted"]
    assert losses["copying"]["by_neighbours"]["all"] == pytest.approx(losses["unigram"]["corrupted"]["all"], rel=1e-4)
    assert losses["copying"]["corrupted"]["all"] > losses["copying"]["by_neighbours"]["all"] + 1


def test_go_scores_are_those_of_each_protein_alone(programs, proteins, small_model):
    scores = programs.held_out.go_scores(proteins, small_model, torch.no_grad)
    for row, sequence in zip(scores, proteins.sequences, strict=True):
        with torch.no_grad():
            alone = small_model(Tokenizer()([sequence])).go_probabilities[0]
        np.testing.assert_array_equal(row, alone.numpy())


def test_neighbours_by_hand(programs, proteins, tmp_path: Path):
    """Protein 14 has hits B (terms 0 1) and C (terms 1 3); the rest none. Query 999 is of a larger sample."""
    training = programs.held_out.Training(
        np.zeros(26, int), np.zeros(4), np.array([2, 0, 1, 1, 3]), np.array([0, 1, 3, 5]), {"B": 1, "C": 2}
    )
    hits = tmp_path / "hits.tsv"
    hits.write_text("14\tB\t0.40\t300\n14\tC\t0.80\t100\n999\tB\t1.0\t50\n")
    scores, n = programs.held_out.neighbour_scores(proteins, training, hits, 4)
    wanted = np.zeros((10, 4))
    wanted[1] = [0.4, 0.8, 0, 0.8]
    np.testing.assert_allclose(scores["identity"], wanted, rtol=1e-6)
    wanted[1] = [0.75, 1, 0, 0.25]
    np.testing.assert_allclose(scores["bit score"], wanted, rtol=1e-6)
    assert n == 1
    for text, line in (
        ("14\tA\t0.4\t300\n", "hits.tsv:1: is no hit"),
        ("14\tB\tx\t1\n", "1: is no"),
        ("14\tB\n", "1: is no"),
    ):
        hits.write_text(text)
        with pytest.raises(InputError, match=line):
            programs.held_out.neighbour_scores(proteins, training, hits, 4)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """40 real proteins, some of them held out."""
    pytest.importorskip("fastobo")
    from proteinbert_fast.data.corpus import build_corpus

    rows = [line.split("\t") for line in (DATA / "swissprot_200.tsv").read_text().splitlines()[1:41]]
    (tmp_path / "p.fasta").write_text("".join(f">{row[0]}\n{row[4]}\n" for row in rows))
    (tmp_path / "terms.tsv").write_text("".join("\t".join(row[:4]) + "\n" for row in rows))
    build_corpus(
        tmp_path / "p.fasta", tmp_path / "corpus.h5", ontology=OBO, annotations=[tmp_path / "terms.tsv"], min_count=2,
        validation=0.3, test=0.1,
    )  # fmt: skip
    return tmp_path / "corpus.h5"


def test_training_counts_leave_out_held_out_and_hidden_proteins(programs, corpus: Path):
    from proteinbert_fast.data.corpus import Corpus

    with Corpus(corpus) as opened:
        records = [opened[i] for i in range(len(opened))]
        train = [record for record in records if record.split == 0]
        hidden = {train[0].id, train[3].id}
        found = programs.held_out.read_training(opened, hidden)
        tells = [record for record in train if record.id not in hidden and len(record.go_indices)]
        assert set(found.numbers) == {record.id for record in tells}
        assert all(records[number].id == name for name, number in found.numbers.items())
        counts = np.bincount(np.concatenate([record.go_indices for record in tells]), minlength=len(opened.terms))
        np.testing.assert_allclose(found.term_frequencies, counts / len(tells), rtol=1e-6)
        tokens = np.bincount(np.concatenate([record.tokens for record in train]), minlength=26)
        tokens[[23, 24]] = len(train)
        np.testing.assert_array_equal(found.token_counts, tokens)
        for i, record in enumerate(records):
            own = found.indices[found.offsets[i] : found.offsets[i + 1]]
            np.testing.assert_array_equal(own, record.go_indices)
        held_out = programs.held_out.read_held_out(opened, "validation", None, 0)
        assert [records[i].split for i in held_out.numbers] == [1] * len(held_out)
        some = programs.held_out.read_held_out(opened, "validation", 3, 0)
        assert len(some) == 3
        assert set(some.numbers) <= set(held_out.numbers)


def save_model(folder: Path, n_terms: int) -> Path:
    config = ProteinBertConfig(n_annotations=n_terms, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        ProteinBert(config).save_pretrained(folder)
    return folder


def test_evaluate(programs, corpus: Path, tmp_path: Path, capsys):
    """The tables of a small model: whole, and with the same numbers the second time."""
    from proteinbert_fast.data.corpus import Corpus

    with Corpus(corpus) as opened:
        n_terms, ids = len(opened.terms), [opened[i].id for i in range(len(opened)) if opened.split[i] == 0]
        number = int(np.flatnonzero(opened.split == 1)[0])
    model = save_model(tmp_path / "model", n_terms)
    hits = tmp_path / "hits.tsv"
    hits.write_text("".join(f"{number}\t{name}\t0.9\t100\n" for name in ids[:2]))
    command = [str(model), str(corpus), "--dtype", "float32", "--device", "cpu", "--hits", str(hits)]
    results = []
    for name in ("a", "b"):
        assert programs.evaluate.main([*command, "-o", str(tmp_path / name)]) == 0
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text()) | {"seconds": 0})
        text = (tmp_path / name / "evaluation.md").read_text()
        assert capsys.readouterr().out == text
    assert results[0] == results[1]
    losses = results[0]["sequence"]["losses"]
    assert list(losses) == ["this model", "untrained model", "best without neighbours", "token frequencies"]
    assert losses["best without neighbours"]["all"]["all"] < 1 < losses["this model"]["all"]["all"]
    assert losses["this model"] != losses["untrained model"]
    assert list(results[0]["go"]["rows"]) == [
        "this model", "similar proteins, by identity", "similar proteins, by bit score", "term frequencies",
    ]  # fmt: skip
    assert results[0]["go"]["proteins_with_hits"] == 1
    assert text.count("| this model |") == 4
    table = [line for line in text.splitlines() if line.startswith("| this model |")]
    assert table[0].split("|")[2].strip() == f"{losses['this model']['all']['all']:.4f}"
    assert "a token is replaced with a probability of 0.05;" in text
    (model / "pretrain.toml").write_text("replace_probability = 0.3\n")
    assert programs.evaluate.main([*command, "-o", str(tmp_path / "noisy")]) == 0
    noisy = json.loads((tmp_path / "noisy" / "evaluation.json").read_text())["sequence"]
    assert noisy["noise"] == 0.3
    assert noisy["corrupted"]["all"] > 3 * results[0]["sequence"]["corrupted"]["all"]
    assert noisy["losses"]["best without neighbours"]["all"] != losses["best without neighbours"]["all"]
    assert "a token is replaced with a probability of 0.3;" in capsys.readouterr().out


def test_the_noise_of_a_models_training_is_found(programs, tmp_path: Path, monkeypatch):
    trained_noise = programs.evaluate.trained_noise
    assert trained_noise("nothing/of/this/name") == 0.05
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": {"replace_probability": 0.2}}))
    assert trained_noise(str(tmp_path / "run" / "model")) == 0.2
    (tmp_path / "run" / "model" / "model.safetensors").touch()
    assert trained_noise(str(tmp_path / "run" / "model" / "model.safetensors")) == 0.2
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert trained_noise(".") == 0.2
    Path("proteinbert").mkdir()
    assert trained_noise("proteinbert") == 0.05
    (tmp_path / "run" / "model" / "pretrain.toml").write_text("replace_probability = 0.1\n")
    assert trained_noise(str(tmp_path / "run" / "model")) == 0.1
    (tmp_path / "run" / "model" / "pretrain.toml").write_text("replace_probability = 0\n")
    assert trained_noise(str(tmp_path / "run" / "model")) == 0.05
    shipped = read_config(SHIPPED["proteinbert-swissprot"] / "pretrain.toml").replace_probability
    assert trained_noise("proteinbert-swissprot") == shipped


@pytest.mark.parametrize("noise", ["0", "1", "nan"])
def test_evaluate_refuses_noise_that_is_no_probability(programs, noise, tmp_path: Path, capsys):
    with pytest.raises(SystemExit, match="2"):
        programs.evaluate.main(["model", "corpus.h5", "-o", str(tmp_path / "out"), "--noise", noise])
    assert "--noise must be between 0 and 1, got" in capsys.readouterr().err


def test_evaluate_refuses_a_model_of_other_terms(programs, corpus: Path, tmp_path: Path, capsys):
    model = save_model(tmp_path / "model", 7)
    assert programs.evaluate.main([str(model), str(corpus), "-o", str(tmp_path / "out"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("evaluate.py: error: the model has 7 annotations, ")
    assert error.count("\n") == 1


def write_benchmark(path: Path, rows: list[tuple[str, str]]) -> None:
    with gzip.open(path, "wt") as file:
        file.write("seq,label\n" + "".join(f"{sequence},{label}\n" for sequence, label in rows))


def test_labels_are_text_and_cut_with_their_sequences(programs, tmp_path: Path):
    task = programs.probes.Task("t", "t", "accuracy", "residue")
    write_benchmark(tmp_path / "t.train.csv.gz", [("MKT", "001"), ("M" * 1500, "0" * 1500)])
    write_benchmark(tmp_path / "t.valid.csv.gz", [("ACD", "000")])
    train, validation, source = programs.probes.read_examples(tmp_path, task)
    assert train.labels == ["001", "0" * 1024]
    assert [len(s) for s in train.sequences] == [3, 1024]
    assert (validation.labels, source) == (["000"], "t.valid.csv.gz")
    write_benchmark(tmp_path / "t.train.csv.gz", [("MKT", "01")])
    with pytest.raises(InputError, match=r"t\.train\.csv\.gz:2: 3 residues, 2 labels"):
        programs.probes.read_examples(tmp_path, task)


def test_a_benchmark_without_validation_file_is_divided_by_its_sequences(programs, tmp_path: Path):
    task = programs.probes.Task("t", "t", "AUC")
    rows = [("".join(word), "1") for word in product("ACDE", repeat=4)]
    write_benchmark(tmp_path / "t.train.csv.gz", rows)
    train, validation, _ = programs.probes.read_examples(tmp_path, task)
    held_out = [s for s, _ in rows if sha1_of(s) % 5 == 0]
    assert validation.sequences == held_out
    assert sorted(train.sequences + held_out) == sorted(s for s, _ in rows)


def test_benchmark_files_that_are_cut_short(programs, tmp_path: Path):
    task = programs.probes.Task("t", "t", "AUC")
    whole = gzip.compress(b"seq,label\n" + b"MKT,1\n" * 5000)
    (tmp_path / "t.train.csv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"t\.train\.csv\.gz: is damaged or cut short: "):
        programs.probes.read_examples(tmp_path, task)


def test_letters_by_hand(programs):
    of_protein = programs.probes.composition(["AACX"], "protein")
    assert of_protein.shape == (1, 21)
    np.testing.assert_allclose(of_protein[0, [0, 1, 2, 20]], [0.5, 0.25, 0, np.log(4)])
    of_residues = programs.probes.composition(["AC", "Y"], "residue").reshape(3, 15, 21)
    assert of_residues.sum(2).min() == of_residues.sum(2).max() == 1
    letters = of_residues.argmax(2)
    assert letters[0].tolist() == [20] * 7 + [0, 1] + [20] * 6
    assert letters[2].tolist() == [20] * 7 + [19] + [20] * 7


def test_probes_find_what_is_linear_and_nothing_in_noise(programs):
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWY"), rng.integers(20, 60))) for _ in range(240)]
    share = np.array([s.count("A") / len(s) for s in sequences])

    def noise(which, per):
        local = np.random.default_rng(len(which))
        return local.normal(size=(len(which) if per == "protein" else sum(map(len, which)), 10))

    labels = {
        "Spearman": [str(x) for x in share],
        "AUC": ["1" if x > np.median(share) else "0" for x in share],
        "accuracy": ["".join("1" if letter in "AC" else "0" for letter in s) for s in sequences],
    }
    for metric, of in labels.items():
        per = "residue" if metric == "accuracy" else "protein"
        task = programs.probes.Task("t", "t", metric, per)
        parts = [programs.probes.Examples(sequences[a:b], of[a:b]) for a, b in ((0, 160), (160, 240))]
        assert programs.probes.probe(task, *parts, programs.probes.composition) > 0.95
        useless = programs.probes.probe(task, *parts, noise)
        assert useless == pytest.approx({"Spearman": 0, "AUC": 0.5, "accuracy": 0.9}[metric], abs=0.2)
    bad = programs.probes.Examples(["MKT", "AAA"], ["x", "0.5"])
    with pytest.raises(InputError, match="t: a label is no number"):
        programs.probes.probe(programs.probes.Task("t", "t", "Spearman"), bad, bad, noise)
    same = programs.probes.Examples(["MKT", "AAA"], ["1", "1"])
    with pytest.raises(InputError, match="t: 2 training examples have one label"):
        programs.probes.probe(programs.probes.Task("t", "t", "AUC"), same, same, noise)
