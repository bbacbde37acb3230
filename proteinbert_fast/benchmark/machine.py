"""The machine: what it is, and how fast it multiplies matrices and copies memory."""

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from proteinbert_fast._version import __version__
from proteinbert_fast.benchmark.cases import Case, Check, Probe, Ready, Work
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.ops.instruction_sets import describe_instruction_sets, kernels_in_use, measure_rates
from proteinbert_fast.processors import usable_processors

TABLE = "the machine itself"


def environment() -> dict[str, Any]:
    """What every row of a report carries beside its own numbers."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": "cpu",
        "cpu": cpu_name(),
        "cores": usable_processors(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels_in_use(),
        "instruction_set": describe_instruction_sets(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "proteinbert_fast": __version__,
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_set_rates(seconds: float) -> dict[str, Any]:
    """The peak of the instruction set in use and what products reach of it, FLOP/s, for ``environment``."""
    rates = measure_rates(seconds, torch.get_num_threads())
    return {
        "instruction_set_rates": {
            dtype: {"registers_flops": of.registers, "products_flops": of.products} for dtype, of in rates.items()
        }
    }


def checkout() -> Path | None:
    """Root of the git checkout that this package runs from, or None when it is installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() and (root / "benchmarks").is_dir() else None


def commit() -> str | None:
    """The commit, with "+dirty" if the files differ from it (results aside); None outside a checkout."""
    root = checkout()
    if root is None:
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def probes(settings: Settings, *kinds: Probe) -> list[Case]:
    """Cases that show the machine's own rates; the fastest of a kind (and dtype) is its rate.

    With the products comes the library's best convolution of the model's width, which may be faster than they are.
    """
    found = []
    if "matrix" in kinds:
        for dtype in settings.dtypes:
            for n in settings.matrix_sizes:
                name, calls = f"product of {n} x {n} matrices", max(1, min(4, 2**35 // n**3))
                found.append(_flops_probe("matrix", name, dtype, 2 * n**3, calls, partial(_product, n)))
            n = min(settings.matrix_sizes)
            name = f"convolution of {n} rows, 128 channels, 9 taps, channels last"
            flops = 2 * n * 128 * 128 * 9
            found.append(_flops_probe("convolution", name, dtype, flops, 16, partial(_convolution, n)))
    return found + (_copy_probes(settings.copied_bytes) if "copy" in kinds else [])


def _flops_probe(
    kind: Probe,
    name: str,
    dtype: str,
    flops: float,
    calls: int,
    make: Callable[[torch.dtype], Callable[[], torch.Tensor]],
) -> Case:
    def prepare() -> Ready[torch.Tensor]:
        return Ready(make(getattr(torch, dtype)), None, calls=calls)

    return Case(
        table=TABLE,
        name=name,
        what=f"{name}, all cores",
        owner=f"torch {torch.__version__}",
        ours=False,
        work=Work(flops=flops),
        unit="GFLOP/s",
        prepare=prepare,
        dtype=dtype,
        probe=kind,
    )


def _product(n: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    out = torch.empty(n, n, dtype=dtype)
    return lambda: torch.mm(a, b, out=out)


def _convolution(n: int, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    rows = torch.randn(1, 1, n + 8, 128).to(dtype).permute(0, 3, 1, 2)
    weight = torch.randn(128, 128, 1, 9).to(dtype).contiguous(memory_format=torch.channels_last)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return F.conv2d(rows, weight)

    return run


def _copy_probes(n: int) -> list[Case]:
    """Copying of an array to another that is there already, on one core and on all."""

    def prepare_one() -> Ready[Any]:
        source, target = np.ones(n, np.uint8), np.zeros(n, np.uint8)

        def run() -> Any:
            np.copyto(target, source)
            return target

        return Ready(run, lambda out: Check(bool((out == source).all()), "equal"))

    def prepare_all() -> Ready[torch.Tensor]:
        source, target = torch.ones(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
        return Ready(lambda: target.copy_(source), lambda out: Check(torch.equal(out, source), "equal"))

    def case(cores: Literal["one", "all"], owner: str, prepare: Callable[[], Ready[Any]]) -> Case:
        return Case(
            table=TABLE,
            name=f"copy, {cores} core{'s' if cores == 'all' else ''}",
            what=f"copying {n / 1e6:.0f} MB to an array that is there already",
            owner=owner,
            ours=False,
            work=Work(bytes=n),
            unit="GB/s",
            prepare=prepare,
            cores=cores,
            probe="copy",
        )

    return [
        case("one", f"numpy {np.__version__}", prepare_one),
        case("all", f"torch {torch.__version__}", prepare_all),
    ]
