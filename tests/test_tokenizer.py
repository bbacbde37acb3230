"""The tokenizer against the original's golden tokens, a plain-Python definition, and hostile input."""

import gc
import hashlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast import _tokenizer
from proteinbert_fast.errors import InputError
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import (
    END,
    GAP,
    OTHER,
    PAD,
    START,
    VOCABULARY,
    VOCABULARY_SIZE,
    Tokenizer,
)

GOLDEN = json.loads((Path(__file__).parent / "data" / "tokenizer_golden.json").read_text())
GOLDEN_OBJECTS = {
    "None": None,
    "5": 5,
    "nan": float("nan"),
    "['M', 'K']": ["M", "K"],
    "bytearray(b'MKT')": bytearray(b"MKT"),
    "array(['M', 'K'], dtype='<U1')": np.array(["M", "K"]),
    "('MKT',)": ("MKT",),
    "numpy.str_('MKT')": np.str_("MKT"),
    "numpy.bytes_(b'MKT')": np.bytes_(b"MKT"),
}
RESIDUES = "ACDEFGHIKLMNPQRSTUVWXY"

quick = settings(deadline=None)  # a busy machine is no failure


def plain(text: str) -> list[int]:
    """The definition: one token per code point between START and END."""
    return [START, *(VOCABULARY.index(c) if c in VOCABULARY else OTHER for c in text), END]


def plain_rows(texts: list[str], gap: int) -> list[int]:
    rows = [GAP] * gap
    for text in texts:
        rows += plain(text) + [GAP] * gap
    return rows


@dataclass
class Record:
    id: Any
    sequence: Any


# ---- the original's tokens ----


def test_vocabulary_is_the_original_s() -> None:
    names = {OTHER: "<OTHER>", START: "<START>", END: "<END>", PAD: "<PAD>"}
    tokens = dict(zip(VOCABULARY, range(OTHER), strict=True)) | {name: t for t, name in names.items()}
    assert tokens == GOLDEN["vocabulary"]
    assert len(GOLDEN["vocabulary"]) == VOCABULARY_SIZE
    assert GAP == VOCABULARY_SIZE


