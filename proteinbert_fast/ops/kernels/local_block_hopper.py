"""The local block on Hopper: a tile of x is read once and stays in shared memory, only weights stream past it.

``local_block.py`` reads a tile of x again for each of the 18 taps. Here both convolutions multiply shifted views of one
copy. Written in Gluon, Triton's lower level, where shared memory and its barriers are handled by hand; imported when
first used.
"""

import re

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from proteinbert_fast.config import LAYER_NORM_EPS
from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.activations import gelu, kept_16_bit
from proteinbert_fast.ops.kernels.launching import ANY_BATCH
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration
from proteinbert_fast.ops.reference import LocalBlockWeights

try:
    from triton.experimental.gluon.language import barrier
except ImportError:  # Triton 3.6 has the other name.
    from triton.experimental.gluon.language import thread_barrier as barrier

# Jitted functions may use Gluon's own functions as globals, whatever the name.
thread_barrier = barrier
# Releases with views that begin at any row of a tile: newer ones refuse a view larger than the one it is made from.
TRITONS = ((3, 6), (3, 7))
CHANNELS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)
# Rows of a tile's halo in shared memory, above and below together.
HALO = 64


@gluon.constexpr_function
def planes_layout(rows, channels, turned=False):
    """(rows, channels) in shared memory as planes of 8 channels, each a column of rows of 16 bytes.

    Where turned, a (channels, rows) view of the same.

    The next row is 16 bytes on wherever it lies. A matrix descriptor without swizzling only counts strides from any
    start at a multiple of 16 bytes, so the tile shifted by some rows is the same descriptor from another start.
    """
    row_bits, plane_bits = rows.bit_length() - 1, (channels // 8).bit_length() - 1
    within_row = [[0, 1], [0, 2], [0, 4]]
    bases = within_row + [[1 << i, 0] for i in range(row_bits)] + [[0, 8 << i] for i in range(plane_bits)]
    return gl.SharedLinearLayout([basis[::-1] for basis in bases] if turned else bases)


@gluon.constexpr_function
def copying_layout(rows, channels, warps):
    """Registers of a tile between global memory and planes: 16 bytes at a time.

    Eight threads in turn hold eight rows of one plane, 128 bytes of shared memory and so every bank once; a warp holds
    four planes of them, whole sectors of global memory.
    """
    warp_bits = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4]]
        + [[0, 1 << i] for i in range(5, channels.bit_length() - 1)]
        + [[1 << i, 0] for i in range(3 + warp_bits, rows.bit_length() - 1)],
        lane_bases=[[1, 0], [2, 0], [4, 0], [0, 8], [0, 16]],
        # Of more warps than there are rows for, some do the same as others.
        warp_bases=[[8 << i if 8 << i < rows else 0, 0] for i in range(warp_bits)],
        block_bases=[],
        shape=[rows, channels],
    )


@gluon.jit
def fetch_weights(
    W_TILES, ring, full, step, D: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr
):
    """Starts the copy of a step's weights into its stage; nothing for steps that there are not."""
    wanted = step < STEPS
    stage = step % STAGES
    mbarrier.expect(full.index(stage), CHUNK * D * 2, pred=wanted)
    tma.async_copy_global_to_shared(W_TILES, [step * CHUNK, 0], full.index(stage), ring.index(stage), pred=wanted)


@gluon.jit
def open_ring(W_TILES, D: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr):
    """Stages for weights and their barriers, with the first weights on their way."""
    ring = gl.allocate_shared_memory(W_TILES.dtype, [STAGES, CHUNK, D], W_TILES.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    # The copy engine signals these barriers, and sees memory through another path than threads write it.
    fence_async_shared()
    for stage in gl.static_range(STAGES):
        fetch_weights(W_TILES, ring, full, stage, D, CHUNK, STAGES, STEPS)
    return ring, full


@gluon.jit
def close_ring(full, STAGES: gl.constexpr):
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))


