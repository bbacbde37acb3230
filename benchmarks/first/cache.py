"""Compiled kernels that travel: made where no GPU is, without what only people read, and found again elsewhere."""

import json
import os
from pathlib import Path

# Of what Triton keeps of a kernel. The others are steps on the way, several times as large; it does without.
NEEDED = {".cubin", ".json"}
CAPABILITY = 90
# Dtypes of states and weights, and whether gradients are asked for: what the probes, and ``embed``, compute in.
PASSES = (
    ("bfloat16", "bfloat16", True),
    ("bfloat16", "float32", True),
    ("float16", "float16", True),
    ("float32", "float32", True),
)


def warm(folder: Path) -> str:
    """Compiles the kernels of the published sizes for compute capability 9.0; in words, what came of it."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)  # before triton is imported
    try:
        import torch

        from proteinbert_fast.config import ProteinBertConfig
        from proteinbert_fast.ops.kernels import warm as compiling
    except ImportError as error:
        return f"kernels are compiled on the GPU machine: {error}"
    folder.mkdir(exist_ok=True)
    for dtype, weights, gradients in PASSES:
        compiling.compile_ahead(
            CAPABILITY, ProteinBertConfig(), getattr(torch, dtype), getattr(torch, weights), gradients, lambda *_: None
        )
    slim(folder)
    return f"{sum(1 for _ in folder.glob('*/*.cubin'))} kernels compiled into {folder}"


def slim(folder: Path) -> None:
    """Removes what no launch needs."""
    for path in folder.glob("*/*"):
        if path.is_file() and path.suffix not in NEEDED:
            path.unlink()


def relocate(folder: Path) -> int:
    """Makes Triton find the kernels of a cache that was made under another path; returns how many there are.

    Triton writes down where each file of a kernel lies, from the root.
    """
    found = 0
    for path in folder.glob("*/__grp__*.json"):
        group = json.loads(path.read_text(encoding="utf-8"))
        here = {name: str(path.parent / name) for name in group["child_paths"] if (path.parent / name).exists()}
        if here != group["child_paths"]:
            group["child_paths"] = here
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(group), encoding="utf-8")
            os.replace(fresh, path)
        found += 1
    return found