@pytest.mark.parametrize("case", GOLDEN["tokenize_seq"], ids=lambda case: case["note"].replace(" ", "_"))
def test_golden_tokenize_seq(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    if "input_bytes_hex" in case:
        sequence: Any = bytes.fromhex(case["input_bytes_hex"])
    elif "input_repeat" in case:
        sequence = case["input_repeat"][0] * case["input_repeat"][1]
    elif "input_python" in case:
        sequence = GOLDEN_OBJECTS[case["input_python"]]
    else:
        sequence = case["input"]

    if "exception" in case:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            tokenizer.tokenize(sequence)
        assert type(caught.value).__name__ == case["exception"]
        assert str(caught.value) == case["message"]
    elif "tokens" in case:
        assert tokenizer.tokenize(sequence).tolist() == case["tokens"]
    else:
        tokens = tokenizer.tokenize(sequence)
        assert len(tokens) == case["n_tokens"]
        assert tokens[:8].tolist() == case["first"]
        assert tokens[-8:].tolist() == case["last"]
        assert hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest() == case["sha256_of_int32_le"]


@pytest.mark.parametrize("case", GOLDEN["tokenize_seqs"], ids=lambda case: case["note"].replace(" ", "_"))
def test_golden_tokenize_seqs(tokenizer: Tokenizer, case: dict[str, Any]) -> None:
    if "exception" in case:
        assert case["exception"] == "ValueError"
        with pytest.raises(InputError, match="more than the length of 8") as caught:
            tokenizer.tokenize_padded(case["seqs"], case["seq_len"])
        assert isinstance(caught.value, ValueError)
        return
    padded = tokenizer.tokenize_padded(case["seqs"], case["seq_len"])
    assert list(padded.shape) == case["shape"]
    assert padded.dtype == getattr(torch, case["dtype"])
    assert padded.tolist() == case["tokens"]


def test_golden_cases_in_one_batch(tokenizer: Tokenizer) -> None:
    texts = [case["input"] for case in GOLDEN["tokenize_seq"] if "input" in case]
    assert len(texts) > 40
    assert tokenizer(texts).tokens.tolist() == plain_rows(texts, 20)


def test_tokenize_padded_refuses_what_the_original_refuses(tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match="Unexpected sequence type: <class 'bytearray'>"):
        tokenizer.tokenize_padded(["MKT", bytearray(b"MKT")], 8)  # type: ignore[list-item]


# ---- against the definition ----


@pytest.mark.parametrize("kernel", _tokenizer.kernels)
def test_every_kernel_on_every_byte_and_odd_length(kernel: str) -> None:
    letters = [chr(c) for c in range(256)]
    rng = np.random.default_rng(1)
    for n in [*range(200), 255, 256, 257, 1021, 4096, 34_350]:
        text = "".join(rng.choice(letters, n))
        assert _tokenizer.pack(text, 3, 1, kernel)[0].tolist() == plain_rows([text], 3)
        ascii_text = "".join(rng.choice(letters[:128], n))
        assert _tokenizer.pack(ascii_text.encode(), 0, 1, kernel)[0].tolist() == plain(ascii_text)


@pytest.mark.parametrize("kernel", _tokenizer.kernels)
def test_every_kernel_sees_a_byte_that_is_not_ascii_wherever_it_is(kernel: str) -> None:
    for n in (1, 2, 15, 16, 31, 32, 33, 63, 64, 65, 100, 129):
        for position in range(n):
            text = "A" * position + "É" + "C" * (n - position - 1)
            assert _tokenizer.pack(text.encode(), 0, 1, kernel)[0].tolist() == plain(text)


def test_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel mmx on this processor"):
        _tokenizer.pack("MKT", 20, 1, "mmx")


@pytest.mark.parametrize(("first", "stop"), [(0, 0x100), (0, 0x10000), (0, 0x110000), (0xD7F0, 0xE010)])
def test_every_code_point_is_one_token(tokenizer: Tokenizer, first: int, stop: int) -> None:
    """Each width of str, surrogates included."""
    expected = np.full(stop - first, OTHER)
    for token, letter in enumerate(VOCABULARY):
        if first <= ord(letter) < stop:
            expected[ord(letter) - first] = token
    tokens = tokenizer.tokenize("".join(map(chr, range(first, stop))))
    assert tokens[0] == START
    assert tokens[-1] == END
    np.testing.assert_array_equal(tokens[1:-1], expected)


any_text = st.text(st.characters() | st.sampled_from(RESIDUES), max_size=80)


@quick
@given(st.lists(any_text, max_size=8), st.integers(0, 25))
def test_text_of_any_code_points(texts: list[str], gap: int) -> None:
    batch = Tokenizer(gap)(texts)
    assert batch.tokens.tolist() == plain_rows(texts, gap)
    assert batch.lengths.tolist() == [len(text) + 2 for text in texts]
    assert [rows.tolist() for rows in batch.unpack(batch.tokens)] == [plain(text) for text in texts]


def outcome(function: Callable[[], list[int]]) -> object:
    try:
        return function()
    except UnicodeDecodeError as error:
        return error.encoding, error.object, error.start, error.end, error.reason


@quick
@given(st.binary(max_size=100) | any_text.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_bytes_are_what_python_decodes_or_refuses(data: bytes) -> None:
    expected = outcome(lambda: plain(data.decode("utf-8")))
    assert outcome(lambda: Tokenizer().tokenize(data).tolist()) == expected
    for kind in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        rows = outcome(lambda kind=kind: Tokenizer(0)([kind]).tokens.tolist())  # type: ignore[misc]
        assert rows == expected


HOSTILE = [
    "",
    "\0",
    "\0" * 100,
    "M\0K",
    "\ud800",
    "\udfff\ud800",
    "\U0010ffff",
    "M\u0301" * 50,
    "\ufeffMKT",
    "\u202eTKM",
    "<START>",
    ">sp|P1|X\nMKT",
    "\U0001d40c\uff2b\u13da",
    "MKT",
    "A" * 100_003,
    "ß" * 65,
    "A" * 64 + "ß",
    "A" * 65 + "\U0001f9ec",
]


def test_hostile_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer(HOSTILE).tokens.tolist() == plain_rows(HOSTILE, 20)
    for text in HOSTILE:
        assert tokenizer.tokenize(text).tolist() == plain(text)


def test_hostile_bytes(tokenizer: Tokenizer) -> None:
    overlong, surrogate, beyond, cut = b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", "é".encode()[:1]
    for data in (overlong, surrogate, beyond, cut, b"\x80", b"MKT\xff", b"A" * 1000 + b"\xe2\x82"):
        with pytest.raises(UnicodeDecodeError):
            tokenizer.tokenize(data)
        with pytest.raises(UnicodeDecodeError) as caught:
            tokenizer(["MKT", data, b"\xfe"])
        assert caught.value.object == data  # the first bad one
        assert caught.value.__notes__ == ["in record 1 of the sequences"]


def test_very_many_tiny_sequences() -> None:
    n = 300_000
    texts = ["", "M", "?"] * (n // 3)
    batch = Tokenizer(1, threads=3)(texts)
    assert len(batch) == n
    assert batch.n_residues == n * 2 // 3
    block = [START, END, GAP, START, VOCABULARY.index("M"), END, GAP, START, OTHER, END, GAP]
    np.testing.assert_array_equal(batch.tokens.numpy(), np.r_[GAP, np.tile(block, n // 3)])


# ---- what a sequence may be ----


def test_every_kind_of_sequence(tokenizer: Tokenizer) -> None:
    array = np.frombuffer(b"MAKATA", np.uint8)
    assert tokenizer("MKT").tokens.tolist() == plain_rows(["MKT"], 20)
    kinds = [
        "MKT",
        b"MKT",
        bytearray(b"MKT"),
        memoryview(b"MKT"),
        memoryview(b"MAKATA")[::2],
        np.frombuffer(b"MKT", np.uint8),
        array[::2],
        array[-2::-2][::-1],
        np.frombuffer(b"MKT" * 5, np.uint8).reshape(5, 3)[2],
        np.frombuffer(b"MMMKKKTTT", np.uint8).reshape(3, 3)[:, 1],
        np.str_("MKT"),
        np.bytes_(b"MKT"),
        Record("P1", "MKT"),
        Record("P2", bytearray(b"MKT")),
    ]
    expected = plain_rows(["MKT"] * len(kinds), 20)
    assert tokenizer(kinds).tokens.tolist() == expected
    assert tokenizer(tuple(kinds)).tokens.tolist() == expected
    assert tokenizer(kind for kind in kinds).tokens.tolist() == expected
    assert tokenizer(np.array(["MKT"] * len(kinds))).tokens.tolist() == expected
    assert tokenizer(np.array(["MKT"] * len(kinds), object)).tokens.tolist() == expected
    for kind in kinds:
        assert tokenizer(kind).tokens.tolist() == plain_rows(["MKT"], 20)


def test_strided_bytes_are_decoded_too(tokenizer: Tokenizer) -> None:
    text = "MÉK"
    spread = np.zeros(2 * len(text.encode()), np.uint8)
    spread[::2] = np.frombuffer(text.encode(), np.uint8)
    assert tokenizer(spread[::2]).tokens.tolist() == plain_rows([text], 20)
    spread[0] = 0xFF
    with pytest.raises(UnicodeDecodeError):
        tokenizer(spread[::2])


def test_nothing_is_a_batch_too(tokenizer: Tokenizer) -> None:
    for nothing in ([], (), iter([]), np.empty((0, 3), np.uint8)):
        batch = tokenizer(nothing)
        assert len(batch) == 0
        assert batch.tokens.tolist() == [GAP] * 20
        assert batch.ids is None
    assert Tokenizer(0)([]).tokens.tolist() == []


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (None, "NoneType"),
        (5, "int"),
        (2.5, "float"),
        ({"P1": "MKT"}, "dict"),
        ({"MKT"}, "set"),
        (frozenset(["MKT"]), "frozenset"),
        (object(), "object"),
        (np.uint8(65), "numpy.uint8"),
    ],
)
def test_not_a_sequence(tokenizer: Tokenizer, wrong: Any, name: str) -> None:
    with pytest.raises(TypeError, match=f"^Unexpected sequence type: <class '{name}'>$"):
        tokenizer(wrong)
    with pytest.raises(TypeError, match=rf"^Unexpected sequence type: <class '{name}'> \(record 1\)$"):
        tokenizer(["MKT", wrong])
    with pytest.raises(TypeError, match=rf"^Unexpected sequence type: <class '{name}'> \(record 1\)$"):
        tokenizer.windows(iter(["MKT", wrong]), 8, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        ["MKT"],
        ("MKT",),
        np.array([77, 75], np.int64),
        np.array([77, 75], np.int8),
        np.array([True, False]),
        np.zeros((2, 2), np.uint8),
        np.array(77, np.uint8),
        torch.tensor([77, 75], dtype=torch.uint8),
    ],
    ids=repr,
)
def test_not_a_sequence_inside_a_batch(tokenizer: Tokenizer, wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"Unexpected sequence type: .* \(record 0\)"):
        tokenizer([wrong])


def test_errors_while_iterating_come_through(tokenizer: Tokenizer) -> None:
    def broken() -> Iterator[str]:
        yield "MKT"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        tokenizer(broken())


def test_ids(tokenizer: Tokenizer) -> None:
    records = [Record("P1", "MKT"), Record("P2", b"W")]
    assert tokenizer(records).ids == ("P1", "P2")
    assert tokenizer(records[0]).ids == ("P1",)
    assert tokenizer(records, ids=["a", "b"]).ids == ("a", "b")
    assert tokenizer([*records, "MKT"]).ids is None
    assert tokenizer(["MKT"], ids=["a"]).ids == ("a",)
    assert tokenizer.windows(records, 4, 0).ids == ("P1", "P2")
    for wrong in (["a"], ["a", "b", "c"], "ab"):
        with pytest.raises(InputError, match="ids must be one name for each of 2 proteins"):
            tokenizer(records, ids=wrong)
    with pytest.raises(TypeError, match=r"the id of a record must be a str \(record 1\)"):
        tokenizer([records[0], Record(7, "MKT")])
    with pytest.raises(TypeError, match=r"Unexpected sequence type: <class 'int'> \(record 0\)"):
        tokenizer([Record("P1", 7)])


@pytest.mark.parametrize("options", [{"gap": -1}, {"gap": 2.0}, {"gap": "20"}, {"threads": 0}, {"gap": 2**31}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Tokenizer(**options)


# ---- threads, lifetimes, writers ----


@pytest.mark.parametrize("gap", [0, 20])
def test_threads_do_not_change_a_byte(gap: int) -> None:
    rng = np.random.default_rng(2)
    text = "".join(rng.choice([*RESIDUES, "b", "*", "é"], 3_000_000))
    cuts = np.sort(rng.integers(0, len(text), 4000))
    texts = ["".join(part) for part in np.split(np.array(list(text)), cuts)] + [text[:2_500_000], "", "M"]
    expected = _tokenizer.pack(texts, gap, 1)
    assert expected[0].size > 5_000_000
    data = [t.encode() for t in texts]
    for threads in (2, 3, 5):
        for sequences in (texts, data):
            tokens, starts, lengths, _ = _tokenizer.pack(sequences, gap, threads)
            np.testing.assert_array_equal(tokens, expected[0])
            np.testing.assert_array_equal(starts, expected[1])
            np.testing.assert_array_equal(lengths, expected[2])
    windows = [_tokenizer.windows(data, 5000, 3, None, gap, threads)[0] for threads in (1, 2, 5)]
    np.testing.assert_array_equal(windows[0], windows[1])
    np.testing.assert_array_equal(windows[0], windows[2])


def test_many_callers_at_once(real_sequences: list[str]) -> None:
    tokenizer = Tokenizer(threads=2)
    expected = tokenizer(real_sequences).tokens
    data = [s.encode() for s in real_sequences]

    def call(i: int) -> bool:
        batch = tokenizer(data if i % 2 else real_sequences)
        return torch.equal(batch.tokens, expected)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(200)))


def test_a_bytearray_written_meanwhile_gives_tokens_all_the_same() -> None:
    data = bytearray(b"M" * 3_000_000)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            data[1_000_000:1_000_100] = b"K" * 100
            data[1_000_000:1_000_100] = "é".encode() * 50

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(20):
            # A whole é is an OTHER; one caught half written is refused.
            try:
                tokens = Tokenizer(threads=2)([data]).tokens
            except UnicodeDecodeError:
                continue
            assert int(tokens.max()) <= GAP
            assert 2_999_900 <= len(tokens) - 42 <= 3_000_000
    finally:
        stop.set()
        writer.join()


def test_nothing_is_held_after_the_call(tokenizer: Tokenizer) -> None:
    text, data, array = "MKT" * 100, bytearray(b"MKT" * 100), np.frombuffer(bytearray(b"MKT" * 100), np.uint8)
    identity = "P" * 50
    sequences: list[Any] = [text, data, array, Record(identity, text), "é".encode()]
    before = [sys.getrefcount(x) for x in (text, data, array, identity)]
    for _ in range(3):
        tokenizer(sequences)
        tokenizer.windows(sequences, 5, 0)
        with pytest.raises(TypeError):
            tokenizer([*sequences, None])
        with pytest.raises(UnicodeDecodeError):
            tokenizer([*sequences, b"\xff"])
    gc.collect()
    assert [sys.getrefcount(x) for x in (text, data, array, identity)] == before
    data.append(65)  # would raise BufferError if it were still exported


def test_rows_outlive_the_sequences(tokenizer: Tokenizer) -> None:
    sequences = [bytearray(b"MKT") * 50 for _ in range(100)]
    batch = tokenizer(sequences)
    one = batch[3]
    del sequences, batch
    gc.collect()
    assert one.tokens.tolist() == plain_rows(["MKT" * 50], 20)
    assert one.tokens.storage_offset() > 0
    assert one.lengths.tolist() == [152]


def test_a_list_that_changes_while_it_is_read(tokenizer: Tokenizer) -> None:
    class Clearing:
        id = "P1"

        @property
        def sequence(self) -> str:
            sequences.clear()
            gc.collect()
            return "MKT"

    sequences: list[Any] = ["A" * 600, Clearing(), "W" * 600]
    assert tokenizer(sequences).tokens.tolist() == plain_rows(["A" * 600, "MKT"], 20)


def test_the_gil_is_free_while_rows_are_written() -> None:
    """Python takes the GIL from no thread here, so another one runs only if the call lets it go."""
    data = np.full(20_000_000, ord("M"), np.uint8)
    turns: list[int] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            turns.append(1)
            done.wait(0.0001)

    interval = sys.getswitchinterval()
    other = threading.Thread(target=count)
    other.start()
    sys.setswitchinterval(1000)
    try:
        before = len(turns)
        for _ in range(100):
            _tokenizer.pack(data, 0, 1)
            if len(turns) > before:
                break
        assert len(turns) > before
    finally:
        sys.setswitchinterval(interval)
        done.set()
        other.join()


# ---- windows ----


def mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def plain_window(text: str, length: int, seed: int, index: int) -> list[int]:
    tokens = plain(text)
    last = len(tokens) - length
    if last <= 0:
        return tokens
    mask = 2 ** last.bit_length() - 1
    key = mix(mix(seed) ^ index)
    k = 0
    while (start := mix((key + k) % 2**64) & mask) > last:
        k += 1
    return tokens[start : start + length]


def test_splitmix64_is_the_published_one() -> None:
    assert [mix(0), mix(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@quick
@given(
    st.lists(st.text(RESIDUES + "bé*", max_size=60), max_size=6),
    st.integers(1, 70),
    st.integers(0, 2**64 - 1),
    st.booleans(),
)
def test_windows_are_the_documented_ones(texts: list[str], length: int, seed: int, as_bytes: bool) -> None:
    sequences = [text.encode() for text in texts] if as_bytes else texts
    expected = [plain_window(text, length, seed, i) for i, text in enumerate(texts)]
    batch = Tokenizer().windows(sequences, length, seed)
    assert [rows.tolist() for rows in batch.unpack(batch.tokens)] == expected
    # The same constructor checks that a user's rows get: the gaps are where the lengths say.
    PackedBatch(batch.tokens, batch.host_lengths, batch.gap)


def test_a_window_does_not_depend_on_its_batch(real_sequences: list[str]) -> None:
    tokenizer = Tokenizer()
    whole = tokenizer.windows(real_sequences, 128, seed=5)
    order = np.random.default_rng(3).permutation(len(real_sequences))
    shuffled = tokenizer.windows([real_sequences[i] for i in order], 128, seed=5, indices=order)
    for place, i in enumerate(order):
        alone = tokenizer.windows(real_sequences[i], 128, seed=5, indices=[i])
        assert torch.equal(alone.tokens, whole[int(i)].tokens)
        assert torch.equal(alone.tokens, shuffled[place].tokens)
    assert not torch.equal(tokenizer.windows(real_sequences, 128, seed=6).tokens, whole.tokens)


def test_every_window_is_equally_probable(tokenizer: Tokenizer) -> None:
    text, length, draws = "ACDEFGHIKLMNPQRSTUVWXYAC", 8, 20_000
    n_starts = len(text) + 2 - length + 1
    assert n_starts == 19  # no power of two, so that a biased reduction would show
    batch = tokenizer.windows([text] * draws, length, seed=11)
    tokens = torch.stack(batch.unpack(batch.tokens))
    has_start = tokens[:, 0] == START
    has_end = tokens[:, -1] == END
    expected = draws / n_starts
    tolerance = 5 * expected**0.5
    assert abs(int(has_start.sum()) - expected) < tolerance
    assert abs(int(has_end.sum()) - expected) < tolerance
    assert not (has_start & has_end).any()
    _, counts = torch.unique(tokens, dim=0, return_counts=True)
    assert len(counts) == n_starts
    assert ((counts - expected).abs() < tolerance).all()


def test_windows_of_bytes_that_are_not_utf8(tokenizer: Tokenizer) -> None:
    """The bad byte is found although the window need not contain it."""
    data = b"M" * 10_000 + b"\xff"
    for seed in range(5):
        with pytest.raises(UnicodeDecodeError):
            tokenizer.windows(data, 8, seed)


@pytest.mark.parametrize(
    "options",
    [
        {"length": 0},
        {"length": -3},
        {"seed": -1},
        {"seed": 2**64},
        {"indices": [0]},
        {"indices": [0, 1, 2]},
        {"indices": [0, -1]},
        {"indices": [0.0, 1.0]},
        {"indices": [[0, 1]]},
    ],
    ids=repr,
)
def test_wrong_windows(tokenizer: Tokenizer, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="windows"):
        tokenizer.windows(["MKT", "W"], **({"length": 8, "seed": 0} | options))


# ---- decoding ----


@quick
@given(st.text(RESIDUES, max_size=200))
def test_decode_undoes_tokenize(text: str) -> None:
    tokenizer = Tokenizer()
    batch = tokenizer([text, text])
    assert tokenizer.decode(tokenizer.tokenize(text)) == text
    assert tokenizer.decode(tokenizer.tokenize(text).tolist()) == text
    assert tokenizer.decode(batch.tokens) == text * 2
    assert tokenizer.decode(batch.to_padded(length=len(text) + 7)[0]) == text


def test_decode_marks_what_is_not_in_the_vocabulary(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.tokenize("MbZ*é\0K")) == "M?????K"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([START, END, PAD, GAP]) == ""


@pytest.mark.parametrize("wrong", [[27], [-1], [0.5], [[1, 2]], 3, "MKT", torch.zeros(2, 2, dtype=torch.int64)])
def test_decode_refuses(tokenizer: Tokenizer, wrong: Any) -> None:
    with pytest.raises(InputError, match="decode"):
        tokenizer.decode(wrong)
