"""How a model does on held-out proteins: losses by length, and GO terms foretold from the sequence alone."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.data.loader import VALIDATION, held_out
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.pretraining.config import PretrainingConfig
from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
from proteinbert_fast.pretraining.metrics import go_metrics
from proteinbert_fast.pretraining.objective import make_task

CLASSES = (("128", 128), ("512", 512), ("1024", 1024), ("longer", None))  # most tokens of a protein
TOKENS_PER_PASS = 16_384


@torch.no_grad()
def validate(
    model: ProteinBert, corpus: Corpus, config: PretrainingConfig, device: torch.device, rank: int = 0, n_ranks: int = 1
) -> dict[str, Any] | None:
    """Losses and GO metrics on the validation set; None if there is none.

    Every protein is corrupted in the same way each time. Losses are per token and per annotated protein, of inputs as
    in training. GO metrics are of inputs without any term, and of every term that a protein of the sample has.

    Args:
        model: put back into training when done.
        corpus: with a validation set.
        config: of the run.
        device: of the model.
        rank, n_ranks: this process's share; all ranks get the numbers of all.
    """
    sums = np.zeros((len(CLASSES), 5))  # token loss, tokens, annotation loss, annotated proteins, proteins
    scores, truths = [], []
    model.eval()
    batches = held_out(
        corpus, VALIDATION, gap=model.config.reach, most=config.validation_proteins, window=config.window or None,
        tokens_per_pass=TOKENS_PER_PASS, seed=config.seed,
    )  # fmt: skip
    limits = [np.inf if most is None else most for _, most in CLASSES]
    for number, (batch, lengths) in enumerate(batches):
        if number % n_ranks != rank:
            continue
        kind = np.searchsorted(limits, lengths)
        task = make_task(batch, model.config.n_annotations, config, device)
        out = model(task.noisy, annotations=task.shown)
        inside = task.clean.segments >= 0
        segments = task.clean.segments.clamp(min=0)
        for k in np.unique(kind).tolist():
            is_kind = torch.from_numpy(kind == k).to(device)
            rows = (is_kind[segments] & inside).float()
            annotated = is_kind.float() * task.annotation_weights
            n = float(rows.sum()), float(annotated.sum())
            tokens = float(token_loss(out, task.clean, rows, form="weighted_mean")) * n[0]
            terms = float(annotation_loss(out, task.terms, annotated, form="weighted_mean")) * n[1]
            sums[k] += tokens, n[0], terms, n[1], int(is_kind.sum())
        if len(corpus.terms):
            blind = model(task.noisy.with_tokens(task.clean.tokens))
            kept = batch.is_annotated.numpy()
            scores.append(torch.sigmoid(blind.go_logits.float()).cpu().numpy()[kept])
            truths.append(_dense(batch.terms, len(kept), len(corpus.terms))[kept])
    model.train()
    n_terms = len(corpus.terms)
    gathered = [(sums, np.concatenate([np.zeros((0, n_terms), np.float32), *scores]),
                 np.concatenate([np.zeros((0, n_terms), bool), *truths]))]  # fmt: skip
    if n_ranks > 1:
        gathered = [gathered[0]] * n_ranks
        dist.all_gather_object(gathered, (sums, *gathered[rank][1:]))
    sums = np.sum([g[0] for g in gathered], axis=0)
    if not sums[:, 4].any():
        return None
    found: dict[str, Any] = {**_losses(sums.sum(0)), "classes": {}}
    for (name, _), row in zip(CLASSES, sums, strict=True):
        if row[4]:
            found["classes"][name] = _losses(row)
    if n_terms and sums[:, 3].any():
        aspects = [term.aspect for term in corpus.terms]
        found["go"] = go_metrics(
            np.concatenate([g[1] for g in gathered]), np.concatenate([g[2] for g in gathered]), aspects
        )
    return found


def _losses(row: Any) -> dict[str, float]:
    return {
        "token_loss": float(row[0] / max(row[1], 1)),
        "annotation_loss": float(row[2] / max(row[3], 1)),
        "proteins": int(row[4]),
    }


def _dense(terms: tuple[torch.Tensor, torch.Tensor], n: int, n_terms: int) -> Any:
    indices, offsets = (t.numpy() for t in terms)
    dense = np.zeros((n, n_terms), bool)
    dense[np.repeat(np.arange(n), np.diff(offsets, append=len(indices))), indices] = True
    return dense
