"""The local block for Hopper: emulated on the CPU everywhere, and on the chip where there is one."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels import local_block_hopper
from proteinbert_fast.ops.kernels.launching import capability_of
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration, implementation, launch, portable_because
from proteinbert_fast.ops.reference import LocalBlockWeights

from .conftest import IS_INTERPRETED
from .gluon_emulator import Descriptor, Emulated, EmulationError, Gluon, Pointer, Program, run
from .test_operations import TOLERANCE, Case, close, config_of

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]
CPU = torch.device("cpu")
HALF = [torch.bfloat16, torch.float16]
SHIPPED = local_block_hopper.configuration(128)


def no_hopper() -> str | None:
    """Why the kernel cannot run here on a chip."""
    if IS_INTERPRETED or not torch.cuda.is_available():
        return "needs a GPU"
    return portable_because(capability_of(torch.empty(0, device="cuda")), 128, torch.bfloat16)


on_hopper = pytest.mark.skipif(no_hopper() is not None, reason=no_hopper() or "")


@contextmanager
def emulating(module: ModuleType, kernel: str) -> Iterator[None]:
    """A kernel's launches are emulated: under any version of Triton, since nothing is compiled."""
    emulated = Emulated(getattr(module, kernel))
    with patch.object(module, kernel, emulated), patch.object(triton, "__version__", "3.6.0"):
        yield


