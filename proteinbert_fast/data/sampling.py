"""Which proteins make which batch: a function of the corpus, the seed and the place in the run, and of nothing else.

An epoch goes through the training proteins in an order of its own: the corpus's blocks of consecutive proteins are
shuffled, some of them are taken at a time (a pool), and the proteins of a pool are shuffled. A corpus lies in the order
of a hash of its ids, so that neighbours in it have nothing in common, and it is read in large pieces. Epochs follow one
another in one endless stream, which is cut into batches: every batch is full, and every protein comes once per epoch.

A view is a protein in an epoch, ``epoch * N + number``: what is random about a protein (its window, its episode, its
corruption) is drawn anew for each view, and from its number alone.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from proteinbert_fast.errors import InputError

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

BLOCK = 1024  # proteins that are read together
POOL_BLOCKS = 64  # blocks that are shuffled together
_BLOCKS, _WITHIN, _EPISODE, _TURN, _WINDOW = range(5)  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    """Proteins of one step.

    Attributes:
        views: int64 (n,).
        window: most tokens of a protein, or None for whole ones.
    """

    views: Int64Array
    window: int | None


class Cutting(Protocol):
    """How a stream of views becomes batches."""

    def cut(self, views: Int64Array, lengths: Int64Array, seed: int, pool: int) -> tuple[list[Batch], Int64Array]:
        """Batches of views in their order, and the places of the views that are left over for the next pool.

        Args:
            views: (n,).
            lengths: (n,) tokens of each, START and END included.
            seed: of the run.
            pool: number of the pool in the stream.
        """
        ...

    def check(self, lengths: Int64Array, path: str) -> None:
        """Raises InputError if so many proteins, of so many tokens, do not fill a batch."""
        ...


@dataclass(frozen=True)
class TokenBudget:
    """Batches of mixed lengths that fill a budget of rows, in the order of the stream.

    Attributes:
        tokens: most rows of a batch, gaps included; a protein that is longer goes alone.
        window: proteins of more tokens are cut to a random window of so many; None for none.
        gap: gap rows between proteins.
    """

    tokens: int
    window: int | None = None
    gap: int = 20

    def rows(self, lengths: Int64Array) -> Int64Array:
        """Rows that proteins take, the gap behind each included."""
        return (lengths if self.window is None else np.minimum(lengths, self.window)) + self.gap

    def cut(self, views: Int64Array, lengths: Int64Array, seed: int, pool: int) -> tuple[list[Batch], Int64Array]:
        ends = np.cumsum(self.rows(lengths))
        batches, first, done = [], 0, 0
        # A batch is known to be full when the protein behind it does not fit.
        while first < len(views) and (fits := int(np.searchsorted(ends, done + self.tokens - self.gap, "right"))) < len(
            views
        ):
            stop = max(fits, first + 1)
            batches.append(Batch(views[first:stop], self.window))
            first, done = stop, int(ends[stop - 1])
        return batches, np.arange(first, len(views))

    def check(self, lengths: Int64Array, path: str) -> None:
        rows = int(self.rows(lengths).sum()) + self.gap
        if rows < self.tokens:
            raise InputError(
                f"{path}: its {len(lengths):,} training proteins fill {rows:,} rows, fewer than one batch of "
                f"{self.tokens:,} tokens: choose smaller batches"
            )


@dataclass(frozen=True)
class Episodes:
    """Batches as in the original's pretraining: so many proteins, each cut to a window of one length.

    A protein of n tokens joins an episode of windows of L tokens with a probability that goes with
    exp(-max(n / L, L / n)). The original chose a new episode every 15 minutes; here one lasts for a number of batches.

    Attributes:
        sizes: tokens of a window, and proteins of a batch.
        batches: of an episode.
    """

    sizes: tuple[tuple[int, int], ...] = ((128, 128), (512, 64), (1024, 32))
    batches: int = 100

    def probabilities(self, lengths: Int64Array) -> npt.NDArray[np.float64]:
        """(n, episodes) for proteins of so many tokens."""
        n, size = lengths[:, None].astype(float), np.array([length for length, _ in self.sizes], float)
        badness = np.maximum(n / size, size / n)
        shares = np.exp(badness.min(1, keepdims=True) - badness)
        probabilities: npt.NDArray[np.float64] = shares / shares.sum(1, keepdims=True)
        return probabilities

    def cut(self, views: Int64Array, lengths: Int64Array, seed: int, pool: int) -> tuple[list[Batch], Int64Array]:
        bounds = self.probabilities(lengths).cumsum(1)
        joins = (uniform(views, seed, _EPISODE)[:, None] >= bounds[:, :-1]).sum(1)
        turns: list[list[Batch]] = []
        left = []
        for episode, (length, n) in enumerate(self.sizes):
            places = np.flatnonzero(joins == episode)
            whole = len(places) // n * n
            batches = [Batch(views[places[i : i + n]], length) for i in range(0, whole, n)]
            turns += [batches[i : i + self.batches] for i in range(0, len(batches), self.batches)]
            left.append(places[whole:])
        order = np.argsort(_draws(np.arange(len(turns)), seed, _TURN, pool), kind="stable")
        return [batch for turn in order for batch in turns[turn]], np.sort(np.concatenate(left))

    def check(self, lengths: Int64Array, path: str) -> None:
        n = max(n for _, n in self.sizes)
        if len(lengths) < n:
            raise InputError(
                f"{path}: has {len(lengths):,} training proteins, fewer than one batch of {n}: choose smaller batches"
            )


@dataclass(frozen=True)
class Cursor:
    """A place in the stream of batches.

    Attributes:
        pool: number of the pool, from 0 in the first epoch, going on through all epochs.
        batch: of the pool.
        carried: views that the pools before left over for this one.
    """

    pool: int = 0
    batch: int = 0
    carried: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"pool": self.pool, "batch": self.batch, "carried": list(self.carried)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Cursor":
        return cls(value["pool"], value["batch"], tuple(value["carried"]))


class Order:
    """The order of an epoch's blocks, for every epoch.

    Args:
        n_records: N, of the corpus, held-out proteins included.
        seed: 0..2^64 - 1.
    """

    def __init__(self, n_records: int, seed: int) -> None:
        self.n_records, self.seed = n_records, seed
        self._n_blocks = -(-n_records // BLOCK)
        self.pools_per_epoch = max(1, -(-self._n_blocks // POOL_BLOCKS))
        self._epoch = -1
        self._blocks: Int64Array = np.empty(0, np.int64)

    def blocks(self, pool: int) -> Int64Array:
        """The blocks of a pool of the stream, ascending."""
        epoch, place = divmod(pool, self.pools_per_epoch)
        if epoch != self._epoch:
            draws = _draws(np.arange(self._n_blocks), self.seed, _BLOCKS, epoch)
            self._epoch, self._blocks = epoch, np.argsort(draws, kind="stable")
        return np.sort(self._blocks[place * POOL_BLOCKS : (place + 1) * POOL_BLOCKS])

    def shuffled(self, pool: int, numbers: Int64Array) -> Int64Array:
        """Views of a pool's training proteins in the order of the stream."""
        views = pool // self.pools_per_epoch * self.n_records + numbers
        shuffled: Int64Array = views[np.argsort(_draws(views, self.seed, _WITHIN, 0), kind="stable")]
        return shuffled


