"""Global attention: each protein's query over its own rows, in one pass; keys and values are never stored.

A protein is cut into spans of SPAN rows from its own first row. One program sums a head's ``e`` and ``e * v`` over a
span, tile by tile; the global track adds a protein's spans, in order. |logit| <= sqrt(d_key), so no running maximum is
needed. No sum's order depends on what else is in the batch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import LOG2_E, gelu, tanh
from proteinbert_fast.ops.kernels.launching import (
    ANY_BATCH,
    capability_of,
    has_large_tiles,
    has_matrix_units,
    padded,
    shared_memory,
)
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.prepared import in_dtype
from proteinbert_fast.spans import cut_into_spans

SPAN = 512
TILE = 64  # rows, of a protein too, among which the backward pass shares out sums over rows
SPANS_AT_ONCE = 32
_RESIDUES_AT_ONCE = 32
_SCRATCH = 4096  # bytes of shared memory that reductions take, or fewer


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
def projected(
    LOCAL, W, rows, inside, head, first_output, SIZE: tl.constexpr, OUTPUTS: tl.constexpr, D: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of LOCAL times OUTPUTS rows of a head's (SIZE, D) matrix, CHUNK channels at a time, (M, OUTPUTS).

    Rows from SIZE on count as zeros.
    """
    outputs = first_output + tl.arange(0, OUTPUTS)
    total = tl.zeros((rows.shape[0], OUTPUTS), tl.float32)
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


