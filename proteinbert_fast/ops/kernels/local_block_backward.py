"""Gradients of the local block, from its inputs and the two convolutions' results before their GELUs.

Three passes over the rows: the pointwise part, from the new state's gradient down to those of both convolutions'
results; each convolution's products with flipped taps, for the gradient of x; and its products over rows, for those of
the weights. Sums over rows are made by a fixed number of programs and then added in order: no atomics, the same bits in
every run.

The first block's x are embedded tokens: its weights' gradients come from one-hot rows, as its forward pass does, and
the gradient of x ends in the table of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import gelu, gelu_and_slope, settled
from proteinbert_fast.ops.kernels.launching import (
    ANY_BATCH,
    capability_of,
    has_large_tiles,
    has_matrix_units,
    is_hopper,
    padded,
)
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration, convolve, portable_because
from proteinbert_fast.ops.kernels.protein_sums import protein_sums
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.reference import LocalBlockWeights

_VECTORS = 7  # norm 1 weight and bias, norm 2 weight and bias, dense, narrow and wide bias
_PROGRAMS = 264  # two on each multiprocessor of an H100: among so many are sums over rows split


class HopperWeights(NamedTuple):
    """How the launches for the convolutions' weights' gradients in ``local_block_backward_hopper.py`` are cut.

    Attributes:
        rows: per product.
        stages: of so many rows in shared memory.
    """

    rows: int
    stages: int


class Configuration(NamedTuple):
    """How the launches are cut.

    Attributes:
        rows: of a tile of the pointwise part.
        convolution_rows: of a tile of x's gradient.
        chunk: channels per product of these two.
        warps: per tile.
        weight_rows: per product of the weights' gradients.
        taps: of a program of theirs.
        descriptors: x's gradient moves tiles through tensor descriptors.
        chunked_dense: as for the local block.
        registers: of a thread of the pointwise part at most, so that more programs fit; None for no bound.
        hopper: of x's gradient where the kernel in ``local_block_backward_hopper.py`` computes it; else None.
        hopper_weights: the same of the convolutions' weights' gradients.
    """

    rows: int
    convolution_rows: int
    chunk: int
    warps: int
    weight_rows: int
    taps: int
    descriptors: bool
    chunked_dense: bool
    registers: int | None = None
    hopper: HopperConfiguration | None = None
    hopper_weights: HopperWeights | None = None


@triton.jit
def _normalised(x, D: tl.constexpr, EPSILON: tl.constexpr):
    """Rows of x with mean 0 and variance 1, and what they were divided by, inverted."""
    centred = x - (tl.sum(x, axis=1) / D)[:, None]
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / D + EPSILON)
    return centred * scale[:, None], scale


@triton.jit
def _norm_gradient(gradient, normalised, scale, D: tl.constexpr):
    """Of the input of a norm, from that of its normalised rows."""
    along = tl.sum(gradient * normalised, axis=1) / D
    return scale[:, None] * (gradient - (tl.sum(gradient, axis=1) / D)[:, None] - normalised * along[:, None])


@triton.jit
def _rows_of(X, at, in_batch):
    return tl.load(X + at, mask=in_batch[:, None], other=0.0).to(tl.float32)


@triton.jit(**ANY_BATCH)
def pointwise_kernel(
    X, TOKENS, NARROW, WIDE, BROADCAST, SEGMENTS, NORM1_WEIGHT, NORM1_BIAS, DENSE, DENSE_BIAS, NORM2_WEIGHT,
    D_LOCAL, D_HIDDEN, D_SUM, D_NARROW, D_WIDE, HIDDEN, D_DENSE, VECTORS, first, n_rows,
    D: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, EPSILON: tl.constexpr,
    EMBEDDED: tl.constexpr, HAS_D_HIDDEN: tl.constexpr, CHUNKED_DENSE: tl.constexpr, GAP_TOKEN: tl.constexpr,
):  # fmt: skip
    """Rows [first + M * program, ...): gradients of the sum before the first norm and of both convolutions' results.

    Also HIDDEN, the states after the first norm again, and D_DENSE, the gradient of the dense layer's result; and a
    line of VECTORS (programs, 7, D), this tile's part of the gradients of biases and norms. Where EMBEDDED, X is the
    table of tokens. D_NARROW and D_WIDE may lie where NARROW and WIDE do.
    """
    dtype = NARROW.dtype.element_ty
    PRECISE: tl.constexpr = dtype == tl.float32
    program = tl.program_id(0)
    rows = (first + program * M).to(tl.int64) + tl.arange(0, M)
    columns = tl.arange(0, D)
    in_batch = rows < n_rows
    at = rows[:, None] * D + columns[None, :]
    segment = tl.load(SEGMENTS + rows, mask=in_batch, other=-1)
    inside = (segment >= 0)[:, None]
    norm1 = tl.load(NORM1_WEIGHT + columns).to(tl.float32)[None, :]
    norm2 = tl.load(NORM2_WEIGHT + columns).to(tl.float32)[None, :]

    if EMBEDDED:
        token = tl.load(TOKENS + rows, mask=in_batch, other=GAP_TOKEN).to(tl.int32)
        total = tl.load(X + token[:, None] * D + columns[None, :]).to(tl.float32)
    else:
        total = _rows_of(X, at, in_batch)
    word = BROADCAST + tl.maximum(segment, 0).to(tl.int64)[:, None] * D + columns[None, :]
    total += tl.load(word, mask=inside, other=0.0).to(tl.float32)
    total += gelu(_rows_of(NARROW, at, in_batch), PRECISE) + gelu(_rows_of(WIDE, at, in_batch), PRECISE)
    normalised1, scale1 = _normalised(total, D, EPSILON)
    bias1 = tl.load(NORM1_BIAS + columns).to(tl.float32)[None, :]
    hidden = tl.where(inside, normalised1 * norm1 + bias1, 0.0).to(dtype)
    tl.store(HIDDEN + at, hidden, mask=in_batch[:, None])

    result = tl.broadcast_to(tl.load(DENSE_BIAS + columns).to(tl.float32)[None, :], (M, D))
    if CHUNKED_DENSE:
        # Reads what other threads of this program have just written.
        tl.debug_barrier()
        for k in range(0, D, CHUNK):
            inputs = k + tl.arange(0, CHUNK)
            h = tl.load(HIDDEN + rows[:, None] * D + inputs[None, :], mask=in_batch[:, None], other=0.0)
            w = tl.load(DENSE + columns[:, None] * D + inputs[None, :])
            result = tl.dot(h, tl.trans(w), result, input_precision=PRECISION)
    else:
        w = tl.load(DENSE + columns[:, None] * D + columns[None, :])
        result = tl.dot(hidden, tl.trans(w), result, input_precision=PRECISION)
    activated, slope = gelu_and_slope(result, PRECISE)
    normalised2, scale2 = _normalised(hidden.to(tl.float32) + activated, D, EPSILON)

    gradient = tl.load(D_LOCAL + at, mask=inside, other=0.0).to(tl.float32)
    vectors = VECTORS + program.to(tl.int64) * 7 * D + columns
    tl.store(vectors + 2 * D, tl.sum(tl.where(inside, gradient * normalised2, 0.0), axis=0))
    tl.store(vectors + 3 * D, tl.sum(gradient, axis=0))
    gradient = tl.where(inside, _norm_gradient(gradient * norm2, normalised2, scale2, D), 0.0)
    d_dense = (gradient * slope).to(dtype)
    tl.store(D_DENSE + at, d_dense, mask=in_batch[:, None])
    tl.store(vectors + 4 * D, tl.sum(d_dense.to(tl.float32), axis=0))
    if CHUNKED_DENSE:
        tl.debug_barrier()
        for k in range(0, D, CHUNK):
            outputs = k + tl.arange(0, CHUNK)
            g = tl.load(D_DENSE + rows[:, None] * D + outputs[None, :], mask=in_batch[:, None], other=0.0)
            w = tl.load(DENSE + outputs[:, None] * D + columns[None, :])
            gradient = tl.dot(g, w, gradient, input_precision=PRECISION)
    else:
        gradient = tl.dot(d_dense, w, gradient, input_precision=PRECISION)
    if HAS_D_HIDDEN:
        gradient += tl.load(D_HIDDEN + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(vectors, tl.sum(tl.where(inside, gradient * normalised1, 0.0), axis=0))
    tl.store(vectors + D, tl.sum(gradient, axis=0))
    gradient = tl.where(inside, _norm_gradient(gradient * norm1, normalised1, scale1, D), 0.0)
    tl.store(D_SUM + at, gradient.to(dtype), mask=in_batch[:, None])
    _, slope = gelu_and_slope(_rows_of(NARROW, at, in_batch), PRECISE)
    d_narrow = tl.where(inside, gradient * slope, 0.0)
    tl.store(vectors + 5 * D, tl.sum(d_narrow, axis=0))
    _, slope = gelu_and_slope(_rows_of(WIDE, at, in_batch), PRECISE)
    d_wide = tl.where(inside, gradient * slope, 0.0)
    tl.store(vectors + 6 * D, tl.sum(d_wide, axis=0))
    tl.store(D_NARROW + at, d_narrow.to(dtype), mask=in_batch[:, None])
    tl.store(D_WIDE + at, d_wide.to(dtype), mask=in_batch[:, None])


@triton.jit(**ANY_BATCH)
def convolution_gradient_kernel(
    NARROW_TILES, WIDE_TILES, W_TILES, D_SUM, D_X, first, n_rows,
    D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """D_X = D_SUM + both convolutions' results' gradients times the flipped taps. W is (2 * TAPS * D, D), (out, in).

    D_X may lie where D_SUM does.
    """
    first_row = first + tl.program_id(0) * M
    start = first_row if DESCRIPTORS else first_row.to(tl.int64)
    rows = first_row.to(tl.int64) + tl.arange(0, M)
    at = rows[:, None] * D + tl.arange(0, D)[None, :]
    in_batch = (rows < n_rows)[:, None]
    total = tl.zeros((M, D), tl.float32)
    total = convolve(
        total, NARROW_TILES, W_TILES, start, n_rows, 0, 1, D, TAPS, CHUNK, STAGES, DESCRIPTORS, PRECISION
    )  # fmt: skip
    total = convolve(
        total, WIDE_TILES, W_TILES, start, n_rows, TAPS, DILATION, D, TAPS, CHUNK, STAGES, DESCRIPTORS, PRECISION
    )  # fmt: skip
    total += tl.load(D_SUM + at, mask=in_batch, other=0.0).to(tl.float32)
    tl.store(D_X + at, total.to(D_X.dtype.element_ty), mask=in_batch)


@triton.jit(**ANY_BATCH)
def weight_gradient_kernel(
    GRADIENT, X, PARTS, first, n_rows, rows_each,
    D: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, AT_ONCE: tl.constexpr,
    K: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, EMBEDDED: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Program (part, AT_ONCE taps): PARTS[part, tap] (D, N) = sum over the part's rows of GRADIENT[r]^T X[r + shift].

    X is (rows, D), N columns of it; or, where EMBEDDED, the tokens (rows,), which stand for one-hot rows of N.
    """
    part = tl.program_id(0)
    tap = tl.program_id(1) * AT_ONCE
    # Columns of X, where they do not all fit.
    first_column = tl.program_id(2) * N
    begin = first + part.to(tl.int64) * rows_each
    end = tl.minimum(begin + rows_each, n_rows)
    channels = tl.arange(0, D)
    columns = tl.arange(0, N)
    shift = (tap - TAPS // 2) * DILATION
    sum0 = tl.zeros((D, N), tl.float32)
    sum1 = tl.zeros((D, N), tl.float32) if AT_ONCE > 1 else 0
    sum2 = tl.zeros((D, N), tl.float32) if AT_ONCE > 2 else 0
    for i in tl.range(0, rows_each, K, num_stages=STAGES):
        rows = begin + i + tl.arange(0, K)
        gradient = tl.load(GRADIENT + rows[:, None] * D + channels[None, :], mask=(rows < end)[:, None], other=0.0)
        turned = tl.trans(gradient)
        x = _shifted(X, rows + shift, n_rows, first_column, columns, D, EMBEDDED, gradient.dtype)
        sum0 = tl.dot(turned, x, sum0, input_precision=PRECISION)
        if AT_ONCE > 1:
            x = _shifted(X, rows + shift + DILATION, n_rows, first_column, columns, D, EMBEDDED, gradient.dtype)
            sum1 = tl.dot(turned, x, sum1, input_precision=PRECISION)
        if AT_ONCE > 2:
            x = _shifted(X, rows + shift + 2 * DILATION, n_rows, first_column, columns, D, EMBEDDED, gradient.dtype)
            sum2 = tl.dot(turned, x, sum2, input_precision=PRECISION)
        if SETTLED:
            sum0 = settled(sum0)
            if AT_ONCE > 1:
                sum1 = settled(sum1)
            if AT_ONCE > 2:
                sum2 = settled(sum2)
    WIDTH: tl.constexpr = N if EMBEDDED else D
    out = PARTS + (part * TAPS + tap).to(tl.int64) * D * WIDTH
    out += channels[:, None] * WIDTH + (first_column + columns)[None, :]
    tl.store(out, sum0)
    if AT_ONCE > 1:
        tl.store(out + D * WIDTH, sum1)
    if AT_ONCE > 2:
        tl.store(out + 2 * D * WIDTH, sum2)


@triton.jit
def _shifted(X, rows, n_rows, first_column, columns, D: tl.constexpr, EMBEDDED: tl.constexpr, dtype: tl.constexpr):
    """Rows of x (K, N), zeros outside the batch."""
    there = (rows >= 0) & (rows < n_rows)
    if EMBEDDED:
        token = tl.load(X + rows, mask=there, other=255).to(tl.int32)
        return (token[:, None] == columns[None, :]).to(dtype)
    else:
        return tl.load(X + rows[:, None] * D + (first_column + columns)[None, :], mask=there[:, None], other=0.0)


@triton.jit(**ANY_BATCH)
def add_parts_kernel(PARTS, OUT, n_parts, n, N: tl.constexpr):
    """OUT (n,) = the sum of PARTS (parts, n), in order."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    total = tl.zeros((N,), tl.float32)
    part = PARTS + at
    for _ in range(0, n_parts):
        total += tl.load(part, mask=at < n, other=0.0)
        part += n
    tl.store(OUT + at, total, mask=at < n)


def add_parts(parts: Tensor) -> Tensor:
    """The sum of (P, ...) float32 over P, in order."""
    out = torch.empty_like(parts[0])
    n = 256 if capability_of(parts) else 4096  # in the interpreter as in `configuration`
    if out.numel():
        add_parts_kernel[(triton.cdiv(out.numel(), n),)](parts, out, len(parts), out.numel(), N=n, num_warps=4)
    return out


def configuration(capability: int, channels: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The tuned one of this machine, or the shipped one for a device; the arguments are those of the local block's."""
    kernel = "local_block_backward"
    if (tuned := tuning.lookup(kernel, Configuration, capability, channels, dtype, precision)) is not None:
        return tuned
    wide = channels > 128
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 64, 32, 4, 64, 3, False, dtype == torch.float32)
    if not has_matrix_units(capability, dtype, precision) or dtype == torch.float32:
        return Configuration(16, 16, 16, 8, 16, 1, False, True)
    if has_large_tiles(capability):
        if wide:
            return Configuration(16, 64, 64, 8, 64, 1, True, True)
        return Configuration(32, 128, min(channels, 64), 8, 64, 3, True, False, 128 if is_hopper(capability) else None)
    return Configuration(32 if not wide else 16, 64, min(channels, 32), 8, 32, 1, False, wide)


