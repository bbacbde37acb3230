"""Losses straight from the states: no logits are kept, and only those of a few rows exist at a time.

The formulas are ``reference.token_loss_sum`` and ``reference.annotation_loss_sum``. Forward keeps one number per row,
backward computes the logits again. Sums run in at least float32 and in one order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteinbert_fast.ops.operators import operator

_LOGITS_AT_ONCE = 1 << 20


def define_token_loss(
    name: str,
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, bool], list[Tensor]],
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """An operator with gradients for ``reference.token_loss_sum``, of two functions that compute it.

    Args:
        name: of the operator.
        forward: of states, weight, bias, targets and weights: the sum, and the logarithm of each row's sum of
            exponentials, (R,), both at least float32.
        backward: of the sum's gradient, the same, the logarithms, and whether gradients of the states and of the head
            are wanted: those of states, weight and bias, (0,) where not wanted.
    """
    loss, loss_backward = operator(name)(forward), operator(f"{name}_backward")(backward)

    @loss.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        dtype = at_least_float32(x)
        return x.new_empty((), dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)

    @loss_backward.register_fake
    def _(
        gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, logs: Tensor,
        wants_states: bool, wants_head: bool,
    ) -> list[Tensor]:  # fmt: skip
        return _like((x, wants_states), (weight, wants_head), (bias, wants_head))

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])

    def differentiate(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        states, head, bias = ctx.needs_input_grad[:3]
        dx, dw, db = loss_backward(gradient, *ctx.saved_tensors, states, head or bias)
        return (dx if states else None), (dw if head else None), (db if bias else None), None, None

    loss.register_autograd(differentiate, setup_context=keep)

    def apply(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        total: Tensor = loss(x, weight, bias, targets, weights.detach().to(at_least_float32(x)))[0]
        return total

    return apply


def define_annotation_loss(
    name: str,
    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor],
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, bool, bool], list[Tensor]],
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """An operator with gradients for ``reference.annotation_loss_sum``, of two functions that compute it.

    Args:
        name: of the operator.
        forward: of states, weight, bias, targets, weights and the terms' weights or None: the sum, at least float32.
        backward: of the sum's gradient, the same, and whether gradients of the states and of the head are wanted:
            those of states, weight and bias, (0,) where not wanted.
    """
    loss, loss_backward = operator(name)(forward), operator(f"{name}_backward")(backward)

    @loss.register_fake
    def _(
        x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None
    ) -> Tensor:
        return x.new_empty((), dtype=at_least_float32(x))

    @loss_backward.register_fake
    def _(
        gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor,
        term_weights: Tensor | None, wants_states: bool, wants_head: bool,
    ) -> list[Tensor]:  # fmt: skip
        return _like((x, wants_states), (weight, wants_head), (bias, wants_head))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, term_weights = inputs
        ctx.has_term_weights = term_weights is not None
        ctx.save_for_backward(*tensors, *([term_weights] if ctx.has_term_weights else []))

    def differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, head, bias = ctx.needs_input_grad[:3]
        saved = ctx.saved_tensors if ctx.has_term_weights else (*ctx.saved_tensors, None)
        dx, dw, db = loss_backward(gradient, *saved, states, head or bias)
        return (dx if states else None), (dw if head else None), (db if bias else None), None, None, None

    loss.register_autograd(differentiate, setup_context=keep)

    def apply(
        x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None = None
    ) -> Tensor:
        dtype = at_least_float32(x)
        weights = weights.detach().to(dtype)
        term_weights = None if term_weights is None else term_weights.detach().to(dtype)
        total: Tensor = loss(x, weight, bias, targets, weights, term_weights)
        return total

    return apply


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype to sum in."""
    return torch.promote_types(x.dtype, torch.float32)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a head's products: autocast's, or that of its weights."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _like(*wanted: tuple[Tensor, bool]) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) if w else t.new_empty(0) for t, w in wanted]


