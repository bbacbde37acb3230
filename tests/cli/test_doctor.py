"""``proteinbert-fast doctor``."""

import re
from pathlib import Path

import pytest
import torch

from proteinbert_fast import Tokenizer, _cpu_kernels
from proteinbert_fast.cli import doctor
from proteinbert_fast.cli.main import main
from proteinbert_fast.weights import SHIPPED


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for word in ("proteinbert_fast", "Python", "torch", "h5py", "CPU", "cpu, float32", "the default", "proteinbert "):
        assert f"\n  {word}" in out or word in out
    assert "FAIL" not in out
    assert "pass  model on cpu in float32: largest difference from the definition" in out
    assert "all checks passed in" in out
    failure = _cpu_kernels.amx_failure()
    known = ", ".join(_cpu_kernels.instruction_sets())
    kernels = f"{_cpu_kernels.instruction_set()}, of {known}" + (f"; not amx_bf16: {failure}" if failure else "")
    assert f"\n  instruction set       {kernels}\n" in out
    for dtype in ("float32", "bfloat16") if "bf16" in _cpu_kernels.instruction_set() else ("float32",):
        peak = rf"\n  peak, {dtype} +[\d,]+ GFLOP/s in registers, matrix products reach \d+% of it\n"
        assert re.search(peak, out)


def test_weights_that_ship(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = dict(doctor._weights())["proteinbert-swissprot"]
    assert said.startswith("comes with the package (")
    monkeypatch.setitem(SHIPPED, "proteinbert-swissprot", tmp_path)
    assert dict(doctor._weights())["proteinbert-swissprot"].startswith("missing: install the package anew (")


def test_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: "M")
    monkeypatch.setattr(doctor, "TOLERANCES", {"float32": 0.0})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  tokenizer: AssertionError: decoding gives another text" in out
    assert "FAIL  model on cpu in float32: AssertionError: differs from the definition by" in out
    assert "2 of 4 checks failed" in out


def test_the_local_block_that_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: ((9, 0), (8, 0), (8, 0))[i])
    (ampere, ampere_says), (hopper, hopper_says) = doctor._local_block_kernels()
    assert ampere == hopper == "triton local block"
    assert ampere_says == ("bfloat16 on compute capability 8.0: portable (the compute capability is 8.0, not 9.0)")
    assert hopper_says.startswith("bfloat16 on compute capability 9.0: ")
    assert "hopper (the tile of x stays in shared memory)" in hopper_says or "portable (triton is " in hopper_says
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not list(doctor._local_block_kernels())
