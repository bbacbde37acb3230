"""The gradient of the local block's x for Hopper: emulated on the CPU everywhere, on the chip where there is one."""

from contextlib import nullcontext
from types import ModuleType

import pytest
import torch
from torch import Tensor

from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels import local_block_backward, local_block_backward_hopper
from proteinbert_fast.ops.kernels.launching import capability_of
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration, launch
from proteinbert_fast.ops.kernels.local_block_backward import Configuration
from proteinbert_fast.ops.kernels.local_block_hopper import weight_layout
from proteinbert_fast.ops.reference import LocalBlockWeights

from .conftest import IS_INTERPRETED
from .gluon_emulator import Descriptor, EmulationError, Pointer, run
from .test_gradients import TOLERANCE as GRADIENT_TOLERANCE
from .test_local_block_hopper import CPU, HALF, changed, emulating, on_hopper
from .test_operations import TOLERANCE, Case, close, config_of

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]
KERNEL = "convolution_gradient_hopper_kernel"
SHIPPED = local_block_backward_hopper.configuration(128)


class Gradients:
    """Of both convolutions' results and of their sum with x; zeros in gap rows, as the pointwise part leaves them."""

    def __init__(self, case: Case) -> None:
        self.narrow, self.wide, self.sum = (torch.randn_like(case.x) * case.inside for _ in range(3))


def flipped_taps(case: Case) -> Tensor:
    w = case.block.local_weights()
    parts = (w.narrow_weight.detach().permute(2, 0, 1).flip(0), w.wide_weight.detach().permute(2, 0, 1).flip(0))
    return torch.cat(parts).reshape(-1, case.x.shape[1])


def launched(
    case: Case, g: Gradients, c: HopperConfiguration = SHIPPED, module: ModuleType = local_block_backward_hopper
) -> Tensor:
    """The gradient of x (R, D)."""
    return module.launch(g.narrow, g.wide, g.sum.clone(), flipped_taps(case), case.batch.gap, 5, c)


def emulate(
    case: Case, g: Gradients, c: HopperConfiguration = SHIPPED, module: ModuleType = local_block_backward_hopper
) -> Tensor:
    with emulating(module, KERNEL):
        return launched(case, g, c, module)


RUNS = [
    pytest.param(emulate, CPU, id="emulated"),
    pytest.param(launched, torch.device("cuda"), id="chip", marks=on_hopper),
]


def check(case: Case, g: Gradients, found: Tensor) -> None:
    """Against float64 autograd of both convolutions."""
    x = case.x.double().requires_grad_()
    w, gap = LocalBlockWeights(*(w.detach() for w in case.exact.local_weights())), case.batch.gap
    made = (
        x,
        reference.convolution(x, w.narrow_weight, w.narrow_bias),
        reference.convolution(x, w.wide_weight, w.wide_bias, 5),
    )
    torch.autograd.backward(made, [d.double() for d in (g.sum, g.narrow, g.wide)])
    close(found[gap:], x.grad[gap:], TOLERANCE[found.dtype])


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("residues", [(0,), (1, 1), (61, 62, 63), (106,)], ids=str)
def test_equals_the_reference(residues, dtype, runs, where):
    case = Case(config_of(128), residues, dtype, where)
    g = Gradients(case)
    check(case, g, runs(case, g))


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize(
    "chosen",
    [
        HopperConfiguration(64, 64, 4, 3, None),
        HopperConfiguration(128, 32, 8, 6, 128),
        HopperConfiguration(256, 64, 8, 6, None),
    ],
    ids=str,
)
def test_every_configuration_gives_the_same_bits(chosen, runs, where):
    case = Case(config_of(128), (150, 3, 140), torch.bfloat16, where)
    g = Gradients(case)
    found = runs(case, g, chosen)
    check(case, g, found)
    assert torch.equal(found[case.batch.gap :], runs(case, g)[case.batch.gap :])


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize("sizes", [{"d_local": 64}, {"d_local": 128, "kernel_size": 3}], ids=str)
def test_other_sizes(sizes, runs, where):
    config = type(config_of(128))(n_annotations=3, n_blocks=1, d_global=96, n_heads=2, d_key=32, **sizes)
    case = Case(config, (70, 3, 90), torch.bfloat16, where)
    g = Gradients(case)
    check(case, g, runs(case, g, local_block_backward_hopper.configuration(config.d_local)))


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_same_bits_wherever_a_protein_lies(dtype, runs, where):
    alone, together = Case(config_of(128), (75,), dtype, where), Case(config_of(128), (31, 75, 8), dtype, where)
    g, all_g = Gradients(alone), Gradients(together)
    start, length = int(together.batch.starts[1]), int(together.batch.lengths[1])
    first = int(alone.batch.starts[0])
    for one, every in ((g.narrow, all_g.narrow), (g.wide, all_g.wide), (g.sum, all_g.sum)):
        every[start : start + length] = one[first : first + length]
    found, among = runs(alone, g), runs(together, all_g)
    assert torch.equal(found[first : first + length], among[start : start + length])


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(CPU, id="emulated", marks=pytest.mark.skipif(not IS_INTERPRETED, reason="needs the interpreter")),
        pytest.param(torch.device("cuda"), id="chip", marks=on_hopper),
    ],
)
@pytest.mark.parametrize("by_rule", [False, True])
def test_the_host_code_launches_it(by_rule, where, monkeypatch):
    case = Case(config_of(64), (70, 13), torch.bfloat16, where)
    weights, batch = LocalBlockWeights(*(w.detach() for w in case.block.local_weights())), case.batch
    made = launch(case.x, None, case.word, batch.segments, list(weights), batch.gap, 5, False, True, None)
    d_local = torch.randn_like(case.x)

    def gradients(chosen: Configuration | None) -> local_block_backward.Gradients:
        return local_block_backward.launch(
            d_local, None, case.x, None, *made[2:], case.word, batch.segments, batch.starts, batch.lengths,
            batch.longest, weights, batch.gap, 5, chosen=chosen,
        )  # fmt: skip

    shipped = local_block_backward.configuration(capability_of(case.x), 64, torch.bfloat16)
    portable = gradients(shipped)
    hopper = local_block_backward_hopper.configuration(64)
    launches = []
    real = local_block_backward_hopper.launch
    monkeypatch.setattr(local_block_backward_hopper, "launch", lambda *a: launches.append(a) or real(*a))
    if where == CPU:
        monkeypatch.setattr(local_block_backward, "portable_because", lambda *a: None)
    with emulating(local_block_backward_hopper, KERNEL) if where == CPU else nullcontext():
        found = gradients(None if by_rule else shipped._replace(hopper=hopper))
    assert [a[-1] for a in launches] == [hopper]
    size = portable.x.abs().max()
    close(found.x / size, portable.x / size, GRADIENT_TOLERANCE[torch.bfloat16])
    for ours, theirs in zip(found.weights, portable.weights, strict=True):
        assert torch.equal(ours, theirs)


