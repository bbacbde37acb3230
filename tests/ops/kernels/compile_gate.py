"""Compiles every shipped kernel configuration for GPUs that are not here, and holds the machine code to budgets.

    make compile-gate

``--brief 90`` compiles bfloat16 of the published width for one chip, or for more, ``--hopper`` only the kernels written
for Hopper, which another version of Triton can break on its own. Machine code is kept in build/, by content: Triton's
key for it is made of a kernel's source, its arguments and options, and of Triton itself.

What a budget guards: registers spilled to memory (LDL), shared memory beyond the chip's, products that lost the
matrix units or, on Hopper, lost wgmma or had it serialised, and a compiler fault that leaves 32 registers. What is
compiled is what the host code launches on such a GPU. A compiler assertion ends the process: it costs one target.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 90: 227, 100: 227, 120: 99}  # KB that one program may use
REGISTERS = 65536  # of a multiprocessor
CAPABILITIES = tuple(SHARED_MEMORY)
POINTERS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "uint8": "u8", "int32": "i32", "int64": "i64"}
FORWARD = ("local_block", "first_block", "global_attention", "weights", "global_track", "linear")
BACKWARD = (
    "local_block_for_training", "first_block_for_training", "global_track_for_training", "pointwise", "first_pointwise",
    "convolution_gradient", "weight_gradient", "dense_weight_gradient", "first_weight_gradient",
    "attention_rows_gradient", "attention_weights_gradient", "global_track_gradient",
)  # fmt: skip
HOPPER = (
    "local_block_hopper",
    "local_block_hopper_for_training",
    "convolution_gradient_hopper",
    "weight_gradient_hopper",
)
SUMS = ("add_spans", "row_sums", "add_parts")
# What the width of the local states changes, and that of the global ones.
WIDE = (
    "local_block", "first_block", "global_attention", "pointwise", "first_pointwise", "convolution_gradient",
    "weight_gradient", "dense_weight_gradient", "first_weight_gradient", "attention_rows_gradient",
    "attention_weights_gradient",
)  # fmt: skip
WIDEST = (
    "global_attention", "global_track", "attention_rows_gradient", "attention_weights_gradient",
    "global_track_gradient",
)  # fmt: skip
LOSSES = ("token_loss", "token_loss_backward", "annotation_loss", "annotation_slope")
# What has products large enough for Hopper's instruction, at widths up to 128.
WGMMA = (
    "local_block", "first_block", "global_attention", "convolution_gradient", "weight_gradient",
    "dense_weight_gradient", "first_weight_gradient", "attention",
)  # fmt: skip
COMPILED = Path(__file__).resolve().parents[3] / "build" / "compile-gate"


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
    ("first_block", 90, "tf32", 128): Budget(local_loads=32),
    ("global_track", 90, "bfloat16", 128): Budget(local_loads=16),
    ("global_attention", 90, "bfloat16", 128): Budget(programs=2),
    ("first_block", 80, "bfloat16", 128): Budget(local_loads=48),
    ("first_block", 80, "bfloat16", 256): Budget(local_loads=48),
    ("first_block", 80, "float16", 128): Budget(local_loads=48),
    ("local_block_for_training", 80, "bfloat16", 128): Budget(local_loads=4),
    ("local_block_for_training", 100, "bfloat16", 128): Budget(local_loads=16),
    ("first_block_for_training", 100, "bfloat16", 128): Budget(local_loads=16),
    ("first_block_for_training", 80, "bfloat16", 128): Budget(local_loads=48),
    ("pointwise", 90, "bfloat16", 128): Budget(local_loads=80, programs=2),
    ("first_pointwise", 90, "bfloat16", 128): Budget(local_loads=80, programs=2),
    ("attention_rows_gradient", 90, "bfloat16", 128): Budget(local_loads=32),
    ("attention_rows_gradient", 80, "tf32", 128): Budget(local_loads=12),
    ("attention_rows_gradient", 80, "float32", 128): Budget(local_loads=96, matrix=0),
    ("attention_weights_gradient", 90, "bfloat16", 128): Budget(local_loads=8, programs=2),
    ("global_track_gradient", 80, "float32", 128): Budget(local_loads=48, matrix=0),
    ("global_track_gradient", 80, "tf32", 128): Budget(local_loads=96),
    ("local_block_hopper", 90, "bfloat16", 64): Budget(programs=2),
    ("local_block_hopper", 90, "bfloat16", 128): Budget(local_loads=8, programs=2),
    ("local_block_hopper", 90, "float16", 128): Budget(local_loads=8, programs=2),
    ("local_block_hopper_for_training", 90, "bfloat16", 64): Budget(programs=2),
    ("local_block_hopper_for_training", 90, "bfloat16", 128): Budget(local_loads=12, programs=2),
    ("local_block_hopper_for_training", 90, "float16", 128): Budget(local_loads=12, programs=2),
    ("convolution_gradient_hopper", 90, "bfloat16", 64): Budget(programs=2),
    ("convolution_gradient_hopper", 90, "bfloat16", 128): Budget(programs=2),
    ("convolution_gradient_hopper", 90, "float16", 128): Budget(programs=2),
}
for _capability in CAPABILITIES:
    # Small: 16 proteins' states take all registers, and little time.
    BUDGETS["global_track_gradient", _capability, "bfloat16", 128] = Budget(local_loads=40)
    BUDGETS["global_track_for_training", _capability, "bfloat16", 128] = Budget(local_loads=16)
    BUDGETS["global_track", _capability, "float32", 128] = Budget(local_loads=140, matrix=0)
    BUDGETS["local_block", _capability, "float32", 256] = Budget(local_loads=8, matrix=0)
for _capability in (80, 100):
    BUDGETS["attention_rows_gradient", _capability, "bfloat16", 32] = Budget(local_loads=24)
for _kernel in ("first_block", "first_block_for_training"):
    BUDGETS[_kernel, 120, "bfloat16", 128] = Budget(local_loads=48)
for _kernel, _capability, _loads in (
    ("local_block", 86, 64), ("first_block", 86, 48), ("attention_weights_gradient", 86, 8),
):  # fmt: skip
    BUDGETS[_kernel, _capability, "bfloat16", 256] = Budget(local_loads=_loads)
# Triton computes products on Turing without its matrix units: kernels run there, slowly.
for _kernel in (*FORWARD, *BACKWARD, *LOSSES):
    BUDGETS[_kernel, 75, "float16", 128] = Budget(local_loads=240, matrix=0)


@dataclass(frozen=True)
class Target:
    """One kernel as it is launched on one kind of GPU."""

    kernel: str
    capability: int
    dtype: str
    d_local: int
    d_global: int = 512
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        wide = f" d_global {self.d_global}" if self.d_global != 512 else ""
        return f"sm_{self.capability} {self.kernel} {self.dtype} d_local {self.d_local}{wide}"

    @property
    def d_key(self) -> int:
        """The widest with the widest global states."""
        return 64 if self.d_global == 512 else 128

    @property
    def is_hopper(self) -> bool:
        """Whether it is written for Hopper, in Gluon."""
        return "hopper" in self.kernel

    @property
    def budget(self) -> Budget:
        default = Budget(matrix=0 if self.dtype == "float32" or self.kernel in SUMS else 1)
        if self.d_global != 512:  # that they fit into shared memory is what counts
            return replace(default, local_loads=2000)
        return BUDGETS.get((self.kernel, self.capability, self.dtype, self.d_local), default)


def targets() -> list[Target]:
    """Every kernel on every kind of GPU, in the dtypes and widths in which its code differs."""
    found = [Target(name, 75, "float16", 128) for name in (*FORWARD, *BACKWARD, *LOSSES)]
    found += [Target(name, 120, "bfloat16", 128) for name in (*FORWARD, *BACKWARD)]
    found += [Target(name, 100, "bfloat16", 128) for name in (*FORWARD, *BACKWARD, *LOSSES)]
    for capability in (80, 90):
        found += [Target(name, capability, "bfloat16", 128) for name in (*FORWARD, *BACKWARD, *LOSSES, "token_head")]
        found += [Target(name, capability, "bfloat16", 64) for name in ("local_block", "global_attention")]
        found += [Target(name, capability, "bfloat16", 256) for name in WIDE]
        found += [Target(name, capability, "float16", 128) for name in ("local_block", "first_block")]
        found += [Target(name, capability, "tf32", 128) for name in ("local_block", "first_block", "global_attention")]
    # The narrowest: of more channels at a time than there are, no kernel would know.
    found += [Target("attention_rows_gradient", c, "bfloat16", 32) for c in (80, 100)]
    # The widest that are taken, where a program has the least memory.
    found += [Target(name, 86, "bfloat16", 256) for name in WIDE]
    found += [Target(name, 86, "bfloat16", 256, 1024) for name in WIDEST]
    found += [Target(name, 90, "bfloat16", 128, 1024) for name in WIDEST if "track" not in name]
    found += [Target(name, 80, "tf32", 128) for name in BACKWARD if "training" not in name]
    found += [Target(name, 90, "bfloat16", 128) for name in SUMS]
    found += [Target(name, 80, "float32", 128) for name in (*FORWARD, *BACKWARD, *LOSSES)]
    found += [Target(name, 90, "float32", 256) for name in ("local_block", "global_attention")]
    return found + hopper_targets()


def hopper_targets() -> list[Target]:
    """Of the local block's own kernels for Hopper, under versions of Triton that can compile it."""
    import torch

    from proteinbert_fast.ops.kernels.local_block import portable_because

    sizes = (("bfloat16", 64), ("bfloat16", 128), ("float16", 128))
    return [
        Target(name, 90, dtype, d_local)
        for dtype, d_local in sizes
        for name in HOPPER
        if (name != "weight_gradient_hopper" or d_local == 128)
        and portable_because(90, d_local, getattr(torch, dtype)) is None
    ]