@gluon.jit
def open_tile(dtype: gl.constexpr, D: gl.constexpr, M: gl.constexpr):
    """Shared memory for a tile and its halo, row by row, so that a view can begin at any of them.

    2 M rows, since strides must be powers of two: the rows that ``copy_tile`` copies; the rest is never read.
    """
    return gl.allocate_shared_memory(dtype, [D // 8 * 2 * M, 1, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def copy_tile(
    X, x, place, first_row, left, REACH: gl.constexpr, D: gl.constexpr, M: gl.constexpr, HALO: gl.constexpr
):  # fmt: skip
    """Starts the copy of REACH rows above a tile of X, of the tile, and of REACH below.

    Args:
        x: where to, from ``open_tile``.
        place: row of it.
        first_row: of the tile, at least REACH.
        left: rows from there to the batch's end; zeros beyond.
    """
    WARPS: gl.constexpr = gl.num_warps()
    PLANES: gl.constexpr = planes_layout(2 * M, D)
    planes = x.index(place)._reinterpret(x.dtype, [2 * M, D], PLANES)
    COPY: gl.constexpr = copying_layout(M, D, WARPS)
    COPY_HALO: gl.constexpr = copying_layout(HALO, D, WARPS)
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, COPY))
    places = rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
    async_copy.async_copy_global_to_shared(
        planes.slice(0, M, 0), X + (first_row - REACH) * D + places, mask=(rows < left + REACH)[:, None]
    )
    more = gl.arange(0, HALO, layout=gl.SliceLayout(1, COPY_HALO))
    more_places = more[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, COPY_HALO))[None, :]
    async_copy.async_copy_global_to_shared(
        planes.slice(M, HALO, 0), X + (first_row + (M - REACH)) * D + more_places,
        mask=((more < 2 * REACH) & (more < left + (REACH - M)))[:, None],
    )  # fmt: skip


