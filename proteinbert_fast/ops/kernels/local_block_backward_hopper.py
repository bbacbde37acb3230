"""Gradients of the local block's x and of its convolutions' weights on Hopper, from shifted views of shared memory.

``local_block_backward.py`` reads a tile again for each tap. Here, for the gradient of x, a tile of a convolution's
gradient stays in shared memory while weights stream past; for the weights' gradients, three taps share one tile of x.
The parts are those of ``local_block_hopper.py``. Imported when first used.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops.kernels import tuning
from proteinbert_fast.ops.kernels.launching import ANY_BATCH
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration
from proteinbert_fast.ops.kernels.local_block_backward import HopperWeights
from proteinbert_fast.ops.kernels.local_block_hopper import (
    HALO,
    close_ring,
    copy_tile,
    copying_layout,
    load_tile,
    multiply,
    open_ring,
    open_tile,
    planes_layout,
    thread_barrier,
    unsupported,
    weight_layout,
)

WEIGHTS_CHANNELS = 128
TAPS_AT_ONCE = 3  # whose sums fit into the registers of one program
WEIGHTS_HALO = 16


@gluon.jit(**ANY_BATCH)
def convolution_gradient_hopper_kernel(
    D_NARROW, D_WIDE, W_TILES, D_SUM, D_X, first, n_rows,
    D: gl.constexpr, TAPS: gl.constexpr, DILATION: gl.constexpr, M: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, HALO: gl.constexpr,
):  # fmt: skip
    """D_X = D_SUM + both convolutions' results' gradients times the flipped taps, rows [first + M * program, ...).

    W_TILES describes (2 * TAPS * D, D) in tiles of CHUNK rows: the flipped taps of the narrow and then of the wide
    convolution, each (out, in). ``first`` is at least the wide convolution's reach. D_X may lie where D_SUM does.
    """
    dtype: gl.constexpr = W_TILES.dtype
    WARPS: gl.constexpr = gl.num_warps()
    PER_TAP: gl.constexpr = D // CHUNK
    STEPS: gl.constexpr = 2 * TAPS * PER_TAP
    # 64 bits: gradients may have more than 2^31 elements. Within a tile 32 bits are enough.
    first_row = first + gl.program_id(0).to(gl.int64) * M
    left = gl.minimum(n_rows - first_row, 2 * M).to(gl.int32)
    ring, full = open_ring(W_TILES, D, CHUNK, STAGES, STEPS)

    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    at = gl.arange(0, M, layout=gl.SliceLayout(1, SUM))
    at_sum = at[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, SUM))[None, :]
    d_sum = gl.load(D_SUM + first_row * D + at_sum, mask=(at < left)[:, None], other=0.0)
    gradient = open_tile(dtype, D, M)
    load_tile(D_NARROW, gradient, first_row, left, TAPS // 2, D, M, HALO)
    total = multiply(
        d_sum.to(gl.float32),  gradient, W_TILES, ring, full, 0, 0, 1, TAPS, D, M, CHUNK, STAGES, STEPS
    )  # fmt: skip
    # The wide convolution's gradient takes the place of the narrow one's, which every warp is now done with.
    thread_barrier()
    load_tile(D_WIDE, gradient, first_row, left, TAPS // 2 * DILATION, D, M, HALO)
    total = multiply(
        total, gradient, W_TILES, ring, full, TAPS * PER_TAP, 0, DILATION, TAPS, D, M, CHUNK, STAGES, STEPS
    )  # fmt: skip

    # Leaves by shared memory, 16 bytes at a time.
    PLANES: gl.constexpr = planes_layout(2 * M, D)
    tile = gradient.index(0)._reinterpret(dtype, [2 * M, D], PLANES).slice(0, M, 0)
    thread_barrier()
    tile.store(total.to(dtype))
    thread_barrier()
    COPY: gl.constexpr = copying_layout(M, D, WARPS)
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, COPY))
    places = rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
    gl.store(D_X + first_row * D + places, tile.load(COPY), mask=(rows < left)[:, None])
    close_ring(full, STAGES)


@gluon.jit
def _copy_rows(
    GRADIENT, X, gradient, x, step, begin, end, n_rows, shift, DILATION: gl.constexpr, D: gl.constexpr, K: gl.constexpr,
    STAGES: gl.constexpr, HALO: gl.constexpr,
):  # fmt: skip
    """Starts the copies of a step: K rows of the gradient, zeros from ``end``, and those of x that three taps take."""
    stage = step % STAGES
    first_row = begin + step * K
    COPY: gl.constexpr = copying_layout(K, D, gl.num_warps())
    PLANES: gl.constexpr = planes_layout(K, D)
    rows = gl.arange(0, K, layout=gl.SliceLayout(1, COPY))
    places = rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
    left = gl.minimum(end - first_row, K).to(gl.int32)
    async_copy.async_copy_global_to_shared(
        gradient.index(stage * (D // 8 * K))._reinterpret(gradient.dtype, [K, D], PLANES),
        GRADIENT + first_row * D + places, mask=(rows < left)[:, None],
    )  # fmt: skip
    middle = first_row + shift + DILATION
    left = gl.minimum(n_rows - middle, 2 * K).to(gl.int32)
    copy_tile(X, x, stage * (D // 8 * 2 * K), middle, left, DILATION, D, K, HALO)
    async_copy.commit_group()


@gluon.jit(**ANY_BATCH)
def weight_gradient_hopper_kernel(
    GRADIENT, X, PARTS, first, n_rows, rows_each,
    D: gl.constexpr, TAPS: gl.constexpr, DILATION: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr,
    HALO: gl.constexpr,
):  # fmt: skip
    """Program (part, three taps): PARTS[part, tap] (D, D) = sum over the part's rows of GRADIENT[r]^T X[r + shift].

    A part has ``rows_each`` rows, a multiple of K. ``first`` is at least the convolution's reach.
    """
    dtype: gl.constexpr = GRADIENT.dtype.element_ty
    part = gl.program_id(0) // (TAPS // 3)
    tap = gl.program_id(0) % (TAPS // 3) * 3
    # 64 bits: states may have more than 2^31 elements.
    begin = first + part.to(gl.int64) * rows_each
    end = gl.minimum(begin + rows_each, n_rows)
    shift = (tap - TAPS // 2) * DILATION
    # As ``open_tile``; of the gradient no more rows than a step has.
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    gradient = gl.allocate_shared_memory(dtype, [STAGES * (D // 8 * K), 1, 8], ROWS)
    x = gl.allocate_shared_memory(dtype, [STAGES * (D // 8 * 2 * K), 1, 8], ROWS)
    for step in gl.static_range(STAGES - 2):
        _copy_rows(GRADIENT, X, gradient, x, step, begin, end, n_rows, shift, DILATION, D, K, STAGES, HALO)

    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, D, 16])
    TURNED: gl.constexpr = planes_layout(K, D, True)
    X_PLANES: gl.constexpr = planes_layout(2 * K, D)
    sum0 = gl.zeros([D, D], gl.float32, SUM)
    sum1 = gl.zeros([D, D], gl.float32, SUM)
    sum2 = gl.zeros([D, D], gl.float32, SUM)
    for step in range(0, rows_each // K):
        stage = step % STAGES
        async_copy.wait_group(STAGES - 3)
        fence_async_shared()
        # Behind it, every warp has also waited for the products of the step before last, whose stage is filled below.
        thread_barrier()
        # One instruction's 16 rows at a time: further on within a view, Triton gives matrix descriptors a base offset,
        # which without swizzling has no meaning.
        for row in gl.static_range(0, K, 16):
            turned = gradient.index(stage * (D // 8 * K) + row)._reinterpret(dtype, [D, K], TURNED).slice(0, 16, 1)
            at = stage * (D // 8 * 2 * K) + row
            x0 = x.index(at)._reinterpret(dtype, [2 * K, D], X_PLANES).slice(0, 16, 0)
            x1 = x.index(at + DILATION)._reinterpret(dtype, [2 * K, D], X_PLANES).slice(0, 16, 0)
            x2 = x.index(at + 2 * DILATION)._reinterpret(dtype, [2 * K, D], X_PLANES).slice(0, 16, 0)
            sum0 = warpgroup_mma(turned, x0, sum0, is_async=True)
            sum1 = warpgroup_mma(turned, x1, sum1, is_async=True)
            sum2 = warpgroup_mma(turned, x2, sum2, is_async=True)
        sum0, sum1, sum2 = warpgroup_mma_wait(num_outstanding=3 * (K // 16), deps=[sum0, sum1, sum2])
        _copy_rows(
            GRADIENT, X, gradient, x, step + (STAGES - 2), begin, end, n_rows, shift, DILATION, D, K, STAGES, HALO
        )  # fmt: skip
    sum0, sum1, sum2 = warpgroup_mma_wait(num_outstanding=0, deps=[sum0, sum1, sum2])
    async_copy.wait_group(0)
    rows = gl.arange(0, D, layout=gl.SliceLayout(1, SUM))
    places = rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, SUM))[None, :]
    out = PARTS + (part * TAPS + tap).to(gl.int64) * (D * D) + places
    gl.store(out, sum0)
    gl.store(out + D * D, sum1)
    gl.store(out + 2 * D * D, sum2)


def configuration(channels: int, dtype: torch.dtype = torch.bfloat16) -> HopperConfiguration:
    """The tuned one of this machine, or the shipped one; of the gradient of x.

    Args:
        channels: D.
        dtype: of the states.
    """
    kernel = "local_block_backward_hopper"
    if (tuned := tuning.lookup(kernel, HopperConfiguration, 90, channels, dtype)) is not None:
        return tuned
    # Two programs to an SM: one's loads and stores run beside the other's products.
    return HopperConfiguration(rows=128, chunk=64, warps=8, stages=3 if channels == 128 else 6, registers=128)


def launch(
    d_narrow: Tensor,
    d_wide: Tensor,
    d_sum: Tensor,
    flipped: Tensor,
    gap: int,
    wide_dilation: int,
    chosen: HopperConfiguration,
) -> Tensor:
    """The gradient of x, (R, D), written over ``d_sum``.

    Args:
        d_narrow: (R, D), of the narrow convolution's result.
        d_wide: (R, D), of the wide one's.
        d_sum: (R, D), of the sum before the first norm.
        flipped: (2 * taps * D, D), the flipped taps of the narrow and then of the wide convolution, each (out, in).
        gap: rows before the first protein.
        wide_dilation: rows between the taps of the wide convolution.
        chosen: how to cut the launch.

    Raises:
        BackendError: the kernel cannot run these sizes here; says why.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    n_rows, channels = d_sum.shape
    taps, c = len(flipped) // (2 * channels), chosen
    reason = unsupported(channels, d_sum.dtype, taps, wide_dilation, gap)
    if reason:
        raise BackendError(f"the local block's gradient for Hopper: {reason}")
    tiles = TensorDescriptor.from_tensor(flipped, [c.chunk, channels], weight_layout())
    convolution_gradient_hopper_kernel[(triton.cdiv(n_rows - gap, c.rows),)](
        d_narrow, d_wide, tiles, d_sum, d_sum, gap, n_rows,
        D=channels, TAPS=taps, DILATION=wide_dilation, M=c.rows, CHUNK=c.chunk, STAGES=c.stages, HALO=HALO,
        num_warps=c.warps, maxnreg=c.registers,
    )  # fmt: skip
    return d_sum


