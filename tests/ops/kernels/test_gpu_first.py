"""What a GPU is asked in its first minutes, in tiny sizes: every probe runs, what is wrong is told and gets no time."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.first import schedule, verdicts
from benchmarks.first.command import dry_run
from benchmarks.first.commands import Output
from benchmarks.first.folder import TEXTS
from benchmarks.first.probes import device as device_probe
from benchmarks.first.probes import embed, graphs, right, tools, tuned
from benchmarks.first.probes import timed as timed_probe
from benchmarks.first.process import Context
from proteinbert_fast.benchmark import tune
from proteinbert_fast.benchmark.gpu import bench
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS
from proteinbert_fast.ops import kernels
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

from .conftest import IS_INTERPRETED
from .test_gpu_report import TINY, pretend_gpu

pytestmark = pytest.mark.slow

FEW = [operation for operation in OPERATIONS if operation.name in {"message", "residue_mean"}]
PROBES = {probe.name: probe for probe in schedule.SCHEDULE}
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
local_block = sys.modules["proteinbert_fast.ops.kernels.local_block"]


class Told(Context):
    """A context that keeps what is told."""

    def __init__(self, options: dict, scratch: Path, found: dict[str, str | None] | None = None) -> None:
        so_far = {"verdicts": found or {}, "peaks": None, "tuned": {}, "failed": []}
        job = {"name": "test", "module": "", "options": options, "seconds": 600.0, "so_far": so_far, "tiny": True,
               "needs_gpu": False, "scratch": str(scratch)}  # fmt: skip
        super().__init__(job, -1)
        self.lines: list[dict] = []

    def write(self, values) -> None:
        self.lines.append(json.loads(json.dumps(values, default=str)))

    @property
    def checks(self) -> dict[str, dict]:
        return {line["check"]: line for line in self.lines if "check" in line}


@pytest.fixture
def fake_gpu():
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if IS_INTERPRETED:
            pretend_gpu(patch)
        yield


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a probe says of the kernels for Hopper holds for its process, which is this one here."""
    monkeypatch.setattr(Context, "run_portable", staticmethod(lambda reason: None))


def told(name: str, scratch: Path, found: dict[str, str | None] | None = None, **options) -> Told:
    probe = PROBES[name]
    context = Told({**probe.options, **options}, scratch, found)
    import_module(probe.module).run(context)
    return context


def test_batches_have_the_rows_that_are_promised():
    rows = [Tokenizer(gap=20)([b"M" * n for n in lengths]).n_rows for lengths in right.BATCHES]
    assert rows[0] < 64
    assert rows[1:] == [pytest.approx(n, rel=0.1) for n in (200, 5000, 60_000)]


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("group", schedule.GROUPS)
def test_right_kernels_are_found_right(group: str, tmp_path: Path):
    probe = PROBES[f"right-{group}-bfloat16"]
    context = told(probe.name, tmp_path)
    assert [line["decides"] for line in context.checks.values()] == list(probe.decides)
    for line in context.checks.values():
        assert line["ok"], line
        assert "largest error" in line["found"] or "equal for" in line["found"]
    names = [line.get("begun") for line in context.lines if "begun" in line]
    assert names == list(context.checks)
    if group == "block-gradient":
        errors = context.checks["gradient of local_block"]["errors"]
        assert {"x", "broadcast", "narrow_weight", "wide_weight"} <= set(errors)
        assert all(0 < error < 0.06 for error in errors.values())


def test_a_gpu_is_asked_for_more_rows_and_a_sanitizer_for_fewer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Context, "on_gpu", True)
    monkeypatch.setattr(right, "BATCHES", ((1,), (3, 0, 30), (5, 5)))
    asked = []
    plain = right.checks.check_operation

    def check(setting, *arguments):
        asked.append((setting.settings.check_lengths, setting.settings.model_lengths))
        return plain(setting, *arguments)

    monkeypatch.setattr(right.checks, "check_operation", check)
    monkeypatch.setattr(right, "_SMALL", 10)
    for small in (False, True):
        (line,) = told("right-track-bfloat16", tmp_path, names=["message"], small=small).checks.values()
        assert line["ok"]
    assert asked == [(((1,), (3, 0, 30), (5, 5)), (0, 22)), (((1,), (3, 0, 30)), (0,))]


