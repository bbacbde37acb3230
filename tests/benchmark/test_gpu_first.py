"""The runner of the first minutes on a GPU, on probes that go wrong; what it keeps, in which order, and how much."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.first import command, fakes, prepare, schedule, verdicts
from benchmarks.first import runner as runner_module
from benchmarks.first.commands import MOST_CHARACTERS, output_of
from benchmarks.first.folder import CUT, FILES, LINES, LOG, MOST_BYTES, MOST_TEXT_BYTES, SUMMARY, Folder
from benchmarks.first.runner import ROOT, Probe, Runner
from benchmarks.first.summary import summary
from proteinbert_fast.benchmark.gpu import checks
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS

PATIENCE = 30.0  # seconds until what must happen has happened; nothing is asserted of time


def lines_of(folder: Path) -> list[dict]:
    text = (folder / LINES).read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def fake(what: str, seconds: float = 30.0, **options) -> Probe:
    return Probe(f"fake-{what}", "benchmarks.first.fakes", seconds, least=0.1, options={"plain": True, "what": what},
                 **options)  # fmt: skip


def wait_for(what, reason: str) -> None:
    ends = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < ends, reason
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def faked(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("faked") / "out")
    Runner(folder, 100.0, width=4, summarize=summary).run(fakes.probes())
    return folder


def test_probes_that_go_wrong_cost_their_own_lines(faked: Folder):
    assert fakes.failures(faked.lines) == []
    assert lines_of(faked.path) == faked.lines
    # NaN is no JSON.
    assert {line["number"] for line in faked.lines if line.get("check") == "the first"} == {"nan"}


def test_what_is_recorded_otherwise_is_complained_of(faked: Folder):
    for what in fakes.WAYS:
        lines = [dict(line) for line in faked.lines]
        end = next(line for line in lines if line["probe"] == f"fake-{what}" and "end" in line)
        end["end"] = "finished; or so it says"
        found = fakes.failures(lines)
        assert found == [f"fake-{what} ended as ['finished; or so it says'], not {fakes.WAYS[what][0]!r}"]
    assert len(fakes.failures([line for line in faked.lines if line.get("check") != "the second"])) == 3


def test_the_log_keeps_garbage_and_the_last_words(faked: Folder):
    log = (faked.path / LOG).read_bytes()
    assert b"[fake-prints-garbage] \xff\x00 no JSON\n" in log
    assert b'{"ok": true, "check": "the sec\n' in log
    assert b"the last words\n" in log
    assert len(log) < 4 << 20
    garbage = {line["probe"]: line["garbage"] for line in faked.lines if "garbage" in line}
    assert garbage["fake-prints-garbage"] == 7
    assert garbage["fake-tears-a-line"] == 1


def test_a_child_that_left_its_group_is_ended(faked: Folder):
    (child,) = [line["pid"] for line in faked.lines if "pid" in line]
    wait_for(lambda: not is_running(child), "it still runs")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_group_is_ended_where_processes_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner_module, "_kill_marked", lambda mark: None)
    (ended,) = Runner(Folder(tmp_path / "out"), 60.0, width=1).run([fake("ignores-signals", 3.0)])
    assert ended.end == "hung: ended after 3 s"


def test_what_a_dead_probe_would_have_decided_is_wrong(tmp_path: Path):
    runner = Runner(Folder(tmp_path / "out"), 60.0, width=1)
    keys = tuple(verdicts.key_of("bfloat16", verdicts.CHOSEN, name) for name in ("local_block", "message"))
    runner.run([fake("dies", decides=keys), fake("succeeds", decides=("float16/chosen/message",))])
    assert runner.so_far["verdicts"] == dict.fromkeys(keys, "died of SIGSEGV, in the second")
    assert runner.so_far["failed"] == ["fake-dies"]


def test_the_deadline_ends_what_runs_and_what_waits(tmp_path: Path):
    folder = Folder(tmp_path / "out")
    Runner(folder, 5.0, width=1).run([fake("hangs", 1e6), fake("succeeds", 1e6), fake("dies", 1e6)])
    ends = {line["probe"]: (line["end"], line["ok"]) for line in folder.lines if "end" in line}
    assert ends["fake-hangs"][0].startswith("hung: ended after ")
    assert ends["fake-hangs"][0].endswith(" s, in the second")
    assert ends["fake-hangs"][1] is False
    assert ends["fake-succeeds"] == ends["fake-dies"] == ("not run: out of time", None)


def test_timings_run_alone_and_in_order(tmp_path: Path):
    folder = Folder(tmp_path / "out")
    said: list[str] = []
    options = {"plain": True, "what": "succeeds"}
    probes = [Probe(f"p{i}", "benchmarks.first.fakes", 30.0, alone=i in {2, 3}, options=options) for i in range(6)]
    Runner(folder, 100.0, width=2, say=said.append).run(probes)
    running: set[str] = set()
    begun = []
    for line in said:
        name = line.split()[0].rstrip(":")
        if "at most" in line:
            begun.append(name)
            assert len(running) < (1 if name in {"p2", "p3"} else 2)
            assert not running & {"p2", "p3"}
            running.add(name)
        else:
            running.discard(name)
    assert begun == [f"p{i}" for i in range(6)]


RUN = """
import sys
from pathlib import Path
from benchmarks.first import command, fakes
from benchmarks.first.folder import Folder
from benchmarks.first.runner import Probe
probes = [Probe(f"fake-{what}", "benchmarks.first.fakes", 600.0, least=0.1, options={"plain": True, "what": what})
          for what in ("succeeds", "says-wrong", "hangs")]
