"""Losses from states: the definitions against independent arithmetic, the CPU's operators against the definitions."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proteinbert_fast.ops import backends, losses, reference
from tests.loss_cases import LossCase, check

FUNCTIONS = {"token": losses.token_loss, "annotation": losses.annotation_loss}
# Of the largest number of each tensor: float32 rounding in sums of a few thousand terms; 16-bit states and gradients
# are rounded once, everything between is float32.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
BOTH = pytest.mark.parametrize("loss", ["token", "annotation"])


def test_the_definition_of_the_token_loss():
    case = LossCase("token", 30, 7, 5, torch.float64, "cpu")
    case.layer.requires_grad_(False)
    targets, weights = case.rest
    expected = 0.0
    for x, target, weight in zip(case.states, targets.tolist(), weights.tolist(), strict=True):
        logits = [float(w @ x + b) for w, b in zip(case.layer.weight, case.layer.bias, strict=True)]
        if weight:
            expected += weight * (math.log(sum(map(math.exp, logits))) - logits[target])
    ours = reference.token_loss_sum(case.states, case.layer.weight, case.layer.bias, *case.rest)
    torch.testing.assert_close(ours.item(), expected, rtol=1e-12, atol=0)


def test_the_definition_of_the_annotation_loss():
    case = LossCase("annotation", 9, 7, 5, torch.float64, "cpu")
    case.layer.requires_grad_(False)
    targets, weights, term_weights = case.rest
    expected = plain = 0.0
    for b in range(9):
        for n in range(5):
            p = 1 / (1 + math.exp(-float(case.layer.weight[n] @ case.states[b] + case.layer.bias[n])))
            entropy = -math.log(p if targets[b, n] else 1 - p)
            expected += float(weights[b] * term_weights[n].double()) * entropy
            plain += float(weights[b]) * entropy
    head = (case.layer.weight, case.layer.bias)
    ours = reference.annotation_loss_sum(case.states, *head, targets, weights, term_weights)
    torch.testing.assert_close(ours.item(), expected, rtol=1e-6, atol=0)  # the products of weights are float32 here
    ours = reference.annotation_loss_sum(case.states, *head, targets, weights)
    torch.testing.assert_close(ours.item(), plain, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("at_once", [1 << 20, 200, 1])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [(1, 16, 1), (63, 20, 26), (130, 32, 70)], ids=str)
@BOTH
def test_equal_the_reference(loss, size, dtype, at_once, monkeypatch):
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", at_once)
    case = LossCase(loss, *size, dtype, "cpu")
    ours = case.ours(FUNCTIONS[loss])
    check(ours, case.right(), TOLERANCE[dtype])
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert {g.dtype for g in ours[1:]} == {dtype}


@BOTH
def test_gradients_are_those_of_finite_differences(loss):
    case = LossCase(loss, 6, 5, 4, torch.float64, "cpu")
    states = case.states.requires_grad_()

    def function(states, weight, bias):
        layer = nn.Linear(5, 4, dtype=torch.float64)
        del layer.weight, layer.bias
        layer.weight, layer.bias = weight, bias
        return FUNCTIONS[loss](layer, states, *case.rest)

    assert torch.autograd.gradcheck(function, (states, *(p.detach().requires_grad_() for p in case.layer.parameters())))


@BOTH
def test_no_rows(loss):
    value, *gradients = LossCase(loss, 0, 32, 26, torch.float32, "cpu").ours(FUNCTIONS[loss])
    assert float(value) == 0
    assert [tuple(g.shape) for g in gradients] == [(0, 32), (26, 32), (26,)]
    assert not any(g.any() for g in gradients)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(loss, dtype):
    """States are rounded to the dtype of autocast; weights keep theirs, and so do their gradients."""
    case = LossCase(loss, 50, 32, 26, torch.float32, "cpu")
    right = case.right()
    with torch.autocast("cpu", dtype):
        ours = case.ours(FUNCTIONS[loss])
        again = case.ours(FUNCTIONS[loss])
    assert {t.dtype for t in ours} == {torch.float32}
    check(ours, right, 1e-2)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@BOTH
def test_a_graph_used_twice(loss):
    case = LossCase(loss, 50, 32, 26, torch.float32, "cpu")
    expected = case.ours(FUNCTIONS[loss])[1]
    states = case.states.detach().requires_grad_()
    value = FUNCTIONS[loss](case.layer, states, *case.rest)
    value.backward(retain_graph=True)
    value.backward()
    (value.detach() * FUNCTIONS[loss](case.layer, states, *case.rest) / value.detach()).backward()
    torch.testing.assert_close(states.grad, 3 * expected)


@BOTH
def test_rows_of_weight_0_leave_no_trace(loss):
    case = LossCase(loss, 40, 32, 26, torch.float32, "cpu")
    value, d_states, *_ = case.ours(FUNCTIONS[loss])
    silent = case.weights == 0
    assert silent.any()
    assert not d_states[silent].any()
    case.states[silent] = float("nan")
    assert torch.equal(case.ours(FUNCTIONS[loss])[0], value)


@BOTH
def test_operators_are_described_rightly(loss):
    case = LossCase(loss, 20, 32, 26, torch.float32, "cpu")
    inputs = (case.states, case.layer.weight.detach(), case.layer.bias.detach(), *case.rest)
    operators = torch.ops.proteinbert_fast
    saved = (operators.token_loss_in_parts(*inputs)[1],) if loss == "token" else ()
    forward = getattr(operators, f"{loss}_loss_in_parts").default
    backward = getattr(operators, f"{loss}_loss_in_parts_backward").default
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, inputs, test_utils=tests)
    wanting = (case.states.clone().requires_grad_(), *inputs[1:])
    torch.library.opcheck(forward, wanting, test_utils=(*tests, "test_aot_dispatch_dynamic"))
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(backward, (torch.tensor(0.5), *inputs, *saved, *wanted), test_utils=tests)


@BOTH
@pytest.mark.parametrize("operations", [backends.CPU, backends.REFERENCE], ids=lambda o: o.name)
def test_compiles_as_one_graph(loss, operations):
    case = LossCase(loss, 40, 32, 26, torch.float32, "cpu")
    function = operations.token_loss if loss == "token" else operations.annotation_loss
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    check(case.ours(compiled), case.right(), TOLERANCE[torch.float32])


class Largest(TorchDispatchMode):
    """Sees the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_the_logits_of_all_tokens_never_exist():
    n = 200_000
    states, weights = torch.randn(n, 4, dtype=torch.bfloat16), torch.ones(n)
    head = (torch.randn(26, 4), torch.randn(26))
    inputs = (states, *head, torch.zeros(n, dtype=torch.uint8), weights)
    with Largest() as seen:
        _, logs = losses._token_forward(*inputs)
        losses._token_backward(torch.ones(()), *inputs, logs, True, True)
    assert seen.numbers == losses._LOGITS_AT_ONCE // 26 * 26 < n * 26
