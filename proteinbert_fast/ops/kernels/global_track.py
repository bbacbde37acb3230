"""The global track of one block in one kernel: two dense layers and two norms over the states of a few proteins."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels.activations import gelu, layer_norm
from proteinbert_fast.ops.kernels.launching import padded, product_precision
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import GlobalBlockWeights, GlobalStates

_PROTEINS = 16  # per program: as few as the matrix units take
_INPUTS = 16


@triton.jit
def _dense(X, W, BIAS, rows, n_rows, columns, G, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """gelu(rows of X @ W^T + BIAS), (M, G); X is (rows, G) in memory, W (G, G)."""
    in_columns = columns < G
    bias = tl.load(BIAS + columns, mask=in_columns, other=0.0).to(tl.float32)
    total = tl.broadcast_to(bias[None, :], (rows.shape[0], columns.shape[0]))
    for first in range(0, G, CHUNK):
        k = first + tl.arange(0, CHUNK)
        in_inputs = (k < G)[None, :]
        x = tl.load(X + rows[:, None] * G + k[None, :], mask=(rows < n_rows)[:, None] & in_inputs, other=0.0)
        w = tl.load(W + columns[:, None] * G + k[None, :], mask=in_columns[:, None] & in_inputs, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    return gelu(total, True)


@triton.jit
def _norm(x, WEIGHT, BIAS, columns, G, EPSILON: tl.constexpr):
    weight = tl.load(WEIGHT + columns, mask=columns < G, other=0.0).to(tl.float32)
    bias = tl.load(BIAS + columns, mask=columns < G, other=0.0).to(tl.float32)
    return layer_norm(x, weight, bias, G, EPSILON)


@triton.jit
def global_track_kernel(
    STATE, POOLED, DENSE1, DENSE1_BIAS, NORM1, NORM1_BIAS, DENSE2, DENSE2_BIAS, NORM2, NORM2_BIAS, HIDDEN, OUT,
    n_rows, G, G_PADDED: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """HIDDEN = norm1(state + dense1(state) + pooled), OUT = norm2(hidden + dense2(hidden)), M proteins per program."""
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    columns = tl.arange(0, G_PADDED)
    at = rows[:, None] * G + columns[None, :]
    mask = (rows < n_rows)[:, None] & (columns < G)[None, :]
    dtype = OUT.dtype.element_ty
    x = tl.load(STATE + at, mask=mask, other=0.0).to(tl.float32) + tl.load(POOLED + at, mask=mask, other=0.0).to(
        tl.float32
    )
    x += _dense(STATE, DENSE1, DENSE1_BIAS, rows, n_rows, columns, G, CHUNK, PRECISION)
    hidden = _norm(tl.where(mask, x, 0.0), NORM1, NORM1_BIAS, columns, G, EPSILON).to(dtype)
    tl.store(HIDDEN + at, hidden, mask=mask)
    # The second product reads what other threads of this program have just written.
    tl.debug_barrier()
    x = hidden.to(tl.float32) + _dense(HIDDEN, DENSE2, DENSE2_BIAS, rows, n_rows, columns, G, CHUNK, PRECISION)
    out = _norm(tl.where(mask, x, 0.0), NORM2, NORM2_BIAS, columns, G, EPSILON).to(dtype)
    tl.store(OUT + at, out, mask=mask)


@torch.library.custom_op("proteinbert_fast::global_track", mutates_args=())
def _global_track(state: Tensor, pooled: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    state, pooled = state.contiguous(), pooled.contiguous()
    w = GlobalBlockWeights(*weights)
    n_proteins, width = state.shape
    hidden, out = torch.empty_like(state), torch.empty_like(state)
    if n_proteins:
        global_track_kernel[(triton.cdiv(n_proteins, _PROTEINS),)](
            state, pooled, w.dense1_weight.to(state.dtype).contiguous(), w.dense1_bias, w.norm1_weight, w.norm1_bias,
            w.dense2_weight.to(state.dtype).contiguous(), w.dense2_bias, w.norm2_weight, w.norm2_bias, hidden, out,
            n_proteins, width, G_PADDED=padded(width), M=_PROTEINS, CHUNK=_INPUTS,
            PRECISION=product_precision(state.dtype), EPSILON=LAYER_NORM_EPS, num_warps=8, num_stages=3,
        )  # fmt: skip
    return hidden, out


@_global_track.register_fake
def _(state: Tensor, pooled: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(state), torch.empty_like(state)


def global_block(global_state: Tensor, pooled: Tensor, weights: GlobalBlockWeights) -> GlobalStates:
    """``reference.global_block`` in one kernel.

    Args:
        global_state: (B, G), from before the block.
        pooled: (B, G), what global attention gathered.
        weights: the block's parameters; products take them in the dtype of ``global_state``.
    """

    def fast(state: Tensor, pooled: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _global_track(state, pooled.to(state.dtype), list(weights))
        return result

    def plain(state: Tensor, pooled: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return reference.global_block(state, pooled, GlobalBlockWeights(*weights))

    return GlobalStates(*recomputed(fast, plain, global_state, pooled, *weights))
