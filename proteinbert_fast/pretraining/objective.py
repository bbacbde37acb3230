"""The pretraining objective: corrupt proteins, let the model repair them, compare."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from proteinbert_fast.data.loader import MicroBatch, Step
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.pretraining.config import PretrainingConfig
from proteinbert_fast.pretraining.corruption import corrupt_annotations, corrupt_tokens
from proteinbert_fast.pretraining.losses import annotation_loss, token_loss


@dataclass(frozen=True)
class Task:
    """What the model is given, and what it should have said.

    Attributes:
        noisy: corrupted tokens.
        clean: the true ones.
        shown: GO terms that the model is given, sparse.
        terms: the true ones, sparse.
        annotation_weights: (B,) float32, 0 for proteins that say nothing about GO terms.
    """

    noisy: PackedBatch
    clean: PackedBatch
    shown: tuple[Tensor, Tensor]
    terms: tuple[Tensor, Tensor]
    annotation_weights: Tensor


def make_task(
    batch: MicroBatch, n_terms: int, config: PretrainingConfig, device: torch.device, hide: float | None = None
) -> Task:
    """Corrupts a batch. What happens to a protein depends on the seed and its view alone.

    Tokens are corrupted on the device, terms on the host, where their number is known at once: no GPU is waited for.

    Args:
        batch: of a ``Loader``.
        n_terms: annotations of the model.
        config: names seed and probabilities.
        device: that the task is for.
        hide: probability that a protein is shown without any term, in the place of the configuration's.
    """

    def moved(values: Tensor) -> Tensor:
        return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)

    clean = (batch.tokens.pin_memory() if device.type == "cuda" else batch.tokens).to(device, non_blocking=True)
    views = moved(torch.as_tensor(batch.views))
    noisy = corrupt_tokens(clean, views, seed=config.seed, step=0, probability=config.replace_probability)
    shown = shown_terms(batch, n_terms, config, hide)
    weights = moved(batch.is_annotated.to(torch.float32))
    return Task(
        noisy, clean, (moved(shown[0]), moved(shown[1])), (moved(batch.terms[0]), moved(batch.terms[1])), weights
    )


def shown_terms(
    batch: MicroBatch, n_terms: int, config: PretrainingConfig, hide: float | None = None
) -> tuple[Tensor, Tensor]:
    """GO terms as the model is given them, sparse; on the host. The arguments are those of ``make_task``."""
    return corrupt_annotations(
        batch.terms, n_terms, batch.views, seed=config.seed, step=0, remove=config.remove_probability,
        add=config.add_probability, hide=config.hide_probability if hide is None else hide,
    )  # fmt: skip


class Objective(nn.Module):
    """Model and losses as one module, so that DistributedDataParallel and torch.compile see the whole of it.

    Args:
        model: to train.
    """

    def __init__(self, model: ProteinBert) -> None:
        super().__init__()
        self.model = model

    def forward(self, task: Task) -> tuple[Tensor, Tensor]:
        """Sums of the two losses, both at least float32: cross entropy of tokens in nats, and over proteins the mean
        over terms of the binary cross entropy.
        """
        out = self.model(task.noisy, annotations=task.shown)
        n_annotated = task.annotation_weights.sum()
        tokens = token_loss(out, task.clean) * task.clean.n_tokens
        annotations = annotation_loss(out, task.terms, task.annotation_weights, form="weighted_mean")
        return tokens, annotations * n_annotated


def divisors(config: PretrainingConfig, step: Step) -> tuple[int, int]:
    """What the sums of the two losses over a whole batch are divided by.

    "original" divides by all proteins, and in episodes by their full windows, as if shorter proteins had been padded.
    """
    if config.loss == "weighted_mean":
        return max(step.n_tokens, 1), max(step.n_annotated, 1)
    if config.batches == "episodes" and step.window is not None:
        return step.n_proteins * step.window, step.n_proteins
    return step.n_tokens, step.n_proteins
