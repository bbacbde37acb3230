"""Digests of what the CPU kernels compute with the instruction set in use: the same on any CPU that has it.

    PROTEINBERT_FAST_ISA=avx2 python -m tests.ops.digests

Where a change of bits is meant, KERNELS_VERSION is counted up, and tests/data/instruction_sets.json made again from
these. Weights and inputs are made of integers: PyTorch's own random numbers and functions may differ from CPU to CPU.
"""

import hashlib
import json

import torch
from torch import Tensor

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer, _cpu_kernels
from proteinbert_fast.ops import cpu

# 48 channels are a panel and a half on AVX-512. One protein has two tiles of attention, another one residue.
CONFIG = ProteinBertConfig(n_annotations=9, d_local=48, d_global=96, n_blocks=2, n_heads=2, d_key=32)
SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQ" * 6, "M", "GASTCVLIMPFYWDENQHKRX" * 3]


def numbers(*shape: int, salt: int, scale: float = 1.0) -> Tensor:
    """Multiples of 2^-15 between -1 and 1, times a power of two: the same everywhere."""
    x = torch.arange(salt << 20, (salt << 20) + torch.Size(shape).numel(), dtype=torch.int64)
    for factor in (0x9E3779B1, 0x85EBCA77):
        x = (x * factor) & 0xFFFFFFFF
        x = x ^ (x >> 15)
    return ((x & 0xFFFF) - 0x8000).to(torch.float32).mul_(scale / 0x8000).reshape(shape)


def digest(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def model() -> ProteinBert:
    made = ProteinBert(CONFIG, backend="cpu").eval()
    with torch.no_grad():
        for salt, (name, weight) in enumerate(made.named_parameters()):
            is_scale = "norm" in name and name.endswith("weight")
            weight.copy_(numbers(*weight.shape, salt=salt, scale=0.25)).add_(1.0 if is_scale else 0.0)
    return made


def digests(dtype: torch.dtype) -> dict[str, str]:
    """Of all states of a forward pass, and of the gradients of a local block and of global attention."""
    made, batch = model(), Tokenizer()(SEQUENCES)
    with torch.no_grad():
        out = made.to(dtype)(batch, hidden_states=True)
        states = digest(*out.hidden_local, *out.hidden_global)
    block = made.blocks[1]
    rows = (batch.n_rows, CONFIG.d_local)
    inside = (batch.segments >= 0).unsqueeze(-1)
    x, d_local, d_hidden = ((numbers(*rows, salt=100 + i) * inside).to(dtype) for i in range(3))
    broadcast, query = numbers(3, CONFIG.d_local, salt=110), numbers(3, CONFIG.n_heads * CONFIG.d_key, salt=111)
    leaves = [t.requires_grad_() for t in (x, broadcast.to(dtype), query.to(dtype))]
    weights = block.local_weights()
    hidden, local = cpu.local_block(x, leaves[1], batch, weights, CONFIG.wide_dilation, keep_hidden=True)
    found = torch.autograd.grad((hidden, local), [x, leaves[1], *weights], (d_hidden, d_local))
    keys_values = (block.key.weight, block.value.weight)
    pooled = cpu.global_attention(x, leaves[2], batch, *keys_values, CONFIG.n_heads).pooled
    d_pooled = numbers(*pooled.shape, salt=112).to(dtype)
    found += torch.autograd.grad(pooled, [x, leaves[2], *keys_values], d_pooled)
    return {"states": states, "gradients": digest(*found)}


def all_digests() -> dict[str, dict[str, str]]:
    return {str(dtype).removeprefix("torch."): digests(dtype) for dtype in cpu.DTYPES}


if __name__ == "__main__":
    print(json.dumps({_cpu_kernels.instruction_set(): all_digests()}, indent=1))
