"""The kernels of the losses against float64: all dtypes, odd sizes, poisoned memory, gradients, operators."""

import pytest
import torch

from proteinbert_fast.ops import kernels
from proteinbert_fast.ops.kernels import losses
from proteinbert_fast.ops.kernels.launching import DTYPES
from tests.loss_cases import LossCase, check
from tests.pretraining.test_losses import check_golden

# Of the largest number of each tensor. float32: rounding in sums of a few thousand terms. The others: slopes are
# rounded to 8 or 11 bits before the products that give gradients, and those are rounded once more.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SIZES = {
    "token": [(1, 32, 26), (63, 16, 26), (65, 128, 26), (300, 64, 26), (130, 256, 16), (7, 20, 2)],
    "annotation": [(1, 16, 1), (3, 96, 130), (65, 64, 64), (70, 100, 300)],
}
FUNCTIONS = {"token": kernels.token_loss, "annotation": kernels.annotation_loss}
CASES = [(loss, size) for loss, sizes in SIZES.items() for size in sizes]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("loss", "size"), CASES, ids=str)
def test_equal_the_reference(loss, size, dtype, device):
    case = LossCase(loss, *size, dtype, device)
    check(case.ours(FUNCTIONS[loss]), case.right(), TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "size"), [("token", (70, 40, 26)), ("annotation", (40, 48, 70))], ids=str)
def test_small_tiles_and_many_of_them(loss, size, dtype, device, monkeypatch):
    """The tiles of exact float32, three strips of several tiles each, and slopes of a few terms at a time."""
    monkeypatch.setattr(losses, "_TILES", {True: losses._TILES[False], False: losses._TILES[False]})
    monkeypatch.setattr(losses, "_STRIPS", 3)
    monkeypatch.setattr(losses, "_SLOPES_AT_ONCE", 32 * size[0])
    case = LossCase(loss, *size, dtype, device)
    check(case.ours(FUNCTIONS[loss]), case.right(), TOLERANCE[dtype])


