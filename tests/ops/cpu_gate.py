"""Compiles the CPU kernels for every instruction set, whatever this machine has, and holds the machine code to budgets.

    make cpu-gate                      with the compiler that builds the extension
    CXX=clang++-14 make cpu-gate       with another

What the budgets guard, in the innermost loops of the matrix products, of Winograd's transforms and of what the set's
peak is measured with: sums spilled to the
stack, vectors narrower than the set's registers, calls, as many multiply-adds per turn as the tile has sums, and how
many instructions come on top. Everywhere: no instruction of a set in a function that other sets share, because the
linker keeps one copy for all of them, and no instruction that the set does not have.
"""

import ast
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "tests" / "cpp" / "every_kernel.cpp"
CROSS, CROSS_OBJDUMP = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump"
NEVER = r"(?!)"


@dataclass(frozen=True)
class InstructionSet:
    """How the machine code of a set looks; patterns are of one line of a listing.

    Attributes:
        name: the namespace of its kernels.
        instructions: of a product's loop for each multiply-add of the largest tile, GCC's and Clang's. GCC's are the
            loads of weights, a broadcast for each row, and three or four more; for SSE2 a multiply-add is two and a
            copy, and a broadcast two. Clang computes rows' addresses in the loop.
        product: a multiply-add of float32, or the multiplication of one where they are two instructions.
        pairs: a multiply-add of pairs of bfloat16, or "" where there is no instruction for it.
        arithmetic: additions, subtractions, multiplications and multiply-adds of float32.
        full: a register of full width.
        own: an instruction that a processor may lack which has no more than the machine family's least set.
        beyond: an instruction that is not in the set.
    """

    name: str
    instructions: tuple[float, float]
    product: str
    arithmetic: str
    full: str
    pairs: str = ""
    own: str = NEVER
    beyond: str = NEVER

    @property
    def factors(self) -> dict[str, str]:
        """A multiply-add of each type that products multiply."""
        return {"float": self.product} | ({"unsigned short": self.pairs} if self.pairs else {})


VEX = r"v[a-z]"  # every instruction of AVX and later begins so, and none of SSE
MASKS = r"k(mov|or|and|xn?or|not|shift|test|unpck)|.*%k[0-7]"
EVEX = rf"{MASKS}|.*%(zmm|[xy]mm(1[6-9]|2\d|3[01]))"
FUSED = r"vfn?m(add|sub)(132|213|231)[ps]s\b"
X86_ARITHMETIC = r"v?(add|sub|mul|fn?m(add|sub)(132|213|231))[ps]s\b"
PAIRS = r"vdpbf16ps\b"
NEON_PRODUCT = r"(fmla|fmls)\b|fn?m(add|sub)\t"
NEON_ARITHMETIC = r"f(add|sub|mul|mla|mls|n?madd|n?msub)\t"
BFDOT = r"bfdot\b"
SETS = {
    "x86_64": (
        InstructionSet("baseline", (4.0, 4.5), r"muls?[ps]s\b", r"(add|sub|mul)[ps]s\b", "%xmm", beyond=VEX),
        InstructionSet("avx2", (2.1, 2.5), FUSED, X86_ARITHMETIC, "%ymm", own=VEX, beyond=EVEX),
        InstructionSet("avx512", (1.8, 2.3), FUSED, X86_ARITHMETIC, "%zmm", own=VEX, beyond=PAIRS),
        InstructionSet("avx512_bf16", (1.8, 2.3), FUSED, X86_ARITHMETIC, "%zmm", own=VEX, pairs=PAIRS),
    ),
    "aarch64": (
        InstructionSet("baseline", (1.6, 1.8), NEON_PRODUCT, NEON_ARITHMETIC, r"v\d+\.4s", beyond=BFDOT),
        InstructionSet("neon_bf16", (1.8, 1.9), NEON_PRODUCT, NEON_ARITHMETIC, r"v\d+\.4s", pairs=BFDOT, own=BFDOT),
    ),
}


@dataclass(frozen=True)
class Toolchain:
    """A compiler, and the disassembler of its machine code.

    Attributes:
        compiler: the command.
        objdump: GNU's, of the same machine family.
        machine: as in SETS.
        is_clang: its loops compute addresses in more instructions than GCC's.
    """

    compiler: tuple[str, ...]
    objdump: str
    machine: str
    is_clang: bool


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str


@dataclass(frozen=True)
class Loop:
    """Counts of an innermost loop."""

    instructions: int
    multiply_adds: int
    arithmetic: int
    full: int  # of those multiply-adds, or where there are none, of the arithmetic
    stack: int
    vector_stack: int  # those of vector registers
    calls: int

    @property
    def share(self) -> float:
        of = self.multiply_adds or self.arithmetic
        return self.full / of if of else 0.0


