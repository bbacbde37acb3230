"""Records of the CPU kernels: what is refused and what to do, the rates of each set, the same bits on any CPU."""

import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops import cpu
from proteinbert_fast.ops.instruction_sets import (
    KERNELS_VERSION,
    check_ranks,
    check_resumed,
    joined,
    kernels_in_use,
    measure_rates,
)

from .digests import all_digests

DIGESTS = Path(__file__).parents[1] / "data" / "instruction_sets.json"
MACHINE = platform.machine().replace("AMD64", "x86_64").replace("arm64", "aarch64")
KNOWN = json.loads(DIGESTS.read_text())
SETS = _cpu_kernels.instruction_sets()
V = f"version {KERNELS_VERSION}"
BASELINE = f"baseline, {V}"


def refused(before: str | None, now: str) -> str:
    with pytest.raises(InputError) as error:
        check_resumed(before, now, "out.h5", False)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("out.h5: ")
    assert said.endswith(", or resume with --allow-different-kernels")
    return said.removeprefix("out.h5: ").removesuffix(", or resume with --allow-different-kernels")


def test_a_resume_with_other_kernels_says_what_differs_and_what_to_do():
    last = f"{SETS[-1]}, {V}"
    other = f"something, {V}"
    assert refused(last, other) == (
        f'was computed by the kernels "{last}", whose bits are not those of "{other}" here: '
        f"set PROTEINBERT_FAST_ISA={SETS[-1]}"
    )
    assert refused(other, BASELINE) == (
        f'was computed by the kernels "{other}", whose bits are not those of "{BASELINE}" here: '
        f"run it on a CPU that has something (this one has {', '.join(SETS)})"
    )
    assert refused("baseline, version 1", BASELINE) == (
        f'was computed by the kernels "baseline, version 1", whose bits are not those of "{BASELINE}" here: '
        "use the release that has version 1 of them"
    )
    assert refused(f"{BASELINE}; {other}", BASELINE) == (
        f'was computed by the kernels "{BASELINE}" and "{other}", whose bits are not those of "{BASELINE}" here: '
        "start again"
    )
    for nothing in (None, ""):
        assert refused(nothing, BASELINE) == (
            f'does not say which kernels computed it, which may be others than "{BASELINE}" here: start again'
        )


def test_a_resume_that_is_allowed_lists_all_kernels():
    assert check_resumed(BASELINE, BASELINE, "out.h5", False) == BASELINE
    assert check_resumed("a; b", "b; a", "out.h5", False) == "a; b"
    assert check_resumed("a", "b", "out.h5", True) == "a; b"
    assert check_resumed("a; b", "b", "out.h5", True) == "a; b"
    assert check_resumed(None, "b", "out.h5", True) == "unknown; b"
    assert joined(["a; b", "c", "b"]) == "a; b; c"


def test_ranks_with_other_kernels_say_what_differs_and_what_to_do():
    one, other = f"avx2, {V}", f"avx512, {V}"
    sets = [["baseline", "avx2"], ["baseline", "avx2", "avx512"], ["baseline", "avx2", "avx512"]]
    assert check_ranks([one, one, one], sets, "run", False) == one
    with pytest.raises(InputError) as error:
        check_ranks([one, one, other], sets, "run", False)
    assert str(error.value) == (
        f'run: rank 0 runs the kernels "{one}" and rank 2 "{other}", whose bits differ: '
        "set PROTEINBERT_FAST_ISA=avx2 for all ranks, or start them with --allow-different-kernels"
    )
    for records in (["triton", "reference"], [one, "avx2, version 1"], [one, "reference"]):
        with pytest.raises(InputError, match="give all ranks the same release and back end, or start them with"):
            check_ranks(records, sets[:2], "run", False)
    with pytest.raises(InputError, match="run them on one kind of CPU, or start"):
        check_ranks([one, other], [["baseline"], ["neon"]], "run", False)
    assert check_ranks([one, one, other], sets, "run", True) == f"{one}; {other}"


@pytest.mark.parametrize("threads", [1, 2])
def test_rates_of_every_isa(instruction_set, threads):
    rates = measure_rates(0.02, threads)
    assert list(rates) == ["float32", *(["bfloat16"] if "bf16" in instruction_set else [])]
    for found in rates.values():
        assert math.isfinite(found.registers)
        assert math.isfinite(found.products)
        assert min(found) > 0
        assert found.fraction == found.products / found.registers


def compilers() -> list[str]:
    """Those that the extension's ELF file names; a Clang goes by its own name, though it links what GCC compiled."""
    binary = Path(_cpu_kernels.__file__).read_bytes()
    clang = re.search(rb"clang version (\d+)", binary)
    if clang:
        return [f"Clang {int(clang[1])}"]
    return sorted({f"GCC {int(found[1])}" for found in re.finditer(rb"GCC: \([^)]*\) (\d+)\.", binary)})


def test_bits_of_every_isa_are_those_of_other_machines(instruction_set):
    """Digests are those of a Zen 4, from where PyTorch and its libraries ran with any set."""
    if instruction_set not in KNOWN.get(MACHINE, {}):
        pytest.skip(f"no digests of {instruction_set} on {MACHINE} are kept")
    found = all_digests()
    if found != KNOWN[MACHINE][instruction_set] and "GCC 12" not in compilers():
        pytest.skip(f"digests are of what GCC 12 makes, and {' and '.join(compilers())} choose other products to fuse")
    assert found == KNOWN[MACHINE][instruction_set]


def in_a_process(**environment: str) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.digests"], env=os.environ | environment, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif("avx2" not in SETS, reason=f"this CPU has {', '.join(SETS)}, and not avx2")
def test_bits_of_an_isa_do_not_depend_on_what_pytorch_runs_with():
    """PyTorch's own functions have other bits on other CPUs; it is held to what those have."""
    found = [
        in_a_process(PROTEINBERT_FAST_ISA="avx2", ATEN_CPU_CAPABILITY=capability, DNNL_MAX_CPU_ISA=library)
        for capability, library in (("default", "SSE41"), ("avx2", "AVX2"))
    ]
    assert found[0] == found[1]


def test_names_stay_where_they_were():
    assert (cpu.KERNELS_VERSION, cpu.kernels_in_use()) == (KERNELS_VERSION, kernels_in_use())
    with pytest.raises(InputError, match="PROTEINBERT_FAST_ISA is 'mmx' in the environment"):
        cpu.force_instruction_set("mmx")
