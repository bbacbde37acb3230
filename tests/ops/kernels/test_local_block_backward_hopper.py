"""The local block's gradients for Hopper: emulated on the CPU everywhere, on the chip where there is one."""

from contextlib import ExitStack
from functools import partial
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor

from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels import local_block_backward, local_block_backward_hopper
from proteinbert_fast.ops.kernels.global_attention import SPAN
from proteinbert_fast.ops.kernels.launching import capability_of
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration, launch
from proteinbert_fast.ops.kernels.local_block_backward import Configuration, HopperWeights
from proteinbert_fast.ops.kernels.local_block_hopper import weight_layout
from proteinbert_fast.ops.reference import LocalBlockWeights

from .conftest import IS_INTERPRETED
from .gluon_emulator import Descriptor, EmulationError, Pointer, run
from .test_gradients import TOLERANCE as GRADIENT_TOLERANCE
from .test_local_block_hopper import CPU, HALF, changed, emulating, on_hopper
from .test_operations import TOLERANCE, Case, close, config_of

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.slow]
KERNEL = "convolution_gradient_hopper_kernel"
WEIGHTS_KERNEL = "weight_gradient_hopper_kernel"
SHIPPED = local_block_backward_hopper.configuration(128)
SHIPPED_WEIGHTS = local_block_backward_hopper.weights_configuration()


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
@pytest.mark.parametrize(
    ("residues", "dtype"),
    [((0,), HALF[0]), ((1, 1), HALF[1]), ((61, 2, 63), HALF[0]), ((106,), HALF[1])],
    ids=str,
)
def test_equals_the_reference(residues, dtype, runs, where):
    case = Case(config_of(128), residues, dtype, where)
    g = Gradients(case)
    check(case, g, runs(case, g))


