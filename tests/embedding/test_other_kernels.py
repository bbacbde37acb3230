"""Runs that CPU kernels of another instruction set have begun: refused in one line, or continued under a flag."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from proteinbert_fast import ProteinBert, _cpu_kernels, embed
from proteinbert_fast.embedding import pipeline
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops.instruction_sets import KERNELS_VERSION, kernels_in_use

from .test_interrupted import OPTIONS, digest, interrupted

SETS = _cpu_kernels.instruction_sets()
# The first of AVX2 and what comes after, and what every CPU of the family has.
FIRST, OTHER = SETS[min(1, len(SETS) - 1)], SETS[0]
FIRST_RECORD, OTHER_RECORD = (f"{name}, version {KERNELS_VERSION}" for name in (FIRST, OTHER))
pytestmark = pytest.mark.skipif(len(SETS) < 2, reason=f"this CPU has {SETS[0]} alone")


@pytest.fixture(autouse=True)
def first_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline, "_BATCHES_PER_WINDOW", 1)
    best = _cpu_kernels.instruction_set()
    _cpu_kernels.use_instruction_set(FIRST)
    yield
    _cpu_kernels.use_instruction_set(best)


def refusal(output: Path) -> str:
    return (
        f'{output}: was computed by the kernels "{FIRST_RECORD}", whose bits are not those of "{OTHER_RECORD}" here: '
        f"set PROTEINBERT_FAST_ISA={FIRST}, or resume with --allow-different-kernels"
    )


def attributes(path: Path) -> tuple[str, str]:
    with h5py.File(path) as file:
        return file.attrs["kernels"], json.loads(file.attrs["run"])["kernels"]


KILLED = """
import os, signal, sys
from proteinbert_fast.cli.main import main
from proteinbert_fast.embedding import partial, pipeline

partial.SHARD_SECONDS = 0.0
pipeline._BATCHES_PER_WINDOW = 1
rows, windows = pipeline.Embedder.rows, iter(range(100))


def dying(self, window):
    if next(windows) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows(self, window)


pipeline.Embedder.rows = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_with_one_set_and_resumed_with_another(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    """In processes of their own, as on the machines of a cluster."""
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "out.h5"
    command = ["embed", str(fasta), "--model", str(tmp_path / "model"), "--tokens-per-batch", "700"]
    command += ["--device", "cpu", "--dtype", "float32"]

    def run(isa: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, *arguments], env=os.environ | {"PROTEINBERT_FAST_ISA": isa}, capture_output=True,
            text=True, timeout=300, check=False,
        )  # fmt: skip

    for isa in (FIRST, OTHER):
        assert run(isa, "-m", "proteinbert_fast", *command, "-o", str(tmp_path / f"{isa}.h5")).returncode == 0
    assert run(FIRST, "-c", KILLED, *command, "-o", str(output)).returncode == -signal.SIGKILL
    resume = ["-m", "proteinbert_fast", *command, "-o", str(output), "--resume"]
    refused = run(OTHER, *resume)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"proteinbert-fast: error: {refusal(output)}\n"
    allowed = run(OTHER, *resume, "--allow-different-kernels")
    assert allowed.returncode == 0
    both = f"{FIRST_RECORD}; {OTHER_RECORD}"
    said = f"{output}: is continued by other kernels than those before ({both}): bits differ from here on"
    assert f"proteinbert-fast: warning: {said}\n" in allowed.stderr
    assert attributes(output) == (both, both)
    found, first, other = (h5py.File(tmp_path / f"{name}.h5")["embeddings"][:] for name in ("out", FIRST, OTHER))
    done = int(next(line.split()[1] for line in allowed.stdout.splitlines() if line.startswith("resumed")))
    assert 0 < done < len(found)
    assert np.array_equal(found, np.concatenate([first[:done], other[done:]]))


