"""The global track of one block: attention's sums to a message for the next block, in one kernel.

A program takes a few proteins: it adds up their spans, runs two dense layers and two norms, and then the query and the
broadcast that the next block starts from. Every sum has one order, whatever else is in the batch.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels.activations import gelu, layer_norm, tanh
from proteinbert_fast.ops.kernels.global_attention import SPAN, TILE, SpanSums, attention_weights, span_sums
from proteinbert_fast.ops.kernels.launching import (
    ANY_BATCH,
    capability_of,
    has_matrix_units,
    padded,
    shared_memory,
)
from proteinbert_fast.ops.operators import operator
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.prepared import in_dtype
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import (
    GlobalBlockWeights,
    GlobalTrack,
    GlobalTrackWeights,
    Message,
    MessageWeights,
)
from proteinbert_fast.packing import PackedBatch

PROTEINS = 16  # per program: as few as the matrix units take


class Configuration(NamedTuple):
    """How a launch is cut.

    Attributes:
        chunk: inputs per product.
        warps: per program.
        stages: chunks in flight.
    """

    chunk: int
    warps: int
    stages: int


@triton.jit
def dense(X, W, rows, n_rows, n_inputs, columns, n_columns, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """Rows of X @ W^T, (M, columns); X is (rows, inputs) in memory, W (columns, inputs)."""
    in_columns = columns < n_columns
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for first in range(0, n_inputs, CHUNK):
        k = first + tl.arange(0, CHUNK)
        in_inputs = (k < n_inputs)[None, :]
        x = tl.load(X + rows[:, None] * n_inputs + k[None, :], mask=(rows < n_rows)[:, None] & in_inputs, other=0.0)
        w = tl.load(W + columns[:, None] * n_inputs + k[None, :], mask=in_columns[:, None] & in_inputs, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    return total


@triton.jit
def vector(X, columns, n_columns):
    """A bias or a norm's parameter, (columns,) float32."""
    return tl.load(X + columns, mask=columns < n_columns, other=0.0).to(tl.float32)


@triton.jit
def _added(SUMS, first, n_spans, most, columns, inside, WIDTH: tl.constexpr):
    """Columns (M, N) of each protein's spans, added up in order."""
    total = tl.zeros((first.shape[0], columns.shape[1]), tl.float32)
    for i in range(0, most):
        at = (first + i)[:, None] * WIDTH + columns
        total += tl.load(SUMS + at, mask=inside & (i < n_spans)[:, None], other=0.0)
    return total


