"""Every group and case: complete, cheap to list, and right."""

import subprocess
import sys

import pytest

from proteinbert_fast import ProteinBertConfig
from proteinbert_fast.benchmark import competitors, timing
from proteinbert_fast.benchmark.cases import flops_per_token
from proteinbert_fast.benchmark.registry import GROUPS
from proteinbert_fast.benchmark.setup import Setup

TIMED = ["tokenizer", "forward", "train", "embed"]


def test_groups():
    assert list(GROUPS) == [*TIMED, "corpus", "loader", "memory"]
    assert all(group.name == name and group.title for name, group in GROUPS.items())


@pytest.mark.parametrize("name", GROUPS)
def test_cases_are_complete(name: str, setup: Setup):
    cases = GROUPS[name].cases(setup)
    assert len({case.label for case in cases}) == len(cases)
    for case in cases:
        assert case.what
        assert case.owner
        assert case.work.amount(case.unit) > 0
        assert case.ours == case.owner.startswith("proteinbert_fast ")
    assert any(case.ours for case in cases)
    assert any(not case.ours for case in cases)


@pytest.mark.parametrize("name", TIMED)
def test_timed_groups_measure_the_machine_too(name: str, setup: Setup):
    cases = GROUPS[name].cases(setup)
    kinds = {(case.probe, case.dtype) for case in cases if case.probe}
    dtypes = setup.settings.dtypes if name != "tokenizer" else ()
    assert kinds == {(kind, dtype) for kind in ("matrix", "convolution") for dtype in dtypes} | {("copy", None)}


def test_competitors_run_in_every_dtype_on_the_same_work(setup: Setup):
    cases = [case for case in GROUPS["forward"].cases(setup) if not case.probe]
    for table in ("many proteins", "one protein"):
        for dtype in ("float32", "bfloat16"):
            members = [case for case in cases if (case.table, case.dtype) == (table, dtype)]
            assert [case.name for case in members] == [
                "ours",
                "padded eager",
                "padded eager, channels last",
                competitors.OTHER_PACKAGE,
            ]
            assert len({case.work for case in members}) == 1


@pytest.mark.parametrize("name", [*TIMED, "corpus", "loader"])
def test_every_case_is_right(name: str, setup: Setup):
    for case in GROUPS[name].cases(setup):
        row, ready, _ = timing.checked(case)
        if case.owner.startswith(competitors.OTHER_PACKAGE):
            assert row.status == "unavailable" or "not checked" in row.note
            continue
        if case.owner.startswith("lxml") and row.status == "unavailable":
            assert "not installed" in row.note
            continue
        assert row.status == "measured", f"{case.label}: {row.check} {row.note}"
        assert ready is not None
        assert row.check is not None or case.probe in {"matrix", "convolution"}


def test_flops_of_the_published_model():
    assert flops_per_token(ProteinBertConfig()) == pytest.approx(4.92e6, rel=1e-3)


def test_listing_groups_does_not_import_torch():
    code = "import sys, proteinbert_fast.cli.bench; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
