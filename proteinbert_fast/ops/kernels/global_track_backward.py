"""Gradients of the global track, from its inputs, what was pooled, and its results.

A kernel goes back through a few proteins per program, from the new states to what was pooled, and leaves the gradients
of every layer's result. Those of the weights are products over all proteins, left to PyTorch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.ops.kernels.activations import gelu_and_slope
from proteinbert_fast.ops.kernels.global_track import PROTEINS, dense, vector
from proteinbert_fast.ops.kernels.launching import ANY_BATCH, capability_of, has_matrix_units, padded
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.reference import GlobalBlockWeights, MessageWeights

_VECTORS = 6  # norm 1 weight and bias, norm 2 weight and bias, dense 1 and 2 bias


@triton.jit
def _normalised(x, inside, G: tl.constexpr, EPSILON: tl.constexpr):
    """Rows of x, of which G columns are real and the others 0; and what they were divided by, inverted."""
    centred = tl.where(inside, x - (tl.sum(x, axis=1) / G)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / G + EPSILON)
    return centred * scale[:, None], scale


@triton.jit
def _norm_gradient(gradient, normalised, scale, inside, G: tl.constexpr):
    """Of the input of a norm, from that of its normalised rows."""
    along = tl.sum(gradient * normalised, axis=1) / G
    found = scale[:, None] * (gradient - (tl.sum(gradient, axis=1) / G)[:, None] - normalised * along[:, None])
    return tl.where(inside, found, 0.0)


@triton.jit
def _times(
    total, X, W, rows, n_rows, n_inputs, columns, n_columns, CHUNK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Adds rows of X (rows, inputs) @ W (inputs, columns) to ``total`` (M, columns)."""
    for first in range(0, n_inputs, CHUNK):
        k = first + tl.arange(0, CHUNK)
        in_inputs = k < n_inputs
        x_mask = (rows < n_rows)[:, None] & in_inputs[None, :]
        x = tl.load(X + rows[:, None] * n_inputs + k[None, :], mask=x_mask, other=0.0)
        w_mask = in_inputs[:, None] & (columns < n_columns)[None, :]
        w = tl.load(W + k[:, None] * n_columns + columns[None, :], mask=w_mask, other=0.0)
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


