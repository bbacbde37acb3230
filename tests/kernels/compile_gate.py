"""Compiles every shipped kernel configuration for GPUs that are not here, and holds the machine code to budgets.

    make compile-gate

What a budget guards: registers spilled to memory (LDL), shared memory beyond the chip's, products that lost the
matrix units or, on Hopper, lost wgmma or had it serialised, and a compiler fault that leaves 32 registers. Each
configuration is compiled in a process of its own with an empty cache: a compiler assertion ends the process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_MEMORY = {75: 64, 80: 163, 90: 227, 100: 227}  # KB that one program may use
REGISTERS = 65536  # of a multiprocessor
CAPABILITIES = tuple(SHARED_MEMORY)
# "tf32" is float32 whose products may be rounded, by the user's setting.
LOSSES = ("token_loss", "token_loss_backward", "annotation_loss", "annotation_slope")
NAMES = {"float32": "fp32", "tf32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Budget:
    """What machine code may use.

    Attributes:
        local_loads: instructions that read spilled registers.
        matrix: instructions of the matrix units there must be; 0 where float32 is computed exactly, without them.
        programs: that must fit on one multiprocessor together.
    """

    local_loads: int = 0
    matrix: int = 1
    programs: int = 1


# Kernel, capability, dtype, d_local: what differs from no spills at all and matrix units in use. Measured with both
# supported versions of Triton; the larger count and a little room.
BUDGETS: dict[tuple[str, int, str, int], Budget] = {
    ("local_block", 80, "bfloat16", 128): Budget(local_loads=4),
    ("local_block", 80, "bfloat16", 256): Budget(local_loads=64),
    ("local_block", 80, "float16", 128): Budget(local_loads=4),
    ("first_block", 80, "tf32", 128): Budget(local_loads=48),
    ("first_block", 90, "tf32", 128): Budget(local_loads=16),
    ("global_track", 90, "bfloat16", 128): Budget(local_loads=16),
    ("first_block", 80, "bfloat16", 128): Budget(local_loads=48),
    ("first_block", 80, "bfloat16", 256): Budget(local_loads=48),
    ("first_block", 80, "float16", 128): Budget(local_loads=48),
    ("local_block_hopper", 90, "bfloat16", 64): Budget(programs=2),
    ("local_block_hopper", 90, "bfloat16", 128): Budget(local_loads=8, programs=2),
    ("local_block_hopper", 90, "float16", 128): Budget(local_loads=8, programs=2),
}
for _capability in CAPABILITIES:
    BUDGETS["global_track", _capability, "float32", 128] = Budget(local_loads=140, matrix=0)
    BUDGETS["local_block", _capability, "float32", 256] = Budget(local_loads=8, matrix=0)
# Triton computes products on Turing without its matrix units: kernels run there, slowly.
for _kernel in ("local_block", "first_block", "global_attention", "global_track", "linear", "weights", *LOSSES):
    BUDGETS[_kernel, 75, "float16", 128] = Budget(local_loads=140, matrix=0)


@dataclass(frozen=True)
class Target:
    """One kernel as it is launched on one kind of GPU."""

    kernel: str
    capability: int
    dtype: str
    d_local: int
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"sm_{self.capability} {self.kernel} {self.dtype} d_local {self.d_local}"

    @property
    def budget(self) -> Budget:
        is_sum = self.kernel in {"add_spans", "residue_mean"}
        default = Budget(matrix=0 if self.dtype == "float32" or is_sum else 1)
        return BUDGETS.get((self.kernel, self.capability, self.dtype, self.d_local), default)


def targets() -> list[Target]:
    """Every kernel, dtype and width on Ampere and Hopper; on others, what may differ there."""
    found = []
    for capability in CAPABILITIES:
        half = "float16" if capability < 80 else "bfloat16"
        is_main = capability in {80, 90}
        widths = {half: (32, 64, 128, 256) if is_main else (128,), "float32": (128, 256) if is_main else (128,)}
        if is_main:
            widths |= {"float16": (128,), "tf32": (128,)}
        for dtype, sizes in widths.items():
            found.append(Target("first_block", capability, dtype, 128))
            for d_local in sizes:
                found.append(Target("local_block", capability, dtype, d_local))
                found.append(Target("global_attention", capability, dtype, d_local))
        for dtype in (half, "float32", *(["tf32"] if is_main else [])):
            found += [Target(name, capability, dtype, 128) for name in ("weights", "global_track", "linear")]
        if capability >= 80:
            found.append(Target("token_head", capability, half, 128))
            found.append(Target("first_block", capability, half, 256))
        found += [Target(name, capability, half, 128) for name in ("add_spans", "residue_mean")]
        for dtype in (half, "float32", *(["tf32"] if is_main else [])):
            found += [Target(name, capability, dtype, 128) for name in LOSSES]
        if is_main:
            found.append(Target("token_loss_backward", capability, half, 256))
    return found + hopper_targets()


def hopper_targets() -> list[Target]:
    """Of the local block's own kernel for Hopper, under versions of Triton that can compile it."""
    import torch

    from proteinbert_fast.ops.kernels.local_block import portable_because

    sizes = (("bfloat16", 64), ("bfloat16", 128), ("float16", 128))
    return [
        Target("local_block_hopper", 90, dtype, d_local)
        for dtype, d_local in sizes
        if portable_because(90, d_local, getattr(torch, dtype)) is None
    ]


