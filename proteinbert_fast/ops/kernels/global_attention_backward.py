"""Gradients of global attention: keys, values and weights are computed again, tile by tile, and never stored.

With p the softmax weight of a row, o what was pooled and do its gradient:

    dv = p do      dlogit = p (do . v - do . o)      dk = dlogit q / sqrt(K)      dq = sum of dlogit k / sqrt(K)

One kernel takes rows, a span of a protein after the other, for the gradients of local states and queries. It leaves p
and dlogit / sqrt(K) of every row and head behind, so that the other, for the gradients of the key and value weights,
needs no sum over keys or values: its programs take some of a matrix's rows each, and sum over a part of all tiles.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import LOG2_E, gelu_and_slope, settled, tanh
from proteinbert_fast.ops.kernels.global_attention import SPAN, TILE, SpanSums, add_spans, projected
from proteinbert_fast.ops.kernels.launching import (
    ANY_BATCH,
    capability_of,
    has_large_tiles,
    has_matrix_units,
    is_hopper,
    padded,
    shared_memory,
)
from proteinbert_fast.ops.kernels.local_block_backward import add_parts
from proteinbert_fast.ops.precision import product_precision

_PROGRAMS = 264  # two on each multiprocessor of an H100: among so many are sums over rows split
_SCRATCH = 8192  # bytes of shared memory that reductions and small vectors take, or fewer


class Configuration(NamedTuple):
    """How the launches are cut.

    Attributes:
        rows: of a tile of the rows' gradients.
        values: channels of a head's values at a time there.
        chunk: channels of the local state per product there, 0 for all at once.
        stages: of the loop over heads, whose weights are fetched ahead; or, with a ``chunk``, of those over channels.
        weight_rows: of a tile of the weights' gradients.
        outputs: keys or values of a program of theirs, at most.
        weight_chunk: as ``chunk``, for theirs. Without matrix units, all channels would not fit into registers.
        weight_stages: tiles in flight.
        warps: per program.
        registers: of a thread for the weights' gradients at most, so that more programs fit; None for no bound.
    """

    rows: int
    values: int
    chunk: int
    stages: int
    weight_rows: int
    outputs: int
    weight_chunk: int
    weight_stages: int
    warps: int
    registers: int | None


@triton.jit
def _weights_of(W, first, n, n_outputs: tl.constexpr, D: tl.constexpr):
    """Rows [first, first + n) of a matrix as (n_outputs, D), zeros below."""
    outputs = tl.arange(0, n_outputs)
    at = (first + outputs)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(W + at, mask=(outputs < n)[:, None], other=0.0)


@triton.jit(**ANY_BATCH)
def attention_rows_gradient_kernel(
    LOCAL, QUERY, KEY, VALUE, STARTS, LENGTHS, SPAN_PROTEIN, FIRST_SPAN, POOLED, DENOMINATOR, D_POOLED, D_MEAN,
    D_LOCAL, D_QUERY, WEIGHT, D_LOGIT, n_proteins, n_rows,
    D: tl.constexpr, H: tl.constexpr, H_PADDED: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_PADDED: tl.constexpr, V_PADDED: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    VALUES: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, HAS_MEAN: tl.constexpr,
):  # fmt: skip
    """Program: a span. Its rows of D_LOCAL, and its part of the queries' gradients, D_QUERY (spans, H * K).

    WEIGHT and D_LOGIT (H, rows) take the softmax weights, and the gradients of keys' products with the query.
    """
    span = tl.program_id(0)
    protein = tl.load(SPAN_PROTEIN + span).to(tl.int64)
    if protein < n_proteins:
        done = (span - tl.load(FIRST_SPAN + protein)) * SPAN
        first_row = tl.load(STARTS + protein) + done
        rows_left = tl.load(LENGTHS + protein) - done
        in_span = tl.minimum(rows_left, SPAN).to(tl.int32)
        columns = tl.arange(0, D)
        keys = tl.arange(0, K_PADDED)
        heads = tl.arange(0, H_PADDED)
        dtype = LOCAL.dtype.element_ty
        PRECISE: tl.constexpr = dtype == tl.float32
        d_query = tl.zeros((H_PADDED, K_PADDED), tl.float32)
        for tile in range(0, in_span, M):
            row = tile + tl.arange(0, M)
            inside = row < in_span
            rows = first_row + row
            at_rows = rows[:, None] * D + columns[None, :]
            total = tl.zeros((M, D), tl.float32)
            if not CHUNK:
                local = tl.load(LOCAL + at_rows, mask=inside[:, None], other=0.0)
            for head in tl.range(0, H, num_stages=STAGES):
                query = tl.load(QUERY + (protein * H + head) * K + keys, mask=keys < K, other=0.0)
                denominator = tl.load(DENOMINATOR + protein * H + head)
                if CHUNK:
                    key = tanh(projected(LOCAL, KEY, rows, inside, head, 0, K, K_PADDED, D, CHUNK, PRECISION))
                else:
                    key_weight = _weights_of(KEY, head * K, K, K_PADDED, D)
                    key = tanh(tl.dot(local, tl.trans(key_weight), input_precision=PRECISION))
                logit = tl.sum(key * query[None, :], axis=1) * (SCALE * LOG2_E)
                weight = tl.where(inside, tl.exp2(logit) / denominator, 0.0)
                along = tl.zeros((M,), tl.float32)
                for first in tl.static_range(0, V_PADDED, VALUES):
                    if CHUNK:
                        result = projected(LOCAL, VALUE, rows, inside, head, first, V, VALUES, D, CHUNK, PRECISION)
                    else:
                        value_weight = _weights_of(VALUE, head * V + first, V - first, VALUES, D)
                        result = tl.dot(local, tl.trans(value_weight), input_precision=PRECISION)
                    value, slope = gelu_and_slope(result, PRECISE)
                    values = first + tl.arange(0, VALUES)
                    at = (protein * H + head) * V + values
                    d_pooled = tl.load(D_POOLED + at, mask=values < V, other=0.0)
                    pooled = tl.load(POOLED + at, mask=values < V, other=0.0)
                    if PRECISE:
                        along += tl.sum((value - pooled[None, :]) * d_pooled[None, :], axis=1)
                    else:
                        # One instruction less per value.
                        along += tl.sum(value * d_pooled[None, :], axis=1) - tl.sum(pooled * d_pooled, axis=0)
                    d_result = (weight[:, None] * d_pooled[None, :] * slope).to(dtype)
                    if CHUNK:
                        value_weight = _weights_of(VALUE, head * V + first, V - first, VALUES, D)
                    total = tl.dot(d_result, value_weight, total, input_precision=PRECISION)
                d_logit = weight * along * SCALE
                d_query_here = tl.sum(d_logit[:, None] * key, axis=0)
                d_query += tl.where((heads == head)[:, None], d_query_here[None, :], 0.0)
                d_result = (d_logit[:, None] * query[None, :] * (1.0 - key * key)).to(dtype)
                if CHUNK:
                    key_weight = _weights_of(KEY, head * K, K, K_PADDED, D)
                total = tl.dot(d_result, key_weight, total, input_precision=PRECISION)
                at = n_rows.to(tl.int64) * head + rows
                tl.store(WEIGHT + at, weight, mask=inside)
                tl.store(D_LOGIT + at, d_logit, mask=inside)
            if HAS_MEAN:
                # The first and the last token of a protein are no residues.
                residue = (done + row > 0) & (row + 1 < rows_left)
                n_residues = tl.maximum(tl.load(LENGTHS + protein) - 2, 1).to(tl.float32)
                d_mean = tl.load(D_MEAN + protein * D + columns) / n_residues
                total += tl.where(residue[:, None], d_mean[None, :], 0.0)
            tl.store(D_LOCAL + at_rows, total.to(dtype), mask=inside[:, None])
        out = D_QUERY + span.to(tl.int64) * (H * K) + heads[:, None] * K + keys[None, :]
        tl.store(out, d_query, mask=(heads < H)[:, None] & (keys < K)[None, :])
        # Read again: kept from above, they would take registers throughout.
        start = tl.load(STARTS + protein)
        if span == 0:
            _clear(D_LOCAL, 0, start, D)
        if span + 1 == tl.load(FIRST_SPAN + protein + 1):
            following = tl.load(STARTS + protein + 1, mask=protein + 1 < n_proteins, other=n_rows)
            _clear(D_LOCAL, start + tl.load(LENGTHS + protein), tl.minimum(following, n_rows), D)


@triton.jit
def _clear(X, first, end, D: tl.constexpr):
    """Zeros in rows [first, end), which are a gap."""
    columns = tl.arange(0, D)
    for i in range(0, (end - first).to(tl.int32), 16):
        rows = first + i + tl.arange(0, 16).to(tl.int64)
        zeros = tl.zeros((16, D), X.dtype.element_ty)
        tl.store(X + rows[:, None] * D + columns[None, :], zeros, mask=(rows < end)[:, None])


@triton.jit
def _weight_gradient(
    LOCAL, W, FACTORS, ROW_FACTORS, STARTS, LENGTHS, TILE_PROTEIN, FIRST_TILE, OUT, tile, end, head, first, n_rows,
    IS_KEY: tl.constexpr, SIZE: tl.constexpr, HEADS: tl.constexpr, OUTPUTS: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """OUT (H * SIZE, D), OUTPUTS rows of it from the head's ``first`` on: sums over the tiles [tile, end) of TILE rows.

    What is summed is slope * FACTORS (B, H * SIZE) * ROW_FACTORS (H, rows) * LOCAL. Outputs are rows here, and the
    states' rows are columns, so that the sums of one product are an operand of the next as they lie in registers.
    """
    tl.static_assert(TILE % M == 0)
    dtype = LOCAL.dtype.element_ty
    columns = tl.arange(0, D)
    output = first + tl.arange(0, OUTPUTS)
    is_output = output < HEADS * SIZE
    output_at = head * SIZE + output
    if not CHUNK:
        w = tl.load(W + output_at[:, None] * D + columns[None, :], mask=is_output[:, None], other=0.0)
    total = tl.zeros((OUTPUTS, D), tl.float32)
    for i in tl.range(tile * (TILE // M), end * (TILE // M), num_stages=STAGES):
        protein = tl.load(TILE_PROTEIN + i // (TILE // M)).to(tl.int64)
        row = (i - tl.load(FIRST_TILE + protein) * (TILE // M)) * M + tl.arange(0, M)
        inside = row < tl.load(LENGTHS + protein)
        rows = tl.load(STARTS + protein) + row
        x = tl.load(LOCAL + rows[:, None] * D + columns[None, :], mask=inside[:, None], other=0.0)
        if CHUNK:
            result = tl.zeros((OUTPUTS, M), tl.float32)
            for k in range(0, D, CHUNK):
                part = k + tl.arange(0, CHUNK)
                xs = tl.load(LOCAL + rows[:, None] * D + part[None, :], mask=inside[:, None], other=0.0)
                ws = tl.load(W + output_at[:, None] * D + part[None, :], mask=is_output[:, None], other=0.0)
                result = tl.dot(ws, tl.trans(xs), result, input_precision=PRECISION)
        else:
            result = tl.dot(w, tl.trans(x), input_precision=PRECISION)
        if IS_KEY:
            key = tanh(result)
            slope = 1.0 - key * key
        else:
            _, slope = gelu_and_slope(result, dtype == tl.float32)
        of_rows = ROW_FACTORS + n_rows.to(tl.int64) * head + rows
        factor = tl.load(of_rows, mask=inside, other=0.0)[None, :]
        for next_head in tl.static_range(1, HEADS):
            following = tl.load(of_rows + n_rows.to(tl.int64) * next_head, mask=inside, other=0.0)[None, :]
            factor = tl.where((output >= next_head * SIZE)[:, None], following, factor)
        of_outputs = tl.load(FACTORS + protein * (H * SIZE) + output_at, mask=is_output, other=0.0)
        d_result = (slope * of_outputs[:, None] * factor).to(dtype)
        total = tl.dot(d_result, x, total, input_precision=PRECISION)
        if SETTLED:
            total = settled(total)
    tl.store(OUT + output_at[:, None] * D + columns[None, :], total, mask=is_output[:, None])


@triton.jit(**ANY_BATCH)
def attention_weights_gradient_kernel(
    LOCAL, QUERY, KEY, VALUE, STARTS, LENGTHS, TILE_PROTEIN, FIRST_TILE, D_POOLED, WEIGHT, D_LOGIT, PARTS, n_proteins,
    n_parts, n_rows,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
    KEY_GROUPS: tl.constexpr, VALUES: tl.constexpr, VALUE_GROUPS: tl.constexpr, TILE: tl.constexpr, M: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Program (part of the tiles, group): the group's rows of PARTS[part] (H * (K + V), D), keys above values.

    A group is KEYS keys of HEADS heads, whose keys are KEY_GROUPS groups, or VALUES values of a head, VALUE_GROUPS.
    """
    part = tl.program_id(0)
    group = tl.program_id(1)
    n_tiles = tl.load(FIRST_TILE + n_proteins).to(tl.int32)
    each = tl.cdiv(n_tiles, n_parts)
    begin = part * each
    end = tl.minimum(begin + each, n_tiles)
    out = PARTS + part.to(tl.int64) * (H * (K + V) * D)
    if group < H // HEADS * KEY_GROUPS:
        _weight_gradient(
            LOCAL, KEY, QUERY, D_LOGIT, STARTS, LENGTHS, TILE_PROTEIN, FIRST_TILE, out, begin, end,
            group // KEY_GROUPS * HEADS, group % KEY_GROUPS * KEYS, n_rows,
            True, K, HEADS, KEYS, H, D, TILE, M, CHUNK, STAGES, PRECISION, SETTLED,
        )  # fmt: skip
    else:
        group -= H // HEADS * KEY_GROUPS
        _weight_gradient(
            LOCAL, VALUE, D_POOLED, WEIGHT, STARTS, LENGTHS, TILE_PROTEIN, FIRST_TILE, out + H * K * D, begin, end,
            group // VALUE_GROUPS, group % VALUE_GROUPS * VALUES, n_rows,
            False, V, 1, VALUES, H, D, TILE, M, CHUNK, STAGES, PRECISION, SETTLED,
        )  # fmt: skip