class Gradients(NamedTuple):
    """What the backward pass computes.

    Attributes:
        x: (R, D), or of the table of tokens (26, D).
        broadcast: (B, D).
        weights: those of LocalBlockWeights.
    """

    x: Tensor
    broadcast: Tensor
    weights: list[Tensor]


def launch(
    d_local: Tensor,
    d_hidden: Tensor | None,
    x: Tensor,
    tokens: Tensor | None,
    narrow: Tensor,
    wide: Tensor,
    broadcast: Tensor,
    segments: Tensor,
    starts: Tensor,
    lengths: Tensor,
    spans: tuple[Tensor, Tensor],
    longest: int,
    weights: LocalBlockWeights,
    gap: int,
    wide_dilation: int,
    overwrite: bool = False,
    chosen: Configuration | None = None,
) -> Gradients:
    """Runs the kernels.

    Args:
        d_local: (R, D), gradient of the new states; what it has in gap rows is left out.
        d_hidden: (R, D), that of the states after the first norm, or None.
        x: as for the forward pass.
        tokens: as for the forward pass.
        narrow: (R, D), the narrow convolution's result.
        wide: (R, D), the wide one's.
        broadcast: (B, D).
        segments: (R,) int32.
        starts: (B,) int64.
        lengths: (B,) int64.
        spans: as ``PackedBatch.spans(SPAN)`` gives them.
        longest: rows of the longest protein, or more.
        weights: the block's parameters.
        gap: rows before the first protein.
        wide_dilation: rows between the taps of the wide convolution.
        overwrite: write over ``narrow`` and ``wide``, which are not needed any more.
        chosen: how to cut the launches; the tuned or the shipped configuration when None.
    """
    w, dtype = weights, narrow.dtype
    n_rows, channels = narrow.shape
    taps = w.narrow_weight.shape[-1]
    precision = product_precision(dtype)
    c, capability = chosen, capability_of(narrow)
    if c is None:
        c = configuration(capability, channels, dtype, precision)
        if portable_because(capability, channels, dtype, taps, wide_dilation, gap) is None:
            from proteinbert_fast.ops.kernels import local_block_backward_hopper as hopper

            c = c._replace(hopper=hopper.configuration(channels, dtype))
            if hopper.weights_unsupported(channels, dtype, taps, wide_dilation, gap) is None:
                c = c._replace(hopper_weights=hopper.weights_configuration())
    symbols = 0 if tokens is None else padded(len(x) + 1, 32)
    table = x if tokens is None else torch.nn.functional.pad(x, (0, 0, 0, symbols - len(x)))
    d_sum, hidden, d_dense = (torch.empty_like(narrow) for _ in range(3))
    d_narrow, d_wide = (narrow, wide) if overwrite else (torch.empty_like(narrow), torch.empty_like(wide))
    for rows in (d_sum, d_narrow, d_wide):  # of the others, rows before the first protein are not read
        rows[:gap] = 0
    grid = (triton.cdiv(n_rows - gap, c.rows),)
    vectors = narrow.new_empty(*grid, _VECTORS, channels, dtype=torch.float32)
    pointwise_kernel[grid](
        table.contiguous(), segments if tokens is None else tokens, narrow, wide, broadcast.contiguous(), segments,
        w.norm1_weight, w.norm1_bias, w.dense_weight.to(dtype).contiguous(), w.dense_bias, w.norm2_weight,
        d_local.contiguous(), d_local if d_hidden is None else d_hidden.contiguous(), d_sum, d_narrow, d_wide, hidden,
        d_dense, vectors, gap, n_rows,
        D=channels, M=c.rows, CHUNK=min(c.chunk, channels), PRECISION=precision, EPSILON=LAYER_NORM_EPS,
        EMBEDDED=symbols > 0, HAS_D_HIDDEN=d_hidden is not None, CHUNKED_DENSE=c.chunked_dense,
        GAP_TOKEN=max(symbols - 1, 0), num_warps=c.warps, maxnreg=c.registers,
    )  # fmt: skip

    def over_rows(gradient: Tensor, taps: int, dilation: int, tokens: Tensor | None, x: Tensor) -> Tensor:
        return _weight_gradient(gradient, x, tokens, symbols, taps, dilation, gap, c, precision)

    d_dense_weight = over_rows(d_dense, 1, 1, None, hidden)[0]
    del hidden, d_dense
    d_broadcast = protein_sums(d_sum, starts, lengths, longest, spans=spans)
    # (taps, out, in or token)
    d_taps = [over_rows(g, taps, d, tokens, x) for g, d in ((d_narrow, 1), (d_wide, wide_dilation))]
    if tokens is None:
        d_x = _convolution_gradient(d_narrow, d_wide, d_sum, w, wide_dilation, gap, c, precision)
    else:
        n_tokens = len(x)
        by_token = [d[:, :, :n_tokens].transpose(1, 2) for d in d_taps]  # (taps, token, out)
        d_x = over_rows(d_sum, 1, 1, tokens, x)[0, :, :n_tokens].t()
        for d, weight in zip(by_token, (w.narrow_weight, w.wide_weight), strict=True):
            d_x = d_x + torch.einsum("kto,oik->ti", d, weight.float())
        d_taps = [torch.einsum("kto,ti->koi", d, x.float()) for d in by_token]
        d_x = d_x.to(x.dtype).contiguous()
    norm1, bias1, norm2, bias2, dense_bias, narrow_bias, wide_bias = vectors.sum(0)
    d_narrow_weight, d_wide_weight = (d.permute(1, 2, 0) for d in d_taps)
    found = (
        d_narrow_weight, narrow_bias, d_wide_weight, wide_bias, norm1, bias1, d_dense_weight, dense_bias, norm2, bias2,
    )  # fmt: skip
    return Gradients(d_x, d_broadcast.to(broadcast.dtype), copied(found, w))


