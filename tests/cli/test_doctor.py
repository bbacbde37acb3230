"""``proteinbert-fast doctor``."""

import pytest

from proteinbert_fast import Tokenizer
from proteinbert_fast.cli import doctor
from proteinbert_fast.cli.main import main


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("proteinbert_fast", "Python", "torch", "h5py", "CPU", "cpu, float32", "the default", "proteinbert "):
        assert f"\n  {word}" in out or word in out
    assert "FAIL" not in out
    assert "pass  model on cpu in float32: largest difference from the definition" in out
    assert "all checks passed in" in out


def test_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: "M")
    monkeypatch.setattr(doctor, "TOLERANCES", {"float32": 0.0})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  tokenizer: AssertionError: decoding gives another text" in out
    assert "FAIL  model on cpu in float32: AssertionError: differs from the definition by" in out
    assert "2 of 4 checks failed" in out