def test_a_planted_mistake_is_told_and_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_gpu: None):
    def wrong(*arguments, **options):
        found = plain(*arguments, **options)
        return found._replace(query=found.query * 1.3)

    plain = kernels.message
    monkeypatch.setattr(kernels, "message", wrong)
    monkeypatch.setattr(timed_probe, "OPERATIONS", FEW)
    checked = told("right-track-bfloat16", tmp_path).checks
    assert {name: line["ok"] for name, line in checked.items()} == {
        "global_track": True, "global_track, last": True, "global_track, with weights": True, "message": False,
        "residue_mean": True,
    }  # fmt: skip
    assert "allowed 0.06" in checked["message"]["found"]
    # As the runner keeps it. The kernel itself is right again: the verdict alone forbids its time.
    monkeypatch.setattr(kernels, "message", plain)
    found = {line["decides"]: None if line["ok"] else line["found"] for line in checked.values()}
    timed = told("kernels", tmp_path, found).checks
    assert timed["message"]["ok"] is False
    assert timed["message"]["found"].startswith("message failed its check: largest error")
    assert "seconds" not in timed["message"]
    assert timed["residue_mean"]["ok"]
    assert timed["residue_mean"]["seconds"]["p50"] > 0
    # So does the whole model, which needs it.
    forward = told("forward", tmp_path, found).checks
    assert forward["ours"]["ok"] is False
    assert "seconds" not in forward["ours"]


def test_a_wrong_kernel_gets_no_time_without_a_verdict_either(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_gpu: None
):
    plain = kernels.residue_mean
    monkeypatch.setattr(timed_probe, "OPERATIONS", FEW)
    monkeypatch.setattr(kernels, "residue_mean", lambda *arguments: plain(*arguments) + 0.5)
    timed = told("kernels", tmp_path).checks
    assert timed["residue_mean"]["ok"] is False
    assert "seconds" not in timed["residue_mean"]
    assert timed["message"]["ok"]


def test_an_error_in_one_gradient_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def wrong(*arguments):
        d_x, d_word, d_weights = plain(*arguments)
        return d_x, d_word, [w * 1.5 if i == 2 else w for i, w in enumerate(d_weights)]

    plain = local_block._local_block_backward
    monkeypatch.setattr(local_block, "_local_block_backward", wrong)
    (line,) = told("right-block-gradient-bfloat16", tmp_path).checks.values()
    assert line["ok"] is False
    names = list(line["errors"])
    assert [name for name, error in line["errors"].items() if error > 0.1] == [names[4]]


def test_the_portable_kernels_are_timed_when_those_for_hopper_are_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_gpu: None
):
    said: list[str] = []
    monkeypatch.setattr(Context, "run_portable", staticmethod(said.append))
    found = dict.fromkeys(PROBES["right-portable-bfloat16"].decides)
    found |= {"bfloat16/chosen/local_block": "died of SIGSEGV", "bfloat16/chosen/whole model": "off"}
    context = told("forward", tmp_path, found)
    assert said == ["local_block failed its check: died of SIGSEGV"]
    assert context.lines[0]["note"] == f"the portable local block runs: {said[0]}"
    assert context.checks["ours"]["ok"]


def test_the_self_check_has_a_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from benchmarks.first.probes import selfcheck

    monkeypatch.setattr(selfcheck, "verdict", lambda device, config, dtype: "off by 1")
    line = told("self-check-bfloat16", tmp_path).checks["self-check"]
    assert (line["ok"], line["found"]) == (False, "off by 1")


