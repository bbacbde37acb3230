"""Custom operators of PyTorch, as all of this package's are made."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef


def operator(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Makes a function a custom operator that changes none of its inputs and runs on the GPU where they lie.

    Triton launches on the current device, which need not be that one.

    Args:
        name: without the package's.
    """

    def made(body: Callable[..., Any]) -> CustomOpDef:
        @functools.wraps(body)
        def on_its_device(*inputs: Any) -> Any:
            device = next(x.device for x in inputs if isinstance(x, Tensor))
            if device.type != "cuda" or device.index == torch.cuda.current_device():
                return body(*inputs)
            with torch.cuda.device(device):
                return body(*inputs)

        return torch.library.custom_op(f"proteinbert_fast::{name}", on_its_device, mutates_args=())

    return made
