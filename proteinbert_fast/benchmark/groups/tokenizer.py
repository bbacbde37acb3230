"""Tokenizer: GB/s of residues, beside copying the same bytes and a plain-Python loop."""

from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Work
from proteinbert_fast.benchmark.setup import OURS, Setup
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import END, OTHER, START, VOCABULARY, Tokenizer

TABLE = "residues in memory"
_NUMBER_OF = {letter: number for number, letter in enumerate(VOCABULARY)}
_TRANSLATION = bytes(VOCABULARY.find(chr(c)) if chr(c) in VOCABULARY else OTHER for c in range(256))
_PYTHON_SHARE = 32  # a loop in Python does one in so many proteins: it is that much slower


def cases(setup: Setup) -> list[Case]:
    """Ours on one core and on all, a copy of the same bytes, a loop, and the machine's copy rates."""

    @cache
    def sequences() -> list[bytes]:
        sample = [protein.sequence for protein in setup.proteins]
        return sample * max(1, setup.settings.tokenizer_bytes // sum(map(len, sample)))

    def work(share: int = 1) -> Work:
        lengths = [len(s) for s in sequences()[::share]]
        n = sum(lengths)
        return Work(proteins=len(lengths), residues=n, tokens=n + 2 * len(lengths), bytes=n)

    def ours(threads: int | None) -> Ready[PackedBatch]:
        tokenizer = Tokenizer(threads=threads)
        return Ready(lambda: tokenizer(sequences()), lambda batch: _check(batch.unpack(batch.tokens), sequences()))

    def loop() -> Ready[list[list[int]]]:
        part = sequences()[::_PYTHON_SHARE]
        texts = [s.decode() for s in part]
        return Ready(
            lambda: [[START, *[_NUMBER_OF.get(letter, OTHER) for letter in text], END] for text in texts],
            lambda rows: _check(rows, part),
            f"timed on every {_PYTHON_SHARE}th protein",
        )

    def copy() -> Ready[npt.NDArray[np.uint8]]:
        joined = np.frombuffer(b"".join(sequences()), np.uint8)
        return Ready(joined.copy, lambda out: Check(np.array_equal(out, joined), "equal"), "to a new array each time")

    def case(
        name: str, what: str, owner: str, prepare: Any, cores: Literal["one", "all"] = "one", share: int = 1
    ) -> Case:
        return Case(TABLE, name, what, owner, owner == OURS, work(share), "GB/s", prepare, cores=cores)

    return [
        case("ours, one core", "Tokenizer(threads=1)(list of bytes)", OURS, lambda: ours(1)),
        case("ours, all cores", "Tokenizer()(list of bytes)", OURS, lambda: ours(None), "all"),
        case("memcpy", "copying the same residues, one core", f"numpy {np.__version__}", copy),
        case("Python loop", "a dict look-up per residue", "plain Python", loop, share=_PYTHON_SHARE),
        *machine.probes(setup.settings, "copy"),
    ]


def _check(rows: Any, sequences: list[bytes]) -> Check:
    """Compares every 97th row with the vocabulary's definition, by another way than any case goes."""
    if len(rows) != len(sequences):
        return Check(False, f"{len(rows)} rows for {len(sequences)} proteins")
    for i in range(0, len(rows), 97):
        if bytes(rows[i]) != bytes((START, *sequences[i].translate(_TRANSLATION), END)):
            return Check(False, f"the tokens of protein {i} are not right")
    return Check(True, "equal")
