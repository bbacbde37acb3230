"""The model's operations on the CPU: the local block and global attention as one pass each, see csrc/cpu_kernels.cpp.

A row's result does not depend on where it lies and what else is in the batch. Our kernels sum in one fixed order; what
goes through a matrix library, the global track and the heads, does so in groups of a fixed number of rows, the last one
filled up, because a library may choose another algorithm, and so other bits, for another shape.

The backward pass has kernels of its own for all that goes row by row; gradients of matrices, which are products over
all rows, are left to the matrix library. The forward pass has the same bits with gradients and without.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import (
    Attended,
    GlobalBlockWeights,
    GlobalStates,
    LocalBlockWeights,
    Message,
    MessageWeights,
)
from proteinbert_fast.packing import PackedBatch

PROTEIN_GROUP = 16
ROW_GROUP = 2048
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


def in_groups(function: Callable[..., Tensor], *rows: Tensor, size: int = PROTEIN_GROUP) -> Tensor:
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
    save: Literal["preactivations", "inputs"] = "preactivations",
) -> tuple[Tensor | None, Tensor]:
    """``reference.local_block`` in one pass.

    Args:
        x: (R, D) float32 or bfloat16, zeros in gap rows.
        broadcast: (B, D).
        batch: the packed layout.
        weights: the block's parameters; used in the dtype of ``x``.
        wide_dilation: rows between the taps of the wide convolution.
        keep_hidden: also return the states after the first norm.
        save: what to keep for the backward pass beside ``x``: what the convolutions gave, or nothing.

    Returns:
        The hidden states (R, D) or None, and the new local states (R, D).
    """
    arguments = (batch, wide_dilation, keep_hidden, save == "preactivations")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, broadcast, *weights)):
        hidden, local = _LocalBlock.apply(*arguments, x, broadcast, *weights)  # type: ignore[no-untyped-call]
    else:
        hidden, local, _, _ = _local_block(*arguments[:3], False, x, broadcast, weights)
    return (hidden if keep_hidden else None), local


class _LocalBlock(torch.autograd.Function):
    """``_local_block`` with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: PackedBatch,
        wide_dilation: int,
        keep_hidden: bool,
        keep_convolutions: bool,
        x: Tensor,
        broadcast: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = LocalBlockWeights(*parameters)
        ctx.set_materialize_grads(False)
        ctx.batch, ctx.wide_dilation = batch, wide_dilation
        hidden, local, *convolved = _local_block(
            batch, wide_dilation, keep_hidden, keep_convolutions, x, broadcast, weights
        )
        ctx.save_for_backward(x, broadcast, *weights, *(convolved if keep_convolutions else []))
        return hidden, local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor | None, d_local: Tensor | None) -> Any:
        batch, wide_dilation = ctx.batch, ctx.wide_dilation
        x, broadcast, *rest = ctx.saved_tensors
        weights, convolved = LocalBlockWeights(*rest[:10]), rest[10:]
        if not convolved:
            _, _, *convolved = _local_block(batch, wide_dilation, False, True, x, broadcast, weights)
        wanted = ctx.needs_input_grad[4:]
        d_x, d_broadcast, d_weights = _local_block_backward(
            batch, wide_dilation, x, broadcast, weights, convolved, d_hidden, d_local, wanted
        )
        return None, None, None, None, d_x, d_broadcast, *d_weights