@pytest.mark.parametrize(("runs", "where"), RUNS)
@pytest.mark.parametrize(
    "chosen",
    [
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
def test_the_host_code_launches_what_is_chosen(by_rule, where, monkeypatch):
    case = Case(config_of(128), (40,), torch.bfloat16, where)
    weights, batch = LocalBlockWeights(*(w.detach() for w in case.block.local_weights())), case.batch
    made = launch(case.x, None, case.word, batch.segments, list(weights), batch.gap, 5, False, True, None)
    d_local = torch.randn_like(case.x)

    def gradients(chosen: Configuration | None) -> local_block_backward.Gradients:
        return local_block_backward.launch(
            d_local, None, case.x, None, *made[2:], case.word, batch.segments, batch.starts, batch.lengths,
            batch.spans(SPAN), batch.longest, weights, batch.gap, 5, chosen=chosen,
        )  # fmt: skip

    shipped = local_block_backward.configuration(capability_of(case.x), 128, torch.bfloat16)
    chosen = None if by_rule else shipped._replace(hopper=SHIPPED, hopper_weights=SHIPPED_WEIGHTS)
    launches = []
    for name in ("launch", "launch_weights"):
        real = getattr(local_block_backward_hopper, name)
        note = partial(lambda real, *a: launches.append(a[-1]) or real(*a), real)
        monkeypatch.setattr(local_block_backward_hopper, name, note)
    if where == CPU:
        monkeypatch.setattr(local_block_backward, "portable_because", lambda *a: None)
    with ExitStack() as stack:
        if where == CPU:
            stack.enter_context(emulating(local_block_backward_hopper, KERNEL))
            stack.enter_context(emulating(local_block_backward_hopper, WEIGHTS_KERNEL))
        found = gradients(chosen)
    assert launches == [SHIPPED_WEIGHTS, SHIPPED_WEIGHTS, SHIPPED]
    if by_rule:
        return
    portable = gradients(shipped)
    for ours, theirs in zip((found.x, *found.weights), (portable.x, *portable.weights), strict=True):
        size = theirs.abs().max()
        close(ours / size, theirs / size, GRADIENT_TOLERANCE[torch.bfloat16])


def launched_weights(
    case: Case, gradient: Tensor, dilation: int, c: HopperWeights = SHIPPED_WEIGHTS,
    module: ModuleType = local_block_backward_hopper,
) -> Tensor:  # fmt: skip
    """Parts of a convolution's weights' gradients (parts, taps, D, D)."""
    return module.launch_weights(gradient, case.x, 9, dilation, case.batch.gap, 132, c)


def emulate_weights(
    case: Case, gradient: Tensor, dilation: int, c: HopperWeights = SHIPPED_WEIGHTS,
    module: ModuleType = local_block_backward_hopper,
) -> Tensor:  # fmt: skip
    with emulating(module, WEIGHTS_KERNEL):
        return launched_weights(case, gradient, dilation, c, module)


RUNS_WEIGHTS = [
    pytest.param(emulate_weights, CPU, id="emulated"),
    pytest.param(launched_weights, torch.device("cuda"), id="chip", marks=on_hopper),
]


def check_weights(case: Case, gradient: Tensor, dilation: int, parts: Tensor) -> None:
    """Against float64 autograd of the convolution. Products of 16 bits are exact in float32, sums of a few hundred."""
    w = case.exact.local_weights().wide_weight.detach().requires_grad_()
    reference.convolution(case.x.double(), w, w.new_zeros(len(w)), dilation).backward(gradient.double())
    right = w.grad.permute(2, 0, 1)
    close(parts.sum(0) / right.abs().max(), right / right.abs().max(), 1e-5)


@pytest.mark.parametrize(("runs", "where"), RUNS_WEIGHTS)
@pytest.mark.parametrize(
    ("residues", "dtype", "dilation", "chosen"),
    [
        ((0,), torch.bfloat16, 5, SHIPPED_WEIGHTS),
        ((61, 62, 63), torch.float16, 1, SHIPPED_WEIGHTS),
        ((300, 1, 209), torch.bfloat16, 5, SHIPPED_WEIGHTS),
        ((150, 3, 140), torch.bfloat16, 1, HopperWeights(64, 3)),
        ((150, 3, 40), torch.bfloat16, 5, HopperWeights(32, 6)),
    ],
    ids=str,
)
def test_weights_equal_the_reference(residues, dtype, chosen, dilation, runs, where):
    case = Case(config_of(128), residues, dtype, where)
    gradient = Gradients(case).narrow
    parts = runs(case, gradient, dilation, chosen)
    assert len(parts) == max(1, -(-(case.batch.n_rows - case.batch.gap) // (4 * chosen.rows)))
    check_weights(case, gradient, dilation, parts)


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


def emulate_last_weights_of_many(module: ModuleType) -> None:
    """A part that begins 30 million rows on, against the same rows as a batch."""
    case = Case(config_of(128), (60,), torch.bfloat16, CPU)
    gradient, c, shift = Gradients(case).narrow, SHIPPED_WEIGHTS, 30_000_000
    g, x = (Pointer(t, origin=shift * 128) for t in (gradient, case.x))
    parts = torch.full((1, 9, 128, 128), float("nan"))
    run(
        module.weight_gradient_hopper_kernel, range(3), g, x, parts, case.batch.gap + shift, case.batch.n_rows + shift,
        128, warps=8, D=128, TAPS=9, DILATION=5, K=c.rows, STAGES=c.stages, HALO=module.WEIGHTS_HALO,
    )  # fmt: skip
    assert torch.equal(parts, emulate_weights(case, gradient, 5))


def test_offsets_beyond_32_bits():
    emulate_last_of_many(local_block_backward_hopper)
    emulate_last_weights_of_many(local_block_backward_hopper)


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


PLANTED_WEIGHTS = {
    "32-bit offsets": ("part.to(gl.int64) * rows", "part * rows", "outside its array"),
    "one row off": ("shift = (tap", "shift = 1 + (tap", None),
    "one tap twice": ("x.index(at + DILATION)", "x.index(at)", None),
    "no mask at the gradient's end": ("(rows < left)[:, None],\n", "(rows < K)[:, None],\n", "outside its array"),
    "a wait too short": ("wait_group(STAGES - 3)", "wait_group(STAGES - 2)", "still writing"),
    "no fence": ("fence_async_shared()\n        #", "#", "no fence and barrier"),
    "no barrier": ("thread_barrier()\n        # One", "# One", "no fence and barrier"),
    "a stage filled too early": ("(STAGES - 2), begin", "(STAGES - 1), begin", None),
    "products of one step too many": ("num_outstanding=3", "num_outstanding=9", "still writing|operands changed"),
    "a halo too short": ("DILATION, D, K, HALO)\n    async", "DILATION, D, K, HALO // 2)\n    async", None),
    "taps in another order": ("gl.store(out, sum0)", "gl.store(out, sum1)", None),
    "copies left behind": ("    async_copy.wait_group(0)\n", "", "nobody waited for"),
}


@pytest.mark.parametrize("name", PLANTED_WEIGHTS)
def test_a_planted_mistake_in_weights_is_found(name, tmp_path):
    old, new, says = PLANTED_WEIGHTS[name]
    module = changed(local_block_backward_hopper, old, new, tmp_path)
    case = Case(config_of(128), (130,), torch.bfloat16, CPU)
    gradient = Gradients(case).narrow
    with pytest.raises(EmulationError if says else AssertionError, match=says):
        emulate_last_weights_of_many(module) if "32" in name else check_weights(
            case, gradient, 5, emulate_weights(case, gradient, 5, module=module)
        )


def test_weights_that_are_unsupported_are_told(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    told = local_block_backward_hopper.weights_unsupported
    assert told(128, torch.bfloat16, 9, 5, 20) is None
    assert "d_local is 64, not 128" in told(64, torch.bfloat16, 9, 5, 20)
    assert "the taps must be a multiple of 3" in told(128, torch.bfloat16, 5, 5, 20)
    assert "no more than 8 rows apart" in told(128, torch.bfloat16, 3, 9, 20)
    case = Case(config_of(64), (5,), torch.bfloat16, CPU)
    with pytest.raises(BackendError, match="weights' gradients for Hopper: d_local is 64, not 128"):
        emulate_weights(case, case.x, 5)


def test_asked_for_where_it_cannot_run_it_says_why():
    case = Case(config_of(32), (5,), torch.bfloat16, CPU)
    with pytest.raises(BackendError, match="the local block's gradient for Hopper: d_local is 32, not 64 or 128"):
        emulate(case, Gradients(case))