def weights_configuration() -> HopperWeights:
    """The shipped one of the weights' gradients."""
    return HopperWeights(rows=64, stages=4)


def weights_unsupported(channels: int, dtype: torch.dtype, taps: int, dilation: int, gap: int) -> str | None:
    """Why the weights' gradients of these sizes are not for this kernel, or None where they are.

    Args:
        channels: D.
        dtype: of the states.
        taps: of the convolution.
        dilation: rows between them.
        gap: zero rows before the first protein.
    """
    reason = unsupported(channels, dtype, taps, dilation, gap)
    if reason is None and channels != WEIGHTS_CHANNELS:
        reason = f"d_local is {channels}, not {WEIGHTS_CHANNELS}"
    if reason is None and (taps % TAPS_AT_ONCE or 2 * dilation > WEIGHTS_HALO):
        reason = (
            f"{taps} taps {dilation} rows apart: the taps must be a multiple of {TAPS_AT_ONCE}, "
            f"no more than {WEIGHTS_HALO // 2} rows apart"
        )
    return reason


def launch_weights(
    gradient: Tensor, x: Tensor, taps: int, dilation: int, gap: int, n_programs: int, chosen: HopperWeights
) -> Tensor:
    """Parts of a convolution's weights' gradients, (parts, taps, D, D) float32, out by in, to be added in order.

    Args:
        gradient: (R, D), of the convolution's result.
        x: (R, D), its input.
        taps: of the convolution.
        dilation: rows between them.
        gap: rows before the first protein.
        n_programs: most that the rows are shared out among.
        chosen: how to cut the launch.

    Raises:
        BackendError: the kernel cannot run these sizes here; says why.
    """
    n_rows, channels = gradient.shape
    reason = weights_unsupported(channels, gradient.dtype, taps, dilation, gap)
    if reason:
        raise BackendError(f"the local block's weights' gradients for Hopper: {reason}")
    if n_rows == gap:  # no protein
        return gradient.new_zeros(1, taps, channels, channels, dtype=torch.float32)
    groups, c = taps // TAPS_AT_ONCE, chosen
    n_parts = max(1, min(n_programs // groups, triton.cdiv(n_rows - gap, 4 * c.rows)))
    rows_each = triton.cdiv(triton.cdiv(n_rows - gap, n_parts), c.rows) * c.rows
    n_parts = triton.cdiv(n_rows - gap, rows_each)
    parts = gradient.new_empty(n_parts, taps, channels, channels, dtype=torch.float32)
    weight_gradient_hopper_kernel[(n_parts * groups,)](
        gradient, x, parts, gap, n_rows, rows_each,
        D=channels, TAPS=taps, DILATION=dilation, K=c.rows, STAGES=c.stages, HALO=WEIGHTS_HALO, num_warps=8,
        maxnreg=None,
    )  # fmt: skip
    return parts
