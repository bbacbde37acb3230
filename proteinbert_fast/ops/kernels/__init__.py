"""Triton kernels, one file per operation: kernel, operator, public function. Needs triton; imported when first used."""

import torch

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.ops.kernels.global_track import global_track
from proteinbert_fast.ops.kernels.launching import DTYPES, OLDEST, capability, is_compiling_ahead, is_interpreted
from proteinbert_fast.ops.kernels.linear import head, message, sum_annotations
from proteinbert_fast.ops.kernels.local_block import CHANNELS, local_block
from proteinbert_fast.ops.kernels.losses import annotation_loss, token_loss
from proteinbert_fast.ops.kernels.protein_sums import residue_mean

__all__ = [
    "annotation_loss",
    "global_track",
    "head",
    "local_block",
    "message",
    "residue_mean",
    "sum_annotations",
    "token_loss",
    "unsupported",
]


def unsupported(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run a model of these sizes in this dtype on this device, or None when they can."""
    if device.type != "cuda" and not is_interpreted() and not is_compiling_ahead():
        return f"the device is {device.type}, not a CUDA GPU"
    if torch.version.hip:
        return "this is PyTorch for AMD GPUs, for which the kernels are not made"
    if device.type == "cuda" and (found := capability(device.index or 0)) < OLDEST:
        return f"the GPU's compute capability is {found / 10}, below {OLDEST / 10}"
    if device.type == "cuda" and found < 80 and dtype == torch.float32 and config.d_global > 512:
        return f"d_global is {config.d_global}, and a GPU of compute capability {found / 10} takes 512 in float32"
    if dtype not in DTYPES:
        return f"the dtype is {str(dtype).removeprefix('torch.')}, not float32, bfloat16 or float16"
    if config.d_local not in CHANNELS:
        return f"d_local is {config.d_local}, not one of {', '.join(map(str, CHANNELS))}"
    for name, size, most in (
        ("d_global", config.d_global, 1024),
        ("d_key", config.d_key, 128),
        ("d_value", config.d_value, 256),
        ("n_heads * d_key", config.n_heads * config.d_key, 1024),
    ):
        if size > most or size % 16:
            return f"{name} is {size}, not a multiple of 16 up to {most}"
    return None
