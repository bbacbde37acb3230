"""Losses straight from the states: logits live in registers, and are computed again in the backward pass.

Sums go in two passes of one order each, over the tiles of a program and then over programs: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from proteinbert_fast.ops.kernels.activations import LOG2_E
from proteinbert_fast.ops.kernels.launching import ANY_BATCH, capability_of, has_matrix_units, padded
from proteinbert_fast.ops.losses import compute_dtype, define_annotation_loss, define_token_loss
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.prepared import in_dtype

_STRIPS = 512  # programs that share out the rows of a backward pass, at most
_SLOPES_AT_ONCE = 1 << 24
# Rows, columns and inputs of a tile: with matrix units, and without, where Triton spills whole operands of larger ones.
_TILES = {True: (64, 64, 64), False: (16, 32, 16)}


@triton.jit
def _logits(
    X, W, BIAS, rows, n_rows, columns, n_columns, K: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows of X @ W^T + BIAS; X is (rows, inputs) in memory, W (columns, inputs). Products alone in other columns."""
    in_columns = columns < n_columns
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    total += tl.load(BIAS + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        in_inputs = (k < K)[None, :]
        x = tl.load(X + rows[:, None] * K + k[None, :], mask=(rows < n_rows)[:, None] & in_inputs, other=0.0)
        w_at = W + columns.to(tl.int64)[:, None] * K + k[None, :]
        w = tl.load(w_at, mask=in_columns[:, None] & in_inputs, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    return total


@triton.jit(**ANY_BATCH)
def token_loss_kernel(
    X, W, BIAS, TARGETS, WEIGHTS, LOGS, LOSSES, n_rows, n_classes,
    K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M rows: LOGS, the logarithm of the sum of exponentials, and LOSSES, w * cross entropy.

    Not their sum: reduced to one number, Triton 3.6 fails to compile this for compute capability 10.
    """
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    classes = tl.arange(0, C)
    inside = rows < n_rows
    logits = _logits(X, W, BIAS, rows, n_rows, classes, n_classes, K, CHUNK, PRECISION)
    top = tl.max(tl.where((classes < n_classes)[None, :], logits, float("-inf")), axis=1)
    e = tl.where((classes < n_classes)[None, :], tl.exp2((logits - top[:, None]) * LOG2_E), 0.0)
    logs = top + tl.log(tl.sum(e, axis=1))
    tl.store(LOGS + rows, logs, mask=inside)
    weight = tl.load(WEIGHTS + rows, mask=inside, other=0.0)
    target = tl.load(TARGETS + rows, mask=inside, other=0).to(tl.int32)
    right = tl.sum(tl.where(classes[None, :] == target[:, None], logits, 0.0), axis=1)
    # A target that is no class would otherwise pass for a logit of 0.
    right = tl.where((target >= 0) & (target < n_classes), right, float("nan"))
    loss = tl.where(weight != 0, weight * (logs - right), 0.0)
    tl.store(LOSSES + rows, loss, mask=inside)


@triton.jit(**ANY_BATCH)
def token_loss_backward_kernel(
    X, W, BIAS, TARGETS, WEIGHTS, LOGS, GRADIENT, DX, DW, DB, n_rows, n_classes, n_tiles,
    K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    WANTS_STATES: tl.constexpr, WANTS_HEAD: tl.constexpr,
):  # fmt: skip
    """Program (strip, N inputs): n_tiles tiles of M rows. Their DX; the strip's DW and DB, without GRADIENT."""
    strip = tl.program_id(0).to(tl.int64)
    inputs = tl.program_id(1) * N + tl.arange(0, N)
    classes = tl.arange(0, C)
    in_inputs = (inputs < K)[None, :]
    in_classes = (classes < n_classes)[:, None]
    gradient = tl.load(GRADIENT).to(tl.float32)
    w = tl.load(W + classes[:, None] * K + inputs[None, :], mask=in_classes & in_inputs, other=0.0)
    dw = tl.zeros((C, N), tl.float32)
    db = tl.zeros((C,), tl.float32)
    for tile in range(0, n_tiles):
        rows = (strip * n_tiles + tile) * M + tl.arange(0, M)
        inside = rows < n_rows
        logits = _logits(X, W, BIAS, rows, n_rows, classes, n_classes, K, CHUNK, PRECISION)
        logs = tl.load(LOGS + rows, mask=inside, other=0.0)
        weight = tl.load(WEIGHTS + rows, mask=inside, other=0.0)[:, None]
        target = tl.load(TARGETS + rows, mask=inside, other=0).to(tl.int32)
        slope = tl.exp2((logits - logs[:, None]) * LOG2_E)
        slope -= tl.where(classes[None, :] == target[:, None], 1.0, 0.0)
        slope = tl.where((weight != 0) & (classes < n_classes)[None, :], weight * slope, 0.0)
        # Without the gradient, which may be too small for float16.
        rounded = slope.to(X.dtype.element_ty)
        at = rows[:, None] * K + inputs[None, :]
        mask = inside[:, None] & in_inputs
        if WANTS_STATES:
            dx = tl.dot(rounded, w, input_precision=PRECISION) * gradient
            tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        if WANTS_HEAD:
            x = tl.load(X + at, mask=mask, other=0.0)
            dw = tl.dot(tl.trans(rounded), x, dw, input_precision=PRECISION)
            db += tl.sum(slope, axis=0)
    if WANTS_HEAD:
        at = (strip * n_classes + classes[:, None]) * K + inputs[None, :]
        tl.store(DW + at, dw, mask=in_classes & in_inputs)
        if tl.program_id(1) == 0:
            tl.store(DB + strip * n_classes + classes, db, mask=classes < n_classes)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to 2e-7 of itself: where it is small, its sum over thousands of terms is the loss."""
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    s = e / (2.0 + e)
    q = s * s
    p = 1.0 / 13.0 * q + 1.0 / 11.0
    p = p * q + 1.0 / 9.0
    p = p * q + 1.0 / 7.0
    p = p * q + 1.0 / 5.0
    p = p * q + 1.0 / 3.0
    p = p * q + 1.0
    # The maximum would lose NaN.
    return tl.where(x > 0, x, x * 0.0) + 2.0 * s * p


@triton.jit(**ANY_BATCH)
def annotation_loss_kernel(
    X, W, BIAS, TARGETS, WEIGHTS, TERM_WEIGHTS, SUMS, n_rows, n_columns,
    HAS_TERM_WEIGHTS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M proteins and N terms: a row of SUMS (programs, proteins), of w * u * binary cross entropy over the terms."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    logits = _logits(X, W, BIAS, rows, n_rows, columns, n_columns, K, CHUNK, PRECISION)
    target = tl.load(TARGETS + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0).to(tl.float32)
    loss = _softplus(logits) - target * logits
    if HAS_TERM_WEIGHTS:
        loss *= tl.load(TERM_WEIGHTS + columns, mask=columns < n_columns, other=0.0)[None, :]
    weight = tl.load(WEIGHTS + rows, mask=rows < n_rows, other=0.0)[:, None]
    loss = tl.where(mask & (weight != 0), weight * loss, 0.0)
    tl.store(SUMS + tl.program_id(1).to(tl.int64) * n_rows + rows, tl.sum(loss, axis=1), mask=rows < n_rows)


@triton.jit(**ANY_BATCH)
def annotation_slope_kernel(
    X, W, BIAS, TARGETS, WEIGHTS, TERM_WEIGHTS, SLOPES, DB, n_rows, n_columns, first, n_slopes, stride,
    HAS_TERM_WEIGHTS: tl.constexpr, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """M proteins and N terms from ``first`` on: SLOPES (rows, stride), w * u * (sigmoid - target); sums DB."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    place = tl.program_id(1) * N + tl.arange(0, N)
    columns = first + place
    in_slopes = place < n_slopes
    mask = (rows < n_rows)[:, None] & in_slopes[None, :]
    logits = _logits(X, W, BIAS, rows, n_rows, columns, n_columns, K, CHUNK, PRECISION)
    target = tl.load(TARGETS + rows[:, None] * n_columns + columns[None, :], mask=mask, other=0).to(tl.float32)
    slope = 1.0 / (1.0 + tl.exp2(-logits * LOG2_E)) - target
    if HAS_TERM_WEIGHTS:
        slope *= tl.load(TERM_WEIGHTS + columns, mask=in_slopes, other=0.0)[None, :]
    weight = tl.load(WEIGHTS + rows, mask=rows < n_rows, other=0.0)[:, None]
    slope = tl.where(mask & (weight != 0), weight * slope, 0.0)
    tl.store(SLOPES + rows[:, None] * stride + place[None, :], slope.to(SLOPES.dtype.element_ty), mask=mask)
    tl.store(DB + tl.program_id(0).to(tl.int64) * n_columns + columns, tl.sum(slope, axis=0), mask=in_slopes)


def tile(capability: int, dtype: torch.dtype, precision: str) -> tuple[int, int, int]:
    """Rows, columns and inputs of the shipped tiles for a device; in the interpreter, those of most GPUs."""
    return _TILES[capability == 0 or has_matrix_units(capability, dtype, precision)]


def _token_forward(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    precision = product_precision(x.dtype)
    m, _, chunk = tile(capability_of(x), x.dtype, precision)
    logs, found = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    if len(x):
        token_loss_kernel[(triton.cdiv(len(x), m),)](
            x.contiguous(), in_dtype(weight, x.dtype), bias, targets.contiguous(), weights.contiguous(), logs,
            found, len(x), len(weight), K=x.shape[1], M=m, C=padded(len(weight)), CHUNK=chunk, PRECISION=precision,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return found.sum(), logs


def _token_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, logs: Tensor,
    wants_states: bool, wants_head: bool,
) -> list[Tensor]:  # fmt: skip
    precision = product_precision(x.dtype)
    (n_rows, n_inputs), n_classes = x.shape, len(weight)
    m, n, chunk = tile(capability_of(x), x.dtype, precision)
    # Of the number of rows alone, so that every GPU sums in the same order.
    n_tiles = triton.cdiv(triton.cdiv(n_rows, m), _STRIPS)
    n_strips = triton.cdiv(n_rows, m * n_tiles) if n_rows else 0
    dx = x.new_empty(x.shape if wants_states else 0)
    dw = x.new_empty(n_strips if wants_head else 0, n_classes, n_inputs, dtype=torch.float32)
    db = x.new_empty(n_strips if wants_head else 0, n_classes, dtype=torch.float32)
    if n_strips:
        token_loss_backward_kernel[(n_strips, triton.cdiv(n_inputs, n))](
            x.contiguous(), weight.to(x.dtype).contiguous(), bias, targets.contiguous(), weights.contiguous(), logs,
            gradient, dx, dw, db, n_rows, n_classes, n_tiles, K=n_inputs, M=m, C=padded(n_classes), N=n, CHUNK=chunk,
            PRECISION=precision, WANTS_STATES=wants_states, WANTS_HEAD=wants_head, num_warps=4, num_stages=2,
        )  # fmt: skip
    if not wants_head:
        return [dx, weight.new_empty(0), bias.new_empty(0)]
    return [dx, (dw.sum(0) * gradient).to(weight.dtype), (db.sum(0) * gradient).to(bias.dtype)]


def _as_numbers(targets: Tensor) -> Tensor:
    return (targets.view(torch.uint8) if targets.dtype == torch.bool else targets).contiguous()


def _annotation_forward(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None
) -> Tensor:
    precision = product_precision(x.dtype)
    m, n, chunk = tile(capability_of(x), x.dtype, precision)
    grid = (triton.cdiv(len(x), m), triton.cdiv(len(weight), n))
    sums = x.new_empty(grid[1], len(x), dtype=torch.float32)
    if len(x):
        annotation_loss_kernel[grid](
            x.contiguous(), in_dtype(weight, x.dtype), bias, _as_numbers(targets), weights.contiguous(),
            x if term_weights is None else term_weights.contiguous(), sums, len(x), len(weight),
            HAS_TERM_WEIGHTS=term_weights is not None, K=x.shape[1], M=m, N=n, CHUNK=chunk, PRECISION=precision,
            num_warps=8, num_stages=3,
        )  # fmt: skip
    return sums.sum()


def _annotation_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor,
    term_weights: Tensor | None, wants_states: bool, wants_head: bool,
) -> list[Tensor]:  # fmt: skip
    precision = product_precision(x.dtype)
    m, n, chunk = tile(capability_of(x), x.dtype, precision)
    x, w, targets = x.contiguous(), weight.to(x.dtype).contiguous(), _as_numbers(targets)
    n_rows, n_columns = len(x), len(w)
    dx = x.new_zeros(x.shape, dtype=torch.float32)
    dw = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    db = x.new_zeros(triton.cdiv(n_rows, m), n_columns, dtype=torch.float32)
    most = max(_SLOPES_AT_ONCE // max(n_rows, 1) // n, 1) * n
    for first in range(0, n_columns if n_rows else 0, most):
        columns = slice(first, min(first + most, n_columns))
        # Rows that begin at multiples of 64: the vendor's products are slow at odd ones.
        n_slopes = columns.stop - first
        stride = triton.cdiv(n_slopes, 64) * 64
        slopes = x.new_empty(n_rows, stride)[:, :n_slopes]
        annotation_slope_kernel[(triton.cdiv(n_rows, m), triton.cdiv(n_slopes, n))](
            x, w, bias, targets, weights.contiguous(), x if term_weights is None else term_weights.contiguous(),
            slopes, db, n_rows, n_columns, first, n_slopes, stride,
            HAS_TERM_WEIGHTS=term_weights is not None, K=x.shape[1], M=m, N=n, CHUNK=chunk, PRECISION=precision,
            num_warps=8, num_stages=3,
        )  # fmt: skip
        # Large plain products: nothing is faster at them than the vendor's library.
        with torch.autocast(x.device.type, enabled=False):
            if wants_states:
                dx += _product(slopes, w[columns])
            if wants_head:
                dw[columns] = _product(slopes.t(), x) * gradient
    if not wants_head:
        dw, db = dw.new_empty(0), db.new_empty(0)
    else:
        db = db.sum(0) * gradient
    return [(dx * gradient).to(x.dtype) if wants_states else x.new_empty(0), dw, db.to(bias.dtype)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, not rounded to the 16 bits of its factors, in which a sum over many proteins might not fit."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


_token_loss = define_token_loss("token_loss", _token_forward, _token_backward)
_annotation_loss = define_annotation_loss("annotation_loss", _annotation_forward, _annotation_backward)


def token_loss(layer: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """``reference.token_loss_sum`` of a head, computed in its dtype or that of autocast; the sum is float32.

    A target that is no class, where the weight is not 0, gives NaN.

    Args:
        layer: (C, D), C small: one tile holds all classes.
        states: (R, D).
        targets: (R,) integers.
        weights: (R,).
    """
    return _token_loss(states.to(compute_dtype(states, layer.weight)), layer.weight, layer.bias, targets, weights)


def annotation_loss(
    layer: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None = None
) -> Tensor:
    """``reference.annotation_loss_sum`` of a head, computed in its dtype or that of autocast; the sum is float32.

    Args:
        layer: (N, G).
        states: (B, G).
        targets: (B, N) booleans, integers or floats from 0 to 1.
        weights: (B,).
        term_weights: (N,); 1 when None.
    """
    states = states.to(compute_dtype(states, layer.weight))
    return _annotation_loss(states, layer.weight, layer.bias, targets, weights, term_weights)
