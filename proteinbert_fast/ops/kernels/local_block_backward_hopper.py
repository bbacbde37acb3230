"""The gradient of the local block's x on Hopper: a tile of each convolution's gradient is read once.

``local_block_backward.py`` reads such a tile again for each tap. Here it stays in shared memory, and products take
shifted views of it while weights stream past: the parts are those of ``local_block_hopper.py``. Imported when first
used.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from proteinbert_fast.errors import BackendError
from proteinbert_fast.ops.kernels.local_block import HopperConfiguration
from proteinbert_fast.ops.kernels.local_block_hopper import (
    HALO,
    close_ring,
    copying_layout,
    load_tile,
    multiply,
    open_ring,
    open_tile,
    planes_layout,
    unsupported,
    weight_layout,
)


@gluon.jit
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
    gl.thread_barrier()
    load_tile(D_WIDE, gradient, first_row, left, TAPS // 2 * DILATION, D, M, HALO)
    total = multiply(
        total, gradient, W_TILES, ring, full, TAPS * PER_TAP, 0, DILATION, TAPS, D, M, CHUNK, STAGES, STEPS
    )  # fmt: skip

    # Leaves by shared memory, 16 bytes at a time.
    PLANES: gl.constexpr = planes_layout(2 * M, D)
    tile = gradient.index(0)._reinterpret(dtype, [2 * M, D], PLANES).slice(0, M, 0)
    gl.thread_barrier()
    tile.store(total.to(dtype))
    gl.thread_barrier()
    COPY: gl.constexpr = copying_layout(M, D, WARPS)
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, COPY))
    places = rows[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, COPY))[None, :]
    gl.store(D_X + first_row * D + places, tile.load(COPY), mask=(rows < left)[:, None])
    close_ring(full, STAGES)


def configuration(channels: int) -> HopperConfiguration:
    """The shipped one: two programs to an SM, one's loads and stores beside the other's products."""
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
