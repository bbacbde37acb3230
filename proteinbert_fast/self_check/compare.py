"""What a self-check compares: a small model of the same sizes on a back end with the definition in float64."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import ProteinBertError
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.ops.backends import Backend
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

# Largest error of any state against the float64 definition; states after a norm are about 1 in size.
TOLERANCES = {torch.float32: 2e-4, torch.float16: 0.05, torch.bfloat16: 0.25}
# Of each gradient's length: rounded to 8 or 11 bits on its way, or not.
GRADIENT_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
# Residues: odd lengths first, one protein of many attention spans, and 50,000 rows in all, so that every multiprocessor
# runs several programs, one after the other and side by side.
LENGTHS = (1, 7, 131, 700, 40, 511, 13_000, *(350,) * 96)
ALONE = 2  # of these, the protein that is computed alone, too
# Losses are means over all rows: without it, gradients of float16 rows would be too small for their dtype.
LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Kind:
    """What a check holds for.

    Attributes:
        device: where the kernels run.
        config: sizes of the model.
        dtype: the dtype computed in.
        parameters: the dtype of the weights, another one under autocast.
        is_exact: products of float32 states are not rounded to TF32.
        gradients: those are checked, too.
    """

    device: torch.device
    config: ProteinBertConfig
    dtype: torch.dtype
    parameters: torch.dtype
    is_exact: bool
    gradients: bool


class Measured(NamedTuple):
    """What a check found.

    Attributes:
        error: the largest difference of any state from the float64 definition.
        gradient_error: the largest difference of any weight's gradient, of its length; None where not asked for.
    """

    error: float
    gradient_error: float | None


def failure_in(measured: Measured, kind: Kind) -> str | None:
    """What is wrong with the kernels by these measurements, in words; None where nothing is."""
    # TF32 has as many bits as float16.
    bits_of = torch.float16 if kind.dtype == torch.float32 and not kind.is_exact else kind.dtype
    limit, gradient_limit = TOLERANCES[bits_of], GRADIENT_TOLERANCES[bits_of]
    # A NaN is not below anything.
    if not measured.error <= limit:
        return f"results are off by {measured.error:.1e}, allowed {limit:g}"
    if kind.gradients:
        off = measured.gradient_error
        if off is None:
            return "gradients were not checked"
        if not off <= gradient_limit:
            return f"gradients are off by {off:.1e} of their length, allowed {gradient_limit:g}"
    return None


def measure(kind: Kind, backend: Backend = "triton", lengths: Sequence[int] = LENGTHS) -> Measured:
    """Runs a check here, in this process.

    Args:
        kind: what is checked.
        backend: the one checked.
        lengths: residues of the proteins; more than ``ALONE`` of them.

    Raises:
        ProteinBertError: results have other bits in a second run, or alone and in a batch.
    """
    error = difference(kind, backend, lengths)
    return Measured(error, gradient_difference(kind, backend, lengths) if kind.gradients else None)


def reduced(config: ProteinBertConfig) -> ProteinBertConfig:
    """A model that runs the same kernels: few blocks and annotations, which are or are not a multiple of 16."""
    few = 64 if config.n_annotations % 16 == 0 else 65
    return replace(config, n_blocks=min(config.n_blocks, 2), n_annotations=min(config.n_annotations, few))


class _Twins(NamedTuple):
    """The same small model twice, and proteins of odd lengths for it."""

    model: ProteinBert
    exact: ProteinBert
    batch: PackedBatch


def _twins(kind: Kind, backend: Backend, lengths: Sequence[int]) -> _Twins:
    config = reduced(kind.config)
    generator = random.Random(0)
    sequences = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=n)) for n in lengths]
    # Drawn on the CPU, so that the weights do not depend on the device. No generator is left changed: manual_seed of
    # torch itself would seed those of all GPUs, too.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        plain = ProteinBert(config, backend="reference")
        _show_all(plain)
        model = ProteinBert(config, backend=backend)
    # Weights are rounded first, so that both start from the same.
    plain = plain.to(kind.dtype).to(kind.device, kind.parameters)
    model = model.to(kind.device, kind.parameters)
    model.load_state_dict(plain.state_dict())
    batch = Tokenizer(gap=max(config.reach, 20))(sequences).to(kind.device)
    return _Twins(model.eval(), plain.double().eval(), batch)


@torch.no_grad()
def _show_all(model: ProteinBert) -> None:
    """Biases and norms that show whether they are used: those of a new model are zeros and ones."""
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.normal_(std=0.3)
        elif "norm" in name:
            p.add_(torch.randn_like(p), alpha=0.3)


def _computing(kind: Kind) -> AbstractContextManager[object]:
    return torch.autocast(kind.device.type, kind.dtype, enabled=kind.dtype != kind.parameters)


def _states(out: ProteinBertOutput) -> tuple[Tensor, ...]:
    return out.local_rows, out.global_state, out.go_probabilities, out.residue_mean()


def difference(kind: Kind, backend: Backend = "triton", lengths: Sequence[int] = LENGTHS) -> float:
    """Largest difference of any state between a back end and the float64 definition, on proteins of odd lengths.

    Args:
        kind: what is checked; two blocks and few annotations of its sizes are enough.
        backend: the one checked.
        lengths: residues of the proteins; more than ``ALONE`` of them.

    Raises:
        ProteinBertError: results have other bits in a second run, or alone and in a batch.
    """
    with torch.inference_mode(), torch.autocast(kind.device.type, enabled=False):
        model, exact, batch = _twins(kind, backend, lengths)
        right = _states(exact(batch))
        with _computing(kind):
            out = model(batch)
            found, again, alone = _states(out), _states(model(batch)), model(batch[ALONE])
            # stack().max() keeps a NaN.
            errors = [(ours.double() - theirs).abs().max() for ours, theirs in zip(found, right, strict=True)]
            _require_same_bits(found, again)
            if not _same(alone.local[0], out.local[ALONE]) or not _same(alone.global_state[0], out.global_state[ALONE]):
                raise ProteinBertError("a protein has other numbers alone than in a batch")
    return float(torch.stack(errors).max())


def gradient_difference(kind: Kind, backend: Backend = "triton", lengths: Sequence[int] = LENGTHS) -> float:
    """Largest difference of any weight's gradient between a back end and the float64 definition, of its length.

    Args:
        kind: what is checked; two blocks and few annotations of its sizes are enough.
        backend: the one checked.
        lengths: residues of the proteins.

    Raises:
        ProteinBertError: gradients have other bits in a second run.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind.device.type, enabled=False):
        model, exact, batch = _twins(kind, backend, lengths)
        with _computing(kind):
            found = _gradients(model, batch)
            again = _gradients(model, batch)
        right = _gradients(exact, batch)
        _require_same_bits(
            [ours for ours in found if ours is not None], [ours for ours in again if ours is not None]
        )  # fmt: skip
        errors = [
            (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)
            for ours, theirs in zip(found, right, strict=True)
            if ours is not None and theirs is not None
        ]
    return float(torch.stack(errors).max())


def _gradients(model: ProteinBert, batch: PackedBatch) -> list[Tensor | None]:
    """Of both losses, by weight."""
    from proteinbert_fast.pretraining.losses import annotation_loss, token_loss

    model.zero_grad(set_to_none=True)
    proteins = torch.arange(len(batch), device=batch.device)
    out = model(batch)
    loss = token_loss(out, batch) + annotation_loss(out, (proteins % model.config.n_annotations, proteins))
    (LOSS_SCALE * loss).backward()  # type: ignore[no-untyped-call]
    return [p.grad for p in model.parameters()]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits; a NaN equals itself."""
    return a.shape == b.shape and bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def _require_same_bits(found: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    if len(found) != len(again) or not all(map(_same, found, again)):
        raise ProteinBertError("the same batch has other numbers in a second run")