@triton.jit(**ANY_BATCH)
def global_track_kernel(
    STATE, SUMS, FIRST_SPAN, LENGTHS, DENSE1, DENSE1_BIAS, NORM1, NORM1_BIAS, DENSE2, DENSE2_BIAS, NORM2, NORM2_BIAS,
    QUERY_WEIGHT, WORD_WEIGHT, WORD_BIAS, HIDDEN, OUT, DENOMINATOR, POOLED, QUERY, WORD, MEAN, n_proteins,
    G: tl.constexpr, G_PADDED: tl.constexpr, H: tl.constexpr, H_PADDED: tl.constexpr, V: tl.constexpr,
    QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr,
    CHUNK: tl.constexpr, KEEP_SUMS: tl.constexpr, PRECISION: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """M proteins per program.

        pooled = sums of e * v / sums of e
        HIDDEN = norm1(STATE + gelu(dense1(STATE)) + pooled)      OUT = norm2(HIDDEN + gelu(dense2(HIDDEN)))
        QUERY = tanh(OUT @ QUERY_WEIGHT^T)                        WORD = gelu(OUT @ WORD_WEIGHT^T + WORD_BIAS)

    The last line where there are QUERIES; else MEAN, the mean of the residues' states. SUMS is (spans, WIDTH). Where
    KEEP_SUMS, also POOLED, and DENOMINATOR, the sums of e.
    """
    rows = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    in_batch = rows < n_proteins
    first = tl.load(FIRST_SPAN + rows, mask=in_batch, other=0)
    n_spans = (tl.load(FIRST_SPAN + rows + 1, mask=in_batch, other=0) - first).to(tl.int32)
    most = tl.max(n_spans, axis=0)
    columns = tl.arange(0, G_PADDED)
    at = rows[:, None] * G + columns[None, :]
    mask = in_batch[:, None] & (columns < G)[None, :]
    dtype = OUT.dtype.element_ty

    numerator = _added(SUMS, first, n_spans, most, columns[None, :], mask, WIDTH)
    denominator = _added(SUMS, first, n_spans, most, (G + columns // V)[None, :], mask, WIDTH)
    if KEEP_SUMS:
        tl.store(POOLED + at, numerator / denominator, mask=mask)
    x = numerator / denominator + tl.load(STATE + at, mask=mask, other=0.0).to(tl.float32)
    bias = vector(DENSE1_BIAS, columns, G)[None, :]
    x += gelu(dense(STATE, DENSE1, rows, n_proteins, G, columns, G, CHUNK, PRECISION) + bias, True)
    norm, bias = vector(NORM1, columns, G), vector(NORM1_BIAS, columns, G)
    hidden = layer_norm(tl.where(mask, x, 0.0), norm, bias, G, EPSILON).to(dtype)
    tl.store(HIDDEN + at, hidden, mask=mask)
    # The next product reads what other threads of this program have just written.
    tl.debug_barrier()
    bias = vector(DENSE2_BIAS, columns, G)[None, :]
    x = gelu(dense(HIDDEN, DENSE2, rows, n_proteins, G, columns, G, CHUNK, PRECISION) + bias, True)
    norm, bias = vector(NORM2, columns, G), vector(NORM2_BIAS, columns, G)
    out = layer_norm(tl.where(mask, x + hidden.to(tl.float32), 0.0), norm, bias, G, EPSILON).to(dtype)
    tl.store(OUT + at, out, mask=mask)

    if KEEP_SUMS:
        heads = tl.arange(0, H_PADDED)
        mask = in_batch[:, None] & (heads < H)[None, :]
        denominator = _added(SUMS, first, n_spans, most, (G + heads)[None, :], mask, WIDTH)
        tl.store(DENOMINATOR + rows[:, None] * H + heads[None, :], denominator, mask=mask)
    if QUERIES:
        tl.debug_barrier()
        columns = tl.arange(0, QUERIES_PADDED)
        x = tanh(dense(OUT, QUERY_WEIGHT, rows, n_proteins, G, columns, QUERIES, CHUNK, PRECISION))
        mask = in_batch[:, None] & (columns < QUERIES)[None, :]
        tl.store(QUERY + rows[:, None] * QUERIES + columns[None, :], x, mask=mask)
        columns = tl.arange(0, D)
        bias = vector(WORD_BIAS, columns, D)[None, :]
        x = gelu(dense(OUT, WORD_WEIGHT, rows, n_proteins, G, columns, D, CHUNK, PRECISION) + bias, True)
        tl.store(WORD + rows[:, None] * D + columns[None, :], x.to(dtype), mask=in_batch[:, None])
    else:
        columns = tl.arange(0, D)
        total = _added(SUMS, first, n_spans, most, (G + H + columns)[None, :], in_batch[:, None], WIDTH)
        n_residues = tl.maximum(tl.load(LENGTHS + rows, mask=in_batch, other=0) - 2, 1).to(tl.float32)
        tl.store(MEAN + rows[:, None] * D + columns[None, :], total / n_residues[:, None], mask=in_batch[:, None])


def configuration(capability: int, n_global: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The shipped one for a device; as for the local block, with the global states' width."""
    c = _of_most_sizes(capability, dtype, precision)
    needed = (padded(n_global) + PROTEINS) * c.chunk * dtype.itemsize  # of a chunk; one of the stages is in registers
    if capability and needed * (c.stages - 1) > shared_memory(capability):
        return c._replace(stages=2)
    return c


def _of_most_sizes(capability: int, dtype: torch.dtype, precision: str) -> Configuration:
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 8, 3)
    if dtype == torch.float32 or not has_matrix_units(capability, dtype, precision):
        return Configuration(16, 8, 3)
    return Configuration(32, 8, 3)


def launch(
    state: Tensor,
    spans: SpanSums,
    lengths: Tensor,
    weights: GlobalBlockWeights,
    following: MessageWeights | None,
    n_heads: int,
    d_local: int,
    keep_sums: bool,
    chosen: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs the kernel; ``spans`` has sums of residues where ``following`` is None.

    Returns:
        hidden (B, G), state (B, G), query (B, H * K) and broadcast (B, D) for the next block, residue mean (B, D),
        pooled (B, G) and denominator (B, H); float32 all but hidden, state and broadcast. What is not wanted has no
        rows.
    """
    state = state.contiguous()
    dtype, (n_proteins, n_global) = state.dtype, state.shape
    precision = product_precision(dtype)
    c = chosen or configuration(capability_of(state), n_global, dtype, precision)
    w = weights
    n_queries = 0 if following is None else len(following.query_weight)
    n_next, n_last = (0, n_proteins) if following is None else (n_proteins, 0)
    # Without a next block, its weights are never read.
    query_weight, word_weight, word_bias = following or (state, state, state)
    hidden, out = torch.empty_like(state), torch.empty_like(state)
    pooled = state.new_empty(n_proteins if keep_sums else 0, n_global, dtype=torch.float32)
    denominator = state.new_empty(n_proteins if keep_sums else 0, n_heads, dtype=torch.float32)
    query = state.new_empty(n_next, n_queries, dtype=torch.float32)
    word = state.new_empty(n_next, d_local)
    mean = state.new_empty(n_last, d_local, dtype=torch.float32)
    if n_proteins:
        global_track_kernel[(triton.cdiv(n_proteins, PROTEINS),)](
            state, spans.sums, spans.first, lengths, in_dtype(w.dense1_weight, dtype), w.dense1_bias,
            w.norm1_weight, w.norm1_bias, in_dtype(w.dense2_weight, dtype), w.dense2_bias, w.norm2_weight,
            w.norm2_bias, in_dtype(query_weight, dtype), in_dtype(word_weight, dtype), word_bias,
            hidden, out, denominator, pooled, query, word, mean, n_proteins,
            G=n_global, G_PADDED=padded(n_global), H=n_heads, H_PADDED=padded(n_heads), V=n_global // n_heads,
            QUERIES=n_queries, QUERIES_PADDED=padded(n_queries), D=d_local, WIDTH=spans.sums.shape[1], M=PROTEINS,
            CHUNK=c.chunk, KEEP_SUMS=keep_sums, PRECISION=precision, EPSILON=LAYER_NORM_EPS,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
    return hidden, out, query, word, mean, pooled, denominator


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator("global_track")
def _global_track(
    local: Tensor, state: Tensor, query: Tensor, weights: list[Tensor], starts: Tensor, lengths: Tensor,
    segments: Tensor, span_protein: Tensor, first_span: Tensor, tile_protein: Tensor, first_tile: Tensor,
    n_heads: int, longest: int, return_attention: bool, keep_sums: bool,
) -> _Results:  # fmt: skip
    w = _unflattened(weights)
    spans = span_sums(
        local, query, starts, lengths, (span_protein, first_span), longest, w.key_weight, w.value_weight, n_heads,
        residues=w.following is None,
    )  # fmt: skip
    *states, pooled, denominator = launch(
        state, spans, lengths, w.block, w.following, n_heads, local.shape[1], keep_sums or return_attention
    )
    attention = local.new_empty(0, n_heads)
    if return_attention:
        attention = attention_weights(local, query, w.key_weight, denominator, segments)
    return *states, attention, pooled, denominator  # type: ignore[return-value]


@_global_track.register_fake
def _(
    local: Tensor, state: Tensor, query: Tensor, weights: list[Tensor], starts: Tensor, lengths: Tensor,
    segments: Tensor, span_protein: Tensor, first_span: Tensor, tile_protein: Tensor, first_tile: Tensor,
    n_heads: int, longest: int, return_attention: bool, keep_sums: bool,
) -> _Results:  # fmt: skip
    following = _unflattened(weights).following
    (n_proteins, n_global), d_local = state.shape, local.shape[1]
    n_next, n_last = (0, n_proteins) if following is None else (n_proteins, 0)
    n_queries = 0 if following is None else following.query_weight.shape[0]
    n_kept = n_proteins if keep_sums or return_attention else 0
    return (
        torch.empty_like(state),
        torch.empty_like(state),
        state.new_empty(n_next, n_queries, dtype=torch.float32),
        state.new_empty(n_next, d_local),
        state.new_empty(n_last, d_local, dtype=torch.float32),
        local.new_empty(local.shape[0] if return_attention else 0, n_heads),
        state.new_empty(n_kept, n_global, dtype=torch.float32),
        state.new_empty(n_kept, n_heads, dtype=torch.float32),
    )


@operator("global_track_backward")
def _global_track_backward(
    d_hidden: Tensor | None, d_out: Tensor, d_query: Tensor | None, d_word: Tensor | None, d_mean: Tensor | None,
    local: Tensor, state: Tensor, query: Tensor, hidden: Tensor, out: Tensor, next_query: Tensor, pooled: Tensor,
    denominator: Tensor, weights: list[Tensor], starts: Tensor, lengths: Tensor, span_protein: Tensor,
    first_span: Tensor, tile_protein: Tensor, first_tile: Tensor, n_heads: int, longest: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    from proteinbert_fast.ops.kernels import global_attention_backward, global_track_backward

    w = _unflattened(weights)
    track = global_track_backward.launch(
        d_hidden, d_out, d_query, d_word, state, pooled, hidden, out, next_query, w.block, w.following
    )
    attention = global_attention_backward.launch(
        track.pooled, d_mean, local, query, pooled, denominator, starts, lengths, (span_protein, first_span),
        (tile_protein, first_tile), longest, w.key_weight, w.value_weight, n_heads,
    )  # fmt: skip
    d_weights = [attention.key_weight, attention.value_weight, *track.weights, *track.following]
    return attention.local, track.state, attention.query, d_weights


@_global_track_backward.register_fake
def _(
    d_hidden: Tensor | None, d_out: Tensor, d_query: Tensor | None, d_word: Tensor | None, d_mean: Tensor | None,
    local: Tensor, state: Tensor, query: Tensor, hidden: Tensor, out: Tensor, next_query: Tensor, pooled: Tensor,
    denominator: Tensor, weights: list[Tensor], starts: Tensor, lengths: Tensor, span_protein: Tensor,
    first_span: Tensor, tile_protein: Tensor, first_tile: Tensor, n_heads: int, longest: int,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    d_local, d_state, d_query = (x.new_empty(x.shape) for x in (local, state, query))
    return d_local, d_state, d_query, [torch.empty_like(w) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    local, state, query, weights, starts, lengths, _, *tables, n_heads, longest, _, _ = inputs
    hidden, out, next_query, _, _, _, pooled, denominator = output
    ctx.sizes = n_heads, longest
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        local, state, query, hidden, out, next_query, pooled, denominator, starts, lengths, *tables, *weights
    )


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    d_hidden, d_out, d_query, d_word, d_mean, *_ = gradients
    local, state, query, hidden, out, next_query, pooled, denominator, *places = ctx.saved_tensors
    places, weights = places[:6], places[6:]
    if d_out is None:
        d_out = torch.zeros_like(out)
    if len(next_query):
        d_query = torch.zeros_like(next_query) if d_query is None else d_query
        d_word = local.new_zeros(len(out), local.shape[1]) if d_word is None else d_word
        d_mean = None
    else:
        d_query = d_word = None
    d_local, d_state, d_asked, d_weights = _global_track_backward(
        d_hidden, d_out, d_query, d_word, d_mean, local, state, query, hidden, out, next_query, pooled, denominator,
        weights, *places, *ctx.sizes,
    )  # fmt: skip
    return d_local, d_state, d_asked, d_weights, *([None] * 11)


_global_track.register_autograd(_backward, setup_context=_save)


class _Weights(NamedTuple):
    key_weight: Tensor
    value_weight: Tensor
    block: GlobalBlockWeights
    following: MessageWeights | None


def _unflattened(weights: list[Tensor]) -> _Weights:
    """Operators take lists of tensors: key, value, the block's, and those of the next block if there is one."""
    n = 2 + len(GlobalBlockWeights._fields)
    following = MessageWeights(*weights[n:]) if len(weights) > n else None
    return _Weights(weights[0], weights[1], GlobalBlockWeights(*weights[2:n]), following)


def global_track(
    local: Tensor,
    global_state: Tensor,
    message: Message,
    batch: PackedBatch,
    weights: GlobalTrackWeights,
    following: MessageWeights | None,
    n_heads: int,
    return_attention: bool = False,
) -> GlobalTrack:
    """``reference.global_attention``, ``reference.global_block`` and the message to the next block.

    Args:
        local: (R, D), the block's new local states.
        global_state: (B, G), from before the block.
        message: what the block heard of them.
        batch: the packed layout.
        weights: the block's parameters; products take them in the dtype of ``local``.
        following: parameters of the next block's message; None after the last block, where the mean of the residues'
            states is made instead.
        n_heads: H.
        return_attention: also return the softmax weights, in the dtype of ``local``, by a second pass. If gradients are
            wanted too, plain operations compute them.
    """
    segments, spans = batch.segments, batch.spans(SPAN)
    flat = [weights.key_weight, weights.value_weight, *weights.block, *(following or ())]
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (local, global_state, message.query, *flat))
    tiles = batch.spans(TILE) if wanted else spans  # for the backward pass alone

    def fast(local: Tensor, state: Tensor, query: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _global_track(
            local, state.to(local.dtype), query.float(), list(weights), batch.starts, batch.lengths, segments, *spans,
            *tiles, n_heads, batch.longest, return_attention, wanted,
        )  # fmt: skip
        return result[:6]

    def plain(local: Tensor, state: Tensor, query: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        w = _unflattened(list(weights))
        attended = reference.global_attention(
            local, query, segments, w.key_weight, w.value_weight, n_heads, return_attention
        )
        states = reference.global_block(state, attended.pooled, w.block)
        nothing = local.new_empty(0)
        if w.following is None:
            spoken, mean = (nothing, nothing), reference.residue_mean(local, segments, batch.starts, batch.lengths)
        else:
            spoken, mean = reference.message(states.global_state, w.following), nothing
        return *states, *spoken, mean, nothing if attended.weights is None else attended.weights

    tensors = (local, global_state, message.query, *flat)
    # The kernels' gradients have no part for attention weights.
    results = recomputed(fast, plain, *tensors) if return_attention and wanted else fast(*tensors)
    hidden, state, query, word, mean, attention = results
    return GlobalTrack(
        hidden,
        state,
        None if following is None else Message(query, word),
        attention if return_attention else None,
        mean if following is None else None,
    )
