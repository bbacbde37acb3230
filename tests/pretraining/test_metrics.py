"""Fmax and areas under precision-recall curves: by hand, and against their definitions, read out word by word."""

import json

import numpy as np
import pytest

from proteinbert_fast import InputError
from proteinbert_fast.pretraining.metrics import fmax, go_metrics, macro_aupr, micro_aupr

HAND_SCORES = np.array([[0.9, 0.5, 0.1], [0.8, 0.3, 0.005], [0.2, 0.6, 0.4]])
HAND_TRUTH = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]], dtype=bool)  # nothing is known of the third


def sparse(true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nonzero(true)[1], np.append(0, true.sum(1).cumsum())


def defined_fmax(scores: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Its definition with loops; the value and its threshold."""
    best = (-1.0, np.nan)
    for k in range(1, 101):
        t = scores.dtype.type(k / 100)
        precisions, recalls = [], []
        for row, has in zip(scores, true, strict=True):
            predicted, own = set(np.flatnonzero(row >= t)), set(np.flatnonzero(has))
            if not own:
                continue
            if predicted:
                precisions.append(len(predicted & own) / len(predicted))
            recalls.append(len(predicted & own) / len(own))
        precision, recall = np.mean(precisions) if precisions else 0, np.mean(recalls)
        f = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        if f > best[0] + 1e-12:
            best = (f, k / 100)
    return best


def defined_average_precision(scores: np.ndarray, true: np.ndarray) -> float:
    area, recall_before = 0.0, 0.0
    for t in sorted(set(scores.tolist()), reverse=True):
        predicted = scores >= t
        recall = (predicted & true).sum() / true.sum()
        area += (recall - recall_before) * (predicted & true).sum() / predicted.sum()
        recall_before = recall
    return area


def random_case(seed: int, n: int = 40, n_terms: int = 17) -> tuple[np.ndarray, np.ndarray]:
    """Scores with many ties, zeros and ones; some proteins and terms have nothing."""
    rng = np.random.default_rng(seed)
    scores = np.round(rng.beta(0.3, 1.5, (n, n_terms)), int(rng.integers(1, 4)))
    true = rng.random((n, n_terms)) < 0.2 + 0.3 * scores
    true[rng.random(n) < 0.2] = False
    true[:, 3] = False
    return scores.astype(rng.choice(["f4", "f8"])), true


def test_fmax_by_hand():
    """Protein 1 has terms 0 and 2, protein 2 has term 1.

    Up to 0.1: {0 1 2} and {0 1}: precision (2/3 + 1/2) / 2 = 7/12, recall 1, F = 14/19 = 0.7368.
    Up to 0.3: {0 1} and {0 1}: precision 1/2, recall (1/2 + 1) / 2 = 3/4, F = 3/5. Higher thresholds: less recall. At
    0.01 nothing else is predicted than at 0.1, so it is the smallest threshold with the best value.
    """
    found = fmax(HAND_SCORES, HAND_TRUTH)
    assert found == pytest.approx((14 / 19, 0.01, 7 / 12, 1.0))


def test_precision_is_of_those_with_a_prediction_recall_of_all():
    """At 0.5 the first protein alone has a prediction: precision 1, recall 1/2, F = 2/3."""
    found = fmax(np.array([[0.5, 0.0], [0.0, 0.0]]), np.eye(2, dtype=bool))
    assert found == pytest.approx((2 / 3, 0.01, 1.0, 0.5))


def test_areas_by_hand():
    """Known proteins' scores from high to low: 0.9 true, 0.8, 0.5, 0.3 true, 0.1 true, 0.005."""
    assert micro_aupr(HAND_SCORES, HAND_TRUTH) == pytest.approx((1 + 2 / 4 + 3 / 5) / 3)
    # Each term of the two known proteins: 0.9 true, 0.8 | 0.5, 0.3 true | 0.1 true, 0.005.
    assert macro_aupr(HAND_SCORES, HAND_TRUTH) == pytest.approx((1 + 1 / 2 + 1) / 3)


def test_equal_scores_are_one_step():
    """Whatever order they come in: three equal scores, one of them true, have a precision of 1/3."""
    for true in np.eye(3, dtype=bool):
        assert micro_aupr(np.full((1, 3), 0.5), true[None]) == pytest.approx(1 / 3)
        assert macro_aupr(np.full((3, 1), 0.5), np.ones((3, 1), dtype=bool)) == 1


def test_perfect_and_useless_predictions():
    assert fmax(HAND_TRUTH.astype(float), HAND_TRUTH).value == 1
    assert micro_aupr(HAND_TRUTH.astype(float), HAND_TRUTH) == macro_aupr(HAND_TRUTH.astype(float), HAND_TRUTH) == 1
    assert fmax(np.zeros((3, 3)), HAND_TRUTH)[0] == 0


@pytest.mark.parametrize("seed", range(12))
def test_against_the_definitions(seed: int):
    scores, true = random_case(seed)
    known = true.any(1)
    value, threshold = defined_fmax(scores, true)
    found = fmax(scores, true)
    assert (found.value, found.threshold) == pytest.approx((value, threshold))
    assert micro_aupr(scores, true) == pytest.approx(
        defined_average_precision(scores[known].ravel(), true[known].ravel())
    )
    of_terms = [
        defined_average_precision(scores[known, j], true[known, j]) for j in range(true.shape[1]) if true[:, j].any()
    ]
    assert macro_aupr(scores, true) == pytest.approx(np.mean(of_terms))


@pytest.mark.parametrize("measure", [fmax, micro_aupr, macro_aupr])
def test_all_forms_of_truth_and_terms(measure):
    scores, true = random_case(100)
    indices, offsets = sparse(true)
    assert measure(scores, (indices, offsets)) == measure(scores, (indices, offsets[:-1])) == measure(scores, true)
    some = np.array([1, 4, 11])
    mask = np.isin(np.arange(17), some)
    cut = measure(scores[:, some], true[:, some])
    assert measure(scores, true, some) == measure(scores, true, mask) == measure(scores, true, [1, 4, 11]) == cut


def test_large_pieces_are_those_of_small_ones(monkeypatch: pytest.MonkeyPatch):
    """Rows and columns are taken in pieces: whatever their sizes, the same numbers."""
    scores, true = random_case(7, 60, 50)
    before = fmax(scores, true), micro_aupr(scores, true), macro_aupr(scores, true)
    monkeypatch.setattr("proteinbert_fast.pretraining.metrics._ROWS", 7)
    monkeypatch.setattr("proteinbert_fast.pretraining.metrics._COLUMNS", 7)
    np.testing.assert_allclose(np.array(fmax(scores, true)), before[0], rtol=1e-12)
    np.testing.assert_allclose([micro_aupr(scores, true), macro_aupr(scores, true)], before[1:], rtol=1e-12)


def test_thresholds_have_the_precision_of_the_scores():
    """0.07 as float32 and as float16 reaches the threshold 0.07, though their values differ from float64's."""
    for dtype in (np.float16, np.float32, np.float64):
        for k in range(1, 101):
            # A single score, above the wrong one: 2/3 at all thresholds up to the wrong one's, 1 above.
            scores = np.array([[k / 100, (k - 1) / 100]], dtype=dtype)
            assert fmax(scores, np.array([[True, False]]))[:2] == (1, k / 100)


def test_go_metrics():
    scores, true = random_case(3, 40, 12)
    aspects = ["P", "F", "C", "", "P", "F", "P", "P", "F", "", "P", "P"]
    true[:, 2] = False
    found = go_metrics(scores, sparse(true), aspects)
    chosen = np.array([a != "" for a in aspects])
    assert found["fmax"] == {
        "P": fmax(scores, true, [0, 4, 6, 7, 10, 11]).value,
        "F": fmax(scores, true, [1, 5, 8]).value,
        "C": None,
    }
    assert found["micro_aupr"] == micro_aupr(scores[:, chosen], true[:, chosen])
    assert found["macro_aupr"] == macro_aupr(scores[:, chosen], true[:, chosen])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_is_known(n: int):
    scores, true = np.full((n, 4), 0.5), np.zeros((n, 4), dtype=bool)
    assert np.isnan(fmax(scores, true)).all()
    assert np.isnan(micro_aupr(scores, true))
    assert np.isnan(macro_aupr(scores, true))
    assert np.isnan(micro_aupr(np.full((2, 4), 0.5), np.ones((2, 4), dtype=bool), []))
    empty = {"fmax": {"P": None, "F": None, "C": None}, "micro_aupr": None, "macro_aupr": None}
    assert go_metrics(scores, true, ["P"] * 4) == empty


OK = np.full((2, 3), 0.5)


@pytest.mark.parametrize(
    ("scores", "truth", "terms", "line"),
    [
        (np.array([[0.5, np.nan, 0.5]] * 2), OK > 0, None, "scores: protein 0, term 1 is NaN"),
        (OK.astype(int), OK > 0, None, r"scores must be floating point \(proteins, terms\), got int64 \(2, 3\)"),
        (OK[0], OK > 0, None, r"got float64 \(3,\)"),
        (OK, OK, None, r"truth: float64 \(2, 3\) where bool \(2, 3\) is wanted"),
        (OK, OK.T > 0, None, r"truth: bool \(3, 2\) where bool \(2, 3\) is wanted"),
        (OK, (np.array([0, 3]), np.array([0, 1])), None, "truth: term indices must lie in 0..2"),
        (OK, (np.array([0, -1]), np.array([0, 1])), None, "truth: term indices must lie in 0..2"),
        (OK, (np.array([0, 1]), np.array([0, 1, 2, 2])), None, r"offsets \(4,\) where \(k,\) and \(2,\) or \(3,\)"),
        (OK, (np.array([0, 1]), np.array([1, 2])), None, "truth: offsets must rise from 0 to 2"),
        (OK, (np.array([0, 1]), np.array([0, 3])), None, "truth: offsets must rise from 0 to 2"),
        (OK, (np.array([0, 1]), np.array([0, 1, 1])), None, "truth: offsets must rise from 0 to 2"),
        (OK, OK > 0, [3], "terms must lie in 0..2"),
        (OK, OK > 0, [1, 1], "terms: one is named twice"),
        (OK, OK > 0, [0.5], "terms must be numbers of terms, or bool"),
        (OK, OK > 0, np.array([True, False]), r"terms: \(2,\) where \(3,\) is wanted"),
    ],
)
def test_refused(scores, truth, terms, line: str):
    for measure in (fmax, micro_aupr, macro_aupr):
        with pytest.raises(InputError, match=line):
            measure(scores, truth, terms)


def test_fmax_wants_probabilities_and_areas_any_score():
    logits = np.array([[2.0, -3.0]])
    true = np.array([[True, False]])
    with pytest.raises(InputError, match=r"scores must be from 0 to 1, got -3\.0 to 2\.0"):
        fmax(logits, true)
    assert micro_aupr(logits, true) == macro_aupr(logits, true) == 1
    assert micro_aupr(np.array([[np.inf, -np.inf]]), true) == 1
    with pytest.raises(InputError, match=r"aspects: \(1,\) where one for each of 2 terms is wanted"):
        go_metrics(np.array([[0.5, 0.5]]), true, ["P"])