def configuration(capability: int, channels: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The tuned one of this machine, or the shipped one for a device; as for the local block."""
    kernel = "global_attention_backward"
    if (tuned := tuning.lookup(kernel, Configuration, capability, channels, dtype, precision)) is not None:
        return tuned
    exact = dtype == torch.float32
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        chunk = 32 if exact else 0
        return Configuration(64, 64, chunk, 1, 64, 64, chunk, 1, 4, None)
    if exact or not has_matrix_units(capability, dtype, precision):
        return Configuration(16, 16, 16, 1, 16, 128 if exact else 64, 16, 1, 8, None)
    if channels > 128:
        return Configuration(32, 64, 64, 2, 32, 64, 0, 2, 8, None)
    if is_hopper(capability):
        return Configuration(128, 64, 0, 2, 64, 128, 0, 3, 8, 128)
    # Blackwell's memory for sums of products has no room for tiles of 128 rows: Triton 3.6 makes a kernel of a trap.
    large = has_large_tiles(capability)
    return Configuration(64, 64, 64, 3, 64 if large else 32, 128, 0, 3 if large else 2, 8, None)


def fitted(c: Configuration, capability: int, outputs: int, channels: int, itemsize: int) -> Configuration:
    """The same, with fewer stages or channels at a time where a head's weights do not fit into shared memory.

    Args:
        c: that all states of these channels get.
        capability: 80 for 8.0; 0 in the interpreter.
        outputs: keys and values of a head, padded.
        channels: D.
        itemsize: bytes of a number.
    """
    if c.chunk or not capability:
        return c
    for stages in sorted({c.stages, min(c.stages, 2)}, reverse=True):
        if (outputs * stages + c.rows) * channels * itemsize + _SCRATCH <= shared_memory(capability):
            return c._replace(stages=stages)
    return c._replace(rows=min(c.rows, 64), chunk=64, stages=min(c.stages, 2))


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
    tiles: tuple[Tensor, Tensor],
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
        tiles: as ``PackedBatch.spans(TILE)`` does.
        longest: rows of the longest protein, or more.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        chosen: how to cut the launches; the tuned or the shipped configuration when None.
    """
    local, dtype = local.contiguous(), local.dtype
    n_proteins, (n_rows, channels) = len(starts), local.shape
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    precision = product_precision(dtype)
    capability = capability_of(local)
    c = chosen
    if c is None:
        c = configuration(capability, channels, dtype, precision)
        c = fitted(c, capability, padded(d_key) + padded(d_value), channels, local.element_size())
    protein, first = spans
    if not n_proteins:
        return Gradients(
            torch.zeros_like(local),
            query.new_zeros(query.shape),
            torch.zeros_like(key_weight),
            torch.zeros_like(value_weight),
        )
    d_local = torch.empty_like(local)
    d_query = local.new_empty(len(protein), n_heads * d_key, dtype=torch.float32)
    weight, d_logit = (local.new_empty(n_heads, n_rows, dtype=torch.float32) for _ in range(2))
    query, d_pooled = query.contiguous(), d_pooled.contiguous()
    matrices = key_weight.to(dtype).contiguous(), value_weight.to(dtype).contiguous()
    sizes = {
        "D": channels, "H": n_heads, "K": d_key, "V": d_value, "PRECISION": precision, "num_warps": c.warps,
    }  # fmt: skip
    attention_rows_gradient_kernel[(len(protein),)](
        local, query, *matrices, starts, lengths, protein, first, pooled, denominator, d_pooled,
        d_pooled if d_mean is None else d_mean.contiguous(), d_local, d_query, weight, d_logit, n_proteins, n_rows,
        **sizes, K_PADDED=padded(d_key), V_PADDED=padded(d_value), H_PADDED=padded(n_heads), SPAN=SPAN, M=c.rows,
        VALUES=min(c.values, padded(d_value)), SCALE=1 / math.sqrt(d_key), CHUNK=min(c.chunk, channels),
        STAGES=c.stages, HAS_MEAN=d_mean is not None, num_stages=c.stages,
    )  # fmt: skip
    tile_protein, first_tile = tiles
    # As many heads' keys to a program as it takes, if they fill its tile without padding.
    together = math.gcd(n_heads, max(c.outputs // d_key, 1)) if d_key == padded(d_key) else 1
    keys, values = min(c.outputs, together * padded(d_key)), min(c.outputs, padded(d_value))
    key_groups, value_groups = together * padded(d_key) // keys, padded(d_value) // values
    groups = n_heads // together * key_groups + n_heads * value_groups
    n_parts = max(1, min(_PROGRAMS // groups, len(tile_protein)))
    parts = local.new_empty(n_parts, n_heads * (d_key + d_value), channels, dtype=torch.float32)
    attention_weights_gradient_kernel[(n_parts, groups)](
        local, query, *matrices, starts, lengths, tile_protein, first_tile, d_pooled, weight, d_logit, parts,
        n_proteins, n_parts, n_rows,
        **sizes, HEADS=together, KEYS=keys, KEY_GROUPS=key_groups, VALUES=values, VALUE_GROUPS=value_groups,
        TILE=TILE, M=c.weight_rows, CHUNK=min(c.weight_chunk, channels), STAGES=c.weight_stages,
        SETTLED=is_hopper(capability), num_stages=c.weight_stages,
        maxnreg=c.registers,
    )  # fmt: skip
    sums, first = add_spans(SpanSums(d_query, first), lengths, n_rows, longest, most=1)
    weights = add_parts(parts)
    return Gradients(
        d_local,
        sums[first[:n_proteins]],
        torch.empty_like(key_weight).copy_(weights[: len(key_weight)]),
        torch.empty_like(value_weight).copy_(weights[len(key_weight) :]),
    )
