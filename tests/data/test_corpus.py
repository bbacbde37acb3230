"""Corpora: the same proteins, terms and sets from every kind of input, and nothing damaged is taken for whole."""

import gzip
import hashlib
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from proteinbert_fast._tokenizer import OTHER, VOCABULARY
from proteinbert_fast.data.corpus import Corpus, build_corpus, layout, runs, verify_corpus, write_dense
from proteinbert_fast.data.corpus import build as building
from proteinbert_fast.data.gene_ontology import GeneOntology
from proteinbert_fast.errors import InputError, ProteinBertError
from tests.data.conftest import xml, xml_entry

pytest.importorskip("fastobo")

Content = dict[str, tuple[str, set[str]]]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def content(path: Path) -> Content:
    """Residues ("?" for unknown ones) and terms of each protein."""
    with Corpus(path) as corpus:
        names = VOCABULARY + "?"
        found = {}
        for i in range(len(corpus)):
            record = corpus[i]
            residues = "".join(names[token] for token in record.tokens.tolist())
            found[record.id] = (residues, {corpus.terms[k].id for k in record.go_indices.tolist()})
        assert len(found) == len(corpus)
        return found


def splits(path: Path) -> dict[str, int]:
    with Corpus(path) as corpus:
        return {corpus[i].id: corpus[i].split for i in range(len(corpus))}


@pytest.fixture
def entries(tmp_path: Path) -> Path:
    """Four entries of UniRef XML."""
    text = xml(
        xml_entry("A", "MKTAY", ("GO:0000004",)),
        xml_entry("B", "ACDBZ", ("GO:0000003", "GO:0000005", "GO:0000007", "GO:0000099", "GO:0000099", "GO:x")),
        xml_entry("C", "WWW"),
        xml_entry("D", "MKTAYIAKQR", ("GO:0000011", "GO:0000002")),
    )
    return write(tmp_path / "uniref.xml", text)


ONE, TWO, THREE, FOUR = (f"GO:000000{i}" for i in range(1, 5))


