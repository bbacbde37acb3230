"""What every launch needs: where kernels can run, products' precision, sizes."""

import os
from functools import lru_cache

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


def product_precision(dtype: torch.dtype) -> str:
    """How float32 products are formed: exactly, or in TF32 where PyTorch's own products may be."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@lru_cache
def capability(index: int) -> int:
    """Of a CUDA device: 80 for 8.0; 0 in the interpreter."""
    if is_interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def capability_of(x: Tensor) -> int:
    """Of the device that a tensor lies on."""
    return capability(x.device.index or 0)


def padded(n: int, least: int = 16) -> int:
    """The power of two that holds n."""
    return max(1 << (n - 1).bit_length(), least)
