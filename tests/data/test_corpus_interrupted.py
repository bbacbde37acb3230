"""Interrupted builds: killed at any moment, resumed, and the same bytes in the end; full disks; other builds."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proteinbert_fast.data.corpus import build as building
from proteinbert_fast.data.corpus import build_corpus, runs, verify_corpus
from proteinbert_fast.errors import InputError, ProteinBertError
from tests.data.conftest import xml, xml_entry

pytest.importorskip("fastobo")

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


@pytest.fixture
def inputs(tmp_path: Path, obo: Path) -> dict[str, Any]:
    """Two files of proteins and one of terms, and options that make several runs and ranges of them."""
    draw = random.Random(0)

    def residues() -> str:
        return "".join(draw.choices(AMINO_ACIDS, k=draw.randrange(1, 50)))

    def term() -> str:
        return f"GO:000000{draw.randrange(1, 5)}"

    entries = [xml_entry(f"X{i}", residues(), (term(), term())) for i in range(60)]
    (tmp_path / "a.xml").write_text(xml(*entries))
    (tmp_path / "b.fasta").write_text("".join(f">F{i}\n{residues()}\n" for i in range(60)))
    (tmp_path / "c.tsv").write_text("".join(f"F{i}\t{term()};{term()}\n" for i in range(0, 60, 2)))
    return {
        "proteins": [tmp_path / "a.xml", tmp_path / "b.fasta"],
        "annotations": [tmp_path / "c.tsv"],
        "ontology": obo,
        "min_count": 1,
        "test": 0.2,
        "workers": 1,
    }


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "RUN_BYTES", 1)
    monkeypatch.setattr(building, "RANGE_BYTES", 2000)
    monkeypatch.setattr("proteinbert_fast.data.corpus.sources._ROWS", 13)
    monkeypatch.setattr("proteinbert_fast.data.fasta._CHUNK", 5000)


KILLED = """
import os, signal, sys
from proteinbert_fast.data import fasta
from proteinbert_fast.data.corpus import build, build_corpus, runs, sources

folder, obo = sys.argv[1:]
os.chdir(folder)
runs.RUN_BYTES, build.RANGE_BYTES, sources._ROWS, fasta._CHUNK = 1, 2000, 13, 5000


def run(output, **options):
    return build_corpus(["a.xml", "b.fasta"], output, annotations=["c.tsv"], ontology=obo, min_count=1, test=0.2,
                        workers=1, progress=False, **options)


