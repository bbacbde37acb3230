"""Tuned configurations: the table is read, refused, used; the search refuses what would change bits."""

import json
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from proteinbert_fast.benchmark import tune
from proteinbert_fast.benchmark.tune import Job, Search, Tried, best_of, candidates, outcome_of
from proteinbert_fast.cli.main import main
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops import kernels  # noqa: F401
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.tuning import Machine

from .conftest import IS_INTERPRETED

pytestmark = pytest.mark.slow

for _name in tune.BACKWARD:
    import_module(f"proteinbert_fast.ops.kernels.{_name}")

local_block = sys.modules["proteinbert_fast.ops.kernels.local_block"]
global_attention = sys.modules["proteinbert_fast.ops.kernels.global_attention"]

MACHINE = Machine("NVIDIA H100 80GB HBM3", 90, "3.6.0", "0.1.0")
FASTER = local_block.Configuration(64, 64, 4, 4, True, False)
SHIPPED = local_block.Configuration(128, 64, 8, 3, True, False)
SIZES = ProteinBertConfig(n_annotations=3, d_local=32, d_global=32, n_blocks=1, n_heads=2, d_key=16)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A GPU that is not there, whose tables lie in an empty folder."""
    monkeypatch.setenv("PROTEINBERT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "machine_of", lambda index: MACHINE)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tuning.forget()
    yield MACHINE
    tuning.forget()


def written(**changes) -> Path:
    path = tune.write(MACHINE, {"local_block/bfloat16/128": tuple(FASTER)})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def chosen() -> tuple:
    return local_block.configuration(90, 128, torch.bfloat16)


def test_a_table_is_used_for_what_it_holds(machine, tmp_path):
    assert chosen() == SHIPPED
    assert tuning.report().startswith("shipped configurations (no tuned table at ")
    path = written()
    assert path == tmp_path / "tuning" / "nvidia-h100-80gb-hbm3-3.6.0-0.1.0.json"
    assert chosen() == FASTER
    assert type(chosen()) is local_block.Configuration
    assert f"1 configurations: {path}" in tuning.report()
    # Another dtype, width, kernel or chip: as shipped. So is whatever asks for it.
    assert local_block.configuration(90, 128, torch.float16) == SHIPPED
    assert local_block.configuration(90, 64, torch.bfloat16).rows == 128
    assert local_block.configuration(80, 128, torch.bfloat16).rows == 64
    assert global_attention.configuration(90, 128, torch.bfloat16).rows == 64
    with tuning.using(None):
        assert chosen() == SHIPPED
    with tuning.using({"local_block": (32, 32, 4, 2, False, False)}):
        assert chosen().rows == 32


def test_without_a_gpu_no_table_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(tuning, "machine_of", lambda index: pytest.fail("asked"))
    assert chosen() == SHIPPED
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert local_block.configuration(0, 128, torch.bfloat16).rows == 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 1}, "is no tuned table of format 2"),
        ({"device": "NVIDIA A100"}, "is for device 'NVIDIA A100', this is 'NVIDIA H100 80GB HBM3'"),
        ({"triton": "3.9.0"}, "is for triton '3.9.0', this is '3.6.0'"),
        ({"configurations": [1]}, "holds something else than configurations"),
        ({"configurations": {"local_block/bfloat16/128": {"rows": "rm -rf"}}}, "holds something else"),
        ({"configurations": {"local_block/bfloat16/128": {"rows": 10**9}}}, "holds something else"),
        ({"configurations": {"local_block/bfloat16/128": {"rows": 64}}}, "has other fields for local_block than rows,"),
    ],
)
def test_a_foreign_table_is_named_once(machine, caplog, changes, says):
    path = written(**changes)
    with caplog.at_level(logging.WARNING):
        assert [chosen(), chosen()] == [SHIPPED, SHIPPED]
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert says in record.getMessage()
    assert "shipped configurations are used" in record.getMessage()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
def test_a_damaged_table_is_named_once(machine, caplog, content):
    path = written()
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert [chosen(), chosen()] == [SHIPPED, SHIPPED]
    (record,) = caplog.records
    assert record.getMessage().startswith(str(path))
    assert "\n" not in record.getMessage()


def test_what_was_tuned_before_is_kept(machine):
    written()
    path = tune.write(MACHINE, {"global_attention/bfloat16/128": (32, 4, 2, 0)})
    table = tuning.read(path, MACHINE)
    assert list(table.configurations) == ["local_block/bfloat16/128", "global_attention/bfloat16/128"]
    assert global_attention.configuration(90, 128, torch.bfloat16).rows == 32
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kernel", ["local_block", "global_attention"])
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
def test_candidates_fit(kernel, dtype, capability):
    found = candidates(Job(kernel, dtype, 128), capability)
    assert len(found) == len(set(found)) >= 4
    fields = sys.modules[f"proteinbert_fast.ops.kernels.{kernel}"].Configuration._fields
    for values in found:
        named = dict(zip(fields, values, strict=True))
        if named.get("descriptors"):
            assert capability >= 90
        if kernel == "local_block":
            assert dtype != "bfloat16" or named["stages"] * (named["rows"] + 128) * named["chunk"] * 2 <= 227 * 1024


@pytest.mark.parametrize("kernel", tune.BACKWARD)
@pytest.mark.parametrize("capability", [75, 80, 86, 90, 100])
def test_candidates_of_the_backward_pass(kernel, capability):
    found = candidates(Job(kernel, "bfloat16", 128), capability)
    assert len(found) == len(set(found))
    is_hopper_only = kernel.endswith("_hopper")
    has_hopper = local_block.portable_because(capability, 128, torch.bfloat16) is None  # with this Triton
    assert bool(found) == (has_hopper if is_hopper_only else capability >= 80)
    assert candidates(Job(kernel, "float32", 128), capability) == []
    kind = sys.modules[f"proteinbert_fast.ops.kernels.{kernel}"]
    kind = kind.HopperConfiguration if is_hopper_only else kind.Configuration
    for values in found:
        # What would add rows up in another order stays as shipped.
        named = kind(*values)
        if kernel == "local_block_backward":
            assert (named.rows, named.weight_rows, named.taps) == (
                32,
                64 if capability >= 90 else 32,
                3 if capability >= 90 else 1,
            )
        if kernel == "global_attention_backward":
            assert named.weight_rows == (64 if capability >= 90 else 32)


def test_a_table_of_the_backward_pass_is_used(machine):
    module = sys.modules["proteinbert_fast.ops.kernels.global_attention_backward"]
    shipped = module.configuration(90, 128, torch.bfloat16)
    tune.write(MACHINE, {"global_attention_backward/bfloat16/128": tuple(shipped._replace(stages=3, registers=None))})
    assert module.configuration(90, 128, torch.bfloat16) == shipped._replace(stages=3, registers=None)
    hopper = sys.modules["proteinbert_fast.ops.kernels.local_block_backward_hopper"]
    tune.write(MACHINE, {"local_block_backward_hopper/bfloat16/128": (256, 64, 16, 3, 128)})
    assert hopper.configuration(128).rows == 256
    assert hopper.configuration(128, torch.float16).rows == 128
    backward = sys.modules["proteinbert_fast.ops.kernels.local_block_backward"]
    tuned = backward.configuration(90, 128, torch.bfloat16)._replace(registers=168)
    tune.write(MACHINE, {"local_block_backward/bfloat16/128": tuple(tuned)})
    assert backward.configuration(90, 128, torch.bfloat16) == tuned


def test_shipped_configurations_are_candidates():
    modules = {"local_block": local_block, "global_attention": global_attention}
    modules |= {
        name: sys.modules[f"proteinbert_fast.ops.kernels.{name}"] for name in tune.BACKWARD if "hopper" not in name
    }
    for kernel, module in modules.items():
        for capability in (80, 86, 90, 100, 120):
            for dtype in ("bfloat16", "float16"):
                shipped = tuple(module.configuration(capability, 128, getattr(torch, dtype)))
                assert shipped in candidates(Job(kernel, dtype, 128), capability)


@pytest.mark.skipif(not IS_INTERPRETED, reason="configurations of the interpreter")
def test_the_search_times_what_keeps_the_bits(device):
    job = Job("local_block", "float32", 32)
    seconds = iter([1.0, 0.5, 2.0])
    search = Search(job, [20, 7], device, lambda run: run() and next(seconds), SIZES, (0, 13))
    shipped = search._shipped()
    smaller, halves = (32, *shipped[1:]), (64, 16, *shipped[2:])
    broken = (64, 24, *shipped[2:])  # not a power of two
    tried = [found for found in search.run([smaller, halves, broken]) if isinstance(found, Tried)]
    assert [(t.chosen, t.seconds) for t in tried] == [
        (shipped, 1.0), (smaller, 0.5), (halves, None), (broken, None), (shipped, 2.0),
    ]  # fmt: skip
    assert tried[2].refused == "other bits than the shipped configuration"
    assert tried[3].refused
    assert search.confirm(smaller) == ""
    assert search.confirm(halves) == "other bits in some variant"
    assert best_of(tried, shipped, search.confirm) == tried[1]


@pytest.mark.skipif(not IS_INTERPRETED, reason="configurations of the interpreter")
def test_attention_is_searched_too(device):
    search = Search(Job("global_attention", "float32", 32), [20, 7], device, lambda run: 1.0, SIZES, (0, 13))
    shipped = search._shipped()
    tried = [found for found in search.run([(64, 8, 1, 32)]) if isinstance(found, Tried)]
    assert [t.seconds for t in tried] == [1.0, 1.0, 1.0]
    assert best_of(tried, shipped, search.confirm) is None


@pytest.mark.skipif(not IS_INTERPRETED, reason="configurations of the interpreter")
@pytest.mark.parametrize("kernel", ["local_block_backward", "global_attention_backward"])
def test_gradients_are_searched_too(device, kernel):
    search = Search(Job(kernel, "float32", 32), [20, 7], device, lambda run: run() and 1.0, SIZES, (0, 13))
    shipped = search._shipped()
    kind = sys.modules[f"proteinbert_fast.ops.kernels.{kernel}"].Configuration
    warps, rows = kind(*shipped)._replace(warps=8), kind(*shipped)._replace(weight_rows=16)
    tried = [found for found in search.run([tuple(warps), tuple(rows)]) if isinstance(found, Tried)]
    assert [t.seconds for t in tried] == [1.0, 1.0, None, 1.0]
    assert tried[2].refused == "other bits than the shipped configuration"
    assert search.confirm(tuple(warps)) == ""


def test_best_of_wants_a_gain_and_a_confirmation():
    shipped, a, b, c = (1,), (2,), (3,), (4,)
    tried = [
        Tried(shipped, 1.0, ""),
        Tried(a, 0.99, ""),
        Tried(b, 0.8, ""),
        Tried(c, 0.7, ""),
        Tried(shipped, 0.95, ""),
    ]
    assert best_of(tried, shipped, lambda _: "") == tried[3]
    assert best_of(tried, shipped, lambda chosen: "other bits" if chosen == c else "") == tried[2]
    assert best_of(tried, shipped, lambda _: "other bits") is None
    assert best_of(tried[:2], shipped, lambda _: "") is None
    assert best_of(tried[1:3], shipped, lambda _: "") is None


def test_a_process_that_dies_names_its_candidate():
    lines = ['{"begun": [1, true]}', '{"tried": [[1, true], 0.5, ""]}', "noise", '{"begun": [2, true]}']
    assert outcome_of(lines) == ([Tried((1, True), 0.5, "")], (2, True), False, None)
    finished = outcome_of([*lines, '{"tried": [[2, true], null, "too slow"]}', '{"best": [[1, true], 0.5, ""]}'])
    assert finished.finished
    assert finished.best == Tried((1, True), 0.5, "")
    assert outcome_of([*lines, '{"best": null}']).best is None


def test_a_candidate_that_kills_its_process_is_left_out(monkeypatch):
    good, deadly = (64, 4), (128, 4)
    runs = []

    def process(job, wanted):
        runs.append(list(wanted))
        if deadly in wanted:
            return [f'{{"begun": {json.dumps(deadly)}}}'], "its process ended with exit code -6"
        return [f'{{"tried": [{json.dumps(good)}, 0.5, ""]}}', f'{{"best": [{json.dumps(good)}, 0.5, ""]}}'], ""

    monkeypatch.setattr(tune, "_process", process)
    said: list[str] = []
    best = tune._in_processes(Job("local_block", "bfloat16", 128), [good, deadly], said.append)
    assert best == Tried(good, 0.5, "")
    assert runs == [[good, deadly], [good]]
    assert said[0] == "  (128, 4): refused: its process ended with exit code -6"


def test_a_process_that_never_begins_is_given_up(monkeypatch):
    monkeypatch.setattr(tune, "_process", lambda job, wanted: ([], "its process ended with exit code 1 no CUDA"))
    said: list[str] = []
    assert tune._in_processes(Job("local_block", "bfloat16", 128), [(1,)], said.append) is None
    assert said == ["  given up: its process ended with exit code 1 no CUDA"]


def test_tuning_writes_what_was_found(machine, monkeypatch):
    best = Tried(tuple(FASTER), 0.5, "")
    monkeypatch.setattr(tune, "_in_processes", lambda job, c, say: best if job.kernel == "local_block" else None)
    path = tune.tune(["bfloat16"], [128], lambda _: None)
    assert list(tuning.read(path, MACHINE).configurations) == ["local_block/bfloat16/128"]
    assert chosen() == FASTER


def test_without_a_gpu_tuning_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--tune: no CUDA GPU here"):
        tune.tune(["bfloat16"], [128], print)
    assert main(["bench", "--tune"]) == 1
    error = capsys.readouterr().err
    assert error == "proteinbert-fast: error: --tune: no CUDA GPU here; the shipped configurations are used\n"
    assert main(["bench", "--tune", "float64"]) == 2


def test_the_real_process_without_a_gpu_says_why():
    lines, end = tune._process(Job("local_block", "bfloat16", 128), [])
    if not torch.cuda.is_available():
        assert outcome_of(lines) == ([], None, False, None)
        assert end.startswith("its process ended with exit code 1 ")


def test_doctor_says_which_table_is_in_use():
    done = subprocess.run(
        [sys.executable, "-m", "proteinbert_fast", "doctor"], capture_output=True, text=True, check=False
    )
    (line,) = [line for line in done.stdout.splitlines() if "kernel tuning" in line]
    assert "shipped configurations" in line or "tuned table" in line