@triton.jit(**ANY_BATCH)
def global_track_gradient_kernel(
    STATE, POOLED, HIDDEN, OUT, QUERY, DENSE1, DENSE1_BIAS, NORM1, DENSE2, DENSE2_BIAS, NORM2, QUERY_WEIGHT,
    WORD_WEIGHT, WORD_BIAS, D_HIDDEN, D_OUT, D_QUERY, D_WORD, D_QUERY_RESULT, D_WORD_RESULT, D_RESULT1, D_RESULT2,
    D_STATE, D_POOLED, VECTORS, WORD_VECTORS, n_proteins,
    G: tl.constexpr, G_PADDED: tl.constexpr, QUERIES: tl.constexpr, QUERIES_PADDED: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, CHUNK: tl.constexpr, HAS_D_HIDDEN: tl.constexpr, PRECISION: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """M proteins per program; a line of VECTORS (programs, 6, G) and WORD_VECTORS (programs, D): its part of biases."""
    program = tl.program_id(0)
    rows = program.to(tl.int64) * M + tl.arange(0, M)
    in_batch = rows < n_proteins
    columns = tl.arange(0, G_PADDED)
    real = columns < G
    at = rows[:, None] * G + columns[None, :]
    inside = in_batch[:, None] & real[None, :]
    dtype = OUT.dtype.element_ty
    vectors = VECTORS + program * 6 * G + columns

    gradient = tl.load(D_OUT + at, mask=inside, other=0.0).to(tl.float32)
    if QUERIES:
        queries = tl.arange(0, QUERIES_PADDED)
        query_at = rows[:, None] * QUERIES + queries[None, :]
        mask = in_batch[:, None] & (queries < QUERIES)[None, :]
        query = tl.load(QUERY + query_at, mask=mask, other=0.0)
        d_result = tl.load(D_QUERY + query_at, mask=mask, other=0.0) * (1.0 - query * query)
        tl.store(D_QUERY_RESULT + query_at, d_result.to(dtype), mask=mask)
        words = tl.arange(0, D)
        word_at = rows[:, None] * D + words[None, :]
        result = dense(OUT, WORD_WEIGHT, rows, n_proteins, G, words, D, CHUNK, PRECISION)
        _, slope = gelu_and_slope(result + vector(WORD_BIAS, words, D)[None, :], True)
        d_result = tl.load(D_WORD + word_at, mask=in_batch[:, None], other=0.0).to(tl.float32) * slope
        tl.store(D_WORD_RESULT + word_at, d_result.to(dtype), mask=in_batch[:, None])
        tl.store(WORD_VECTORS + program * D + words, tl.sum(d_result, axis=0))
        # The next products read what other threads of this program have just written.
        tl.debug_barrier()
        gradient = _times(
            gradient, D_QUERY_RESULT, QUERY_WEIGHT, rows, n_proteins, QUERIES, columns, G, CHUNK, PRECISION
        )  # fmt: skip
        gradient = _times(gradient, D_WORD_RESULT, WORD_WEIGHT, rows, n_proteins, D, columns, G, CHUNK, PRECISION)

    hidden = tl.load(HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
    result = dense(HIDDEN, DENSE2, rows, n_proteins, G, columns, G, CHUNK, PRECISION)
    activated, slope = gelu_and_slope(result + vector(DENSE2_BIAS, columns, G)[None, :], True)
    normalised, scale = _normalised(tl.where(inside, hidden + activated, 0.0), inside, G, EPSILON)
    tl.store(vectors + 2 * G, tl.sum(gradient * normalised, axis=0), mask=real)
    tl.store(vectors + 3 * G, tl.sum(gradient, axis=0), mask=real)
    gradient = _norm_gradient(gradient * vector(NORM2, columns, G)[None, :], normalised, scale, inside, G)
    d_result = tl.where(inside, gradient * slope, 0.0)
    tl.store(D_RESULT2 + at, d_result.to(dtype), mask=inside)
    tl.store(vectors + 5 * G, tl.sum(d_result, axis=0), mask=real)
    tl.debug_barrier()
    gradient = _times(gradient, D_RESULT2, DENSE2, rows, n_proteins, G, columns, G, CHUNK, PRECISION)
    if HAS_D_HIDDEN:
        gradient += tl.load(D_HIDDEN + at, mask=inside, other=0.0).to(tl.float32)

    total = tl.load(STATE + at, mask=inside, other=0.0).to(tl.float32) + tl.load(POOLED + at, mask=inside, other=0.0)
    result = dense(STATE, DENSE1, rows, n_proteins, G, columns, G, CHUNK, PRECISION)
    activated, slope = gelu_and_slope(result + vector(DENSE1_BIAS, columns, G)[None, :], True)
    normalised, scale = _normalised(tl.where(inside, total + activated, 0.0), inside, G, EPSILON)
    tl.store(vectors, tl.sum(gradient * normalised, axis=0), mask=real)
    tl.store(vectors + G, tl.sum(gradient, axis=0), mask=real)
    gradient = _norm_gradient(gradient * vector(NORM1, columns, G)[None, :], normalised, scale, inside, G)
    tl.store(D_POOLED + at, gradient, mask=inside)
    d_result = tl.where(inside, gradient * slope, 0.0)
    tl.store(D_RESULT1 + at, d_result.to(dtype), mask=inside)
    tl.store(vectors + 4 * G, tl.sum(d_result, axis=0), mask=real)
    tl.debug_barrier()
    gradient = _times(gradient, D_RESULT1, DENSE1, rows, n_proteins, G, columns, G, CHUNK, PRECISION)
    tl.store(D_STATE + at, gradient.to(dtype), mask=inside)


class Configuration(NamedTuple):
    """How the launch is cut.

    Attributes:
        chunk: inputs per product.
        warps: per program.
        stages: chunks in flight.
    """

    chunk: int
    warps: int
    stages: int


def configuration(capability: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The shipped one for a device; as for the local block."""
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 8, 3)
    if dtype == torch.float32 or not has_matrix_units(capability, dtype, precision):
        return Configuration(16, 8, 2)
    return Configuration(32, 16, 2)


class Gradients(NamedTuple):
    """What the backward pass computes.

    Attributes:
        state: (B, G).
        pooled: (B, G) float32.
        weights: those of GlobalBlockWeights.
        following: those of MessageWeights, none after the last block.
    """

    state: Tensor
    pooled: Tensor
    weights: list[Tensor]
    following: list[Tensor]


def launch(
    d_hidden: Tensor | None,
    d_out: Tensor,
    d_query: Tensor | None,
    d_word: Tensor | None,
    state: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    out: Tensor,
    query: Tensor,
    weights: GlobalBlockWeights,
    following: MessageWeights | None,
    chosen: Configuration | None = None,
) -> Gradients:
    """Runs the kernel.

    Args:
        d_hidden: (B, G), gradient of the states after the first norm, or None.
        d_out: (B, G), that of the new states.
        d_query: (B, H * K) float32, that of the query to the next block; None where there is no next block.
        d_word: (B, D), that of the word to the next block; None where there is no next block.
        state: (B, G), from before the block.
        pooled: (B, G) float32.
        hidden: (B, G).
        out: (B, G).
        query: (B, H * K) float32, to the next block.
        weights: the block's parameters.
        following: those of the next block's message.
        chosen: how to cut the launch; the shipped configuration when None.
    """
    state, dtype, w = state.contiguous(), out.dtype, weights
    n_proteins, n_global = state.shape
    precision = product_precision(dtype)
    c = chosen or configuration(capability_of(state), dtype, precision)
    n_programs = triton.cdiv(n_proteins, PROTEINS)
    n_queries, n_local = (0, 16) if following is None else (query.shape[1], len(following.broadcast_bias))
    query_weight, word_weight, word_bias = following or (state, state, state)
    d_result1, d_result2, d_state = (torch.empty_like(state) for _ in range(3))
    d_pooled = torch.empty_like(state, dtype=torch.float32)
    d_query_result = state.new_empty(n_proteins, n_queries)
    d_word_result = state.new_empty(n_proteins, n_local if following else 0)
    vectors = state.new_empty(n_programs, _VECTORS, n_global, dtype=torch.float32)
    word_vectors = state.new_empty(n_programs, d_word_result.shape[1], dtype=torch.float32)
    dense1, dense2 = w.dense1_weight.to(dtype).contiguous(), w.dense2_weight.to(dtype).contiguous()
    if n_proteins:
        global_track_gradient_kernel[(n_programs,)](
            state, pooled, hidden, out, query, dense1, w.dense1_bias, w.norm1_weight, dense2, w.dense2_bias,
            w.norm2_weight, query_weight.to(dtype).contiguous(), word_weight.to(dtype).contiguous(), word_bias,
            d_out if d_hidden is None else d_hidden.contiguous(), d_out.contiguous(),
            query if d_query is None else d_query.contiguous(), d_out if d_word is None else d_word.contiguous(),
            d_query_result, d_word_result, d_result1, d_result2, d_state, d_pooled, vectors, word_vectors, n_proteins,
            G=n_global, G_PADDED=padded(n_global), QUERIES=n_queries, QUERIES_PADDED=padded(n_queries), D=n_local,
            M=PROTEINS, CHUNK=c.chunk, HAS_D_HIDDEN=d_hidden is not None, PRECISION=precision, EPSILON=LAYER_NORM_EPS,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip

    def over_proteins(d_result: Tensor, x: Tensor) -> Tensor:
        # In float32: B is small, and sums of 16-bit products would be rounded to 16 bits.
        return d_result.float().t() @ x.float()

    norm1, bias1, norm2, bias2, dense1_bias, dense2_bias = vectors.sum(0)
    found = (
        over_proteins(d_result1, state), dense1_bias, norm1, bias1, over_proteins(d_result2, hidden), dense2_bias,
        norm2, bias2,
    )  # fmt: skip
    d_weights = [torch.empty_like(t).copy_(g) for g, t in zip(found, w, strict=True)]
    d_following = []
    if following is not None:
        message = (over_proteins(d_query_result, out), over_proteins(d_word_result, out), word_vectors.sum(0))
        d_following = [torch.empty_like(t).copy_(g) for g, t in zip(message, following, strict=True)]
    return Gradients(d_state, d_pooled, d_weights, d_following)