def test_graphs_that_keep_old_weights_or_inputs_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def checks_of(stale) -> dict[str, bool]:
        monkeypatch.setattr(graphs, "graphed", lambda context, model: stale(model))
        found = told("graphs-bfloat16", tmp_path).checks
        return {name.removeprefix("graphs: "): line["ok"] for name, line in found.items()}

    def old_weights(model):
        import copy

        twin = copy.deepcopy(model)
        return lambda batch: graphs._plain(twin, batch)

    def old_results(model):
        kept = {}

        def forward(batch: PackedBatch):
            key = batch.n_rows
            return kept.setdefault(key, graphs._plain(model, batch))

        return forward

    assert checks_of(old_weights) == {"same bits": True, "changed weights": False, "moved weights": False}
    assert checks_of(old_results) == {"same bits": True, "changed weights": False, "moved weights": False}
    assert checks_of(lambda model: lambda batch: graphs._plain(model, batch)) == {
        "same bits": True, "changed weights": True, "moved weights": True,
    }  # fmt: skip


@pytest.mark.parametrize(("name", "wanted"), [
    ("device", ["copy through memory", "reads from the L2 cache", "peaks"]),
    ("forward", ["ours", "ours, CUDA graph"]),
    ("training", ["ours, save preactivations", "ours, save inputs"]),
    ("kernels", [operation.name for operation in OPERATIONS]),
    ("gradients", [operation.name for operation in GRADIENTS]),
    ("profile", ["all kernels", "local_block_kernel"]),
])  # fmt: skip
def test_timings(name: str, wanted: list[str], tmp_path: Path, fake_gpu: None):
    context = told(name, tmp_path)
    for check in wanted:
        line = context.checks[check]
        assert line["ok"], line
        if check != "peaks":
            assert set(line["seconds"]) == {"p20", "p50", "p80"}
        if name in {"kernels", "gradients"}:
            assert line["values"]["predicted_ns_per_token"] > 0
            assert line["values"]["ns_per_token"] > 0
    if name in {"forward", "training"}:
        assert all(context.checks[check]["peak_bytes"] for check in wanted) or not IS_INTERPRETED
        assert all(context.checks[check]["values"]["residues_per_second"] > 0 for check in wanted)
    if name == "profile":
        (text,) = [line["text"] for line in context.lines if line.get("file") == "profile.txt"]
        assert "local_block_kernel" in text


def test_measured_peaks_reach_later_predictions(tmp_path: Path, fake_gpu: None):
    peaks = told("device", tmp_path).checks["peaks"]["peaks"]
    context = Told({"what": "kernels"}, tmp_path)
    context.so_far["peaks"] = peaks
    assert context.bench().peaks.hbm == peaks["hbm"]
    assert context.bench().peaks.matrix["bfloat16"] == peaks["matrix"]["bfloat16"]


def test_dilations_are_timed_beside_each_other(tmp_path: Path, fake_gpu: None):
    rows = [line for line in told("dilations", tmp_path).lines if "wide_dilation" in line]
    assert [row["wide_dilation"] for row in rows] == list(device_probe.DILATIONS)
    for row in rows:
        assert row["ok"], row
        assert row["values"]["ns_per_row"] > 0
    assert rows[-1]["values"]["over_dilation_8"] == 1.0


@pytest.mark.parametrize("kernel", schedule.TUNED)
def test_few_candidates_of_the_tuner(kernel: str):
    job = tune.Job(kernel, "bfloat16", 128)
    known = tune.candidates(job, 90)
    found = tuned.chosen(job, 90)
    if not known:  # another Triton than 3.6
        assert found == []
        return
    assert 3 <= len(found) <= tuned.MOST
    assert len(set(found)) == len(found)
    assert set(found) <= set(known)
    assert set(tuned.PREFERRED.get(kernel, ())[: tuned.MOST]) <= set(found)