def why_no_hopper() -> str | None:
    """What keeps the kernels for Hopper from the published sizes here, or None where nothing does."""
    import torch

    from proteinbert_fast.ops.kernels.local_block import portable_because

    return portable_because(90, 128, torch.bfloat16)


class Launch(NamedTuple):
    """A kernel as it was launched.

    Attributes:
        kernel: the jitted function.
        signature: type of each argument.
        constants: compile-time arguments.
        options: warps, stages and the like.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]


def launches(target: Target) -> dict[str, Launch]:
    """What forward and backward passes at the published sizes launch on a target's GPU, by name; nothing is run."""
    import torch
    from triton.runtime import JITFunction

    from proteinbert_fast import ProteinBertConfig, Tokenizer
    from proteinbert_fast.model import Block
    from proteinbert_fast.ops import kernels
    from proteinbert_fast.ops.kernels import launching
    from proteinbert_fast.ops.reference import Embedded

    is_hopper = target.is_hopper
    forward = "proteinbert_fast.ops.kernels.local_block"
    backward = f"{forward}_backward"
    module = import_module((backward if "gradient_hopper" in target.kernel else forward) + "_hopper" * is_hopper)
    shipped = module.configuration

    found: dict[str, Launch] = {}

    def record(kernel: Any, *arguments: Any, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        options = {name: named.pop(name) for name in list(named) if name not in kernel.arg_names}
        values |= named
        if values.get("D") == target.d_local and "G" not in values and values.get("CHUNK", 0) > target.d_local:
            raise ValueError(f"{kernel.fn.__name__}: {target.d_local} channels, {values['CHUNK']} at a time")
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature = {n: "constexpr" if n in constants else _type(v) for n, v in values.items()}
        name = kernel.fn.__name__.removesuffix("_kernel")
        name = {"span_sums": "global_attention"}.get(name, name)
        if constants.get("SYMBOLS"):
            name = "first_block"
        if constants.get("EMBEDDED"):
            name = f"first_{name}"
        elif constants.get("TAPS") == 1:
            name = f"dense_{name}"
        if constants.get("KEEP_RESULTS") or constants.get("KEEP_SUMS"):
            name = f"{name}_for_training"
        if constants.get("ACTIVATION") == "softmax":
            name = "token_head"
        found.setdefault(name, Launch(kernel, signature, constants, options))

    dtype = getattr(torch, target.dtype.replace("tf32", "float32"))
    torch.set_float32_matmul_precision("high" if target.dtype == "tf32" else "highest")
    config = ProteinBertConfig(
        n_annotations=16, d_local=target.d_local, d_global=target.d_global, n_blocks=1, d_key=target.d_key
    )
    block = Block(config).to(dtype)
    batch = Tokenizer()(["M" * 17_000, "M" * 40])  # so long that spans are added up in rounds
    table = torch.zeros(26, config.d_local, dtype=dtype, requires_grad=True)
    state = torch.zeros(2, config.d_global, dtype=dtype)
    token_head = torch.nn.Linear(config.d_local, 26, dtype=dtype)
    go_head = torch.nn.Linear(config.d_global, 100, dtype=dtype)
    local_weights, global_weights, following = block.local_weights(), block.global_weights(), block.message_weights()
    with (
        patch.object(JITFunction, "__getitem__", lambda kernel, grid: partial(record, kernel)),
        patch.object(launching, "capability", lambda index: target.capability),
        patch.object(module, "configuration", lambda *a: shipped(*a)._replace(**target.changes)),
        patch.object(import_module(forward), "portable_because", lambda *a: None if is_hopper else "wanted"),
        patch.object(import_module(backward), "portable_because", lambda *a: None if is_hopper else "wanted"),
    ):
        for training in (False, True):
            with torch.set_grad_enabled(training):
                message = kernels.message(state, following)
                embedded = Embedded(batch.tokens, table)
                _, x = kernels.local_block(embedded, message.broadcast, batch, local_weights, 5)
                _, local = kernels.local_block(x, message.broadcast, batch, local_weights, 5)
                track = kernels.global_track(local, state, message, batch, global_weights, following, 4)
                last = kernels.global_track(local, track.global_state, track.message, batch, global_weights, None, 4)
        tokens, terms, ones = batch.tokens.clamp(max=25), torch.zeros(2, 100), torch.ones(batch.n_rows)
        loss = kernels.token_loss(token_head, local, tokens, ones)
        loss = loss + kernels.annotation_loss(go_head, last.global_state, terms, ones[:2], ones[:100])
        loss.backward()
        with torch.no_grad():
            kernels.global_track(local, state, message, batch, global_weights, None, 4, return_attention=True)
            kernels.residue_mean(local, batch)
            kernels.head(token_head, local, "softmax", torch.float32, by_row=True)
    return found


def _type(value: Any) -> str:
    """Of an argument, as the compiler names it."""
    import torch

    if isinstance(value, torch.Tensor):
        return "*" + POINTERS[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    layout = getattr(value, "layout", None)
    name, block = POINTERS[str(value.base.dtype).removeprefix("torch.")], ",".join(map(str, value.block_shape))
    return f"tensordesc<{name}[{block}]" + (f",{layout!r}>" if layout is not None else ">")


def compile_here(target: Target) -> dict[str, Any]:
    """Counts of the machine code of a target. Runs in a process of its own."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature, constants, options = launches(target)[target.kernel]
    if target.is_hopper:
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    aligned = {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if signature[p.name].startswith("*") and not p.do_not_specialize_on_alignment
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target.capability, 32), options=options)
    found = counts(compiled.asm["cubin"])
    if target.is_hopper:
        found["unordered"] = unordered(compiled.asm["ptx"])
    return found | {
        "shared_memory": compiled.metadata.shared, "threads": options["num_warps"] * 32, "triton": triton.__version__,
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
        listing = _run(tools / "nvdisasm", "-c", "-ndf", file.name)
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
    # Chips of 8.6 and 8.9 take the tiles of 8.0, up to these widths.
    shares = target.capability == 80 and target.d_local <= 128 and target.d_global <= 512
    budget, limit = target.budget, SHARED_MEMORY[86 if shares else target.capability] * 1024
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
    if target.capability == 90 and budget.matrix:
        if not found["wgmma"] and target.kernel.startswith(WGMMA) and target.d_local <= 128:
            lines.append("wgmma was lost")
        elif found["warpgroup"] > found["wgmma"] + 4:
            lines.append(f"wgmma is serialised: {found['warpgroup']} fences for {found['wgmma']} products")
    return lines


def compile_apart(*wanted: Target) -> list[dict[str, Any]]:
    """As `compile_here`, in a process of its own; {"crashed": why} for one that ended it."""
    environment = {"TRITON_CACHE_DIR": str(COMPILED), "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.ops.kernels.compile_gate", json.dumps([asdict(t) for t in wanted])]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)
    # Between them, what the compiler says of code that it fails on.
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    if len(found) < len(wanted):
        found.append({"crashed": cause(done.stderr) or f"exit code {done.returncode}"})
    rest = wanted[len(found) :]
    return found + (compile_apart(*rest) if rest else [])


def cause(said: str) -> str:
    """The line of a process's last words that tells why it ended: the first error of a chain, else the last line."""
    # Triton wraps an error in one for each call on the way, with pictures of source code between them.
    errors = re.findall(r"^(?!.*: at \d+:\d+:$)[\w.]*(?:Error|Exception)\b[:(].+$", said, re.MULTILINE)
    return (errors or re.findall(r"^.*\w.*$", said, re.MULTILINE)[-1:] or [""])[0]


def chosen(arguments: Sequence[str]) -> list[Target]:
    """What the command line asks for."""
    match list(arguments):
        case []:
            return targets()
        case ["--hopper"]:
            return hopper_targets()
        case ["--brief", *chips]:
            wanted = [(int(chip), "bfloat16", 128) for chip in chips]
            return [t for t in targets() if (t.capability, t.dtype, t.d_local) in wanted]
    raise SystemExit(f"compile_gate: unknown arguments: {' '.join(arguments)}")


def main(arguments: Sequence[str]) -> int:
    if arguments and arguments[0].startswith("["):
        for target in json.loads(arguments[0]):
            print(json.dumps(compile_here(Target(**target))), flush=True)
        return 0
    wanted = chosen(arguments)
    if not wanted:
        print(f"FAIL nothing to compile: {why_no_hopper() or ' '.join(arguments)}")
        return 1
    # To start a process takes as long as to compile two targets. Neighbours take alike long, so they are dealt out.
    n = os.cpu_count() or 1
    with ThreadPoolExecutor(n) as pool:
        shares = list(pool.map(lambda i: compile_apart(*wanted[i::n]), range(n)))
    bad = 0
    for i, target in enumerate(wanted):
        found = shares[i % n][i // n]
        lines = [found["crashed"]] if "crashed" in found else faults(target, found)
        bad += bool(lines)
        shown = ", ".join(f"{name} {value}" for name, value in found.items() if name != "crashed")
        print(f"{'FAIL' if lines else 'ok  '} {target.label:52s} {shown}", *lines, sep="\n     ! ", flush=True)
    print(f"{len(wanted) - bad} of {len(wanted)} configurations within their budgets")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