def compile_here(target: Target) -> dict[str, Any]:
    """Counts of the machine code of a target. Runs in a process of its own."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import proteinbert_fast.ops.kernels  # noqa: F401

    names = ("global_attention", "global_track", "linear", "local_block", "losses", "residue_mean")
    modules = {name: sys.modules[f"proteinbert_fast.ops.kernels.{name}"] for name in names}
    dtype, name = getattr(torch, target.dtype.replace("tf32", "float32")), NAMES[target.dtype]
    precision = "tf32" if target.dtype == "tf32" else "ieee"
    d, capability = target.d_local, target.capability
    types: dict[str, str] = {"n_proteins": "i32", "n_rows": "i32", "SUMS": "*fp32", "FIRST_SPAN": "*i64"}
    types |= {"STARTS": "*i64", "LENGTHS": "*i64", "SPAN_PROTEIN": "*i32", "SEGMENTS": "*i32", "QUERY": "*fp32"}
    heads = {"D": d, "H": 4, "K": 64, "K_PADDED": 64, "SCALE": 0.18, "PRECISION": precision}
    options: dict[str, Any] = {}
    if target.kernel == "local_block_hopper":
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

        from proteinbert_fast.ops.kernels import local_block_hopper as module

        kernel, c = module.local_block_hopper_kernel, module.configuration(d)._replace(**target.changes)
        types |= {"W_TILES": f"tensordesc<{name}[{c.chunk}, {d}],{module.weight_layout()!r}>", "first": "i32"}
        constants = {"D": d, "TAPS": 9, "DILATION": 5, "M": c.rows, "CHUNK": c.chunk, "STAGES": c.stages,
                     "HALO": module.HALO, "KEEP_HIDDEN": False, "EPSILON": 1e-3}  # fmt: skip
        warps, stages = c.warps, c.stages
        options = {} if c.registers is None else {"maxnreg": c.registers}
    elif target.kernel in {"local_block", "first_block"}:
        kernel = modules["local_block"].local_block_kernel
        c = modules["local_block"].configuration(capability, d, dtype, precision)._replace(**target.changes)
        chunk, symbols = min(c.chunk, d), 32 if target.kernel == "first_block" else 0
        types |= {"TOKENS": "*u8" if symbols else "*i32", "first": "i32"}
        if c.descriptors:
            types["LOCAL_TILES"] = f"tensordesc<{name}[{c.rows},{d}]>"
            if not symbols:
                types["X_TILES"] = f"tensordesc<{name}[{c.rows},{chunk}]>"
                types["W_TILES"] = f"tensordesc<{name}[{chunk},{d}]>"
        constants = {"D": d, "TAPS": 9, "DILATION": 5, "M": c.rows, "CHUNK": chunk, "STAGES": c.stages,
                     "DESCRIPTORS": c.descriptors, "PRECISION": precision, "KEEP_HIDDEN": False, "EPSILON": 1e-3,
                     "CHUNKED_DENSE": c.chunked_dense, "KEPT": name != "fp32",
                     "SYMBOLS": symbols}  # fmt: skip
        warps, stages = c.warps, c.stages
    elif target.kernel in {"global_attention", "weights", "add_spans"}:
        module = modules["global_attention"]
        c = module.configuration(capability, d, dtype, precision)._replace(**target.changes)
        warps, stages = c.warps, c.stages
        types["DENOMINATOR"] = "*fp32"
        if target.kernel == "global_attention":
            kernel = module.span_sums_kernel
            constants = heads | {"V": 128, "V_PADDED": 128, "SPAN": module.SPAN, "M": c.rows, "STAGES": c.stages,
                                 "CHUNK": c.chunk, "RESIDUES": 32, "WIDTH": 516 + d}  # fmt: skip
        elif target.kernel == "weights":
            kernel, constants = module.weights_kernel, heads | {"M": c.rows}
        else:
            kernel, warps = module.add_spans_kernel, 4
            types |= {"COARSE_PROTEIN": "*i32", "FIRST_COARSE": "*i64", "COARSE_SUMS": "*fp32"}
            constants = {"WIDTH": 644, "WIDTH_PADDED": 1024, "AT_ONCE": module.SPANS_AT_ONCE}
    elif target.kernel == "residue_mean":
        kernel, warps, stages = modules["residue_mean"].residue_sums_kernel, 4, 1
        types["n_columns"] = "i32"
        constants = {"SPAN": 512, "M": 32, "N": 128}
    elif target.kernel == "global_track":
        module = modules["global_track"]
        kernel = module.global_track_kernel
        c = module.configuration(capability, dtype, precision)._replace(**target.changes)
        types |= {"DENOMINATOR": "*fp32", "MEAN": "*fp32"}
        constants = {"G": 512, "G_PADDED": 512, "H": 4, "H_PADDED": 16, "V": 128, "QUERIES": 256, "QUERIES_PADDED": 256,
                     "D": d, "WIDTH": 516, "M": 16, "CHUNK": c.chunk, "KEEP_DENOMINATOR": False, "PRECISION": precision,
                     "EPSILON": 1e-3}  # fmt: skip
        warps, stages = c.warps, c.stages
    elif target.kernel in LOSSES:
        module = modules["losses"]
        kernel = getattr(module, f"{target.kernel}_kernel")
        m, n, chunk = module.tile(capability, dtype, precision)
        types |= dict.fromkeys(("WEIGHTS", "TERM_WEIGHTS", "LOGS", "LOSSES", "SUMS", "GRADIENT", "DW", "DB"), "*fp32")
        types |= {"TARGETS": "*u8", "BIAS": "*fp32"}
        types |= dict.fromkeys(("n_columns", "n_classes", "n_tiles", "first", "n_slopes", "stride"), "i32")
        is_token = target.kernel.startswith("token")
        constants = {"K": d if is_token else 512, "M": m, "N": n, "C": 32, "CHUNK": chunk, "PRECISION": precision,
                     "HAS_TERM_WEIGHTS": True, "WANTS_STATES": True, "WANTS_HEAD": True}  # fmt: skip
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        warps, stages = 4 if is_token else 8, 2 if target.kernel == "token_loss_backward" else 3
    else:
        kernel = modules["linear"].linear_kernel
        types |= {"n_inputs": "i32", "n_columns": "i32"}
        rows = modules["linear"]._MANY_ROWS if target.kernel == "token_head" else modules["linear"]._ROWS
        activation = "softmax" if target.kernel == "token_head" else "gelu"
        constants = {"HAS_BIAS": True, "ACTIVATION": activation, "M": rows, "N": 64, "PRECISION": precision,
                     "CHUNK": modules["linear"]._INPUTS[dtype]}  # fmt: skip
        warps, stages = 8 if target.kernel == "token_head" else 4, 3
    signature = {n: "constexpr" if n in constants else types.get(n, f"*{name}") for n in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options |= {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    found = counts(compiled.asm["cubin"])
    if target.kernel == "local_block_hopper":
        found["unordered"] = unordered(compiled.asm["ptx"])
    return found | {
        "shared_memory": compiled.metadata.shared, "threads": warps * 32, "triton": triton.__version__,
    }  # fmt: skip


def unordered(ptx: str) -> int:
    """Accesses to shared memory that no barrier between a program's threads keeps apart; lines in their order.

    Products must see a fence and a barrier after what threads wrote; what writes over operands, a barrier after the
    wait for the products that read them; and the copy engine a fence and a barrier after the start of its barriers.
    """
    read = written = started = ""
    found = 0
    for line in ptx.splitlines():
        if "wgmma.mma_async" in line:
            found += bool(written)
            read = "being read"
        elif "wgmma.wait_group" in line and read:
            read = "read"
        elif "cp.async.bulk.tensor" in line:
            found += bool(read) + bool(started)
        elif "mbarrier.init" in line:
            started = "written"
        elif "st.shared" in line or "stmatrix" in line or "cp.async.cg.shared" in line:
            found += bool(read)
            written = "copying" if "cp.async" in line else "written"
        elif "cp.async.wait_group" in line and written:
            written = "written"
        elif "fence.proxy.async" in line:
            written, started = (state and ("fenced" if state == "written" else state) for state in (written, started))
        elif "bar.sync" in line:
            read = "" if read == "read" else read
            written, started = ("" if state == "fenced" else state for state in (written, started))
    return found


def counts(cubin: bytes) -> dict[str, int]:
    """Of instructions and registers in a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run(tools / "nvdisasm", "-c", file.name)
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
    instruction = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Za-z0-9_.]*)")
    found = [m[1] for line in listing.splitlines() if (m := instruction.match(line))]

    def of(*prefixes: str) -> int:
        return sum(name.startswith(prefixes) for name in found)

    registers = re.search(r"REG:(\d+)", usage)
    assert registers, usage
    return {
        "registers": int(registers[1]),
        "local_loads": of("LDL"),
        "wgmma": of("HGMMA"),
        "matrix": of("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA"),
        "warpgroup": of("WARPGROUP"),
        "instructions": len(found),
    }