def test_golden(tiny_model, golden, device):
    """The original's losses, and its gradients of every weight through the whole model."""
    tiny_model.backend = "triton"
    check_golden(tiny_model.to(device), golden)


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_no_rows(loss, device):
    case = LossCase(loss, 0, 32, 26, torch.float32, device)
    value, *gradients = case.ours(FUNCTIONS[loss])
    assert float(value) == 0
    assert [tuple(g.shape) for g in gradients] == [(0, 32), (26, 32), (26,)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_gradients_too_small_for_float16(loss, device):
    """A mean over a million tokens divides by them; the head's gradients are float32, and scalers raise the states'."""
    case = LossCase(loss, 70, 32, 26, torch.float16, device)
    case.layer.float()
    function = FUNCTIONS[loss]
    with torch.autocast(device.type, torch.float16):
        _, _, *ours = case.ours(function, 1e-7)
    case.layer.half()
    _, _, *right = case.right(1e-7)
    for a, b in zip(ours, right, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=2e-3 * float(b.abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_go_heads_gradient_is_a_sum_in_float32(dtype, device):
    """It exceeds float16's largest number before a mean makes it small, and is not rounded to 16 bits."""
    case = LossCase("annotation", 300, 16, 20, dtype, device)
    case.layer.float()
    with torch.no_grad():
        case.layer.weight.zero_()
        case.layer.bias.zero_()
    case.states.fill_(16.0)
    case.states[:, 1] = 0.109375
    weights = torch.full((300,), 1.0, device=device)
    case.rest = (torch.zeros(300, 20, dtype=torch.bool, device=device), weights, torch.full((20,), 51.0, device=device))
    with torch.autocast(device.type, dtype):
        _, _, d_weight, _ = case.ours(kernels.annotation_loss, 1e-3)
    exact = 300 * 51.0 / 2 * 1e-3  # the slopes, 25.5, are numbers of either dtype
    assert exact * 16 * 1e3 > torch.finfo(torch.float16).max
    torch.testing.assert_close(d_weight[:, 0], torch.full_like(d_weight[:, 0], exact * 16), rtol=1e-6, atol=0)
    torch.testing.assert_close(d_weight[:, 1], torch.full_like(d_weight[:, 1], exact * 0.109375), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64, torch.bool], ids=str)
def test_dense_targets_of_any_dtype(dtype, device):
    case = LossCase("annotation", 20, 32, 70, torch.float32, device)
    right = case.right()
    case.rest = (case.rest[0].to(dtype), *case.rest[1:])
    check(case.ours(FUNCTIONS["annotation"]), right, TOLERANCE[torch.float32])
    soft = torch.rand(20, 70, generator=torch.Generator().manual_seed(0)).to(device)
    case.rest = (soft, case.rest[1], None)
    exact = LossCase("annotation", 20, 32, 70, torch.float32, device)
    exact.rest = (soft, case.rest[1])
    check(case.ours(FUNCTIONS["annotation"]), exact.right(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_only_what_is_wanted(loss, device):
    case = LossCase(loss, 20, 32, 26, torch.float32, device)
    right = case.right()
    case.layer.requires_grad_(False)
    states = case.states.detach().requires_grad_()
    FUNCTIONS[loss](case.layer, states, *case.rest).backward()
    check([right[0], states.grad, *right[2:]], right, TOLERANCE[torch.float32])
    case.layer.requires_grad_()
    FUNCTIONS[loss](case.layer, case.states, *case.rest).backward()
    check([*right[:2], case.layer.weight.grad, case.layer.bias.grad], right, TOLERANCE[torch.float32])


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_the_same_bits_twice_and_a_graph_used_twice(loss, device):
    case = LossCase(loss, 150, 32, 70 if loss == "annotation" else 26, torch.float32, device)
    first, second = case.ours(FUNCTIONS[loss]), case.ours(FUNCTIONS[loss])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    states = case.states.detach().requires_grad_()
    value = FUNCTIONS[loss](case.layer, states, *case.rest)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(states.grad, 2 * first[1])
    states.grad = None
    (FUNCTIONS[loss](case.layer, states, *case.rest) + FUNCTIONS[loss](case.layer, states, *case.rest)).backward()
    torch.testing.assert_close(states.grad, 2 * first[1])


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_rows_of_weight_0_leave_no_trace(loss, device):
    """Their targets are not looked at, and NaN in their states do not reach the sum."""
    case = LossCase(loss, 40, 32, 26, torch.float32, device)
    value, d_states, *_ = case.ours(FUNCTIONS[loss])
    silent = case.weights == 0
    assert silent.any()
    assert not d_states[silent].any()
    case.states[silent] = float("nan")
    assert torch.equal(case.ours(FUNCTIONS[loss])[0], value)


def test_a_target_that_is_no_class_shows(device):
    case = LossCase("token", 40, 32, 26, torch.float32, device)
    targets, weights = case.rest
    for wrong in (26, -1, 31):
        targets[int(weights.argmax())] = wrong
        assert case.ours(kernels.token_loss)[0].isnan()


def test_logits_far_out(device):
    """No overflow, and no loss of what is small: softplus(-20) is 2e-9 of 1."""
    case = LossCase("annotation", 4, 16, 9, torch.float32, device)
    case.rest = (torch.zeros(4, 9, dtype=torch.bool, device=device), torch.ones(4, device=device), None)
    for bias in (-20.0, -8.0, 0.0, 90.0):
        with torch.no_grad():
            case.layer.weight.zero_()
            case.layer.bias.fill_(bias)
        right = torch.nn.functional.softplus(torch.tensor(bias, dtype=torch.float64)) * 36
        torch.testing.assert_close(case.ours(kernels.annotation_loss)[0].double().cpu(), right, rtol=1e-6, atol=0)
    case = LossCase("token", 30, 16, 26, torch.float32, device)
    with torch.no_grad():
        case.layer.bias.mul_(1e4)
    check(case.ours(kernels.token_loss), case.right(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_operators_are_described_rightly(loss, device):
    case = LossCase(loss, 20, 32, 26, torch.float32, device)
    weight, bias = case.layer.weight.detach(), case.layer.bias.detach()
    operators = torch.ops.proteinbert_fast
    inputs = (case.states, weight, bias, *case.rest)
    gradient = torch.tensor(0.5, device=device)
    saved = (operators.token_loss(*inputs)[1],) if loss == "token" else ()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    forward, backward = getattr(operators, f"{loss}_loss"), getattr(operators, f"{loss}_loss_backward")
    torch.library.opcheck(forward.default, inputs, test_utils=tests)
    wanting = (case.states.clone().requires_grad_(), *inputs[1:])
    torch.library.opcheck(forward.default, wanting, test_utils=(*tests, "test_aot_dispatch_dynamic"))
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward.default, (gradient, *inputs, *saved, *wanted), test_utils=tests)


@pytest.mark.parametrize("loss", ["token", "annotation"])
def test_compiles_as_one_graph(loss, device):
    case = LossCase(loss, 40, 32, 26, torch.float32, device)
    compiled = torch.compile(FUNCTIONS[loss], backend="aot_eager", fullgraph=True)
    plain = case.ours(FUNCTIONS[loss])
    assert all(torch.equal(a, b) for a, b in zip(case.ours(compiled), plain, strict=True))