def killed_at(call):
    calls = iter(range(100_000))

    def counted(function):
        def wrapper(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper

    for name in ("write", "pwrite", "ftruncate", "fsync", "replace", "unlink", "rmdir", "makedirs"):
        setattr(os, name, counted(getattr(os, name)))
    for module in (runs, build):
        for name in ("write_all", "remove", "flush_folder"):
            if hasattr(module, name):
                setattr(module, name, counted(getattr(module, name)))


run("whole.h5")
whole = open("whole.h5", "rb").read()
inputs = set(os.listdir("."))
call, completed = 0, False
while not completed:
    child = os.fork()
    if child == 0:
        killed_at(call)
        run("out.h5")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    completed = not os.WIFSIGNALED(status)
    assert completed or os.WTERMSIG(status) == signal.SIGKILL, status
    if os.path.exists("out.h5"):
        assert open("out.h5", "rb").read() == whole, call
    left = os.listdir("out.h5.partial") if os.path.exists("out.h5.partial") else []
    kept = sum(name.endswith(".bin") for name in left)
    run("out.h5", resume=True)
    assert open("out.h5", "rb").read() == whole, call
    assert set(os.listdir(".")) - inputs == {"out.h5"}, (call, os.listdir("."))
    print(call, kept)
    os.unlink("out.h5")
    call += 1 if call < 12 else 9  # every call of the first runs, then some of the others
"""


def test_killed_before_any_change_of_the_disk(inputs: dict[str, Any], tmp_path: Path) -> None:
    # Newer Pythons warn of any fork in a process with threads; here none of them runs any more.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, str(tmp_path), str(inputs["ontology"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    kept = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(kept) > 20
    assert len(set(kept)) > 8


class Stop(Exception):
    """Ends a build from within."""


@pytest.mark.parametrize("after", [0, 1, 5, 9])
def test_resumed_build_gives_the_same_bytes(
    inputs: dict[str, Any], tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_corpus(output=tmp_path / "whole.h5", **inputs)
    out = tmp_path / "out.h5"
    add_run, done = runs.PartialBuild.add_run, iter(range(100))

    def limited(self: runs.PartialBuild, *args: Any) -> None:
        if next(done) >= after:
            raise Stop
        add_run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(runs.PartialBuild, "add_run", limited)
        with pytest.raises(Stop):
            build_corpus(output=out, **inputs)
    assert not out.exists()
    assert (tmp_path / "out.h5.partial").exists() == (after > 0)
    if after:
        with pytest.raises(InputError, match=r"an interrupted build is in .*; go on with --resume, or start again"):
            build_corpus(output=out, **inputs)
    build_corpus(output=out, resume=True, **inputs)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not (tmp_path / "out.h5.partial").exists()
    # Complete: left alone.
    before = out.stat().st_mtime_ns, out.stat().st_ino
    assert build_corpus(output=out, resume=True, **inputs).seconds == 0
    assert (out.stat().st_mtime_ns, out.stat().st_ino) == before


@pytest.mark.parametrize("function", ["write", "pwrite", "fsync"])
def test_full_disk(inputs: dict[str, Any], tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build_corpus(output=tmp_path / "whole.h5", **inputs)
    whole = (tmp_path / "whole.h5").read_bytes()
    out = tmp_path / "out.h5"
    failed = 0
    for call in (0, 1, 2, 7, 20, 40):
        calls = iter(range(100_000))
        real = getattr(os, function)

        def full(*args: Any, calls: Any = calls, call: int = call, real: Any = real) -> Any:
            if next(calls) >= call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        says = ""
        try:
            with monkeypatch.context() as patch:
                patch.setattr(os, function, full)
                build_corpus(output=out, **inputs)
        except ProteinBertError as error:
            says = str(error)
        if says:
            failed += 1
            assert f"{out}: cannot be written: No space left on device" in says
            assert "\n" not in says
            assert not out.exists()
        build_corpus(output=out, resume=True, **inputs)
        assert out.read_bytes() == whole
        out.unlink()
    assert failed >= 3


def test_interrupted_by_ctrl_c(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "_merge_all", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_corpus(output=tmp_path / "out.h5", **inputs)
    assert caplog.messages[-1].startswith("interrupted: 150 rows are safe in ")
    build_corpus(output=tmp_path / "out.h5", resume=True, **inputs)
    assert verify_corpus(tmp_path / "out.h5") == []


def interrupted(inputs: dict[str, Any], out: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "_merge_all", lambda *args: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build_corpus(output=out, **(inputs | options))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"min_count": 2}, "min_count was 1, now 2"),
        ({"ancestors": "is_a"}, 'ancestors was "part_of", now "is_a"'),
        ({"test": 0.3}, "test was 0.2, now 0.3"),
        ({"duplicates": "first"}, 'duplicates was "refuse", now "first"'),
        ({"annotations": []}, "inputs was"),
        ({"ontology": None, "annotations": []}, "inputs was"),
    ],
)
def test_another_build_is_not_resumed(
    inputs: dict[str, Any], tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    out = tmp_path / "out.h5"
    interrupted(inputs, out)
    with pytest.raises(InputError) as error:
        build_corpus(output=out, resume=True, **(inputs | options))
    assert f"{out}: cannot resume: {says}" in str(error.value)
    assert str(error.value).endswith("; start again with --overwrite")
    # A refusal spoils nothing; the number of workers may change.
    kept = sorted(os.listdir(tmp_path / "out.h5.partial"))
    assert len(kept) > 5
    build_corpus(output=out, resume=True, **(inputs | {"workers": 2}))
    with pytest.raises(InputError, match=r"cannot resume: .*; replace it with --overwrite"):
        build_corpus(output=out, resume=True, **(inputs | options))


def test_a_file_that_has_changed_is_not_resumed(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    interrupted(inputs, out)
    text = (tmp_path / "b.fasta").read_text()
    (tmp_path / "b.fasta").write_text(text.replace("A", "C", 1))
    with pytest.raises(InputError, match=r"b\.fasta: has changed since the build was interrupted"):
        build_corpus(output=out, resume=True, **inputs)
    build_corpus(output=out, overwrite=True, **inputs)


def test_a_damaged_run_is_not_used(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    interrupted(inputs, out)
    path = tmp_path / "out.h5.partial" / "run-000-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"run-000-00000\.bin: is missing or damaged; start again with --overwrite"):
        build_corpus(output=out, resume=True, **inputs)
    (tmp_path / "out.h5.partial" / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read"):
        build_corpus(output=out, resume=True, **inputs)


def test_two_processes_cannot_build_the_same_output(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    with runs.PartialBuild(str(out), resume=False, overwrite=False):
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"out\.h5: another process is writing it now"):
                build_corpus(output=out, **inputs, **options)
    build_corpus(output=out, **inputs)


def test_overwriting_keeps_the_old_corpus_until_the_new_one_is_complete(inputs: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    build_corpus(output=out, **inputs)
    old = out.read_bytes()
    with pytest.raises(InputError, match="exists; replace it with --overwrite"):
        build_corpus(output=out, **inputs)
    interrupted(inputs, out, overwrite=True, seed=1)
    assert out.read_bytes() == old
    build_corpus(output=out, resume=True, **(inputs | {"seed": 1}))
    assert out.read_bytes() != old


def test_output_that_appears_meanwhile_is_not_replaced(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5"
    merge = building._merge_all

    def appear(*args: Any) -> Any:
        out.write_text("something dear")
        return merge(*args)

    with monkeypatch.context() as patch:
        patch.setattr(building, "_merge_all", appear)
        with pytest.raises(InputError, match="was made meanwhile; move it away and go on with --resume"):
            build_corpus(output=out, **inputs)
    assert out.read_text() == "something dear"
    out.unlink()
    build_corpus(output=out, resume=True, **inputs)
    assert verify_corpus(out) == []