command._run(probes, Folder(Path(sys.argv[1])), 600.0)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_runner_that_is_ended_leaves_what_it_has(tmp_path: Path, number: signal.Signals):
    folder = tmp_path / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], cwd=ROOT, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip

    def hangs() -> bool:
        text, told = (path.read_text() if path.exists() else "" for path in (folder / LINES, folder / SUMMARY))
        return '"probe": "fake-hangs"' in text and "begun" in text and "fake-says-wrong" in told

    wait_for(hangs, "it never began")
    below = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat")
             if _read(path).rpartition(b")")[2].split()[1:2] == [str(process.pid).encode()]]  # fmt: skip
    assert below
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + signal.SIGTERM)
    wait_for(lambda: not any(map(is_running, below)), "the probe outlives the runner")
    lines = lines_of(folder)
    assert [line["probe"] for line in lines if "end" in line][:2] == ["fake-succeeds", "fake-says-wrong"]
    text = (folder / SUMMARY).read_text()
    assert "| fake-says-wrong | the second | off by 1 |" in text
    assert {path.name for path in folder.iterdir()} <= set(FILES)
    if number == signal.SIGTERM:
        assert lines[-1]["end"] == "ended: the run was interrupted, in the second"
        assert output == text


def test_files_are_few_and_bounded(tmp_path: Path):
    assert len(FILES) <= 8
    assert max(*MOST_BYTES.values(), MOST_TEXT_BYTES) < 15 << 20
    folder = Folder(tmp_path / "out")
    line = {"text": "x" * 1_000_000}
    for _ in range(20):
        folder.line(line)
        folder.log(b"y" * 1_000_000)
        folder.text("ncu.txt", "z" * 1_000_000)
        folder.text("tuned.json", json.dumps(line))
    for _ in range(100):
        folder.line({"text": "x" * 20_000})
    late = {"probe": "late", "end": 50_000 * "e"}
    folder.line(late, of_runner=True)
    sizes = {path.name: path.stat().st_size for path in folder.path.iterdir()}
    assert sizes[LINES] <= MOST_BYTES[LINES]
    assert sizes[LOG] == MOST_BYTES[LOG] + len(CUT)
    assert sizes["ncu.txt"] == MOST_TEXT_BYTES + len(CUT)
    assert json.loads((folder.path / "tuned.json").read_text()) == line
    lines = lines_of(folder.path)
    assert lines[-1] == late
    assert {len(kept["text"]) for kept in lines[:-1]} == {1_000_000, 20_000}
    with pytest.raises(FileExistsError, match="holds an earlier run"):
        Folder(folder.path)