def _local_block(
    batch: PackedBatch,
    wide_dilation: int,
    keep_hidden: bool,
    keep_convolutions: bool,
    x: Tensor,
    broadcast: Tensor,
    weights: LocalBlockWeights,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden and local states, and what the convolutions gave, rows of gaps left as they were; (0,) where not kept."""
    x, broadcast = x.contiguous(), broadcast.float().contiguous()
    local = torch.empty_like(x)
    hidden = torch.empty_like(x) if keep_hidden else x.new_empty(0)
    narrow, wide = (torch.empty_like(x) if keep_convolutions else x.new_empty(0) for _ in range(2))
    # Units of work end before the last gap: what they widen reaches into it.
    first, last = batch.gap, max(batch.n_rows - batch.gap, batch.gap)
    for state in (hidden, local):
        state[:first] = 0
        state[last:] = 0
    as_kernels_take_them = _in_dtype(weights, x.dtype)
    _cpu_kernels.local_block(
        x.data_ptr(), broadcast.data_ptr(), batch.segments.data_ptr(), [t.data_ptr() for t in as_kernels_take_them],
        hidden.data_ptr() if keep_hidden else 0, local.data_ptr(),
        narrow.data_ptr() if keep_convolutions else 0, wide.data_ptr() if keep_convolutions else 0,
        first, last, x.shape[1], weights.narrow_weight.shape[-1], wide_dilation,
        x.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return hidden, local, narrow, wide


def _in_dtype(weights: LocalBlockWeights, dtype: torch.dtype) -> list[Tensor]:
    """Products take their weights in the states' dtype; all that is added or scaled with stays float32."""
    factors = {"narrow_weight", "wide_weight", "dense_weight"}
    return [
        t.to(dtype if name in factors else torch.float32).contiguous()
        for name, t in zip(weights._fields, weights, strict=True)
    ]


def _local_block_backward(
    batch: PackedBatch,
    wide_dilation: int,
    x: Tensor,
    broadcast: Tensor,
    weights: LocalBlockWeights,
    convolved: list[Tensor],
    d_hidden: Tensor | None,
    d_local: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    x, broadcast_float = x.contiguous(), broadcast.float().contiguous()
    n_rows, channels = x.shape
    is_bf16, threads = x.dtype == torch.bfloat16, torch.get_num_threads()
    d_local = torch.zeros_like(x) if d_local is None else d_local.contiguous()
    d_hidden = None if d_hidden is None else d_hidden.contiguous()
    factors = LocalBlockWeights(*_in_dtype(weights, x.dtype))
    hidden, d_dense, d_narrow, d_wide, d_sum = results = [torch.empty_like(x) for _ in range(5)]
    d_x = torch.empty_like(x) if wanted[0] else None
    sums = torch.empty(-(-n_rows // _cpu_kernels.UNIT), _cpu_kernels.SUMS, channels)
    _cpu_kernels.local_block_backward(
        x.data_ptr(), broadcast_float.data_ptr(), batch.segments.data_ptr(), [t.data_ptr() for t in factors],
        convolved[0].data_ptr(), convolved[1].data_ptr(),
        d_local.data_ptr(), 0 if d_hidden is None else d_hidden.data_ptr(), [t.data_ptr() for t in results],
        0 if d_x is None else d_x.data_ptr(), sums.data_ptr(),
        batch.gap, n_rows, channels, weights.narrow_weight.shape[-1], wide_dilation, is_bf16, threads,
    )  # fmt: skip
    d_broadcast = None
    if wanted[1]:
        d_broadcast = _sums(d_sum, batch.starts, batch.lengths).to(broadcast.dtype)
    narrow_bias, wide_bias, norm1_weight, norm1_bias, dense_bias, norm2_weight, norm2_bias = sums[0]
    wants = dict(zip(weights._fields, wanted[2:], strict=True))
    narrow_weight = wide_weight = dense_weight = None
    if wants["narrow_weight"]:
        narrow_weight = _convolution_weight(d_narrow, x, factors.narrow_weight, 1)
    if wants["wide_weight"]:
        wide_weight = _convolution_weight(d_wide, x, factors.wide_weight, wide_dilation)
    if wants["dense_weight"]:
        dense_weight = d_dense.t() @ hidden
    gradients = (
        narrow_weight, narrow_bias, wide_weight, wide_bias, norm1_weight, norm1_bias,
        dense_weight, dense_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    d_weights = [
        g.to(w.dtype, memory_format=torch.contiguous_format) if g is not None and is_wanted else None
        for g, w, is_wanted in zip(gradients, weights, wants.values(), strict=True)
    ]
    return d_x, d_broadcast, d_weights


def _convolution_weight(gradient: Tensor, x: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """The gradient of the weight of ``reference.convolution``, (D, D, taps), from that of its result."""
    images = (rows[None, None].permute(0, 3, 1, 2) for rows in (gradient, x))
    found: Tensor = torch.ops.aten.convolution_backward(
        *images, weight.unsqueeze(2), None, [1, 1], [0, weight.shape[-1] // 2 * dilation], [1, dilation],
        False, [0, 0], 1, [False, True, False],
    )[1]  # fmt: skip
    return found.squeeze(2)


def _sums(rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Sums of (R, C) rows over each protein, in order: float32 (B, C)."""
    sums = torch.empty(len(starts), rows.shape[1])
    _cpu_kernels.protein_sums(
        rows.data_ptr(), starts.data_ptr(), lengths.data_ptr(), len(starts),
        sums.data_ptr(), rows.shape[1], rows.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return sums


def global_attention(
    local: Tensor,
    query: Tensor,
    batch: PackedBatch,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    return_weights: bool = False,
) -> Attended:
    """``reference.global_attention`` in one pass; keys and values are never stored.

    Sums run over tiles of each protein counted from its own first row, then over its tiles, always in order.

    Args:
        local: (R, D) float32 or bfloat16, the block's new local states.
        query: (B, H * K), heads concatenated, of the global states from before the block.
        batch: the packed layout.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        return_weights: also return the softmax weights (R, H).
    """
    tensors = (local, query, key_weight, value_weight)
    if return_weights:
        segments = batch.segments

        def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            local, query, key_weight, value_weight = tensors
            attended = reference.global_attention(local, query, segments, key_weight, value_weight, n_heads, True)
            return attended.pooled, cast(Tensor, attended.weights)

        pooled, weights = recomputed(partial(_global_attention, batch, n_heads, True), plain, *tensors)
        return Attended(pooled, weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Attended(_GlobalAttention.apply(batch, n_heads, *tensors), None)  # type: ignore[no-untyped-call]
    return Attended(_global_attention(batch, n_heads, False, *tensors)[0], None)


class _GlobalAttention(torch.autograd.Function):
    """``_global_attention`` with gradients; keys and values are computed again for them."""

    @staticmethod
    def forward(
        ctx: Any,
        batch: PackedBatch,
        n_heads: int,
        local: Tensor,
        query: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
    ) -> Tensor:
        pooled, denominators = _pooled(batch, n_heads, local, query, key_weight, value_weight)[:2]
        ctx.batch, ctx.n_heads = batch, n_heads
        ctx.save_for_backward(local, query, key_weight, value_weight, pooled, denominators)
        return pooled.to(local.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_pooled: Tensor) -> Any:
        batch, n_heads = ctx.batch, ctx.n_heads
        local, query, key_weight, value_weight, pooled, denominators = ctx.saved_tensors
        local, d_pooled = local.contiguous(), d_pooled.float().contiguous()
        query_float = query.float().contiguous()
        n_rows, channels = local.shape
        n_keys, n_values = len(key_weight), len(value_weight)
        weight = torch.cat([key_weight.to(local.dtype), value_weight.to(local.dtype)])
        slots = _slots(batch)
        d_products, d_local = local.new_empty(n_rows, n_keys + n_values), torch.empty_like(local)
        d_query = torch.empty(int(slots[-1]), n_keys)
        gaps = (batch.segments < 0).nonzero()[:, 0]
        d_products[gaps] = 0
        d_local[gaps] = 0
        _cpu_kernels.attention_backward(
            local.data_ptr(), weight.data_ptr(), query_float.data_ptr(),
            batch.starts.data_ptr(), batch.lengths.data_ptr(), slots.data_ptr(), len(batch),
            denominators.data_ptr(), pooled.data_ptr(), d_pooled.data_ptr(),
            d_products.data_ptr(), d_local.data_ptr(), d_query.data_ptr(),
            channels, n_heads, n_keys // n_heads, n_values // n_heads,
            local.dtype == torch.bfloat16, torch.get_num_threads(),
        )  # fmt: skip
        wants_local, wants_query, wants_key, wants_value = ctx.needs_input_grad[2:]
        d_weight = d_products.t() @ local if wants_key or wants_value else weight
        return (
            None,
            None,
            d_local if wants_local else None,
            _sums(d_query, slots[:-1], slots.diff()).to(query.dtype) if wants_query else None,
            d_weight[:n_keys].to(key_weight.dtype) if wants_key else None,
            d_weight[n_keys:].to(value_weight.dtype) if wants_value else None,
        )


def _slots(batch: PackedBatch) -> Tensor:
    """The first tile of each protein, and how many there are, int64 (B + 1,)."""
    slots = torch.zeros(len(batch) + 1, dtype=torch.int64)
    torch.cumsum(-(-batch.lengths // _cpu_kernels.TILE), 0, out=slots[1:])
    return slots


def _pooled(
    batch: PackedBatch,
    n_heads: int,
    local: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    return_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled values (B, H * V), denominators (B, H) and, or (0, H), numerators of weights (R, H), all float32."""
    local = local.contiguous()
    dtype, n_proteins = local.dtype, len(batch)
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    query = query.float().contiguous()
    key_weight, value_weight = key_weight.to(dtype).contiguous(), value_weight.to(dtype).contiguous()
    slots = _slots(batch)
    partials = torch.empty(int(slots[-1]), n_heads, 1 + d_value)
    weights = torch.zeros(batch.n_rows if return_weights else 0, n_heads)
    _cpu_kernels.attention(
        local.data_ptr(), key_weight.data_ptr(), value_weight.data_ptr(), query.data_ptr(),
        batch.starts.data_ptr(), batch.lengths.data_ptr(), slots.data_ptr(), n_proteins,
        partials.data_ptr(), weights.data_ptr() if return_weights else 0,
        local.shape[1], n_heads, d_key, d_value, dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    pooled = torch.empty(n_proteins, n_heads * d_value)
    denominators = torch.empty(n_proteins, n_heads)
    _cpu_kernels.attention_finish(
        partials.data_ptr(), slots.data_ptr(), n_proteins, pooled.data_ptr(), denominators.data_ptr(), n_heads, d_value
    )
    return pooled, denominators, weights


def _global_attention(
    batch: PackedBatch,
    n_heads: int,
    return_weights: bool,
    local: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    pooled, denominators, weights = _pooled(batch, n_heads, local, query, key_weight, value_weight, return_weights)
    if return_weights:
        weights /= F.pad(denominators, (0, 0, 0, 1), value=1.0)[batch.segments]
    return pooled.to(local.dtype), weights


def global_block(global_state: Tensor, pooled: Tensor, weights: GlobalBlockWeights) -> GlobalStates:
    """``reference.global_block`` in groups."""
    both = in_groups(lambda g, p: torch.cat(reference.global_block(g, p, weights), dim=-1), global_state, pooled)
    return GlobalStates(*both.chunk(2, dim=-1))


def message(global_state: Tensor, weights: MessageWeights) -> Message:
    """``reference.message`` in groups."""
    both = in_groups(lambda g: torch.cat(reference.message(g, weights), dim=-1), global_state)
    n_queries = len(weights.query_weight)
    return Message(both[:, :n_queries], both[:, n_queries:])


def sum_annotations(annotations: Tensor | tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """``reference.sum_annotations``, dense ones in groups."""
    if isinstance(annotations, Tensor):
        return in_groups(lambda dense: reference.sum_annotations(dense, weight), annotations)
    return reference.sum_annotations(annotations, weight)
