"""The model's operations on the CPU: the local block and global attention as one pass each, see csrc/cpu/.

A row's result does not depend on where it lies and what else is in the batch. Our kernels, the global track's too, sum
in one fixed order; what goes through a matrix library, the heads, does so in groups of a fixed number of rows, the last
one filled up, because a library may choose another algorithm, and so other bits, for another shape.

The backward pass has kernels of its own too, whose sums over all rows run in one order for any number of threads. Only
where attention weights are asked for do attention's gradients come from the plain operations. The forward pass has the
same bits with gradients and without.
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
from proteinbert_fast.ops.instruction_sets import KERNELS_VERSION as KERNELS_VERSION
from proteinbert_fast.ops.instruction_sets import force_instruction_set as force_instruction_set
from proteinbert_fast.ops.instruction_sets import kernels_in_use as kernels_in_use
from proteinbert_fast.ops.prepared import prepared
from proteinbert_fast.ops.recompute import recomputed
from proteinbert_fast.ops.reference import (
    Attended,
    Embedded,
    GlobalBlockWeights,
    GlobalStates,
    LocalBlockWeights,
    Message,
    MessageWeights,
)
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.processors import usable_processors

PROTEIN_GROUP = 16
ROW_GROUP = 2048
DTYPES = (torch.float32, torch.bfloat16)


def kernel_threads() -> int:
    """Threads that kernels run on: as many as PyTorch's operations, but no more than can run at the same time."""
    return min(torch.get_num_threads(), usable_processors())


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
    x: Tensor | Embedded,
    broadcast: Tensor,
    batch: PackedBatch,
    weights: LocalBlockWeights,
    wide_dilation: int,
    keep_hidden: bool = False,
    save: Literal["preactivations", "inputs"] = "preactivations",
) -> tuple[Tensor | None, Tensor]:
    """``reference.local_block`` in one pass.

    Args:
        x: (R, D) float32 or bfloat16, zeros in gap rows; or the tokens that have these states, whose convolutions are
            sums of rows of a small table.
        broadcast: (B, D).
        batch: the packed layout.
        weights: the block's parameters; used in the dtype of ``x``.
        wide_dilation: rows between the taps of the wide convolution.
        keep_hidden: also return the states after the first norm.
        save: what to keep for the backward pass beside ``x``: what the convolutions gave, or nothing.

    Returns:
        The hidden states (R, D) or None, and the new local states (R, D).
    """
    tokens, states = (x.tokens, x.weight) if isinstance(x, Embedded) else (None, x)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (states, broadcast, *weights)):
        hidden, local = _LocalBlock.apply(  # type: ignore[no-untyped-call]
            batch, wide_dilation, keep_hidden, save == "preactivations", tokens, states, broadcast, *weights
        )
    else:
        hidden, local, _, _ = _local_block(batch, wide_dilation, keep_hidden, False, tokens, states, broadcast, weights)
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
        tokens: Tensor | None,
        states: Tensor,
        broadcast: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = LocalBlockWeights(*parameters)
        ctx.set_materialize_grads(False)
        ctx.batch, ctx.wide_dilation = batch, wide_dilation
        hidden, local, *convolved = _local_block(
            batch, wide_dilation, keep_hidden, keep_convolutions, tokens, states, broadcast, weights
        )
        ctx.save_for_backward(tokens, states, broadcast, *weights, *(convolved if keep_convolutions else []))
        return hidden, local

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hidden: Tensor | None, d_local: Tensor | None) -> Any:
        batch, wide_dilation = ctx.batch, ctx.wide_dilation
        tokens, states, broadcast, *rest = ctx.saved_tensors
        weights, convolved = LocalBlockWeights(*rest[:10]), rest[10:]
        if not convolved:
            _, _, *convolved = _local_block(batch, wide_dilation, False, True, tokens, states, broadcast, weights)
        d_states, d_broadcast, d_weights = _local_block_backward(
            batch, wide_dilation, tokens, states, broadcast, weights, convolved, d_hidden, d_local,
            ctx.needs_input_grad[5:],
        )  # fmt: skip
        return None, None, None, None, None, d_states, d_broadcast, *d_weights