@dataclass
class Kernel:
    """A function's loops that matter."""

    name: str
    loops: list[Loop] = field(default_factory=list)


def build_flags() -> list[str]:
    """Those of setup.py, without debugging information."""
    keywords = {
        k.arg: k.value
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call)
        for k in node.keywords
    }
    ours = ast.literal_eval(keywords["extra_compile_args"])
    standard = ast.literal_eval(keywords["cxx_std"])
    pythons = shlex.split(f"{sysconfig.get_config_var('CFLAGS') or ''} {sysconfig.get_config_var('CCSHARED') or ''}")
    return [*pythons, f"-std=c++{standard}", "-fvisibility=hidden", *ours, "-g0"]


def toolchain(compiler: str | None = None, objdump: str = "objdump") -> Toolchain:
    """That of `compiler`, or of CXX, or of what built Python.

    Raises:
        RuntimeError: it is missing, or its machine has no budgets.
    """
    command = shlex.split(compiler or os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "g++")
    for tool in (command[0], objdump):
        if shutil.which(tool) is None:
            raise RuntimeError(f"{tool} is not on PATH")
    machine = _run([*command, "-dumpmachine"]).split("-")[0]
    if machine not in SETS:
        raise RuntimeError(f"{command[0]} compiles for {machine}; budgets are for {' and '.join(SETS)}")
    return Toolchain(tuple(command), objdump, machine, "clang" in _run([*command, "--version"]))


def disassemble(tools: Toolchain, which: InstructionSet, csrc: Path = ROOT / "csrc") -> str:
    """The listing of a set's kernels, compiled from the folder `csrc`."""
    with tempfile.TemporaryDirectory() as folder:
        made = f"{folder}/kernels.o"
        flags = [*build_flags(), f"-I{csrc}", f"-DPBF_SET={which.name}"]
        _run([*tools.compiler, *flags, "-c", str(KERNELS), "-o", made])
        return _run([tools.objdump, "--disassemble", "--demangle", "--no-show-raw-insn", "--wide", made])


def functions_of(listing: str) -> dict[str, list[Instruction]]:
    """Instructions by function. One that the compiler split in two has a name for each part."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = functions.setdefault(head[1], [])
        elif code := re.match(r"\s+([0-9a-f]+):\t(.*)$", line):
            current.append(Instruction(int(code[1], 16), code[2]))
    return functions


JUMP = re.compile(r"(?:j[a-z]+|b(?:\.[a-z]+)?|cbn?z|tbn?z)\s(?:.*[\s,])?([0-9a-f]+) <")
CALL = re.compile(r"call|blr?\s")


def innermost_loops(function: Sequence[Instruction]) -> list[list[Instruction]]:
    """What lies between a jump and its target before it, where no other such pair lies within."""
    first = {i.address: n for n, i in enumerate(function)}
    spans = set()
    for n, instruction in enumerate(function):
        if (jump := JUMP.match(instruction.text)) and first.get(int(jump[1], 16), n + 1) <= n:
            spans.add((first[int(jump[1], 16)], n))
    return [
        list(function[a : b + 1])
        for a, b in sorted(spans)
        if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)
    ]


def frame_registers(function: Sequence[Instruction]) -> str:
    """A pattern of what the stack is reached by: the frame pointer too, where it is one and no register like others."""
    texts = [i.text for i in function]
    if any(re.match(r"(mov\s+%rsp,%rbp|lea\s+.*\(%rsp\),%rbp)", t) for t in texts):
        return r"\(%r[sb]p[,)]"
    if any(re.match(r"(mov\s+x29, sp|add\s+x29, sp,)", t) for t in texts):
        return r"\[(sp|x29)\b"
    return r"\(%rsp[,)]|\[sp\b"


def measure(which: InstructionSet, loop: Sequence[Instruction], frame: str, factor: str = "float") -> Loop:
    texts = [i.text for i in loop]
    products = [t for t in texts if re.match(which.factors[factor], t)]
    arithmetic = [t for t in texts if re.match(which.arithmetic, t)]
    stack = [t for t in texts if re.search(frame, t)]
    return Loop(
        instructions=len(texts),
        multiply_adds=len(products),
        arithmetic=len(arithmetic),
        # A scalar of SSE names a whole register too.
        full=sum(bool(re.search(which.full, t)) and not re.match(r"\w+ss\b", t) for t in products or arithmetic),
        stack=len(stack),
        vector_stack=sum(bool(re.search(r"%[xyz]mm|\b[qv]\d", t)) for t in stack),
        calls=sum(bool(CALL.match(t)) for t in texts),
    )


TILE = re.compile(r"(?:.* )?pbf::(\w+)::(product_tile|row_sum_tile)<(\d+), (\d+), ([\w ]+)>\(")
PEAK = re.compile(r"(?:.* )?pbf::(\w+)::multiply_adds<([\w ]+)>\(")
TRANSFORMS = re.compile(r"(?:.* )?pbf::(\w+)::Convolution<([\w ]+)>::(?:transformed|operator\(\))\(")


def tiles_of(which: InstructionSet, functions: dict[str, list[Instruction]]) -> dict[tuple[str, str, int, int], Kernel]:
    """Loops of the products by kernel, factor, rows and vectors: every innermost loop, for there should be but one."""
    found = {}
    for name, code in functions.items():
        if (tile := TILE.match(name)) and tile[1] == which.name:
            kernel = Kernel(f"{tile[2]}<{tile[3]}, {tile[4]}, {tile[5]}>")
            frame = frame_registers(code)
            loops = [measure(which, loop, frame, tile[5]) for loop in innermost_loops(code)]
            kernel.loops = [loop for loop in loops if loop.multiply_adds]
            found[tile[2], tile[5], int(tile[3]), int(tile[4])] = kernel
    return found


def peaks_of(which: InstructionSet, functions: dict[str, list[Instruction]]) -> dict[str, Kernel]:
    """Loops of the measurement of the set's peak, by factor."""
    found = {}
    for name, code in functions.items():
        if (peak := PEAK.match(name)) and peak[1] == which.name:
            kernel = Kernel(f"multiply_adds<{peak[2]}>")
            loops = [measure(which, loop, frame_registers(code), peak[2]) for loop in innermost_loops(code)]
            kernel.loops = [loop for loop in loops if loop.multiply_adds]
            found[peak[2]] = kernel
    return found


