"""What a model computes in: a dtype, and for float32 whether products may be formed in TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """A dtype of weights and states, with products in TF32 or not."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """PyTorch's own products and convolutions, and ours, are formed this way."""
        products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
        before = products.allow_tf32, convolutions.allow_tf32
        if before == (self.tf32, self.tf32):
            yield
            return
        products.allow_tf32 = convolutions.allow_tf32 = self.tf32
        try:
            yield
        finally:
            products.allow_tf32, convolutions.allow_tf32 = before


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("bfloat16", torch.bfloat16),
        Precision("float16", torch.float16),
        Precision("tf32", torch.float32, tf32=True),
        Precision("float32", torch.float32),
    )
}
