"""Batches of a corpus for pretraining: read by the pool, packed without padding, the same for any number of ranks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from proteinbert_fast import _tokenizer
from proteinbert_fast.data.corpus import Corpus
from proteinbert_fast.data.corpus.reader import CorpusSlice
from proteinbert_fast.data.sampling import BLOCK, Batch, Cursor, Cutting, Int64Array, Order, share, window_starts
from proteinbert_fast.packing import PackedBatch, batches_by_tokens

TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True)
class MicroBatch:
    """Proteins that go through the model together.

    Attributes:
        tokens: the true tokens.
        views: int64 (B,): epoch * N + number of each protein, which its corruption is drawn from.
        terms: the true GO terms, sparse: int64 indices (k,) and offsets (B,). Hidden ones are left out.
        is_annotated: bool (B,): proteins that have a term here.
        is_real: whether it counts; False where a rank has no protein of a batch, and computes along.
    """

    tokens: PackedBatch
    views: Int64Array
    terms: tuple[Tensor, Tensor]
    is_annotated: Tensor
    is_real: bool = True


@dataclass(frozen=True)
class Step:
    """One rank's part of a batch.

    Attributes:
        parts: what goes through the model together.
        n_proteins, n_tokens, n_residues, n_annotated: of the whole batch, all ranks together. Tokens are residues, and
            START and END where a window has them.
        window: most tokens of a protein, or None.
        following: the place behind this batch, where a run that stops after it goes on.
        epoch: of the batch's first protein.
    """

    parts: tuple[MicroBatch, ...]
    n_proteins: int
    n_tokens: int
    n_residues: int
    n_annotated: int
    window: int | None
    following: Cursor
    epoch: int


class Loader:
    """Endless batches of a corpus's training proteins.

    Args:
        corpus: open for reading.
        cutting: how the stream becomes batches.
        seed: of the order and the windows.
        gap: gap rows between proteins, the model's reach.
        hidden: bool (N,), proteins whose GO terms are not to be learned; None for none.
        rank, n_ranks: this process's share of every batch.
        tokens_per_pass: most rows that go through the model together; None for no limit.

    Raises:
        InputError: the training proteins do not fill a batch.
    """

    def __init__(
        self,
        corpus: Corpus,
        cutting: Cutting,
        *,
        seed: int,
        gap: int,
        hidden: npt.NDArray[np.bool_] | None = None,
        rank: int = 0,
        n_ranks: int = 1,
        tokens_per_pass: int | None = None,
    ) -> None:
        self.corpus, self.cutting, self.seed, self.gap, self.hidden = corpus, cutting, seed, gap, hidden
        self.rank, self.n_ranks, self.tokens_per_pass = rank, n_ranks, tokens_per_pass
        self.order = Order(len(corpus), seed)
        lengths = corpus.lengths[corpus.split == TRAIN].astype(np.int64) + 2
        self.n_training = len(lengths)
        cutting.check(lengths, corpus.path)

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        """Batches from a place in the stream on, without end."""
        cursor = cursor or Cursor()
        carried = _Proteins.of(self.corpus, np.array(cursor.carried, np.int64))
        pool, first = cursor.pool, cursor.batch
        while True:
            proteins = carried.joined(self._read(pool))
            lengths = proteins.lengths()
            batches, left = self.cutting.cut(proteins.views, lengths, self.seed, pool)
            carried_views = tuple(carried.views.tolist())
            place_of = {view: place for place, view in enumerate(proteins.views.tolist())}
            carried = proteins.taken(left)
            following_views = tuple(carried.views.tolist())
            for i in range(first, len(batches)):
                is_last = i == len(batches) - 1
                following = Cursor(pool + 1, 0, following_views) if is_last else Cursor(pool, i + 1, carried_views)
                places = np.array([place_of[view] for view in batches[i].views.tolist()], np.int64)
                yield self._step(batches[i], proteins, places, lengths[places], following)
            pool, first = pool + 1, 0

    def _read(self, pool: int) -> "_Proteins":
        """The training proteins of a pool in the order of the stream."""
        blocks = self.order.blocks(pool)
        parts = []
        # Blocks that lie side by side are read in one.
        for run in np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1):
            first, stop = int(run[0]) * BLOCK, min((int(run[-1]) + 1) * BLOCK, len(self.corpus))
            parts.append(_Proteins.whole(self.corpus.read(first, stop), first))
        proteins = _Proteins.empty().joined(*parts)
        numbers = proteins.views[proteins.split == TRAIN]
        views = self.order.shuffled(pool, numbers)
        places = np.searchsorted(proteins.views, views % self.order.n_records)
        return proteins.taken(places, views)

    def _step(
        self, batch: Batch, proteins: "_Proteins", places: Int64Array, lengths: Int64Array, following: Cursor
    ) -> Step:
        n_records = self.order.n_records
        starts = window_starts(batch.views, lengths, batch.window, self.seed)
        sizes = lengths if batch.window is None else np.minimum(lengths, batch.window)
        is_annotated = proteins.n_terms(places) > 0
        if self.hidden is not None:
            is_annotated &= ~self.hidden[batch.views % n_records]
        mine = share(sizes + self.gap, self.n_ranks)[self.rank]
        is_real = len(mine) > 0
        if not is_real:
            mine = np.zeros(1, np.int64)
        groups = [mine]
        if self.tokens_per_pass is not None:
            groups = [mine[g] for g in batches_by_tokens(sizes[mine], self.tokens_per_pass, self.gap)]
        parts = tuple(
            proteins.packed(places[g], batch.views[g], starts[g], sizes[g], is_annotated[g], self.gap, is_real)
            for g in groups
        )
        return Step(
            parts,
            len(places),
            int(sizes.sum()),
            int((sizes - (starts == 0) - (starts + sizes == lengths)).sum()),
            int(is_annotated.sum()),
            batch.window,
            following,
            int(batch.views[0]) // n_records,
        )


def held_out(
    corpus: Corpus, split: int, *, gap: int, most: int | None, window: int | None, tokens_per_pass: int, seed: int
) -> Iterable[tuple[MicroBatch, Int64Array]]:
    """Batches of held-out proteins, always the same ones, and how many tokens each whole protein has.

    Args:
        corpus: open for reading.
        split: VALIDATION or TEST.
        gap: gap rows between proteins.
        most: the first so many proteins, which is a random sample, for corpora lie in random order; None for all.
        window: longer proteins are cut to a random window of so many tokens; None for whole ones.
        tokens_per_pass: most rows of a batch.
        seed: of the windows.
    """
    numbers = np.flatnonzero(corpus.split == split)[:most]
    for first in range(0, len(numbers), BLOCK):
        views = numbers[first : first + BLOCK]
        proteins = _Proteins.of(corpus, views)
        lengths = proteins.lengths()
        starts = window_starts(views, lengths, window, seed)
        sizes = lengths if window is None else np.minimum(lengths, window)
        is_annotated = proteins.n_terms(np.arange(len(views))) > 0
        for g in batches_by_tokens(sizes, tokens_per_pass, gap):
            yield proteins.packed(g, views[g], starts[g], sizes[g], is_annotated[g], gap), lengths[g]


def numbers_of(corpus: Corpus, ids: Iterable[str]) -> tuple[npt.NDArray[np.bool_], int]:
    """Which proteins of a corpus have one of these ids, bool (N,), and how many ids no protein has."""
    wanted = {name.encode() for name in ids}
    found, n_found = [np.zeros(0, bool)], 0
    for some in corpus.ids():
        found.append(np.fromiter((name in wanted for name in some.tolist()), bool, len(some)))
        n_found += int(found[-1].sum())
    return np.concatenate(found), len(wanted) - n_found


@dataclass(frozen=True)
class _Proteins:
    """Proteins in memory.

    Attributes:
        views: int64 (n,).
        tokens, offsets, go_indices, go_offsets, split: as in a CorpusSlice.
        order: int64 (n,): which protein of the slice each is.
    """

    views: Int64Array
    data: CorpusSlice
    order: Int64Array

    @classmethod
    def whole(cls, data: CorpusSlice, first: int) -> "_Proteins":
        return cls(np.arange(first, first + len(data)), data, np.arange(len(data)))

    @classmethod
    def of(cls, corpus: Corpus, views: Int64Array) -> "_Proteins":
        return cls(views, corpus.read_many(views % max(len(corpus), 1)), np.arange(len(views)))

    @classmethod
    def empty(cls) -> "_Proteins":
        none = np.zeros(0, np.int64)
        data = CorpusSlice(
            none.astype(np.uint8), np.zeros(1, np.int64), none, np.zeros(1, np.int64), none.astype(np.uint8),
            none.astype("S1"),
        )  # fmt: skip
        return cls(none, data, none)

    @property
    def split(self) -> npt.NDArray[np.uint8]:
        return self.data.split[self.order]

    def lengths(self) -> Int64Array:
        """Tokens of each, START and END included."""
        lengths: Int64Array = np.diff(self.data.offsets)[self.order] + 2
        return lengths

    def n_terms(self, places: Int64Array) -> Int64Array:
        counts: Int64Array = np.diff(self.data.go_offsets)[self.order[places]]
        return counts

    def taken(self, places: Int64Array, views: Int64Array | None = None) -> "_Proteins":
        """Some of them, without a copy of their data."""
        return _Proteins(self.views[places] if views is None else views, self.data, self.order[places])

    def compact(self) -> "_Proteins":
        """The same with a copy of their own data alone."""
        d = self.data
        tokens, offsets = _gathered(d.tokens, d.offsets, self.order)
        go_indices, go_offsets = _gathered(d.go_indices, d.go_offsets, self.order)
        data = CorpusSlice(tokens, offsets, go_indices, go_offsets, d.split[self.order], d.ids[self.order])
        return _Proteins(self.views, data, np.arange(len(self.views)))

    def joined(self, *others: "_Proteins") -> "_Proteins":
        all_ = [p for p in (self, *others) if len(p.views)] or [self]
        # What is few of many is copied, so that the many can go.
        all_ = [p if 2 * len(p.order) > len(p.data) else p.compact() for p in all_]
        if len(all_) == 1:
            return all_[0]
        first = np.cumsum([0] + [len(p.data) for p in all_])
        data = CorpusSlice(
            np.concatenate([p.data.tokens for p in all_]),
            _joined_offsets([p.data.offsets for p in all_]),
            np.concatenate([p.data.go_indices for p in all_]),
            _joined_offsets([p.data.go_offsets for p in all_]),
            np.concatenate([p.data.split for p in all_]),
            np.concatenate([p.data.ids for p in all_]),
        )
        return _Proteins(
            np.concatenate([p.views for p in all_]),
            data,
            np.concatenate([p.order + n for p, n in zip(all_, first[:-1], strict=True)]),
        )

    def packed(
        self,
        places: Int64Array,
        views: Int64Array,
        starts: Int64Array,
        sizes: Int64Array,
        is_annotated: npt.NDArray[np.bool_],
        gap: int,
        is_real: bool = True,
    ) -> MicroBatch:
        """Proteins packed, each cut to its window."""
        order = self.order[places]
        tokens, first_rows = _tokenizer.pack_tokens(self.data.tokens, self.data.offsets, order, starts, sizes, gap)
        batch = PackedBatch._trusted(torch.from_numpy(tokens), sizes, gap, None, first_rows)
        indices, offsets = _gathered(self.data.go_indices, self.data.go_offsets, order, is_annotated)
        terms = torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(offsets[:-1].copy())
        return MicroBatch(batch, views, terms, torch.from_numpy(is_annotated), is_real)


def _gathered(
    values: npt.NDArray[Any], offsets: Int64Array, order: Int64Array, kept: npt.NDArray[np.bool_] | None = None
) -> tuple[npt.NDArray[Any], Int64Array]:
    """Rows of a ragged array in another order; those that are not kept are empty."""
    sizes = np.diff(offsets)[order]
    if kept is not None:
        sizes = sizes * kept
    ends = np.cumsum(sizes)
    shifts = np.repeat(offsets[order] - (ends - sizes), sizes)
    return values[np.arange(len(shifts)) + shifts], np.concatenate([np.zeros(1, np.int64), ends])


def _joined_offsets(parts: list[Int64Array]) -> Int64Array:
    bases = np.cumsum([0] + [int(p[-1]) for p in parts])
    return np.concatenate([parts[0][:1]] + [p[1:] + base for p, base in zip(parts, bases[:-1], strict=True)])
