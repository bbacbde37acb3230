"""What there is: GPU, driver, versions, clocks, compiled kernels in the cache, and which kernels would run, and why."""

import json
import os
from pathlib import Path

import torch

from benchmarks.first.folder import ENVIRONMENT
from benchmarks.first.process import NO_GPU, Context
from proteinbert_fast.benchmark.gpu.bench import environment
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS


def run(context: Context) -> None:
    """A line for the machine, and one per dtype for the kernels."""
    device = context.device or torch.device("cpu")
    found = environment(device) | {"triton_cache": cached(os.environ.get("TRITON_CACHE_DIR"))}
    context.emit(True if context.on_gpu else None, environment=found, note="" if context.on_gpu else NO_GPU)
    context.text(ENVIRONMENT, json.dumps(found, indent=1) + "\n")
    if context.device is None:
        return
    for name in ("bfloat16", "float16", "float32"):
        context.emit(True, check=f"kernels in {name}", **implementations(context, name))


def implementations(context: Context, precision: str) -> dict[str, str]:
    """Which kernels run the local block and its gradients, and why."""
    from proteinbert_fast.ops.kernels.launching import capability
    from proteinbert_fast.ops.kernels.local_block import implementation

    config, dtype = context.settings.config, PRECISIONS[precision].dtype
    device = context.device
    assert device is not None
    sizes = capability(device.index or 0), config.d_local, dtype, config.kernel_size, config.wide_dilation, config.reach
    block = implementation(*sizes)
    found = {"local_block": block}
    if block.startswith("hopper"):
        from proteinbert_fast.ops.kernels.local_block_backward_hopper import weights_unsupported

        reason = weights_unsupported(config.d_local, dtype, config.kernel_size, config.wide_dilation, config.reach)
        found["weights' gradients"] = f"portable ({reason})" if reason else "hopper"
    return found


def cached(folder: str | None) -> dict[str, object]:
    """How many compiled kernels a folder holds before this run."""
    path = Path(folder) if folder else Path("~/.triton/cache").expanduser()
    return {"folder": str(path), "cubins": sum(1 for _ in path.glob("*/*.cubin"))}
