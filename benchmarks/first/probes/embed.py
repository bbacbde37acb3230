"""The command that a user runs first: seconds until embeddings are there, nothing compiled yet, then again."""

import os
import re
import sys
from pathlib import Path

import h5py
import numpy as np

from benchmarks.first.commands import output_of
from benchmarks.first.process import Context
from benchmarks.first.runner import ROOT
from proteinbert_fast.benchmark.setup import TOLERANCE

PROTEINS = ROOT / "examples" / "proteins.fasta"


def run(context: Context) -> None:
    """Lines for a first run with empty caches, for a second, and for how far both are from the CPU's numbers."""
    if not context.can_run():
        return
    folder = context.scratch / f"embed-{os.getpid()}"
    folder.mkdir()
    caches = {name: str(folder / name.lower()) for name in ("TRITON_CACHE_DIR", "PROTEINBERT_FAST_CACHE",
                                                            "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}  # fmt: skip
    device = context.options.get("device", "cuda")
    for name in ("first", "again"):
        context.begin(f"embed, {name}")
        seconds, problem = embed(folder / f"{name}.h5", device, caches, context.seconds)
        context.emit(not problem, check=f"embed, {name}", embed_seconds=round(seconds, 2),
                     found=problem or ("with empty caches" if name == "first" else "with what the first run left"),
                     cubins=sum(1 for _ in folder.glob("triton_cache_dir/*/*.cubin")))  # fmt: skip
    context.begin("embed on the CPU")
    _, problem = embed(folder / "cpu.h5", "cpu", caches, context.seconds)
    found = problem or differences(folder / "first.h5", folder / "again.h5", folder / "cpu.h5")
    context.emit(not found, check="embeddings as on the CPU", found=found or "the same in both runs, near the CPU's")


def embed(output: Path, device: str, caches: dict[str, str], limit: float) -> tuple[float, str]:
    """Seconds of the command, and what went wrong, or nothing."""
    command = [sys.executable, "-m", "proteinbert_fast", "embed", str(PROTEINS), "-o", str(output), "--device", device]
    text, end, seconds = done = output_of(command, limit, caches)
    print(text, file=sys.stderr, flush=True)
    if not done.well:
        return seconds, f"{end}: {' '.join(text.split())[-300:]}"
    # It falls back to plain operations with a warning, and would still be right.
    if re.search(r"fails? (its|their) self-check", text):
        return seconds, " ".join(text.split())[-300:]
    return seconds, ""


def differences(first: Path, again: Path, cpu: Path) -> str:
    """What is wrong with two runs' embeddings beside those of the CPU, or nothing."""
    (ids, ours), (_, second), (right_ids, right) = (_read(path) for path in (first, again, cpu))
    if ids != right_ids or ours.shape != right.shape:
        return "other proteins, or other sizes, than on the CPU"
    if not np.array_equal(ours, second):
        return "two runs differ"
    error = float(np.abs(ours.astype(np.float64) - right).max())
    allowed = TOLERANCE["bfloat16"]
    return "" if error <= allowed else f"off by {error:.1e}, allowed {allowed:g}"


def _read(path: Path) -> tuple[list[str], np.ndarray]:
    with h5py.File(path) as file:
        return list(file["ids"].asstr()), file["embeddings"][:]