def emulate_last_of_many(module: ModuleType) -> None:
    """The last tile of 30 million rows, of which only these are there, against the same rows as a batch."""
    case = Case(config_of(128), (60,), torch.bfloat16, CPU)
    g, c, gap, program = Gradients(case), SHIPPED, case.batch.gap, 234_567
    shift = program * c.rows
    n_rows = shift + case.batch.n_rows
    assert n_rows * 128 > 2**31
    d_x = g.sum.clone()
    narrow, wide, out = (Pointer(t, origin=shift * 128) for t in (g.narrow, g.wide, d_x))
    tiles = Descriptor(flipped_taps(case), [c.chunk, 128], weight_layout())
    run(
        module.convolution_gradient_hopper_kernel, [program], narrow, wide, tiles, out, out, gap, n_rows,
        warps=c.warps, D=128, TAPS=9, DILATION=5, M=c.rows, CHUNK=c.chunk, STAGES=c.stages, HALO=module.HALO,
    )  # fmt: skip
    assert torch.equal(d_x[gap:], emulate(case, g)[gap:])


def test_offsets_beyond_32_bits():
    emulate_last_of_many(local_block_backward_hopper)


PLANTED = {
    "32-bit offsets": ("gl.program_id(0).to(gl.int64)", "gl.program_id(0)", "outside its array"),
    "the narrow gradient one row off": ("left, TAPS // 2, D", "left, TAPS // 2 + 1, D", None),
    "the wide gradient one row off": ("left, TAPS // 2 * DILATION, D", "left, TAPS // 2 * DILATION - 1, D", None),
    "a wrong dilation": ("PER_TAP, 0, DILATION", "PER_TAP, 0, DILATION - 1", None),
    "the narrow gradient twice": ("load_tile(D_WIDE", "load_tile(D_NARROW", None),
    "the narrow taps twice": ("ring, full, TAPS * PER_TAP", "ring, full, 0", "before its copies"),
    "no end to the weights": ("2 * TAPS * PER_TAP", "2 * TAPS * PER_TAP + 1", "outside their array|before its copies"),
    "the sum left out": ("d_sum.to(gl.float32)", "d_sum.to(gl.float32) * 0", None),
    "no mask at the sum's end": ("(at < left)", "(at < M)", "outside its array"),
    "no mask at the result's end": ("(rows < left)", "(rows < M)", "outside its array"),
    "a halo too short": ("TAPS // 2 * DILATION, D, M, HALO)", "TAPS // 2 * DILATION, D, M, HALO // 4)", None),
    "barriers left behind": ("    close_ring(full, STAGES)\n", "", "not invalidated"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_found(name, tmp_path):
    old, new, says = PLANTED[name]
    module = changed(local_block_backward_hopper, old, new, tmp_path)
    case = Case(config_of(128), (40, 75), torch.bfloat16, CPU)
    g = Gradients(case)
    with pytest.raises(EmulationError if says else AssertionError, match=says):
        emulate_last_of_many(module) if "32" in name else check(case, g, emulate(case, g, module=module))


def test_asked_for_where_it_cannot_run_it_says_why():
    case = Case(config_of(32), (5,), torch.bfloat16, CPU)
    with pytest.raises(BackendError, match="the local block's gradient for Hopper: d_local is 32, not 64 or 128"):
        emulate(case, Gradients(case))
