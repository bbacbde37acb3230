"""PackedBatch and batching by token budget, against loops over proteins."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from proteinbert_fast.errors import BackendError, InputError
from proteinbert_fast.packing import PackedBatch, batches_by_tokens
from proteinbert_fast.spans import HostLayout
from proteinbert_fast.tokenizer import END, GAP, OTHER, PAD, START, Tokenizer

RESIDUES = "ACDEFGHIKLMNPQRSTUVWXY"

quick = settings(deadline=None, max_examples=40)  # a busy machine is no failure
proteins = st.lists(st.text(RESIDUES + "b", max_size=40), max_size=7)
gaps = st.integers(0, 23)


@pytest.fixture
def batch(tokenizer: Tokenizer) -> PackedBatch:
    return tokenizer(["MKT", "", "ACDEFGHIKLMNPQRSTUVWXY", "W", "AAA"], ids=["a", "b", "c", "d", "e"])


def assert_same(one: PackedBatch, other: PackedBatch) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.starts, other.starts)
    assert torch.equal(one.lengths, other.lengths)
    assert torch.equal(one.segments, other.segments)
    assert one.host_starts.tolist() == other.host_starts.tolist() == one.starts.tolist()
    assert one.host_lengths.tolist() == other.host_lengths.tolist() == one.lengths.tolist()
    assert (one.gap, one.ids) == (other.gap, other.ids)
    assert (one.n_rows, one.n_tokens, one.n_residues, len(one)) == (
        other.n_rows,
        other.n_tokens,
        other.n_residues,
        len(other),
    )


# ---- layout ----


@quick
@given(proteins, gaps)
def test_layout(texts: list[str], gap: int) -> None:
    batch = Tokenizer(gap)(texts)
    row = gap
    segments = [-1] * gap
    for i, text in enumerate(texts):
        assert batch.starts[i] == row
        assert batch.lengths[i] == len(text) + 2
        assert batch.tokens[row] == START
        assert batch.tokens[row + len(text) + 1] == END
        segments += [i] * (len(text) + 2) + [-1] * gap
        row += len(text) + 2 + gap
    assert batch.segments.tolist() == segments
    assert batch.segments is batch.segments  # kept
    assert ((batch.tokens == GAP) == (batch.segments < 0)).all()
    assert batch.n_rows == len(batch.tokens) == row == gap + sum(len(text) + 2 + gap for text in texts)
    assert batch.n_tokens == sum(len(text) + 2 for text in texts)
    assert batch.n_residues == sum(map(len, texts))
    assert len(batch) == len(texts)
    for values, dtype in ((batch.tokens, torch.uint8), (batch.starts, torch.int64), (batch.lengths, torch.int64)):
        assert values.dtype == dtype
    assert batch.segments.dtype == torch.int32


def test_host_arrays_are_read_only(batch: PackedBatch) -> None:
    for values in (batch.host_starts, batch.host_lengths):
        assert values.dtype == np.int64
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


def test_repr_says_what_it_holds(batch: PackedBatch) -> None:
    assert repr(batch) == "PackedBatch(proteins=5, tokens=39, rows=159, gap=20, device='cpu')"


@quick
@given(proteins, gaps)
def test_rows_of_a_user_s_own(texts: list[str], gap: int) -> None:
    expected = Tokenizer(gap)(texts)
    lengths = [len(text) + 2 for text in texts]
    for given_lengths in (lengths, np.array(lengths, np.int32), torch.tensor(lengths, dtype=torch.int64)):
        assert_same(PackedBatch(expected.tokens.clone(), given_lengths, gap), expected)


@pytest.mark.parametrize(
    ("tokens", "lengths", "gap", "message"),
    [
        ([GAP, START, END, GAP], [2], 2, "want 6 rows, tokens has 4"),
        ([GAP, START, END, GAP], [1], 1, "want 3 rows"),
        ([GAP, START, END, END], [2], 1, r"row 3 must hold GAP \(26\), got 24"),
        ([GAP, GAP, END, GAP], [2], 1, r"row 1, record 0, must hold a token 0\.\.25, got 26"),
        ([GAP, START, 27, GAP], [2], 1, r"row 2, record 0, must hold a token 0\.\.25, got 27"),
        ([GAP, 255, END, GAP], [2], 1, r"row 1, record 0, must hold a token 0\.\.25, got 255"),
        ([GAP, GAP], [0], 1, "record 0 has length 0"),
        ([GAP, GAP], [-1, 1], 1, "record 0 has length -1"),
        ([GAP, START, END, GAP], [2.0], 1, "lengths must be integers"),
        ([GAP, START, END, GAP], [[2]], 1, "lengths must be integers"),
        ([GAP, START, END, GAP], [2], -1, "gap must be"),
    ],
)
def test_rows_that_do_not_fit(tokens: list[int], lengths: Any, gap: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackedBatch(torch.tensor(tokens, dtype=torch.uint8), lengths, gap)


def test_rows_of_another_type_or_shape() -> None:
    for tokens in (torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(InputError, match="tokens must be uint8"):
            PackedBatch(tokens, [2], 1)
    with pytest.raises(InputError, match="ids must be one name for each of 1 proteins"):
        PackedBatch(torch.tensor([GAP, START, END, GAP], dtype=torch.uint8), [2], 1, ids=["a", "b"])


# ---- choosing proteins ----


@quick
@given(proteins.filter(bool), gaps, st.data())
def test_indexing(texts: list[str], gap: int, data: st.DataObject) -> None:
    tokenizer = Tokenizer(gap)
    ids = [f"P{i}" for i in range(len(texts))]
    batch = tokenizer(texts, ids=ids)
    i = data.draw(st.integers(-len(texts), len(texts) - 1))
    assert_same(batch[i], tokenizer([texts[i]], ids=[ids[i]]))
    assert_same(batch[np.int64(i)], batch[i])
    chosen = data.draw(st.slices(len(texts)))
    assert_same(batch[chosen], tokenizer(texts[chosen], ids=ids[chosen]))
    some = data.draw(st.lists(st.integers(-len(texts), len(texts) - 1), max_size=9))
    expected = tokenizer([texts[k] for k in some], ids=[ids[k] for k in some])
    assert_same(batch[some], expected)
    assert_same(batch[np.array(some, np.int64)], expected)
    assert_same(batch[torch.tensor(some, dtype=torch.int64)], expected)
    mask = data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts)))
    expected = batch[[k for k, keep in enumerate(mask) if keep]]
    assert_same(batch[mask], expected)
    assert_same(batch[torch.tensor(mask)], expected)


def test_neighbours_are_views(batch: PackedBatch) -> None:
    memory = batch.tokens.untyped_storage().data_ptr()
    assert batch[2].tokens.untyped_storage().data_ptr() == memory
    assert batch[1:4].tokens.untyped_storage().data_ptr() == memory
    assert batch[[1, 2]].tokens.untyped_storage().data_ptr() != memory


def test_iterating_gives_every_protein(batch: PackedBatch) -> None:
    assert [one.ids for one in batch] == [("a",), ("b",), ("c",), ("d",), ("e",)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("index", [5, -6, [0, 5], [-6], [0.5], "a", None, [[0]], [True, False], (0, 9)])
def test_no_such_protein(batch: PackedBatch, index: Any) -> None:
    with pytest.raises(IndexError):
        batch[index]


# ---- unpacking and padding ----


@quick
@given(proteins, gaps)
def test_unpack_and_to_padded(texts: list[str], gap: int) -> None:
    batch = Tokenizer(gap)(texts)
    rows = torch.randn(batch.n_rows, 3, 2)
    parts = batch.unpack(rows)
    assert len(parts) == len(texts)
    padded = batch.to_padded(rows)
    wider = batch.to_padded(rows, value=-7.0, length=45)
    width = max((len(text) + 2 for text in texts), default=0)
    assert padded.shape == (len(texts), width, 3, 2)
    assert wider.shape == (len(texts), 45, 3, 2)
    for i, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        expected = rows[start : start + length]
        assert torch.equal(parts[i], expected)
        assert torch.equal(padded[i, :length], expected)
        assert (padded[i, length:] == 0).all()
        assert torch.equal(wider[i, :length], expected)
        assert (wider[i, length:] == -7).all()
    tokens = batch.to_padded()
    assert tokens.dtype == torch.uint8
    assert ((tokens == PAD) == (torch.arange(width) >= batch.lengths[:, None])).all()


def test_unpack_gives_views(batch: PackedBatch) -> None:
    rows = torch.randn(batch.n_rows, 4)
    for part in batch.unpack(rows):
        assert part.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()


def test_gradients_go_through(batch: PackedBatch) -> None:
    rows = torch.randn(batch.n_rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: batch.to_padded(r, length=30), rows)
    assert torch.autograd.gradcheck(lambda r: batch.unpack(r)[2], rows)
    batch.to_padded(rows).sum().backward()
    assert torch.equal(rows.grad[:, 0] == 1, batch.segments >= 0)  # type: ignore[index]


def test_rows_of_another_batch_are_refused(batch: PackedBatch) -> None:
    for rows in (torch.zeros(3, 2), torch.zeros(batch.n_rows + 1), torch.tensor(1.0)):
        with pytest.raises(InputError, match="does not have 159 rows"):
            batch.unpack(rows)
        with pytest.raises(InputError, match="does not have 159 rows"):
            batch.to_padded(rows)


def test_to_padded_cuts_nothing(batch: PackedBatch) -> None:
    with pytest.raises(InputError, match=r"record 2 \(c\) has 24 tokens, more than length 23"):
        batch.to_padded(length=23)


@quick
@given(proteins, gaps, st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_from_padded_with_lengths_or_mask(texts: list[str], gap: int, dtype: torch.dtype) -> None:
    expected = Tokenizer(gap)(texts)
    padded = expected.to_padded(length=45).to(dtype)
    padded[padded == PAD] = 99  # beyond the lengths anything may stand
    lengths = expected.lengths
    mask = torch.arange(45) < lengths[:, None]
    for known in (
        {"lengths": lengths},
        {"lengths": lengths.tolist()},
        {"lengths": expected.host_lengths},
        {"mask": mask},
        {"mask": mask.long()},
    ):
        assert_same(PackedBatch.from_padded(padded, gap=gap, **known), expected)  # type: ignore[arg-type]
    strided = torch.stack([padded, padded], -1)[..., 0]
    assert_same(PackedBatch.from_padded(strided, lengths, gap=gap), expected)


def test_from_padded_takes_pad_literally(batch: PackedBatch) -> None:
    packed = PackedBatch.from_padded(batch.to_padded())
    assert packed.lengths.tolist() == [24] * 5
    assert packed.tokens[packed.segments >= 0].tolist() == batch.to_padded().flatten().tolist()
    assert packed.n_residues == batch.n_residues
    assert torch.equal(packed.to_padded(), batch.to_padded())


def test_from_padded_of_nothing() -> None:
    for width in (0, 5):
        assert len(PackedBatch.from_padded(torch.zeros(0, width, dtype=torch.int64))) == 0


GOOD = torch.full((3, 4), OTHER)
BAD = GOOD.clone()
BAD[1, 2] = 26
NEGATIVE = GOOD.clone()
NEGATIVE[2, 0] = -1
HOLE = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (BAD, {}, r"record 1 holds 26 in column 2; tokens are 0\.\.25"),
        (NEGATIVE, {}, "record 2 holds -1 in column 0"),
        (BAD, {"lengths": [4, 3, 4]}, "record 1 holds 26 in column 2"),
        (GOOD, {"lengths": [4, 5, 4]}, "record 1 has length 5 in an array of 4 columns"),
        (GOOD, {"lengths": [4, 4, 0]}, "record 2 has length 0"),
        (GOOD, {"lengths": [4, 4]}, "2 lengths for 3 records"),
        (GOOD, {"lengths": torch.ones(3)}, "lengths must be integers"),
        (GOOD, {"lengths": [1, 1, 1], "mask": HOLE}, "lengths or mask, not both"),
        (GOOD, {"mask": HOLE}, "the mask of record 1 must be true up to its length"),
        (GOOD, {"mask": HOLE.flip(1)[:, :4]}, "the mask of record 0 must be true"),
        (GOOD, {"mask": torch.zeros(3, 4, dtype=torch.bool)}, "record 0 has length 0"),
        (GOOD, {"mask": torch.ones(3, 4)}, "mask must hold integers"),
        (GOOD, {"mask": torch.ones(3, 5, dtype=torch.bool)}, "mask is"),
        (GOOD[0], {}, "tokens must be"),
        (GOOD.float(), {}, "tokens must hold integers"),
        (GOOD.bool(), {}, "tokens must hold integers"),
        (torch.zeros(2, 0, dtype=torch.int64), {}, "record 0 has length 0"),
        (GOOD, {"gap": -1}, "gap must be"),
    ],
)
def test_from_padded_refuses(tokens: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackedBatch.from_padded(tokens, **options)


def test_from_padded_wants_tensors() -> None:
    with pytest.raises(TypeError, match=r"tokens must be a torch\.Tensor"):
        PackedBatch.from_padded([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor"):
        PackedBatch.from_padded(GOOD, mask=[[1, 1, 1, 1]] * 3)  # type: ignore[arg-type]


def test_what_lies_beyond_the_lengths_is_ignored() -> None:
    packed = PackedBatch.from_padded(BAD, lengths=[4, 2, 4])
    assert packed.lengths.tolist() == [4, 2, 4]


# ---- moving and copying ----


def test_to_where_it_is_already(batch: PackedBatch) -> None:
    assert batch.to("cpu") is batch
    assert batch.to(torch.device("cpu")) is batch


def test_to_another_device_keeps_what_the_host_knows(batch: PackedBatch) -> None:
    moved = batch.to("meta")
    assert moved.tokens.device == moved.starts.device == moved.lengths.device == torch.device("meta")
    assert moved.host_starts is batch.host_starts
    assert moved.host_lengths is batch.host_lengths
    assert moved.segments.shape == (batch.n_rows,)
    assert moved.to_padded().shape == (5, 24)
    assert (moved.ids, moved.gap, len(moved), moved.n_tokens) == (batch.ids, 20, 5, 39)


def test_pin_memory_without_an_accelerator(batch: PackedBatch) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    with pytest.raises(BackendError, match="no accelerator to pin memory for"):
        batch.pin_memory()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(batch: PackedBatch) -> None:
    pinned = batch.pin_memory()
    assert pinned.tokens.is_pinned()
    moved = pinned.to("cuda", non_blocking=True)
    assert moved.tokens.is_cuda
    torch.cuda.set_sync_debug_mode("error")  # nothing below may wait for the GPU
    try:
        moved.segments  # noqa: B018
        padded = moved.to_padded()
        moved.unpack(moved.tokens)
        chosen = moved[1:3]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(padded.cpu(), batch.to_padded())
    assert_same(chosen.to("cpu"), batch[1:3])
    assert_same(moved[[3, 0]].to("cpu"), batch[[3, 0]])
    assert_same(moved.to("cpu"), batch)
    back = PackedBatch.from_padded(padded, moved.lengths)
    assert torch.equal(back.tokens.cpu(), batch.tokens)


def test_pickle_and_deepcopy(batch: PackedBatch) -> None:
    for twin in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
        assert_same(twin, batch)
        assert twin.tokens.data_ptr() != batch.tokens.data_ptr()
    one = Tokenizer()(["M" * 50_000, "MKT"])[1]
    assert len(pickle.dumps(one)) < 5_000
    assert_same(pickle.loads(pickle.dumps(one)), one)


def test_a_loader_with_workers_hands_over_batches() -> None:
    loader = torch.utils.data.DataLoader(
        ["MKT", "ACDEFG", "W", "YYY"], batch_size=2, collate_fn=Tokenizer(), num_workers=1
    )
    batches = list(loader)
    assert [b.lengths.tolist() for b in batches] == [[5, 8], [3, 5]]
    assert_same(batches[1], Tokenizer()(["W", "YYY"]))


def test_inside_compiled_code(tokenizer: Tokenizer) -> None:
    table = torch.randn(GAP + 1, 4)

    def sums(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = table[batch.tokens.long()]
        totals = rows.new_zeros(len(batch) + 1, 4).index_add(0, batch.segments.long() + 1, rows)
        return totals[1:], batch.to_padded(rows)

    compiled = torch.compile(sums, fullgraph=True, backend="eager")
    for texts in (["MKT", "W"], ["ACDEF", "GH", "", "IKLMNPQ"], ["Y" * 100] * 5):
        for got, expected in zip(compiled(tokenizer(texts)), sums(tokenizer(texts)), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_batch_made_for_inference_can_be_trained_on() -> None:
    with torch.inference_mode():
        batch = Tokenizer()(["MKT", "W"])
        batch.segments  # noqa: B018
    table = torch.nn.Parameter(torch.randn(GAP + 1, 4))
    rows = table[batch.tokens.long()] * batch.segments[:, None]
    batch.to_padded(rows).sum().backward()
    assert table.grad is not None


# ---- batches by budget ----

length_lists = st.lists(st.integers(1, 300), max_size=60)


@quick
@given(length_lists, st.integers(1, 700), gaps, st.none() | st.integers(1, 20))
def test_batches_hold_every_record_once_and_keep_the_budget(
    lengths: list[int], budget: int, gap: int, window: int | None
) -> None:
    batches = batches_by_tokens(lengths, budget, gap, window)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for k, batch in enumerate(batches):
        rows = gap + sum(lengths[i] + gap for i in batch)
        assert rows <= budget or len(batch) == 1
        order = [(-lengths[i], i) for i in batch]
        assert order == sorted(order)
        if window is not None:
            assert len({int(i) // window for i in batch}) == 1
        same_window = window is None or k + 1 == len(batches) or batch[0] // window == batches[k + 1][0] // window
        if k + 1 < len(batches) and same_window:  # the next one would not have fitted
            assert rows + lengths[batches[k + 1][0]] + gap > budget


@quick
@given(length_lists, st.integers(1, 700))
def test_results_come_back_in_input_order(lengths: list[int], budget: int) -> None:
    results = np.zeros(len(lengths), np.int64)
    for batch in batches_by_tokens(lengths, budget):
        results[batch] = np.array(lengths)[batch]
    assert results.tolist() == lengths


def test_batches_are_as_full_as_the_rows_say(tokenizer: Tokenizer, real_sequences: list[str]) -> None:
    whole = tokenizer(real_sequences)
    batches = batches_by_tokens(whole.host_lengths, 8192)
    rows = [whole[batch].n_rows for batch in batches]
    assert max(rows) <= 8192
    assert sum(rows) < 0.95 * 8192 * len(rows) + 8192
    assert batches_by_tokens(whole.lengths.tolist(), 8192)[3].tolist() == batches[3].tolist()
    short = len(whole[batches[-1]])
    assert short > 1


def test_a_long_protein_goes_alone() -> None:
    batches = [batch.tolist() for batch in batches_by_tokens([5, 34_352, 7, 5], 60)]
    assert batches == [[1], [2], [0], [3]]
    assert [batch.tolist() for batch in batches_by_tokens([5, 34_352, 7, 5], 80)] == [[1], [2, 0], [3]]


def test_batches_of_nothing_and_of_a_million() -> None:
    assert batches_by_tokens([], 100) == []
    assert batches_by_tokens([], 100, window=3) == []
    lengths = np.random.default_rng(4).integers(1, 2000, 1_000_000)
    batches = batches_by_tokens(lengths, 65_536)
    assert sum(map(len, batches)) == 1_000_000


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([5, 0], {}),
        ([5, -1], {}),
        ([5.5], {}),
        ([[5]], {}),
        ([5], {"tokens_per_batch": 0}),
        ([5], {"gap": -1}),
        ([5], {"window": 0}),
    ],
)
def test_wrong_budgets(lengths: Any, options: dict[str, int]) -> None:
    with pytest.raises(InputError):
        batches_by_tokens(lengths, **({"tokens_per_batch": 100} | options))


def test_waste_of_a_batch_of_one_giant_and_a_thousand_short_proteins():
    """No padding: gaps are all that is computed in vain."""
    lengths = [34_350, *(300 + i % 100 for i in range(1000))]
    batch = Tokenizer()(["M" * n for n in lengths])
    assert batch.n_tokens > 0.9 * batch.n_rows


@pytest.mark.parametrize("residues", [[], [0], [510, 511, 0, 1022, 1023, 3]])
def test_spans_cut_each_protein_from_its_own_first_row(residues):
    batch = Tokenizer()(["M" * n for n in residues])
    protein, first = batch.spans(512)
    expected = [i for i, n in enumerate(residues) for _ in range(-(-(n + 2) // 512))]
    assert protein.tolist()[: len(expected)] == expected
    assert all(p == len(batch) for p in protein.tolist()[len(expected) :])
    assert first.diff().tolist() == [expected.count(i) for i in range(len(batch))]
    assert batch.spans(512)[0] is protein


@quick
@given(proteins, gaps, st.integers(1, 50), st.integers(0, 4), st.integers(0, 70))
def test_layouts_of_the_host_and_of_the_device_agree(
    texts: list[str], gap: int, size: int, empty: int, more: int
) -> None:
    """With empty places and rows behind the last protein, as graphs fill them up."""
    batch = Tokenizer(gap)(texts)
    n_rows, n_places = batch.n_rows + more, len(batch) + empty
    if not n_places:
        return
    sizes = (n_places, n_places, n_places + 1), (n_rows, n_rows // size + n_places)
    arrays = [np.full(n, -9, dtype) for of, dtype in zip(sizes, (np.int64, np.int32), strict=True) for n in of]
    HostLayout(*arrays).fill(batch.host_starts, batch.host_lengths, gap, size)
    starts, lengths, first_span, segments, span_protein = map(torch.from_numpy, arrays)
    tokens = torch.full((n_rows,), GAP, dtype=torch.uint8)
    tokens[: batch.n_rows] = batch.tokens
    device = PackedBatch.on_device(tokens, starts, lengths, gap, longest=n_rows)
    assert starts.tolist() == batch.starts.tolist() + [n_rows] * empty
    assert lengths.tolist() == batch.lengths.tolist() + [0] * empty
    assert segments.tolist() == device.segments.tolist() == batch.segments.tolist() + [-1] * more
    assert [x.tolist() for x in device.spans(size)] == [span_protein.tolist(), first_span.tolist()]
    given_layout = PackedBatch.on_device(
        tokens, starts, lengths, gap, n_rows, segments, {size: (span_protein, first_span)}
    )
    assert given_layout.segments is segments
    assert given_layout.spans(size)[0] is span_protein
    assert [x.tolist() for x in given_layout.spans(size + 1)] == [x.tolist() for x in device.spans(size + 1)]
