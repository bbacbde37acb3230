"""Linear layers whose rows have the same bits in any batch: tiles of one shape, sums in one order."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels.activations import LOG2_E, activate
from proteinbert_fast.ops.kernels.launching import ANY_BATCH, capability_of, has_matrix_units
from proteinbert_fast.ops.operators import operator
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.prepared import in_dtype
from proteinbert_fast.ops.reference import Message, MessageWeights

_ROWS = 16  # as few as the matrix units take: most calls have a row per protein
_MANY_ROWS = 64  # for calls with a row per token
_COLUMNS = 64
_INPUTS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
_ACTIVATIONS = ("none", "gelu", "tanh", "sigmoid", "softmax")


@triton.jit(**ANY_BATCH)
def linear_kernel(
    X, W, BIAS, OUT, n_rows, n_inputs, n_columns,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of OUT (rows, columns) = activation(X @ W^T + BIAS); W is (columns, inputs).

    A softmax runs over the columns of one tile: it must have them all.
    """
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inputs = tl.arange(0, CHUNK)
    in_rows = (rows < n_rows)[:, None]
    in_columns = columns < n_columns
    total = tl.zeros((M, N), tl.float32)
    if HAS_BIAS:
        total += tl.load(BIAS + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    for first in range(0, n_inputs, CHUNK):
        k = first + inputs
        in_inputs = (k < n_inputs)[None, :]
        x = tl.load(X + rows[:, None] * n_inputs + k[None, :], mask=in_rows & in_inputs, other=0.0)
        w_at = W + columns.to(tl.int64)[:, None] * n_inputs + k[None, :]
        w = tl.load(w_at, mask=in_columns[:, None] & in_inputs, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    if ACTIVATION == "softmax":
        total = tl.where(in_columns[None, :], total, float("-inf"))
        total = tl.exp2((total - tl.max(total, axis=1)[:, None]) * LOG2_E)
        total /= tl.sum(total, axis=1)[:, None]
    out = activate(total, ACTIVATION).to(OUT.dtype.element_ty)
    tl.store(OUT + rows[:, None] * n_columns + columns[None, :], out, mask=in_rows & in_columns[None, :])


@operator("linear")
def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, by_row: bool
) -> Tensor:
    x, weight = x.contiguous(), in_dtype(weight, x.dtype)
    out = torch.empty(len(x), len(weight), dtype=out_dtype, device=x.device)
    precision = product_precision(x.dtype)
    n_rows = _MANY_ROWS if by_row and has_matrix_units(capability_of(x), x.dtype, precision) else _ROWS
    if len(x):
        linear_kernel[(triton.cdiv(len(x), n_rows), triton.cdiv(len(weight), _COLUMNS))](
            x, weight, x if bias is None else bias, out, len(x), x.shape[1], len(weight),
            HAS_BIAS=bias is not None, ACTIVATION=activation, M=n_rows, N=_COLUMNS, CHUNK=_INPUTS[x.dtype],
            PRECISION=precision, num_warps=4 if n_rows == _ROWS else 8, num_stages=3,
        )  # fmt: skip
    return out


@_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, out_dtype: torch.dtype, by_row: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.activation, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, None if ctx.activation == "none" else output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, y = ctx.saved_tensors
    gradient = gradient.float()
    if ctx.activation == "gelu":
        result = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        gradient = torch.ops.aten.gelu_backward(gradient, result.float())
    elif ctx.activation == "tanh":
        gradient = gradient * (1 - y.float().square())
    elif ctx.activation == "sigmoid":
        gradient = gradient * y.float() * (1 - y.float())
    elif ctx.activation == "softmax":
        gradient = y.float() * (gradient - (gradient * y.float()).sum(-1, keepdim=True))
    d_bias = None if bias is None else gradient.sum(0).to(bias.dtype)
    gradient = gradient.to(x.dtype)
    return gradient @ weight.to(x.dtype), (gradient.t() @ x).to(weight.dtype), d_bias, None, None, None


_linear.register_autograd(_backward, setup_context=_save)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    by_row: bool = False,
) -> Tensor:
    """``activation(x @ weight.T + bias)``, summed in float32.

    Args:
        x: (M, K).
        weight: (N, K), taken in the dtype of ``x``. For a softmax, N is at most 64.
        bias: (N,).
        activation: "none", "gelu", "tanh", "sigmoid" or "softmax".
        out_dtype: of the result; that of ``x`` when None.
        by_row: M is a number of tokens, not of proteins: wants larger tiles.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; choose one of {', '.join(_ACTIVATIONS)}")
    if activation == "softmax" and len(weight) > _COLUMNS:
        raise ValueError(f"a softmax takes at most {_COLUMNS} columns, got {len(weight)}")
    out: Tensor = _linear(x, weight, bias, activation, out_dtype or x.dtype, by_row)
    return out


def head(
    layer: nn.Linear, x: Tensor, activation: str = "none", out_dtype: torch.dtype | None = None, by_row: bool = False
) -> Tensor:
    """A linear layer as ``linear``, computed in its dtype or that of autocast."""
    return linear(x.to(_compute_dtype(x, layer.weight)), layer.weight, layer.bias, activation, out_dtype, by_row)


def message(global_state: Tensor, weights: MessageWeights) -> Message:
    """``reference.message`` of the first block; later ones come from the global track. The query is float32."""
    dtype = _compute_dtype(global_state, weights.query_weight)
    query = linear(global_state.to(dtype), weights.query_weight, None, "tanh", torch.float32)
    broadcast = linear(global_state.to(dtype), weights.broadcast_weight, weights.broadcast_bias, "gelu")
    return Message(query, broadcast)


def sum_annotations(annotations: Tensor | tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """``reference.sum_annotations``: sparse ones are added up term by term, dense ones multiplied. (B, G)."""
    if isinstance(annotations, Tensor):
        dtype = _compute_dtype(annotations, weight)
        return linear(annotations.to(dtype), weight.t())
    return reference.sum_annotations(annotations, weight)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
