"""Runs that CPU kernels of another instruction set have begun, and ranks that run different ones."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops.instruction_sets import KERNELS_VERSION
from proteinbert_fast.pretraining import run_state, trainer
from proteinbert_fast.pretraining.trainer import pretrain

from .runs import SMALL, log, same, stop_after, weights
from .test_pretrain import command, launcher

SETS = _cpu_kernels.instruction_sets()
# The first of AVX2 and what comes after, and what every CPU of the family has.
FIRST, OTHER = SETS[min(1, len(SETS) - 1)], SETS[0]
FIRST_RECORD, OTHER_RECORD = (f"{name}, version {KERNELS_VERSION}" for name in (FIRST, OTHER))
BOTH = f"{FIRST_RECORD}; {OTHER_RECORD}"
CONFIG = replace(SMALL, steps=4, validate_every=0)
pytestmark = [
    pytest.mark.skipif(len(SETS) < 2, reason=f"this CPU has {SETS[0]} alone"),
    pytest.mark.usefixtures("two_threads"),
]


@pytest.fixture(autouse=True)
def first_set() -> Iterator[None]:
    best = _cpu_kernels.instruction_set()
    _cpu_kernels.use_instruction_set(FIRST)
    yield
    _cpu_kernels.use_instruction_set(best)


def record_of(folder: Path) -> list[str]:
    """In the newest checkpoint, and in the run's description."""
    _, newest = run_state.checkpoints(folder / "checkpoints")[-1]
    return [json.loads(path.read_text())["kernels"] for path in (newest / "run.json", folder / "config.json")]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours: PyTorch writes of its own doings at any level."""
    ours = (record for record in caplog.records if record.name.startswith("proteinbert_fast"))
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


def refusal(folder: Path) -> str:
    return (
        f'{folder}/checkpoints/step-00000002: was computed by the kernels "{FIRST_RECORD}", whose bits are not those '
        f'of "{OTHER_RECORD}" here: set PROTEINBERT_FAST_ISA={FIRST}, or resume with --allow-different-kernels'
    )


def test_a_run_of_another_set_is_refused_or_names_both(small_corpus, tmp_path, caplog):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    pretrain(small_corpus, whole, CONFIG)
    pretrain(small_corpus, folder, CONFIG, should_stop=stop_after(2))
    assert record_of(folder) == [FIRST_RECORD] * 2
    _cpu_kernels.use_instruction_set(OTHER)
    with pytest.raises(InputError) as error:
        pretrain(small_corpus, folder, CONFIG, resume=True)
    assert str(error.value) == refusal(folder)
    assert record_of(folder) == [FIRST_RECORD] * 2
    caplog.set_level(logging.WARNING)
    done = pretrain(small_corpus, folder, CONFIG, resume=True, allow_different_kernels=True, should_stop=stop_after(1))
    assert warnings(caplog) == [
        f"{folder}/checkpoints/step-00000002: is continued by other kernels than those before ({BOTH}): "
        "bits differ from here on"
    ]
    assert (done.step, record_of(folder)) == (3, [BOTH] * 2)
    says = f'was computed by the kernels "{FIRST_RECORD}" and "{OTHER_RECORD}", whose bits .*: start again, or resume'
    for name in (OTHER, FIRST):
        _cpu_kernels.use_instruction_set(name)
        with pytest.raises(InputError, match=says):
            pretrain(small_corpus, folder, CONFIG, resume=True)
    assert pretrain(small_corpus, folder, CONFIG, resume=True, allow_different_kernels=True).is_complete
    assert record_of(folder) == [BOTH] * 2
    assert not same(weights(folder), weights(whole))


def test_a_refusal_spoils_nothing(small_corpus, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    pretrain(small_corpus, whole, CONFIG)
    pretrain(small_corpus, folder, CONFIG, should_stop=stop_after(2))
    _cpu_kernels.use_instruction_set(OTHER)
    with pytest.raises(InputError):
        pretrain(small_corpus, folder, CONFIG, resume=True)
    _cpu_kernels.use_instruction_set(FIRST)
    pretrain(small_corpus, folder, CONFIG, resume=True)
    assert same(weights(folder), weights(whole))
    assert log(folder) == log(whole)


def test_a_complete_run_of_another_set_is_left_alone(small_corpus, tmp_path):
    folder = tmp_path / "run"
    pretrain(small_corpus, folder, CONFIG)
    before = weights(folder)
    _cpu_kernels.use_instruction_set(OTHER)
    assert pretrain(small_corpus, folder, CONFIG, resume=True).is_complete
    assert same(before, weights(folder))
    assert record_of(folder) == [FIRST_RECORD] * 2
    # More steps would be made by the others.
    with pytest.raises(InputError, match=f"set PROTEINBERT_FAST_ISA={FIRST}, or resume with"):
        pretrain(small_corpus, folder, replace(CONFIG, steps=5), resume=True)


@pytest.fixture
def without_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints as an earlier version wrote them."""
    save = trainer.save_state

    def saved(folder: Path, step: int, state: run_state.RunState) -> Path:
        del state.facts["kernels"]
        return save(folder, step, state)

    monkeypatch.setattr(trainer, "save_state", saved)