def copied(found: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients as their parameters are, in dtype and strides; small ones by one launch."""
    out = [torch.empty_like(t) for t in like]
    small = [i for i, t in enumerate(like) if t.dim() == 1 and t.dtype == like[1].dtype]
    torch._foreach_copy_([out[i] for i in small], [found[i] for i in small])
    for i in set(range(len(out))) - set(small):
        out[i].copy_(found[i])
    return out


def _convolution_gradient(
    d_narrow: Tensor,
    d_wide: Tensor,
    d_sum: Tensor,
    w: LocalBlockWeights,
    wide_dilation: int,
    gap: int,
    c: Configuration,
    precision: str,
) -> Tensor:
    """Of x, (R, D), written over ``d_sum``."""
    n_rows, channels = d_sum.shape
    # (out, in, taps) to (taps, out, in), taps flipped, narrow above wide.
    flipped = torch.cat([w.narrow_weight.permute(2, 0, 1).flip(0), w.wide_weight.permute(2, 0, 1).flip(0)])
    flipped = flipped.to(d_sum.dtype).reshape(-1, channels)
    if c.hopper is not None:
        from proteinbert_fast.ops.kernels import local_block_backward_hopper

        return local_block_backward_hopper.launch(d_narrow, d_wide, d_sum, flipped, gap, wide_dilation, c.hopper)
    tiles: list[object] = [d_narrow, d_wide, flipped]
    chunk = min(c.chunk, channels)
    if c.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        shapes = ([c.convolution_rows, chunk], [c.convolution_rows, chunk], [chunk, channels])
        tensors = (d_narrow, d_wide, flipped)
        tiles = [TensorDescriptor.from_tensor(t, shape) for t, shape in zip(tensors, shapes, strict=True)]
    convolution_gradient_kernel[(triton.cdiv(n_rows - gap, c.convolution_rows),)](
        *tiles, d_sum, d_sum, gap, n_rows,
        D=channels, TAPS=w.narrow_weight.shape[-1], DILATION=wide_dilation, M=c.convolution_rows, CHUNK=chunk, STAGES=3,
        DESCRIPTORS=c.descriptors, PRECISION=precision, num_warps=c.warps, num_stages=3,
    )  # fmt: skip
    return d_sum


def _weight_gradient(
    gradient: Tensor,
    x: Tensor,
    tokens: Tensor | None,
    symbols: int,
    taps: int,
    dilation: int,
    gap: int,
    c: Configuration,
    precision: str,
) -> Tensor:
    """(taps, D, D or symbols) float32: out by in, or out by token."""
    n_rows, channels = gradient.shape
    if n_rows == gap:  # no protein
        return gradient.new_zeros(taps, channels, channels if tokens is None else symbols, dtype=torch.float32)
    if c.hopper_weights is not None and tokens is None and taps > 1:
        from proteinbert_fast.ops.kernels import local_block_backward_hopper

        # One program to a multiprocessor: the sums of three taps take its registers.
        parts = local_block_backward_hopper.launch_weights(
            gradient, x.contiguous(), taps, dilation, gap, _PROGRAMS // 2, c.hopper_weights
        )
        return add_parts(parts)
    at_once = c.taps if taps % c.taps == 0 else 1
    columns = symbols if tokens is not None else min(channels, 128)
    blocks = 1 if tokens is not None else channels // columns
    n_parts = max(1, min(_PROGRAMS * at_once // (taps * blocks), triton.cdiv(n_rows - gap, 4 * c.weight_rows)))
    rows_each = triton.cdiv(triton.cdiv(n_rows - gap, n_parts), c.weight_rows) * c.weight_rows
    n_parts = triton.cdiv(n_rows - gap, rows_each)
    parts = gradient.new_empty(n_parts, taps, channels, columns * blocks, dtype=torch.float32)
    weight_gradient_kernel[(n_parts, taps // at_once, blocks)](
        gradient, x.contiguous() if tokens is None else tokens, parts, gap, n_rows, rows_each,
        D=channels, N=columns, TAPS=taps, DILATION=dilation, AT_ONCE=at_once, K=c.weight_rows, STAGES=2,
        PRECISION=precision, EMBEDDED=tokens is not None, SETTLED=is_hopper(capability_of(x)),
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return add_parts(parts)
