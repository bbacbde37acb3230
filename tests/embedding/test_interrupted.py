"""Interrupted runs: killed at any moment, resumed, and the same bytes in the end; other runs are not
resumed.
"""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from proteinbert_fast import ProteinBert, embed
from proteinbert_fast.data.fasta import read_fasta
from proteinbert_fast.embedding import api, hdf5, partial, pipeline
from proteinbert_fast.errors import InputError, ProteinBertError

pytestmark = pytest.mark.slow


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stop(Exception):
    """Ends a run from within."""


def interrupt_after(patch: pytest.MonkeyPatch, windows: int, error: type[BaseException] = Stop) -> None:
    """Makes the computation fail when so many windows are done; each is a shard."""
    patch.setattr(partial, "SHARD_SECONDS", 0.0)
    rows = pipeline.Embedder.rows
    done = iter(range(1000))

    def limited(self: pipeline.Embedder, window: pipeline.Window) -> Any:
        if next(done) == windows:
            raise error
        return rows(self, window)

    patch.setattr(pipeline.Embedder, "rows", limited)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_BATCHES_PER_WINDOW", 1)


OPTIONS: dict[str, Any] = {"tokens_per_batch": 700}
KILLED = """
import os, signal, sys
os.environ["OMP_NUM_THREADS"] = "1"
import torch
torch.set_num_threads(1)
from proteinbert_fast import ProteinBert, ProteinBertConfig, embed
from proteinbert_fast.embedding import partial, pipeline

fasta, folder, per, layout = sys.argv[1:]
os.chdir(folder)
partial.SHARD_SECONDS = 0.0
pipeline._BATCHES_PER_WINDOW = 1
torch.manual_seed(0)
model = ProteinBert(ProteinBertConfig(n_annotations=9, d_local=32, d_global=64, n_blocks=1, n_heads=2,
d_key=16))


def run(output, **options):
    return embed(fasta, output, model=model, per=per, layout=layout, tokens_per_batch=700, progress=False,
    **options)


def killed_at(call):
    # Counts every call that changes the disk, and kills the process before one of them.
    calls = iter(range(100_000))

    def counted(function):
        def wrapper(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper

    for name in ("write", "pwrite", "ftruncate", "fsync", "replace", "unlink", "rmdir", "makedirs"):
        setattr(os, name, counted(getattr(os, name)))


run("whole.h5")
whole = open("whole.h5", "rb").read()
call, step, completed = 0, 1, False
while not completed:
    child = os.fork()
    if child == 0:
        killed_at(call)
        run("out.h5")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    completed = not os.WIFSIGNALED(status)
    assert completed or os.WTERMSIG(status) == signal.SIGKILL, status
    summary = run("out.h5", resume=True)
    assert open("out.h5", "rb").read() == whole, call
    assert sorted(os.listdir(".")) == ["out.h5", "whole.h5"], (call, os.listdir("."))
    print(call, summary.resumed)
    os.unlink("out.h5")
    call += step
    step = 1 if call < 30 else 6  # every call of the first shards, then some of the others
"""


@pytest.mark.parametrize(("per", "layout"), [("protein", "flat"), ("residue", "flat"), ("protein", "uniprot")])
def test_killed_before_any_change_of_the_disk(fasta: Path, tmp_path: Path, per: str, layout: str) -> None:
    # Newer Pythons warn of any fork in a process with threads; here none of them holds a lock.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(fasta), str(tmp_path), per, layout]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    resumed = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(resumed) > 35
    assert set(resumed) > {0, 24}
    assert len(set(resumed)) > 4