@triton.jit(**ANY_BATCH)
def span_sums_kernel(
    LOCAL, QUERY, KEY, VALUE, STARTS, LENGTHS, SPAN_PROTEIN, FIRST_SPAN, SUMS, n_proteins,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, K_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    SPAN: tl.constexpr, M: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr, SCALE: tl.constexpr,
    PRECISION: tl.constexpr, RESIDUES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (span, head) writes its part of SUMS (spans, WIDTH): e * v of all heads, e of all heads, residues.

    The residues' states are summed by head 0, where RESIDUES.
    """
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
        # Rows 8 apart lie in one thread: only they are added up tile by tile, the others once at the end.
        numerator = tl.zeros((M // 16, 8, V_PADDED), tl.float32)
        denominator = tl.zeros((M,), tl.float32)
        for tile in tl.range(0, n_rows, M, num_stages=STAGES):
            row = tile + tl.arange(0, M)
            inside = row < n_rows
            if CHUNK:
                key = projected(LOCAL, KEY, first_row + row, inside, head, 0, K, K_PADDED, D, CHUNK, PRECISION)
                value = projected(LOCAL, VALUE, first_row + row, inside, head, 0, V, V_PADDED, D, CHUNK, PRECISION)
            else:
                at = (first_row + row)[:, None] * D + tl.arange(0, D)[None, :]
                local = tl.load(LOCAL + at, mask=inside[:, None], other=0.0)
                key = tl.dot(local, tl.trans(key_weight), input_precision=PRECISION)
                value = tl.dot(local, tl.trans(value_weight), input_precision=PRECISION)
            logit = tl.sum(tanh(key) * query[None, :], axis=1) * SCALE
            e = tl.where(inside, tl.exp2(logit), 0.0)
            value = gelu(value, LOCAL.dtype.element_ty == tl.float32)
            # Rows of the last tile that are not the protein's are zeros, not 0 * whatever.
            weighed = tl.where(inside[:, None], value * e[:, None], 0.0)
            numerator += tl.sum(tl.reshape(weighed, (M // 16, 2, 8, V_PADDED)), axis=1)
            denominator += e
        out = SUMS + span.to(tl.int64) * WIDTH
        tl.store(out + head * V + values, tl.sum(tl.sum(numerator, axis=0), axis=0), mask=values < V)
        tl.store(out + H * V + head, tl.sum(denominator, axis=0))
        if RESIDUES:  # noqa: SIM102 - known when compiled, which head is not
            if head == 0:
                columns = tl.arange(0, D)
                total = tl.zeros((D,), tl.float32)
                for tile in range(0, n_rows, RESIDUES):
                    row = tile + tl.arange(0, RESIDUES)
                    # The first and the last token of a protein are no residues.
                    residue = (row < n_rows) & (done + row > 0) & (row + 1 < rows_left)
                    at = (first_row + row)[:, None] * D + columns[None, :]
                    total += tl.sum(tl.load(LOCAL + at, mask=residue[:, None], other=0.0).to(tl.float32), axis=0)
                tl.store(out + H * V + H + columns, total)


@triton.jit(**ANY_BATCH)
def add_spans_kernel(
    SUMS, FIRST_SPAN, COARSE_PROTEIN, FIRST_COARSE, COARSE_SUMS, n_proteins,
    WIDTH: tl.constexpr, WIDTH_PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program: one coarse span, the sum of AT_ONCE neighbouring spans of a protein, in order."""
    coarse = tl.program_id(0).to(tl.int64)
    protein = tl.load(COARSE_PROTEIN + coarse)
    if protein < n_proteins:
        columns = tl.arange(0, WIDTH_PADDED)
        first = tl.load(FIRST_SPAN + protein) + (coarse - tl.load(FIRST_COARSE + protein)) * AT_ONCE
        end = tl.load(FIRST_SPAN + protein + 1)
        total = tl.zeros((WIDTH_PADDED,), tl.float32)
        for i in range(0, AT_ONCE):
            span = first + i
            inside = columns < tl.where(span < end, WIDTH, 0)
            total += tl.load(SUMS + span * WIDTH + columns, mask=inside, other=0.0)
        tl.store(COARSE_SUMS + coarse * WIDTH + columns, total, mask=columns < WIDTH)


@triton.jit(**ANY_BATCH)
def weights_kernel(
    LOCAL, QUERY, KEY, DENOMINATOR, SEGMENTS, WEIGHTS, n_rows,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, head): the softmax weights, computed again from the keys. Zeros in gap rows."""
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    in_batch = rows < n_rows
    segment = tl.load(SEGMENTS + rows, mask=in_batch, other=-1)
    inside = segment >= 0
    protein = tl.maximum(segment, 0).to(tl.int64)
    keys = tl.arange(0, K_PADDED)
    key = tanh(projected(LOCAL, KEY, rows, inside, head, 0, K, K_PADDED, D, CHUNK, PRECISION))
    query_at = QUERY + (protein * H + head)[:, None] * K + keys[None, :]
    query = tl.load(query_at, mask=inside[:, None] & (keys < K)[None, :], other=0.0)
    e = tl.exp2(tl.sum(key * query, axis=1) * SCALE)
    weight = e / tl.load(DENOMINATOR + protein * H + head, mask=inside, other=1.0)
    weight = tl.where(inside, weight, 0.0).to(WEIGHTS.dtype.element_ty)
    tl.store(WEIGHTS + rows * H + head, weight, mask=in_batch)


def configuration(capability: int, channels: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The tuned one of this machine, or the shipped one for a device; as for the local block."""
    if (tuned := tuning.lookup("global_attention", Configuration, capability, channels, dtype, precision)) is not None:
        return tuned
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 4, 1, 32 if dtype == torch.float32 else 0)
    if not has_matrix_units(capability, dtype, precision):
        return Configuration(16, 8, 1, 16)
    if dtype == torch.float32:
        return Configuration(64, 8, 1, 32)
    if channels > 128:
        return Configuration(32, 8, 1, 0)
    return Configuration(64, 4 if has_large_tiles(capability) else 8, 2, 0)


def fitted(c: Configuration, capability: int, outputs: int, channels: int, itemsize: int) -> Configuration:
    """The same, with the weights in parts where those of a whole head do not fit into a program's shared memory.

    Args:
        c: that all states of these channels get.
        capability: 80 for 8.0; 0 in the interpreter.
        outputs: keys and values of a head, padded.
        channels: D.
        itemsize: bytes of a number.
    """
    needed = (outputs + c.rows * c.stages) * channels * itemsize
    if c.chunk or not capability or needed + _SCRATCH <= shared_memory(capability):
        return c
    return c._replace(chunk=32)


class SpanSums(NamedTuple):
    """What the global track needs of a protein's rows, summed over spans.

    Attributes:
        sums: (S, H * V + H + D) float32: e * v, e, and the residues' states, the last only where asked for.
        first: int64 (B + 1,), the first span of each protein, and how many there are.
    """

    sums: Tensor
    first: Tensor