def transforms_of(which: InstructionSet, functions: dict[str, list[Instruction]]) -> list[Kernel]:
    """Winograd's, which are inlined: loops with additions of vectors in a function that has no others."""
    found: dict[str, Kernel] = {}
    for name, code in functions.items():
        if (of := TRANSFORMS.match(name)) and of[1] == which.name:
            kernel = found.setdefault(of[2], Kernel(f"transforms<{of[2]}>"))
            frame = frame_registers(code)
            loops = [measure(which, loop, frame) for loop in innermost_loops(code)]
            kernel.loops += [loop for loop in loops if loop.arithmetic >= 2]
    return [kernel for kernel in found.values() if kernel.loops]


# Accesses to the stack for addresses, of which there may be more than general registers: of rows in a transform, by
# whether Clang compiles it, which makes a loop for each number of rows; of rows in the narrow tile of a last panel.
TRANSFORM_STACK = {False: 2, True: 16}
NARROW_STACK = 2
# In the loop of the set's peak, beside its arithmetic: GCC counts down and jumps, and Clang may copy a register.
PEAK_OTHERS = 4
# Those for vectors in a transform's loop: a constant, where SSE2's sixteen registers hold no more.
TRANSFORM_VECTORS = {("x86_64", "baseline"): 1}


def faults(tools: Toolchain, which: InstructionSet, functions: dict[str, list[Instruction]]) -> list[str]:
    """What is over a budget, a line each."""
    lines = []
    tiles = tiles_of(which, functions)
    kernels = {(kernel, factor) for kernel, factor, _, _ in tiles}
    wanted = {(kernel, factor) for kernel in ("product_tile", "row_sum_tile") for factor in which.factors}
    lines += [f"{kernel} of {factor} is missing" for kernel, factor in sorted(wanted - kernels)]
    largest = {k: max((rows, vectors) for a, b, rows, vectors in tiles if (a, b) == k) for k in kernels}
    for (kernel, factor, rows, vectors), tile in tiles.items():
        if not tile.loops:
            lines.append(f"{tile.name}: no loop with multiply-adds")
        for loop in tile.loops:
            if loop.multiply_adds % (rows * vectors):
                lines.append(f"{tile.name}: {loop.multiply_adds} multiply-adds per turn, {rows * vectors} sums")
            lines += _common(tile.name, loop, 0 if vectors == largest[kernel, factor][1] else NARROW_STACK)
            most = which.instructions[tools.is_clang] * loop.multiply_adds
            if (rows, vectors) == largest[kernel, factor] and loop.instructions > most:
                lines.append(f"{tile.name}: {loop.instructions} instructions per turn, {most:.0f} allowed")
    transforms = transforms_of(which, functions)
    if not transforms:
        lines.append("Winograd's transforms: no loop with additions")
    for kernel_of in transforms:
        for loop in kernel_of.loops:
            stack, vectors = TRANSFORM_STACK[tools.is_clang], TRANSFORM_VECTORS.get((tools.machine, which.name), 0)
            lines += _common(kernel_of.name, loop, stack, vectors)
    sums = max((rows * vectors for kernel, _, rows, vectors in tiles if kernel == "product_tile"), default=0)
    return lines + _peak_faults(which, functions, sums) + leaks(which, functions)


