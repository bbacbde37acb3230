"""Gradients for fast operations: those of a plain twin, computed again from the inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Recomputed(torch.autograd.Function):
    """``fast(*tensors)`` forward; backward through ``plain(*tensors)``, the same and differentiable."""

    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Any], plain: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(fast(*tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        inputs = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        device, compute_dtype = inputs[0].device.type, inputs[0].dtype
        with (
            torch.enable_grad(),
            torch.autocast(device, compute_dtype, enabled=compute_dtype != torch.float32),
        ):
            outputs = ctx.plain(*inputs)
        used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in used], wanted, [g.to(o.dtype).view_as(o) for o, g in used], allow_unused=True
            )
        )
        return None, None, *(next(found) if t.requires_grad else None for t in inputs)


def recomputed(
    fast: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """``fast(*tensors)``, with the gradients of ``plain(*tensors)`` where some are wanted.

    Args:
        fast: gives as many tensors as ``plain``, or empty ones in places whose results are not wanted.
        plain: the same in differentiable operations.
        tensors: all inputs that may want gradients; the first is in the dtype computed in.
    """
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return fast(*tensors)
    results: tuple[Tensor, ...] = _Recomputed.apply(fast, plain, *tensors)  # type: ignore[no-untyped-call]
    return results