def test_tuning_gives_a_table_that_the_tuner_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_gpu: None):
    machine = tuning.Machine("NVIDIA H200", 90, "3.6.0", "0.1.0")
    fast, slow = (32, 32, 4, 2, False, False), (64, 16, 4, 2, False, False)
    timers = iter([0.010, 0.009, 0.012, 0.010])
    monkeypatch.setattr(bench.Bench, "enough_calls", lambda self, ready: ready)
    plain, timings = bench.Bench.clock, []

    def clock(self, ready) -> float:
        if len(timings) % tune._TIMINGS == 0:
            timings.append(next(timers))
        else:
            timings.append(timings[-1])
        return timings[-1] if plain(self, ready) >= 0 else 0.0

    monkeypatch.setattr(bench.Bench, "clock", clock)
    context = Told({"kernel": "local_block", "timed": True}, tmp_path)
    context.so_far["tuned"] = earlier = {"global_attention/bfloat16/128": {"rows": 64}}
    tuned.search(context, context.bench(), tune.Job("local_block", "bfloat16", 32), [fast, slow], machine)
    (line,) = [line for line in context.lines if line.get("file") == "tuned.json"]
    assert line["file"] in TEXTS
    (path := tmp_path / "tuned.json").write_text(line["text"])
    table = tuning.read(path, machine)
    names = local_block.Configuration._fields
    assert table.configurations == earlier | {"local_block/bfloat16/32": dict(zip(names, fast, strict=True))}
    assert line["tuned"] == table.configurations
    told_of = [line for line in context.lines if "configuration" in line and "seconds" in line]
    assert [line["seconds"]["p50"] for line in told_of] == [0.010, 0.009, 0.012, 0.010]
    for line in told_of:
        assert line["values"]["ns_per_token"] > line["values"]["predicted_ns_per_token"] > 0
    assert "10.0% less time" in context.checks["local_block, bfloat16, d_local 32: best"]["found"]


def test_compiling_compares_bits_and_times_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake_gpu: None):
    monkeypatch.setattr(tuning, "machine_of", lambda index: tuning.Machine("NVIDIA H200", 90, "3.6.0", "0.1.0"))
    wanted = {90: [(32, 4, 2, 0), (48, 4, 2, 0)]}
    monkeypatch.setattr(tuned, "chosen", lambda job, capability: wanted[capability])
    monkeypatch.setattr(tune, "device_timer", lambda *_: pytest.fail("timed"))
    context = told("compile-global_attention", tmp_path)
    lines = [line for line in context.lines if "check" in line]
    # The shipped one, the others, the shipped one again; there are no tiles of 48 rows, which is no fault of a kernel.
    assert [(line["ok"], line["found"] == "the same bits") for line in lines] == [
        (True, True), (True, True), (None, False), (True, True),
    ]  # fmt: skip
    assert not any("seconds" in line for line in lines)
    wanted[90] = []
    (line,) = told("compile-global_attention", tmp_path).lines
    assert line["note"] == "nothing to try: this kernel does not run here"


def test_what_failed_is_not_tuned(tmp_path: Path, fake_gpu: None):
    found = {"bfloat16/chosen/global_track": "off"}
    (line,) = told("tune-global_attention", tmp_path, found).checks.values()
    assert line["ok"] is False
    assert line["found"] == "no time: global_track failed its check: off"


