"""The local track of one block in one kernel: reads x once or more from the cache, writes the new state once.

The first block's x are embedded tokens, so each of its convolutions is a sum of rows of small tables, one row for each
tap and token: the kernel reads tokens, never their states, and multiplies one-hot rows of 32 instead of rows of D.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import gelu, kept_16_bit, layer_norm, settled
from proteinbert_fast.ops.kernels.global_attention import SPAN
from proteinbert_fast.ops.kernels.launching import (
    ANY_BATCH,
    capability_of,
    has_large_tiles,
    has_matrix_units,
    is_hopper,
    is_interpreted,
    padded,
)
from proteinbert_fast.ops.operators import operator
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.ops.prepared import in_dtype, prepared
from proteinbert_fast.ops.reference import Embedded, LocalBlockWeights
from proteinbert_fast.ops.switches import HOPPER_ENABLED, HOPPER_SWITCH
from proteinbert_fast.packing import PackedBatch

CHANNELS = (32, 64, 128, 256)
# Why the kernels for Hopper are not to run, once something has been found wrong with them; else empty.
_distrusted: list[str] = []


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


class HopperConfiguration(NamedTuple):
    """How a launch of the kernel in ``local_block_hopper.py`` is cut.

    Attributes:
        rows: of a tile, at least 64.
        chunk: input channels per product.
        warps: per tile, a multiple of 4.
        stages: chunks of weights in flight.
        registers: most that a thread may use; None for no bound but the chip's.
    """

    rows: int
    chunk: int
    warps: int
    stages: int
    registers: int | None


@triton.jit
def convolve(
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
def _look_up(
    total, TOKENS, TABLES, rows, n_rows, FIRST_TAP: tl.constexpr, DILATION: tl.constexpr, D: tl.constexpr,
    TAPS: tl.constexpr, SYMBOLS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Adds a convolution of embedded tokens to ``total`` (M, D), taps in order; TABLES is (taps, SYMBOLS, D)."""
    columns = tl.arange(0, D)
    symbols = tl.arange(0, SYMBOLS)
    for tap in tl.range(0, TAPS, num_stages=STAGES):
        at = rows + (tap - TAPS // 2) * DILATION
        token = tl.load(TOKENS + at, mask=at < n_rows, other=SYMBOLS - 1).to(tl.int32)
        table_row = (FIRST_TAP + tap) * SYMBOLS + symbols
        table = tl.load(TABLES + table_row[:, None] * D + columns[None, :])
        one_hot = (token[:, None] == symbols[None, :]).to(table.dtype)
        total = tl.dot(one_hot, table, total, input_precision=PRECISION)
        if SETTLED:
            total = settled(total)
    return total


@triton.jit(**ANY_BATCH)
def local_block_kernel(
    X_TILES, W_TILES, LOCAL_TILES, X, TOKENS, BROADCAST, SEGMENTS, NARROW_BIAS, WIDE_BIAS, NORM1_WEIGHT, NORM1_BIAS,
    DENSE, DENSE_BIAS, NORM2_WEIGHT, NORM2_BIAS, HIDDEN, LOCAL, NARROW, WIDE, first, n_rows,
    D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, KEEP_HIDDEN: tl.constexpr,
    CHUNKED_DENSE: tl.constexpr, EPSILON: tl.constexpr, KEPT: tl.constexpr, SYMBOLS: tl.constexpr,
    KEEP_RESULTS: tl.constexpr, SETTLED: tl.constexpr,
):  # fmt: skip
    """Rows [first + M * program, ...) of the batch. Gap rows are computed like others and written as zeros.

    X_TILES, W_TILES and LOCAL_TILES are descriptors, or pointers again where there are none. W is (2 * TAPS * D, D):
    the taps of the narrow and then of the wide convolution, each (in, out). DENSE is (out, in). Where there are
    SYMBOLS, X holds the states of that many tokens, and W_TILES points to their products with each tap,
    (2 * TAPS, SYMBOLS, D). NARROW and WIDE, where wanted, take the convolutions' results.
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
    if SYMBOLS:
        total = _look_up(total, TOKENS, W_TILES, rows, n_rows, 0, 1, D, TAPS, SYMBOLS, STAGES, PRECISION, SETTLED)
        token = tl.load(TOKENS + rows, mask=in_batch, other=SYMBOLS - 1).to(tl.int32)
        x = tl.load(X + token[:, None] * D + columns[None, :])
    else:
        total = convolve(
            total, X_TILES, W_TILES, start, n_rows, 0, 1, D, TAPS, CHUNK, STAGES, DESCRIPTORS, PRECISION
        )  # fmt: skip
        x = tl.load(X + at, mask=in_batch[:, None], other=0.0)
    if KEEP_RESULTS:
        tl.store(NARROW + at, total.to(dtype), mask=in_batch[:, None])
    merged = gelu(total, PRECISE) + x.to(tl.float32)
    word = BROADCAST + tl.maximum(segment, 0).to(tl.int64)[:, None] * D + columns[None, :]
    merged += tl.load(word, mask=inside, other=0.0).to(tl.float32)
    if KEPT:
        # Half the registers during the second loop. float16 has the bits to spare for sums of this size.
        merged_16 = kept_16_bit(merged.to(tl.float16))
    total = tl.broadcast_to(tl.load(WIDE_BIAS + columns).to(tl.float32)[None, :], (M, D))
    if SYMBOLS:
        total = _look_up(
            total, TOKENS, W_TILES, rows, n_rows, TAPS, DILATION, D, TAPS, SYMBOLS, STAGES, PRECISION, SETTLED
        )
    else:
        total = convolve(
            total, X_TILES, W_TILES, start, n_rows, TAPS, DILATION, D, TAPS, CHUNK, STAGES, DESCRIPTORS, PRECISION
        )  # fmt: skip
    if KEEP_RESULTS:
        tl.store(WIDE + at, total.to(dtype), mask=in_batch[:, None])
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


def configuration(capability: int, channels: int, dtype: torch.dtype, precision: str = "ieee") -> Configuration:
    """The tuned one of this machine, or the shipped one for a device.

    Args:
        capability: 80 for 8.0; 0 in the interpreter.
        channels: D.
        dtype: of the states.
        precision: "tf32" or "ieee", of float32 products.
    """
    if (tuned := tuning.lookup("local_block", Configuration, capability, channels, dtype, precision)) is not None:
        return tuned
    wide = channels > 128
    if capability == 0:  # Time in the interpreter goes by the number of operations, not by their sizes.
        return Configuration(64, 32, 4, 2, False, dtype == torch.float32)
    if not has_matrix_units(capability, dtype, precision):
        return Configuration(16, 16, 4 if not wide else 8, 2, False, True)
    if dtype == torch.float32:
        return Configuration(64 if not wide else 32, 16, 8, 2, False, True)
    if has_large_tiles(capability):
        return Configuration(128 if not wide else 64, min(channels, 64), 8, 3, True, False)
    return Configuration(64, min(channels, 32), 4 if not wide else 8, 3, False, False)


def distrust_hopper(reason: str) -> None:
    """For the rest of the process, the kernels of this file run where those for Hopper would; for a failed self-check.

    A launch that is told a HopperConfiguration still takes it.

    Args:
        reason: what ``portable_because`` says from now on.
    """
    _distrusted[:] = [reason]


def portable_because(
    capability: int, channels: int, dtype: torch.dtype, taps: int = 9, wide_dilation: int = 5, gap: int = 20
) -> str | None:
    """Why the kernel of this file runs a block, or None where that of ``local_block_hopper.py`` does.

    The same goes for the gradient of x, and ``local_block_backward_hopper.py``.

    Args:
        capability: 90 for 9.0; 0 in the interpreter.
        channels: D.
        dtype: of the states.
        taps: of both convolutions.
        wide_dilation: rows between the taps of the wide one.
        gap: zero rows before the first protein.
    """
    if capability == 0:
        return "Triton's interpreter does not know Gluon"
    if capability != 90:
        return f"the compute capability is {capability / 10}, not 9.0"
    if not HOPPER_ENABLED:
        return f"{HOPPER_SWITCH}=0 in the environment"
    if _distrusted:
        return _distrusted[0]
    try:
        from proteinbert_fast.ops.kernels import local_block_hopper
    except ImportError as error:
        return f"triton {triton.__version__} has another Gluon: {error}"
    return local_block_hopper.unsupported(channels, dtype, taps, wide_dilation, gap)


def implementation(
    capability: int, channels: int, dtype: torch.dtype, taps: int = 9, wide_dilation: int = 5, gap: int = 20
) -> str:
    """Which kernel runs a block and why, in words; the arguments are those of ``portable_because``."""
    reason = portable_because(capability, channels, dtype, taps, wide_dilation, gap)
    return f"portable ({reason})" if reason else "hopper (the tile of x stays in shared memory)"


@operator("local_block")
def _local_block(
    x: Tensor, tokens: Tensor | None, broadcast: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor,
    span_protein: Tensor, first_span: Tensor, weights: list[Tensor], gap: int, wide_dilation: int, longest: int,
    keep_hidden: bool, keep_results: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return launch(x, tokens, broadcast, segments, weights, gap, wide_dilation, keep_hidden, keep_results, None)


@_local_block.register_fake
def _(
    x: Tensor, tokens: Tensor | None, broadcast: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor,
    span_protein: Tensor, first_span: Tensor, weights: list[Tensor], gap: int, wide_dilation: int, longest: int,
    keep_hidden: bool, keep_results: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape, nothing = (segments.shape[0], x.shape[1]), (0, x.shape[1])
    hidden, results = (shape if keep_hidden else nothing), (shape if keep_results else nothing)
    return x.new_empty(hidden), x.new_empty(shape), x.new_empty(results), x.new_empty(results)


@operator("local_block_backward")
def _local_block_backward(
    d_local: Tensor, d_hidden: Tensor | None, x: Tensor, tokens: Tensor | None, narrow: Tensor, wide: Tensor,
    broadcast: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor, span_protein: Tensor, first_span: Tensor,
    weights: list[Tensor], gap: int, wide_dilation: int, longest: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    from proteinbert_fast.ops.kernels import local_block_backward

    was_saved = len(narrow) > 0
    if not was_saved:
        _, _, narrow, wide = launch(x, tokens, broadcast, segments, weights, gap, wide_dilation, False, True, None)
    found = local_block_backward.launch(
        d_local, d_hidden, x, tokens, narrow, wide, broadcast, segments, starts, lengths, (span_protein, first_span),
        longest, LocalBlockWeights(*weights), gap, wide_dilation, overwrite=not was_saved,
    )  # fmt: skip
    return found.x, found.broadcast, found.weights


@_local_block_backward.register_fake
def _(
    d_local: Tensor, d_hidden: Tensor | None, x: Tensor, tokens: Tensor | None, narrow: Tensor, wide: Tensor,
    broadcast: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor, span_protein: Tensor, first_span: Tensor,
    weights: list[Tensor], gap: int, wide_dilation: int, longest: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    return x.new_empty(x.shape), broadcast.new_empty(broadcast.shape), [torch.empty_like(w) for w in weights]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, tokens, broadcast, segments, starts, lengths, span_protein, first_span, weights, *sizes, _, _ = inputs
    ctx.sizes = sizes
    places = segments, starts, lengths, span_protein, first_span
    ctx.save_for_backward(x, tokens, broadcast, *places, output[2], output[3], *weights)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_hidden: Tensor | None, d_local: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    x, tokens, broadcast, segments, starts, lengths, span_protein, first_span, narrow, wide, *weights = (
        ctx.saved_tensors
    )
    if d_hidden is not None and not len(d_hidden):
        d_hidden = None
    if d_local is None:
        d_local = x.new_zeros(segments.shape[0], x.shape[1])
    d_x, d_broadcast, d_weights = _local_block_backward(
        d_local, d_hidden, x, tokens, narrow, wide, broadcast, segments, starts, lengths, span_protein, first_span,
        weights, *ctx.sizes,
    )  # fmt: skip
    return d_x, None, d_broadcast, *([None] * 5), d_weights, *([None] * 5)


_local_block.register_autograd(_backward, setup_context=_save)


def _taps(narrow: Tensor, wide: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in, taps) to (taps, in, out), narrow above wide: a tile of it is what a product takes."""
    return torch.cat([narrow.permute(2, 1, 0), wide.permute(2, 1, 0)]).to(dtype)


def _states(x: Tensor, symbols: int) -> Tensor:
    """Of each token. A gap row's is the first beyond the vocabulary: its states, and those of all others, are zeros."""
    return F.pad(x, (0, 0, 0, symbols - len(x)))


def _tables(x: Tensor, narrow: Tensor, wide: Tensor, symbols: int, precision: str) -> Tensor:
    """(2 * taps, symbols, D): each tap's products with each token's states."""
    # The taps are kept for themselves: under autocast, x is another tensor in every call.
    return torch.matmul(_states(x, symbols), prepared(_taps, narrow, wide, key=(x.dtype,)))


def launch(
    x: Tensor,
    tokens: Tensor | None,
    broadcast: Tensor,
    segments: Tensor,
    weights: list[Tensor],
    gap: int,
    wide_dilation: int,
    keep_hidden: bool,
    keep_results: bool,
    chosen: Configuration | HopperConfiguration | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the kernel; as the operator, with a configuration to choose (the shipped one when None).

    The configuration's type says which kernel: a HopperConfiguration that of ``local_block_hopper.py``, which takes
    states only.

    Args:
        x: (R, D) states; or (26, D), those of each token.
        tokens: (R,) uint8, or None where ``x`` has the states.
        broadcast: (B, D).
        segments: (R,) int32.
        weights: those of LocalBlockWeights.
        gap: rows before the first protein.
        wide_dilation: rows between the taps of the wide convolution.
        keep_hidden: also give the states after the first norm.
        keep_results: also give both convolutions' results.
        chosen: how to cut the launch.

    Returns:
        Hidden states, new states, and the results of the narrow and the wide convolution, each (R, D), or (0, D) where
        not asked for.
    """
    c: Configuration | HopperConfiguration
    w = LocalBlockWeights(*weights)
    n_rows, channels, dtype = len(segments), x.shape[1], x.dtype
    precision, capability = product_precision(dtype), capability_of(x)
    if chosen is not None:
        c = chosen
    elif tokens is not None or portable_because(
        capability, channels, dtype, w.narrow_weight.shape[-1], wide_dilation, gap
    ):
        c = configuration(capability, channels, dtype, precision)
    else:
        from proteinbert_fast.ops.kernels import local_block_hopper

        c = local_block_hopper.configuration(channels, dtype)
    if isinstance(c, HopperConfiguration):
        from proteinbert_fast.ops.kernels import local_block_hopper

        return local_block_hopper.launch(
            x.contiguous(), broadcast, segments, w, gap, wide_dilation, keep_hidden, keep_results, c
        )
    symbols = 0
    if tokens is None:
        x = x.contiguous()
        taps = prepared(_taps, w.narrow_weight, w.wide_weight, key=(dtype,)).reshape(-1, channels)
    else:
        symbols = padded(len(x) + 1, 32)
        # Products of float32 may be TF32's: the precision is part of the key.
        taps = prepared(_tables, x, w.narrow_weight, w.wide_weight, key=(symbols, precision))
        x = prepared(_states, x, key=(symbols,))
    hidden = x.new_empty(n_rows if keep_hidden or c.chunked_dense else 0, channels)
    local = x.new_empty(n_rows, channels)
    narrow, wide = (x.new_empty(n_rows if keep_results else 0, channels) for _ in range(2))
    local[:gap] = 0
    if keep_hidden:
        hidden[:gap] = 0
    tiles: list[object] = [x, taps, local]
    if c.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        tiles[2] = TensorDescriptor.from_tensor(local, [c.rows, channels])
        if tokens is None:
            tiles[0] = TensorDescriptor.from_tensor(x, [c.rows, c.chunk])
            tiles[1] = TensorDescriptor.from_tensor(taps, [c.chunk, channels])
    local_block_kernel[(triton.cdiv(n_rows - gap, c.rows),)](
        *tiles, x, segments if tokens is None else tokens, broadcast.contiguous(), segments, w.narrow_bias, w.wide_bias,
        w.norm1_weight, w.norm1_bias, in_dtype(w.dense_weight, dtype), w.dense_bias, w.norm2_weight, w.norm2_bias,
        hidden, local, narrow, wide, gap, n_rows,
        D=channels, TAPS=w.narrow_weight.shape[-1], DILATION=wide_dilation, M=c.rows, CHUNK=min(c.chunk, channels),
        STAGES=c.stages, DESCRIPTORS=c.descriptors, PRECISION=precision, KEEP_HIDDEN=keep_hidden,
        CHUNKED_DENSE=c.chunked_dense, EPSILON=LAYER_NORM_EPS, KEPT=dtype != torch.float32 and not is_interpreted(),
        SYMBOLS=symbols, KEEP_RESULTS=keep_results, SETTLED=precision == "tf32" and is_hopper(capability),
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip
    return hidden if keep_hidden else x.new_empty(0, channels), local, narrow, wide


def local_block(
    x: Tensor | Embedded,
    broadcast: Tensor,
    batch: PackedBatch,
    weights: LocalBlockWeights,
    wide_dilation: int,
    keep_hidden: bool = False,
    save: Literal["preactivations", "inputs"] = "preactivations",
) -> tuple[Tensor | None, Tensor]:
    """``reference.local_block`` in one kernel.

    Args:
        x: (R, D), zeros in gap rows; or the tokens that have these states. D is one of CHANNELS.
        broadcast: (B, D).
        batch: the packed layout.
        weights: the block's parameters; products take them in the dtype of ``x``.
        wide_dilation: rows between the taps of the wide convolution.
        keep_hidden: also return the states after the first norm.
        save: what the backward pass finds: both convolutions' results and ``x``, or ``x`` alone.

    Returns:
        The hidden states (R, D) or None, and the new local states (R, D).
    """
    tokens, states = (x.tokens, x.weight) if isinstance(x, Embedded) else (None, x)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (states, broadcast, *weights))
    hidden, local, _, _ = _local_block(
        states, tokens, broadcast, batch.segments, batch.starts, batch.lengths, *batch.spans(SPAN), list(weights),
        batch.gap, wide_dilation, batch.longest, keep_hidden, wanted and save == "preactivations",
    )  # fmt: skip
    return (hidden if keep_hidden else None), local
