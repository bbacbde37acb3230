"""A short check of the GPU kernels on the device at hand, before ``backend="auto"`` relies on them.

Compilers and drivers differ from machine to machine. The first forward pass of a kind on a GPU runs a small model of
the same sizes, in the same dtype, against the plain definition in float64. Its kernels are compiled for the passes
that follow too, so that little time is lost.
"""

import random
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import ProteinBertError
from proteinbert_fast.ops.backends import Backend
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from proteinbert_fast.model import ProteinBert

# Largest error of any state against the float64 definition; states after a norm are about 1 in size.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
LENGTHS = (1, 7, 131, 700, 40)


# Of each gradient's length: rounded to 8 or 11 bits on its way, or not.
GRADIENT_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class Kind(NamedTuple):
    """What a check holds for."""

    device: torch.device
    config: ProteinBertConfig
    dtype: torch.dtype
    is_exact: bool  # products of float32 states are not rounded to TF32
    gradients: bool  # those were checked too


_complaints: dict[Kind, str | None] = {}


def complaint(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels here, or None; checked the first time, and said in a warning then.

    Where gradients may be wanted, they are checked too. Nothing is checked while a CUDA graph is captured: then kernels
    that were not checked before count as good.

    Args:
        device: where they run.
        config: sizes of the model.
        dtype: the dtype computed in.
    """
    from proteinbert_fast.ops.precision import product_precision

    is_exact = product_precision(torch.float32) == "ieee"
    kind = Kind(device, config, dtype, is_exact, torch.is_grad_enabled())
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _complaints.get(kind)
    if kind not in _complaints:
        _complaints[kind] = found = _check(kind)
        if found:
            _warn(f"the Triton kernels fail their self-check on {device}: {found}; the plain operations run instead")
    return _complaints[kind]


def _warn(what: str) -> None:
    line = f"proteinbert-fast: {what}, slower. Please report this with the output of 'proteinbert-fast doctor'."
    warnings.warn(line, RuntimeWarning, stacklevel=5)


def _check(kind: Kind) -> str | None:
    found = _compared(kind)
    if found and _distrust_hopper(kind, found):
        _warn(
            f"the local block for Hopper fails its self-check on {kind.device}: {found}; the portable one runs instead"
        )
        found = _compared(kind)
    return found


def _distrust_hopper(kind: Kind, reason: str) -> bool:
    """Goes back to the portable local block; whether it was not the one that ran anyway."""
    if kind.device.type != "cuda":
        return False
    from proteinbert_fast.ops.kernels.launching import capability
    from proteinbert_fast.ops.kernels.local_block import distrust_hopper, portable_because

    if portable_because(capability(kind.device.index or 0), kind.config.d_local, kind.dtype) is not None:
        return False
    distrust_hopper(f"it failed a self-check: {reason}")
    return True


def _compared(kind: Kind) -> str | None:
    try:
        error = difference(kind.device, kind.config, kind.dtype)
        gradients = gradient_difference(kind.device, kind.config, kind.dtype) if kind.gradients else 0.0
    except Exception as failure:  # whatever the compiler or the driver raises
        if isinstance(failure, torch.cuda.OutOfMemoryError):
            raise
        return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
    # TF32 has as many bits as float16.
    bits_of = torch.float16 if kind.dtype == torch.float32 and not kind.is_exact else kind.dtype
    limit, gradient_limit = TOLERANCES[bits_of], GRADIENT_TOLERANCES[bits_of]
    # A NaN is not below anything.
    if not error <= limit:
        return f"results are off by {error:.1e}, allowed {limit:g}"
    if not gradients <= gradient_limit:
        return f"gradients are off by {gradients:.1e} of their length, allowed {gradient_limit:g}"
    return None


class _Twins(NamedTuple):
    """The same small model twice, and proteins of odd lengths for it."""

    model: "ProteinBert"
    exact: "ProteinBert"
    batch: PackedBatch


def _twins(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, backend: Backend) -> _Twins:
    from proteinbert_fast.model import ProteinBert

    config = replace(config, n_blocks=min(config.n_blocks, 2), n_annotations=min(config.n_annotations, 64))
    generator = random.Random(0)
    sequences = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in LENGTHS]
    # Drawn on the CPU, so that the weights do not depend on the device. No generator is left changed: manual_seed of
    # torch itself would seed those of all GPUs, too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        plain = ProteinBert(config, backend="reference")
        model = ProteinBert(config, backend=backend)
    model.load_state_dict(plain.state_dict())
    batch = Tokenizer(gap=max(config.reach, 20))(sequences).to(device)
    # Weights are rounded first, so that both start from the same.
    return _Twins(model.to(device, dtype).eval(), plain.to(device, dtype).double().eval(), batch)


def difference(
    device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, backend: Backend = "triton"
) -> float:
    """Largest difference of any state between a back end and the float64 definition, on proteins of odd lengths.

    Args:
        device: where both run.
        config: sizes; two blocks and few annotations are enough.
        dtype: the back end's.
        backend: the one checked.

    Raises:
        ProteinBertError: a protein has other numbers alone than in a batch.
    """
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        model, exact, batch = _twins(device, config, dtype, backend)
        right, found = exact(batch), model(batch)
        errors = [
            (ours.double() - theirs).abs().max()
            for ours, theirs in (
                (found.local_rows, right.local_rows),
                (found.global_state, right.global_state),
                (found.go_probabilities, right.go_probabilities),
                (found.residue_mean(), right.residue_mean()),
            )
        ]
        alone = model(batch[2])
        if not torch.equal(alone.local[0], found.local[2]) or not torch.equal(
            alone.global_state[0], found.global_state[2]
        ):
            raise ProteinBertError("a protein has other numbers alone than in a batch")
    # stack().max() keeps a NaN.
    return float(torch.stack(errors).max())


def gradient_difference(
    device: torch.device, config: ProteinBertConfig, dtype: torch.dtype, backend: Backend = "triton"
) -> float:
    """Largest difference of any weight's gradient between a back end and the float64 definition, of its length.

    Args:
        device: where both run.
        config: sizes; two blocks and few annotations are enough.
        dtype: the back end's.
        backend: the one checked.
    """
    from proteinbert_fast.pretraining.losses import annotation_loss, token_loss

    found = []
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        model, exact, batch = _twins(device, config, dtype, backend)
        terms = torch.arange(len(batch), device=device) % model.config.n_annotations
        for twin in (model, exact):
            out = twin(batch)
            loss = token_loss(out, batch) + annotation_loss(out, (terms, torch.arange(len(batch), device=device)))
            loss.backward()  # type: ignore[no-untyped-call]
        for ours, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            if theirs.grad is not None and ours.grad is not None:
                found.append((ours.grad.double() - theirs.grad).norm() / theirs.grad.norm().clamp(min=1e-30))
    return float(torch.stack(found).max())