def add_spans(spans: SpanSums, lengths: Tensor, n_rows: int, longest: int, most: int = SPANS_AT_ONCE) -> SpanSums:
    """Adds up neighbouring spans, SPANS_AT_ONCE at a time, until no protein has more than ``most``.

    Proteins that have fewer pass through each round unchanged, so that a long neighbour leaves no trace.

    Args:
        spans: sums (S, W) of SPAN rows each.
        lengths: (B,) int64, rows of each protein.
        n_rows: of all proteins, or more.
        longest: rows of the longest protein, or more.
        most: 1, or SPANS_AT_ONCE.
    """
    (sums, first), n_proteins, size = spans, len(lengths), SPAN
    while n_proteins and longest > size * most:
        size *= SPANS_AT_ONCE
        protein, coarse_first = cut_into_spans(lengths, size, n_rows // size + n_proteins)
        coarse = sums.new_empty(len(protein), sums.shape[1])
        add_spans_kernel[(len(protein),)](
            sums, first, protein, coarse_first, coarse, n_proteins,
            WIDTH=sums.shape[1], WIDTH_PADDED=padded(sums.shape[1]), AT_ONCE=SPANS_AT_ONCE, num_warps=4,
        )  # fmt: skip
        sums, first = coarse, coarse_first
    return SpanSums(sums, first)


def span_sums(
    local: Tensor,
    query: Tensor,
    starts: Tensor,
    lengths: Tensor,
    spans: tuple[Tensor, Tensor],
    longest: int,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    residues: bool = False,
    chosen: Configuration | None = None,
) -> SpanSums:
    """Each protein's query over its own rows, at most SPANS_AT_ONCE sums of a protein.

    Args:
        local: (R, D), the block's new local states.
        query: (B, H * K) float32, heads concatenated.
        starts: (B,) int64, first row of each protein.
        lengths: (B,) int64, rows of each protein.
        spans: as ``PackedBatch.spans(SPAN)`` gives them.
        longest: rows of the longest protein, or more.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        residues: sum the states of each protein's residues in the same pass.
        chosen: how to cut the launch; the shipped configuration when None.
    """
    local = local.contiguous()
    n_proteins, (n_rows, channels) = len(starts), local.shape
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    precision = product_precision(local.dtype)
    c = chosen
    if c is None:
        capability, outputs = capability_of(local), padded(d_key) + padded(d_value)
        c = configuration(capability, channels, local.dtype, precision)
        c = fitted(c, capability, outputs, channels, local.element_size())
    width = n_heads * (d_value + 1) + (channels if residues else 0)
    protein, first = spans
    sums = local.new_empty(len(protein), width, dtype=torch.float32)
    if n_proteins:
        span_sums_kernel[(len(protein), n_heads)](
            local, query.contiguous(), in_dtype(key_weight, local.dtype),
            in_dtype(value_weight, local.dtype), starts, lengths, protein, first, sums, n_proteins,
            D=channels, H=n_heads, K=d_key, K_PADDED=padded(d_key), V=d_value, V_PADDED=padded(d_value), SPAN=SPAN,
            M=c.rows, STAGES=c.stages, CHUNK=c.chunk, SCALE=LOG2_E.value / math.sqrt(d_key),
            PRECISION=precision, RESIDUES=_RESIDUES_AT_ONCE if residues else 0, WIDTH=width,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return add_spans(SpanSums(sums, first), lengths, n_rows, longest)


def attention_weights(
    local: Tensor, query: Tensor, key_weight: Tensor, denominator: Tensor, segments: Tensor
) -> Tensor:
    """The softmax weights (R, H) in the dtype of ``local``, computed again from the keys; zeros in gap rows.

    Args:
        local: (R, D), the block's new local states.
        query: (B, H * K) float32, heads concatenated.
        key_weight: (H * K, D), head-major.
        denominator: (B, H) float32, sums of e.
        segments: (R,) int32, the protein of each row, -1 in gap rows.
    """
    local = local.contiguous()
    (n_rows, channels), n_heads = local.shape, denominator.shape[1]
    d_key = len(key_weight) // n_heads
    precision = product_precision(local.dtype)
    c = configuration(capability_of(local), channels, local.dtype, precision)
    weights = local.new_empty(n_rows, n_heads)
    weights_kernel[(triton.cdiv(n_rows, c.rows), n_heads)](
        local, query.contiguous(), in_dtype(key_weight, local.dtype), denominator, segments, weights, n_rows,
        D=channels, H=n_heads, K=d_key, K_PADDED=padded(d_key), M=c.rows, CHUNK=c.chunk or min(channels, 64),
        SCALE=LOG2_E.value / math.sqrt(d_key), PRECISION=precision, num_warps=c.warps,
    )  # fmt: skip
    return weights
