"""The gate itself: planted faults fail it, what is shipped passes. `make cpu-gate` runs it over everything."""

import platform
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tools import missing

from .cpu_gate import (
    CROSS,
    CROSS_OBJDUMP,
    ROOT,
    SETS,
    InstructionSet,
    Loop,
    Toolchain,
    disassemble,
    faults,
    frame_registers,
    functions_of,
    innermost_loops,
    leaks,
    measure,
    table,
    tiles_of,
    toolchain,
)

BASELINE, AVX2, AVX512, AVX512_BF16 = SETS["x86_64"]
NEON = SETS["aarch64"][0]
GCC = Toolchain(("g++",), "objdump", "x86_64", False)
TILE = "void pbf::avx2::product_tile<1, 2, float>(pbf::Product<float> const&, float const*)"
# A loop over taps around that over inputs, as objdump prints it.
LISTING = f"""
0000000000000000 <{TILE}>:
   0:\tpush   %rbp
   1:\tvmovaps %ymm0,-0x20(%rsp)
  10:\tvmovups (%rdx),%ymm3
  20:\tvbroadcastss (%rsi,%rax,4),%ymm2
  26:\tvfmadd231ps (%rdx),%ymm2,%ymm0
  2b:\tvfmadd231ps 0x20(%rdx),%ymm2,%ymm1
  31:\tadd    $0x40,%rdx
  35:\tadd    $0x1,%rax
  39:\tjne    20 <{TILE}+0x20>
  3b:\tdec    %ecx
  3d:\tjne    10 <{TILE}+0x10>
  40:\tret
"""


def loop_of(listing: str, which: InstructionSet = AVX2, factor: str = "float") -> Loop:
    (code,) = functions_of(listing).values()
    (loop,) = innermost_loops(code)
    return measure(which, loop, frame_registers(code), factor)


def test_the_innermost_loop_is_found():
    assert loop_of(LISTING) == Loop(6, multiply_adds=2, arithmetic=2, full=2, stack=0, vector_stack=0, calls=0)


def test_jumps_forward_and_to_other_functions_are_no_loops():
    code = functions_of("0000 <f>:\n   4:\tjne    20 <g+0x20>\n   8:\tjmp    8000 <h>\n  20:\tret\n")["f"]
    assert innermost_loops(code) == []


@pytest.mark.parametrize(
    ("right", "wrong", "what"),
    [
        ("add    $0x40,%rdx", "vmovaps %ymm9,0x40(%rsp)", {"stack": 1, "vector_stack": 1}),
        ("add    $0x40,%rdx", "add    0x40(%rsp),%rdx", {"stack": 1}),
        ("add    $0x40,%rdx", "add    0x40(%rsp,%rdi,1),%rdx", {"stack": 1}),
        ("add    $0x40,%rdx", "add    0x40(%rbp),%rdx", {}),  # no frame pointer here
        ("add    $0x40,%rdx", "call   100 <fmaf>", {"calls": 1}),
        ("add    $0x40,%rdx", "call   *%rax", {"calls": 1}),
        ("vfmadd231ps (%rdx),%ymm2,%ymm0", "vfmadd231ps (%rdx),%xmm2,%xmm0", {"full": 1}),
        ("vfmadd231ps (%rdx),%ymm2,%ymm0", "vfmadd231ss (%rdx),%xmm2,%xmm0", {"full": 1}),
        ("vfmadd231ps (%rdx),%ymm2,%ymm0", "vmulps (%rdx),%ymm2,%ymm0", {"multiply_adds": 1, "full": 1}),
    ],
)
def test_what_a_loop_must_not_have_is_counted(right, wrong, what):
    assert loop_of(LISTING.replace(right, wrong)) == replace(loop_of(LISTING), **what)


@pytest.mark.parametrize("sets_up", ["mov    %rsp,%rbp", "lea    0x20(%rsp),%rbp"])
def test_a_frame_pointer_reaches_the_stack(sets_up):
    listing = LISTING.replace("push   %rbp", sets_up).replace("add    $0x40,%rdx", "add    0x40(%rbp),%rdx")
    assert loop_of(listing).stack == 1


def test_sse_and_bfloat16():
    sse = (
        "0 <f>:\n   4:\tmovss  (%rax),%xmm1\n   8:\tshufps $0x0,%xmm1,%xmm1\n   c:\tmulps  %xmm1,%xmm0\n"
        "  10:\taddps  %xmm0,%xmm3\n  14:\tmulss  %xmm1,%xmm2\n  18:\tjmp    4 <f+0x4>\n"
    )
    assert loop_of(sse, BASELINE) == Loop(6, multiply_adds=2, arithmetic=3, full=1, stack=0, vector_stack=0, calls=0)
    pairs = (
        "0 <f>:\n   4:\tvdpbf16ps %zmm1,%zmm2,%zmm4\n   8:\tvdpbf16ps %ymm1,%ymm2,%ymm4\n"
        "   c:\tvfmadd231ps %zmm0,%zmm1,%zmm2\n  10:\tjne    4 <f+0x4>\n"
    )
    found = loop_of(pairs, AVX512_BF16, "unsigned short")
    assert found == Loop(4, multiply_adds=2, arithmetic=1, full=1, stack=0, vector_stack=0, calls=0)


