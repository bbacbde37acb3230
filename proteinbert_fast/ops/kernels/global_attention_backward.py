"""Gradients of global attention: keys, values and weights are computed again, tile by tile, and never stored.

With p the softmax weight of a row, o what was pooled and do its gradient:

    dv = p do      dlogit = p (do . v - do . o)      dk = dlogit q / sqrt(K)      dq = sum of dlogit k / sqrt(K)

One kernel takes rows, a span of a protein after the other, for the gradients of local states and queries; another takes
heads, for those of the key and value weights, which many programs sum over a part of all spans each.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.ops.kernels.activations import LOG2_E, gelu_and_slope, tanh
from proteinbert_fast.ops.kernels.global_attention import SPAN, SpanSums, add_spans, projected
from proteinbert_fast.ops.kernels.launching import SIZES_OF_BATCHES, capability_of, has_matrix_units, padded
from proteinbert_fast.ops.kernels.local_block_backward import add_parts
from proteinbert_fast.ops.precision import product_precision

_PROGRAMS = 264


class Configuration(NamedTuple):
    """How the launches are cut.

    Attributes:
        rows: of a tile of the rows' gradients.
        weight_rows: of a tile of the weights' gradients.
        chunk: channels of the local state per product.
        values: channels of a head's values at a time.
        warps: per program.
        stages: tiles in flight.
    """

    rows: int
    weight_rows: int
    chunk: int
    values: int
    warps: int
    stages: int = 3


@triton.jit
def _softmax_weight(key, query, denominator, inside, SCALE: tl.constexpr):
    """(M,) of rows whose keys (M, K) are given; zeros where not ``inside``."""
    logit = tl.sum(key * query[None, :], axis=1) * (SCALE * LOG2_E)
    return tl.where(inside, tl.exp2(logit) / denominator, 0.0)


@triton.jit(do_not_specialize=SIZES_OF_BATCHES)
def attention_rows_gradient_kernel(
    LOCAL, QUERY, KEY, VALUE, STARTS, LENGTHS, SPAN_PROTEIN, FIRST_SPAN, POOLED, DENOMINATOR, D_POOLED, D_MEAN,
    D_LOCAL, D_QUERY, n_proteins,
    D: tl.constexpr, H: tl.constexpr, H_PADDED: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_PADDED: tl.constexpr, V_PADDED: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    VALUES: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Program: a span. Its rows of D_LOCAL, and its part of the queries' gradients, D_QUERY (spans, H * K)."""
    span = tl.program_id(0)
    protein = tl.load(SPAN_PROTEIN + span).to(tl.int64)
    if protein < n_proteins:
        done = (span - tl.load(FIRST_SPAN + protein)) * SPAN
        first_row = tl.load(STARTS + protein) + done
        rows_left = tl.load(LENGTHS + protein) - done
        n_rows = tl.minimum(rows_left, SPAN).to(tl.int32)
        columns = tl.arange(0, D)
        keys = tl.arange(0, K_PADDED)
        heads = tl.arange(0, H_PADDED)
        dtype = LOCAL.dtype.element_ty
        PRECISE: tl.constexpr = dtype == tl.float32
        d_query = tl.zeros((H_PADDED, K_PADDED), tl.float32)
        for tile in range(0, n_rows, M):
            row = tile + tl.arange(0, M)
            inside = row < n_rows
            rows = first_row + row
            total = tl.zeros((M, D), tl.float32)
            for head in range(0, H):
                query = tl.load(QUERY + (protein * H + head) * K + keys, mask=keys < K, other=0.0)
                denominator = tl.load(DENOMINATOR + protein * H + head)
                key = tanh(projected(LOCAL, KEY, rows, inside, head, 0, K, K_PADDED, D, CHUNK, PRECISION))
                weight = _softmax_weight(key, query, denominator, inside, SCALE)
                along = tl.zeros((M,), tl.float32)
                for first in range(0, V_PADDED, VALUES):
                    values = first + tl.arange(0, VALUES)
                    result = projected(LOCAL, VALUE, rows, inside, head, first, V, VALUES, D, CHUNK, PRECISION)
                    value, slope = gelu_and_slope(result, PRECISE)
                    at = (protein * H + head) * V + values
                    d_pooled = tl.load(D_POOLED + at, mask=values < V, other=0.0)
                    pooled = tl.load(POOLED + at, mask=values < V, other=0.0)
                    along += tl.sum((value - pooled[None, :]) * d_pooled[None, :], axis=1)
                    d_result = (weight[:, None] * d_pooled[None, :] * slope).to(dtype)
                    at = (head * V + values)[:, None] * D + columns[None, :]
                    w = tl.load(VALUE + at, mask=(values < V)[:, None], other=0.0)
                    total = tl.dot(d_result, w, total, input_precision=PRECISION)
                d_logit = weight * along * SCALE
                d_query_here = tl.sum(d_logit[:, None] * key, axis=0)
                d_query += tl.where((heads == head)[:, None], d_query_here[None, :], 0.0)
                d_result = (d_logit[:, None] * query[None, :] * (1.0 - key * key)).to(dtype)
                at = (head * K + keys)[:, None] * D + columns[None, :]
                w = tl.load(KEY + at, mask=(keys < K)[:, None], other=0.0)
                total = tl.dot(d_result, w, total, input_precision=PRECISION)
            if HAS_MEAN:
                # The first and the last token of a protein are no residues.
                residue = (done + row > 0) & (row + 1 < rows_left)
                n_residues = tl.maximum(tl.load(LENGTHS + protein) - 2, 1).to(tl.float32)
                d_mean = tl.load(D_MEAN + protein * D + columns) / n_residues
                total += tl.where(residue[:, None], d_mean[None, :], 0.0)
            at = rows[:, None] * D + columns[None, :]
            tl.store(D_LOCAL + at, total.to(dtype), mask=inside[:, None])
        out = D_QUERY + span.to(tl.int64) * (H * K) + heads[:, None] * K + keys[None, :]
        tl.store(out, d_query, mask=(heads < H)[:, None] & (keys < K)[None, :])


