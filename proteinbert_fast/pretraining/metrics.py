"""How well GO terms are predicted: Fmax and areas under precision-recall curves, for all terms or some.

In every one of them, proteins without any true term among those that are looked at do not count: nothing is known of
them. A term that a protein does not have counts as false, as is usual, though some of them are only unknown.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from proteinbert_fast.errors import InputError

Scores = npt.NDArray[np.floating[Any]]
BoolArray = npt.NDArray[np.bool_]
Truth = BoolArray | tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.integer[Any]]]
Terms = BoolArray | npt.NDArray[np.integer[Any]] | Sequence[int]

THRESHOLDS = 100  # of Fmax: 0.01, 0.02, ... 1.00
ASPECTS = ("P", "F", "C")
_ROWS = 256  # proteins that are counted at a time
_COLUMNS = 256  # terms that are sorted at a time


class Fmax(NamedTuple):
    """The best harmonic mean of precision and recall, and where it is.

    Attributes:
        value: 0..1; NaN if no protein has a term.
        threshold: the smallest one that gives it.
        precision: there, averaged over the proteins that have a prediction.
        recall: there, averaged over all proteins that have a term.
    """

    value: float
    threshold: float
    precision: float
    recall: float


def fmax(scores: Scores, truth: Truth, terms: Terms | None = None) -> Fmax:
    """Protein-centric Fmax, as CAFA defines it (Radivojac et al. 2013, doi:10.1038/nmeth.2340).

    At each threshold t of 0.01, 0.02, ... 1.00, terms with a score of at least t are predicted. Precision is averaged
    over the proteins for which anything is predicted, recall over all that have a term. Fmax is the best harmonic mean.

    Args:
        scores: (n, T), from 0 to 1. Thresholds are rounded to their precision.
        truth: which are true: dense bool (n, T), or sparse (indices (k,), offsets (n,) or (n + 1,)).
        terms: which of the T terms count: bool (T,) or numbers; all when None.

    Raises:
        InputError: shapes do not fit, a score is NaN or not from 0 to 1.
    """
    scores, true = _chosen(scores, truth, terms)
    if scores.size and not (scores.min() >= 0 and scores.max() <= 1):
        raise InputError(f"scores must be from 0 to 1, got {scores.min()} to {scores.max()}")
    if not len(scores):
        return Fmax(np.nan, np.nan, np.nan, np.nan)
    thresholds = (np.arange(1, THRESHOLDS + 1) / THRESHOLDS).astype(scores.dtype)
    precision_sum, covered, recall_sum = (np.zeros(THRESHOLDS) for _ in range(3))
    for first in range(0, len(scores), _ROWS):
        part, is_true = scores[first : first + _ROWS], true[first : first + _ROWS]
        row, column = np.nonzero(part >= thresholds[0])  # most scores are below all thresholds
        reached = np.searchsorted(thresholds, part[row, column], side="right") - 1
        hit = is_true[row, column]
        predicted = _at_least(row, reached, len(part))
        found = _at_least(row[hit], reached[hit], len(part))
        precision_sum += (found / np.maximum(predicted, 1)).sum(0)
        covered += (predicted > 0).sum(0)
        recall_sum += (found / is_true.sum(1, keepdims=True)).sum(0)
    precision, recall = precision_sum / np.maximum(covered, 1), recall_sum / len(scores)
    both = precision + recall
    f = np.divide(2 * precision * recall, both, out=np.zeros(THRESHOLDS), where=both > 0)
    best = int(f.argmax())
    return Fmax(float(f[best]), (best + 1) / THRESHOLDS, float(precision[best]), float(recall[best]))


def micro_aupr(scores: Scores, truth: Truth, terms: Terms | None = None) -> float:
    """Average precision over all pairs of protein and term, as one ranking.

    The sum over distinct scores of precision times gained recall, from high scores to low: no interpolation, and equal
    scores are one step.

    Args:
        scores: (n, T), the higher the likelier.
        truth: as for `fmax`.
        terms: as for `fmax`.

    Returns:
        0..1; NaN if no protein has a term.

    Raises:
        InputError: shapes do not fit, or a score is NaN.
    """
    scores, true = _chosen(scores, truth, terms)
    return _average_precision(np.sort(scores, axis=None), scores[true])


def macro_aupr(scores: Scores, truth: Truth, terms: Terms | None = None) -> float:
    """Mean over terms of the average precision of each, over the terms that some protein has.

    Args, returns and raises as `micro_aupr`.
    """
    scores, true = _chosen(scores, truth, terms)
    places = np.flatnonzero(true.any(0))
    total = 0.0
    for first in range(0, len(places), _COLUMNS):
        some = places[first : first + _COLUMNS]
        columns = np.ascontiguousarray(scores[:, some].T)
        positives = [column[is_true] for column, is_true in zip(columns, true[:, some].T, strict=True)]
        columns.sort(axis=1)
        total += sum(map(_average_precision, columns, positives))
    return total / len(places) if len(places) else np.nan


def go_metrics(scores: Scores, truth: Truth, aspects: Sequence[str]) -> dict[str, Any]:
    """All of them, for the log of a run.

    Args:
        scores: (n, T), from 0 to 1.
        truth: as for `fmax`.
        aspects: (T,) "P", "F" or "C"; terms of any other text do not count.

    Returns:
        ``{"fmax": {"P": ..., "F": ..., "C": ...}, "micro_aupr": ..., "macro_aupr": ...}``, the areas over the terms of
        all three aspects. None where no protein has a term.

    Raises:
        InputError: shapes do not fit, a score is NaN or not from 0 to 1.
    """
    scores, true = _checked(scores, truth)
    aspect = np.asarray(aspects, dtype=str)
    if aspect.shape != (scores.shape[1],):
        raise InputError(f"aspects: {aspect.shape} where one for each of {scores.shape[1]} terms is wanted")
    known = np.isin(aspect, ASPECTS)
    return {
        "fmax": {letter: _or_none(fmax(scores, true, aspect == letter).value) for letter in ASPECTS},
        "micro_aupr": _or_none(micro_aupr(scores, true, known)),
        "macro_aupr": _or_none(macro_aupr(scores, true, known)),
    }


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value


def _at_least(row: npt.NDArray[np.intp], reached: npt.NDArray[np.intp], n: int) -> npt.NDArray[np.intp]:
    """How many of each row reach each threshold, (n, THRESHOLDS), of the highest one that each reaches."""
    counts = np.bincount(row * THRESHOLDS + reached, minlength=n * THRESHOLDS).reshape(n, THRESHOLDS)
    return counts[:, ::-1].cumsum(1)[:, ::-1]


def _average_precision(ascending: Scores, positive: Scores) -> float:
    """Of all scores in ascending order, and those of what is true.

    Recall only grows at scores of what is true, so that no other has to be looked at.
    """
    if not len(positive):
        return np.nan
    steps, gained = np.unique(positive, return_counts=True)
    true_positives = gained[::-1].cumsum()[::-1]
    predicted = len(ascending) - np.searchsorted(ascending, steps, side="left")
    return float((true_positives / predicted * gained).sum() / len(positive))


def _chosen(scores: Scores, truth: Truth, terms: Terms | None) -> tuple[Scores, BoolArray]:
    """The chosen terms, of the proteins that have one of them."""
    scores, true = _checked(scores, truth)
    if terms is not None:
        chosen = np.asarray(terms)
        n_terms = scores.shape[1]
        if chosen.dtype == bool and chosen.shape != (n_terms,):
            raise InputError(f"terms: {chosen.shape} where ({n_terms},) is wanted")
        if chosen.dtype != bool:
            if chosen.size == 0:
                chosen = chosen.astype(np.int64)
            if chosen.ndim != 1 or chosen.dtype.kind not in "iu":
                raise InputError("terms must be numbers of terms, or bool")
            if chosen.size and not 0 <= chosen.min() <= chosen.max() < n_terms:
                raise InputError(f"terms must lie in 0..{n_terms - 1}")
            if len(np.unique(chosen)) < len(chosen):
                raise InputError("terms: one is named twice")
        scores, true = scores[:, chosen], true[:, chosen]
    has_term = true.any(1)
    return (scores, true) if has_term.all() else (scores[has_term], true[has_term])


def _checked(scores: Scores, truth: Truth) -> tuple[Scores, BoolArray]:
    scores = np.asarray(scores)
    if scores.ndim != 2 or scores.dtype.kind != "f":
        raise InputError(f"scores must be floating point (proteins, terms), got {scores.dtype} {scores.shape}")
    if scores.size and np.isnan(scores.min()):
        protein, term = np.argwhere(np.isnan(scores))[0]
        raise InputError(f"scores: protein {protein}, term {term} is NaN")
    return scores, _dense(truth, *scores.shape)


def _dense(truth: Truth, n: int, n_terms: int) -> BoolArray:
    if not isinstance(truth, tuple):
        true = np.asarray(truth)
        if true.shape != (n, n_terms) or true.dtype != bool:
            raise InputError(f"truth: {true.dtype} {true.shape} where bool ({n}, {n_terms}) is wanted")
        return true
    indices, offsets = (np.asarray(values) for values in truth)
    if indices.ndim != 1 or offsets.shape not in {(n,), (n + 1,)}:
        raise InputError(
            f"truth: indices {indices.shape} and offsets {offsets.shape} where (k,) and ({n},) or ({n + 1},) are wanted"
        )
    ends = np.append(offsets[:n].astype(np.int64), len(indices))
    sizes = np.diff(ends)
    if (n and ends[0] != 0) or (sizes < 0).any() or offsets[n:].tolist() not in ([], [len(indices)]):
        raise InputError(f"truth: offsets must rise from 0 to {len(indices)}")
    if len(indices) and (n == 0 or not 0 <= indices.min() <= indices.max() < n_terms):
        raise InputError(f"truth: term indices must lie in 0..{n_terms - 1}")
    true = np.zeros((n, n_terms), dtype=bool)
    true[np.repeat(np.arange(n), sizes), indices.astype(np.int64)] = True
    return true