@gluon.jit
def load_tile(X, x, first_row, left, REACH: gl.constexpr, D: gl.constexpr, M: gl.constexpr, HALO: gl.constexpr):
    """As ``copy_tile``, to the start of ``x``; waits until products can read it."""
    copy_tile(X, x, 0, first_row, left, REACH, D, M, HALO)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def multiply(
    total, x, W_TILES, ring, full, first_step, first_row, DILATION: gl.constexpr, TAPS: gl.constexpr,
    D: gl.constexpr, M: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Adds the products of TAPS shifted tiles to ``total`` (M, D), taps in order, channels in order within a tap.

    Args:
        x: the planes, row by row.
        first_step: of the weight stream.
        first_row: of the tile that the first tap multiplies, in shared memory; the next is DILATION rows on.
    """
    ROWS: gl.constexpr = M + M
    PER_TAP: gl.constexpr = D // CHUNK
    CHUNK_PLANES: gl.constexpr = planes_layout(ROWS, CHUNK)
    for i in range(0, TAPS * PER_TAP):
        step = first_step + i
        stage = step % STAGES
        start = (i % PER_TAP) * (CHUNK // 8 * ROWS) + first_row + (i // PER_TAP) * DILATION
        shifted = x.index(start)._reinterpret(W_TILES.dtype, [ROWS, CHUNK], CHUNK_PLANES).slice(0, M, 0)
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        total = warpgroup_mma(shifted, ring.index(stage), total, is_async=True)
        # The matrix units keep this step's products to do while the stage of the step before, now read, is filled.
        total = warpgroup_mma_wait(num_outstanding=1, deps=[total])
        if i > 0:
            fetch_weights(W_TILES, ring, full, step - 1 + STAGES, D, CHUNK, STAGES, STEPS)
    total = warpgroup_mma_wait(num_outstanding=0, deps=[total])
    fetch_weights(W_TILES, ring, full, first_step + (TAPS * PER_TAP - 1 + STAGES), D, CHUNK, STAGES, STEPS)
    return total


@gluon.jit
def _vector(P, layout: gl.constexpr, D: gl.constexpr):
    """A parameter (D,) as a row (1, D) of a tile."""
    return gl.load(P + gl.arange(0, D, layout=gl.SliceLayout(0, layout))).to(gl.float32)[None, :]


@gluon.jit
def _layer_norm(x, weight, bias, D: gl.constexpr, EPSILON: gl.constexpr):
    mean = gl.sum(x, 1) * (1.0 / D)
    centred = x - mean[:, None]
    scale = gl.rsqrt(gl.sum(centred * centred, 1) * (1.0 / D) + EPSILON)
    return centred * scale[:, None] * weight + bias


@gluon.jit(**ANY_BATCH)
def local_block_hopper_kernel(
    X, W_TILES, BROADCAST, SEGMENTS, NARROW_BIAS, WIDE_BIAS, NORM1_WEIGHT, NORM1_BIAS, DENSE_BIAS, NORM2_WEIGHT,
    NORM2_BIAS, HIDDEN, LOCAL, NARROW, WIDE, first, n_rows,
    D: gl.constexpr, TAPS: gl.constexpr, DILATION: gl.constexpr, M: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, HALO: gl.constexpr, KEEP_HIDDEN: gl.constexpr,
    KEEP_RESULTS: gl.constexpr, EPSILON: gl.constexpr,
):  # fmt: skip
    """Rows [first + M * program, ...) of the batch. Gap rows are computed like others and written as zeros.

    W_TILES describes ((2 * TAPS + 1) * D, D) in tiles of CHUNK rows: the taps of the narrow and then of the wide
    convolution and the dense layer, each (in, out). ``first`` is at least the wide convolution's reach.
    NARROW and WIDE, where wanted, take the convolutions' results.
    """
    dtype: gl.constexpr = W_TILES.dtype
    WARPS: gl.constexpr = gl.num_warps()
    REACH: gl.constexpr = TAPS // 2 * DILATION
    PER_TAP: gl.constexpr = D // CHUNK
    STEPS: gl.constexpr = (2 * TAPS + 1) * PER_TAP
    # 64 bits: states may have more than 2^31 elements. Within a tile 32 bits are enough.
    first_row = first + gl.program_id(0).to(gl.int64) * M
    left = gl.minimum(n_rows - first_row, 2 * M).to(gl.int32)

    ring, full = open_ring(W_TILES, D, CHUNK, STAGES, STEPS)
    x = open_tile(dtype, D, M)
    load_tile(X, x, first_row, left, REACH, D, M, HALO)
    PLANES: gl.constexpr = planes_layout(2 * M, D)
    planes = x.index(0)._reinterpret(dtype, [2 * M, D], PLANES)
    COPY: gl.constexpr = copying_layout(M, D, WARPS)
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, COPY))
    places = rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]

    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    at = gl.arange(0, M, layout=gl.SliceLayout(1, SUM))
    segment = gl.load(SEGMENTS + first_row + at, mask=at < left, other=-1)
    inside = (segment >= 0)[:, None]
    nothing = gl.zeros([M, D], gl.float32, SUM)

    total = multiply(
        nothing + _vector(NARROW_BIAS, SUM, D), x, W_TILES, ring, full, 0, REACH - TAPS // 2, 1, TAPS, D, M, CHUNK,
        STAGES, STEPS,
    )  # fmt: skip
    # Results go as the products leave them, four bytes at a time: another order would take registers or shared memory.
    at_result = at[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, SUM))[None, :]
    if KEEP_RESULTS:
        gl.store(NARROW + first_row * D + at_result, total.to(dtype), mask=(at < left)[:, None])
    residual = x.index(REACH)._reinterpret(dtype, [2 * M, D], PLANES).slice(0, M, 0).load(SUM)
    # Gap rows read some protein's word, which costs fewer registers than a mask: they are zeroed below.
    word = BROADCAST + gl.maximum(segment, 0).to(gl.int64)[:, None] * D
    word += gl.arange(0, D, layout=gl.SliceLayout(0, SUM))[None, :]
    merged = gelu(total, False) + (gl.load(word).to(gl.float32) + residual.to(gl.float32))
    # Half the registers during the second loop. float16 has the bits to spare for sums of this size.
    merged_16 = kept_16_bit(merged.to(gl.float16))
    total = multiply(
        nothing + _vector(WIDE_BIAS, SUM, D), x, W_TILES, ring, full, TAPS * PER_TAP, 0, DILATION, TAPS, D, M, CHUNK,
        STAGES, STEPS,
    )  # fmt: skip
    if KEEP_RESULTS:
        gl.store(WIDE + first_row * D + at_result, total.to(dtype), mask=(at < left)[:, None])
    hidden = _layer_norm(
        merged_16.to(gl.float32) + gelu(total, False), _vector(NORM1_WEIGHT, SUM, D), _vector(NORM1_BIAS, SUM, D), D,
        EPSILON,
    )  # fmt: skip

    # x is done with. What replaces it is read back from there, too: to keep it in registers would spill others.
    tile = planes.slice(0, M, 0)
    thread_barrier()
    tile.store(gl.where(inside, hidden, 0.0).to(dtype))
    fence_async_shared()
    thread_barrier()
    in_batch = (rows < left)[:, None]
    if KEEP_HIDDEN:
        gl.store(HIDDEN + first_row * D + places, tile.load(COPY), mask=in_batch)
    total = multiply(
        nothing + _vector(DENSE_BIAS, SUM, D), x, W_TILES, ring, full, 2 * TAPS * PER_TAP, 0, 0, 1, D, M, CHUNK,
        STAGES, STEPS,
    )  # fmt: skip
    local = _layer_norm(
        tile.load(SUM).to(gl.float32) + gelu(total, False), _vector(NORM2_WEIGHT, SUM, D),
        _vector(NORM2_BIAS, SUM, D), D, EPSILON,
    )  # fmt: skip
    thread_barrier()
    tile.store(gl.where(inside, local, 0.0).to(dtype))
    thread_barrier()
    gl.store(LOCAL + first_row * D + places, tile.load(COPY), mask=in_batch)
    close_ring(full, STAGES)


def configuration(channels: int, dtype: torch.dtype = torch.bfloat16) -> HopperConfiguration:
    """The tuned one of this machine, or the shipped one.

    Args:
        channels: D.
        dtype: of the states.
    """
    if (tuned := tuning.lookup("local_block_hopper", HopperConfiguration, 90, channels, dtype)) is not None:
        return tuned
    # Two programs to an SM: one's activations and norms run beside the other's products.
    return HopperConfiguration(rows=128, chunk=64, warps=8, stages=3 if channels == 128 else 6, registers=128)


def release(version: str) -> tuple[int, int]:
    """(3, 7) of "3.7.1" or "3.7.1+git123abc"; (0, 0) of what names no release."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def unsupported(channels: int, dtype: torch.dtype, taps: int, wide_dilation: int, gap: int) -> str | None:
    """Why this kernel cannot run these sizes with the installed Triton, or None when it can.

    Args:
        channels: D.
        dtype: of the states.
        taps: of both convolutions.
        wide_dilation: rows between the taps of the wide one.
        gap: zero rows before the first protein.
    """
    if release(triton.__version__) not in TRITONS:
        wanted = " and ".join(f"{major}.{minor}" for major, minor in TRITONS)
        return (
            f"triton is {triton.__version__}; only {wanted} allow views that begin at any row of a tile, "
            "which the portable kernels do without"
        )
    if channels not in CHANNELS:
        return f"d_local is {channels}, not {' or '.join(map(str, CHANNELS))}"
    if dtype not in DTYPES:
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    reach = taps // 2 * wide_dilation
    if taps % 2 == 0 or wide_dilation < 1 or reach > min(HALO // 2, gap):
        return (
            f"{taps} taps {wide_dilation} rows apart reach {reach} rows: the taps must be odd in number, "
            f"the reach at most {HALO // 2} rows and the gap ({gap} rows)"
        )
    return None


def weight_stream(weights: LocalBlockWeights, dtype: torch.dtype) -> Tensor:
    """All that the kernel multiplies by, in the order of use: ((2 * taps + 1) * D, D), each (in, out)."""
    return _weight_stream(weights.narrow_weight, weights.wide_weight, weights.dense_weight, dtype)


def _weight_stream(narrow: Tensor, wide: Tensor, dense: Tensor, dtype: torch.dtype) -> Tensor:
    parts = [narrow.permute(2, 1, 0), wide.permute(2, 1, 0), dense.t()[None]]
    return torch.cat([part.to(dtype) for part in parts]).flatten(0, 1)


def weight_layout() -> object:
    """Of a tile of weights in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def launch(
    x: Tensor,
    broadcast: Tensor,
    segments: Tensor,
    weights: LocalBlockWeights,
    gap: int,
    wide_dilation: int,
    keep_hidden: bool,
    keep_results: bool,
    chosen: HopperConfiguration,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the kernel, as ``local_block.launch``.

    Raises:
        BackendError: it cannot run these sizes here; says why.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from proteinbert_fast.ops.prepared import prepared

    n_rows, channels = x.shape
    reason = unsupported(channels, x.dtype, weights.narrow_weight.shape[-1], wide_dilation, gap)
    if reason:
        raise BackendError(f"the local block for Hopper: {reason}")
    hidden = torch.empty_like(x) if keep_hidden else x.new_empty(0, channels)
    narrow, wide = (x.new_empty(n_rows if keep_results else 0, channels) for _ in range(2))
    local = torch.empty_like(x)
    local[:gap] = 0
    hidden[:gap] = 0
    w, c = weights, chosen
    stream = prepared(_weight_stream, w.narrow_weight, w.wide_weight, w.dense_weight, key=(x.dtype,))
    tiles = TensorDescriptor.from_tensor(stream, [c.chunk, channels], weight_layout())
    local_block_hopper_kernel[(triton.cdiv(n_rows - gap, c.rows),)](
        x, tiles, broadcast.contiguous(), segments, w.narrow_bias, w.wide_bias, w.norm1_weight, w.norm1_bias,
        w.dense_bias, w.norm2_weight, w.norm2_bias, hidden, local, narrow, wide, gap, n_rows,
        D=channels, TAPS=w.narrow_weight.shape[-1], DILATION=wide_dilation, M=c.rows, CHUNK=c.chunk, STAGES=c.stages,
        HALO=HALO, KEEP_HIDDEN=keep_hidden, KEEP_RESULTS=keep_results, EPSILON=LAYER_NORM_EPS, num_warps=c.warps,
        maxnreg=c.registers,
    )  # fmt: skip
    return hidden, local, narrow, wide
