"""Global attention: each protein's query over its own rows, in one pass; keys and values are never stored.

A protein is cut into spans of SPAN rows from its own first row. One program sums a head's ``e`` and ``e * v`` over a
span, tile by tile; a second kernel adds a protein's spans, in order. |logit| <= sqrt(d_key), so no running maximum is
needed. No sum's order depends on what else is in the batch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import LOG2_E, gelu, tanh
from proteinbert_fast.ops.kernels.launching import capability_of, padded, product_precision
from proteinbert_fast.ops.kernels.linear import linear
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import Attended
from proteinbert_fast.packing import PackedBatch

SPAN = 512
_SPANS_AT_ONCE = 32


class Configuration(NamedTuple):
    """How a launch is cut.

    Attributes:
        rows: of a tile.
        warps: per program.
        stages: of the loop over tiles.
        chunk: channels per product, 0 for all at once. Without matrix units, all would not fit into shared memory.
    """

    rows: int
    warps: int
    stages: int
    chunk: int


@triton.jit
def _projected(
    LOCAL, W, rows, inside, head, SIZE: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of LOCAL times a head's (SIZE, D) matrix, CHUNK channels at a time, (M, PADDED)."""
    outputs = tl.arange(0, PADDED)
    total = tl.zeros((rows.shape[0], PADDED), tl.float32)
    for first in range(0, D, CHUNK):
        k = first + tl.arange(0, CHUNK)
        x = tl.load(LOCAL + rows[:, None] * D + k[None, :], mask=inside[:, None], other=0.0)
        w_at = W + (head * SIZE + outputs)[:, None] * D + k[None, :]
        w = tl.load(w_at, mask=(outputs < SIZE)[:, None], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    return total


@triton.jit
def _head_matrix(W, head, SIZE: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr):
    """Rows [head * SIZE, ...) of a (heads * SIZE, D) matrix as (PADDED, D), zeros below."""
    outputs = tl.arange(0, PADDED)
    at = (head * SIZE + outputs)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(W + at, mask=(outputs < SIZE)[:, None], other=0.0)


@triton.jit
def span_sums_kernel(
    LOCAL, QUERY, KEY, VALUE, STARTS, LENGTHS, SPAN_PROTEIN, FIRST_SPAN, SUMS, n_proteins,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    SPAN: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (span, head): sum of e * v, and behind it sum of e, to SUMS (spans, H, V + 1)."""
    span = tl.program_id(0)
    head = tl.program_id(1)
    protein = tl.load(SPAN_PROTEIN + span)
    if protein < n_proteins:
        done = (span - tl.load(FIRST_SPAN + protein)) * SPAN
        first_row = tl.load(STARTS + protein) + done
        rows_left = tl.load(LENGTHS + protein) - done
        n_rows = tl.minimum(rows_left, SPAN).to(tl.int32)
        keys = tl.arange(0, K_PADDED)
        values = tl.arange(0, V_PADDED)
        query = tl.load(QUERY + (protein.to(tl.int64) * H + head) * K + keys, mask=keys < K, other=0.0)
        if not CHUNK:
            key_weight = _head_matrix(KEY, head, K, K_PADDED, D)
            value_weight = _head_matrix(VALUE, head, V, V_PADDED, D)
        numerator = tl.zeros((V_PADDED,), tl.float32)
        denominator = tl.zeros((M,), tl.float32)
        for tile in tl.range(0, n_rows, M, num_stages=STAGES):
            row = tile + tl.arange(0, M)
            inside = row < n_rows
            if CHUNK:
                key = _projected(LOCAL, KEY, first_row + row, inside, head, K, K_PADDED, D, CHUNK, PRECISION)
                value = _projected(LOCAL, VALUE, first_row + row, inside, head, V, V_PADDED, D, CHUNK, PRECISION)
            else:
                at = (first_row + row)[:, None] * D + tl.arange(0, D)[None, :]
                local = tl.load(LOCAL + at, mask=inside[:, None], other=0.0)
                key = tl.dot(local, tl.trans(key_weight), input_precision=PRECISION)
                value = tl.dot(local, tl.trans(value_weight), input_precision=PRECISION)
            logit = tl.sum(tanh(key) * query[None, :], axis=1) * SCALE
            e = tl.where(inside, tl.exp2(logit), 0.0)
            value = gelu(value, LOCAL.dtype.element_ty == tl.float32)
            # Rows of the last tile that are not the protein's are zeros, not 0 * whatever.
            numerator += tl.sum(tl.where(inside[:, None], value * e[:, None], 0.0), axis=0)
            denominator += e
        out = SUMS + (span.to(tl.int64) * H + head) * (V + 1)
        tl.store(out + values, numerator, mask=values < V)
        tl.store(out + V, tl.sum(denominator, axis=0))


@triton.jit
def add_spans_kernel(
    SUMS, FIRST_SPAN, POOLED, DENOMINATOR,
    H: tl.constexpr, V: tl.constexpr, V_PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (protein, head): the weighted mean over all spans, AT_ONCE spans at a time."""
    protein = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(FIRST_SPAN + protein)
    n_spans = (tl.load(FIRST_SPAN + protein + 1) - first).to(tl.int32)
    values = tl.arange(0, V_PADDED)
    numerator = tl.zeros((V_PADDED,), tl.float32)
    denominator = tl.zeros((AT_ONCE,), tl.float32)
    for done in range(0, n_spans, AT_ONCE):
        span = done + tl.arange(0, AT_ONCE)
        inside = span < n_spans
        at = SUMS + ((first + span) * H + head) * (V + 1)
        sums = tl.load(at[:, None] + values[None, :], mask=inside[:, None] & (values < V)[None, :], other=0.0)
        numerator += tl.sum(sums, axis=0)
        denominator += tl.load(at + V, mask=inside, other=0.0)
    total = tl.sum(denominator, axis=0)
    out = protein.to(tl.int64) * H + head
    tl.store(POOLED + out * V + values, (numerator / total).to(POOLED.dtype.element_ty), mask=values < V)
    tl.store(DENOMINATOR + out, total)


@triton.jit
def weights_kernel(
    LOCAL, QUERY, KEY, DENOMINATOR, SEGMENTS, WEIGHTS, n_rows,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, head): the softmax weights, computed again from the keys. Zeros in gap rows."""
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    in_batch = rows < n_rows
    segment = tl.load(SEGMENTS + rows, mask=in_batch, other=-1)
    inside = segment >= 0
    protein = tl.maximum(segment, 0).to(tl.int64)
    keys = tl.arange(0, K_PADDED)
    key = tanh(_projected(LOCAL, KEY, rows, inside, head, K, K_PADDED, D, 16, PRECISION))
    query_at = QUERY + (protein * H + head)[:, None] * K + keys[None, :]
    query = tl.load(query_at, mask=inside[:, None] & (keys < K)[None, :], other=0.0)
    e = tl.exp2(tl.sum(key * query, axis=1) * SCALE)
    weight = e / tl.load(DENOMINATOR + protein * H + head, mask=inside, other=1.0)
    weight = tl.where(inside, weight, 0.0).to(WEIGHTS.dtype.element_ty)
    tl.store(WEIGHTS + rows * H + head, weight, mask=in_batch)


def configuration(capability: int, channels: int, dtype: torch.dtype) -> Configuration:
    """The tuned one of this machine, or the shipped one for a device; as for the local block."""
    if (tuned := tuning.lookup("global_attention", Configuration, capability, channels, dtype)) is not None:
        return tuned
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 4, 1, 32 if dtype == torch.float32 else 0)
    if dtype == torch.float32 or capability < 80:
        return Configuration(16, 8, 1, 16)
    if channels > 128:
        return Configuration(32, 8, 1, 0)
    return Configuration(64, 4 if capability >= 90 else 8, 2, 0)


@torch.library.custom_op("proteinbert_fast::global_attention", mutates_args=())
def _global_attention(
    local: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, starts: Tensor, lengths: Tensor,
    segments: Tensor, span_protein: Tensor, first_span: Tensor, n_heads: int, return_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    local = local.contiguous()
    n_proteins, channels = len(starts), local.shape[1]
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    key_weight, value_weight = key_weight.to(local.dtype).contiguous(), value_weight.to(local.dtype).contiguous()
    c = configuration(capability_of(local), channels, local.dtype)
    sizes = {"D": channels, "H": n_heads, "K": d_key, "K_PADDED": padded(d_key)}
    values = {"V": d_value, "V_PADDED": padded(d_value)}
    scale = LOG2_E.value / math.sqrt(d_key)
    precision = product_precision(local.dtype)
    sums = torch.empty(len(span_protein), n_heads, d_value + 1, dtype=torch.float32, device=local.device)
    pooled = local.new_empty(n_proteins, n_heads * d_value)
    denominator = torch.empty(n_proteins, n_heads, dtype=torch.float32, device=local.device)
    if n_proteins:
        span_sums_kernel[(len(span_protein), n_heads)](
            local, query, key_weight, value_weight, starts, lengths, span_protein, first_span, sums, n_proteins,
            **sizes, **values, SPAN=SPAN, M=c.rows, STAGES=c.stages, CHUNK=c.chunk, SCALE=scale, PRECISION=precision,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        add_spans_kernel[(n_proteins, n_heads)](
            sums, first_span, pooled, denominator, H=n_heads, **values, AT_ONCE=_SPANS_AT_ONCE, num_warps=4
        )
    weights = local.new_empty(len(local) if return_weights else 0, n_heads)
    if return_weights:
        weights_kernel[(triton.cdiv(len(local), c.rows), n_heads)](
            local, query, key_weight, denominator, segments, weights, len(local),
            **sizes, M=c.rows, SCALE=scale, PRECISION=precision, num_warps=c.warps,
        )  # fmt: skip
    return pooled, weights


@_global_attention.register_fake
def _(
    local: Tensor, query: Tensor, key_weight: Tensor, value_weight: Tensor, starts: Tensor, lengths: Tensor,
    segments: Tensor, span_protein: Tensor, first_span: Tensor, n_heads: int, return_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights = local.new_empty(len(local) if return_weights else 0, n_heads)
    return local.new_empty(len(starts), len(value_weight)), weights


def global_attention(
    local: Tensor,
    global_state: Tensor,
    batch: PackedBatch,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    return_weights: bool = False,
) -> Attended:
    """``reference.global_attention``; attention weights, if asked for, are computed in a second pass, in local's dtype.

    Args:
        local: (R, D), the block's new local states.
        global_state: (B, G), the global states from before the block.
        batch: the packed layout.
        query_weight: (H * K, G), head-major.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        return_weights: also return the softmax weights (R, H).
    """
    segments, dtype = batch.segments, local.dtype
    spans = batch.spans(SPAN)

    def fast(local: Tensor, global_state: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query_weight, key_weight, value_weight = weights
        query = linear(global_state.to(dtype), query_weight, None, "tanh", torch.float32)
        result: tuple[Tensor, ...] = _global_attention(
            local, query, key_weight, value_weight, batch.starts, batch.lengths, segments, *spans, n_heads,
            return_weights,
        )  # fmt: skip
        return result

    def plain(local: Tensor, global_state: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        query_weight, key_weight, value_weight = weights
        attended = reference.global_attention(
            local, global_state, segments, query_weight, key_weight, value_weight, n_heads, return_weights
        )
        return attended.pooled, local.new_empty(0) if attended.weights is None else attended.weights

    pooled, weights = recomputed(fast, plain, local, global_state, query_weight, key_weight, value_weight)
    return Attended(pooled, weights if return_weights else None)
