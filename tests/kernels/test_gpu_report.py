"""The GPU report from end to end, in tiny sizes: every section runs, what is wrong gets no time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from proteinbert_fast.benchmark.gpu import checks, command
from proteinbert_fast.benchmark.gpu.bench import KERNELS
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS
from proteinbert_fast.benchmark.gpu.report import GpuReport, write
from proteinbert_fast.benchmark.gpu.sections import SECTIONS, latency
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.ops import kernels

from .conftest import IS_INTERPRETED

TINY = replace(GpuSettings().tiny(), precisions=("bfloat16",))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> GpuReport:
    folder = tmp_path_factory.mktemp("report")
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    return command.run(TINY, SECTIONS, device, None, folder)


def test_every_section_runs(report: GpuReport):
    assert list(report.sections) == list(SECTIONS)
    assert report.wrong == []
    allowed = {latency.NO_GRAPHS}
    if IS_INTERPRETED:
        allowed |= {"graphs need a GPU", "there is no device to profile"}
    for row in report.rows:
        assert row.status == "measured" or row.note in allowed, f"{row.case.label}: {row.note}"
    for row in report.rows:
        if row.status == "measured" and row.case.table not in {"checks", "one forward pass, kernel by kernel"}:
            assert row.seconds, row.case.label
            assert row.check or row.case.probe == "matrix", row.case.label


def test_every_kernel_is_checked_timed_and_predicted(report: GpuReport):
    names = [operation.name for operation in OPERATIONS]
    assert [row.case.name for row in report.sections["checks"]][: len(names)] == names
    rows = [row for row in report.sections["kernels"] if row.case.table == KERNELS]
    assert [row.case.name for row in rows] == names
    for row in rows:
        v = row.values
        assert 0 < v["predicted_ns_per_token"] <= v["predicted_serial_ns_per_token"]
        assert v["bound_by"] in {"matrix", "HBM", "L2", "instructions"}
        assert v["peaks"] == "measured in the same run"


def test_files(report: GpuReport, tmp_path: Path):
    written = write(report, tmp_path / "new")
    values = json.loads(written[0].read_text())
    assert [section["name"] for section in values["sections"]] == list(SECTIONS)
    assert values["settings"]["is_trial"]
    text = written[1].read_text()
    assert "not numbers worth keeping" in text
    for target in ("memory beyond the weights", "time per residue, slowest", "the largest piece", "p50 latency",
                   "forward bfloat16", "of the matrix rate", "padded eager", "torch.compile"):  # fmt: skip
        assert f"| {target}" in text or f"{target} " in text or f"over {target}" in text, target


def test_a_wrong_kernel_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def wrong(*arguments, **options):
        return kernels.linear.broadcast_global(*arguments, **options) * 1.1

    monkeypatch.setattr(kernels, "broadcast_global", wrong)
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    found = command.run(TINY, ["checks", "kernels", "latency"], device, None, tmp_path)
    status = {(row.case.table, row.case.name): row for row in found.rows}
    assert status["checks", "broadcast_global"].status == "wrong"
    assert "allowed 0.06" in status["checks", "broadcast_global"].check
    timed = status[KERNELS, "broadcast_global"]
    assert timed.status == "wrong"
    assert not timed.seconds
    assert status[KERNELS, "local_block"].seconds
    # The model needs it.
    assert status["one protein of 10 residues", "ours, eager"].status == "wrong"
    assert "WRONG: no time" in found.to_markdown()
    assert "WRONG: broadcast_global in bfloat16" in capsys.readouterr().err


def test_a_kernel_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments, **options):
        raise RuntimeError("PTXAS failed\nwith a long log")

    monkeypatch.setattr(kernels, "global_block", broken)
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    found = {o.name: o for o in checks.run(TINY, PRECISIONS["float32"], device) if not isinstance(o, str)}
    assert found["global_block"] == ("global_block", False, "RuntimeError: PTXAS failed")
    assert found["local_block"].passed


def test_checks_in_a_process_of_their_own():
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    settings = replace(TINY, check_lengths=((5,),), model_lengths=(3,))
    # float32: the interpreter's bfloat16 is mended in this process only.
    found = checks.run_apart(settings, [PRECISIONS["float32"]], device)["float32"]
    assert [outcome.name for outcome in found] == list(checks.CHECKS)
    assert all(outcome.passed for outcome in found), found
    ended = checks.run_apart(replace(settings, apart_seconds=0.01), [PRECISIONS["float32"]], device)["float32"]
    assert ended == [("local_block", False, "ended after 0 s")]
