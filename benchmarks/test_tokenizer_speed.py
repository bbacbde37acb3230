"""The tokenizer beside memcpy and beside a plain-Python loop, on 64 MB of real proteins.

    pytest benchmarks/test_tokenizer_speed.py

200 Swiss-Prot proteins are repeated as 180,000 objects of their own, so nothing is in the cache by chance. Every
row reports ``GB_per_s``, residues per nanosecond. What it is to be held against:

- ``memcpy`` of each protein into one new array is the same reading and writing without the work. It is told where
  the bytes lie; the tokenizer has to look that up and holds 180,000 references meanwhile.
- ``memcpy`` of one flat array of 64 MB is what the memory can do; new pages cost what they cost the tokenizer.

Only one core is used unless a row says otherwise. Every result is checked before its time is taken.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proteinbert_fast import Tokenizer, _tokenizer
from proteinbert_fast.tokenizer import END, GAP, OTHER, START, VOCABULARY

PROTEINS = Path(__file__).parents[1] / "tests" / "data" / "swissprot_200.tsv"
RESIDUES = 64_000_000
SMALL_BATCH = 180  # about 65,536 rows: what a model is given at once

GROUP_BATCH = "one batch of 64 MB"
GROUP_SMALL = "64 MB in batches of 65,536 rows"
GROUP_FLAT = "one sequence of 64 MB"
GROUP_PYTHON = "200 proteins again and again"


def plain_loop(texts: Sequence[str], gap: int = 20) -> bytearray:
    """What the original does, and the definition that the others are checked with."""
    token_of = {letter: token for token, letter in enumerate(VOCABULARY)}
    rows = bytearray([GAP] * gap)
    for text in texts:
        rows.append(START)
        for letter in text:
            rows.append(token_of.get(letter, OTHER))
        rows.append(END)
        rows.extend([GAP] * gap)
    return rows


@pytest.fixture(scope="module")
def real() -> list[str]:
    return [line.split("\t")[-1] for line in PROTEINS.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def as_bytes(real: list[str]) -> list[bytes]:
    encoded = [text.encode() for text in real]
    times = RESIDUES // sum(map(len, encoded))
    return [bytes(bytearray(data)) for _ in range(times) for data in encoded]  # an object for each


@pytest.fixture(scope="module")
def as_str(as_bytes: list[bytes]) -> list[str]:
    return [data.decode() for data in as_bytes]


@pytest.fixture(scope="module")
def flat(as_bytes: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(as_bytes), np.uint8).copy()


@pytest.fixture(scope="module")
def expected(real: list[str], as_bytes: list[bytes]) -> np.ndarray:
    rows = np.frombuffer(plain_loop(real), np.uint8)
    return np.r_[rows[:20], np.tile(rows[20:], len(as_bytes) // len(real))]


@pytest.fixture(scope="module")
def copy_each(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """memcpy of many pieces, one after another, in C."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a C compiler for the memcpy to compare with")
    folder = tmp_path_factory.mktemp("memcpy")
    (folder / "copy.c").write_text(
        "#include <stdint.h>\n#include <string.h>\n"
        "void copy(char** from, int64_t* sizes, int64_t n, char* to)\n"
        "{ for (int64_t i = 0; i < n; ++i) { memcpy(to, from[i], sizes[i]); to += sizes[i]; } }\n"
    )
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", "copy.c", "-o", "copy.so"], cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "copy.so")).copy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]

    def copy(pieces: tuple[np.ndarray, np.ndarray, int]) -> np.ndarray:
        addresses, sizes, total = pieces
        to = np.empty(total, np.uint8)
        function(addresses.ctypes.data, sizes.ctypes.data, len(sizes), to.ctypes.data)
        return to

    return copy


def pieces_of(data: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, int]:
    """Where the bytes of each object lie, and how many they are."""
    addresses = np.array([id(d) for d in data], np.int64) + bytes.__basicsize__ - 1
    sizes = np.array([len(d) for d in data], np.int64)
    return addresses, sizes, int(sizes.sum())


def in_batches(sequences: Sequence[Any]) -> list[Sequence[Any]]:
    return [sequences[i : i + SMALL_BATCH] for i in range(0, len(sequences), SMALL_BATCH)]


def measure(benchmark: Any, group: str, n_residues: int, function: Callable[[], object], rounds: int = 15) -> None:
    benchmark.group = group
    benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)
    benchmark.extra_info["residues"] = n_residues
    if benchmark.stats is not None:  # None when benchmarks are off
        benchmark.extra_info["GB_per_s"] = round(n_residues / benchmark.stats.stats.median / 1e9, 3)


# ---- one batch ----