def _parts(n_rows: int, n_columns: int) -> Iterator[slice]:
    size = max(_LOGITS_AT_ONCE // max(n_columns, 1), 1)
    return (slice(first, first + size) for first in range(0, n_rows, size))


def _exactly(x: Tensor) -> Any:
    """No autocast: what is summed in float32 stays float32."""
    return torch.autocast(x.device.type, enabled=False)


def _token_forward(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    with _exactly(x):
        dtype = at_least_float32(x)
        w, b = weight.to(dtype), bias.to(dtype)
        total, logs = x.new_zeros((), dtype=dtype), x.new_empty(len(x), dtype=dtype)
        for rows in _parts(len(x), len(w)):
            logits = F.linear(x[rows].to(dtype), w, b)
            counts = weights[rows] != 0
            target = targets[rows].long().where(counts, 0)
            logs[rows] = logits.logsumexp(1)
            loss = logs[rows] - logits.gather(1, target[:, None])[:, 0]
            total += (weights[rows] * loss).where(counts, 0).sum()
        return total, logs


def _token_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, logs: Tensor,
    wants_states: bool, wants_head: bool,
) -> list[Tensor]:  # fmt: skip
    with _exactly(x):
        dtype = at_least_float32(x)
        w, b = weight.to(dtype), bias.to(dtype)
        dx, dw, db = _like((x, wants_states), (w, wants_head), (b, wants_head))
        dw.zero_()
        db.zero_()
        for rows in _parts(len(x), len(w)):
            states = x[rows].to(dtype)
            counts = weights[rows, None] != 0
            target = targets[rows, None].long().where(counts, 0)
            slope = (F.linear(states, w, b) - logs[rows, None]).exp_()
            slope.scatter_add_(1, target, slope.new_full(target.shape, -1.0))
            slope = (slope * weights[rows, None]).where(counts, 0)
            if wants_states:
                dx[rows] = (slope @ w * gradient).to(x.dtype)
            if wants_head:
                dw.addmm_(slope.t(), states)
                db += slope.sum(0)
        return [dx, (dw * gradient).to(weight.dtype), (db * gradient).to(bias.dtype)]


def _annotation_forward(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None
) -> Tensor:
    with _exactly(x):
        dtype = at_least_float32(x)
        w, b = weight.to(dtype), bias.to(dtype)
        total = x.new_zeros((), dtype=dtype)
        for rows in _parts(len(x), len(w)):
            logits, target = F.linear(x[rows].to(dtype), w, b), targets[rows].to(dtype)
            entropy = F.binary_cross_entropy_with_logits(logits, target, term_weights, reduction="none").sum(1)
            total += (weights[rows] * entropy).where(weights[rows] != 0, 0).sum()
        return total


def _annotation_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor,
    term_weights: Tensor | None, wants_states: bool, wants_head: bool,
) -> list[Tensor]:  # fmt: skip
    with _exactly(x):
        dtype = at_least_float32(x)
        w, b = weight.to(dtype), bias.to(dtype)
        dx, dw, db = _like((x, wants_states), (w, wants_head), (b, wants_head))
        dw.zero_()
        db.zero_()
        for rows in _parts(len(x), len(w)):
            states = x[rows].to(dtype)
            slope = F.linear(states, w, b).sigmoid_().sub_(targets[rows].to(dtype))
            if term_weights is not None:
                slope *= term_weights
            slope = (slope * weights[rows, None]).where(weights[rows, None] != 0, 0)
            if wants_states:
                dx[rows] = (slope @ w * gradient).to(x.dtype)
            if wants_head:
                dw.addmm_(slope.t(), states)
                db += slope.sum(0)
        return [dx, (dw * gradient).to(weight.dtype), (db * gradient).to(bias.dtype)]


_token_loss = define_token_loss("token_loss_in_parts", _token_forward, _token_backward)
_annotation_loss = define_annotation_loss("annotation_loss_in_parts", _annotation_forward, _annotation_backward)


def token_loss(layer: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """``reference.token_loss_sum`` of a head, a few rows at a time."""
    return _token_loss(states.to(compute_dtype(states, layer.weight)), layer.weight, layer.bias, targets, weights)


def annotation_loss(
    layer: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None = None
) -> Tensor:
    """``reference.annotation_loss_sum`` of a head, a few proteins at a time."""
    states = states.to(compute_dtype(states, layer.weight))
    return _annotation_loss(states, layer.weight, layer.bias, targets, weights, term_weights)
