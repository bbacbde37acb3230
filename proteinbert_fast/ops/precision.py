"""What PyTorch's settings say about the products of float32 tensors."""

import torch


def product_precision(dtype: torch.dtype) -> str:
    """How float32 products are formed: exactly, or in TF32 where PyTorch's own products may be."""
    if dtype != torch.float32:
        return "ieee"
    # allow_tf32 may not be read once a program has used the settings that replace it.
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if precision == "tf32" else "ieee"