NEON_LOOP = """
0000000000000000 <f>:
 124:\tld1r\t{v17.4s}, [x0]
 128:\tldp\tq3, q2, [x1]
 12c:\tfmla\tv8.4s, v17.4s, v2.4s
 130:\tfmla\tv9.4s, v17.4s, v3.s[0]
 134:\tadd\tx1, x1, #0x40
 138:\tcmp\tx1, x2
 13c:\tb.ne\t124 <f+0x124>  // b.any
"""


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ("add\tx1, x1, #0x40", {}),
        ("str\tq8, [sp, #128]", {"stack": 1, "vector_stack": 1}),
        ("ldr\tx1, [sp]", {"stack": 1}),
        ("ldr\tx1, [x29, #8]", {}),
        ("bl\t40 <g>", {"calls": 1}),
        ("fmadd\ts1, s2, s3, s1", {"multiply_adds": 3, "arithmetic": 3}),
        ("fmla\tv8.2s, v17.2s, v2.2s", {"multiply_adds": 3, "arithmetic": 3}),
    ],
)
def test_aarch64(wrong, what):
    clean = Loop(7, multiply_adds=2, arithmetic=2, full=2, stack=0, vector_stack=0, calls=0)
    assert loop_of(NEON_LOOP.replace("add\tx1, x1, #0x40", wrong), NEON) == replace(clean, **what)


@pytest.mark.parametrize("jump", ["cbnz\tx3, 124 <f+0x124>", "tbnz\tw3, #4, 124 <f+0x124>", "b\t124 <f+0x124>"])
def test_jumps_of_aarch64(jump):
    assert loop_of(NEON_LOOP.replace("b.ne\t124 <f+0x124>  // b.any", jump), NEON).multiply_adds == 2


def test_instructions_in_functions_that_sets_share():
    """The linker keeps one copy for all sets, and a processor without AVX would come by it."""
    shared = functions_of(
        "0 <std::vector<pbf::Run, std::allocator<pbf::Run> >::insert(pbf::Run*)>:\n   0:\tvmovdqu (%rax),%xmm0\n"
        "10 <std::vector<pbf::avx2::Four>::insert(pbf::avx2::Four*)>:\n  10:\tvmovdqu (%rax),%xmm0\n"
    )
    (line,) = leaks(AVX2, shared)
    assert line.startswith("std::vector<pbf::Run,")
    assert line.endswith("shared with other sets, and has 1 instructions like 'vmovdqu (%rax),%xmm0'")


@pytest.mark.parametrize(
    ("which", "instruction", "is_beyond"),
    [
        (BASELINE, "vaddps %xmm0,%xmm1,%xmm2", True),
        (BASELINE, "addps  %xmm0,%xmm1", False),
        (AVX2, "vaddps %zmm0,%zmm1,%zmm2", True),
        (AVX2, "vaddps %xmm17,%xmm1,%xmm2", True),
        (AVX2, "kmovw  %eax,%k1", True),
        (AVX2, "vaddps %ymm15,%ymm1,%ymm2", False),
        (AVX512, "vdpbf16ps %zmm1,%zmm2,%zmm4", True),
        (AVX512, "vaddps %zmm17,%zmm1,%zmm2{%k1}", False),
        (AVX512_BF16, "vdpbf16ps %zmm1,%zmm2,%zmm4", False),
        (NEON, "bfdot\tv0.4s, v1.8h, v2.8h", True),
    ],
)
def test_instructions_that_a_set_does_not_have(which, instruction, is_beyond):
    found = leaks(which, functions_of(f"0 <pbf::{which.name}::f()>:\n   0:\t{instruction}\n"))
    assert found == ([f"pbf::{which.name}::f(): not in {which.name}: {instruction!r}"] if is_beyond else [])


