"""A kernel that does nothing but read: what the L2 cache gives. Needs triton."""

import triton
import triton.language as tl


@triton.jit
def read_loop_kernel(X, OUT, n_blocks, READS: tl.constexpr, BLOCK: tl.constexpr):
    """Program p: sum of the blocks p, p + 1, ... p + READS - 1 of X, past the end from the beginning again."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(READS):
        block = (program + i) % n_blocks
        # Not through the L1 cache: neighbours would find each other's blocks there.
        total += tl.load(X + block * BLOCK + columns, cache_modifier=".cg")
    tl.store(OUT + program * BLOCK + columns, total)