def _local_block(
    batch: PackedBatch,
    wide_dilation: int,
    keep_hidden: bool,
    keep_convolutions: bool,
    tokens: Tensor | None,
    states: Tensor,
    broadcast: Tensor,
    weights: LocalBlockWeights,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden and local states, and what the convolutions gave, rows of gaps left as they were; (0,) where not kept.

    ``states`` are rows, or where ``tokens`` are given the 26 tokens' states.
    """
    x, tokens = (states.contiguous(), None) if tokens is None else (None, tokens.to(torch.uint8).contiguous())
    broadcast = broadcast.float().contiguous()
    shape = batch.n_rows, states.shape[1]
    local = states.new_empty(shape)
    nothing = states.new_empty(0)
    hidden = states.new_empty(shape) if keep_hidden else nothing
    narrow = states.new_empty(shape) if keep_convolutions else nothing
    wide = states.new_empty(shape) if keep_convolutions else nothing
    _cpu_kernels.local_block(
        packed_local_block(weights, states, tokens is not None, wide_dilation, backward=False),
        _address(x), _address(tokens), broadcast.data_ptr(), batch.segments.data_ptr(),
        hidden.data_ptr() if keep_hidden else 0, local.data_ptr(),
        narrow.data_ptr() if keep_convolutions else 0, wide.data_ptr() if keep_convolutions else 0,
        batch.starts.data_ptr(), batch.lengths.data_ptr(), len(batch.lengths), batch.gap, batch.n_rows,
        kernel_threads(),
    )  # fmt: skip
    return hidden, local, narrow, wide


def packed_local_block(
    weights: LocalBlockWeights, states: Tensor, takes_tokens: bool, wide_dilation: int, backward: bool
) -> _cpu_kernels.Packed:
    """Weights as this CPU's kernels take them; ``states`` are those of each token where the block takes tokens."""
    key = (states.dtype, wide_dilation, backward, _cpu_kernels.instruction_set())
    if takes_tokens:
        return prepared(_pack_first_block, states, *weights, key=key)
    return prepared(_pack_local_block, *weights, key=key)


def _pack_first_block(states: Tensor, *weights_and_key: Any) -> _cpu_kernels.Packed:
    # Those of gaps too.
    return _pack(F.pad(states.detach(), (0, 0, 0, 1)).contiguous(), *weights_and_key)


def _pack_local_block(*weights_and_key: Any) -> _cpu_kernels.Packed:
    return _pack(None, *weights_and_key)


def _pack(embedding: Tensor | None, *weights_and_key: Any) -> _cpu_kernels.Packed:
    *parameters, dtype, wide_dilation, backward, _ = weights_and_key
    weights = LocalBlockWeights(*parameters)
    channels, _, taps = weights.narrow_weight.shape
    factors = _in_dtype(weights, dtype)
    return _cpu_kernels.pack_local_block(
        list(map(_address, factors)), _address(embedding), channels, taps, wide_dilation, backward,
        dtype == torch.bfloat16, kernel_threads(),
    )  # fmt: skip


def _floats(*shape: int) -> Tensor:
    """Room for float32, whatever PyTorch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    tokens: Tensor | None,
    states: Tensor,
    broadcast: Tensor,
    weights: LocalBlockWeights,
    convolved: list[Tensor],
    d_hidden: Tensor | None,
    d_local: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    x, tokens = (states.contiguous(), None) if tokens is None else (None, tokens.to(torch.uint8).contiguous())
    broadcast_float = broadcast.float().contiguous()
    shape, taps = (batch.n_rows, states.shape[1]), weights.narrow_weight.shape[-1]
    wants = dict(zip(("states", "broadcast", *weights._fields), wanted, strict=True))
    d_local = states.new_zeros(shape) if d_local is None else d_local.contiguous()
    d_hidden = None if d_hidden is None else d_hidden.contiguous()
    factors = LocalBlockWeights(*_in_dtype(weights, states.dtype))
    hidden, d_dense, d_narrow, d_wide, d_sum = results = [states.new_empty(shape) for _ in range(5)]
    d_x = d_tables = None
    if tokens is None and wants["states"]:
        d_x = states.new_empty(shape)
    elif tokens is not None and (wants["states"] or wants["narrow_weight"] or wants["wide_weight"]):
        d_tables = _floats(_cpu_kernels.PARTS, len(states) + 1, 2 * taps + 1, shape[1])
    sums = _floats(-(-batch.n_rows // _cpu_kernels.UNIT), _cpu_kernels.SUMS, shape[1])
    _cpu_kernels.local_block_backward(
        packed_local_block(weights, states, tokens is not None, wide_dilation, backward=True),
        _address(x), _address(tokens), broadcast_float.data_ptr(), batch.segments.data_ptr(),
        convolved[0].data_ptr(), convolved[1].data_ptr(),
        d_local.data_ptr(), _address(d_hidden), list(map(_address, results)),
        _address(d_x), _address(d_tables), sums.data_ptr(),
        batch.starts.data_ptr(), batch.lengths.data_ptr(), len(batch.lengths), batch.gap, batch.n_rows,
        kernel_threads(),
    )  # fmt: skip
    d_broadcast = None
    if wants["broadcast"]:
        d_broadcast = _sums(d_sum, batch.starts, batch.lengths).to(broadcast.dtype)
    narrow_bias, wide_bias, norm1_weight, norm1_bias, dense_bias, norm2_weight, norm2_bias = sums[0].clone()
    d_states, narrow_weight, wide_weight, dense_weight = d_x, None, None, None
    if d_tables is not None:
        d_states, narrow_weight, wide_weight = _back_from_tables(d_tables[0, :-1], states, factors)
    if x is not None and wants["narrow_weight"]:
        narrow_weight = _weight_gradient(d_narrow, x, batch.gap, taps)
    if x is not None and wants["wide_weight"]:
        wide_weight = _weight_gradient(d_wide, x, batch.gap, taps, wide_dilation)
    if wants["dense_weight"]:
        dense_weight = _weight_gradient(d_dense, hidden, batch.gap).squeeze(2)
    gradients = (
        narrow_weight, narrow_bias, wide_weight, wide_bias, norm1_weight, norm1_bias,
        dense_weight, dense_bias, norm2_weight, norm2_bias,
    )  # fmt: skip
    d_weights = [
        _as_weight(g, w) if is_wanted else None for g, w, is_wanted in zip(gradients, weights, wanted[2:], strict=True)
    ]
    return (d_states if wants["states"] else None), d_broadcast, d_weights


def _back_from_tables(d_tables: Tensor, states: Tensor, weights: LocalBlockWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the tokens' states and both convolutions' weights from those of the tables that they make.

    Args:
        d_tables: float32 (26, 2 * taps + 1, D), taps of the narrow convolution, of the wide one, and the states' own.
        states: (26, D).
        weights: in the dtype of the states.
    """
    taps = weights.narrow_weight.shape[-1]
    d_narrow, d_wide, d_own = d_tables[:, :taps], d_tables[:, taps:-1], d_tables[:, -1]
    d_states = (
        d_own
        + torch.einsum("sto,oit->si", d_narrow, weights.narrow_weight.float())
        + torch.einsum("sto,oit->si", d_wide, weights.wide_weight.float())
    )
    d_narrow_weight, d_wide_weight = (torch.einsum("sto,si->oit", d, states.float()) for d in (d_narrow, d_wide))
    return d_states.to(states.dtype), d_narrow_weight, d_wide_weight


def _weight_gradient(gradient: Tensor, x: Tensor, gap: int, taps: int = 1, dilation: int = 1) -> Tensor:
    """The gradient of the weight of ``reference.convolution``, float32 (C, D, taps), from that of its result.

    Args:
        gradient: (R, C), zeros in gaps.
        x: (R, D), what it was applied to.
        gap: rows at either end that are in no protein, no fewer than the taps reach.
        taps: of the convolution; 1 is a plain product.
        dilation: rows from tap to tap.
    """
    found = _floats(taps, x.shape[1], gradient.shape[1]).zero_()
    _cpu_kernels.weight_gradient(
        x.data_ptr(), gradient.data_ptr(), found.data_ptr(), gap, len(x) - gap,
        x.shape[1], gradient.shape[1], taps, dilation, x.dtype == torch.bfloat16, kernel_threads(),
    )  # fmt: skip
    return found.permute(2, 1, 0)


def _as_weight(gradient: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if gradient is None else gradient.to(weight.dtype).contiguous()


def _sums(rows: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Sums of (R, C) rows over each protein, in order: float32 (B, C)."""
    sums = _floats(len(starts), rows.shape[1])
    _cpu_kernels.protein_sums(
        rows.data_ptr(), starts.data_ptr(), lengths.data_ptr(), len(starts),
        sums.data_ptr(), rows.shape[1], rows.dtype == torch.bfloat16, kernel_threads(),
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
        channels = local.shape[1]
        n_keys, n_values = len(key_weight), len(value_weight)
        slots = _slots(batch)
        d_local = torch.empty_like(local)
        d_local[(batch.segments < 0).nonzero()[:, 0]] = 0
        d_query = _floats(int(slots[-1]), n_keys)
        wants_local, wants_query, wants_key, wants_value = ctx.needs_input_grad[2:]
        d_weight = _floats(channels, n_keys + n_values).zero_() if wants_key or wants_value else None
        _cpu_kernels.attention_backward(
            packed_attention(key_weight, value_weight, n_heads, local.dtype, backward=True),
            local.data_ptr(), query_float.data_ptr(),
            batch.starts.data_ptr(), batch.lengths.data_ptr(), slots.data_ptr(), len(batch),
            denominators.data_ptr(), pooled.data_ptr(), d_pooled.data_ptr(),
            d_local.data_ptr(), d_query.data_ptr(), _address(d_weight), kernel_threads(),
        )  # fmt: skip
        d_key = d_value = None
        if d_weight is not None:
            d_key, d_value = torch.split(d_weight.t(), [n_keys, n_values])
        return (
            None,
            None,
            d_local if wants_local else None,
            _sums(d_query, slots[:-1], slots.diff()).to(query.dtype) if wants_query else None,
            _as_weight(d_key, key_weight) if wants_key else None,
            _as_weight(d_value, value_weight) if wants_value else None,
        )


def packed_attention(
    key_weight: Tensor, value_weight: Tensor, n_heads: int, dtype: torch.dtype, backward: bool
) -> _cpu_kernels.Packed:
    """Weights as this CPU's kernels take them, for states of a dtype."""
    key = (n_heads, dtype, backward, _cpu_kernels.instruction_set())
    return prepared(_pack_attention, key_weight, value_weight, key=key)


def _pack_attention(
    key_weight: Tensor, value_weight: Tensor, n_heads: int, dtype: torch.dtype, backward: bool, _: str
) -> _cpu_kernels.Packed:
    key_weight, value_weight = key_weight.to(dtype).contiguous(), value_weight.to(dtype).contiguous()
    return _cpu_kernels.pack_attention(
        key_weight.data_ptr(), value_weight.data_ptr(), key_weight.shape[1], n_heads,
        len(key_weight) // n_heads, len(value_weight) // n_heads,
        backward, dtype == torch.bfloat16, kernel_threads(),
    )  # fmt: skip


def _slots(batch: PackedBatch) -> Tensor:
    """The first tile of each protein, and how many there are, int64 (B + 1,)."""
    slots = torch.zeros(len(batch) + 1, dtype=torch.int64, device="cpu")
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
    query = query.float().contiguous()
    n_proteins = len(batch)
    pooled = _floats(n_proteins, len(value_weight))
    denominators = _floats(n_proteins, n_heads)
    weights = _floats(batch.n_rows if return_weights else 0, n_heads)
    if return_weights:
        weights.zero_()
    _cpu_kernels.attention(
        packed_attention(key_weight, value_weight, n_heads, local.dtype, backward=False),
        local.data_ptr(), query.data_ptr(), batch.starts.data_ptr(), batch.lengths.data_ptr(), n_proteins,
        pooled.data_ptr(), denominators.data_ptr(), weights.data_ptr() if return_weights else 0,
        kernel_threads(),
    )  # fmt: skip
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


def gelu(x: Tensor) -> Tensor:
    """``reference.gelu``, in the dtype of ``x``: PyTorch leaves it to a library whose bits depend on the CPU."""
    return recomputed(_gelu, _plain_gelu, x)[0] if x.dtype in DTYPES else reference.gelu(x)


def _plain_gelu(x: Tensor) -> tuple[Tensor]:
    return (reference.gelu(x),)


def _gelu(x: Tensor) -> tuple[Tensor]:
    x = x.contiguous()
    out = torch.empty_like(x)
    _cpu_kernels.gelu(x.data_ptr(), out.data_ptr(), x.numel(), x.dtype == torch.bfloat16)
    return (out,)


def global_block(global_state: Tensor, pooled: Tensor, weights: GlobalBlockWeights) -> GlobalStates:
    """``reference.global_block``, in the dtype of ``global_state``: (B, G) in, hidden and new states (B, G) out."""
    if global_state.shape[1] % 16:
        both = in_groups(lambda g, p: torch.cat(reference.global_block(g, p, weights), dim=-1), global_state, pooled)
        return GlobalStates(*both.chunk(2, dim=-1))
    return GlobalStates(*recomputed(_global_block, _plain_global_block, global_state, pooled, *weights))


def _plain_global_block(global_state: Tensor, pooled: Tensor, *weights: Tensor) -> GlobalStates:
    return reference.global_block(global_state, pooled, GlobalBlockWeights(*weights))


def _global_block(global_state: Tensor, pooled: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    packed = packed_global_block(weights, global_state.dtype)
    global_state, pooled = global_state.contiguous(), pooled.to(global_state.dtype).contiguous()
    hidden, out = torch.empty_like(global_state), torch.empty_like(global_state)
    _cpu_kernels.global_block(
        packed, global_state.data_ptr(), pooled.data_ptr(), hidden.data_ptr(), out.data_ptr(),
        len(global_state), kernel_threads(),
    )  # fmt: skip
    return hidden, out


def packed_global_block(weights: Sequence[Tensor], dtype: torch.dtype) -> _cpu_kernels.Packed:
    """Weights as this CPU's kernels take them, for states of a dtype."""
    return prepared(_pack_global_block, *weights, key=(dtype, _cpu_kernels.instruction_set()))


def _pack_global_block(*weights_and_key: Any) -> _cpu_kernels.Packed:
    *parameters, dtype, _ = weights_and_key
    names = GlobalBlockWeights._fields
    taken = [
        weight.to(dtype if name in {"dense1_weight", "dense2_weight"} else torch.float32).contiguous()
        for name, weight in zip(names, parameters, strict=True)
    ]
    return _cpu_kernels.pack_global_block(
        list(map(_address, taken)), len(taken[0]), dtype == torch.bfloat16, kernel_threads()
    )


def message(global_state: Tensor, weights: MessageWeights) -> Message:
    """``reference.message``, in the dtype of ``global_state``: (B, G) in, query (B, H * K) and broadcast (B, D) out."""
    if global_state.shape[1] % 16 or len(weights.query_weight) % 16 or len(weights.broadcast_weight) % 16:
        both = in_groups(lambda g: torch.cat(reference.message(g, weights), dim=-1), global_state)
        n_queries = len(weights.query_weight)
        return Message(both[:, :n_queries], both[:, n_queries:])
    return Message(*recomputed(_message, _plain_message, global_state, *weights))


def _plain_message(global_state: Tensor, *weights: Tensor) -> Message:
    return reference.message(global_state, MessageWeights(*weights))


def _message(global_state: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    packed = packed_message(weights, global_state.dtype)
    global_state = global_state.contiguous()
    query, broadcast = _empty_message(global_state, MessageWeights(*weights))
    _cpu_kernels.conditioning(
        packed, global_state.data_ptr(), query.data_ptr(), broadcast.data_ptr(),
        len(global_state), kernel_threads(),
    )  # fmt: skip
    return query, broadcast


def _empty_message(global_state: Tensor, weights: MessageWeights) -> Message:
    widths = weights.query_weight.shape[0], weights.broadcast_weight.shape[0]
    return Message(*(global_state.new_empty(len(global_state), width) for width in widths))


def packed_message(weights: Sequence[Tensor], dtype: torch.dtype) -> _cpu_kernels.Packed:
    """Weights as this CPU's kernels take them, for states of a dtype."""
    return prepared(_pack_message, *weights, key=(dtype, _cpu_kernels.instruction_set()))


def _pack_message(*weights_and_key: Any) -> _cpu_kernels.Packed:
    query_weight, broadcast_weight, broadcast_bias, dtype, _ = weights_and_key
    query_weight, broadcast_weight = query_weight.to(dtype).contiguous(), broadcast_weight.to(dtype).contiguous()
    bias = broadcast_bias.float().contiguous()
    return _cpu_kernels.pack_conditioning(
        query_weight.data_ptr(), broadcast_weight.data_ptr(), bias.data_ptr(), query_weight.shape[1],
        len(query_weight), len(broadcast_weight), dtype == torch.bfloat16, kernel_threads(),
    )  # fmt: skip


def sum_annotations(annotations: Tensor | tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """``reference.sum_annotations``, dense ones in groups."""
    if isinstance(annotations, Tensor):
        return in_groups(lambda dense: reference.sum_annotations(dense, weight), annotations)
    return reference.sum_annotations(annotations, weight)
