"""The model's operations on the CPU: fixed-size pieces through the matrix libraries, fused passes in between.

Rows run through the convolutions in pieces of PIECE rows and proteins through the global track in groups of GROUP, the
last one filled up. A matrix library may choose another algorithm, and so other bits, for another shape; with one fixed
shape, a row's result is the same wherever it lies and whatever else is in the batch. Pieces also stay in the cache.
Small calls use pieces of SMALL_PIECE rows, on machines where those have been seen to give the same bits.

Gradients are those of the reference operations, recomputed block by block in the backward pass, so that training keeps
one local state per block and nothing else.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.reference import Attended, LocalBlockWeights, LocalStates
from proteinbert_fast.packing import PackedBatch

PIECE = 2048
SMALL_PIECE = 512
GROUP = 32
DTYPES = (torch.float32, torch.bfloat16)


def unsupported(config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run a model of these sizes in this dtype, or None when they can."""
    for name in ("d_local", "d_key", "d_value"):
        if getattr(config, name) % 16 or getattr(config, name) > 4096:
            return f"{name} is {getattr(config, name)}, not a multiple of 16 up to 4096"
    # A wider group would be shared out among threads, whose ends PyTorch computes by another formula than the middle.
    for name, width in (("d_global", config.d_global), ("n_heads * d_key", config.n_heads * config.d_key)):
        if width > 1024:
            return f"{name} is {width}, more than 1024"
    if dtype not in DTYPES:
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not float32 or bfloat16"
    return None


def in_groups(function: Callable[..., Tensor], *rows: Tensor, size: int = GROUP) -> Tensor:
    """``function`` over groups of exactly ``size`` rows, the last one filled up with zeros; results joined.

    Args:
        function: takes (size, ...) tensors, gives one (size, ...) tensor, row by row.
        rows: tensors (n, ...) of equal n.
        size: rows per call.
    """
    n = len(rows[0])
    results = []
    for first in range(0, max(n, 1), size):
        group = [r[first : first + size] for r in rows]
        if missing := size - len(group[0]):
            group = [torch.cat([g, g.new_zeros(missing, *g.shape[1:])]) for g in group]
        results.append(function(*group))
    return torch.cat(results)[:n] if len(results) > 1 else results[0][:n]


