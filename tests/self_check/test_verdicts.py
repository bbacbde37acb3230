"""Verdicts outlive their process, hold for one machine, and are never mistaken for another's."""

import json
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from proteinbert_fast import ProteinBertConfig, self_check
from proteinbert_fast.self_check import apart, verdicts
from proteinbert_fast.self_check.apart import Outcome
from proteinbert_fast.self_check.compare import Kind

SMALL = ProteinBertConfig(n_annotations=5, d_local=32, d_global=32, n_blocks=1, n_heads=2, d_key=16)
KIND = Kind(torch.device("cpu"), SMALL, torch.bfloat16, torch.float32, True, False)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "_failures", {})
    return tmp_path / "cache" / "self_check"


@pytest.fixture
def checks(monkeypatch):
    """Outcomes of the checks to come, which are run no more than there are; ``ran`` has what was asked."""
    coming = SimpleNamespace(outcomes=[], ran=[])

    def check(kind, hopper, say):
        coming.ran.append((kind, hopper))
        return coming.outcomes.pop(0)

    monkeypatch.setattr(apart, "check", check)
    return coming


def asked(kind: Kind = KIND) -> str | None:
    """As a new process would."""
    self_check._failures.clear()
    with torch.set_grad_enabled(kind.gradients):
        return self_check.failure_reason(kind.device, kind.config, kind.dtype, kind.parameters)


def test_a_good_verdict_is_kept(checks, cache):
    checks.outcomes = [Outcome(None, True)]
    assert asked() is None
    assert asked() is None
    assert len(checks.ran) == 1
    (path,) = cache.glob("*.json")
    values = json.loads(path.read_text())
    assert values["failure"] is None
    assert values["about"]["dtype"] == "torch.bfloat16"
    assert values["about"]["parameters"] == "torch.float32"


def test_a_bad_verdict_is_kept_and_says_where(checks, cache):
    checks.outcomes = [Outcome("results are off by 1.5", True)]
    with pytest.warns(RuntimeWarning, match=r"fail their self-check on cpu: results are off by 1.5; the plain oper"):
        assert asked() == "results are off by 1.5"
    with pytest.warns(RuntimeWarning, match=r"self_check/cpu-\w+.json keeps this: delete it to check again"):
        assert asked() == "results are off by 1.5"
    assert len(checks.ran) == 1
    next(cache.glob("*.json")).unlink()
    checks.outcomes = [Outcome(None, True)]
    assert asked() is None


def test_what_is_not_final_is_not_kept(checks, cache):
    checks.outcomes = [Outcome("they could not be checked: out of memory", False), Outcome(None, True)]
    with pytest.warns(RuntimeWarning, match="could not be checked: out of memory"):
        assert asked()
    assert not list(cache.glob("*.json"))
    assert asked() is None


def test_one_warning_in_a_process(checks):
    checks.outcomes = [Outcome("wrong", True)]
    with pytest.warns(RuntimeWarning) as said:
        assert asked() == "wrong"
    assert len(said) == 1
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert self_check.failure_reason(KIND.device, SMALL, KIND.dtype, KIND.parameters) == "wrong"


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float16},
        {"parameters": torch.bfloat16},
        {"config": replace(SMALL, d_global=64)},
        {"config": replace(SMALL, n_annotations=16)},
    ],
    ids=str,
)
def test_another_kind_is_checked_apart(checks, other):
    checks.outcomes = [Outcome(None, True), Outcome(None, True)]
    asked()
    asked(replace(KIND, **other))
    assert len(checks.ran) == 2


def test_more_annotations_or_blocks_run_the_same_kernels(checks):
    checks.outcomes = [Outcome(None, True)]
    big = ProteinBertConfig(n_annotations=1003, n_blocks=6)
    asked(replace(KIND, config=big))
    asked(replace(KIND, config=replace(big, n_annotations=8939, n_blocks=4)))
    assert len(checks.ran) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("_driver_version", lambda: "581.0"),
        ("_triton_version", lambda: "3.7.1"),
        ("_digest_of_kernels", lambda: "0"),
        ("HOPPER_ENABLED", False),
        ("_tuned_table", lambda device: "1"),
        ("__version__", "9.9"),
    ],
)
def test_another_machine_or_version_is_checked_again(checks, monkeypatch, name, value):
    plain = verdicts._machine
    monkeypatch.setattr(verdicts, "_machine", lambda device: plain(device) | {"driver": verdicts._driver_version()})
    monkeypatch.setattr(verdicts, "_driver_version", lambda: "580.1")
    checks.outcomes = [Outcome(None, True), Outcome(None, True)]
    asked()
    monkeypatch.setattr(verdicts, name, value)
    asked()
    assert len(checks.ran) == 2


def test_a_verdict_with_gradients_holds_without(checks):
    training = replace(KIND, gradients=True)
    checks.outcomes = [Outcome(None, True)]
    assert asked(training) is None
    assert asked(KIND) is None
    assert len(checks.ran) == 1


def test_wrong_gradients_do_not_forbid_inference(checks):
    training = replace(KIND, gradients=True)
    checks.outcomes = [Outcome("gradients are off", True), Outcome(None, True)]
    with pytest.warns(RuntimeWarning, match="gradients are off"):
        assert asked(training)
    assert asked(KIND) is None
    with pytest.warns(RuntimeWarning, match="gradients are off"):
        assert asked(training)
    assert len(checks.ran) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, text: path.write_bytes(b""),
        lambda path, text: path.write_bytes(text[: len(text) // 2]),
        lambda path, text: path.write_bytes(b"\xff\xfe" + text),
        lambda path, text: path.write_text("[]"),
        lambda path, text: path.write_text("null"),
        lambda path, text: path.write_bytes(text.replace(b'"failure": null', b'"failure": 0')),
        lambda path, text: path.write_bytes(text.replace(b'"failure": null,', b"")),
        lambda path, text: path.write_bytes(text.replace(b'"gradients": false', b'"gradients": true')),
        lambda path, text: path.write_bytes(text.replace(b'"format": 1', b'"format": 2')),
        lambda path, text: (path.unlink(), path.mkdir()),
    ],
)
def test_damaged_files_are_no_verdicts(checks, cache, damage, caplog):
    checks.outcomes = [Outcome(None, True), Outcome("wrong", True)]
    asked()
    (path,) = cache.glob("*.json")
    damage(path, path.read_bytes())
    with pytest.warns(RuntimeWarning, match="wrong"):
        assert asked() == "wrong"
    assert "the kernels are checked again" in caplog.text
    assert str(path) in caplog.text


def test_a_cache_that_cannot_be_written_is_said_and_the_check_counts(checks, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path / "file" / "cache"))
    checks.outcomes = [Outcome(None, True)]
    assert asked() is None
    assert "the kernels are checked again in the next process" in caplog.text


def test_of_processes_at_once_one_checks(monkeypatch):
    """Threads stand for processes: a lock on a file that each has opened for itself keeps both apart."""
    begun, go_on, ran = threading.Event(), threading.Event(), []

    def check(kind, hopper, say):
        ran.append(kind)
        begun.set()
        assert go_on.wait(30)
        return Outcome(None, True)

    monkeypatch.setattr(apart, "check", check)
    found = []
    threads = [threading.Thread(target=lambda: found.append(self_check.verdict_on(KIND))) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert len(ran) == 1
    assert [verdict.failure for verdict in found] == [None] * 3