def window_starts(views: Int64Array, lengths: Int64Array, window: int | None, seed: int) -> Int64Array:
    """The first token of each protein's window, all windows equally probable; 0 where the protein fits.

    Args:
        views: (n,).
        lengths: (n,) tokens of each, START and END included.
        window: tokens, or None for whole proteins.
        seed: of the run.
    """
    if window is None:
        return np.zeros(len(views), np.int64)
    choices = np.maximum(lengths - window, 0) + 1
    starts: Int64Array = np.minimum((uniform(views, seed, _WINDOW) * choices).astype(np.int64), choices - 1)
    return starts


def share(rows: Int64Array, n_ranks: int) -> list[Int64Array]:
    """Places of a batch's proteins dealt to ranks, so that each has about as many rows.

    The longest first, each to the rank that has the fewest rows. A rank is left without any where there are more ranks
    than proteins.
    """
    if n_ranks == 1:
        return [np.arange(len(rows))]
    sums, dealt = [0] * n_ranks, [[] for _ in range(n_ranks)]  # type: tuple[list[int], list[list[int]]]
    for place in np.argsort(-rows, kind="stable").tolist():
        rank = min(range(n_ranks), key=sums.__getitem__)
        sums[rank] += int(rows[place])
        dealt[rank].append(place)
    return [np.array(sorted(places), np.int64) for places in dealt]


def uniform(numbers: Int64Array, seed: int, stream: int) -> npt.NDArray[np.float64]:
    """A number from 0 to below 1, multiple of 2^-53, for each number."""
    values: npt.NDArray[np.float64] = (_draws(numbers, seed, stream, 0) >> np.uint64(11)).astype(float) * 2.0**-53
    return values


def _draws(numbers: Int64Array, seed: int, stream: int, turn: int) -> UInt64Array:
    """64 random bits for each number: splitmix64 (Steele, Lea and Flood 2014) of key and number."""
    with np.errstate(over="ignore"):
        key = _mixed(_mixed(_mixed(np.array([seed], np.uint64)) ^ np.uint64(stream)) ^ np.uint64(turn))
        return _mixed(_mixed(numbers.astype(np.uint64) ^ key))


def _mixed(z: UInt64Array) -> UInt64Array:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