def local_block(
    x: Tensor,
    broadcast: Tensor,
    batch: PackedBatch,
    weights: LocalBlockWeights,
    wide_dilation: int,
    keep_hidden: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """``reference.local_block`` in two convolution calls, one product and two fused passes per piece.

    Args:
        x: (R, D) float32 or bfloat16, zeros in gap rows.
        broadcast: (B, D).
        batch: the packed layout.
        weights: the block's parameters; used in the dtype of ``x``.
        wide_dilation: rows between the taps of the wide convolution.
        keep_hidden: also return the states after the first norm.

    Returns:
        The hidden states (R, D) or None, and the new local states (R, D).
    """
    segments = batch.segments
    fast = partial(_local_block, batch, wide_dilation, keep_hidden)

    def plain(x: Tensor, broadcast: Tensor, *weights: Tensor) -> LocalStates:
        return reference.local_block(x, broadcast, segments, LocalBlockWeights(*weights), wide_dilation)

    if _needs_gradient(x, broadcast, *weights):
        hidden, local = _recomputed(fast, plain, x, broadcast, *weights)
    else:
        hidden, local = fast(x, broadcast, *weights)
    return (hidden if keep_hidden else None), local


def _local_block(
    batch: PackedBatch,
    wide_dilation: int,
    keep_hidden: bool,
    x: Tensor,
    broadcast: Tensor,
    *parameters: Tensor,
) -> LocalStates:
    w = LocalBlockWeights(*parameters)
    x = x.contiguous()
    channels, dtype = x.shape[1], x.dtype
    narrow_weight, wide_weight = (
        _convolution_weight(w.narrow_weight, dtype),
        _convolution_weight(w.wide_weight, dtype),
    )
    narrow_bias, wide_bias = w.narrow_bias.to(dtype), w.wide_bias.to(dtype)
    dense_weight, dense_bias = w.dense_weight.to(dtype), w.dense_bias.to(dtype)
    broadcast = broadcast.float().contiguous()
    norm1 = w.norm1_weight.float().contiguous(), w.norm1_bias.float().contiguous()
    norm2 = w.norm2_weight.float().contiguous(), w.norm2_bias.float().contiguous()
    segments = batch.segments
    near = narrow_weight.shape[-1] // 2
    far = near * wide_dilation
    is_bf16, threads = dtype == torch.bfloat16, torch.get_num_threads()
    small = _small_pieces_agree(channels, narrow_weight.shape[-1], wide_dilation, dtype, threads)

    local = torch.empty_like(x)
    local[: batch.gap] = 0
    hidden = torch.empty_like(x if keep_hidden else x[:0])
    if keep_hidden:
        hidden[: batch.gap] = 0
    scratch = x.new_zeros(PIECE, channels)
    for first, rows, size in _pieces(batch, small):
        window = _window(x, first - far, size + 2 * far)
        narrow = _convolution(window[far - near : size + far + near], narrow_weight, narrow_bias, 1)
        wide = _convolution(window, wide_weight, wide_bias, wide_dilation)
        merged = hidden[first : first + rows] if keep_hidden and rows == size else scratch[:size]
        _cpu_kernels.merge_convolutions(
            _row(window, far), _row(narrow), _row(wide), _row(broadcast), _row(segments, first),
            _row(norm1[0]), _row(norm1[1]), _row(merged), rows, channels, is_bf16, threads,
        )  # fmt: skip
        if keep_hidden and rows < size:
            hidden[first : first + rows] = merged[:rows]
        dense = F.linear(merged, dense_weight, dense_bias)
        _cpu_kernels.merge_dense(
            _row(merged), _row(dense), _row(segments, first),
            _row(norm2[0]), _row(norm2[1]), _row(local, first), rows, channels, is_bf16, threads,
        )  # fmt: skip
    return LocalStates(hidden, local)


def global_attention(
    local: Tensor,
    global_state: Tensor,
    batch: PackedBatch,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    return_weights: bool = False,
) -> Attended:
    """``reference.global_attention`` with keys and values in one product per piece and one fused pass behind it.

    Sums run over tiles of each protein counted from its own first row, then over its tiles, always in order.

    Args:
        local: (R, D) float32 or bfloat16, the block's new local states.
        global_state: (B, G), the global states from before the block.
        batch: the packed layout.
        query_weight: (H * K, G), head-major.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        return_weights: also return the softmax weights (R, H).
    """
    segments = batch.segments
    fast = partial(_global_attention, batch, n_heads, return_weights)

    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        local, global_state, query_weight, key_weight, value_weight = tensors
        attended = reference.global_attention(
            local, global_state, segments, query_weight, key_weight, value_weight, n_heads, return_weights
        )
        return attended.pooled, local.new_empty(0) if attended.weights is None else attended.weights

    tensors = (local, global_state, query_weight, key_weight, value_weight)
    pooled, weights = _recomputed(fast, plain, *tensors) if _needs_gradient(*tensors) else fast(*tensors)
    return Attended(pooled, weights if return_weights else None)


def _global_attention(
    batch: PackedBatch,
    n_heads: int,
    return_weights: bool,
    local: Tensor,
    global_state: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    local = local.contiguous()
    dtype, n_proteins = local.dtype, len(batch)
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    query_weight = query_weight.to(dtype)
    query = in_groups(lambda g: torch.tanh(F.linear(g, query_weight)), global_state.to(dtype)).float().contiguous()
    keys_values_weight = torch.cat([key_weight, value_weight]).to(dtype)
    slots = torch.zeros(n_proteins + 1, dtype=torch.int64)
    torch.cumsum(-(-batch.lengths // _cpu_kernels.TILE), 0, out=slots[1:])
    partials = torch.zeros(int(slots[-1]), n_heads, 1 + d_value)
    weights = torch.zeros(batch.n_rows if return_weights else 0, n_heads)
    is_bf16, threads = dtype == torch.bfloat16, torch.get_num_threads()
    keys_values = local.new_empty(SMALL_PIECE, len(keys_values_weight))
    for first in range(batch.gap, batch.n_rows, SMALL_PIECE):
        rows = min(SMALL_PIECE, batch.n_rows - first)
        torch.mm(_window(local, first, SMALL_PIECE), keys_values_weight.t(), out=keys_values)
        _cpu_kernels.attention(
            _row(keys_values), _row(query), _row(batch.starts), _row(batch.lengths), _row(slots), n_proteins,
            _row(partials), weights.data_ptr() if return_weights else 0,
            first, rows, n_heads, d_key, d_value, is_bf16, threads,
        )  # fmt: skip
    pooled = torch.empty(n_proteins, n_heads * d_value)
    denominators = torch.empty(n_proteins, n_heads)
    _cpu_kernels.attention_finish(
        _row(partials), _row(slots), n_proteins, _row(pooled), _row(denominators), n_heads, d_value
    )
    if return_weights:
        weights /= F.pad(denominators, (0, 0, 0, 1), value=1.0)[batch.segments]
    return pooled.to(dtype), weights


class _Recomputed(torch.autograd.Function):
    """``fast(*tensors)`` forward; backward through ``plain(*tensors)``, the same and differentiable."""

    @staticmethod
    def forward(ctx: Any, fast: Callable[..., Any], plain: Callable[..., Any], *tensors: Tensor) -> Any:
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return tuple(fast(*tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        inputs = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        compute_dtype = inputs[0].dtype
        with (
            torch.enable_grad(),
            torch.autocast("cpu", compute_dtype, enabled=compute_dtype != torch.float32),
        ):
            outputs = ctx.plain(*inputs)
        used = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t in inputs if t.requires_grad]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in used], wanted, [g.to(o.dtype).view_as(o) for o, g in used], allow_unused=True
            )
        )
        return None, None, *(next(found) if t.requires_grad else None for t in inputs)


def _recomputed(
    fast: Callable[..., tuple[Tensor, ...]], plain: Callable[..., tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = _Recomputed.apply(fast, plain, *tensors)  # type: ignore[no-untyped-call]
    return results


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _pieces(batch: PackedBatch, small: bool) -> Iterator[tuple[int, int, int]]:
    """First row, rows in use and size of each piece; the gap before the first protein is in none."""
    first = batch.gap
    while left := batch.n_rows - first:
        size = SMALL_PIECE if small and left <= PIECE - SMALL_PIECE else PIECE
        yield first, min(size, left), size
        first += min(size, left)


@lru_cache
def _small_pieces_agree(channels: int, taps: int, wide_dilation: int, dtype: torch.dtype, threads: int) -> bool:
    """Whether this machine's libraries give a row the same bits in a small piece as in a large one."""
    del threads  # part of the key: the libraries may split the work otherwise
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        reach = taps // 2 * wide_dilation
        x = torch.randn(PIECE + 2 * reach, channels).to(dtype)
        weight = _convolution_weight(torch.randn(channels, channels, taps), dtype)
        dense_weight = torch.randn(channels, channels).to(dtype)
        bias = torch.randn(channels).to(dtype)

        def products(rows: Tensor) -> tuple[Tensor, ...]:
            near = rows[reach - taps // 2 : len(rows) - reach + taps // 2]
            narrow = _convolution(near, weight, bias, 1)
            return (
                narrow,
                _convolution(rows, weight, bias, wide_dilation),
                F.linear(narrow, dense_weight, bias),
            )

        large = products(x)
        return all(
            torch.equal(small, whole[first : first + SMALL_PIECE])
            for first in range(0, PIECE, SMALL_PIECE)
            for small, whole in zip(products(x[first : first + SMALL_PIECE + 2 * reach]), large, strict=True)
        )


def _window(x: Tensor, first: int, rows: int) -> Tensor:
    """Rows [first, first + rows) of x, with zeros beyond its end."""
    window = x[first : first + rows]
    return window if len(window) == rows else F.pad(window, (0, 0, 0, rows - len(window)))


def _convolution_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _convolution(rows: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """The convolution of rows (n, D) where it needs no padding; a channels-last image of height 1 to the library."""
    image = F.conv2d(rows[None, None].permute(0, 3, 1, 2), weight, bias, dilation=(1, dilation))
    return image.permute(0, 2, 3, 1)[0, 0]


def _row(x: Tensor, row: int = 0) -> int:
    """Address of a row of a contiguous tensor."""
    assert x.is_contiguous()
    return x.data_ptr() + row * x.stride(0) * x.element_size()
