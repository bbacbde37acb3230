"""The process of a self-check: whatever it does, this process goes on, and knows what happened."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from proteinbert_fast import ProteinBertConfig
from proteinbert_fast.self_check import apart
from proteinbert_fast.self_check.compare import Kind
from tests.processes import ends

CPU = torch.device("cpu")
SMALL = ProteinBertConfig(n_annotations=5, d_local=32, d_global=32, n_blocks=1, n_heads=2, d_key=16)
KIND = Kind(CPU, SMALL, torch.float32, torch.float32, True, True)
PREAMBLE = """
import json, os, signal, subprocess, sys, time
job = json.loads(sys.stdin.read())
def say(**values):
    print(json.dumps(values | {"token": job["token"]}), flush=True)
say(begun="compile")
"""
GOOD = 'say(begun="check"); say(measured=[1e-6, 1e-6])'


@pytest.fixture
def check(monkeypatch):
    """Runs a fake check; what was said of its progress is in ``said``."""

    def run(code: str, hopper: bool = True, kind: Kind = KIND, preamble: str = PREAMBLE) -> apart.Outcome:
        monkeypatch.setattr(apart, "COMMAND", (sys.executable, "-c", preamble + textwrap.dedent(code)))
        run.said = []
        return apart.check(kind, hopper, lambda *what: run.said.append(what))

    return run


def test_a_good_one_passes_and_says_how_far_it_is(check):
    assert check('say(compiled=1, of=2); say(compiled=2, of=2); say(begun="check"); say(measured=[1e-6, 1e-6])') == (
        None,
        True,
    )
    assert check.said == [
        ("compiling GPU kernels", 1, 2),
        ("compiling GPU kernels", 2, 2),
        ("checking GPU kernels", 0, 1),
    ]


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process of the self-check died: signal SIGSEGV"),
        ('sys.exit("CUDA error: an illegal memory access")', "died: exit code 1: CUDA error: an illegal memory access"),
        ("os._exit(0)", "the process of the self-check ended without a result"),
        # A result that is followed by a crash is none: CUDA's errors come late.
        (f"{GOOD}; os.kill(os.getpid(), signal.SIGABRT)", "the process of the self-check died: signal SIGABRT"),
        ('say(failed="RuntimeError: ptxas died")', "RuntimeError: ptxas died"),
        ("say(measured=[1.5, 1e-6])", "results are off by 1.5e+00, allowed 0.0002"),
        ('say(measured=[float("nan"), 1e-6])', "results are off by nan, allowed 0.0002"),
        ("say(measured=[1e-6, 0.2])", "gradients are off by 2.0e-01 of their length, allowed 0.001"),
        ('say(measured=[1e-6, float("inf")])', "gradients are off by inf of their length, allowed 0.001"),
        ("say(measured=[1e-6, None])", "gradients were not checked"),
        ("say(measured=[1e-6])", "the process of the self-check ended without a result"),
        ('say(measured="fine")', "the process of the self-check ended without a result"),
        # Somebody else's lines, torn lines and garbage are no results.
        ('print(json.dumps({"measured": [0, 0]}))', "the process of the self-check ended without a result"),
        ('print(json.dumps({"measured": [0, 0], "token": "x"}))', "ended without a result"),
        ('sys.stdout.write(json.dumps({"measured": [0, 0], "token": job["token"]})[:-1])', "ended without a result"),
        (r'sys.stdout.buffer.write(b"\xff\x00{{[" * 9999); sys.stdout.flush()', "ended without a result"),
    ],
)
def test_what_dies_or_lies_fails_for_good(check, code, failure):
    found = check(code)
    assert failure in str(found.failure)
    assert found.is_final


@pytest.mark.parametrize(
    ("code", "preamble", "failure"),
    [
        ('say(unable="out of memory on cuda:0")', PREAMBLE, "they could not be checked: out of memory on cuda:0"),
        ('sys.exit("no module named torch")', "import sys; ", "did not begin: exit code 1: no module named torch"),
        ("", "import os; os._exit(7)", "the process of the self-check did not begin: exit code 7"),
    ],
)
def test_what_could_not_be_checked_is_asked_again(check, code, preamble, failure):
    found = check(code, preamble=preamble)
    assert failure in str(found.failure)
    assert not found.is_final


def test_a_command_that_is_not_there(monkeypatch):
    monkeypatch.setattr(apart, "COMMAND", ("/nonexistent/python",))
    found = apart.check(KIND, True, lambda *_: None)
    assert found.failure.startswith("the process of the self-check could not be started: ")
    assert not found.is_final


@pytest.mark.parametrize(
    ("code", "doing", "is_final"),
    [
        ("time.sleep(600)", "compiling", False),
        ('say(begun="check"); time.sleep(600)', "checking", True),
        # Deaf to polite signals, and printing all the time.
        (
            'signal.signal(signal.SIGTERM, signal.SIG_IGN); say(begun="check")\nwhile True: say(compiled=1, of=2)',
            "checking",
            True,
        ),
        # Both pipes closed, still running.
        ('say(begun="check"); os.close(1); os.close(2); time.sleep(600)', "checking", True),
    ],
)
def test_what_hangs_is_ended_with_all_that_it_started(check, monkeypatch, tmp_path, code, doing, is_final):
    monkeypatch.setattr(apart, "SECONDS", 1.5)
    monkeypatch.setattr(apart, "CHECK_SECONDS", 1.5)
    pids = tmp_path / "pids"
    start = f"""
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
"""
    found = check(code, preamble=PREAMBLE + start)
    assert found.failure.startswith("the self-check did not end within ")
    assert found.failure.endswith(f"s ({doing})")
    assert found.is_final == is_final
    for pid in map(int, pids.read_text().split()):
        assert ends(pid)


def test_what_it_started_may_keep_its_pipe_open(check):
    """A result counts once the process has ended, whoever still holds its standard output."""
    found = check(f'{GOOD}; subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])')
    assert found == (None, True)


def test_a_flood_is_read_and_forgotten(check):
    assert check(f'for _ in range(20_000): print("x" * 999)\n{GOOD}') == (None, True)
    assert check(f'print("y" * 30_000_000)\n{GOOD}') == (None, True)


def test_the_process_knows_what_to_check(check, monkeypatch):
    monkeypatch.setenv("PROTEINBERT_FAST_HOPPER", "")
    code = """
    known = {key: job[key] for key in ("device", "dtype", "parameters", "is_exact", "gradients", "config")}
    say(failed=json.dumps([known, os.environ["PROTEINBERT_FAST_HOPPER"], os.environ["CUBLAS_WORKSPACE_CONFIG"],
                           sum(job["lengths"]) > 40_000]))
    """
    kind = Kind(CPU, SMALL, torch.bfloat16, torch.float32, False, False)
    for hopper in (True, False):
        known, switch, workspace, is_large = json.loads(str(check(code, hopper, kind).failure))
        assert known == {
            "device": "cpu", "dtype": "bfloat16", "parameters": "float32", "is_exact": False, "gradients": False,
            "config": SMALL.to_dict(),
        }  # fmt: skip
        assert switch == ("" if hopper else "0")
        assert workspace == ":4096:8"
        assert is_large


def test_a_folder_of_the_users_does_not_stand_in_for_a_module(tmp_path, monkeypatch):
    """A file random.py where the user happens to be is not imported."""
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')")
    monkeypatch.chdir(tmp_path)
    code = "import sys; sys.argv = ['x']; import random; print('right')"
    command = [*apart.COMMAND[:2], "-c", code]
    assert command[1] == "-P"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "right\n"
