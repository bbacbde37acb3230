"""The GPU report from end to end, in tiny sizes: every section runs, what is wrong gets no time."""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from proteinbert_fast import PackedBatch, ProteinBert
from proteinbert_fast.benchmark.gpu import bench, checks, command
from proteinbert_fast.benchmark.gpu.bench import KERNELS
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS, Inputs, compared, error
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS
from proteinbert_fast.benchmark.gpu.report import GpuReport, write
from proteinbert_fast.benchmark.gpu.sections import SECTIONS, latency, profile
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.ops import kernels
from proteinbert_fast.outputs import ProteinBertOutput

from .conftest import IS_INTERPRETED

pytestmark = pytest.mark.slow

TINY = replace(GpuSettings().tiny(), precisions=("bfloat16",))


class Event:
    """Time on a device that is not there."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return max(1e3 * (end.at - self.at), 1e-3)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class Graph:
    def replay(self) -> None:
        pass


class GraphedForward:
    """Stands in for graph replay."""

    def __init__(self, model: ProteinBert) -> None:
        self.model = model

    def __call__(self, batch: PackedBatch) -> ProteinBertOutput:
        return self.model(batch)


def pretend_gpu(patch: pytest.MonkeyPatch) -> None:
    """The steps that only a GPU takes, on fakes."""
    plain = bench.environment
    found = {"gpu": "Fake GPU", "multiprocessors": 1, "gpu_memory_bytes": 2**30, "tuned": "shipped"}
    patch.setattr(bench, "environment", lambda device: plain(device) | found)
    patch.setattr(bench.Bench, "on_gpu", True)
    fakes = {
        "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "current_stream": Stream,
        "stream": lambda stream: nullcontext(), "graph": lambda graph: nullcontext(), "synchronize": lambda: None,
        "empty_cache": lambda: None, "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 101_000,
    }  # fmt: skip
    for name, fake in fakes.items():
        patch.setattr(torch.cuda, name, fake)
    kernel = SimpleNamespace(key="local_block_kernel", count=6, self_device_time_total=3000.0)
    # Two of the same name, as templates of which only the beginning is shown.
    again = SimpleNamespace(key="local_block_kernel", count=2, self_device_time_total=500.0)
    launch = SimpleNamespace(key="cudaLaunchKernel", count=9, self_device_time_total=0.0)
    profiler = SimpleNamespace(key_averages=lambda: [kernel, again, launch])
    patch.setattr(torch.profiler, "profile", lambda activities: nullcontext(profiler))
    patch.setitem(sys.modules, "proteinbert_fast.graphs", SimpleNamespace(GraphedForward=GraphedForward))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> GpuReport:
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        if IS_INTERPRETED:
            pretend_gpu(patch)
        return command.run(TINY, SECTIONS, torch.device("cpu" if IS_INTERPRETED else "cuda"), None, folder)


def test_every_section_runs(report: GpuReport):
    assert list(report.sections) == list(SECTIONS)
    assert report.wrong == []
    for row in report.rows:
        assert row.status == "measured" or row.note == latency.NO_GRAPHS, f"{row.case.label}: {row.note}"
    for row in report.rows:
        if row.status == "measured" and row.case.table not in {"checks", profile.TABLE, profile.TRAINING}:
            assert row.seconds, row.case.label
            assert row.check or row.case.probe == "matrix", row.case.label


@pytest.mark.skipif(not IS_INTERPRETED, reason="of a GPU that is not there")
def test_what_only_a_gpu_has(report: GpuReport):
    long = [row for row in report.sections["long"] if row.case.work.proteins == 1]
    assert [row.values["bytes_per_residue"] for row in long] == [
        pytest.approx(100_000 / row.case.work.residues) for row in long
    ]
    profiled = report.sections["profile"]
    assert [(row.case.name, row.values["launches"]) for row in profiled] == [
        ("all kernels", 8), ("local_block_kernel", 8),
    ] * 2  # fmt: skip
    assert {row.seconds[0] for row in profiled} == {0.0035}
    assert [row.case.table for row in profiled] == [profile.TABLE] * 2 + [profile.TRAINING] * 2
    for row in report.sections["training"][:2]:
        assert row.values["predicted_residues_per_second"] > 0
        assert sum(row.values["predicted_bounds"].values()) == pytest.approx(1)
    assert all("in a CUDA graph" in row.note for row in report.sections["kernels"])
    assert all(target.value is not None for _, target in report.targets)
    assert report.to_markdown().startswith("# proteinbert_fast on Fake GPU")


def test_every_kernel_is_checked_timed_and_predicted(report: GpuReport):
    names = [operation.name for operation in OPERATIONS]
    assert [row.case.name for row in report.sections["checks"]][: len(names)] == names
    rows = [row for row in report.sections["kernels"] if row.case.table == KERNELS]
    assert [row.case.name for row in rows] == names
    gradients = report.sections["gradients"]
    assert [row.case.name for row in gradients] == [operation.name for operation in GRADIENTS]
    for row in [*rows, *gradients]:
        v = row.values
        assert 0 < v["predicted_ns_per_token"] <= v["predicted_serial_ns_per_token"]
        assert v["bound_by"] in {"matrix", "HBM", "L2", "instructions"}
        assert v["peaks"] == "measured in the same run"


@pytest.mark.parametrize("gradient", GRADIENTS, ids=lambda g: g.name)
def test_gradients_are_compared_with_the_reference(gradient):
    precision = "float32"
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    inputs = Inputs(TINY.config, (13, 0, 40), PRECISIONS[precision], device, torch.device("cpu"))
    right = gradient.defined(inputs, gradient.exact(inputs.exact()))
    with torch.inference_mode():
        found = gradient.defined(inputs, gradient.run(inputs))
    assert compared(found, right, precision, gradient.by_largest).passed
    # Each of them counts.
    for k, t in enumerate(found):
        if t is not None and t.dim():
            off = t.clone()
            off.flatten()[-1] += 0.5 * t.abs().max()
            assert not compared((*found[:k], off, *found[k + 1 :]), right, precision, gradient.by_largest).passed
            assert error(found, right, True) < error((*found[:k], off, *found[k + 1 :]), right, True)


def test_files(report: GpuReport, tmp_path: Path):
    written = write(report, tmp_path / "new")
    values = json.loads(written[0].read_text())
    assert [section["name"] for section in values["sections"]] == list(SECTIONS)
    assert values["settings"]["is_trial"]
    text = written[1].read_text()
    assert "not numbers worth keeping" in text
    for target in ("memory beyond the weights", "time per residue, slowest", "the largest piece", "p50 latency",
                   "forward bfloat16", "of the matrix rate", "padded eager", "torch.compile"):  # fmt: skip
        assert f"| {target}" in text or f"{target} " in text or f"over {target}" in text, target


def test_a_wrong_kernel_has_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def wrong(*arguments, **options):
        found = plain(*arguments, **options)
        return found._replace(query=found.query * 1.3)

    plain = kernels.message
    monkeypatch.setattr(kernels, "message", wrong)
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    found = command.run(TINY, ["checks", "kernels", "latency"], device, None, tmp_path)
    status = {(row.case.table, row.case.name): row for row in found.rows}
    assert status["checks", "message"].status == "wrong"
    assert "allowed 0.06" in status["checks", "message"].check
    timed = status[KERNELS, "message"]
    assert timed.status == "wrong"
    assert not timed.seconds
    assert status[KERNELS, "local_block"].seconds
    # The model needs it.
    assert status["one protein of 10 residues", "ours, eager"].status == "wrong"
    assert "WRONG: no time" in found.to_markdown()
    assert "WRONG: message in bfloat16" in capsys.readouterr().err


def test_a_kernel_that_raises_is_wrong(monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments, **options):
        raise RuntimeError("PTXAS failed\nwith a long log")

    monkeypatch.setattr(kernels, "residue_mean", broken)
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    found = {o.name: o for o in checks.run(TINY, PRECISIONS["float32"], device) if not isinstance(o, str)}
    assert found["residue_mean"] == ("residue_mean", False, "RuntimeError: PTXAS failed")
    assert found["local_block"].passed


def test_checks_in_a_process_of_their_own():
    device = torch.device("cpu" if IS_INTERPRETED else "cuda")
    settings = replace(TINY, check_lengths=((5,),), model_lengths=(3,))
    # float32: the interpreter's bfloat16 is mended in this process only.
    found = checks.run_apart(settings, [PRECISIONS["float32"]], device)["float32"]
    assert [outcome.name for outcome in found] == list(checks.CHECKS)
    # The oldest interpreter needs mending for loops too.
    assert all(outcome.passed or "InterpreterError" in outcome.found for outcome in found), found
    assert found[0].passed
    ended = checks.run_apart(replace(settings, apart_seconds=0.01), [PRECISIONS["float32"]], device)["float32"]
    assert ended == [("local_block", False, "its process was ended after 0 s")]
