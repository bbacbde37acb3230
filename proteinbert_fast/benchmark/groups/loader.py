"""Loader: a corpus to packed batches, beside the original's route from a dense dataset to padded ones.

A training step on a GPU is wanted at 25 M residues/s: the rate on one core says how many cores keep it fed.

The original's route, written again without its package: text and dense masks read by the chunk, letters looked up one
by one, rows padded to one length, masks of booleans.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.groups import corpus as building
from proteinbert_fast.benchmark.setup import OURS, Setup
from proteinbert_fast.data.corpus import Corpus, write_dense
from proteinbert_fast.data.loader import Loader, MicroBatch
from proteinbert_fast.data.sampling import TokenBudget
from proteinbert_fast.errors import InputError
from proteinbert_fast.pretraining.config import PretrainingConfig
from proteinbert_fast.pretraining.objective import make_task, shown_terms
from proteinbert_fast.tokenizer import END, OTHER, PAD, START, VOCABULARY

TABLE = "a corpus to batches"
GAP = 20
WINDOW = 512  # tokens
_TOKENS = 65_536
_CHUNK = 10_000  # proteins that the original's route reads at a time
_ROWS = 64  # of its batches
_NUMBER_OF = {letter: number for number, letter in enumerate(VOCABULARY)}


def cases(setup: Setup) -> list[Case]:
    """Ours, without and with corruption, and the original's route, on one core each."""

    @cache
    def corpus() -> Corpus:
        output = setup.folder / "loader.h5"
        try:
            building.build(building.make_input(setup), output, "none")
        except InputError as error:
            raise Unavailable(str(error)) from error
        return Corpus(output)

    def work() -> Work:
        lengths = [min(len(protein.sequence) + 2, WINDOW) for protein in setup.proteins]
        n = setup.settings.corpus_entries
        tokens = sum(lengths[i % len(lengths)] for i in range(n))
        return Work(proteins=n, tokens=tokens, residues=tokens)

    def mixed() -> TokenBudget:
        return TokenBudget(min(_TOKENS, work().tokens), WINDOW, GAP)

    def ours() -> Ready[list[MicroBatch]]:
        loader = Loader(corpus(), mixed(), seed=0, gap=GAP)
        return Ready(lambda: _epoch(loader), lambda batches: _check(_windows(batches), corpus()))

    def corrupted(has_gpu: bool) -> Ready[list[MicroBatch]]:
        loader, config = Loader(corpus(), mixed(), seed=0, gap=GAP), PretrainingConfig()
        n = max(len(corpus().terms), 1)

        def corrupt(batch: MicroBatch) -> None:
            if has_gpu:
                shown_terms(batch, n, config)
            else:
                make_task(batch, n, config, torch.device("cpu"))

        def run() -> list[MicroBatch]:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                batches = _epoch(loader)
                for batch in batches:
                    corrupt(batch)
            finally:
                torch.set_num_threads(threads)
            return batches

        return Ready(run, lambda batches: _check(_windows(batches), corpus()))

    def original() -> Ready[list[Any]]:
        path = setup.folder / "loader-dense.h5"
        write_dense(corpus(), path, overwrite=True)
        return Ready(lambda: _original(path), lambda batches: _check(_padded_windows(batches), corpus()))

    def case(name: str, what: str, owner: str, prepare: Callable[[], Ready[Any]]) -> Case:
        return Case(TABLE, name, what, owner, owner == OURS, work(), "residues/s", prepare, cores="one")

    return [
        case("ours", f"Loader, mixed lengths, {_TOKENS:,} rows", OURS, ours),
        case(
            "ours, for a GPU", "the same, and GO terms corrupted; tokens are, on the GPU", OURS, lambda: corrupted(True)
        ),
        case("ours, for a CPU", "the same, and tokens and GO terms corrupted", OURS, lambda: corrupted(False)),
        case("original's route", f"dense HDF5, look-ups, padding to {WINDOW}, dense masks", "numpy, h5py", original),
        *machine.probes(setup.settings, "copy"),
    ]


def _epoch(loader: Loader) -> list[MicroBatch]:
    """Batches until every training protein has come once; the last ones may be of the next epoch."""
    batches: list[MicroBatch] = []
    seen = 0
    for step in loader.steps():
        batches += step.parts
        seen += step.n_proteins
        if seen >= loader.n_training:
            return batches
    raise AssertionError("the loader has no end")


def _windows(batches: list[MicroBatch]) -> Iterator[bytes]:
    for batch in batches:
        tokens = batch.tokens.tokens.numpy()
        for start, length in zip(batch.tokens.host_starts, batch.tokens.host_lengths, strict=True):
            yield tokens[start : start + length].tobytes()


def _padded_windows(batches: list[Any]) -> Iterator[bytes]:
    for tokens, _ in batches:
        for row in tokens:
            yield row[row != PAD].tobytes()


def _check(windows: Iterator[bytes], corpus: Corpus) -> Check:
    """Whole proteins must be there as often as in the corpus; of longer ones, windows of the right length."""
    wanted: Counter[bytes] = Counter()
    n_long = 0
    for part in corpus.slices():
        for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True):
            if b - a + 2 <= WINDOW:
                wanted[bytes((START, *part.tokens[a:b].tolist(), END))] += 1
            else:
                n_long += 1
    n = len(corpus)
    found = Counter(islice(windows, n))
    long_found = sum(times for window, times in found.items() if len(window) == WINDOW and window not in wanted)
    missing = sum((wanted - found).values())
    return Check(missing == 0 and long_found == n_long, f"{n:,} proteins, {n_long:,} of them in windows")


def _original(path: Path) -> list[Any]:
    draw = np.random.default_rng(0)
    batches = []
    with h5py.File(path) as file:
        n = len(file["seq_lengths"])
        for first in range(0, n, _CHUNK):
            sequences = file["seqs"].asstr()[first : first + _CHUNK]
            masks = file["annotation_masks"][first : first + _CHUNK]
            order = draw.permutation(len(sequences))
            for begin in range(0, len(order), _ROWS):
                chosen = order[begin : begin + _ROWS]
                tokens = np.full((len(chosen), WINDOW), PAD, np.uint8)
                for row, i in enumerate(chosen):
                    whole = [START, *[_NUMBER_OF.get(letter, OTHER) for letter in sequences[i]], END]
                    start = draw.integers(max(len(whole) - WINDOW, 0) + 1)
                    window = whole[start : start + WINDOW]
                    tokens[row, : len(window)] = window
                batches.append((tokens, masks[chosen]))
    return batches
