"""What every launch needs: where kernels can run, products' precision, sizes."""

import os
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = 75  # compute capability 7.5, Turing
# Arguments of kernels that change from batch to batch. Triton would compile one kernel for 1, another for multiples of
# 16, and a third for the rest, whenever a batch is the first of its kind.
SIZES_OF_BATCHES = ("n_rows", "n_proteins", "n_spans", "spans_each", "rows_each", "n_tiles", "n_parts", "n_slopes")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


def has_matrix_units(capability: int, dtype: torch.dtype, precision: str) -> bool:
    """Whether products run on them; they take no exact float32, and Triton does not use those of Turing."""
    return capability >= 80 and (dtype != torch.float32 or precision == "tf32")


def has_large_tiles(capability: int) -> bool:
    """Whether a program has 227 KB of shared memory, from which products read: Hopper, and Blackwell's data centre."""
    return 90 <= capability < 120


def is_hopper(capability: int) -> bool:
    """Whether products are Hopper's: of a warpgroup, asynchronous, summed in registers."""
    return 90 <= capability < 100


def shared_memory(capability: int) -> int:
    """Bytes that one program may use: 99 KB of gaming and workstation GPUs from Ampere on, more in data centres."""
    if has_large_tiles(capability):
        return 227 << 10
    return {75: 64, 80: 163, 87: 163}.get(capability, 99) << 10


def capability(index: int) -> int:
    """Of a CUDA device: 80 for 8.0; 0 in the interpreter."""
    # torch.compile traces through caches, with a warning of each.
    return _capability(index) if torch.compiler.is_compiling() else _capability_once(index)


def _capability(index: int) -> int:
    if is_interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


_capability_once = lru_cache(_capability)


def capability_of(x: Tensor) -> int:
    """Of the device that a tensor lies on."""
    return capability(x.device.index or 0)


def padded(n: int, least: int = 16) -> int:
    """The power of two that holds n."""
    return max(1 << (n - 1).bit_length(), least)
