"""The GPU report without a GPU: it says what it would measure. Its tables, its targets, its batches."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from proteinbert_fast.benchmark import report as reports
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.gpu import bench as gpu_bench
from proteinbert_fast.benchmark.gpu import checks, command
from proteinbert_fast.benchmark.gpu.bench import KERNELS, NO_GPU, Bench
from proteinbert_fast.benchmark.gpu.report import GpuReport
from proteinbert_fast.benchmark.gpu.sections import SECTIONS, compiled, forward, latency, long
from proteinbert_fast.benchmark.gpu.sections import machine as machine_section
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.benchmark.timing import Row, Target
from proteinbert_fast.errors import InputError

TINY = replace(GpuSettings().tiny(), precisions=("bfloat16",))
ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_nothing_is_measured_and_nothing_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert command.main(["--tiny"]) == 0
    text, error = capsys.readouterr()
    assert error.strip() == f"gpu_report: note: {NO_GPU}: nothing was measured"
    assert f"**Nothing was measured: {NO_GPU}.**" in text
    assert list(tmp_path.iterdir()) == []
    for line in text.splitlines():
        if line.startswith(("| local_block", "| **ours", "| padded", "| product", "| copy")):
            assert NO_GPU in line


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_files_can_be_had(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--output", str(tmp_path / "out")]) == 0
    values = json.loads((tmp_path / "out" / "results.json").read_text())
    assert values["not_measured_because"] == NO_GPU
    assert [section["name"] for section in values["sections"]] == list(SECTIONS)
    rows = [row for section in values["sections"] for row in section["rows"]]
    assert {(row["status"], row["note"]) for row in rows} == {("unavailable", NO_GPU)}
    targets = [target for row in rows for target in row["targets"]]
    wanted = {(target["what"], target["wanted"]) for target in targets}
    assert wanted == {
        ("forward bfloat16", 80e6),
        ("forward bfloat16, of the matrix rate", 0.5),
        ("ours over padded eager", 5.0),
        ("ours over torch.compile, max-autotune, real lengths", 1.8),
        ("ours over torch.compile, max-autotune, which need not pad", 1.8),
        ("time per residue, slowest over fastest length", 1.1),
        ("the same, short proteins in full batches", 1.1),
        ("p50 latency in a graph", 0.4),
        ("memory beyond the weights", 1024.0),
        ("the largest piece that fits", 30e6),
        ("training step", 25e6),
        ("training step, of the matrix rate", 0.45),
        ("ours over padded, compiled where it could be", 1.7),
        ("670 M records of 339 residues", 4.0),
        ("memory beyond weights and optimiser", 8192.0),
        ("memory beyond weights and optimiser", 3072.0),
    }
    assert all(target["value"] is None and target["reached"] is None for target in targets)
    assert "not measured" in capsys.readouterr().out


def test_the_script_of_the_checkout_finds_it():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command_line = [sys.executable, str(ROOT / "benchmarks" / "gpu_report.py"), "--sections", "checks", "--tiny"]
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert "# proteinbert_fast on " in done.stdout


def test_the_second_run_on_a_new_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """After gpu_first.py: some sections, in bfloat16, in five minutes; each of them can still be said otherwise."""
    said = []

    def run(settings, names, device, obstacle, output, limit):
        said.append((settings.precisions, tuple(names), settings.limit_seconds, limit))
        return GpuReport(settings, {"commit": None}, "nothing", {}, {})

    monkeypatch.setattr(command, "run", run)
    monkeypatch.setattr(GpuReport, "to_markdown", lambda self: "")
    monkeypatch.setattr(command, "_write", lambda *_, **__: None)
    otherwise = ["--sections", "checks", "--precisions", "float16", "--limit", "100"]
    for arguments in ([], ["--first"], ["--first", *otherwise]):
        assert command.main([*arguments, "--output", str(tmp_path)]) == 0
    assert said == [
        (GpuSettings().precisions, SECTIONS, 450.0, 560.0),
        (("bfloat16",), ("checks", "kernels", "profile", "forward", "latency"), 240.0, 300.0),
        (("float16",), ("checks",), 80.0, 100.0),
    ]


@pytest.mark.parametrize("wrong", [["--sections", "nope"], ["--precisions", "float64"]])
def test_wrong_use(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        command.main(wrong)
    assert f"'{wrong[1]}' is not one of" in capsys.readouterr().err


def case(name: str, prepare, *, ours: bool = True, table: str = "t") -> Case:
    return Case(table, name, "", "", ours, Work(tokens=10), "tokens/s", prepare, dtype="bfloat16")


def ready(check: Check) -> Ready[int]:
    return Ready(lambda: 1, lambda _: check)


def raising(error: Exception):
    def prepare() -> Ready[int]:
        raise error

    return prepare


@pytest.fixture
def bench() -> Bench:
    return Bench(TINY, lambda _: None, torch.device("cpu"))


def test_what_goes_wrong_becomes_a_row(bench: Bench):
    rows = bench.measure(
        [
            case("right", lambda: ready(Check(True, "equal"))),
            case("wrong", lambda: ready(Check(False, "not equal"))),
            case("raises", raising(RuntimeError("one line\nanother"))),
            case("memory", raising(torch.OutOfMemoryError("too large"))),
            case("theirs raises", raising(RuntimeError("theirs")), ours=False),
            case("not here", raising(Unavailable("no such thing"))),
        ]
    )
    assert [(row.status, row.check, row.note) for row in rows] == [
        ("measured", "equal", ""),
        ("wrong", "not equal", ""),
        ("wrong", "RuntimeError: one line", ""),
        ("unavailable", None, "OutOfMemoryError: too large"),
        ("unavailable", None, "RuntimeError: theirs"),
        ("unavailable", None, "no such thing"),
    ]
    assert [bool(row.seconds) for row in rows] == [True, False, False, False, False, False]


def test_what_failed_its_check_is_not_timed(bench: Bench):
    bench.failed["local_block", "bfloat16"] = "off by 1"
    rows = bench.measure(
        [
            case("the model", lambda: ready(Check(True, "equal"))),
            case("local_block", lambda: ready(Check(True, "equal")), table="each kernel alone"),
            case("global_track", lambda: ready(Check(True, "equal")), table="each kernel alone"),
            case("theirs", lambda: ready(Check(True, "equal")), ours=False),
        ]
    )
    assert [row.status for row in rows] == ["wrong", "wrong", "measured", "measured"]
    assert rows[0].check == "local_block failed its check: off by 1"


def test_no_case_begins_after_the_limit(bench: Bench):
    bench.started -= 1e6
    (row,) = bench.measure([case("late", lambda: ready(Check(True, "equal")))])
    assert row.status == "unavailable"
    assert row.note.startswith("out of time")


def test_a_section_that_fails_spoils_only_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(latency, "rows", lambda bench: 1 / 0)
    report = command.run(TINY, ["latency", "machine"], None, NO_GPU, tmp_path)
    (row,) = report.sections["latency"]
    assert row.status == "wrong"
    assert row.check.startswith("ZeroDivisionError")
    assert len(report.sections["machine"]) > 1


def test_targets_say_whether_they_are_reached(bench: Bench):
    row = Row(case("ours", lambda: ready(Check(True, ""))), "measured", seconds=[1.0])
    row.targets = [
        Target("speed", 80e6, "residues/s", True, 81e6),
        Target("latency", 0.4, "ms", False, 0.41),
        Target("memory", 1024.0, "B", False, None),
    ]
    assert [target.reached for target in row.targets] == [True, False, None]
    text = GpuReport(TINY, bench.environment, None, {"latency": [row]}, {}).to_markdown()
    assert "| speed | at least 80 M residues/s | 81 M residues/s | reached |" in text
    assert "| latency | at most 0.4 ms | 0.41 ms | **not reached** |" in text
    assert "| memory | at most 1,024 B | not measured |" in text
    assert GpuReport(TINY, bench.environment, None, {"latency": [row]}, {}).summary() == [
        "speed: 81 M residues/s, wanted at least 80 M: reached",
        "latency: 0.41 ms, wanted at most 0.4: not reached",
        "memory: not measured, wanted at most 1,024",
    ]


def test_flatness_needs_every_length():
    def row(ns: float | None) -> Row:
        made = Row(case("n", lambda: ready(Check(True, ""))), "measured", seconds=[] if ns is None else [1.0])
        made.values["ns_per_residue"] = ns
        return made

    rows = [row(10.0), row(9.0), row(10.5)]
    long._flat(rows, "flat")
    assert rows[-1].targets[0].value == pytest.approx(10.5 / 9)
    rows = [row(10.0), row(None)]
    long._flat(rows, "flat")
    assert rows[-1].targets[0].value is None


def test_a_process_that_dies_fails_the_check_it_was_in():
    names = list(checks.CHECKS)
    lines = [f'"{names[0]}"', json.dumps([names[0], True, "fine"]), "a warning of some library", f'"{names[1]}"']
    found = checks.outcomes_of(lines, "its process ended with exit code -6", ["", "LLVM ERROR: no"])
    assert found == [
        (names[0], True, "fine"),
        (names[1], False, "its process ended with exit code -6: LLVM ERROR: no"),
    ]
    (only,) = checks.outcomes_of([], "its process ended with exit code 1", ["ModuleNotFoundError: no triton"])
    assert only.name == names[0]
    assert not only.passed


def test_settings_go_to_other_processes():
    for settings in (GpuSettings(), TINY):
        assert GpuSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("shapes", [1, 2, 3, 50])
def test_static_batches_hold_every_protein_once_in_few_shapes(shapes: int):
    lengths = [3, 9, 9, 4, 12, 31, 30, 5, 7, 7]
    tokens = [torch.full((n,), n % 20, dtype=torch.uint8) for n in lengths]
    numbers = [100 + i for i in range(len(lengths))]
    batches = compiled.static_batches(tokens, numbers, shapes, 40)
    assert sorted(i for batch in batches for i in batch.numbers) == numbers
    assert len({batch.tokens.shape for batch in batches}) <= shapes
    for batch in batches:
        assert len(batch.numbers) <= len(batch.tokens)
        for k, i in enumerate(batch.numbers):
            assert torch.equal(batch.tokens[k][batch.mask[k]], tokens[i - 100].long())


def test_more_shapes_never_pad_more():
    lengths = sorted([3, 9, 9, 4, 12, 31, 30, 5, 7, 7])

    def padded(pieces: int) -> int:
        begin = total = 0
        for end in compiled._cuts(lengths, pieces):
            total, begin = total + (end - begin) * lengths[end - 1], end
        return total

    sizes = [padded(pieces) for pieces in range(1, 9)]
    assert sizes[0] == 310
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == sum(lengths)


def test_long_proteins_repeat_themselves():
    sequence = long.of_period(25, 10)
    assert len(sequence) == 25
    assert sequence[:10] == sequence[10:20]


def test_the_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
                            total_memory=85 * 10**9, L2_cache_size=50 * 2**20)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    line = "580.159.04, 345 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 71.2 W, 700.00 W, 31, P0\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=line))
    monkeypatch.setattr(gpu_bench.machine, "commit", lambda: "abc")
    e = gpu_bench.environment(torch.device("cuda"))
    assert (e["device"], e["gpu"], e["capability"], e["multiprocessors"]) == ("cuda", found.name, "9.0", 132)
    assert e["gpu_state"]["clocks.max.sm"] == "1980 MHz"
    assert e["gpu_state"]["driver_version"] == "580.159.04"
    json.dumps(e)
    assert reports.default_folder(e).name.endswith("-nvidia-h100-80gb-hbm3")
    assert machine_section._clock(1.7e9) == 1.98e9


def test_without_nvidia_smi_clocks_are_unknown(monkeypatch: pytest.MonkeyPatch):
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert gpu_bench.gpu_state() == {}
    assert machine_section._clock(1.7e9) == 1.7e9


def test_picture(bench: Bench, tmp_path: Path):
    pytest.importorskip("matplotlib")
    from proteinbert_fast.benchmark.gpu.picture import draw

    def row(table: str, ours: bool = True, **values: float) -> Row:
        made = Row(case("name", lambda: ready(Check(True, "")), ours=ours, table=table), "measured", seconds=[1.0, 2.0])
        made.case = replace(made.case, work=Work(proteins=2, residues=100, tokens=104))
        made.values = values
        return made

    kernel = {"ns_per_token": 2.0, "predicted_ns_per_token": 1.0}
    rows = [row(forward.TABLE), row(forward.TABLE, False), row(long.ONE, ns_per_residue=3.0),
            row(long.MANY, ns_per_residue=3.5), row(KERNELS, **kernel)]  # fmt: skip
    draw(GpuReport(TINY, bench.environment, None, {"forward": rows}, {}), tmp_path / "results.png")
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="nothing was measured"):
        draw(GpuReport(TINY, bench.environment, None, {}, {}), tmp_path / "none.png")
