"""A check of the GPU kernels on the device at hand, before ``backend="auto"`` relies on them.

Compilers and drivers differ from machine to machine. The first forward pass of a kind on a GPU runs a small model of
the same sizes, in the same dtypes, against the plain definition in float64: 50,000 rows, twice, in memory filled with
NaN, in a process of its own with a time limit. Its verdict is kept on disk, and the kernels that it compiled are in
Triton's cache for the passes that follow.
"""

import datetime
import warnings
from collections.abc import Callable

import torch

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.self_check import apart, verdicts
from proteinbert_fast.self_check.compare import Kind
from proteinbert_fast.self_check.verdicts import Verdict

__all__ = ["Kind", "failure_reason", "kind_of", "verdict_on"]

_failures: dict[Kind, str | None] = {}


def failure_reason(
    device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> str | None:
    """Why the kernels must not run here, or None; checked the first time, and said in a warning then.

    Where gradients may be wanted, they are checked too. Nothing is checked while a CUDA graph is captured: then kernels
    that were not checked before count as good.

    Args:
        device: where they run.
        config: sizes of the model.
        dtype: the dtype computed in.
        parameters: the dtype of the weights; ``dtype`` when None.
    """
    kind = kind_of(device, config, dtype, parameters)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _failures.get(kind)
    if kind not in _failures:
        _failures[kind] = _checked(kind)
    return _failures[kind]


def kind_of(
    device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> Kind:
    """What a check has to hold for now, by PyTorch's settings; the arguments are those of ``failure_reason``."""
    from proteinbert_fast.ops.precision import product_precision

    is_exact = product_precision(torch.float32) == "ieee"
    return Kind(device, config, dtype, parameters or dtype, is_exact, torch.is_grad_enabled())


def _checked(kind: Kind) -> str | None:
    """What keeps the kernels from running; what is wrong is said in a warning."""
    verdict = verdict_on(kind)
    kept = f" ({verdict.path} keeps this: delete it to check again)" if verdict.path else ""
    if verdict.hopper_failure:
        _disable_hopper(verdict.hopper_failure)
        if not verdict.failure:
            _warn(
                f"the kernels for Hopper fail their self-check on {kind.device}: {verdict.hopper_failure}; "
                f"the portable ones run instead, slower{kept}"
            )
    if verdict.failure:
        _warn(
            f"the Triton kernels fail their self-check on {kind.device}: {verdict.failure}; "
            f"the plain operations run instead, slower{kept}"
        )
    return verdict.failure


def _warn(what: str) -> None:
    line = f"proteinbert-fast: {what}. Please report this with the output of 'proteinbert-fast doctor'."
    warnings.warn(line, RuntimeWarning, stacklevel=5)


def verdict_on(kind: Kind) -> Verdict:
    """The verdict on the kernels: the one on disk, or that of a check now."""
    if (known := verdicts.read(kind)) is not None:
        return known
    with verdicts.alone(kind, apart.SECONDS + apart.CHECK_SECONDS):
        if (known := verdicts.read(kind)) is not None:  # of a process that was faster
            return known
        failure, hopper_failure, is_final = _run(kind)
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        verdict = Verdict(failure, hopper_failure, date)
        return verdicts.write(kind, verdict) if is_final else verdict


def _run(kind: Kind) -> tuple[str | None, str | None, bool]:
    """Why no kernels may run, why those for Hopper may not, and whether that is final."""
    with _progress(kind) as say:
        found = apart.check(kind, True, say)
        if found.failure is None or not found.is_final or not _uses_hopper(kind):
            return found.failure, None, found.is_final
        again = apart.check(kind, False, say)
        return again.failure, found.failure, again.is_final


class _progress:
    """A bar on a terminal while kernels are compiled and checked."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind

    def __enter__(self) -> Callable[[str, int, int], None]:
        from tqdm import tqdm

        where = torch.cuda.get_device_name(self.kind.device) if self.kind.device.type == "cuda" else "the interpreter"
        self.where = where
        # disable=None: nothing where standard error is no terminal.
        self.bar = tqdm(total=1, desc=f"GPU kernels for {where}, first time", leave=False, disable=None)
        return self._say

    def _say(self, doing: str, done: int, of: int) -> None:
        self.bar.set_description(f"{doing} for {self.where}, first time", refresh=False)
        self.bar.total, self.bar.n = of, done
        self.bar.refresh()

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _uses_hopper(kind: Kind) -> bool:
    if kind.device.type != "cuda":
        return False
    from proteinbert_fast.ops.kernels.launching import capability
    from proteinbert_fast.ops.kernels.local_block import portable_because

    return portable_because(capability(kind.device.index or 0), kind.config.d_local, kind.dtype) is None


def _disable_hopper(reason: str) -> None:
    from proteinbert_fast.ops.kernels.local_block import distrust_hopper

    distrust_hopper(f"they failed a self-check: {reason}")
