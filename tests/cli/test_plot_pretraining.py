"""The command ``plot-pretraining``: a picture, a line, errors of one line."""

import json
import sys
from pathlib import Path

import pytest

from proteinbert_fast.cli.main import main

ROW = {"kind": "train", "step": 1, "records": 1200, "residues": 340_000, "token_loss": 2.5, "annotation_loss": 0.1}


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"step": 2, "records": 2400}) + "\n")
    return folder


@pytest.mark.parametrize("by", ["records", "residues"])
def test_plot(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "curves.svg"
    for log in (run_folder, run_folder / "log.jsonl"):
        assert main(["plot-pretraining", str(log), "-o", str(out), "--by", by]) == 0
        assert capsys.readouterr() == (f"wrote {out}: 2 rows\n", "")
        text = out.read_text()
        assert "<!-- a run: 2,400 records, 340,000 residues seen -->" in text
        assert f"<!-- {by} seen -->" in text
        out.unlink()


def test_errors_are_one_line(run_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "curves.png"
    assert main(["plot-pretraining", str(tmp_path), "-o", str(out)]) == 1
    line = f"{tmp_path / 'log.jsonl'}: no such file: the log of a run is log.jsonl in its folder"
    assert capsys.readouterr() == ("", f"proteinbert-fast: error: {line}\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot-pretraining", str(run_folder), "-o", str(out)]) == 1
    line = "a picture needs matplotlib: pip install 'proteinbert-fast[plots]'"
    assert capsys.readouterr() == ("", f"proteinbert-fast: error: {line}\n")
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", "-o", "y.png", "--by", "hours"]])
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot-pretraining", *arguments]) == 2
    assert capsys.readouterr().err.startswith("usage: proteinbert-fast plot-pretraining")
