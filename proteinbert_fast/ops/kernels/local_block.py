"""The local track of one block in one kernel: reads x once or more from the cache, writes the new state once."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import gelu, kept_16_bit, layer_norm
from proteinbert_fast.ops.kernels.launching import capability_of, is_interpreted, product_precision
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import LocalBlockWeights
from proteinbert_fast.packing import PackedBatch

CHANNELS = (32, 64, 128, 256)


class Configuration(NamedTuple):
    """How a launch is cut.

    Attributes:
        rows: of a tile.
        chunk: input channels per product.
        warps: per tile.
        stages: chunks in flight.
        descriptors: tiles move through tensor descriptors (the bulk copy engine), not through pointers.
        chunked_dense: the dense layer goes chunk by chunk too, and reads the hidden states again; for products without
            matrix units, whose operands would not fit into shared memory at once.
    """

    rows: int
    chunk: int
    warps: int
    stages: int
    descriptors: bool
    chunked_dense: bool


@triton.jit
def _convolve(
    total, X, W, rows, n_rows, FIRST_TAP: tl.constexpr, DILATION: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds a convolution's products to ``total`` (M, D), taps in order, channels in order within a tap."""
    STEPS: tl.constexpr = D // CHUNK
    columns = tl.arange(0, D)
    inputs = tl.arange(0, CHUNK)
    for step in tl.range(0, TAPS * STEPS, num_stages=STAGES):
        tap = step // STEPS
        first_input = (step % STEPS) * CHUNK
        shift = (tap - TAPS // 2) * DILATION
        weight_row = (FIRST_TAP + tap) * D + first_input
        if DESCRIPTORS:
            x = X.load([rows + shift, first_input])
            w = W.load([weight_row, 0])
        else:
            at = rows + shift + tl.arange(0, total.shape[0])
            x = tl.load(X + at[:, None] * D + (first_input + inputs)[None, :], mask=(at < n_rows)[:, None], other=0.0)
            w = tl.load(W + (weight_row + inputs)[:, None] * D + columns[None, :])
        total = tl.dot(x, w, total, input_precision=PRECISION)
    return total


@triton.jit
def local_block_kernel(
    X_TILES, W_TILES, LOCAL_TILES, X, BROADCAST, SEGMENTS, NARROW_BIAS, WIDE_BIAS, NORM1_WEIGHT, NORM1_BIAS,
    DENSE, DENSE_BIAS, NORM2_WEIGHT, NORM2_BIAS, HIDDEN, LOCAL, first, n_rows,
    D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, KEEP_HIDDEN: tl.constexpr,
    CHUNKED_DENSE: tl.constexpr, EPSILON: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Rows [first + M * program, ...) of the batch. Gap rows are computed like others and written as zeros.

    X_TILES, W_TILES and LOCAL_TILES are descriptors, or pointers again where there are none. W is (2 * TAPS * D, D):
    the taps of the narrow and then of the wide convolution, each (in, out). DENSE is (out, in).
    """
    dtype = X.dtype.element_ty
    PRECISE: tl.constexpr = dtype == tl.float32
    # Offsets into the states are 64 bit: they may have more than 2^31 elements. Descriptors count rows.
    first_row = first + tl.program_id(0) * M
    start = first_row if DESCRIPTORS else first_row.to(tl.int64)
    rows = first_row.to(tl.int64) + tl.arange(0, M)
    columns = tl.arange(0, D)
    in_batch = rows < n_rows
    at = rows[:, None] * D + columns[None, :]
    segment = tl.load(SEGMENTS + rows, mask=in_batch, other=-1)
    inside = (segment >= 0)[:, None]

    total = tl.broadcast_to(tl.load(NARROW_BIAS + columns).to(tl.float32)[None, :], (M, D))
    total = _convolve(
        total, X_TILES, W_TILES, start, n_rows, 0, 1, D, TAPS, CHUNK, STAGES, DESCRIPTORS, PRECISION
    )  # fmt: skip
    merged = gelu(total, PRECISE) + tl.load(X + at, mask=in_batch[:, None], other=0.0).to(tl.float32)
    word = BROADCAST + tl.maximum(segment, 0).to(tl.int64)[:, None] * D + columns[None, :]
    merged += tl.load(word, mask=inside, other=0.0).to(tl.float32)
    if KEPT:
        # Half the registers during the second loop. float16 has the bits to spare for sums of this size.
        merged_16 = kept_16_bit(merged.to(tl.float16))
    total = tl.broadcast_to(tl.load(WIDE_BIAS + columns).to(tl.float32)[None, :], (M, D))
    total = _convolve(
        total, X_TILES, W_TILES, start, n_rows, TAPS, DILATION, D, TAPS, CHUNK, STAGES, DESCRIPTORS, PRECISION
    )  # fmt: skip
    if KEPT:
        merged = merged_16.to(tl.float32)
    hidden = layer_norm(
        merged + gelu(total, PRECISE), tl.load(NORM1_WEIGHT + columns).to(tl.float32),
        tl.load(NORM1_BIAS + columns).to(tl.float32), D, EPSILON,
    ).to(dtype)  # fmt: skip
    if KEPT:
        hidden = kept_16_bit(hidden)
    if KEEP_HIDDEN or CHUNKED_DENSE:
        tl.store(HIDDEN + at, tl.where(inside, hidden, 0.0).to(dtype), mask=in_batch[:, None])

    total = tl.broadcast_to(tl.load(DENSE_BIAS + columns).to(tl.float32)[None, :], (M, D))
    if CHUNKED_DENSE:
        # Reads what other threads of this program have just written.
        tl.debug_barrier()
        inputs = tl.arange(0, CHUNK)
        for k in range(0, D, CHUNK):
            h = tl.load(HIDDEN + rows[:, None] * D + (k + inputs)[None, :], mask=in_batch[:, None], other=0.0)
            w = tl.load(DENSE + columns[:, None] * D + (k + inputs)[None, :])
            total = tl.dot(h, tl.trans(w), total, input_precision=PRECISION)
    else:
        dense = tl.load(DENSE + columns[:, None] * D + columns[None, :])
        total = tl.dot(hidden, tl.trans(dense), total, input_precision=PRECISION)
    local = layer_norm(
        hidden.to(tl.float32) + gelu(total, PRECISE), tl.load(NORM2_WEIGHT + columns).to(tl.float32),
        tl.load(NORM2_BIAS + columns).to(tl.float32), D, EPSILON,
    )  # fmt: skip
    local = tl.where(inside, local, 0.0).to(dtype)
    if DESCRIPTORS:
        LOCAL_TILES.store([start, 0], local)
    else:
        tl.store(LOCAL + at, local, mask=in_batch[:, None])


def configuration(capability: int, channels: int, dtype: torch.dtype) -> Configuration:
    """The tuned one of this machine, or the shipped one for a device.

    Args:
        capability: 80 for 8.0; 0 in the interpreter.
        channels: D.
        dtype: of the states.
    """
    if (tuned := tuning.lookup("local_block", Configuration, capability, channels, dtype)) is not None:
        return tuned
    wide = channels > 128
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 32, 4, 2, False, dtype == torch.float32)
    if dtype == torch.float32 or capability < 80:
        return Configuration(16, 16, 4 if not wide else 8, 2, False, True)
    if capability >= 90:
        return Configuration(128 if not wide else 64, min(channels, 64), 8, 3, True, False)
    return Configuration(64, min(channels, 32), 4 if not wide else 8, 3, False, False)


@torch.library.custom_op("proteinbert_fast::local_block", mutates_args=())
def _local_block(
    x: Tensor, broadcast: Tensor, segments: Tensor, weights: list[Tensor],
    gap: int, wide_dilation: int, keep_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return launch(x, broadcast, segments, weights, gap, wide_dilation, keep_hidden, None)


@_local_block.register_fake
def _(
    x: Tensor, broadcast: Tensor, segments: Tensor, weights: list[Tensor],
    gap: int, wide_dilation: int, keep_hidden: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape if keep_hidden else (0, x.shape[1])), torch.empty_like(x)


def launch(
    x: Tensor,
    broadcast: Tensor,
    segments: Tensor,
    weights: list[Tensor],
    gap: int,
    wide_dilation: int,
    keep_hidden: bool,
    chosen: Configuration | None,
) -> tuple[Tensor, Tensor]:
    """Runs the kernel; as the operator, with a configuration to choose (the shipped one when None)."""
    x = x.contiguous()
    w = LocalBlockWeights(*weights)
    n_rows, channels = x.shape
    c = chosen or configuration(capability_of(x), channels, x.dtype)
    # (out, in, taps) to (taps, in, out), narrow above wide: a tile of it is what a product takes.
    taps = torch.cat([w.narrow_weight.permute(2, 1, 0), w.wide_weight.permute(2, 1, 0)]).to(x.dtype)
    taps = taps.reshape(-1, channels)
    hidden = torch.empty_like(x) if keep_hidden or c.chunked_dense else x.new_empty(0, channels)
    local = torch.empty_like(x)
    local[:gap] = 0
    if keep_hidden:
        hidden[:gap] = 0
    tiles: tuple[object, object, object] = (x, taps, local)
    if c.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        tiles = (
            TensorDescriptor.from_tensor(x, [c.rows, c.chunk]),
            TensorDescriptor.from_tensor(taps, [c.chunk, channels]),
            TensorDescriptor.from_tensor(local, [c.rows, channels]),
        )
    local_block_kernel[(triton.cdiv(n_rows - gap, c.rows),)](
        *tiles, x, broadcast.contiguous(), segments, w.narrow_bias, w.wide_bias, w.norm1_weight, w.norm1_bias,
        w.dense_weight.to(x.dtype).contiguous(), w.dense_bias, w.norm2_weight, w.norm2_bias, hidden, local, gap, n_rows,
        D=channels, TAPS=w.narrow_weight.shape[-1], DILATION=wide_dilation, M=c.rows, CHUNK=min(c.chunk, channels),
        STAGES=c.stages, DESCRIPTORS=c.descriptors, PRECISION=product_precision(x.dtype), KEEP_HIDDEN=keep_hidden,
        CHUNKED_DENSE=c.chunked_dense,
        EPSILON=LAYER_NORM_EPS, KEPT=x.dtype != torch.float32 and not is_interpreted(),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return hidden if keep_hidden else x.new_empty(0, channels), local


def local_block(
    x: Tensor,
    broadcast: Tensor,
    batch: PackedBatch,
    weights: LocalBlockWeights,
    wide_dilation: int,
    keep_hidden: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """``reference.local_block`` in one kernel.

    Args:
        x: (R, D), zeros in gap rows; D is one of CHANNELS.
        broadcast: (B, D).
        batch: the packed layout.
        weights: the block's parameters; products take them in the dtype of ``x``.
        wide_dilation: rows between the taps of the wide convolution.
        keep_hidden: also return the states after the first norm.

    Returns:
        The hidden states (R, D) or None, and the new local states (R, D).
    """
    segments = batch.segments

    def fast(x: Tensor, broadcast: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = _local_block(
            x, broadcast, segments, list(weights), batch.gap, wide_dilation, keep_hidden
        )
        return result

    def plain(x: Tensor, broadcast: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return reference.local_block(x, broadcast, segments, LocalBlockWeights(*weights), wide_dilation)

    hidden, local = recomputed(fast, plain, x, broadcast, *weights)
    return (hidden if keep_hidden else None), local
