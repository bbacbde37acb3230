"""What every launch needs: where kernels can run, products' precision, sizes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = 75  # compute capability 7.5, Turing
# Arguments of kernels that change from batch to batch. Triton would compile one kernel for 1, another for multiples of
# 16, and a third for the rest, whenever a batch is the first of its kind.
SIZES_OF_BATCHES = ("n_rows", "n_proteins", "n_spans", "spans_each", "rows_each", "n_tiles", "n_parts", "n_slopes")
# Pointers to what describes a batch: parts of a larger array, where one batch's may begin at a multiple of 16 bytes and
# another's not. For these too, one kernel is enough.
LAYOUTS_OF_BATCHES = (
    "TOKENS", "SEGMENTS", "STARTS", "LENGTHS", "SPAN_PROTEIN", "FIRST_SPAN", "COARSE_PROTEIN", "FIRST_COARSE",
    "TILE_PROTEIN", "FIRST_TILE", "TARGETS",
)  # fmt: skip
# For the decorator of every kernel.
ANY_BATCH: dict[str, Any] = {
    "do_not_specialize": SIZES_OF_BATCHES,
    "do_not_specialize_on_alignment": LAYOUTS_OF_BATCHES,
}


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


_compiled_for: list[int] = []


@contextmanager
def compiling_for(wanted: int) -> Iterator[None]:
    """Kernels are told that tensors of any device lie on a GPU of this capability, for what compiles without running.

    Args:
        wanted: 90 for 9.0.
    """
    _compiled_for.append(wanted)
    try:
        yield
    finally:
        _compiled_for.pop()


def is_compiling_ahead() -> bool:
    """Whether kernels are compiled for a GPU that need not be here, and nothing is run."""
    return bool(_compiled_for)


def capability(index: int) -> int:
    """Of a CUDA device: 80 for 8.0; 0 in the interpreter."""
    if _compiled_for:
        return _compiled_for[-1]
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
