"""Which back end is chosen, and that a slower choice is said, once."""

import importlib.util
import warnings
from types import SimpleNamespace

import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig, self_check
from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops import backends, reference

CONFIG = ProteinBertConfig(n_annotations=5)
GPU = torch.device("cuda")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing has been said or checked yet."""
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setattr(self_check, "_complaints", {})


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
@pytest.mark.parametrize(
    ("difference", "says"),
    [
        (lambda *_: 1.5, "results are off by 1.5e\\+00, allowed 0.0002"),
        (lambda *_: float("nan"), "results are off by nan"),
        (lambda *_: exec("raise RuntimeError('ptxas\\n died')"), "RuntimeError: ptxas died"),
    ],
)
def test_kernels_that_fail_their_self_check_are_not_used(monkeypatch, difference, says):
    monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
    monkeypatch.setattr(backends, "_no_triton", lambda *_: None)
    fake = backends.Operations(**{**vars(backends.REFERENCE), "name": "triton"})
    monkeypatch.setattr(backends, "_triton", lambda: fake)
    monkeypatch.setattr(self_check, "difference", difference)
    monkeypatch.setattr(self_check, "gradient_difference", lambda *_: 0.0)
    model = ProteinBert(CONFIG)
    with pytest.warns(RuntimeWarning, match=says) as said:
        report = model.backend_report()
    assert report.startswith("reference (the Triton kernels fail their self-check: ")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model._choose().operations is backends.REFERENCE


@pytest.mark.usefixtures("fresh")
def test_kernels_that_pass_are_used_and_checked_once_for_each_dtype(monkeypatch):
    monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
    monkeypatch.setattr(backends, "_no_triton", lambda *_: None)
    fake = backends.Operations(**{**vars(backends.REFERENCE), "name": "triton"})
    monkeypatch.setattr(backends, "_triton", lambda: fake)
    checked = []
    monkeypatch.setattr(self_check, "difference", lambda *kind: checked.append(kind) or 0.0)
    monkeypatch.setattr(self_check, "gradient_difference", lambda *_: 0.0)
    model = ProteinBert(CONFIG)
    for _ in range(2):
        assert model.backend_report() == "triton (the device is a CUDA GPU, and sizes and dtype fit)"
    model.bfloat16().backend_report()
    assert [dtype for _, _, dtype in checked] == [torch.float32, torch.bfloat16]


@pytest.mark.usefixtures("fresh")
def test_wrong_gradients_are_found_where_they_are_wanted(monkeypatch):
    monkeypatch.setattr(self_check, "difference", lambda *_: 0.0)
    monkeypatch.setattr(self_check, "gradient_difference", lambda *_: 0.2)
    cpu = torch.device("cpu")
    with torch.no_grad():
        assert self_check.complaint(cpu, CONFIG, torch.float32) is None
    with pytest.warns(RuntimeWarning, match="gradients are off by 2.0e-01 of their length, allowed 0.001"):
        assert self_check.complaint(cpu, CONFIG, torch.float32)


@pytest.mark.usefixtures("fresh")
def test_checking_leaves_no_trace_in_generators(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(3)
    seeded.clear()
    state = torch.get_rng_state()
    self_check.difference(torch.device("cpu"), CONFIG, torch.float32, backend="cpu")
    self_check.gradient_difference(torch.device("cpu"), CONFIG, torch.float32, backend="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


@pytest.mark.usefixtures("fresh")
def test_settings_of_either_kind_are_understood(monkeypatch):
    """PyTorch refuses to be asked the old way once a program has set TF32 in the new one."""
    monkeypatch.setattr(self_check, "_check", lambda kind: f"exact: {kind.is_exact}")
    matmul = torch.backends.cuda.matmul
    try:
        matmul.fp32_precision = "tf32"
        with pytest.warns(RuntimeWarning):
            assert self_check.complaint(torch.device("cpu"), CONFIG, torch.float32) == "exact: False"
    finally:
        matmul.fp32_precision = "ieee"


@pytest.mark.usefixtures("fresh")
def test_what_a_check_found_holds_under_compile(monkeypatch):
    from proteinbert_fast.model import ProteinBert

    monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
    monkeypatch.setattr(backends, "choose", lambda *_: backends.Choice(SimpleNamespace(name="triton"), "for a test"))
    monkeypatch.setattr(self_check, "complaint", lambda *_: "wrong")
    model = ProteinBert(ProteinBertConfig(n_annotations=5, d_local=32, d_global=64, n_blocks=1, n_heads=2, d_key=16))
    assert "fail their self-check: wrong" in model.backend_report()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(self_check, "complaint", lambda *_: pytest.fail("checked while it is compiled"))
    assert "fail their self-check: wrong" in model.backend_report()


def test_gradients_of_the_cpu_back_end_pass(monkeypatch):
    cpu = torch.device("cpu")
    assert self_check.gradient_difference(cpu, CONFIG, torch.float32, backend="cpu") < 1e-4
    monkeypatch.setattr(
        backends, "CPU", backends.Operations(**{**vars(backends.CPU), "message": lambda *a: _half(cpu_message(*a))})
    )
    assert self_check.gradient_difference(cpu, CONFIG, torch.float32, backend="cpu") > 0.01


def cpu_message(*arguments):
    return reference.message(*arguments)


def _half(message):
    return reference.Message(message.query, 0.5 * message.broadcast)


def test_the_check_itself_sees_a_wrong_back_end(monkeypatch):
    exact = self_check.difference(torch.device("cpu"), CONFIG, torch.float32, backend="cpu")
    assert exact < self_check.TOLERANCES[torch.float32]
    right = backends.CPU.global_track

    def wrong(local, global_state, *rest):
        track = right(local, global_state, *rest)
        return track._replace(global_state=track.global_state + 0.01)

    monkeypatch.setattr(backends, "CPU", backends.Operations(**{**vars(backends.CPU), "global_track": wrong}))
    assert self_check.difference(torch.device("cpu"), CONFIG, torch.float32, backend="cpu") > 0.005