@pytest.mark.slow
def test_a_refusal_spoils_nothing(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    embed(fasta, tmp_path / "whole.h5", model=model, **OPTIONS)
    interrupted(model, fasta, output)
    _cpu_kernels.use_instruction_set(OTHER)
    for _ in range(2):
        with pytest.raises(InputError) as error:
            embed(fasta, output, model=model, resume=True, **OPTIONS)
        assert str(error.value) == refusal(output)
    _cpu_kernels.use_instruction_set(FIRST)
    assert embed(fasta, output, model=model, resume=True, **OPTIONS).resumed > 0
    assert digest(output) == digest(tmp_path / "whole.h5")


@pytest.mark.slow
def test_only_kernels_whose_work_is_there_are_named(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    """Allowed to go on, but interrupted before the first shard: the file is that of the first ones alone."""
    output = tmp_path / "out.h5"
    embed(fasta, tmp_path / "whole.h5", model=model, **OPTIONS)
    interrupted(model, fasta, output)
    manifest = json.loads((tmp_path / "out.h5.partial" / "manifest.json").read_text())
    assert manifest["run"]["kernels"] == FIRST_RECORD
    _cpu_kernels.use_instruction_set(OTHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.Embedder, "rows", lambda *_: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            embed(fasta, output, model=model, resume=True, allow_different_kernels=True, **OPTIONS)
    _cpu_kernels.use_instruction_set(FIRST)
    embed(fasta, output, model=model, resume=True, **OPTIONS)
    assert digest(output) == digest(tmp_path / "whole.h5")


@pytest.mark.slow
def test_a_run_of_several_kernels_goes_on_under_the_flag_alone(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    interrupted(model, fasta, output)
    _cpu_kernels.use_instruction_set(OTHER)
    interrupted(model, fasta, output, resume=True, allow_different_kernels=True)
    says = f'was computed by the kernels "{FIRST_RECORD}" and "{OTHER_RECORD}", whose bits .*: start again, or resume'
    for name in (FIRST, OTHER):
        _cpu_kernels.use_instruction_set(name)
        with pytest.raises(InputError, match=says):
            embed(fasta, output, model=model, resume=True, **OPTIONS)
    embed(fasta, output, model=model, resume=True, allow_different_kernels=True, **OPTIONS)
    assert attributes(output)[0] == f"{FIRST_RECORD}; {OTHER_RECORD}"


def test_a_complete_file_of_another_set(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    embed(fasta, output, model=model)
    before = digest(output)
    _cpu_kernels.use_instruction_set(OTHER)
    with pytest.raises(InputError) as error:
        embed(fasta, output, model=model, resume=True)
    assert str(error.value) == refusal(output)
    assert embed(fasta, output, model=model, resume=True, allow_different_kernels=True).seconds == 0
    assert digest(output) == before


@pytest.mark.slow
def test_an_interrupted_replacement_of_another_sets_file_is_resumed(
    model: ProteinBert, fasta: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    embed(fasta, output, model=model)
    _cpu_kernels.use_instruction_set(OTHER)
    interrupted(model, fasta, output, overwrite=True)
    assert attributes(output)[0] == FIRST_RECORD
    assert embed(fasta, output, model=model, resume=True, **OPTIONS).resumed > 0
    assert attributes(output)[0] == OTHER_RECORD


def without_record(run: dict[str, object]) -> str:
    del run["kernels"]
    return json.dumps(run)


def test_a_complete_file_without_the_record_is_left_alone(
    model: ProteinBert, fasta: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out.h5"
    embed(fasta, output, model=model)
    with h5py.File(output, "r+") as file:
        file.attrs["run"] = without_record(json.loads(file.attrs["run"]))
    caplog.set_level(logging.WARNING, "proteinbert_fast")
    assert embed(fasta, output, model=model, resume=True).seconds == 0
    assert caplog.messages == [f"{output}: is complete, and does not say which kernels computed it"]


@pytest.mark.slow
def test_an_interrupted_run_without_the_record_is_refused(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output, manifest = tmp_path / "out.h5", tmp_path / "out.h5.partial" / "manifest.json"
    interrupted(model, fasta, output)
    kept = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(kept | {"run": json.loads(without_record(kept["run"]))}))
    with pytest.raises(InputError) as error:
        embed(fasta, output, model=model, resume=True, **OPTIONS)
    assert str(error.value) == (
        f'{output}: does not say which kernels computed it, which may be others than "{kernels_in_use()}" here: '
        "start again, or resume with --allow-different-kernels"
    )
    embed(fasta, output, model=model, resume=True, allow_different_kernels=True, **OPTIONS)
    assert attributes(output)[0] == f"unknown; {kernels_in_use()}"


def test_another_back_end_keeps_no_record(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    reference = ProteinBert(model.config, backend="reference")
    reference.load_state_dict(model.state_dict())
    embed(fasta, tmp_path / "out.h5", model=reference)
    _cpu_kernels.use_instruction_set(OTHER)
    assert embed(fasta, tmp_path / "out.h5", model=reference, resume=True).seconds == 0
    with h5py.File(tmp_path / "out.h5") as file:
        assert "kernels" not in file.attrs


def test_the_flag_is_for_an_output_file(model: ProteinBert, fasta: Path) -> None:
    with pytest.raises(InputError, match="allow_different_kernels and layout are for an output file"):
        embed(fasta, model=model, allow_different_kernels=True)  # type: ignore[call-overload]