def emulate_all(
    case: Case, c: HopperConfiguration = SHIPPED, keep_hidden: bool = True, module: ModuleType = local_block_hopper
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with emulating(module, "local_block_hopper_kernel"):
        return launched_all(case, c, keep_hidden, module)


def launched_all(
    case: Case, c: HopperConfiguration = SHIPPED, keep_hidden: bool = True, module: ModuleType = local_block_hopper,
    keep_results: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Hidden and local states and both convolutions' results (R, D)."""
    weights, batch, kept = case.block.local_weights(), case.batch, (keep_hidden, keep_results)
    with torch.no_grad():
        if module is local_block_hopper:
            return launch(case.x, None, case.word, batch.segments, list(weights), batch.gap, 5, *kept, c)
        return module.launch(case.x, case.word, batch.segments, weights, batch.gap, 5, *kept, c)


def emulate(
    case: Case, c: HopperConfiguration = SHIPPED, keep_hidden: bool = True, module: ModuleType = local_block_hopper
) -> tuple[Tensor, Tensor]:
    with emulating(module, "local_block_hopper_kernel"):
        return launched(case, c, keep_hidden, module)


def launched(
    case: Case, c: HopperConfiguration = SHIPPED, keep_hidden: bool = True, module: ModuleType = local_block_hopper
) -> tuple[Tensor, Tensor]:
    """Hidden and local states (R, D)."""
    return launched_all(case, c, keep_hidden, module, False)[:2]


RUNS = [
    pytest.param(emulate, CPU, id="emulated"),
    pytest.param(launched, torch.device("cuda"), id="chip", marks=on_hopper),
]


RUNS_ALL = [
    pytest.param(emulate_all, CPU, id="emulated"),
    pytest.param(launched_all, torch.device("cuda"), id="chip", marks=on_hopper),
]


def check(case: Case, hidden: Tensor | None, local: Tensor) -> None:
    with torch.no_grad():
        right = reference.local_block(
            case.x.double(), case.word.double(), case.batch.segments, case.exact.local_weights(), 5
        )
    for found, expected in ((hidden, right.hidden), (local, right.local)):
        if found is not None:
            close(found, expected, TOLERANCE[case.x.dtype])
            assert not found[~case.inside[:, 0]].any()


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("residues", [(0,), (1, 1), (13, 0, 7), (61, 62, 63), (106,), (300, 1, 109)], ids=str)
def test_equals_the_reference(residues, dtype, runs, where):
    case = Case(config_of(128), residues, dtype, where)
    hidden, local = runs(case)
    check(case, hidden, local)


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize(
    "chosen",
    [
        HopperConfiguration(64, 64, 4, 3, None),
        HopperConfiguration(128, 64, 4, 3, None),
        HopperConfiguration(128, 32, 8, 6, 128),
        HopperConfiguration(128, 64, 8, 2, 128),
        HopperConfiguration(256, 64, 8, 6, None),
        HopperConfiguration(256, 128, 8, 3, None),
        HopperConfiguration(256, 64, 16, 6, 128),
    ],
    ids=str,
)
def test_every_configuration_gives_the_same_bits(chosen, runs, where):
    case = Case(config_of(128), (150, 3, 140), torch.bfloat16, where)
    hidden, local = runs(case, chosen)
    check(case, hidden, local)
    for ours, shipped in zip((hidden, local), runs(case), strict=True):
        assert torch.equal(ours, shipped)


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize(
    "sizes", [{"d_local": 64}, {"d_local": 128, "kernel_size": 3}, {"d_local": 64, "kernel_size": 5}], ids=str
)
def test_other_sizes(sizes, runs, where):
    config = type(config_of(128))(n_annotations=3, n_blocks=1, d_global=96, n_heads=2, d_key=32, **sizes)
    case = Case(config, (70, 3, 90), torch.bfloat16, where)
    check(case, *runs(case, local_block_hopper.configuration(config.d_local)))


@pytest.mark.parametrize(("runs", "where"), RUNS)
def test_without_hidden_states(runs, where):
    case = Case(config_of(128), (100, 41), torch.bfloat16, where)
    _, local = runs(case, SHIPPED, False)
    assert torch.equal(local, runs(case)[1])


def check_results(case: Case, narrow: Tensor, wide: Tensor) -> None:
    weights, gap = case.exact.local_weights(), case.batch.gap
    with torch.no_grad():
        for found, weight, bias, dilation in (
            (narrow, weights.narrow_weight, weights.narrow_bias, 1), (wide, weights.wide_weight, weights.wide_bias, 5)
        ):  # fmt: skip
            right = reference.convolution(case.x.double(), weight, bias, dilation)
            close(found[gap:], right[gap:], TOLERANCE[case.x.dtype])


def check_all(case: Case, hidden: Tensor, local: Tensor, narrow: Tensor, wide: Tensor) -> None:
    check(case, hidden, local)
    check_results(case, narrow, wide)


@pytest.mark.parametrize(("runs", "where"), RUNS_ALL)
@pytest.mark.parametrize(
    ("d_local", "dtype", "residues"),
    [(128, torch.bfloat16, (61, 62, 63)), (128, torch.float16, (106,)), (64, torch.bfloat16, (0, 90))],
    ids=str,
)
def test_both_convolutions_results_are_kept_for_training(d_local, dtype, residues, runs, where):
    case = Case(config_of(d_local), residues, dtype, where)
    c = local_block_hopper.configuration(d_local)
    hidden, local, narrow, wide = runs(case, c)
    check_results(case, narrow, wide)
    without = emulate if where is CPU else launched
    for kept, alone in zip((hidden, local), without(case, c), strict=True):
        assert torch.equal(kept, alone)


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_same_bits_wherever_a_protein_lies(dtype, runs, where):
    alone = Case(config_of(128), (75,), dtype, where)
    together = Case(config_of(128), (31, 75, 8), dtype, where)
    start, length = int(together.batch.starts[1]), int(together.batch.lengths[1])
    first = int(alone.batch.starts[0])
    together.x[start : start + length] = alone.x[first : first + length]
    together.word[1] = alone.word[0]
    for a, b in zip(runs(alone), runs(together), strict=True):
        assert torch.equal(a[first : first + length], b[start : start + length])


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_in_their_protein(value, runs, where):
    case = Case(config_of(128), (50, 50), torch.bfloat16, where)
    place = int(case.batch.starts[1]) + 7
    case.x[place, 3] = value
    case.word[1] = value
    _, local = runs(case)
    assert local[place].isnan().all()
    assert not local[~case.inside[:, 0]].any()
    assert case.batch.unpack(local)[0].isfinite().all()


def emulate_last_of_many(module: ModuleType) -> None:
    """The last tile of 30 million rows, of which only these are there, against the same rows as a batch."""
    case = Case(config_of(128), (60,), torch.bfloat16, CPU)
    c, gap, program = SHIPPED, case.batch.gap, 234_567
    shift = program * c.rows
    n_rows = shift + case.batch.n_rows
    assert n_rows * 128 > 2**31
    made = [torch.full_like(case.x, float("nan")) for _ in range(4)]
    x, segments, *out = (Pointer(t, origin=shift * t[0].numel()) for t in (case.x, case.batch.segments, *made))
    w = LocalBlockWeights(*(t.detach() for t in case.block.local_weights()))
    tiles = Descriptor(module.weight_stream(w, case.x.dtype), [c.chunk, 128], module.weight_layout())
    run(
        module.local_block_hopper_kernel, [program], x, tiles, case.word, segments, w.narrow_bias, w.wide_bias,
        w.norm1_weight, w.norm1_bias, w.dense_bias, w.norm2_weight, w.norm2_bias, *out, gap, n_rows,
        warps=c.warps, D=128, TAPS=9, DILATION=5, M=c.rows, CHUNK=c.chunk, STAGES=c.stages, HALO=module.HALO,
        KEEP_HIDDEN=True, KEEP_RESULTS=True, EPSILON=LAYER_NORM_EPS,
    )  # fmt: skip
    for ours, right in zip(made, emulate_all(case), strict=True):
        assert torch.equal(ours[gap:], right[gap:])


def test_offsets_beyond_32_bits():
    emulate_last_of_many(local_block_hopper)


PLANTED = {
    "a wrong phase": ("(step // STAGES) & 1", "(step // STAGES + 1) & 1", "still writing"),
    "a refill before its products are done": ("num_outstanding=1", "num_outstanding=2", "still writing"),
    "a refill of the wrong stage": ("step - 1 + STAGES", "step + STAGES", "still writing|more arrivals"),
    "no refill at a convolution's end": ("first_step + (TAPS * PER_TAP - 1 + STAGES)", "STEPS", "never ends"),
    "a narrow convolution one row off": ("0, REACH - TAPS // 2, 1", "0, REACH - TAPS // 2 + 1, 1", None),
    "a residual one row off": ("x.index(REACH)", "x.index(REACH + 1)", None),
    "a wrong dilation": ("PER_TAP, 0, DILATION", "PER_TAP, 0, DILATION - 1", None),
    "channels in another order": ("(CHUNK // 8 * ROWS)", "(CHUNK // 16 * ROWS)", None),
    "a halo too short": ("more < 2 * REACH", "more < REACH", None),
    "no mask at the array's end": ("(rows < left + REACH)", "(rows < M)", "outside its array"),
    "no mask for stores": ("in_batch = (rows < left)", "in_batch = (rows < M)", "outside its array"),
    "no wait for x": ("async_copy.wait_group(0)", "async_copy.wait_group(1)", "still writing|nobody waited"),
    "no fence after x": ("wait_group(0)\n    fence_async_shared()", "wait_group(0)", "no fence and barrier"),
    "no barrier after hidden states": ("thread_barrier()\n    in_batch", "in_batch", "no fence and barrier"),
    "no fence after barriers": ("fence_async_shared()\n    for", "for", "no fence between"),
    "results beyond the end": ("(at < left)[:, None])\n    res", "(at < M)[:, None])\n    res", "outside its array"),
    "the wide result for the narrow one": ("store(WIDE", "store(NARROW", None),
    "a result after its activation": ("at_result, total.to", "at_result, gelu(total, False).to", None),
    "gap rows left": ("gl.where(inside, local, 0.0)", "(local + gl.where(inside, 0.0, 0.0))", None),
    "32-bit offsets": ("gl.program_id(0).to(gl.int64)", "gl.program_id(0)", None),
}  # fmt: skip


def planted(name: str, folder: Path) -> ModuleType:
    """The kernel with one mistake."""
    old, new, _ = PLANTED[name]
    return changed(local_block_hopper, old, new, folder)


def changed(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A module whose source has something else in one place."""
    source = Path(module.__file__).read_text()
    assert source.count(old) >= 1
    path = folder / "planted_hopper.py"
    path.write_text(source.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location("planted_hopper", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("name", [name for name in PLANTED if name != "32-bit offsets"])
def test_a_planted_mistake_is_found(name, tmp_path):
    case = Case(config_of(128), (40, 75), torch.bfloat16, CPU)
    module = planted(name, tmp_path)
    says = PLANTED[name][2]
    with pytest.raises(EmulationError if says else AssertionError, match=says):
        check_all(case, *emulate_all(case, module=module))


def test_32_bit_offsets_are_found(tmp_path):
    with pytest.raises(EmulationError, match="outside its array"):
        emulate_last_of_many(planted("32-bit offsets", tmp_path))


def test_what_is_unsupported_is_told(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    told = local_block_hopper.unsupported
    assert told(128, torch.bfloat16, 9, 5, 20) is None
    assert "d_local is 256, not 64 or 128" in told(256, torch.bfloat16, 9, 5, 20)
    assert "the dtype is float32" in told(128, torch.float32, 9, 5, 20)
    assert "9 taps 9 rows apart reach 36 rows" in told(128, torch.bfloat16, 9, 9, 40)
    assert "the gap (10 rows)" in told(128, torch.bfloat16, 9, 5, 10)
    assert "8 taps" in told(128, torch.bfloat16, 8, 5, 20)
    assert implementation(90, 128, torch.bfloat16) == "hopper (the tile of x stays in shared memory)"
    assert implementation(80, 128, torch.bfloat16) == "portable (the compute capability is 8.0, not 9.0)"


@pytest.mark.parametrize("version", ["3.6.0", "3.6.0+git9844da95", "3.7.0", "3.7.1", "3.7.1+gitabc"])
def test_it_runs_under(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    assert implementation(90, 128, torch.bfloat16).startswith("hopper (")


@pytest.mark.parametrize("version", ["3.5.1", "3.8.0", "3.10.0", "3.60.0", "3.70.1", "4.6.0", "13.6.0", "3", "unknown"])
def test_under_another_triton_the_portable_kernel_runs_and_says_why(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    says = f"triton is {version}; only 3.6 and 3.7 allow views that begin at any row of a tile"
    assert implementation(90, 128, torch.bfloat16).startswith(f"portable ({says}, which the portable kernels do")
    case = Case(config_of(128), (5,), torch.bfloat16, CPU)
    with pytest.raises(BackendError, match=f"the local block for Hopper: {re.escape(says)}"):
        launched(case)


def test_once_distrusted_it_does_not_run_again(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    portable = sys.modules[launch.__module__]
    monkeypatch.setattr(portable, "_distrusted", [])
    assert portable_because(90, 128, torch.bfloat16) is None
    portable.distrust_hopper("a self-check found other numbers")
    assert portable_because(90, 128, torch.bfloat16) == "a self-check found other numbers"
    assert implementation(90, 64, torch.float16) == "portable (a self-check found other numbers)"


def test_asked_for_where_it_cannot_run_it_says_why():
    case = Case(config_of(32), (5,), torch.bfloat16, CPU)
    with pytest.raises(BackendError, match="the local block for Hopper: d_local is 32, not 64 or 128"):
        emulate(case)


def test_another_gluon_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, local_block_hopper.__name__, None)
    monkeypatch.delattr(sys.modules["proteinbert_fast.ops.kernels"], "local_block_hopper")
    assert "has another Gluon" in (portable_because(90, 128, torch.bfloat16) or "")


def test_the_emulator_has_no_name_that_gluon_lacks():
    """Else it would run a kernel that the installed Triton cannot compile."""
    emulated = Gluon(Program(0, 8))
    for module, stand_in in (
        (gl, emulated.language), (async_copy, emulated.async_copy), (mbarrier, emulated.mbarrier), (tma, emulated.tma),
    ):  # fmt: skip
        assert [name for name in vars(stand_in) if not hasattr(module, name)] == []


@pytest.mark.parametrize("name", ["barrier", "thread_barrier"])
def test_a_barrier_under_its_name_in_one_triton_is_found(name, tmp_path):
    """Kernels name it by ``thread_barrier`` of their module, which either Triton has."""
    module = changed(local_block_hopper, "    thread_barrier()", f"    gl.{name}()", tmp_path)
    with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
        emulate(Case(config_of(128), (5,), torch.bfloat16, CPU), module=module)


def test_a_gluon_without_the_barrier_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, local_block_hopper.__name__)
    monkeypatch.delattr(sys.modules["proteinbert_fast.ops.kernels"], "local_block_hopper")
    for name in ("barrier", "thread_barrier"):
        monkeypatch.delattr(gl, name, raising=False)
    assert "has another Gluon: cannot import name 'thread_barrier'" in (portable_because(90, 128, torch.bfloat16) or "")


def test_importing_the_kernels_leaves_gluon_alone():
    code = "import sys, proteinbert_fast.ops.kernels as k; sys.exit(f'{k.__name__}.local_block_hopper' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
