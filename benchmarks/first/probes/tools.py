"""NVIDIA's tools over what ran before: counters of four kernels, and bad memory accesses of checks that failed."""

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.first.commands import output_of
from benchmarks.first.probes.right import operation
from benchmarks.first.process import Context
from benchmarks.first.runner import Probe, command_of

_REPLAYED_TOKENS = 250_000  # ncu runs a kernel again for every group of counters
_MOST_SANITIZED = 4  # probes; the tools are slow
_SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--print-limit", "20"]


class Counted(NamedTuple):
    """A kernel whose counters are wanted: its function's names, and the operation that launches it."""

    name: str
    functions: tuple[str, ...]
    operation: str


COUNTED = (
    Counted("local block", ("local_block_hopper_kernel", "local_block_kernel"), "local_block"),
    Counted("span sums", ("span_sums_kernel",), "global_track"),
    Counted("first block", ("local_block_kernel",), "local_block, first"),
    Counted("pointwise gradient", ("pointwise_kernel",), "gradient of local_block"),
)


def run(context: Context) -> None:
    """What the options say: counters, sanitizer, or the one operation that a tool looks at."""
    what = context.options["what"]
    if what == "sanitizer":
        sanitize(context)
    elif context.can_run():
        {"counters": count, "once": once}[what](context)


def once(context: Context) -> None:
    """Launches one operation once."""
    from proteinbert_fast.benchmark.gpu.operations import Inputs
    from proteinbert_fast.benchmark.gpu.sections.kernels import kernel_lengths

    changes = {} if context.job["tiny"] else {"kernel_tokens": _REPLAYED_TOKENS}
    bench = context.bench(gradients=True, **changes)
    inputs = Inputs(bench.settings.config, kernel_lengths(bench), context.precision, bench.device, bench.device)
    import torch

    with torch.inference_mode(), context.precision.active():
        operation(context.options["operation"]).run(inputs)
    bench.synchronize()


def count(context: Context) -> None:
    """Nsight Compute's text for each kernel; clocks are left as they are."""
    tool = shutil.which("ncu")
    if tool is None:
        context.emit(None, note="not measured: no ncu on PATH")
        return
    ends = time.monotonic() + context.seconds - 5
    for number, counted in enumerate(COUNTED):
        context.begin(counted.name)
        job = _job(context, "benchmarks.first.probes.tools", {"what": "once", "operation": counted.operation})
        functions = "|".join(counted.functions)
        command = [tool, "--clock-control", "none", "--set", "detailed", "--target-processes", "all",
                   "--kernel-name", f"regex:^({functions})$", "--launch-count", "1", *command_of(job)]  # fmt: skip
        share = (ends - time.monotonic()) / (len(COUNTED) - number)
        text, end, seconds = output_of(command, share)
        found = [name for name in counted.functions if f"{name} (" in text or f"{name}(" in text]
        context.text("ncu.txt", f"==== {counted.name}: {end}, {seconds:.0f} s\n{text}\n")
        context.emit(bool(found), check=f"counters of {counted.name}", found=end if found else f"no counters: {end}")


def sanitize(context: Context) -> None:
    """Runs the checks that failed again, on small batches, under memcheck, then racecheck."""
    failed = [Probe(**values) for values in context.options["probes"] if values["name"] in context.so_far["failed"]]
    failed = failed[:_MOST_SANITIZED]
    if not failed:
        context.emit(True, check="sanitizer", found="no check failed: nothing to look for")
        return
    if not context.can_run():
        return
    if shutil.which(_SANITIZER[0]) is None:
        context.emit(None, check="sanitizer", note=f"not measured: no {_SANITIZER[0]} on PATH")
        return
    ends = time.monotonic() + context.seconds - 5
    runs = [(tool, probe) for tool in ("memcheck", "racecheck") for probe in failed]
    for number, (tool, probe) in enumerate(runs):
        context.begin(f"{tool} of {probe.name}")
        job = _job(context, probe.module, {**probe.options, "small": True})
        # PyTorch's own allocator hides what lies beyond an array.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        share = (ends - time.monotonic()) / (len(runs) - number)
        text, end, seconds = output_of([*_SANITIZER, "--tool", tool, *command_of(job)], share, alone)
        said = [line for line in text.splitlines() if line.startswith("=========")]
        context.text("sanitizer.txt", f"==== {tool} of {probe.name}: {end}, {seconds:.0f} s\n" + "\n".join(said) + "\n")
        clean = any("ERROR SUMMARY: 0 errors" in line or "RACECHECK SUMMARY: 0 hazards" in line for line in said)
        context.emit(clean, check=f"{tool} of {probe.name}", found=said[-1].strip("= ") if said else end)


def _job(context: Context, module: str, options: dict[str, Any]) -> Path:
    """The file of a process below this one."""
    options = {"precision": context.precision.name} | options
    values = dict(context.job) | {"below": True, "module": module, "options": options}
    path = context.scratch / f"below-{os.getpid()}-{time.monotonic_ns()}.json"
    path.write_text(json.dumps(values))
    return path


def values_of(probes: Sequence[Probe]) -> list[dict[str, Any]]:
    """Probes as options hold them."""
    return [asdict(probe) for probe in probes]