def _peak_faults(which: InstructionSet, functions: dict[str, list[Instruction]], sums: int) -> list[str]:
    """A peak that is measured too low would flatter the products."""
    lines = []
    peaks = peaks_of(which, functions)
    lines += [f"multiply_adds of {factor} is missing" for factor in which.factors if factor not in peaks]
    for peak in peaks.values():
        if not peak.loops:
            lines.append(f"{peak.name}: no loop with multiply-adds")
        for loop in peak.loops:
            if loop.multiply_adds % max(sums, 1):
                lines.append(f"{peak.name}: {loop.multiply_adds} multiply-adds per turn, {sums} sums")
            lines += _common(peak.name, loop, 0)
            most = max(loop.arithmetic, loop.multiply_adds) + PEAK_OTHERS
            if loop.instructions > most:
                lines.append(f"{peak.name}: {loop.instructions} instructions per turn, {most} allowed")
    return lines


def _common(name: str, loop: Loop, stack: int, vectors: int = 0) -> list[str]:
    lines = []
    if loop.share < 1:
        lines.append(f"{name}: {loop.share:.0%} of full width")
    if loop.stack > stack:
        lines.append(f"{name}: {loop.stack} accesses to the stack, {stack} allowed")
    if loop.vector_stack > vectors:
        lines.append(f"{name}: {loop.vector_stack} vectors spilled to the stack, {vectors} allowed")
    if loop.calls:
        lines.append(f"{name}: {loop.calls} calls")
    return lines


def leaks(which: InstructionSet, functions: dict[str, list[Instruction]]) -> list[str]:
    """Instructions of the set in functions that are not its own, and instructions that it does not have."""
    lines = []
    for name, code in functions.items():
        if f"pbf::{which.name}::" not in name and (bad := [i for i in code if re.match(which.own, i.text)]):
            lines.append(f"{name}: shared with other sets, and has {len(bad)} instructions like {bad[0].text!r}")
        if bad := [i for i in code if re.match(which.beyond, i.text)]:
            lines.append(f"{name}: not in {which.name}: {bad[0].text!r}")
    return lines


def table(which: InstructionSet, functions: dict[str, list[Instruction]]) -> list[str]:
    """A line for each loop of the largest tiles, of the transforms and of the peak."""
    tiles = tiles_of(which, functions)
    largest: dict[tuple[str, str], tuple[int, int]] = {}
    for kernel, factor, rows, vectors in tiles:
        largest[kernel, factor] = max(largest.get((kernel, factor), (0, 0)), (rows, vectors))
    shown = [tiles[kernel, factor, *size] for (kernel, factor), size in sorted(largest.items())]
    return [
        f"{which.name:12s} {kernel.name:38s} {loop.instructions:12d} {loop.multiply_adds:13d} {loop.arithmetic:10d}"
        f" {loop.share:10.0%} {loop.stack:6d} {loop.calls:5d}"
        for kernel in (*shown, *transforms_of(which, functions), *peaks_of(which, functions).values())
        for loop in kernel.loops
    ]


HEADER = (
    f"{'set':12s} {'loop of':38s} {'instructions':>12s} {'multiply-adds':>13s} {'arithmetic':>10s}"
    f" {'full width':>10s} {'stack':>6s} {'calls':>5s}"
)


def check(tools: Toolchain, csrc: Path = ROOT / "csrc") -> int:
    """Prints the table of a compiler; the number of faults."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        listings = list(pool.map(lambda which: disassemble(tools, which, csrc), SETS[tools.machine]))
    print(_run([*tools.compiler, "--version"]).splitlines()[0], f"({tools.machine})", HEADER, sep="\n")
    bad = 0
    for which, listing in zip(SETS[tools.machine], listings, strict=True):
        functions = functions_of(listing)
        lines = faults(tools, which, functions)
        bad += len(lines)
        print(*table(which, functions), *(f"     ! {line}" for line in lines), sep="\n", flush=True)
    return bad


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def main() -> int:
    bad = check(toolchain())
    # Neither is on every machine; where the whole check runs, both are.
    if shutil.which(CROSS) or os.environ.get("CI") == "true":
        bad += check(toolchain(CROSS, CROSS_OBJDUMP))
    elif platform.machine() != "aarch64":
        print(f"AArch64 was left out, because {CROSS} is not on PATH (on Debian and Ubuntu: g++-aarch64-linux-gnu)")
    print("every loop within its budget" if not bad else f"{bad} faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
