"""Which instruction sets of the CPU kernels this machine has (`pytest -k isa`): each runs, or is skipped and why."""

import platform
from pathlib import Path

import pytest
import torch

from proteinbert_fast import ProteinBertConfig, Tokenizer, _cpu_kernels
from proteinbert_fast.model import Block
from proteinbert_fast.ops import cpu, reference
from proteinbert_fast.ops.reference import LocalBlockWeights

# What a processor must have for each set, in the words of /proc/cpuinfo; the best is last.
FLAGS = {
    "x86_64": {
        "baseline": set(),
        "avx2": {"avx2", "fma"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
        "amx_bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16"},
    },
    "aarch64": {"baseline": set(), "neon_bf16": {"bf16"}},
}
MACHINE = platform.machine().replace("AMD64", "x86_64").replace("arm64", "aarch64")


def cpu_flags() -> set[str]:
    """Of this processor.

    Skips the test that asks where the system does not say.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip(f"{platform.system()} has no /proc/cpuinfo")
    lines = (line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    return {flag for name, flags in lines if name.strip() in ("flags", "Features") for flag in flags.split()}


@pytest.mark.parametrize(("machine", "name"), [(machine, name) for machine, sets in FLAGS.items() for name in sets])
def test_isa_runs(machine, name):
    if machine != MACHINE:
        pytest.skip(f"{name} is of {machine}, and this machine is {MACHINE}")
    if missing := FLAGS[machine][name] - cpu_flags():
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}, which {name} needs")
    best = _cpu_kernels.instruction_set()
    _cpu_kernels.use_instruction_set(name)
    try:
        torch.manual_seed(0)
        block = Block(ProteinBertConfig(n_annotations=3, d_local=48, d_global=96, n_blocks=1, n_heads=2, d_key=32))
        batch = Tokenizer()(["M" * 40, ""])
        x = torch.randn(batch.n_rows, 48) * (batch.segments >= 0).unsqueeze(-1)
        broadcast = torch.randn(2, 48)
        weights = block.local_weights()
        with torch.no_grad():
            _, local = cpu.local_block(x, broadcast, batch, weights, 5)
            exact = reference.local_block(
                x.double(), broadcast.double(), batch.segments, LocalBlockWeights(*(w.double() for w in weights)), 5
            ).local
        # Rounding of float32 in sums of 432 terms near 1, then a norm.
        torch.testing.assert_close(local.double(), exact, atol=2e-5, rtol=2e-5)
    finally:
        _cpu_kernels.use_instruction_set(best)


def test_isa_in_use_is_the_best():
    """None is lost to a fault of the detection; AVX-512 is used only where all of its parts are there."""
    if MACHINE not in FLAGS:
        pytest.skip(f"no instruction sets are known for {MACHINE}")
    flags = cpu_flags()
    assert _cpu_kernels.instruction_set() == [name for name, needs in FLAGS[MACHINE].items() if needs <= flags][-1]
