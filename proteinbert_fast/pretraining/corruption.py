"""What the model is given to repair: tokens replaced at random, GO terms removed and added.

Every random number is a function of the seed, the record, the step and the place alone, in integers: a record is
corrupted in the same way alone and in any batch, by any number of workers, on every device. Draw k of a stream is
splitmix64's (Steele, Lea and Flood 2014), started at a key that is mixed of the seed, the purpose, the record and the
step. Probabilities are rounded to multiples of 2^-32.
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proteinbert_fast.config import VOCABULARY_SIZE
from proteinbert_fast.errors import InputError
from proteinbert_fast.packing import PackedBatch

Records = Sequence[int] | npt.NDArray[np.integer] | Tensor

_TOKENS, _HIDE, _REMOVE, _ADD = range(4)  # streams of their own
_ONE = 1 << 32  # probability 1
_COUNT_BITS = 62


def corrupt_tokens(
    batch: PackedBatch, records: Records, *, seed: int, step: int, probability: float = 0.05
) -> PackedBatch:
    """The batch with some tokens replaced, as in the original's pretraining.

    Every position, START, END and PAD too, is replaced with this probability by a token drawn uniformly from all 26,
    which may be the one that was there.

    Args:
        batch: B proteins.
        records: (B,) numbers of the proteins in the data set, from 0.
        seed: 0..2^64 - 1.
        step: when the record is seen, from 0; another step is another corruption.
        probability: of a replacement.

    Returns:
        A batch of the same layout on the same device. No GPU is waited for where ``records`` lie on it.

    Raises:
        InputError: records, seed, step or probability are out of range.
    """
    limit = _limit(probability, "probability")
    keys = _keys(records, len(batch), seed, step, _TOKENS, batch.device)
    if not len(batch):
        return batch
    protein = batch.segments
    position = torch.arange(batch.n_rows, device=batch.device) - batch.starts[protein]
    draws = _draw(keys[protein], position)
    token = ((draws & (_ONE - 1)) * VOCABULARY_SIZE) >> 32
    is_replaced = (_shifted(draws, 32) < limit) & (protein >= 0)
    return batch.with_tokens(token.to(torch.uint8).where(is_replaced, batch.tokens))


def corrupt_annotations(
    annotations: Tensor | tuple[Tensor, Tensor],
    n_terms: int,
    records: Records,
    *,
    seed: int,
    step: int,
    remove: float = 0.25,
    add: float = 1e-4,
    hide: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """GO terms as the model is given them in pretraining, made of the true ones.

    Each true term is removed with probability ``remove``, each other one added with probability ``add``, and a protein
    is left without any with probability ``hide``. The work goes with the number of terms that are set, not with B * N.

    Args:
        annotations: the true terms: sparse (indices (k,), offsets (B,)), none twice in a protein, or dense (B, N).
        n_terms: N.
        records: (B,) numbers of the proteins in the data set, from 0.
        seed: 0..2^64 - 1.
        step: when the record is seen, from 0.
        remove: for each true term.
        add: for each term that is not true, at most 0.5.
        hide: for each protein.

    Returns:
        int64 indices (m,), rising within each protein, and offsets (B,), as the model takes them, on the device of the
        annotations. A GPU is waited for, because m is only known there.

    Raises:
        InputError: annotations, records, seed, step or a probability are out of range.
    """
    removed_below, hidden_below, added_below = _limit(remove, "remove"), _limit(hide, "hide"), _limit(add, "add", 0.5)
    if not 1 <= n_terms < 2**31:
        raise InputError(f"n_terms must be from 1 to below 2^31, got {n_terms}")
    indices, offsets = _sparse(annotations, n_terms)
    device, n_proteins = indices.device, len(offsets)

    def keys(purpose: int) -> Tensor:
        return _keys(records, n_proteins, seed, step, purpose, device)

    is_shown = _shifted(_draw(keys(_HIDE), 0), 32) >= hidden_below
    ends = torch.cat([offsets[1:], offsets.new_tensor([len(indices)])])
    protein = torch.repeat_interleave(torch.arange(n_proteins, device=device), ends - offsets, output_size=len(indices))
    is_kept = is_shown[protein] & (_shifted(_draw(keys(_REMOVE)[protein], indices), 32) >= removed_below)
    # A term of a protein as one number; rising numbers are in the order of the result.
    true = protein * n_terms + indices
    found = true[is_kept]
    if added_below:
        terms, is_added = _chosen(keys(_ADD), n_terms, added_below)
        added = (terms + torch.arange(n_proteins, device=device)[:, None] * n_terms)[is_added & is_shown[:, None]]
        found = torch.cat([found, added[~torch.isin(added, true)]])
    found = found.sort().values
    first = torch.arange(n_proteins, device=device) * n_terms
    return found % n_terms, torch.searchsorted(found, first)


def _chosen(keys: Tensor, n_terms: int, limit: int) -> tuple[Tensor, Tensor]:
    """Every term chosen with one probability, for each key: terms (B, most) and which of them are meant.

    First how many, from the binomial distribution, then that many different ones (Floyd's algorithm).
    """
    bounds = torch.tensor(_binomial(n_terms, limit), device=keys.device)
    count = torch.searchsorted(bounds, _shifted(_draw(keys, 0), 64 - _COUNT_BITS), right=True)
    # On the host, to know how many there are at most costs nothing, and spares passes in which none is chosen.
    most = int(count.max()) if count.device.type == "cpu" and len(count) else len(bounds)
    terms = keys.new_full((len(keys), most), -1)
    for i in range(most):
        last = n_terms - count + i
        term = (_shifted(_draw(keys, 1 + i), 32) * (last + 1)) >> 32
        is_taken = (terms[:, :i] == term[:, None]).any(1)
        terms[:, i] = torch.where(i < count, last.where(is_taken, term), -1)
    return terms, terms >= 0


@lru_cache(maxsize=16)
def _binomial(n: int, limit: int) -> tuple[int, ...]:
    """Bounds of a uniform 62-bit number: below the first, nothing is chosen; below the second, one term; and so on.

    In decimal numbers of fixed precision, so that every machine finds the same bounds.
    """
    bounds: list[int] = []
    with localcontext() as context:
        context.prec = 60
        p = Decimal(limit) / _ONE
        share = (1 - p) ** n
        total = share
        for k in range(n):
            bound = int(total * 2**_COUNT_BITS)
            # What lies beyond is less probable than one 62-bit number, or rounding.
            if bound >= 2**_COUNT_BITS - 1:
                break
            bounds.append(bound)
            share *= Decimal(n - k) / (k + 1) * (p / (1 - p))
            total += share
    return tuple(bounds)


def _sparse(annotations: Any, n_terms: int) -> tuple[Tensor, Tensor]:
    if isinstance(annotations, Tensor):
        if annotations.dim() != 2 or annotations.shape[1] != n_terms:
            raise InputError(f"annotations: {tuple(annotations.shape)} where (proteins, {n_terms}) is wanted")
        indices = annotations.nonzero()[:, 1]
        ends = annotations.count_nonzero(1).cumsum(0)
        return indices, torch.cat([ends.new_zeros(1), ends[:-1]])[: len(ends)]
    indices, offsets = (values.long() for values in annotations)
    if indices.dim() != 1 or offsets.dim() != 1:
        raise InputError(
            f"annotations: indices {tuple(indices.shape)} and offsets {tuple(offsets.shape)} "
            "where (k,) and (B,) are wanted"
        )
    if indices.device.type == "cpu" and len(indices) and not 0 <= indices.min() <= indices.max() < n_terms:
        raise InputError(f"annotations: term indices must lie in 0..{n_terms - 1}")
    return indices, offsets


def _limit(probability: float, name: str, most: float = 1.0) -> int:
    """What 32 uniform bits are below with this probability."""
    if not 0 <= probability <= most:
        raise InputError(f"{name} must be a probability from 0 to {most:g}, got {probability}")
    return round(probability * _ONE)


def _keys(records: Records, n_proteins: int, seed: int, step: int, purpose: int, device: torch.device) -> Tensor:
    """Where each record's stream begins, int64 (B,)."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed must be in 0..2**64 - 1, got {seed}")
    if not 0 <= step < 2**63:
        raise InputError(f"step must be in 0..2**63 - 1, got {step}")
    numbers = torch.as_tensor(records)
    if numbers.numel() == 0:
        numbers = numbers.long()
    if numbers.shape != (n_proteins,) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise InputError(f"records must be {n_proteins} integers, one for each protein")
    if numbers.device.type == "cpu" and n_proteins and numbers.min() < 0:
        raise InputError(f"records must be numbers from 0, got {int(numbers.min())}")
    return _mixed(_mixed(numbers.to(device).long() ^ _start(seed, purpose)) ^ step)


@lru_cache(maxsize=64)
def _start(seed: int, purpose: int) -> int:
    return int(_mixed(_mixed(torch.tensor(_signed(seed), device="cpu")) ^ purpose))


def _draw(keys: Tensor, k: Tensor | int) -> Tensor:
    """Draw k of each stream: 64 random bits as int64."""
    return _mixed(keys + (k * _GOLDEN if isinstance(k, Tensor) else _signed(k * _GOLDEN % (1 << 64))))


def _mixed(z: Tensor) -> Tensor:
    """splitmix64: the step that adds the golden ratio and mixes. Products and sums of int64 wrap on every device."""
    z = z + _GOLDEN
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A shift to the right that brings zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


_GOLDEN = _signed(0x9E3779B97F4A7C15)
