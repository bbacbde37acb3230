"""Whole runs of tiny sizes, their reports, and the command."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch.nn.functional as F

from proteinbert_fast.benchmark import competitors, machine, report
from proteinbert_fast.benchmark import run as runs
from proteinbert_fast.benchmark.cases import Case, Work
from proteinbert_fast.benchmark.groups import memory
from proteinbert_fast.benchmark.registry import GROUPS
from proteinbert_fast.benchmark.report import Report
from proteinbert_fast.benchmark.setup import Setup
from proteinbert_fast.benchmark.timing import Row
from proteinbert_fast.cli import bench
from proteinbert_fast.cli.main import main
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops.instruction_sets import describe_instruction_sets, kernels_in_use

from .conftest import TINY

NUMBERS = {"seconds", "rate", "of_matrix_rate", "of_copy_rate", "ours_over_this", "bytes"}


@pytest.fixture(scope="module")
def tiny_report() -> Report:
    found = runs.run(TINY, ["tokenizer", "forward", "embed"], lambda _: None)
    group = GROUPS["memory"]
    cases = [case for case in group.cases(Setup(TINY)) if case.table == "ours, per residue"]
    found.groups.append((group, group.measure(cases, 1, lambda _: None)))
    return found


def test_json_has_everything(tiny_report: Report, tmp_path: Path):
    written = report.write(tiny_report, tmp_path / "new" / "folder")
    values = json.loads(written[0].read_text())
    rows = [row for group in values["groups"] for row in group["rows"]]
    assert [group["name"] for group in values["groups"]] == ["tokenizer", "forward", "embed", "memory"]
    for row in rows:
        assert {"cpu", "threads", "torch", "numpy", "commit", "device", "date", "dtype", "work", "owner"} <= row.keys()
        if row["status"] == "measured":
            p = row["seconds"]
            assert p["p20"] <= p["p50"] <= p["p80"]
            assert len(p["rounds"]) == (1 if row["group"] == "memory" else TINY.rounds)
        assert row["kernels"] == kernels_in_use()
    for rates in values["environment"]["instruction_set_rates"].values():
        assert 0 < rates["products_flops"] < float("inf") > rates["registers_flops"] > 0
    ours = next(row for row in rows if row["group"] == "forward" and row["ours"])
    assert ours.keys() >= {"rate", "of_matrix_rate", "of_copy_rate"}
    assert "float" not in ours["check"]
    assert "largest error" in ours["check"]
    padded = next(row for row in rows if row["case"] == "padded eager")
    assert len(padded["ours_over_this"]["rounds"]) == TINY.rounds
    (lines,) = [group["lines"] for group in values["groups"] if group["name"] == "memory"]
    assert [line["table"] for line in lines] == ["ours, per residue"]


def test_markdown_has_a_table_for_each_comparison(tiny_report: Report):
    text = tiny_report.to_markdown()
    for heading in ("Many proteins", "One protein", "Residues in memory", "Ours, per residue", "The machine itself"):
        assert f"### {heading}" in text
    assert "WRONG" not in text
    assert f"\nInstruction set: {describe_instruction_sets()}. Its peak: float32 " in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ours")}
    assert len(widths) <= 1


def test_picture(tiny_report: Report, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from proteinbert_fast.benchmark.picture import draw

    draw(tiny_report, tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_peaks_are_those_of_the_process(tiny_report: Report):
    for row in tiny_report.groups[-1][1]:
        # torch alone needs more than 50 MB; had the parent's peak been inherited, all would be equal.
        assert 50e6 < row.bytes["baseline"] <= row.bytes["peak"] < 2e9


@pytest.mark.slow
def test_a_wrong_implementation_has_no_time_anywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class WithTanhGelu:
        def __getattr__(self, name: str) -> object:
            return partial(F.gelu, approximate="tanh") if name == "gelu" else getattr(F, name)

    monkeypatch.setattr(competitors, "F", WithTanhGelu())
    monkeypatch.setattr(bench, "Settings", lambda **_: replace(TINY, dtypes=("float32",)))
    args = ["bench", "--groups", "forward", "--output", str(tmp_path)]
    assert main(args) == 1
    rows = json.loads((tmp_path / "results.json").read_text())["groups"][0]["rows"]
    wrong = [row for row in rows if row["status"] == "wrong"]
    assert wrong
    for row in wrong:
        assert not NUMBERS & row.keys()
    text, error = capsys.readouterr()
    assert len([line for line in text.splitlines() if "WRONG: no time" in line]) == len(wrong)
    assert "proteinbert-fast: error: WRONG: many proteins / padded eager / float32" in error


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(bench, "Settings", lambda **_: TINY)
    assert main(["bench", "--groups", "tokenizer", "--output", str(tmp_path)]) == 0
    text, _ = capsys.readouterr()
    assert text.startswith("# proteinbert_fast on ")
    assert (tmp_path / "results.md").read_text().strip() == text.strip()


@pytest.mark.parametrize("wrong", [["--groups", "nope"], ["--dtypes", "float16"], ["--rounds", "0"]])
def test_wrong_use(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *wrong]) == 2
    assert wrong[0] in capsys.readouterr().err


def test_unknown_group_from_python():
    with pytest.raises(InputError, match="nope"):
        runs.run(TINY, ["nope"], lambda _: None)


def memory_row(residues: int, peak: float) -> Row:
    case = Case("ours, per residue", str(residues), "", "", True, Work(residues=residues), "residues/s", lambda: None)  # type: ignore[arg-type,return-value]
    per_residue = (peak - 1000) / residues
    numbers = {"baseline": 1000.0, "peak": peak, "per_residue": per_residue}
    return Row(case, "measured", seconds=[1.0], bytes=numbers)


def test_straight_line():
    (line,) = memory.fit([memory_row(n, 1000 + 500 + 1400 * n) for n in (10, 20, 40)])
    assert line["bytes_per_residue"] == pytest.approx(1400)
    assert line["bytes_at_0"] == pytest.approx(500)
    assert line["largest_residual"] < 1e-9
    assert line["within_limit"]


@pytest.mark.parametrize("peaks", [(10, 26_000.0, 60, 27_000.0), (10, 2000.0, 60, 260_000.0)])
def test_too_much_memory_at_any_length_is_said(peaks: tuple[int, float, int, float]):
    (line,) = memory.fit([memory_row(peaks[0], peaks[1]), memory_row(peaks[2], peaks[3])])
    assert not line["within_limit"]


def test_results_go_into_a_folder_of_date_and_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    environment = {"date": "2031-02-03T10:00:00Z", "cpu": "AMD EPYC (tm) 9", "cores": 2}
    monkeypatch.setattr(machine, "checkout", lambda: tmp_path)
    folder = report.default_folder(environment)
    assert folder == tmp_path / "benchmarks" / "results" / "2031-02-03-amd-epyc-tm-9-2-cores"
    monkeypatch.setattr(machine, "checkout", lambda: None)
    assert report.default_folder(environment).parts[0] == "proteinbert-fast-bench"
