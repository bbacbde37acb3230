"""Batches of a corpus: the right tokens and terms, whatever pool, batch, window, rank and pass they come through."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from proteinbert_fast import Tokenizer
from proteinbert_fast.data import sampling
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.data.loader import TRAIN, VALIDATION, Loader, held_out, numbers_of
from proteinbert_fast.data.sampling import Cursor, Episodes, TokenBudget


@pytest.fixture
def corpus(small_corpus: Path, monkeypatch: pytest.MonkeyPatch):
    """Real proteins, in blocks and pools so small that there are many of them."""
    monkeypatch.setattr(sampling, "BLOCK", 7)
    monkeypatch.setattr("proteinbert_fast.data.loader.BLOCK", 7)
    monkeypatch.setattr(sampling, "POOL_BLOCKS", 4)
    with Corpus(small_corpus) as opened:
        yield opened


CUTTINGS = [
    TokenBudget(2000, None, 20),
    TokenBudget(3000, 100, 20),
    Episodes(((64, 5), (200, 3)), batches=2),
]


def expected(corpus: Corpus, number: int) -> np.ndarray:
    """All tokens of a protein, by the tokenizer."""
    letters = "ACDEFGHIKLMNPQRSTUVWXY?"
    return Tokenizer().tokenize("".join(letters[t] for t in corpus[number].tokens))


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
def test_content(corpus, cutting):
    loader = Loader(corpus, cutting, seed=3, gap=20)
    seen = set()
    for step in itertools.islice(loader.steps(), 40):
        (part,) = step.parts
        batch = part.tokens
        assert batch.gap == 20
        assert step.n_tokens == batch.n_tokens
        assert step.n_proteins == len(batch)
        assert step.n_annotated == int(part.is_annotated.sum())
        offsets = [*part.terms[1].tolist(), len(part.terms[0])]
        for i, view in enumerate(part.views.tolist()):
            number = view % len(corpus)
            assert corpus.split[number] == TRAIN
            whole = expected(corpus, number)
            row, size = int(batch.host_starts[i]), int(batch.host_lengths[i])
            found = batch.tokens[row : row + size].numpy()
            if step.window is None or len(whole) <= step.window:
                assert (found == whole).all()
            else:
                assert size == step.window
                windows = np.lib.stride_tricks.sliding_window_view(whole, size)
                assert (windows == found).all(1).any()
            terms = part.terms[0][offsets[i] : offsets[i + 1]].tolist()
            assert terms == corpus[number].go_indices.tolist()
            assert bool(part.is_annotated[i]) == bool(terms)
            seen.add(view)
        assert (batch.tokens == 26).sum() == batch.n_rows - batch.n_tokens
    assert len(seen) > 100


@pytest.mark.parametrize("cutting", CUTTINGS, ids=str)
def test_any_place_to_go_on_from(corpus, cutting):
    loader = Loader(corpus, cutting, seed=3, gap=20)
    whole = list(itertools.islice(loader.steps(), 40))
    for at in range(0, 30, 3):
        cursor = Cursor.from_json(whole[at].following.to_json())
        for step, again in zip(whole[at + 1 : at + 6], loader.steps(cursor), strict=False):
            assert same(step, again)


def same(step, other) -> bool:
    return step.following == other.following and all(
        a.tokens.tokens.equal(b.tokens.tokens)
        and (a.views == b.views).all()
        and a.terms[0].equal(b.terms[0])
        and a.terms[1].equal(b.terms[1])
        for a, b in zip(step.parts, other.parts, strict=True)
    )


@pytest.mark.parametrize("n_ranks", [2, 3, 40])
def test_ranks_share_each_batch(corpus, n_ranks):
    cutting = TokenBudget(4000, 300, 20)
    alone = Loader(corpus, cutting, seed=3, gap=20)
    ranks = [Loader(corpus, cutting, seed=3, gap=20, rank=r, n_ranks=n_ranks, tokens_per_pass=900)
             for r in range(n_ranks)]  # fmt: skip
    for step, *shares in itertools.islice(zip(alone.steps(), *(r.steps() for r in ranks), strict=True), 12):
        views = [view for s in shares for part in s.parts if part.is_real for view in part.views.tolist()]
        assert sorted(views) == sorted(step.parts[0].views.tolist())
        for s in shares:
            assert (s.n_tokens, s.n_proteins, s.n_annotated) == (step.n_tokens, step.n_proteins, step.n_annotated)
            assert s.following == step.following
            assert s.parts, "every rank has something to compute"
            assert all(part.tokens.n_rows <= 900 or len(part.tokens) == 1 for part in s.parts)


@pytest.mark.parametrize("n_ranks", [1, 3])
@pytest.mark.parametrize("cutting", CUTTINGS[:2], ids=str)
def test_every_protein_once_in_an_epoch(corpus, cutting, n_ranks):
    """Views count up from epoch to epoch: all of the first two epochs come, each once, in whatever batch and rank."""
    loaders = [Loader(corpus, cutting, seed=3, gap=20, rank=r, n_ranks=n_ranks) for r in range(n_ranks)]
    numbers = set(np.flatnonzero(corpus.split == TRAIN).tolist())
    views: list[int] = []
    for steps in zip(*(loader.steps() for loader in loaders), strict=True):
        views += [v for s in steps for part in s.parts if part.is_real for v in part.views.tolist()]
        if min(views[-5:]) >= 3 * len(corpus):  # nothing of the first two epochs is left to come
            break
    assert len(views) == len(set(views))
    for epoch in (0, 1):
        assert {v - epoch * len(corpus) for v in views if v // len(corpus) == epoch} == numbers


def test_hidden_terms(corpus):
    hidden = np.zeros(len(corpus), bool)
    hidden[::2] = True
    for step in itertools.islice(Loader(corpus, TokenBudget(3000), seed=3, gap=20, hidden=hidden).steps(), 20):
        (part,) = step.parts
        is_hidden = hidden[part.views % len(corpus)]
        counts = np.diff([*part.terms[1].tolist(), len(part.terms[0])])
        assert not counts[is_hidden].any()
        assert not part.is_annotated.numpy()[is_hidden].any()
        for i in np.flatnonzero(~is_hidden):
            assert counts[i] == len(corpus[int(part.views[i]) % len(corpus)].go_indices)


def test_held_out_are_the_same_each_time(corpus):
    options = {"gap": 20, "most": 15, "window": 100, "tokens_per_pass": 600, "seed": 1}
    first, second = (list(held_out(corpus, VALIDATION, **options)) for _ in range(2))
    views = np.concatenate([batch.views for batch, _ in first])
    assert sorted(views) == np.flatnonzero(corpus.split == VALIDATION)[:15].tolist()
    for (a, lengths), (b, _) in zip(first, second, strict=True):
        assert a.tokens.tokens.equal(b.tokens.tokens)
        assert lengths.tolist() == [len(corpus[int(v)].tokens) + 2 for v in a.views]
        assert a.tokens.longest <= 100


def test_numbers_of_ids(corpus):
    names = [corpus[i].id for i in (3, 50, 0)]
    found, missing = numbers_of(corpus, [*names, "none"])
    assert np.flatnonzero(found).tolist() == [0, 3, 50]
    assert missing == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": [9]}, "no such protein"),
        ({"sizes": [13]}, "not a window"),
        ({"starts": [3], "sizes": [10]}, "not a window"),
        ({"starts": [0, 0]}, "do not fit"),
        ({"offsets": [0, 11]}, "offsets"),
        ({"gap": -1}, "do not fit"),
    ],
)
def test_packing_checks_its_arguments(changes, message):
    from proteinbert_fast import _tokenizer

    given = {"tokens": [1] * 10, "offsets": [0, 10], "order": [0], "starts": [0], "sizes": [12], "gap": 5} | changes
    arrays = {name: np.array(value, np.uint8 if name == "tokens" else np.int64) for name, value in given.items()}
    arrays["gap"] = given["gap"]
    with pytest.raises(ValueError, match=message):
        _tokenizer.pack_tokens(**arrays)


@pytest.mark.parametrize(("start", "size"), [(0, 12), (0, 1), (11, 1), (1, 10), (1, 11), (0, 11), (4, 3)])
def test_windows_of_packed_tokens(start, size):
    from proteinbert_fast import _tokenizer

    residues = np.arange(10, dtype=np.uint8)
    whole = np.concatenate([[23], residues, [24]])
    rows, first = _tokenizer.pack_tokens(
        residues, np.array([0, 10]), np.array([0]), np.array([start]), np.array([size]), 2
    )
    assert first.tolist() == [2]
    assert rows.tolist() == [26, 26, *whole[start : start + size].tolist(), 26, 26]
