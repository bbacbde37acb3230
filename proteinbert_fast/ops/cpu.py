"""The model's operations on the CPU: the local block and global attention as one pass each, see csrc/cpu_kernels.cpp.

A row's result does not depend on where it lies and what else is in the batch. Our kernels sum in one fixed order; what
goes through a matrix library, the global track and the heads, does so in groups of a fixed number of rows, the last one
filled up, because a library may choose another algorithm, and so other bits, for another shape.

Gradients are those of the reference operations, recomputed block by block in the backward pass, so that training keeps
one local state per block and nothing else.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import (
    Attended,
    GlobalBlockWeights,
    GlobalStates,
    LocalBlockWeights,
    LocalStates,
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
) -> tuple[Tensor | None, Tensor]:
    """``reference.local_block`` in one pass.

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

    hidden, local = recomputed(fast, plain, x, broadcast, *weights)
    return (hidden if keep_hidden else None), local


def _local_block(
    batch: PackedBatch,
    wide_dilation: int,
    keep_hidden: bool,
    x: Tensor,
    broadcast: Tensor,
    *parameters: Tensor,
) -> LocalStates:
    x = x.contiguous()
    channels, dtype = x.shape[1], x.dtype
    w = LocalBlockWeights(*parameters)
    broadcast = broadcast.float().contiguous()
    # Products take their weights in the states' dtype; all that is added or scaled with stays float32.
    factors = {"narrow_weight", "wide_weight", "dense_weight"}
    weights = [
        t.to(dtype if name in factors else torch.float32).contiguous() for name, t in zip(w._fields, w, strict=True)
    ]
    local = torch.empty_like(x)
    hidden = torch.empty_like(x) if keep_hidden else x.new_empty(0)
    for state in (hidden, local):
        state[: batch.gap] = 0
    _cpu_kernels.local_block(
        x.data_ptr(), broadcast.data_ptr(), batch.segments.data_ptr(), [t.data_ptr() for t in weights],
        hidden.data_ptr() if keep_hidden else 0, local.data_ptr(),
        batch.gap, batch.n_rows, channels, w.narrow_weight.shape[-1], wide_dilation,
        dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return LocalStates(hidden, local)


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
    segments = batch.segments
    fast = partial(_global_attention, batch, n_heads, return_weights)

    def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        local, query, key_weight, value_weight = tensors
        attended = reference.global_attention(local, query, segments, key_weight, value_weight, n_heads, return_weights)
        return attended.pooled, local.new_empty(0) if attended.weights is None else attended.weights

    pooled, weights = recomputed(fast, plain, local, query, key_weight, value_weight)
    return Attended(pooled, weights if return_weights else None)


def _global_attention(
    batch: PackedBatch,
    n_heads: int,
    return_weights: bool,
    local: Tensor,
    query: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    local = local.contiguous()
    dtype, n_proteins = local.dtype, len(batch)
    d_key, d_value = len(key_weight) // n_heads, len(value_weight) // n_heads
    query = query.float().contiguous()
    key_weight, value_weight = key_weight.to(dtype).contiguous(), value_weight.to(dtype).contiguous()
    slots = torch.zeros(n_proteins + 1, dtype=torch.int64)
    torch.cumsum(-(-batch.lengths // _cpu_kernels.TILE), 0, out=slots[1:])
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
    if return_weights:
        weights /= F.pad(denominators, (0, 0, 0, 1), value=1.0)[batch.segments]
    return pooled.to(dtype), weights


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