@triton.jit(do_not_specialize=SIZES_OF_BATCHES)
def attention_weights_gradient_kernel(
    LOCAL, QUERY, KEY, VALUE, STARTS, LENGTHS, SPAN_PROTEIN, FIRST_SPAN, POOLED, DENOMINATOR, D_POOLED, PARTS,
    n_proteins, n_spans, spans_each,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PADDED: tl.constexpr,
    V_PADDED: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (part, head): the head's rows of PARTS[part] (H * (K + V), D), keys above values, of its spans."""
    part = tl.program_id(0)
    head = tl.program_id(1)
    columns = tl.arange(0, D)
    keys = tl.arange(0, K_PADDED)
    values = tl.arange(0, V_PADDED)
    dtype = LOCAL.dtype.element_ty
    PRECISE: tl.constexpr = dtype == tl.float32
    d_key = tl.zeros((K_PADDED, D), tl.float32)
    d_value = tl.zeros((V_PADDED, D), tl.float32)
    for i in range(0, spans_each):
        span = part * spans_each + i
        protein = tl.load(SPAN_PROTEIN + tl.minimum(span, n_spans - 1)).to(tl.int64)
        # Spans that there are not read those of the first protein, and no rows.
        is_none = (span >= n_spans) | (protein >= n_proteins)
        protein = tl.where(is_none, 0, protein)
        done = (span - tl.load(FIRST_SPAN + protein)) * SPAN
        first_row = tl.load(STARTS + protein) + done
        n_rows = tl.minimum(tl.load(LENGTHS + protein) - done, tl.where(is_none, 0, SPAN)).to(tl.int32)
        query = tl.load(QUERY + (protein * H + head) * K + keys, mask=keys < K, other=0.0)
        denominator = tl.load(DENOMINATOR + protein * H + head)
        at = (protein * H + head) * V + values
        d_pooled = tl.load(D_POOLED + at, mask=values < V, other=0.0)
        pooled = tl.load(POOLED + at, mask=values < V, other=0.0)
        for tile in range(0, n_rows, M):
            row = tile + tl.arange(0, M)
            inside = row < n_rows
            rows = first_row + row
            local = tl.load(LOCAL + rows[:, None] * D + columns[None, :], mask=inside[:, None], other=0.0)
            key = tanh(projected(LOCAL, KEY, rows, inside, head, 0, K, K_PADDED, D, CHUNK, PRECISION))
            weight = _softmax_weight(key, query, denominator, inside, SCALE)
            result = projected(LOCAL, VALUE, rows, inside, head, 0, V, V_PADDED, D, CHUNK, PRECISION)
            value, slope = gelu_and_slope(result, PRECISE)
            along = tl.sum((value - pooled[None, :]) * d_pooled[None, :], axis=1)
            d_result = (weight[:, None] * d_pooled[None, :] * slope).to(dtype)
            d_value = tl.dot(tl.trans(d_result), local, d_value, input_precision=PRECISION)
            d_logit = weight * along * SCALE
            d_result = (d_logit[:, None] * query[None, :] * (1.0 - key * key)).to(dtype)
            d_key = tl.dot(tl.trans(d_result), local, d_key, input_precision=PRECISION)
    out = PARTS + part.to(tl.int64) * (H * (K + V) * D) + columns[None, :]
    tl.store(out + (head * K + keys)[:, None] * D, d_key, mask=(keys < K)[:, None])
    tl.store(out + (H * K + head * V + values)[:, None] * D, d_value, mask=(values < V)[:, None])


def configuration(capability: int, channels: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The shipped one for a device; as for the local block."""
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 64, 32, 64, 4)
    if not has_matrix_units(capability, dtype, precision) or dtype == torch.float32:
        # One stage: the next tile's rows would take the registers that the weights' gradients need.
        return Configuration(16, 16, 16, 16, 8, 1)
    if channels > 128:
        return Configuration(32, 16, 64, 64, 8, 2)
    return Configuration(64, 32, 64, 64, 8)


class Gradients(NamedTuple):
    """What the backward pass computes.

    Attributes:
        local: (R, D), zeros in gap rows.
        query: (B, H * K) float32.
        key_weight: (H * K, D).
        value_weight: (H * V, D).
    """

    local: Tensor
    query: Tensor
    key_weight: Tensor
    value_weight: Tensor


def launch(
    d_pooled: Tensor,
    d_mean: Tensor | None,
    local: Tensor,
    query: Tensor,
    pooled: Tensor,
    denominator: Tensor,
    starts: Tensor,
    lengths: Tensor,
    spans: tuple[Tensor, Tensor],
    longest: int,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    chosen: Configuration | None = None,
) -> Gradients:
    """Runs the kernels.

    Args:
        d_pooled: (B, H * V) float32, gradient of what was pooled.
        d_mean: (B, D) float32, that of the residues' mean, or None.
        local: (R, D), the block's new local states.
        query: (B, H * K) float32.
        pooled: (B, H * V) float32.
        denominator: (B, H) float32, sums of e.
        starts: (B,) int64.
        lengths: (B,) int64.
        spans: as ``PackedBatch.spans(SPAN)`` gives them.
        longest: rows of the longest protein, or more.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        chosen: how to cut the launches; the shipped configuration when None.
    """
    local, dtype = local.contiguous(), local.dtype
    n_proteins, (n_rows, channels) = len(starts), local.shape
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    precision = product_precision(dtype)
    c = chosen or configuration(capability_of(local), channels, dtype, precision)
    protein, first = spans
    d_local = torch.zeros_like(local)
    d_query = local.new_empty(len(protein), n_heads * d_key, dtype=torch.float32)
    n_parts = max(1, min(_PROGRAMS // n_heads, len(protein)))
    spans_each = triton.cdiv(len(protein), n_parts)
    n_parts = triton.cdiv(len(protein), spans_each) if n_proteins else 0
    parts = local.new_empty(n_parts, n_heads * (d_key + d_value), channels, dtype=torch.float32)
    if not n_proteins:
        return Gradients(
            d_local, query.new_zeros(query.shape), torch.zeros_like(key_weight), torch.zeros_like(value_weight)
        )
    tensors = (
        local, query.contiguous(), key_weight.to(dtype).contiguous(), value_weight.to(dtype).contiguous(), starts,
        lengths, protein, first, pooled, denominator, d_pooled.contiguous(),
    )  # fmt: skip
    sizes = {
        "D": channels, "H": n_heads, "K": d_key, "V": d_value, "K_PADDED": padded(d_key), "V_PADDED": padded(d_value),
        "SPAN": SPAN, "CHUNK": min(c.chunk, channels), "SCALE": 1 / math.sqrt(d_key), "PRECISION": precision,
    }  # fmt: skip
    attention_rows_gradient_kernel[(len(protein),)](
        *tensors, d_pooled if d_mean is None else d_mean.contiguous(), d_local, d_query, n_proteins,
        **sizes, H_PADDED=padded(n_heads), M=c.rows, VALUES=min(c.values, padded(d_value)), HAS_MEAN=d_mean is not None,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    attention_weights_gradient_kernel[(n_parts, n_heads)](
        *tensors, parts, n_proteins, len(protein), spans_each, **sizes, M=c.weight_rows,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    sums, first = add_spans(SpanSums(d_query, first), lengths, n_rows, longest, most=1)
    weights = add_parts(parts)
    return Gradients(
        d_local,
        sums[first[:n_proteins]],
        torch.empty_like(key_weight).copy_(weights[: len(key_weight)]),
        torch.empty_like(value_weight).copy_(weights[len(key_weight) :]),
    )
