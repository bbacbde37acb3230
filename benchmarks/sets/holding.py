"""Instruction sets: what holds every library of a process to one, and which instructions lie beyond it."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.sets.encodings import AMX, EVEX, VEX
from proteinbert_fast import _cpu_kernels
from proteinbert_fast.ops.instruction_sets import ISA_SWITCH


@dataclass(frozen=True)
class InstructionSet:
    """One that our kernels know by this name.

    Attributes:
        name: of the set.
        has_bfloat16: whether it multiplies bfloat16.
        environment: holds libraries to it: PyTorch's own kernels (and Inductor's vectors), oneDNN, MKL.
        capability: what PyTorch then says of itself; None where nothing holds it.
        beyond: encodings that no instruction of the set has.
        march: the compiler's name of it, for what Inductor compiles; None where the compiler has no such name.
    """

    name: str
    has_bfloat16: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    capability: str | None = None
    beyond: frozenset[str] = frozenset()
    march: str | None = None


def _x86(name: str, aten: str, onednn: str, mkl: Mapping[str, str], march: str, *beyond: str) -> InstructionSet:
    return InstructionSet(
        name,
        has_bfloat16=name.endswith("bf16"),
        environment={"ATEN_CPU_CAPABILITY": aten, "DNNL_MAX_CPU_ISA": onednn, **mkl},
        capability=aten.upper(),
        beyond=frozenset(beyond),
        march=march,
    )


# MKL counts as Intel does, and on other CPUs obeys MKL_CBWR=COMPATIBLE (SSE2) alone; there it does not go beyond AVX2.
X86 = {
    s.name: s
    for s in (
        _x86("baseline", "default", "SSE41", {"MKL_CBWR": "COMPATIBLE"}, "x86-64", VEX, EVEX, AMX),
        _x86("avx2", "avx2", "AVX2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, "x86-64-v3", EVEX, AMX),
        _x86("avx512", "avx512", "AVX512_CORE", {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, "x86-64-v4", AMX),
        _x86("avx512_bf16", "avx512", "AVX512_CORE_BF16", {"MKL_ENABLE_INSTRUCTIONS": "AVX512"}, "cooperlake", AMX),
        _x86("amx_bf16", "avx512", "AVX512_CORE_AMX", {}, "sapphirerapids"),
    )
}
AARCH64 = {s.name: s for s in (InstructionSet("baseline"), InstructionSet("neon_bf16", has_bfloat16=True))}


def known() -> dict[str, InstructionSet]:
    """Sets of this CPU, the plainest first."""
    table = X86 if platform.machine() in {"x86_64", "AMD64"} else AARCH64
    return {name: table.get(name, InstructionSet(name)) for name in _cpu_kernels.instruction_sets()}


def environment(held: InstructionSet, names: Sequence[str]) -> dict[str, str]:
    """Variables of a process that is held to a set.

    Args:
        held: the set.
        names: of all sets of this CPU, the plainest first. For the last one compilers take what they find.
    """
    variables = {ISA_SWITCH: held.name, **held.environment}
    if held.march and held.name != names[-1]:
        variables["TORCHINDUCTOR_CPP_MARCH"] = held.march
    return variables