def test_uniref_xml(entries: Path, obo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    built = build_corpus(entries, out, ontology=obo, min_count=1)
    assert content(out) == {
        "A": ("MKTAY", {ONE, TWO, THREE, FOUR}),
        "B": ("ACD??", {ONE, TWO, THREE}),
        "C": ("WWW", set()),
        "D": ("MKTAYIAKQR", {ONE, TWO}),
    }
    report = built.report
    assert report["records"] == 4
    assert report["residues"] == 23
    assert report["unknown_residues"] == 2
    assert report["lengths"] == {
        "min": 3, "max": 10, "mean": 5.75, "p5": 3, "p25": 3, "p50": 5, "p75": 5, "p95": 10,
    }  # fmt: skip
    go = report["go"]
    assert go["unknown_ids"] == {"ids": 1, "annotations": 2, "counts": {"GO:0000099": 2}}
    assert go["obsolete_ids"] == {"ids": 1, "annotations": 1, "counts": {"GO:0000007": 1}}
    assert (go["malformed_ids"], go["annotations_renamed"]) == (1, 2)
    assert (go["terms"], go["records_with_terms"], go["annotations"], go["annotations_given"]) == (4, 3, 9, 5)
    assert go["terms_by_aspect"] == {"F": 1, "P": 3}
    assert verify_corpus(out) == []
    assert not (tmp_path / "out.h5.partial").exists()
    with Corpus(out) as corpus:
        assert [(t.id, t.name, t.aspect, t.count) for t in corpus.terms] == [
            (ONE, "root", "P", 3), (TWO, "left", "P", 3), (THREE, "right", "P", 2), (FOUR, "bottom", "F", 1),
        ]  # fmt: skip
        assert corpus.report == report
        assert corpus.fingerprint == built.fingerprint


def test_ancestors_and_counts_by_choice(entries: Path, obo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    build_corpus(entries, out, ontology=obo, min_count=1, ancestors="is_a")
    assert content(out)["A"][1] == {ONE, TWO, FOUR}
    build_corpus(entries, out, ontology=obo, min_count=1, ancestors="none", overwrite=True)
    assert {name: terms for name, (_, terms) in content(out).items()} == {
        "A": {FOUR}, "B": {TWO, THREE}, "C": set(), "D": {ONE, TWO},
    }  # fmt: skip
    report = build_corpus(entries, out, ontology=obo, min_count=3, overwrite=True).report
    assert {name: terms for name, (_, terms) in content(out).items()} == {
        "A": {ONE, TWO}, "B": {ONE, TWO}, "C": set(), "D": {ONE, TWO},
    }  # fmt: skip
    assert (report["go"]["terms"], report["go"]["terms_below_min_count"]) == (2, 2)
    report = build_corpus(entries, out, ontology=obo, min_count=100, overwrite=True).report
    assert (report["go"]["terms"], report["go"]["annotations"]) == (0, 0)
    assert verify_corpus(out) == []


def test_without_ontology(entries: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = build_corpus(entries, tmp_path / "out.h5").report
    assert caplog.messages == ["9 GO terms of the input are left out: no ontology was given"]
    assert "go" not in report
    assert content(tmp_path / "out.h5")["D"] == ("MKTAYIAKQR", set())
    assert verify_corpus(tmp_path / "out.h5") == []


def test_real_uniref_and_uniprot(corpus_data: Path, real_obo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    names = ("UniRef50_Q9EPI6.xml", "UniRef90_P99999.xml", "UniRef100_Q9EPI6.xml", "Q13639.xml", "H2CNN8.txt")
    build_corpus([corpus_data / name for name in names], out, ontology=real_obo, min_count=1, ancestors="none")
    found = content(out)
    assert found["UniRef50_Q9EPI6"][1] == {"GO:0048306", "GO:0048168", "GO:0005737"}
    assert found["UniRef50_Q9EPI6"][0] == found["UniRef100_Q9EPI6"][0]
    assert {name: len(residues) for name, (residues, _) in found.items()} == {
        "UniRef50_Q9EPI6": 532, "UniRef90_P99999": 105, "UniRef100_Q9EPI6": 532, "Q13639": 388, "H2CNN8": 196,
    }  # fmt: skip


def test_fasta_with_a_table_is_the_closure_of_every_protein(
    real_fasta: Path, real_terms: Path, real_obo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.h5"
    report = build_corpus(real_fasta, out, ontology=real_obo, annotations=[real_terms], min_count=2).report
    ontology = GeneOntology.read(real_obo)
    ancestors, offsets = ontology.ancestors()
    expected: Content = {}
    for line in (Path(__file__).parent / "swissprot_200.tsv").read_text().splitlines()[1:41]:
        name, *columns, sequence = line.split("\t")
        terms = set()
        for go_id in ";".join(columns).split(";"):
            i = ontology.find(go_id)
            if i >= 0:
                terms |= {ontology.terms[k].id for k in ancestors[offsets[i] : offsets[i + 1]].tolist()}
        expected[name] = (sequence, terms)
    count = {term.id: sum(term.id in terms for _, terms in expected.values()) for term in ontology}
    expected = {name: (s, {t for t in terms if count[t] >= 2}) for name, (s, terms) in expected.items()}
    assert content(out) == expected
    assert report["records"] == 40
    assert report["ids_without_protein"]["annotations"] == 0
    with Corpus(out) as corpus:
        assert all(term.count == count[term.id] >= 2 for term in corpus.terms)


def test_gaf(obo: Path, tmp_path: Path) -> None:
    def line(name: str, qualifier: str, go_id: str) -> str:
        return "\t".join(["UniProtKB", name, "SYM", qualifier, go_id, "PMID:1", "IEA", "", "P", "", "", "protein",
                          "taxon:9606", "20200101", "UniProt", "", ""]) + "\n"  # fmt: skip

    fasta = write(tmp_path / "x.fasta", ">sp|P1|A_HUMAN text\nMKT\n>P2\nACD\n")
    gaf = write(
        tmp_path / "x.gaf",
        "!gaf-version: 2.2\n" + line("P1", "involved_in", FOUR) + line("P1", "NOT|involved_in", THREE)
        + line("P1", "involved_in", "GO:0000077") + line("P3", "", ONE) + line("P3", "", TWO),
    )  # fmt: skip
    out = tmp_path / "out.h5"
    report = build_corpus(fasta, out, ontology=obo, annotations=[gaf], min_count=1, ancestors="none").report
    assert content(out) == {"P1": ("MKT", {FOUR}), "P2": ("ACD", set())}
    assert report["ids_without_protein"]["annotations"] == 1
    assert report["go"]["unknown_ids"]["counts"] == {"GO:0000077": 1}


def test_xml_with_sequences_from_fasta(entries: Path, obo: Path, tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", ">D x\nDDD\n>A x\nAAA\n>C\nCCC\n>B\nEEE\n")
    out = tmp_path / "out.h5"
    build_corpus(entries, out, ontology=obo, sequences=[fasta], min_count=1, ancestors="none")
    assert content(out) == {
        "A": ("AAA", {FOUR}), "B": ("EEE", {TWO, THREE}), "C": ("CCC", set()), "D": ("DDD", {ONE, TWO}),
    }  # fmt: skip
    none = write(tmp_path / "none.xml", xml(xml_entry("A", None, (FOUR,))))
    with pytest.raises(InputError, match=r"none\.xml:3: entry A has no sequence; give the sequences"):
        build_corpus(none, tmp_path / "two.h5", ontology=obo)
    fasta.write_text(">A\nAAA\n")
    build_corpus(none, tmp_path / "two.h5", ontology=obo, sequences=[fasta], min_count=1)
    assert set(content(tmp_path / "two.h5")) == {"A"}


def test_ids_in_one_of_xml_and_fasta_alone(entries: Path, obo: Path, tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", ">A\nAAA\n>B\nBBB\n>C\nCCC\n>D\nDDD\n>E\nEEE\n>F\nFFF\n")
    out = tmp_path / "out.h5"
    options: dict[str, Any] = {"ontology": obo, "sequences": [fasta], "min_count": 1}
    with pytest.raises(InputError) as error:
        build_corpus(entries, out, **options)
    assert str(error.value) == (
        f"{fasta}:9: E is no entry of the XML files; --unmatched drop leaves such out (1 more such)"
    )
    assert not out.exists()
    fasta.write_text(">A\nAAA\n>C\nCCC\n>E\nEEE\n")
    with pytest.raises(InputError, match=r"uniref\.xml:16: B has no sequence in the files of sequences"):
        build_corpus(entries, out, overwrite=True, **options)
    report = build_corpus(entries, out, overwrite=True, unmatched="drop", **options).report
    assert set(content(out)) == {"A", "C"}
    assert report["left_out"] == {"duplicates": 0, "entries_without_sequence": 2, "sequences_without_entry": 1}


def test_duplicates(entries: Path, obo: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more.fasta", ">E\nMKT\n>A\nMKW\n>A\nMKW\n>D\nMKV\n")
    out = tmp_path / "out.h5"
    with pytest.raises(InputError) as error:
        build_corpus([entries, more], out, ontology=obo)
    assert str(error.value) == (
        f"{more}:3: the id A was already used at {entries}:3; --duplicates first keeps the first (2 more such)"
    )
    assert not out.exists()
    report = build_corpus([entries, more], out, ontology=obo, min_count=1, duplicates="first", overwrite=True).report
    assert report["left_out"]["duplicates"] == 3
    assert content(out)["A"] == ("MKTAY", {ONE, TWO, THREE, FOUR})
    # The terms of an entry that is left out are left out, too.
    build_corpus([more, entries], out, ontology=obo, min_count=1, duplicates="first", overwrite=True)
    assert content(out)["A"] == ("MKW", set())


def many(n: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return "".join(f">P{i}\n{''.join(draw.choices(VOCABULARY, k=draw.randrange(1, 60)))}\n" for i in range(n))


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    text = many(500)
    one = write(tmp_path / "one.fasta", text)
    halves = text.split(">P250\n")
    parts = [write(tmp_path / "b.fasta", ">P250\n" + halves[1]), write(tmp_path / "a.fasta", halves[0])]
    orders = {}
    for name, files, options in (
        ("one", [one], {}),
        ("parts", parts, {"workers": 2}),
        ("small runs", [one], {"workers": 1}),
        ("seed", [one], {"seed": 1}),
    ):
        with pytest.MonkeyPatch.context() as patch:
            if name != "one":
                patch.setattr(runs, "RUN_BYTES", 3000)
                patch.setattr(building, "RANGE_BYTES", 2000)
            built = build_corpus(files, tmp_path / f"{name}.h5", **options)
        with Corpus(built.path) as corpus:
            orders[name] = [corpus[i].id for i in range(len(corpus))]
        orders[name + " fingerprint"] = [built.fingerprint]
        assert content(tmp_path / f"{name}.h5") == content(tmp_path / "one.h5")
    assert orders["one"] == orders["parts"] == orders["small runs"]
    assert orders["one fingerprint"] == orders["parts fingerprint"] == orders["small runs fingerprint"]
    assert sorted(orders["seed"]) == sorted(orders["one"]) != orders["one"] != orders["seed"]
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "small runs.h5").read_bytes()
    # Shuffled: neighbours of the input lie anywhere.
    places = {name: i for i, name in enumerate(orders["one"])}
    distances = [abs(places[f"P{i}"] - places[f"P{i + 1}"]) for i in range(499)]
    assert 130 < np.mean(distances) < 205  # 167 for a random order


def test_held_out_by_chance(tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", many(3000))
    report = build_corpus(fasta, tmp_path / "a.h5", validation=0.1, test=0.05).report
    found = splits(tmp_path / "a.h5")
    sizes = np.bincount(list(found.values()), minlength=3).tolist()
    assert report["split"] == dict(zip(("train", "validation", "test"), sizes, strict=True))
    assert 240 < sizes[1] < 360
    assert 110 < sizes[2] < 190
    # A protein's draw does not depend on the others.
    write(fasta, many(300))
    build_corpus(fasta, tmp_path / "b.h5", validation=0.1, test=0.05)
    assert all(found[name] == split for name, split in splits(tmp_path / "b.h5").items())
    # Nor does a place in the file say who is held out.
    with Corpus(tmp_path / "a.h5") as corpus:
        assert 0.3 < np.flatnonzero(corpus.split == 1).mean() / 3000 < 0.7


def test_held_out_by_cluster(tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", many(1000))
    rows = "".join(f"P{i - i % 10}\tP{i}\n" for i in range(900)) + "P0\tQ1\n"
    clusters = write(tmp_path / "clusters.tsv", rows)
    report = build_corpus(fasta, tmp_path / "a.h5", test=0.3, clusters=[clusters]).report
    found = splits(tmp_path / "a.h5")
    for first in range(0, 900, 10):
        assert len({found[f"P{i}"] for i in range(first, first + 10)}) == 1
    assert 150 < report["split"]["test"] < 450
    assert report["proteins_without_cluster"] == 100
    assert report["ids_without_protein"]["clusters"] == 1
    write(clusters, rows + "P500\tP3\n")
    with pytest.raises(InputError, match=r"clusters\.tsv:902: P3 is in two clusters"):
        build_corpus(fasta, tmp_path / "b.h5", test=0.3, clusters=[clusters], seed=3)


def test_held_out_by_list(tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", many(50))
    test, validation = write(tmp_path / "t.txt", "# ids\nP1\nP7 x\nP99\n"), write(tmp_path / "v.txt", "P2\n")
    out = tmp_path / "a.h5"
    report = build_corpus(fasta, out, test_ids=[test], validation_ids=[validation]).report
    assert {name: split for name, split in splits(out).items() if split} == {"P1": 2, "P7": 2, "P2": 1}
    assert report["ids_without_protein"]["held_out"] == 1
    write(validation, "P2\nP7\n")
    with pytest.raises(InputError, match=r"P7 is held out for validation and for test"):
        build_corpus(fasta, out, test_ids=[test], validation_ids=[validation], overwrite=True)


def test_the_originals_dataset_there_and_back(entries: Path, obo: Path, tmp_path: Path) -> None:
    fasta = write(tmp_path / "x.fasta", many(1500))
    first, dense, second = tmp_path / "a.h5", tmp_path / "dense.h5", tmp_path / "b.h5"
    build_corpus([entries, fasta], first, ontology=obo, min_count=1, test=0.2)
    with Corpus(first) as corpus:
        write_dense(corpus, dense)
        with pytest.raises(InputError, match="exists; replace it with --overwrite"):
            write_dense(corpus, dense)
    with h5py.File(dense) as file:
        names = list(file["uniprot_ids"].asstr())
        i = names.index("A")
        assert file["seqs"].asstr()[i] == "MKTAY"
        assert file["seq_lengths"][i] == 5
        assert file["annotation_masks"][i].tolist() == [True] * 4
        assert list(file["included_annotations"].asstr()) == [ONE, TWO, THREE, FOUR]
        assert file["test_set_mask"].dtype == bool
    report = build_corpus(dense, second, ontology=obo, min_count=1).report
    assert content(second) == content(first)
    assert splits(second) == splits(first)
    assert report["inputs"][0]["format"] == "dense"
    with pytest.raises(InputError, match="is a dataset of the original; build-corpus takes it as an input"):
        Corpus(dense)
    with h5py.File(dense, "a") as file:
        file["included_annotations"][1:3] = ["GO:12345678", "GO:" + "9" * 30]
    found = build_corpus(dense, tmp_path / "c.h5", ontology=obo, min_count=1).report["go"]
    assert found["malformed_ids"] > 0, "an id with too many digits is none, and is counted"
    with h5py.File(dense, "a") as file:
        mask = file["test_set_mask"][:-1]
        del file["test_set_mask"]
        file["test_set_mask"] = mask
    with pytest.raises(InputError, match=r"dense\.h5: test_set_mask: its shape \(\d+,\) does not fit the other"):
        build_corpus(dense, second, overwrite=True)
    with h5py.File(dense, "a") as file:
        del file["test_set_mask"]
    with h5py.File(dense, "a") as file:
        file["seq_lengths"][7] += 1
    with pytest.raises(InputError, match=r"dense\.h5: record 7: has \d+ residues where seq_lengths says \d+"):
        build_corpus(dense, second, overwrite=True)
    with h5py.File(dense, "a") as file:
        del file["seq_lengths"]
    with pytest.raises(InputError, match=r"dense\.h5: seq_lengths: is missing"):
        build_corpus(dense, second, overwrite=True)
    assert verify_corpus(second) == []


def test_dense_is_refused_for_large_sets(entries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_corpus(entries, tmp_path / "a.h5")
    monkeypatch.setattr("proteinbert_fast.data.corpus.dense.LARGEST", -1)
    with Corpus(tmp_path / "a.h5") as corpus, pytest.raises(InputError, match="too large"):
        write_dense(corpus, tmp_path / "dense.h5")
    assert not (tmp_path / "dense.h5").exists()


def test_reading_by_slice_by_number_and_in_order(tmp_path: Path, obo: Path) -> None:
    fasta = write(tmp_path / "x.fasta", many(2000) + f">long\n{'MKTAYIAKQR' * 9000}\n")
    terms = write(tmp_path / "t.tsv", "".join(f"P{i}\tGO:000000{i % 4 + 1}\n" for i in range(0, 2000, 2)))
    build_corpus(fasta, tmp_path / "a.h5", ontology=obo, annotations=[terms], min_count=1)
    with Corpus(tmp_path / "a.h5") as corpus:
        whole = corpus.read(0, len(corpus))
        assert whole.offsets.dtype == whole.go_offsets.dtype == np.int64
        assert np.array_equal(np.diff(whole.offsets), corpus.lengths)
        assert corpus.n_residues == len(whole.tokens) == whole.offsets[-1]
        assert corpus.n_annotations == whole.go_offsets[-1]
        assert np.array_equal(corpus.split, whole.split)
        for residues in (100, 5000, 1 << 22):
            parts = list(corpus.slices(residues=residues))
            assert sum(map(len, parts)) == len(corpus)
            assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
            assert np.array_equal(np.concatenate([part.go_indices for part in parts]), whole.go_indices)
            assert max(len(part.tokens) for part in [corpus.read(0, 0), *parts] if len(part) != 1) <= 4 * residues
        assert (
            b"".join(part.tokens.tobytes() for part in corpus.slices(1990))
            == whole.tokens[whole.offsets[1990] :].tobytes()
        )
        numbers = [5, 1999, 5, 0, 2000]
        some = corpus.read_many(numbers)
        for k, i in enumerate(numbers):
            assert np.array_equal(
                some.tokens[some.offsets[k] : some.offsets[k + 1]],
                whole.tokens[whole.offsets[i] : whole.offsets[i + 1]],
            )
            assert np.array_equal(some.go_indices[some.go_offsets[k] : some.go_offsets[k + 1]], corpus[i].go_indices)
            assert some.ids[k].decode() == corpus[i].id
        assert len(corpus.read_many([])) == 0
        assert corpus[-1].id == corpus[len(corpus) - 1].id
        with pytest.raises(IndexError, match="has 2,001 proteins"):
            corpus[2001]
        again = pickle.loads(pickle.dumps(corpus))
        assert again.fingerprint == corpus.fingerprint
        again.close()


def test_any_hdf5_reader_reads_it(entries: Path, obo: Path, tmp_path: Path) -> None:
    """The contract of docs/corpus.md, with h5py alone."""
    build_corpus(entries, tmp_path / "a.h5", ontology=obo, min_count=1)
    with h5py.File(tmp_path / "a.h5") as file:
        i = list(file["ids"].asstr()).index("D")
        offsets, go_offsets = file["offsets"][:], file["go_offsets"][:]
        letters = file.attrs["vocabulary"].decode()
        residues = file["tokens"][offsets[i] : offsets[i + 1]]
        assert "".join(letters[t] for t in residues) == "MKTAYIAKQR"
        terms = file["terms/ids"].asstr()[:][file["go_indices"][go_offsets[i] : go_offsets[i + 1]]]
        assert list(terms) == [ONE, TWO]
        assert file["tokens"].dtype == np.uint8
        assert file["go_indices"].dtype == np.uint16
        assert file["tokens"][:].max() == OTHER
        assert file["tokens"].compression == "gzip"
        assert json.loads(file["report"][()])["records"] == 4


def test_residues_take_little_more_than_their_entropy(tmp_path: Path) -> None:
    sequences = [line.split("\t")[-1] for line in
                 (Path(__file__).parent / "swissprot_200.tsv").read_text().splitlines()[1:]]  # fmt: skip
    fasta = write(tmp_path / "x.fasta", "".join(f">P{i}\n{s}\n" for i, s in enumerate(sequences)))
    build_corpus(fasta, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        tokens = file["tokens"][:]
        share = np.bincount(tokens) / len(tokens)
        entropy = -sum(p * np.log2(p) for p in share if p)
        bits = 8 * file["tokens"].id.get_storage_size() / len(tokens)
    assert bits < entropy + 0.1


def damage_value(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "a") as file:
            old = file[name][0]
            file[name][0] = b"Z" if isinstance(old, bytes) else old ^ 1

    return damage


def damage_bytes(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path) as file:
            at = file[name].id.get_chunk_info(0)
        content = bytearray(path.read_bytes())
        for k in range(at.byte_offset, at.byte_offset + at.size):
            content[k] ^= 0x55
        path.write_bytes(content)

    return damage


def delete(name: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file[name]

    return damage


NAMES = [column.name for column in layout.COLUMNS]


def test_verify_survives_any_damage(entries: Path, obo: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    build_corpus(entries, out, ontology=obo, min_count=1)
    whole = out.read_bytes()
    draw = random.Random(0)
    found = 0
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 4))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        out.write_bytes(content)
        try:
            broken = verify_corpus(out)
            found += bool(broken)
        except InputError as error:
            broken = [str(error)]
            found += 1
        assert all("\n" not in line for line in broken)
    assert found > 50  # of the rest, most bytes are unused or say the same


def test_a_report_that_is_lost(entries: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.h5"
    build_corpus(entries, out)
    with h5py.File(out, "a") as file:
        del file["report"]
    assert verify_corpus(out) == ["report: is missing or damaged"]
    with Corpus(out) as corpus, pytest.raises(InputError, match=r"a\.h5: report: is missing or damaged"):
        _ = corpus.report


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", [damage_value, damage_bytes, delete])
def test_verify_names_the_broken_dataset(
    entries: Path, obo: Path, tmp_path: Path, name: str, how: Callable[[str], Callable[[Path], None]]
) -> None:
    out = tmp_path / "a.h5"
    build_corpus(entries, out, ontology=obo, min_count=1)
    how(name)(out)
    broken = verify_corpus(out)
    assert [line.split(": ")[0] for line in broken] == [name], broken
    assert "\n" not in broken[0]


def test_verify_finds_what_digests_do_not(entries: Path, obo: Path, tmp_path: Path) -> None:
    """Another program that writes digests of its own nonsense."""
    whole = tmp_path / "whole.h5"
    build_corpus(entries, whole, ontology=obo, min_count=1)

    def broken(name: str, values: Any) -> list[str]:
        out = shutil.copy(whole, tmp_path / "a.h5")
        with h5py.File(out, "a") as file:
            values = np.asarray(values(file[name][:]), file[name].dtype)
            del file[name]
            dataset = file.create_dataset(name, data=values)
            layout.set_attribute(dataset, "sha256", hashlib.sha256(values.tobytes()).hexdigest())
        return verify_corpus(out)

    assert broken("tokens", lambda v: np.where(v == v[3], 23, v)) == ["tokens: has values that are no residue"]
    assert broken("split", lambda v: v + 3) == ["split: has values that are no set"]
    assert broken("go_indices", lambda v: v + 9) == ["go_indices: has values that are no term"]
    assert broken("offsets", lambda v: v[[0, 2, 1, 3, 4]]) == ["offsets: does not ascend from 0"]
    assert broken("offsets", lambda v: v[:-1]) == ["offsets: has 4 values where the other datasets want 5"]
    assert broken("offsets", lambda v: [*v[:-1], v[-1] + 1]) == ["offsets: ends at 24 where tokens has 23 values"]
    assert broken("terms/ids", lambda v: v[::-1]) == ["terms/ids: does not ascend"]
    assert "the proteins of a term are not as many" in broken("terms/counts", lambda v: v + 1)[0]
    assert broken("tokens", lambda v: (v + 1) % 22) == ["fingerprint: is not that of the datasets"]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_corpus_cut_short(entries: Path, obo: Path, tmp_path: Path, part: float) -> None:
    out = tmp_path / "a.h5"
    build_corpus(entries, out, ontology=obo)
    out.write_bytes(out.read_bytes()[: int(out.stat().st_size * part)])
    for look in (Corpus, verify_corpus):
        with pytest.raises(InputError, match=r"a\.h5: cannot be read as HDF5: cut short, damaged"):
            look(out)


def test_other_hdf5_files(tmp_path: Path, entries: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["x"] = [1]
    with pytest.raises(InputError, match="is an HDF5 file, but no corpus"):
        verify_corpus(path)
    with pytest.raises(InputError, match="uniprot_ids: is missing: this is no dataset of the original"):
        build_corpus(path, tmp_path / "b.h5")
    build_corpus(entries, path, overwrite=True)
    with h5py.File(path, "a") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(InputError, match="is a corpus of format 99, and this version reads 1"):
        Corpus(path)
    with pytest.raises(InputError, match="no such file"):
        Corpus(tmp_path / "none.h5")
    with pytest.raises(InputError, match="is a directory"):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("x.xml", xml(xml_entry("A", "MKT"))[:-20], r"x\.xml:14:1: the file ends within a tag"),
        ("x.xml", "<html></html>", r"x\.xml:1:1: the root element <html> is not that of UniRef XML"),
        ("x.xml", xml(), r"x\.xml: has no entry in it"),
        ("x.xml", xml(xml_entry("A" * 256, "MKT")), r"x\.xml:3: an id of more than 255 bytes"),
        ("x.txt", "what is this\n", r"x\.txt:1: is not UniRef or UniProtKB XML, a UniProtKB flat file, FASTA"),
        ("x.gaf", "!gaf-version: 2.2\n", r"x\.gaf:1: is not .*; give it with --annotations"),
        ("x.fasta", ">A\nMKT\n>B\n", r"x\.fasta:3: record B: the sequence is empty"),
        ("x.fasta", "", r"x\.fasta: is empty"),
    ],
)
def test_refused_inputs(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(InputError, match=says) as error:
        build_corpus(path, tmp_path / "out.h5")
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        ("annotations", "!gaf-version: 2.2\nUniProtKB\tP1\tx\n", r"x:2: is not GAF: 3 columns"),
        ("annotations", "P1\tGO:0000001\nP2\n", r"x:2: is no table: an id, a tab and GO terms were expected"),
        ("annotations", "\tGO:0000001\n", r"x:1: the first column, the id, is empty"),
        ("annotations", ">A\nMKT\n", r"x:1: is not GAF or a table of ids and GO terms"),
        ("clusters", "A\tB\nC\n", r"x:2: two columns were expected: representative, member"),
        ("sequences", "hello", r"x:1: is not FASTA"),
        ("test_ids", "A\0\n", r"x:1: a NUL byte"),
        ("test_ids", "\n", r"x: has no row in it"),
    ],
)
def test_refused_side_files(entries: Path, obo: Path, tmp_path: Path, option: str, text: str, says: str) -> None:
    path = write(tmp_path / "x", text)
    options: dict[str, Any] = {option: [path]} | ({"test": 0.5} if option == "clusters" else {})
    with pytest.raises(InputError, match=says):
        build_corpus(entries, tmp_path / "out.h5", ontology=obo, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ancestors": "all"}, "ancestors must be one of part_of, is_a, none, got 'all'"),
        ({"min_count": 0}, "min_count must be 1 or more"),
        ({"seed": -1}, "seed must be from 0"),
        ({"test": 0.7, "validation": 0.5}, "are probabilities, and so is their sum"),
        ({"clusters": ["c"]}, "clusters are for drawing held-out sets"),
        ({"clusters": ["c"], "test": 0.1, "test_ids": ["t"]}, "lists would tear clusters"),
        ({"workers": -1}, "workers must be 1 or more"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
        ({"ontology": None, "annotations": ["x"]}, "no such file"),
    ],
)
def test_refused_options(entries: Path, obo: Path, tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        build_corpus(entries, tmp_path / "out.h5", **({"ontology": obo} | options))
    assert not (tmp_path / "out.h5.partial").exists()


def test_refused_combinations_of_files(entries: Path, obo: Path, tmp_path: Path) -> None:
    terms = write(tmp_path / "t.tsv", "A\tGO:0000001\n")
    out = tmp_path / "out.h5"
    with pytest.raises(InputError, match="GO terms need the ontology"):
        build_corpus(entries, out, annotations=[terms])
    with pytest.raises(InputError, match="is given twice"):
        build_corpus([entries, entries], out)
    with pytest.raises(InputError, match="no file of proteins given"):
        build_corpus([], out)
    with pytest.raises(InputError, match="there is no folder"):
        build_corpus(entries, tmp_path / "none" / "out.h5")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        build_corpus(tmp_path / "pipe", out)
    fasta = write(tmp_path / "x.fasta", ">A\nMKT\n")
    with pytest.raises(InputError, match="sequences are for entries of UniRef XML"):
        build_corpus(fasta, out, sequences=[terms])


def test_a_file_that_fails_stops_the_others(tmp_path: Path) -> None:
    good = write(tmp_path / "good.fasta", many(20_000))
    bad = tmp_path / "bad.fasta.gz"
    bad.write_bytes(gzip.compress(many(100).encode())[:-200])
    with pytest.raises(ProteinBertError, match=r"bad\.fasta\.gz:\d+: record P\d+: the gzip file is truncated"):
        build_corpus([good, bad], tmp_path / "out.h5", workers=2)
    assert not (tmp_path / "out.h5").exists()
