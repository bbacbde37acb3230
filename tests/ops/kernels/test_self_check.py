"""The self-check where Triton is: kernels for Hopper that give way, and the whole of it in the interpreter."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer, self_check
from proteinbert_fast.ops import backends
from proteinbert_fast.ops.kernels import launching
from proteinbert_fast.self_check import apart, compare, verdicts
from proteinbert_fast.self_check.apart import Outcome
from proteinbert_fast.self_check.compare import Kind
from tests.processes import ends

from .conftest import IS_INTERPRETED

SMALL = ProteinBertConfig(n_annotations=5, d_local=32, d_global=32, n_blocks=2, n_heads=2, d_key=16)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_check, "_failures", {})
    return tmp_path / "cache" / "self_check"


@pytest.fixture
def checks(monkeypatch):
    """Outcomes of the checks to come; ``ran`` has what was asked."""
    coming = SimpleNamespace(outcomes=[], ran=[])

    def check(kind, hopper, say):
        coming.ran.append((kind, hopper))
        return coming.outcomes.pop(0)

    monkeypatch.setattr(apart, "check", check)
    return coming


def asked(kind: Kind) -> str | None:
    """As a new process would."""
    self_check._failures.clear()
    with torch.set_grad_enabled(kind.gradients):
        return self_check.failure_reason(kind.device, kind.config, kind.dtype, kind.parameters)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU that would run the kernels for Hopper, without one."""
    module = sys.modules["proteinbert_fast.ops.kernels.local_block"]
    monkeypatch.setattr(module, "_distrusted", [])
    monkeypatch.setattr(launching, "capability", lambda index: 90)
    if module.portable_because(90, 128, torch.bfloat16) is not None:
        pytest.skip("this version of Triton has no kernel for Hopper")
    monkeypatch.setattr(verdicts, "_machine", lambda device: {"device": "NVIDIA H200"})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return module


GPU = Kind(torch.device("cuda", 0), ProteinBertConfig(), torch.bfloat16, torch.bfloat16, True, False)


def test_wrong_kernels_for_hopper_give_way_to_the_portable_ones(checks, hopper):
    checks.outcomes = [Outcome("results are off by 2", True), Outcome(None, True)]
    for _ in range(2):  # the second time from the file
        hopper._distrusted.clear()
        with pytest.warns(
            RuntimeWarning, match="kernels for Hopper fail their self-check on cuda:0: results are off by 2; the port"
        ):
            assert asked(GPU) is None
        assert hopper.portable_because(90, 128, torch.bfloat16) == "they failed a self-check: results are off by 2"
    assert [with_hopper for _, with_hopper in checks.ran] == [True, False]


def test_neither_kernel_is_right(checks, hopper):
    checks.outcomes = [Outcome("results are off by 2", True), Outcome("results are off by 3", True)]
    with pytest.warns(RuntimeWarning, match="the Triton kernels fail their self-check on cuda:0: results are off by 3"):
        assert asked(GPU) == "results are off by 3"
    assert hopper.portable_because(90, 128, torch.bfloat16).startswith("they failed a self-check: results are off by 2")


def test_the_portable_kernels_are_not_blamed_for_want_of_memory(checks, hopper):
    checks.outcomes = [Outcome("they could not be checked: out of memory", False)]
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert asked(GPU)
    assert hopper.portable_because(90, 128, torch.bfloat16) is None


def test_nothing_is_checked_while_a_graph_is_captured(checks, hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert asked(GPU) is None
    assert not checks.ran


# Planted before the process of the check begins.
BEGIN = f"""
import itertools, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
if {IS_INTERPRETED}:
    from tests.ops.kernels import interpreter
    interpreter.mend()
from proteinbert_fast.ops import backends
from proteinbert_fast.self_check import __main__, compare
right = backends._triton()
def plant(**wrong):
    backends._imported[:] = [backends.Operations(**{{**vars(right), **wrong}})]
calls = itertools.count()
PLANTED
sys.exit(__main__.main())
"""
MENDED = (sys.executable, "-P", "-c", BEGIN.replace("PLANTED", ""))
PLANTED = {
    "nothing": ("", None),
    "wrong numbers": (
        "plant(local_block=lambda *a: (right.local_block(*a)[0], right.local_block(*a)[1] * 1.01))",
        "results are off by",
    ),
    "wrong gradients": (
        # Right forward, and a gradient that is twice too large for whatever the mean reads.
        "plant(token_loss=lambda *a: 2 * right.token_loss(*a) - right.token_loss(*a).detach())",
        "gradients are off by",
    ),
    "other bits in a second run": (
        "plant(message=lambda *a: (m := right.message(*a))._replace(broadcast=m.broadcast * (1 + 1e-6 * next(calls))))",
        "ProteinBertError: the same batch has other numbers in a second run",
    ),
    "rows that nobody writes": (
        "import torch; plant(residue_mean=lambda rows, batch: torch.empty(len(batch), rows.shape[1]),"
        " global_track=lambda *a: right.global_track(*a)._replace(residue_mean=None))",
        "results are off by nan",
    ),
    "a crash": ("plant(message=lambda *a: __import__('os').abort())", "died: signal SIGABRT"),
    "a hang": (
        "plant(message=lambda *a: __import__('time').sleep(600))",
        "the self-check did not end within",
    ),
}


@pytest.mark.skipif(not IS_INTERPRETED, reason="stands for a GPU in the interpreter")
@pytest.mark.parametrize("what", PLANTED)
def test_the_process_sees_what_is_wrong(what, monkeypatch):
    code, failure = PLANTED[what]
    monkeypatch.setattr(compare, "LENGTHS", (1, 7, 40))
    monkeypatch.setattr(apart, "CHECK_SECONDS", 60.0 if what != "a hang" else 2.0)
    monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-P", "-c", BEGIN.replace("PLANTED", code)))
    kind = Kind(torch.device("cpu"), SMALL, torch.float32, torch.float32, True, what in {"nothing", "wrong gradients"})
    found = apart.check(kind, True, lambda *_: None)
    assert found.is_final
    assert found.failure is None if failure is None else failure in str(found.failure)


@pytest.mark.slow
def test_a_new_process_asks_no_more(device, monkeypatch, cache):
    """The whole way: a model, a process, a verdict on disk, and another process that only reads it."""
    if IS_INTERPRETED:
        monkeypatch.setattr(backends, "_is_gpu", lambda _: True)
        monkeypatch.setattr(compare, "LENGTHS", (1, 7, 40))
        monkeypatch.setattr(apart, "COMMAND", MENDED)
    model = ProteinBert(SMALL).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.backend_report() == "triton (the device is a CUDA GPU, and sizes and dtype fit)"
        assert len(list(cache.glob("*.json"))) == 1
        self_check._failures.clear()
        monkeypatch.setattr(apart, "check", lambda *_: pytest.fail("checked again"))
        assert model.backend_report().startswith("triton")
    with torch.no_grad():
        model(Tokenizer()(["MKT"]).to(device))


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux to see to it")
def test_a_check_ends_with_whoever_waits_for_it(tmp_path):
    """Killed, it cannot end the check itself."""
    (tmp_path / "hang.py").write_text(BEGIN.replace("PLANTED", PLANTED["a hang"][0]))
    job = json.dumps(apart.job_of(Kind(torch.device("cpu"), SMALL, torch.float32, torch.float32, True, False)))
    waits = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, {str(tmp_path / "hang.py")!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdin.write({job!r}.encode())
child.stdin.close()
while b"check" not in child.stdout.readline(): pass
print(child.pid, flush=True)
child.wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert ends(pid)