def test_budgets():
    def said(*changes: tuple[str, str]) -> list[str]:
        listing = LISTING
        for old, new in changes:
            listing = listing.replace(old, new)
        return [line.removeprefix("product_tile<1, 2, float>: ") for line in faults(GCC, AVX2, functions_of(listing))]

    elsewhere = [
        "row_sum_tile of float is missing",
        "Winograd's transforms: no loop with additions",
        "multiply_adds of float is missing",
    ]
    few = ("  35:\tadd    $0x1,%rax\n", ""), ("  31:\tadd    $0x40,%rdx\n", "")
    assert said(*few) == elsewhere
    assert said() == [elsewhere[0], "6 instructions per turn, 4 allowed", *elsewhere[1:]]
    spilled = said(*few, ("20(%rdx),%ymm2", "20(%rsp),%ymm2"))
    assert spilled[1:3] == ["1 accesses to the stack, 0 allowed", "1 vectors spilled to the stack, 0 allowed"]
    assert said(*few, ("(%rdx),%ymm2,%ymm0", "(%rdx),%xmm2,%xmm0"))[1] == "50% of full width"
    assert said(*few, ("vbroadcastss (%rsi,%rax,4),%ymm2", "call   90 <g>"))[1] == "1 calls"
    assert "1 multiply-adds per turn, 2 sums" in said(("vfmadd231ps (%rdx)", "vmulps (%rdx)"))
    assert said(("vfmadd231ps", "vmulps"))[1] == "no loop with multiply-adds"


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    if not (ROOT / "csrc" / "cpu").is_dir():
        pytest.skip("the installed package has no C++ sources")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"compiles for x86-64, and this machine is {platform.machine()}")
    try:
        found = toolchain()
    except RuntimeError as error:
        missing(str(error))
    assert found.machine == "x86_64"
    return found


@pytest.mark.slow
def test_what_is_shipped_passes(tools):
    functions = functions_of(disassemble(tools, AVX2))
    assert faults(tools, AVX2, functions) == []
    assert tiles_of(AVX2, functions)["product_tile", "float", 6, 2].loops[0].multiply_adds == 12
    assert len(table(AVX2, functions)) >= 7  # both products, two transforms for each dtype, the peak


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([], []),
        ([("vfmadd132ps %ymm0,%ymm1,%ymm13", "nop")], ["1 multiply-adds per turn, 2 sums"]),
        ([("vfmadd132ps %ymm0,%ymm1,%ymm13", "vfmadd132ps 0x40(%rsp),%ymm1,%ymm13")], [
            "1 accesses to the stack, 0 allowed", "1 vectors spilled to the stack, 0 allowed"]),
        ([("vfmadd132ps %ymm0,%ymm1,%ymm13", "vfmadd132ps %xmm0,%xmm1,%xmm13")], ["50% of full width"]),
        ([("  2a:", "  29:\tnop\n  2a:\tnop\n  2b:\tnop\n  2c:")], ["7 instructions per turn, 6 allowed"]),
        ([("vfmadd132ps", "vmovaps")], ["no loop with multiply-adds"]),
    ],
)  # fmt: skip
def test_budgets_of_the_peak(changes, says):
    """Two sums, as the product tile beside it has."""
    name = "double pbf::avx2::multiply_adds<float>(double, float*) [clone .constprop.0]"
    peak = f"0100 <{name}>:\n  20:\tvfmadd132ps %ymm0,%ymm1,%ymm2\n  25:\tvfmadd132ps %ymm0,%ymm1,%ymm13\n"
    peak += f"  2a:\tsub    $0x1,%rax\n  2e:\tjne    20 <{name}+0x20>\n"
    for old, new in changes:
        peak = peak.replace(old, new)
    lines = faults(GCC, AVX2, functions_of(LISTING + "\n" + peak))
    assert [line.removeprefix("multiply_adds<float>: ") for line in lines if "multiply_adds" in line] == says


def planted(folder: Path, old: str, new: str) -> Path:
    """The C++ sources with one thing changed, where it is first said."""
    shutil.copytree(ROOT / "csrc" / "cpu", folder / "cpu")
    header = folder / "cpu" / "instruction_sets.h"
    text = header.read_text()
    assert old in text
    header.write_text(text.replace(old, new, 1))
    # Intrinsics are of one width; the plain formulas beside them compile for every width.
    vectors = folder / "cpu" / "vector.h"
    vectors.write_text(vectors.read_text().replace("defined(__x86_64__)", "0"))
    peak = folder / "cpu" / "peak.h"
    peak.write_text(peak.read_text().replace('"+v"', '"+m"'))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("#define PBF_BYTES 32", "#define PBF_BYTES 64", "vectors spilled to the stack, 0 allowed"),
        ('PBF_TARGET("avx2,fma")', 'PBF_TARGET("avx2")', "no loop with multiply-adds"),
    ],
    ids=["wide vectors", "no fused multiply-add"],
)
def test_a_planted_regression_fails(tools, tmp_path, old, new, says):
    csrc = planted(tmp_path / "csrc", old, new)
    assert any(says in line for line in faults(tools, AVX2, functions_of(disassemble(tools, AVX2, csrc))))


@pytest.mark.slow
def test_a_tile_too_high_for_neon_fails(tools, tmp_path):
    """GCC loads the numbers of all six rows first, and then has too few of 32 registers for 24 sums."""
    try:
        cross = toolchain(CROSS, CROSS_OBJDUMP)
    except RuntimeError as error:
        missing(str(error))
    csrc = planted(tmp_path / "csrc", "#define PBF_ROWS 5", "#define PBF_ROWS 6")
    lines = faults(cross, NEON, functions_of(disassemble(cross, NEON, csrc)))
    assert any(re.match(r"product_tile<6, 4, float>: \d+ vectors spilled to the stack", line) for line in lines)