@pytest.mark.parametrize("windows", [0, 1, 3])
@pytest.mark.parametrize("per", ["protein", "residue"])
def test_resumed_run_gives_the_same_bytes(
    model: ProteinBert, fasta: Path, tmp_path: Path, per: Any, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    embed(fasta, tmp_path / "whole.h5", model=model, per=per, **OPTIONS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, windows)
        with pytest.raises(Stop):
            embed(fasta, output, model=model, per=per, **OPTIONS)
    assert not output.exists()
    assert (tmp_path / "out.h5.partial").exists() == (windows > 0)
    summary = embed(fasta, output, model=model, per=per, resume=True, **OPTIONS)
    assert (summary.resumed > 0) == (windows > 0)
    assert digest(output) == digest(tmp_path / "whole.h5")
    assert sorted(os.listdir(tmp_path)) == ["out.h5", "whole.h5"]


def test_work_since_the_last_shard_is_kept_after_an_error(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        patch.setattr(partial, "SHARD_SECONDS", 1e9)
        with pytest.raises(Stop):
            embed(fasta, tmp_path / "out.h5", model=model, **OPTIONS)
    manifest = json.loads((tmp_path / "out.h5.partial" / "manifest.json").read_text())
    assert len(manifest["shards"]) == 1
    assert embed(fasta, tmp_path / "out.h5", model=model, resume=True, **OPTIONS).resumed >= 3


def test_ctrl_c_says_what_is_safe(
    model: ProteinBert,
    fasta: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(fasta, tmp_path / "out.h5", model=model, **OPTIONS)
    assert re.fullmatch(
        rf"interrupted: \d+ records are safe in {tmp_path}/out\.h5\.partial; go on with --resume", caplog.messages[-1]
    )
    embed(fasta, tmp_path / "out.h5", model=model, resume=True, **OPTIONS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 0, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            embed(fasta, tmp_path / "new.h5", model=model, **OPTIONS)
    assert caplog.messages[-1] == "interrupted: no record was done yet"
    assert os.listdir(tmp_path) == ["out.h5"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_any_change_of_the_disk(
    model: ProteinBert, fasta: Path, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes, it stays an interrupt, and the run can be resumed."""
    records = list(read_fasta(fasta))[:8]
    output = tmp_path / "out.h5"
    embed(records, tmp_path / "whole.h5", model=model, **OPTIONS)
    names = ("write", "pwrite", "ftruncate", "fsync", "replace", "unlink", "makedirs", "close")
    for call in range(200):
        calls = iter(range(100_000))

        def interrupted(function: Any, calls: Any = calls, call: int = call) -> Any:
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                now = next(calls) == call and threading.current_thread() is threading.main_thread()
                if now and when == "before":
                    raise KeyboardInterrupt
                result = function(*args, **kwargs)
                if now:
                    raise KeyboardInterrupt
                return result

            return wrapper

        with monkeypatch.context() as patch:
            patch.setattr(partial, "SHARD_SECONDS", 0.0)
            for name in names:
                patch.setattr(os, name, interrupted(getattr(os, name)))
            try:
                embed(records, output, model=model, **OPTIONS)
                break
            except KeyboardInterrupt:
                pass
        embed(records, output, model=model, resume=True, **OPTIONS)
        assert digest(output) == digest(tmp_path / "whole.h5")
        assert sorted(os.listdir(tmp_path)) == ["out.h5", "whole.h5"], call
        output.unlink()
    assert 40 < call < 199


def test_no_thread_is_left_behind(model: ProteinBert, fasta: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Stop):
            embed(fasta, model=model, **OPTIONS)
    assert not any(thread.name == "reader" for thread in threading.enumerate())


def interrupted(model: ProteinBert, fasta: Path, output: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Stop):
            embed(fasta, output, model=model, **{**OPTIONS, **options})


def test_interrupted_run_is_not_overwritten_by_chance(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    interrupted(model, fasta, output)
    with pytest.raises(InputError, match=r"an interrupted run is in .*; go on with --resume, or start again"):
        embed(fasta, output, model=model, **OPTIONS)
    summary = embed(fasta, output, model=model, overwrite=True, **OPTIONS)
    assert summary.resumed == 0
    assert os.listdir(tmp_path) == ["out.h5"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per": "residue"}, 'per was "protein", now "residue"'),
        ({"pooling": "both"}, 'pooling was "global", now "both"'),
        ({"layers": "all"}, "layers was [3], now [1, 2, 3]"),
        ({"layers": "original"}, 'layers was [3], now "original"'),
        ({"dtype": "bfloat16"}, 'dtype was "float32", now "bfloat16"'),
        ({"storage_dtype": "float32"}, 'storage_dtype was "float16", now "float32"'),
        ({"layout": "uniprot"}, 'layout was "flat", now "uniprot"'),
        ({"max_length": 100}, "max_length was null, now 100"),
        ({"lowercase": "upper"}, 'lowercase was "other", now "upper"'),
        ({"duplicates": "first"}, 'duplicates was "refuse", now "first"'),
    ],
)
def test_resume_with_other_settings_is_refused(
    model: ProteinBert, fasta: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    output = tmp_path / "out.h5"
    interrupted(model, fasta, output)
    with pytest.raises(InputError) as error:
        embed(fasta, output, model=model, resume=True, **OPTIONS, **options)
    assert str(error.value) == f"{output}: cannot resume: {says}; start again with --overwrite"
    # A refusal spoils nothing.
    assert embed(fasta, output, model=model, resume=True, **OPTIONS).resumed > 0
    with pytest.raises(InputError) as error:
        embed(fasta, output, model=model, resume=True, **OPTIONS, **options)
    assert str(error.value) == f"{output}: cannot resume: {says}; replace it with --overwrite"


def test_resume_with_another_model_is_refused(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    interrupted(model, fasta, tmp_path / "out.h5")
    with pytest.raises(InputError, match="cannot resume: weights_sha256 was"):
        embed(fasta, tmp_path / "out.h5", model=ProteinBert(model.config), resume=True, **OPTIONS)
    # The same weights under another name are the same weights.
    model.checkpoint_source, before = "elsewhere", model.checkpoint_source
    try:
        embed(fasta, tmp_path / "out.h5", model=model, resume=True, **OPTIONS)
    finally:
        model.checkpoint_source = before


def test_resume_with_another_input_is_refused(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output, mine = tmp_path / "out.h5", tmp_path / "mine.fasta"
    mine.write_bytes(fasta.read_bytes())
    interrupted(model, mine, output)
    with pytest.raises(InputError, match=r'input was \["mine.fasta"\], now \["proteins.fasta"\]'):
        embed(fasta, output, model=model, resume=True, **OPTIONS)
    mine.write_bytes(fasta.read_bytes().replace(b"A", b"C", 1))
    with pytest.raises(InputError, match=r"the content of mine.fasta has changed"):
        embed(mine, output, model=model, resume=True, **OPTIONS)
    mine.write_bytes(fasta.read_bytes())
    embed(mine, output, model=model, resume=True, **OPTIONS)


def test_input_that_changes_under_the_run_is_noticed(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine.fasta"
    mine.write_bytes(fasta.read_bytes())
    prepare = api._prepare

    def change(*args: Any) -> Any:
        job = prepare(*args)
        mine.write_bytes(fasta.read_bytes().replace(b"A", b"C", 1))
        return job

    monkeypatch.setattr(api, "_prepare", change)
    with pytest.raises(InputError, match="has changed since it was checked"):
        embed(mine, tmp_path / "out.h5", model=model)


def test_complete_output_is_left_alone_by_resume(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    first = embed(fasta, output, model=model, resume=True)
    assert first.resumed == 0
    before = output.stat().st_mtime_ns, output.stat().st_ino
    again = embed(fasta, output, model=model, resume=True)
    assert (again.resumed, again.seconds) == (24, 0.0)
    assert (output.stat().st_mtime_ns, output.stat().st_ino) == before
    assert os.listdir(tmp_path) == ["out.h5"]
    # Killed between the last rename and the end of tidying up.
    with monkeypatch.context() as patch:
        patch.setattr(partial.PartialRun, "finish", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            embed(fasta, output, model=model, overwrite=True)
    assert (tmp_path / "out.h5.partial").exists()
    assert embed(fasta, output, model=model, resume=True).resumed == 24
    assert os.listdir(tmp_path) == ["out.h5"]


def test_overwriting_keeps_the_old_output_until_the_new_one_is_complete(
    model: ProteinBert, fasta: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    embed(fasta, output, model=model)
    old = digest(output)
    interrupted(model, fasta, output, layers="all", overwrite=True)
    assert digest(output) == old
    embed(fasta, output, model=model, layers="all", resume=True, **OPTIONS)
    with h5py.File(output) as file:
        assert file.attrs["layers"] == "[1, 2, 3]"


def test_output_that_appears_meanwhile_is_not_replaced(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.h5"
    write = hdf5._write_attributes

    def appear(*args: Any) -> None:
        output.write_text("something dear")
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(hdf5, "_write_attributes", appear)
        with pytest.raises(InputError, match="was made meanwhile; move it away and go on with --resume"):
            embed(fasta, output, model=model)
    with pytest.raises(InputError, match="another run has made it meanwhile; move it away to resume"):
        embed(fasta, output, model=model, resume=True)
    assert output.read_text() == "something dear"
    output.unlink()
    assert embed(fasta, output, model=model, resume=True).resumed == 24


def test_two_processes_cannot_write_the_same_output(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    with partial.PartialRun(str(output), resume=False, overwrite=False):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"out\.h5: another process is writing it now"):
                embed(fasta, output, model=model, **options)
    assert os.listdir(tmp_path) == []
    embed(fasta, output, model=model)


def test_files_of_others_in_the_folder_are_left_alone(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out.h5.partial"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    embed(fasta, tmp_path / "out.h5", model=model)
    assert os.listdir(folder) == ["notes.txt"]


def test_resume_after_another_version_is_refused(
    model: ProteinBert, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(model, fasta, tmp_path / "out.h5")
    monkeypatch.setattr(partial.PartialRun, "MANIFEST_SCHEMA", 2)
    with pytest.raises(InputError, match="was made by another version; start again with --overwrite"):
        embed(fasta, tmp_path / "out.h5", model=model, resume=True, **OPTIONS)


def test_batch_size_may_change_where_it_does_not_matter(model: ProteinBert, fasta: Path, tmp_path: Path) -> None:
    """A run that ended for want of memory goes on with smaller batches."""
    interrupted(model, fasta, tmp_path / "out.h5")
    embed(fasta, tmp_path / "out.h5", model=model, resume=True, tokens_per_batch=300)
    embed(fasta, tmp_path / "whole.h5", model=model)
    assert digest(tmp_path / "out.h5") == digest(tmp_path / "whole.h5")
    reference = ProteinBert(model.config, backend="reference")
    reference.load_state_dict(model.state_dict())
    interrupted(reference, fasta, tmp_path / "reference.h5")
    with pytest.raises(InputError, match="tokens_per_batch was 700, now 300"):
        embed(fasta, tmp_path / "reference.h5", model=reference, resume=True, tokens_per_batch=300)


def test_overflow_is_remembered(
    fasta: Path, tmp_path: Path, model: ProteinBert, caplog: pytest.LogCaptureFixture
) -> None:
    large = ProteinBert(model.config)
    large.load_state_dict(model.state_dict())
    with torch.no_grad():
        large.blocks[-1].global_norm2.weight.mul_(1e6)
    interrupted(large, fasta, tmp_path / "out.h5")
    summary = embed(fasta, tmp_path / "out.h5", model=large, resume=True, **OPTIONS)
    assert summary.overflowed == 24
    with h5py.File(tmp_path / "out.h5") as file:
        assert file.attrs["n_overflowed"] == 24
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 24


def test_nothing_is_left_when_nothing_was_done(model: ProteinBert, tmp_path: Path) -> None:
    bad = tmp_path / "bad.fasta"
    bad.write_text(">A\nMKT\n>B\n")
    for _ in range(2):
        with pytest.raises(ProteinBertError, match="record B: the sequence is empty"):
            embed(bad, tmp_path / "out.h5", model=model)
        assert os.listdir(tmp_path) == ["bad.fasta"]
