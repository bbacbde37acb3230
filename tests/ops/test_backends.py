"""Which back end is chosen, and that a slower choice is said, once."""

import importlib.util
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig, self_check
from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops import backends
from proteinbert_fast.self_check import apart
from proteinbert_fast.self_check.apart import Outcome

CONFIG = ProteinBertConfig(n_annotations=5)
GPU = torch.device("cuda")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing has been said or checked yet."""
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(self_check, "_failures", {})
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The CPU passes for a GPU with kernels, which are the plain operations by another name."""
    monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
    monkeypatch.setattr(backends, "_no_triton", lambda *_: None)
    fake = backends.Operations(**{**vars(backends.REFERENCE), "name": "triton"})
    monkeypatch.setattr(backends, "_triton", lambda: fake)


@pytest.mark.usefixtures("fresh")
def test_auto_says_once_why_a_gpu_runs_the_plain_operations(monkeypatch):
    monkeypatch.setattr(backends, "_no_triton", lambda *_: "d_local is 48, not one of 32, 64, 128, 256")
    with pytest.warns(RuntimeWarning, match="plain operations run, slower.*: d_local is 48") as said:
        choice = backends.choose("auto", GPU, CONFIG, torch.float32)
    assert choice.operations is backends.REFERENCE
    assert "d_local is 48" in choice.reason
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.choose("auto", GPU, CONFIG, torch.float32)
    monkeypatch.setattr(backends, "check_backend", lambda _: None)
    with pytest.raises(BackendError, match="backend 'triton' cannot run this: d_local is 48"):
        backends.choose("triton", GPU, CONFIG, torch.float32)


@pytest.mark.usefixtures("fresh")
def test_without_triton_its_back_end_says_how_to_get_it(monkeypatch):
    assert (importlib.util.find_spec("triton") is not None) == backends.HAS_TRITON
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    says = r"triton is not installed: pip install 'proteinbert-fast\[kernels\]'"
    with pytest.raises(BackendError, match=f"^backend 'triton': {says}$"):
        ProteinBert(CONFIG, backend="triton")
    with pytest.warns(RuntimeWarning, match=f"slower than the Triton kernels: {says}"):
        choice = backends.choose("auto", GPU, CONFIG, torch.float32)
    assert choice.operations is backends.REFERENCE


def test_a_forward_pass_does_not_look_for_triton(monkeypatch):
    """The search takes time in each, and torch.compile of PyTorch 2.11 cannot trace it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: pytest.fail("searched"))
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    backends.check_backend("triton")
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    assert "not installed" in backends._no_triton(GPU, CONFIG, torch.float32)


@pytest.mark.usefixtures("fresh")
def test_kernels_that_fail_their_self_check_are_not_used(monkeypatch, on_a_gpu):
    monkeypatch.setattr(apart, "check", lambda *_: Outcome("results are off by 1.5e+00, allowed 0.0002", True))
    model = ProteinBert(CONFIG)
    with pytest.warns(RuntimeWarning, match="results are off by 1.5") as said:
        report = model.backend_report()
    assert report.startswith("reference (the Triton kernels fail their self-check: results are off by 1.5")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model._choose().operations is backends.REFERENCE


@pytest.mark.usefixtures("fresh")
def test_kernels_that_pass_are_used_and_checked_once_for_each_dtype(monkeypatch, on_a_gpu):
    checked = []
    monkeypatch.setattr(apart, "check", lambda kind, *_: checked.append(kind) or Outcome(None, True))
    model = ProteinBert(CONFIG)
    for _ in range(2):
        assert model.backend_report() == "triton (the device is a CUDA GPU, and sizes and dtype fit)"
        with torch.autocast("cpu", torch.bfloat16):
            model.backend_report()
    model.bfloat16().backend_report()
    f32, bf16 = torch.float32, torch.bfloat16
    assert [(kind.dtype, kind.parameters) for kind in checked] == [(f32, f32), (bf16, f32), (bf16, bf16)]
    assert all(kind.gradients for kind in checked)


@pytest.mark.usefixtures("fresh")
def test_settings_of_either_kind_are_understood(monkeypatch):
    """PyTorch refuses to be asked the old way once a program has set TF32 in the new one."""
    monkeypatch.setattr(apart, "check", lambda kind, *_: Outcome(f"exact: {kind.is_exact}", True))
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        with pytest.warns(RuntimeWarning):
            assert self_check.failure_reason(torch.device("cpu"), CONFIG, torch.float32) == "exact: False"
    finally:
        matmul.fp32_precision = "ieee"


@pytest.mark.usefixtures("fresh")
def test_what_a_check_found_holds_under_compile(monkeypatch):
    from proteinbert_fast.model import ProteinBert

    monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice(SimpleNamespace(name="triton"), "for a test"))
    monkeypatch.setattr(self_check, "failure_reason", lambda *_: "wrong")
    model = ProteinBert(ProteinBertConfig(n_annotations=5, d_local=32, d_global=64, n_blocks=1, n_heads=2, d_key=16))
    assert "fail their self-check: wrong" in model.backend_report()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(self_check, "failure_reason", lambda *_: pytest.fail("checked while it is compiled"))
    assert "fail their self-check: wrong" in model.backend_report()


@pytest.mark.parametrize(
    ("switches", "says"),
    [
        ({"PROTEINBERT_FAST_KERNELS": "0"}, "PROTEINBERT_FAST_KERNELS=0 in the environment"),
        ({"PROTEINBERT_FAST_KERNELS": "no"}, "PROTEINBERT_FAST_KERNELS is 'no' in the environment: set 0 to turn"),
        ({"PROTEINBERT_FAST_HOPPER": "off"}, "PROTEINBERT_FAST_HOPPER is 'off' in the environment: set 0 to turn"),
        ({"PROTEINBERT_FAST_KERNELS": "1", "PROTEINBERT_FAST_HOPPER": ""}, "passed by"),
    ],
    ids=str,
)
def test_kernels_can_be_turned_off_by_the_environment(switches, says):
    code = """
import torch
from unittest.mock import patch
try:
    from proteinbert_fast import ProteinBertConfig
    from proteinbert_fast.ops import backends
    with patch.object(backends, "HAS_TRITON", False):
        obstacle = backends._no_triton(torch.device("cuda"), ProteinBertConfig(), torch.float32)
    print(obstacle if "KERNELS" in obstacle else "passed by")
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | switches, capture_output=True, text=True)
    assert done.stdout.startswith(says), done.stderr
