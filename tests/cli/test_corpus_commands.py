"""The commands ``build-corpus`` and ``corpus``: results on stdout, errors of one line, exit codes."""

import json
from pathlib import Path

import h5py
import pytest

from proteinbert_fast.cli.main import main

pytest.importorskip("fastobo")

DATA = Path(__file__).parents[1] / "data" / "corpus"
OBO = str(DATA / "go_2013_part.obo.gz")


@pytest.fixture
def corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Three real entries."""
    out = tmp_path / "corpus.h5"
    inputs = [str(DATA / name) for name in ("UniRef50_Q9EPI6.xml", "UniRef90_P99999.xml", "Q13639.txt")]
    assert main(["build-corpus", *inputs, "-o", str(out), "--ontology", OBO, "--min-count", "1"]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    lines = printed.splitlines()
    assert lines[0].startswith(f"{out}: in ")
    assert lines[1] == "  proteins     3, of 105 to 532 residues, mean 341.67, median 388"
    assert lines[2] == "  residues     1,025, 0 of them unknown"
    assert lines[3] == "  sets         train 3, validation 0, test 0"
    assert lines[4].startswith("  GO terms     ")
    assert lines[-1].startswith("  fingerprint  ")
    return out


def test_resume_of_what_is_complete(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = corpus.stat()
    inputs = [str(DATA / name) for name in ("UniRef50_Q9EPI6.xml", "UniRef90_P99999.xml", "Q13639.txt")]
    command = ["build-corpus", *inputs, "-o", str(corpus), "--ontology", OBO, "--min-count", "1"]
    assert main([*command, "--resume"]) == 0
    assert capsys.readouterr().out.startswith(f"{corpus}: is complete already, ")
    assert main(command) == 1
    assert capsys.readouterr().err == f"proteinbert-fast: error: {corpus}: exists; replace it with --overwrite\n"
    after = corpus.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert main([*command, "--overwrite", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_info(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "info", str(corpus)]) == 0
    out = capsys.readouterr().out
    assert "  proteins     3, of 105 to 532 residues" in out
    assert "at this rate 106,000,000 proteins take" in out
    assert main(["corpus", "info", "--json", str(corpus)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 3
    assert [file["format"] for file in report["inputs"]] == ["uniref-xml", "uniref-xml", "uniprot-text"]
    assert report["inputs"][0]["sha256"]


def test_verify(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "verify", str(corpus)]) == 0
    assert capsys.readouterr().out.startswith(f"{corpus}: whole: 3 proteins, fingerprint ")
    with h5py.File(corpus, "a") as file:
        file["tokens"][0] ^= 1
    assert main(["corpus", "verify", str(corpus)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"proteinbert-fast: error: {corpus}: tokens: its values are not those that were written: the digest differs\n"
    )
    corpus.write_bytes(corpus.read_bytes()[:5000])
    assert main(["corpus", "verify", str(corpus)]) == 1
    assert "cannot be read as HDF5: cut short, damaged" in capsys.readouterr().err


def test_export_and_import(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tmp_path / "dense.h5"
    assert main(["corpus", "export", str(corpus), "-o", str(dense)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {dense}: 3 proteins, ")
    with h5py.File(dense) as file:
        assert file["annotation_masks"].shape[0] == 3
    command = ["build-corpus", str(dense), "-o", str(tmp_path / "b.h5"), "--ontology", OBO, "--min-count", "1"]
    assert main(command) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["build-corpus"],
        ["build-corpus", "x.xml"],
        ["build-corpus", "x", "-o", "y", "--ancestors", "all"],
        ["build-corpus", "x", "-o", "y", "--resume", "--overwrite"],
        ["corpus"],
        ["corpus", "fly", "x"],
        ["corpus", "info"],
    ],
)
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: proteinbert-fast")


def test_damaged_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    xml = tmp_path / "x.xml"
    xml.write_bytes((DATA / "UniRef90_P99999.xml").read_bytes()[:3000])
    assert main(["build-corpus", str(xml), "-o", str(tmp_path / "out.h5")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"proteinbert-fast: error: {xml}:")
    assert err.count("\n") == 1
    assert not (tmp_path / "out.h5").exists()
