"""All blocks of the model in one call of the kernels for CPUs, where nothing between them is asked for.

A protein of 350 residues takes 6 ms. In 24 calls from Python it would take one more: each time the kernels' weights
have driven Python's own code and data from the caches. The kernels, and so all bits, are those of ops/cpu.py.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.ops import cpu
from proteinbert_fast.ops.reference import BlockWeights, Embedded
from proteinbert_fast.packing import PackedBatch


def run_blocks(
    embedded: Embedded, global_state: Tensor, batch: PackedBatch, blocks: Sequence[BlockWeights]
) -> tuple[Tensor, Tensor] | None:
    """Local and global states after all blocks.

    Args:
        embedded: the tokens and their states, in the dtype computed in.
        global_state: (B, G), the first one.
        batch: the packed layout.
        blocks: the weights of each.

    Returns:
        Local (R, D) and global (B, G) states; None where the blocks must run one by one: with gradients, where dtypes
        differ, and where widths fit no vectors.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(embedded, global_state, blocks)):
        return None
    first, dtype = blocks[0], embedded.weight.dtype
    widths = (global_state.shape[1], first.message.query_weight.shape[0], first.message.broadcast_weight.shape[0])
    if global_state.dtype != dtype or any(width % 16 for width in widths):
        return None
    packed = []
    for i, (block, following) in enumerate(zip(blocks, [*blocks[1:], None], strict=True)):
        key_weight, value_weight, of_states = block.track
        local = cpu.packed_local_block(block.local, embedded.weight, i == 0, block.wide_dilation, backward=False)
        keys_values = cpu.packed_attention(key_weight, value_weight, block.n_heads, dtype, backward=False)
        message = following and cpu.packed_message(following.message, dtype)
        packed.append((local, keys_values, cpu.packed_global_block(of_states, dtype), message))
    tokens, global_state = embedded.tokens.to(torch.uint8).contiguous(), global_state.contiguous()
    heard = cpu.message(global_state, first.message)
    rows = embedded.weight.new_empty((batch.n_rows, embedded.weight.shape[1]))
    other, out = torch.empty_like(rows), torch.empty_like(global_state)
    _cpu_kernels.run_blocks(
        packed, tokens.data_ptr(), batch.segments.data_ptr(), batch.starts.data_ptr(), batch.lengths.data_ptr(),
        len(batch), batch.gap, batch.n_rows,
        global_state.data_ptr(), heard.query.data_ptr(), heard.broadcast.data_ptr(),
        rows.data_ptr(), other.data_ptr(), out.data_ptr(), cpu.kernel_threads(),
    )  # fmt: skip
    return rows, out


def _tensors(embedded: Embedded, global_state: Tensor, blocks: Sequence[BlockWeights]) -> Iterator[Tensor]:
    yield from (embedded.weight, global_state)
    for block in blocks:
        yield from (*block.local, block.track.key_weight, block.track.value_weight, *block.track.block, *block.message)