def test_a_full_disk_ends_nothing_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def write(descriptor: int, data) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return plain(descriptor, data[: len(data) // 2])

    folder, plain = Folder(tmp_path / "out"), os.write
    folder.line({"n": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        folder.line({"text": "x" * 1000})
        patch.setattr(Path, "write_text", lambda *_: write(-1, b""))
        folder.replace(SUMMARY, "text")
    folder.line({"n": 2})
    assert lines_of(folder.path) == folder.lines == [{"n": 1}, {"n": 2}]
    assert capsys.readouterr().err.count("No space left on device") == 2


def test_the_schedule_checks_first_and_covers_every_kernel():
    names = [probe.name for probe in schedule.SCHEDULE]
    assert len(set(names)) == len(names)
    assert names[0] == "versions"
    first_alone = next(i for i, probe in enumerate(schedule.SCHEDULE) if probe.alone)
    for i, probe in enumerate(schedule.SCHEDULE):
        assert (probe.module.endswith((".right", ".selfcheck"))) <= (i < first_alone), probe.name
        assert probe.least <= probe.seconds
        if probe.name.startswith("tune-"):
            assert names.index(probe.name.replace("tune-", "compile-")) < i
    assert names.index("right-portable-bfloat16") < names.index("right-block-float16")
    wanted = [o.name for o in OPERATIONS] + [f"gradient of {o.name}" for o in GRADIENTS] + list(checks.CHECKS)
    for precision in ("bfloat16", "float16"):
        decided = {key for probe in schedule.SCHEDULE for key in probe.decides}
        assert {verdicts.key_of(precision, verdicts.CHOSEN, name) for name in wanted} <= decided
    assert (*verdicts.WHOLE, *verdicts.APART) == tuple(checks.MODEL_CHECKS)
    assert checks.APART == verdicts.APART


def test_the_summary_shows_times_and_ends_with_what_is_wrong():
    times = {"p20": 0.001, "p50": 0.002, "p80": 0.0031}
    values = {"ns_per_token": 2.0, "predicted_ns_per_token": 1.25}
    text = summary([
        {"probe": "versions", "ok": True, "environment": {"gpu": "NVIDIA H200", "triton": "3.6.0"}},
        {"probe": "kernels", "ok": True, "check": "message", "dtype": "bfloat16", "found": "largest error 1e-3",
         "seconds": times, "rate": [8.1e7, "tokens/s"], "values": values},
        {"probe": "kernels", "ok": False, "check": "local_block", "found": "off | by 1\nindeed"},
        {"probe": "kernels", "ok": False, "end": "finished", "seconds": 12.0, "wrong": 1,
         "compiled": {"hits": 3, "misses": 2, "seconds": 9.0}},
        {"probe": "late", "ok": None, "end": "not run: out of time", "seconds": 0.0},
    ])  # fmt: skip
    assert text.startswith("# First minutes on NVIDIA H200\n")
    assert "triton 3.6.0, kernels compiled 2, found in the cache 3." in text
    assert "2 probes: 0 right, 1 wrong or ended, 1 not measured." in text
    assert ("| kernels | message bfloat16 | 1 / 2 / 3.1 | 81 M tokens/s | 2 | 1.25 | largest error 1e-3 |") in text
    assert "| late | not measured | 0.0 | not run: out of time |  |" in text
    assert text.endswith("## Wrong\n\n| probe | check | found |\n| --- | --- | --- |\n"
                         "| kernels | local_block | off / by 1 indeed |\n")  # fmt: skip
    assert summary([]).startswith("# First minutes on no GPU\n")


@pytest.mark.parametrize(("failing", "reason", "failed"), [
    ({}, None, {}),
    ({"chosen/local_block": "off"}, "local_block failed its check: off", {}),
    # With the portable kernel wrong too, nothing that needs the block is timed.
    ({"chosen/local_block": "off", "portable/local_block": "off"}, None, {"local_block": "off"}),
    ({"chosen/gradient of local_block": "off"}, "gradient of local_block failed its check: off", {}),
    ({"chosen/local_block": "off", "chosen/whole model": "off", "chosen/message": "bad"},
     "local_block failed its check: off", {"message": "bad"}),
    ({"chosen/whole model": "off"}, None, {"whole model": "off"}),
    ({"chosen/residue mean, same bits": "off"}, None, {}),
    ({"chosen/local_block, first": "off"}, None, {"local_block, first": "off"}),
    ({"chosen/gradient of token loss": "off"}, None, {"token loss": "off"}),
])  # fmt: skip
def test_what_may_be_timed(failing: dict[str, str], reason: str | None, failed: dict[str, str]):
    known = [probe for probe in schedule.SCHEDULE if probe.name.endswith("bfloat16")]
    found = {key: failing.get(key.removeprefix("bfloat16/")) for probe in known for key in probe.decides}
    found["float16/chosen/local_block"] = "of another precision"
    assert verdicts.hopper_failed(found, "bfloat16") == reason
    assert verdicts.failed(found, "bfloat16", gradients=True) == failed
    # A forward pass needs no gradients.
    forward = {} if "chosen/gradient of token loss" in failing else failed
    assert verdicts.failed(found, "bfloat16", gradients=False) == forward


def test_programs_are_ended_with_their_children():
    code = "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(1e6)"
    found = output_of([sys.executable, "-c", code], 3.0)
    assert found.end == "ended after 3 s"
    assert not found.well
    pids = [int(line) for line in found.text.split()]
    assert len(pids) == 2
    wait_for(lambda: not any(map(is_running, pids)), "a child outlives its program")


def test_output_of_programs_is_cut_in_the_middle():
    found = output_of([sys.executable, "-c", f"print('a' * {MOST_CHARACTERS}); print('the end')"], PATIENCE)
    assert found.well
    assert len(found.text) <= MOST_CHARACTERS + 100
    assert found.text.startswith("aaa")
    assert "\n[...]\n" in found.text
    assert found.text.endswith("a\nthe end\n")
    assert output_of([sys.executable, "-c", "print('all')"], PATIENCE).text == "all\n"


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--list", "--only", "tune", "dev"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "device", *(f"tune-{kernel}" for kernel in schedule.TUNED),
    ]  # fmt: skip
    assert command.main(["--only", "nope", "--output", str(tmp_path)]) == 2
    assert "no probe is called 'nope'" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "--output FOLDER" in capsys.readouterr().err
    (tmp_path / LINES).write_text("")
    assert command.main(["--output", str(tmp_path)]) == 2
    assert "holds an earlier run" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path: Path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py"), "--output", str(tmp_path / "out"), "--only",
              "versions", "right-block-bfloat16", "forward"]  # fmt: skip
    done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    lines = lines_of(tmp_path / "out")
    assert {line["probe"]: line["note"] for line in lines if line.get("note")} == dict.fromkeys(
        ("versions", "right-block-bfloat16", "forward"), "not measured: no CUDA GPU here"
    )
    assert {line["ok"] for line in lines if "end" in line} == {None}
    assert done.stdout == (tmp_path / "out" / SUMMARY).read_text()
    assert "3 probes: 0 right, 0 wrong or ended, 3 not measured." in done.stdout


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package to prepare: a file that is checked in, a new one, an ignored one, and a set-up that builds nothing."""
    monkeypatch.setattr(prepare, "TRITON_CACHE", tmp_path / ".triton-cache")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name, size in (("setup.py", 1), ("checked_in", 2 << 20), ("new", 1 << 20), ("ignored.bin", 80 << 20)):
        with (tmp_path / name).open("wb") as file:
            file.write(b"\n" * min(size, 10))
            file.truncate(size)
    (tmp_path / "setup.py").write_text("")
    (tmp_path / ".gitignore").write_text("*.bin\n*.so\n.triton-cache\n")
    subprocess.run(["git", "add", "checked_in", "setup.py", ".gitignore"], cwd=tmp_path, check=True)
    (tmp_path / "proteinbert_fast").mkdir()
    return tmp_path


@pytest.mark.skipif(shutil.which("git") is None, reason="counts what git knows")
def test_prepare_counts_what_must_travel(checkout: Path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "warm", lambda folder: "3 kernels compiled")
    (checkout / ".triton-cache" / "a").mkdir(parents=True)
    with (checkout / ".triton-cache" / "a" / "k.cubin").open("wb") as file:
        file.truncate(3 << 20)
    assert prepare.prepare(checkout) == 0
    said = capsys.readouterr().out
    assert "3.0 MiB  checked in, and not ignored" in said
    assert "3.0 MiB  compiled kernels" in said
    assert "6.0 MiB  of 64 that may travel" in said
    with (checkout / ".triton-cache" / "a" / "k.cubin").open("wb") as file:
        file.truncate(70 << 20)
    assert prepare.prepare(checkout) == 1
    assert "that is too much" in capsys.readouterr().err
    (checkout / "setup.py").write_text("raise SystemExit(7)")
    assert prepare.prepare(checkout) == 1
    assert "the extensions were not built: exit code 7" in capsys.readouterr().err