def _run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


def faults(target: Target, found: dict[str, Any]) -> list[str]:
    """What is over a target's budget, a line each."""
    budget, limit = target.budget, SHARED_MEMORY[target.capability] * 1024
    lines = []
    if found["shared_memory"] > limit:
        lines.append(f"{found['shared_memory']:,} bytes of shared memory, the chip has {limit:,}")
    if found["local_loads"] > budget.local_loads:
        lines.append(f"{found['local_loads']} loads of spilled registers, {budget.local_loads} allowed")
    if found["matrix"] < budget.matrix:
        lines.append("no instruction of the matrix units")
    if found["registers"] == 32 and found["local_loads"]:
        lines.append("32 registers and spills: a known fault of the compiler")
    fit = min(REGISTERS // (found["registers"] * found["threads"]), (limit + 1024) // (found["shared_memory"] + 1024))
    if fit < budget.programs:
        lines.append(f"{fit} programs on a multiprocessor, {budget.programs} wanted")
    if found.get("unordered"):
        lines.append(f"{found['unordered']} accesses to shared memory that no barrier keeps apart")
    if target.capability == 90 and target.kernel.startswith("local_block") and budget.matrix:
        if not found["wgmma"]:
            lines.append("wgmma was lost")
        elif found["warpgroup"] > found["wgmma"] + 4:
            lines.append(f"wgmma is serialised: {found['warpgroup']} fences for {found['wgmma']} products")
    return lines


def compile_apart(target: Target) -> dict[str, Any]:
    """As `compile_here`, in a process of its own with an empty cache; {"crashed": why} if that ended badly."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_INTERPRET": "0"}
        command = [sys.executable, "-m", "tests.kernels.compile_gate", json.dumps(asdict(target))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"crashed": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(arguments: Sequence[str]) -> int:
    if arguments:
        print(json.dumps(compile_here(Target(**json.loads(arguments[0])))))
        return 0
    bad = 0
    wanted = targets()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for target, found in zip(wanted, pool.map(compile_apart, wanted), strict=True):
            lines = [found["crashed"]] if "crashed" in found else faults(target, found)
            bad += bool(lines)
            shown = ", ".join(f"{name} {value}" for name, value in found.items() if name != "crashed")
            print(f"{'FAIL' if lines else 'ok  '} {target.label:48s} {shown}", *lines, sep="\n     ! ", flush=True)
    print(f"{len(wanted) - bad} of {len(wanted)} configurations within their budgets")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
