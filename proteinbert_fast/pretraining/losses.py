"""The two losses of pretraining, of the model's output: no logits of a whole batch are kept.

Two forms of each mean, by name:

- "original", as the published code has it: the weighted sum divided by the number of all positions, those of weight 0
  counted, or of all proteins.
- "weighted_mean": divided by the sum of the weights, so that what does not count does not dilute.

A packed batch has no padding: with weights of 1 its two token losses are equal.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from proteinbert_fast.errors import InputError
from proteinbert_fast.outputs import PaddedOutput, ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import PAD

Form = Literal["original", "weighted_mean"]


def token_loss(
    out: ProteinBertOutput | PaddedOutput,
    targets: PackedBatch | Tensor,
    weights: Tensor | None = None,
    *,
    form: Form = "original",
    length: int | None = None,
) -> Tensor:
    """Cross entropy of the token head, in nats.

        original:       sum(w * CE) / (B * length)
        weighted_mean:  sum(w * CE) / sum(w)

    Args:
        out: of B proteins in R rows, or padded (B, L).
        targets: the true tokens: a batch of the same layout, or integers (R,) or (B, L).
        weights: (R,) or (B, L), constants; 1 at every token but PAD, 0 at PAD, when None. Gap rows, and places behind
            a padded row's own tokens, never count.
        form: which mean.
        length: tokens that the original would have padded or cut each protein to, for its form. When None, all
            positions of the batch are counted: B * L where padded, the proteins' tokens where packed.

    Returns:
        A scalar, at least float32. 0 where no weight is.

    Raises:
        InputError: shapes do not fit, a target is no token, or the form is unknown.
    """
    _check_form(form)
    packed = out.packed if isinstance(out, PaddedOutput) else out
    batch = packed.batch
    if isinstance(targets, PackedBatch):
        true = targets.tokens
        if true.shape != batch.tokens.shape:
            raise InputError(f"token loss: targets have {len(true)} rows, the output {batch.n_rows}")
    else:
        true = _rows(out, targets, "targets")
    inside = batch.segments >= 0
    if weights is None:
        counts = (inside & (true != PAD)).to(torch.float32)
    else:
        counts = _rows(out, weights, "weights").where(inside, 0)
    if _can_look(true):
        wrong = (counts != 0) & ((true < 0) | (true > PAD))
        if wrong.any():
            row = int(wrong.to(torch.uint8).argmax())
            raise InputError(f"token loss: target {int(true[row])} in row {row} is no token; tokens are 0..{PAD}")
    total = packed.heads.token.loss(packed.local_rows, true, counts)
    if form == "weighted_mean":
        return total / _or_one(counts.sum(dtype=total.dtype))
    if length is None and isinstance(out, PaddedOutput):
        length = out.length
    return total / max(batch.n_tokens if length is None else len(batch) * length, 1)


def annotation_loss(
    out: ProteinBertOutput | PaddedOutput,
    targets: Tensor | tuple[Tensor, Tensor],
    weights: Tensor | None = None,
    *,
    term_weights: Tensor | None = None,
    form: Form = "original",
) -> Tensor:
    """Binary cross entropy of the GO head, in nats, averaged over the N terms.

        original:       sum over proteins of w_b * mean over terms of u_n * BCE / B
        weighted_mean:  sum over proteins of w_b * mean over terms of u_n * BCE / sum(w)

    Args:
        out: of B proteins.
        targets: the true terms: sparse (indices (k,), offsets (B,)) as the model takes them, or dense (B, N).
        weights: (B,), w, constants. When None, 1 for proteins that have a term, 0 for the others, of which nothing is
            known; set those of held-out proteins to 0 as well.
        term_weights: (N,), u, constants; 1 when None.
        form: which mean.

    Returns:
        A scalar, at least float32. 0 where no weight is.

    Raises:
        InputError: shapes do not fit, a term is out of range, or the form is unknown.
    """
    _check_form(form)
    packed = out.packed if isinstance(out, PaddedOutput) else out
    n_proteins, n_terms = len(packed.global_state), packed.heads.annotation.n_outputs
    true = _dense(targets, n_proteins, n_terms, packed.global_state.device)
    if weights is None:
        weights = true.any(1).to(torch.float32)
    for name, values, size in (("weights", weights, n_proteins), ("term_weights", term_weights, n_terms)):
        if values is not None and values.shape != (size,):
            raise InputError(f"annotation loss: {name} {tuple(values.shape)} where ({size},) is wanted")
    total = packed.heads.annotation.loss(packed.global_state, true, weights, term_weights) / n_terms
    if form == "weighted_mean":
        return total / _or_one(weights.sum(dtype=total.dtype))
    return total / max(n_proteins, 1)


def _check_form(form: str) -> None:
    if form not in get_args(Form):
        raise InputError(f"form {form!r} is unknown; choose one of {', '.join(get_args(Form))}")


def _or_one(total: Tensor) -> Tensor:
    return total.where(total != 0, 1)


def _rows(out: ProteinBertOutput | PaddedOutput, values: Tensor, name: str) -> Tensor:
    """(R,) of (R,) or padded (B, L) values."""
    if isinstance(out, PaddedOutput):
        batch = out.packed.batch
        if values.shape != (len(batch), out.length):
            raise InputError(f"token loss: {name} {tuple(values.shape)} where ({len(batch)}, {out.length}) is wanted")
        return batch.rows_of_padded(values)
    if values.shape != (out.batch.n_rows,):
        raise InputError(f"token loss: {name} {tuple(values.shape)} where ({out.batch.n_rows},) is wanted")
    return values


def _dense(targets: Tensor | tuple[Tensor, Tensor], n_proteins: int, n_terms: int, device: torch.device) -> Tensor:
    """(B, N): a byte for each term, an eighth of what logits and their gradient would take."""
    if isinstance(targets, Tensor):
        if targets.shape != (n_proteins, n_terms):
            raise InputError(
                f"annotation loss: targets {tuple(targets.shape)} where ({n_proteins}, {n_terms}) is wanted"
            )
        return targets
    indices, offsets = (values.long() for values in targets)
    if indices.dim() != 1 or offsets.shape != (n_proteins,):
        raise InputError(
            f"annotation loss: indices {tuple(indices.shape)} and offsets {tuple(offsets.shape)} "
            f"where (k,) and ({n_proteins},) are wanted"
        )
    if _can_look(indices) and len(indices) and not 0 <= indices.min() <= indices.max() < n_terms:
        raise InputError(f"annotation loss: term indices must lie in 0..{n_terms - 1}")
    protein = torch.searchsorted(offsets, torch.arange(indices.shape[0], device=device), right=True) - 1
    dense = torch.zeros(n_proteins, n_terms, dtype=torch.bool, device=device)
    dense[protein, indices] = True
    return dense


def _can_look(values: Tensor) -> bool:
    """Whether values can be checked without waiting for a GPU or breaking a graph."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
