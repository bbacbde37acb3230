"""Order, batches, windows and shares: every protein once per epoch, whatever is asked, and the same from any place."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast.data import sampling
from proteinbert_fast.data.sampling import Cursor, Episodes, Order, TokenBudget, share, uniform, window_starts
from proteinbert_fast.errors import InputError


def stream(lengths, is_training, cutting, seed, cursor=None):
    """Batches as the loader makes them, of lengths alone, with where each is followed."""
    order, numbers = Order(len(lengths), seed), np.flatnonzero(is_training)
    cursor = cursor or Cursor()
    carried, pool, first = np.array(cursor.carried, np.int64), cursor.pool, cursor.batch
    while True:
        inside = np.isin(numbers // sampling.BLOCK, order.blocks(pool))
        views = np.concatenate([carried, order.shuffled(pool, numbers[inside])])
        before = carried
        batches, left = cutting.cut(views, lengths[views % len(lengths)], seed, pool)
        carried = views[left]
        for i in range(first, len(batches)):
            is_last = i + 1 == len(batches)
            yield batches[i], Cursor(pool + 1, 0, tuple(carried)) if is_last else Cursor(pool, i + 1, tuple(before))
        pool, first = pool + 1, 0


CUTTINGS = st.one_of(
    st.builds(
        TokenBudget, tokens=st.integers(30, 4000), window=st.none() | st.integers(2, 500), gap=st.integers(0, 20)
    ),
    st.builds(
        Episodes, sizes=st.just(((16, 5), (64, 3), (200, 2))), batches=st.integers(1, 4)
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), block=st.integers(1, 40), blocks=st.integers(1, 5),
    cutting=CUTTINGS, draw=st.integers(0, 2**32), n_ranks=st.integers(1, 5),
)  # fmt: skip
def test_every_protein_once_per_epoch(n, seed, block, blocks, cutting, draw, n_ranks):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BLOCK", block)
        patch.setattr(sampling, "POOL_BLOCKS", blocks)
        random = np.random.default_rng(draw)
        lengths, is_training = random.integers(2, 400, n), random.random(n) < 0.8
        is_training[random.integers(n)] = True
        views: list[int] = []
        dealt: list[int] = []
        for batch, _ in itertools.islice(stream(lengths, is_training, cutting, seed), 60):
            views += batch.views.tolist()
            rows = lengths[batch.views % n]
            for places in share(rows, n_ranks):
                dealt += batch.views[places].tolist()
    counts = Counter(views)
    assert set(counts.values()) <= {1}, "a view is a protein in an epoch: never twice"
    assert Counter(dealt) == counts, "ranks share what there is"
    assert all(is_training[view % n] for view in views)
    if isinstance(cutting, TokenBudget):
        # In the order of epochs, but for those at the seam: an epoch that is followed by the one after next is whole.
        epochs = np.array(views) // n
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(int(epochs[-1])):
            assert sorted(v % n for v in views if v // n == epoch) == np.flatnonzero(is_training).tolist()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1), block=st.integers(1, 40), cutting=CUTTINGS, draw=st.integers(0, 2**32),
    at=st.integers(0, 50),
)  # fmt: skip
def test_going_on_from_any_place(seed, block, cutting, draw, at):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "BLOCK", block)
        patch.setattr(sampling, "POOL_BLOCKS", 2)
        random = np.random.default_rng(draw)
        lengths, is_training = random.integers(2, 400, 150), np.ones(150, bool)
        whole = list(itertools.islice(stream(lengths, is_training, cutting, seed), at + 6))
        cursor = Cursor.from_json(whole[at][1].to_json())
        rest = list(itertools.islice(stream(lengths, is_training, cutting, seed, cursor), 5))
    for (batch, following), (again, following_again) in zip(whole[at + 1 :], rest, strict=True):
        assert (batch.views == again.views).all()
        assert batch.window == again.window
        assert following == following_again


@given(
    lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=80), tokens=st.integers(1, 4000),
    window=st.none() | st.integers(1, 1000), gap=st.integers(0, 20),
)  # fmt: skip
def test_budgets_are_kept_and_filled(lengths, tokens, window, gap):
    cutting = TokenBudget(tokens, window, gap)
    views, sizes = np.arange(len(lengths)), np.array(lengths)
    batches, left = cutting.cut(views, sizes, 0, 0)
    rows = [gap + int(cutting.rows(sizes[batch.views]).sum()) for batch in batches]
    for batch, n in zip(batches, rows, strict=True):
        assert n <= tokens or len(batch.views) == 1
    joined = [*[batch.views for batch in batches], views[left]]
    assert np.concatenate(joined).tolist() == views.tolist()
    for n, following in zip(rows, joined[1:], strict=True):
        if not len(following):
            continue
        assert n + int(cutting.rows(sizes[following[:1]])[0]) > tokens, "one more would not have fitted"


def test_epochs_differ_and_seeds_differ():
    order = Order(100_000, 5)
    numbers = np.arange(1000)
    first, second = order.shuffled(0, numbers), order.shuffled(order.pools_per_epoch, numbers) - 100_000
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert (first != second).mean() > 0.99
    assert (Order(100_000, 6).shuffled(0, numbers) != first).mean() > 0.99
    assert not (order.blocks(0) == Order(100_000, 5).blocks(order.pools_per_epoch)).all()


def test_episodes_are_joined_with_the_papers_probabilities():
    episodes = Episodes()
    probabilities = episodes.probabilities(np.array([100, 128, 512, 2048]))
    # exp(-max(n / L, L / n)) of n = 512: exp(-4), exp(-1), exp(-2), normalised.
    weights = np.exp([-4.0, -1.0, -2.0])
    assert np.allclose(probabilities[2], weights / weights.sum())
    assert np.allclose(probabilities.sum(1), 1)
    n = 40_000
    lengths = np.full(n, 512)
    batches, left = episodes.cut(np.arange(n), lengths, 3, 0)
    found = {length: 0 for length, _ in episodes.sizes}
    for batch in batches:
        assert len(batch.views) == dict(episodes.sizes)[batch.window]
        found[batch.window] += len(batch.views)
    shares = np.array(list(found.values())) / n
    assert np.abs(shares - probabilities[2]).max() < 0.01
    assert len(left) < sum(size for _, size in episodes.sizes)
    # An episode lasts: far fewer changes of length than batches.
    windows = [batch.window for batch in batches]
    changes = sum(a != b for a, b in itertools.pairwise(windows))
    assert changes < len(windows) / 20


def test_windows_are_uniform_and_depend_on_the_view_alone():
    views = np.arange(60_000)
    starts = window_starts(views, np.full(60_000, 25), 20, 7)
    counts = np.bincount(starts, minlength=6)
    assert len(counts) == 6
    assert np.abs(counts - 10_000).max() < 500  # more than 5 standard deviations of 91
    assert (window_starts(views[100:200], np.full(100, 25), 20, 7) == starts[100:200]).all()
    assert not window_starts(views, np.full(60_000, 20), 20, 7).any()
    assert not window_starts(views, np.full(60_000, 25), None, 7).any()


def test_draws_do_not_change_between_versions():
    """Numbers that a run's order is made of: another release must make the same."""
    assert uniform(np.array([0, 1, 2**40]), 0, 0).tolist() == DRAWS
    assert Order(5000, 1).blocks(0).tolist() == [0, 1, 2, 3, 4]
    assert Order(5000, 1).shuffled(0, np.arange(8)).tolist() == ORDER


DRAWS = [0.47141042966848024, 0.17732475569272, 0.43546359041789606]
ORDER = [0, 3, 4, 2, 7, 6, 5, 1]


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
def test_shares_are_even(n_ranks):
    rows = np.random.default_rng(0).integers(20, 1000, 200)
    sums = [int(rows[places].sum()) for places in share(rows, n_ranks)]
    assert max(sums) - min(sums) <= rows.max()
    assert [len(p) for p in share(rows[:2], n_ranks)].count(0) == max(n_ranks - 2, 0)


@pytest.mark.parametrize(
    ("cutting", "message"),
    [
        (TokenBudget(1000, None, 20), r"c\.h5: its 3 training proteins fill 116 rows, fewer than one batch of 1,000"),
        (Episodes(), r"c\.h5: has 3 training proteins, fewer than one batch of 128"),
    ],
)
def test_too_few_proteins_are_refused(cutting, message):
    with pytest.raises(InputError, match=message):
        cutting.check(np.array([12, 12, 12]), "c.h5")
