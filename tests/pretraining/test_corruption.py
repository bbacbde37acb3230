"""Corruption of tokens and GO terms: frequencies, and that a record's corruption is its own whatever surrounds it."""

import hashlib
import math

import numpy as np
import pytest
import torch

from proteinbert_fast import InputError, PackedBatch, Tokenizer
from proteinbert_fast.pretraining import corruption
from proteinbert_fast.pretraining.corruption import corrupt_annotations, corrupt_tokens

# Five standard deviations; seeds are fixed, so a test passes always or never.
SIGMAS = 5


def check_counts(found: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square: the counts of a multinomial's classes."""
    expected = probabilities / probabilities.sum() * found.sum()
    statistic, freedom = ((found - expected) ** 2 / expected).sum(), len(found) - 1
    assert abs(statistic - freedom) < SIGMAS * math.sqrt(2 * freedom)


def check_rate(found: int, tries: int, probability: float) -> None:
    assert abs(found - tries * probability) < SIGMAS * math.sqrt(tries * probability * (1 - probability))


def sparse(terms: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    offsets = np.cumsum([0, *map(len, terms[:-1])])[: len(terms)]
    return torch.tensor([t for some in terms for t in some], dtype=torch.int64), torch.from_numpy(offsets)


def lists(annotations: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    indices, offsets = annotations
    return [part.tolist() for part in torch.tensor_split(indices, offsets[1:].cpu())] if len(offsets) else []


def test_bits_are_those_of_splitmix64():
    """The published generator from seed 1234567: its first outputs, in unsigned numbers."""
    draws = corruption._draw(torch.tensor([1234567]), torch.arange(5))
    assert [d % 2**64 for d in draws.tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_the_corruption_of_today_is_that_of_tomorrow():
    """Exact results, so that a resumed or repeated training sees the same inputs under any version."""
    batch = corrupt_tokens(Tokenizer()(["ACDEFGHIKLMNPQRSTVWY" * 50]), [7], seed=1, step=2)
    assert hashlib.sha256(batch.tokens.numpy().tobytes()).hexdigest()[:16] == "41e7c3160974b548"
    terms = corrupt_annotations(sparse([list(range(8))] * 4), 8943, [3, 4, 5, 6], seed=1, step=2, add=4e-4)
    assert lists(terms) == [
        [0, 1, 2, 3, 6, 7, 612, 4647, 7023, 8231],
        [1, 2, 4, 5, 6, 7, 4858],
        [0, 1, 3, 4, 6, 7, 468, 1891, 3868, 4105, 5642, 7332, 8335, 8704],
        [],
    ]


def test_tokens_are_replaced_evenly_everywhere():
    sequences = ["ACDEFGHIKLMNPQRSTVWY" * 5] * 2000
    clean = Tokenizer()(sequences)
    noisy = corrupt_tokens(clean, np.arange(2000), seed=0, step=0)
    inside = (clean.segments >= 0).numpy()
    before, after = clean.tokens.numpy()[inside], noisy.tokens.numpy()[inside]
    assert (noisy.tokens.numpy()[~inside] == 26).all()
    changed = before != after
    check_rate(changed.sum(), len(before), 0.05 * 25 / 26)
    # START and END like any other position, by any token, PAD too.
    by_position = changed.reshape(2000, 102).sum(0)
    check_counts(by_position, np.ones(102))
    for token in (0, 5, 23, 24):
        new = np.bincount(after[changed & (before == token)], minlength=26)
        assert new[token] == 0
        check_counts(np.delete(new, token), np.ones(25))
    # Pairs of neighbours, of records and of steps are independent.
    rate = 0.05 * 25 / 26
    table = changed.reshape(2000, 102)
    check_rate((table[:, 1:] & table[:, :-1]).sum(), 2000 * 101, rate**2)
    check_rate((table[1:] & table[:-1]).sum(), 1999 * 102, rate**2)
    for other in (
        corrupt_tokens(clean, np.arange(2000), seed=0, step=1),
        corrupt_tokens(clean, np.arange(2000), seed=1, step=0),
    ):
        again = other.tokens.numpy()[inside] != before
        check_rate((changed & again).sum(), len(before), rate**2)


def test_pad_is_a_token_like_any_other():
    clean = PackedBatch.from_padded(torch.full((50, 500), 25))
    noisy = corrupt_tokens(clean, range(50), seed=3, step=0)
    check_rate(int((noisy.tokens != clean.tokens).sum()), 25_000, 0.05 * 25 / 26)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_never_and_always(probability):
    clean = Tokenizer()(["M" * 5000])
    noisy = corrupt_tokens(clean, [0], seed=0, step=0, probability=probability)
    if probability:
        check_counts(np.bincount(noisy.tokens[20:-20], minlength=26), np.ones(26))
    else:
        assert torch.equal(noisy.tokens, clean.tokens)


def test_same_bits_alone_and_in_any_batch(real_sequences):
    tokenizer, records = Tokenizer(), np.arange(40) * 1_000_003
    sequences = real_sequences[:40]
    rng = np.random.default_rng(0)
    terms = [sorted(rng.choice(500, n, replace=False).tolist()) for n in rng.integers(0, 30, 40)]
    order = rng.permutation(40)
    options = {"seed": 2**64 - 1, "step": 12345}
    together = corrupt_tokens(tokenizer(sequences), records, **options)
    shuffled = corrupt_tokens(tokenizer([sequences[i] for i in order]), records[order].tolist(), **options)
    go = lists(corrupt_annotations(sparse(terms), 500, records, **options, add=0.01))
    go_shuffled = lists(
        corrupt_annotations(sparse([terms[i] for i in order]), 500, torch.tensor(records[order]), **options, add=0.01)
    )
    for place, i in enumerate(order):
        alone = corrupt_tokens(tokenizer([sequences[i]]), records[[i]], **options)
        expected = together.unpack(together.tokens)[i]
        assert torch.equal(alone.unpack(alone.tokens)[0], expected)
        assert torch.equal(shuffled.unpack(shuffled.tokens)[place], expected)
        assert lists(corrupt_annotations(sparse([terms[i]]), 500, records[[i]], **options, add=0.01)) == [go[i]]
        assert go_shuffled[place] == go[i]
    assert not torch.equal(together.tokens, tokenizer(sequences).tokens)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_bits_on_a_gpu(real_sequences):
    batch, records = Tokenizer()(real_sequences), np.arange(len(real_sequences))
    on_cpu = corrupt_tokens(batch, records, seed=5, step=6)
    assert torch.equal(corrupt_tokens(batch.to("cuda"), records, seed=5, step=6).tokens.cpu(), on_cpu.tokens)
    terms = sparse([[1, 5, 8000]] * len(records))
    right = corrupt_annotations(terms, 8943, records, seed=5, step=6)
    ours = corrupt_annotations((terms[0].cuda(), terms[1].cuda()), 8943, records, seed=5, step=6)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, right, strict=True))


def test_layout_ids_and_lengths_stay():
    clean = Tokenizer()(["MKT", "A" * 30], ids=["a", "b"])
    assert clean.n_residues == 33
    noisy = corrupt_tokens(clean, [0, 1], seed=0, step=0, probability=1.0)
    assert noisy.ids == ("a", "b")
    assert torch.equal(noisy.starts, clean.starts)
    assert noisy.n_residues == int((noisy.tokens < 23).sum())
    PackedBatch(noisy.tokens, noisy.lengths, noisy.gap)  # checks itself


def test_terms_are_removed_added_and_hidden_at_their_rates():
    n, n_terms, true = 4000, 8943, list(range(0, 8000, 200))
    found = lists(corrupt_annotations(sparse([true] * n), n_terms, range(n), seed=0, step=0))
    hidden = [not terms for terms in found]
    check_rate(sum(hidden), n, 0.5)
    shown = [terms for terms in found if terms]
    kept = np.array([[t in terms for t in true] for terms in map(set, shown)])
    check_rate(kept.sum(), kept.size, 0.75)
    check_counts(kept.sum(0), np.ones(len(true)))
    added = [[t for t in terms if t % 200 or t >= 8000] for terms in shown]
    check_rate(sum(map(len, added)), len(shown) * (n_terms - len(true)), 1e-4)
    # How many at once: Poisson, since the rate is small. Where: evenly.
    mean = 1e-4 * (n_terms - len(true))
    counts = np.bincount(np.minimum([len(terms) for terms in added], 4), minlength=5)
    poisson = np.array([math.exp(-mean) * mean**k / math.factorial(k) for k in range(4)])
    check_counts(counts, np.append(poisson, 1 - poisson.sum()))
    check_counts(np.histogram(np.concatenate(added), bins=20, range=(0, n_terms))[0], np.ones(20))


@pytest.mark.parametrize("n_terms", [1, 2, 7, 24])
def test_each_false_term_is_added_independently(n_terms):
    """All subsets of a few terms, at a high rate: their frequencies are those of independent draws."""
    n, rate = 20_000, 0.3
    found = corrupt_annotations(sparse([[]] * n), n_terms, range(n), seed=1, step=0, add=rate, hide=0.0)
    dense = np.zeros((n, n_terms), np.int64)
    for i, terms in enumerate(lists(found)):
        assert len(set(terms)) == len(terms)
        dense[i, terms] = 1
    if n_terms <= 7:
        subsets = np.bincount(dense @ (1 << np.arange(n_terms)), minlength=1 << n_terms)
        size = np.array([bin(i).count("1") for i in range(1 << n_terms)])
        check_counts(subsets, rate**size * (1 - rate) ** (n_terms - size))
    else:
        check_counts(dense.sum(0), np.ones(n_terms))
        sizes = np.bincount(dense.sum(1), minlength=25)[2:13]
        binomial = np.array([math.comb(24, k) * rate**k * (1 - rate) ** (24 - k) for k in range(2, 13)])
        check_counts(sizes, binomial)


def test_adding_no_term_that_is_true():
    true = list(range(20))
    found = lists(
        corrupt_annotations(sparse([true] * 300), 24, range(300), seed=0, step=0, add=0.5, remove=1.0, hide=0.0)
    )
    assert {t for terms in found for t in terms} == {20, 21, 22, 23}
    found = lists(
        corrupt_annotations(sparse([true] * 300), 24, range(300), seed=0, step=0, add=0.5, remove=0.0, hide=0.0)
    )
    assert all(terms[:20] == true and terms == sorted(set(terms)) for terms in found)


def test_dense_annotations_are_the_same_as_sparse_ones():
    dense = torch.rand(9, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    dense[3] = False
    terms = [row.nonzero().flatten().tolist() for row in dense]
    for given in (dense, dense.float(), dense.to(torch.uint8)):
        a = corrupt_annotations(given, 40, range(9), seed=0, step=0, add=0.05)
        b = corrupt_annotations(sparse(terms), 40, range(9), seed=0, step=0, add=0.05)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_nothing_to_corrupt():
    empty = Tokenizer()([])
    assert len(corrupt_tokens(empty, [], seed=0, step=0)) == 0
    indices, offsets = corrupt_annotations(sparse([]), 5, [], seed=0, step=0)
    assert (len(indices), len(offsets)) == (0, 0)
    indices, offsets = corrupt_annotations(sparse([[], []]), 5, [0, 1], seed=0, step=0)
    assert (indices.tolist(), offsets.tolist()) == ([], [0, 0])


def test_a_batch_of_the_original_has_these_rates(golden, golden_meta):
    """One batch of six from the published generator, whose rates the metadata hold: consistent, as far as six say."""
    rates = golden_meta["batch_generator"]
    x, y = golden["batch_x_tokens"], golden["batch_y_tokens"][..., 0]
    check_rate(int((x != y).sum()), x.size, rates["p_seq_noise"] * 25 / 26)
    before, after = golden["batch_y_annotations"] > 0, golden["batch_x_annotations"] > 0
    ours, offsets = corrupt_annotations(
        torch.from_numpy(before), 24, range(6), seed=0, step=0, add=rates["p_annot_noise_negative"]
    )
    both = [after, np.zeros_like(after)]
    for i, terms in enumerate(lists((ours, offsets))):
        both[1][i, terms] = True
    for shown in both:
        rows = shown.any(1) & before.any(1)
        check_rate(int((before & shown)[rows].sum()), int(before[rows].sum()), 1 - rates["p_annot_noise_positive"])
        check_rate(int((~before & shown)[rows].sum()), int((~before)[rows].sum()), rates["p_annot_noise_negative"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": -1}, r"seed must be in 0\.\.2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, "seed must be in"),
        ({"step": -1}, "step must be in"),
        ({"records": [0, 1]}, "records must be 1 integers, one for each protein"),
        ({"records": [0.5]}, "records must be 1 integers"),
        ({"records": [-3]}, "records must be numbers from 0, got -3"),
        ({"probability": 1.1}, "probability must be a probability from 0 to 1, got 1.1"),
        ({"probability": math.nan}, "probability must be a probability from 0 to 1, got nan"),
        ({"add": 0.6}, "add must be a probability from 0 to 0.5, got 0.6"),
        ({"n_terms": 0}, "n_terms must be from 1"),
        ({"annotations": sparse([[5]])}, r"term indices must lie in 0\.\.4"),
        ({"annotations": torch.zeros(1, 6)}, r"annotations: \(1, 6\) where \(proteins, 5\) is wanted"),
        ({"annotations": (torch.zeros(1, 1), torch.zeros(1))}, r"indices \(1, 1\) and offsets \(1,\)"),
    ],
)
def test_bad_input_is_refused(changes, says):
    tokens = {"records": [0], "seed": 0, "step": 0}
    terms = {"annotations": sparse([[1]]), "n_terms": 5, **tokens}
    if "probability" not in changes:
        with pytest.raises(InputError, match=says):
            corrupt_annotations(**{**terms, **changes})
    if not {"add", "n_terms", "annotations"} & changes.keys():
        with pytest.raises(InputError, match=says):
            corrupt_tokens(Tokenizer()(["M"]), **{**tokens, **changes})


def test_other_tokens_must_fit_the_layout():
    batch = Tokenizer()(["MKT"])
    for wrong in (batch.tokens[1:], batch.tokens.int()):
        with pytest.raises(InputError, match=r"tokens must be uint8 \(45,\) on cpu, got"):
            batch.with_tokens(wrong)