FAKE_TOOL = """#!{python}
import subprocess, sys
command = sys.argv[sys.argv.index({python!r}):]
if {only!r} in sys.argv:
    subprocess.run(command, check=True)
print({text!r})
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Stands in for one of NVIDIA's tools: runs the program below it, if told so, and says something."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*sys.path]))

    def make(name: str, only: str, text: str) -> None:
        path = folder / name
        path.write_text(FAKE_TOOL.format(python=sys.executable, only=only, text=text))
        path.chmod(0o755)

    return make


def test_counters_of_one_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool, fake_gpu: None):
    assert told("counters", tmp_path).lines == [{"ok": None, "note": "not measured: no ncu on PATH"}]
    monkeypatch.setattr(tools, "COUNTED", (tools.COUNTED[0], tools.COUNTED[3]))
    tool("ncu", "regex:^(local_block_hopper_kernel|local_block_kernel)$",
         "  local_block_kernel (78, 1, 1)x(256, 1, 1), Context 1, Stream 7, CC 9.0\n  Duration us 12.3")  # fmt: skip
    context = told("counters", tmp_path)
    text = [line["text"] for line in context.lines if line.get("file") == "ncu.txt"]
    assert "Duration us 12.3" in text[0]
    # The tool says nothing of this one.
    assert [line["ok"] for line in context.checks.values()] == [True, False]
    assert "exit code 0" in context.checks["counters of local block"]["found"]


def test_checks_that_failed_run_again_under_the_sanitizer(tmp_path: Path, tool):
    (line,) = told("sanitizer", tmp_path).lines
    assert line["ok"] is True
    context = Told(PROBES["sanitizer"].options, tmp_path)
    context.so_far["failed"] = ["right-heads-bfloat16"]
    tools.sanitize(context)
    assert context.lines == [{"ok": None, "check": "sanitizer", "note": "not measured: no compute-sanitizer on PATH"}]
    tool("compute-sanitizer", "memcheck",
         "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error")  # fmt: skip
    context.lines.clear()
    tools.sanitize(context)
    found = [(line["check"], line["ok"], line["found"]) for line in context.checks.values()]
    assert found == [(f"{name} of right-heads-bfloat16", False, "ERROR SUMMARY: 1 error")
                     for name in ("memcheck", "racecheck")]  # fmt: skip
    text = "".join(line["text"] for line in context.lines if line.get("file") == "sanitizer.txt")
    assert "Invalid __global__ read" in text
    assert "exit code 0" in text  # the check itself ran below the tool


def test_embedding_from_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """On the CPU, as everything but the device is the same; the command runs once, its file stands for the others."""
    plain, first = embed.embed, []

    def once(output: Path, *arguments) -> tuple[float, str]:
        if not first:
            first.append(output)
            return plain(output, *arguments)
        output.write_bytes(first[0].read_bytes())
        return 1.0, ""

    monkeypatch.setattr(embed, "embed", once)
    checked = told("embed", tmp_path, device="cpu").checks
    assert [line["ok"] for line in checked.values()] == [True, True, True]
    assert checked["embed, first"]["embed_seconds"] > 0
    assert plain(tmp_path / "no.h5", "nope", {}, 60.0)[1].startswith("exit code 1: proteinbert-fast: error")
    warning = "RuntimeWarning: proteinbert-fast: the Triton kernels fail their self-check on cuda: results are off"
    monkeypatch.setattr(embed, "output_of", lambda *_: Output(warning, "exit code 0", 1.0))
    assert plain(tmp_path / "no.h5", "cuda", {}, 60.0) == (1.0, warning)
    monkeypatch.setattr(embed, "output_of", lambda *_: Output("the self-check took 3 s", "exit code 0", 1.0))
    assert plain(tmp_path / "no.h5", "cuda", {}, 60.0) == (1.0, "")


def test_embeddings_that_differ_are_found(tmp_path: Path):
    h5py = pytest.importorskip("h5py")

    def written(name: str, values: np.ndarray) -> Path:
        with h5py.File(tmp_path / name, "w") as file:
            file["ids"] = ["a", "b"]
            file["embeddings"] = values
        return tmp_path / name

    right_values = np.ones((2, 4), np.float32)
    cpu, near, far = (written(str(d), right_values + d) for d in (0.0, 0.1, 0.5))
    assert embed.differences(near, near, cpu) == ""
    assert embed.differences(near, cpu, cpu) == "two runs differ"
    assert embed.differences(far, far, cpu) == "off by 5.0e-01, allowed 0.25"
    assert embed.differences(written("nan", right_values * np.nan), tmp_path / "nan", cpu)


@pytest.mark.skipif(not IS_INTERPRETED, reason="for machines without a GPU")
def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    probes = [PROBES[name] for name in ("versions", "right-block-bfloat16", "right-block-float16", "forward")]
    assert dry_run(probes, tmp_path / "out") == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "out" / "first.jsonl").read_text().splitlines()]
    ends = {line["probe"]: line["ok"] for line in lines if "end" in line}
    assert ends == {"versions": True, "right-block-bfloat16": True, "forward": None}
    assert verdicts.key_of("bfloat16", "chosen", "local_block") in {line.get("decides") for line in lines}
    assert TINY.is_trial