def test_a_checkpoint_without_the_record(small_corpus, tmp_path, without_record):
    folder = tmp_path / "run"
    pretrain(small_corpus, folder, CONFIG, should_stop=stop_after(2))
    with pytest.raises(InputError) as error:
        pretrain(small_corpus, folder, CONFIG, resume=True)
    assert str(error.value) == (
        f"{folder}/checkpoints/step-00000002: does not say which kernels computed it, which may be others than "
        f'"{FIRST_RECORD}" here: start again, or resume with --allow-different-kernels'
    )
    done = pretrain(small_corpus, folder, CONFIG, resume=True, allow_different_kernels=True)
    assert done.is_complete
    assert json.loads((folder / "config.json").read_text())["kernels"] == f"unknown; {FIRST_RECORD}"
    assert pretrain(small_corpus, folder, CONFIG, resume=True).is_complete, "nothing more is computed"


def test_another_back_end_is_a_matter_of_rounding(small_corpus, tmp_path, caplog):
    folder = tmp_path / "run"
    pretrain(small_corpus, folder, CONFIG, backend="reference", should_stop=stop_after(2))
    assert record_of(folder) == [None] * 2
    caplog.set_level(logging.WARNING)
    pretrain(small_corpus, folder, CONFIG, resume=True, should_stop=stop_after(1))
    assert warnings(caplog) == [
        f"{folder}/checkpoints/step-00000002: backend was reference, is cpu: sums may round otherwise"
    ]
    assert record_of(folder) == [FIRST_RECORD] * 2
    pretrain(small_corpus, folder, CONFIG, backend="reference", resume=True)
    assert record_of(folder) == [FIRST_RECORD] * 2, "that took part"


@pytest.mark.slow
def test_ranks_of_different_sets_stop_or_are_named(small_corpus, tmp_path):
    """Two ranks, as on two machines: the second one is held to what every CPU has."""
    script = tmp_path / "mixed.py"
    script.write_text(
        "import os, sys\n"
        f"os.environ['PROTEINBERT_FAST_ISA'] = [{FIRST!r}, {OTHER!r}][int(os.environ['RANK'])]\n"
        "from proteinbert_fast.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    folder = tmp_path / "run"
    arguments = [*command(small_corpus, folder, "--steps", "3", "--validate-every", "0")[2:]]

    def run(*more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*launcher(2), str(script), *arguments, *more], env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip

    refused = run()
    assert refused.returncode == 1
    said = (
        f'proteinbert-fast: error: {folder}: rank 0 runs the kernels "{FIRST_RECORD}" and rank 1 "{OTHER_RECORD}", '
        f"whose bits differ: set PROTEINBERT_FAST_ISA={SETS[-1]} for all ranks, or start them with "
        "--allow-different-kernels\n"
    )
    # torchrun may end the second rank before it has said so.
    assert 1 <= refused.stderr.count(said) <= 2
    assert not (folder / "checkpoints").exists()
    allowed = run("--allow-different-kernels")
    assert allowed.returncode == 0, allowed.stderr
    assert allowed.stderr.count(f"warning: {folder}: ranks run different kernels ({BOTH}): bits differ\n") == 1
    assert record_of(folder) == [BOTH] * 2


@pytest.mark.slow
def test_resumed_in_another_process_of_another_set(small_corpus, tmp_path):
    folder = tmp_path / "run"

    def run(isa: str, *more: str) -> "subprocess.CompletedProcess[str]":
        arguments = command(small_corpus, folder, "--steps", "4", "--validate-every", "0", "--quiet", *more)
        return subprocess.run(
            [sys.executable, *arguments], env=os.environ | {"PROTEINBERT_FAST_ISA": isa}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip

    pretrain(small_corpus, folder, CONFIG, device="cpu", should_stop=stop_after(2))
    refused = run(OTHER, "--resume")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.splitlines()[-1] == f"proteinbert-fast: error: {refusal(folder)}"
    assert run(OTHER, "--resume", "--allow-different-kernels").returncode == 0
    assert record_of(folder) == [BOTH] * 2