@pytest.mark.parametrize("kernel", _tokenizer.kernels)
@pytest.mark.parametrize("kind", ["str", "bytes"])
def test_tokenizer_batch(
    benchmark: Any, as_str: list[str], as_bytes: list[bytes], expected: np.ndarray, kind: str, kernel: str
) -> None:
    sequences = as_str if kind == "str" else as_bytes
    assert np.array_equal(_tokenizer.pack(sequences, 20, 1, kernel)[0], expected)
    measure(benchmark, GROUP_BATCH, RESIDUES, lambda: _tokenizer.pack(sequences, 20, 1, kernel))


def test_tokenizer_batch_all_cores(benchmark: Any, as_str: list[str], expected: np.ndarray) -> None:
    tokenizer = Tokenizer()
    assert np.array_equal(tokenizer(as_str).tokens.numpy(), expected)
    measure(benchmark, GROUP_BATCH, RESIDUES, lambda: tokenizer(as_str))


def test_tokenizer_batch_windows(benchmark: Any, as_str: list[str]) -> None:
    tokenizer = Tokenizer(threads=1)
    first = tokenizer.windows(as_str[:200], 512, seed=1)
    assert np.array_equal(tokenizer.windows(as_str, 512, seed=1).tokens[: first.n_rows], first.tokens)
    measure(benchmark, GROUP_BATCH, RESIDUES, lambda: tokenizer.windows(as_str, 512, seed=1))


def test_memcpy_batch(benchmark: Any, as_bytes: list[bytes], flat: np.ndarray, copy_each: Any) -> None:
    pieces = pieces_of(as_bytes)
    assert np.array_equal(copy_each(pieces), flat)
    measure(benchmark, GROUP_BATCH, RESIDUES, lambda: copy_each(pieces))


def test_join_batch(benchmark: Any, as_bytes: list[bytes], flat: np.ndarray) -> None:
    assert b"".join(as_bytes) == flat.tobytes()
    measure(benchmark, GROUP_BATCH, RESIDUES, lambda: b"".join(as_bytes))


# ---- small batches ----


@pytest.mark.parametrize("kind", ["str", "bytes"])
def test_tokenizer_small(
    benchmark: Any, as_str: list[str], as_bytes: list[bytes], expected: np.ndarray, kind: str
) -> None:
    tokenizer = Tokenizer(threads=1)
    batches = in_batches(as_str if kind == "str" else as_bytes)

    def all_batches() -> None:
        for batch in batches:
            tokenizer(batch)

    rows = np.concatenate([tokenizer(batch).tokens[20:].numpy() for batch in batches])
    assert np.array_equal(rows, expected[20:])
    measure(benchmark, GROUP_SMALL, RESIDUES, all_batches)


def test_memcpy_small(benchmark: Any, as_bytes: list[bytes], flat: np.ndarray, copy_each: Any) -> None:
    batches = [pieces_of(batch) for batch in in_batches(as_bytes)]

    def all_batches() -> None:
        for batch in batches:
            copy_each(batch)

    assert np.array_equal(np.concatenate([copy_each(batch) for batch in batches]), flat)
    measure(benchmark, GROUP_SMALL, RESIDUES, all_batches)


# ---- one sequence ----


@pytest.mark.parametrize("kernel", _tokenizer.kernels)
def test_tokenizer_flat(benchmark: Any, flat: np.ndarray, expected: np.ndarray, kernel: str) -> None:
    tokens = _tokenizer.pack(flat, 0, 1, kernel)[0]
    assert np.array_equal(tokens[1:-1], expected[expected < START])
    measure(benchmark, GROUP_FLAT, RESIDUES, lambda: _tokenizer.pack(flat, 0, 1, kernel))


def test_memcpy_flat_new_array(benchmark: Any, flat: np.ndarray) -> None:
    measure(benchmark, GROUP_FLAT, RESIDUES, flat.copy)


def test_memcpy_flat_used_array(benchmark: Any, flat: np.ndarray) -> None:
    to = flat.copy()
    measure(benchmark, GROUP_FLAT, RESIDUES, lambda: np.copyto(to, flat))


# ---- beside plain Python ----


def test_plain_python(benchmark: Any, real: list[str]) -> None:
    assert plain_loop(real[:1]) == Tokenizer()(real[0]).tokens.numpy().tobytes()
    measure(benchmark, GROUP_PYTHON, sum(map(len, real)), lambda: plain_loop(real), rounds=5)


def test_tokenizer_in_cache(benchmark: Any, real: list[str]) -> None:
    tokenizer = Tokenizer(threads=1)
    assert tokenizer(real).tokens.numpy().tobytes() == plain_loop(real)
    measure(benchmark, GROUP_PYTHON, sum(map(len, real)), lambda: tokenizer(real), rounds=500)


def test_join_in_cache(benchmark: Any, real: list[str]) -> None:
    encoded = [text.encode() for text in real]
    measure(benchmark, GROUP_PYTHON, sum(map(len, real)), lambda: b"".join(encoded), rounds=500)
