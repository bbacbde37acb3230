"""The library's own self-check, before which ``backend="auto"`` does not take the kernels."""

import time

import torch

from benchmarks.first.probes.versions import implementations
from benchmarks.first.process import Context
from proteinbert_fast.config import ProteinBertConfig


def run(context: Context) -> None:
    """A line with its verdict and seconds, forward and gradients."""
    if not context.can_run():
        return
    device = context.device
    assert device is not None
    started = time.perf_counter()
    found = verdict(device, context.settings.config, context.precision.dtype)
    seconds = time.perf_counter() - started
    said = implementations(context, context.precision.name)
    context.emit(found is None, check="self-check", dtype=context.precision.name, found=found or "right",
                 check_seconds=round(seconds, 2), **said)  # fmt: skip


def verdict(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """What the library finds wrong with its kernels here, or None. The one place that asks it.

    On a GPU in a process of its own, as a first forward pass does; in the interpreter in this one, on short proteins.
    """
    from proteinbert_fast import self_check
    from proteinbert_fast.self_check import compare

    kind = self_check.kind_of(device, config, dtype)
    if device.type != "cuda":
        return compare.failure_in(compare.measure(kind, lengths=(1, 7, 40)), kind)
    found = self_check.verdict_on(kind)
    if found.failure is None and found.hopper_failure is not None:
        return f"the kernels for Hopper, though the portable ones are right: {found.hopper_failure}"
    return found.failure
