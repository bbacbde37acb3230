"""Every kernel against the float64 reference: all dtypes, odd lengths, all widths, poisoned memory, gradients."""

import sys

import pytest
import torch
from torch import Tensor

from proteinbert_fast import PackedBatch, ProteinBertConfig, Tokenizer
from proteinbert_fast.model import Block
from proteinbert_fast.ops import kernels, reference
from proteinbert_fast.ops.kernels.launching import DTYPES
from proteinbert_fast.ops.kernels.linear import linear
from proteinbert_fast.ops.kernels.local_block import CHANNELS, Configuration, launch
from proteinbert_fast.ops.reference import Embedded, GlobalTrack, LocalBlockWeights, Message

from .conftest import IS_INTERPRETED

# float32: rounding in 1,152-term sums of numbers near 1, then a norm. The others: a few times the distance between
# numbers near 4, because two or three rounded intermediates meet in a norm's output of that size.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06, torch.float16: 0.008}
LENGTHS = [(0,), (1, 1), (13, 0, 7), (61, 62, 63), (126, 127), (300, 1, 509), (520, 1030)]


def config_of(d_local: int) -> ProteinBertConfig:
    if d_local == 128:
        return ProteinBertConfig(n_annotations=3, n_blocks=1)
    return ProteinBertConfig(n_annotations=3, d_local=d_local, d_global=96, n_blocks=1, n_heads=2, d_key=32)


class Case:
    """One block's weights and inputs in a dtype, and the same in float64."""

    def __init__(self, config: ProteinBertConfig, residues, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.config = config
        self.block = Block(config)
        for name, p in self.block.named_parameters():
            torch.nn.init.normal_(p, std=1.0 if "norm" in name else 0.3 if p.dim() == 1 else p[0].numel() ** -0.5)
        self.block = self.block.to(device, dtype)
        self.exact = Block(config).to(device, torch.float64)
        self.exact.load_state_dict(self.block.state_dict())
        self.batch: PackedBatch = Tokenizer(gap=config.reach)(["M" * n for n in residues]).to(device)
        self.inside = (self.batch.segments >= 0).unsqueeze(-1)
        x = torch.randn(self.batch.n_rows, config.d_local)
        self.x = x.to(device, dtype) * self.inside
        self.word = torch.randn(len(self.batch), config.d_local).to(device, dtype)
        self.state = torch.randn(len(self.batch), config.d_global).to(device, dtype)
        self.message = Message(torch.randn(len(self.batch), config.n_heads * config.d_key).tanh().to(device), self.word)
        self.embedded = Embedded(self.batch.tokens, torch.randn(26, config.d_local).to(device, dtype))

    def local_block(self, keep_hidden: bool = True, x: Tensor | Embedded | None = None):
        x = self.x if x is None else x
        return kernels.local_block(x, self.word, self.batch, self.block.local_weights(), 5, keep_hidden)

    def global_track(self, local: Tensor, is_last: bool = False, return_attention: bool = True):
        following = None if is_last else self.block.message_weights()
        return kernels.global_track(
            local, self.state, self.message, self.batch, self.block.global_weights(), following, self.config.n_heads,
            return_attention,
        )  # fmt: skip

    def right_track(self, local: Tensor) -> GlobalTrack:
        """Everything, in float64."""
        weights, batch = self.exact.global_weights(), self.batch
        pooled, attention = reference.global_attention(
            local.double(), self.message.query.double(), batch.segments, weights.key_weight, weights.value_weight,
            self.config.n_heads, True,
        )  # fmt: skip
        states = reference.global_block(self.state.double(), pooled, weights.block)
        mean = reference.residue_mean(local.double(), batch.segments, batch.starts, batch.lengths)
        message = reference.message(states.global_state, self.exact.message_weights())
        return GlobalTrack(*states, message, attention, mean)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residues", LENGTHS, ids=str)
def test_equal_the_reference(residues, dtype, device):
    check(Case(config_of(128 if sum(residues) < 500 else 64), residues, dtype, device))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_local", CHANNELS)
def test_every_width(d_local, dtype, device):
    check(Case(config_of(d_local), (70, 3), dtype, device))


def check(case: Case) -> None:
    tolerance, dtype = TOLERANCE[case.x.dtype], case.x.dtype
    batch, exact = case.batch, case.exact
    with torch.no_grad():
        hidden, local = case.local_block()
        _, alone = case.local_block(keep_hidden=False)
        right = reference.local_block(case.x.double(), case.word.double(), batch.segments, exact.local_weights(), 5)
    close(hidden, right.hidden, tolerance)
    close(local, right.local, tolerance)
    assert torch.equal(alone, local)
    assert not hidden[~case.inside.squeeze(-1)].any()
    assert not local[~case.inside.squeeze(-1)].any()
    with torch.no_grad():
        hidden, first = case.local_block(x=case.embedded)
        rows = reference.embed_tokens(batch.tokens, case.embedded.weight.double())
        right = reference.local_block(rows, case.word.double(), batch.segments, exact.local_weights(), 5)
    close(hidden, right.hidden, tolerance)
    close(first, right.local, tolerance)
    assert not first[~case.inside.squeeze(-1)].any()
    with torch.no_grad():
        track, last = case.global_track(local), case.global_track(local, is_last=True, return_attention=False)
        means = kernels.residue_mean(local, batch)
        right_track = case.right_track(local)
    close(track.hidden, right_track.hidden, tolerance)
    close(track.global_state, right_track.global_state, tolerance)
    close(track.message.query, right_track.message.query, tolerance)
    close(track.message.broadcast, right_track.message.broadcast, tolerance)
    close(track.attention, right_track.attention, tolerance)
    close(last.residue_mean, right_track.residue_mean, 1e-5)
    close(means, right_track.residue_mean, 1e-5)
    assert torch.equal(last.hidden, track.hidden)
    assert torch.equal(last.global_state, track.global_state)
    assert (last.message, last.attention, track.residue_mean) == (None, None, None)
    given = (hidden, local, track.hidden, track.global_state, track.message.broadcast, track.attention)
    assert {t.dtype for t in given} == {dtype}
    assert {t.dtype for t in (track.message.query, last.residue_mean, means)} == {torch.float32}


@pytest.mark.slow
def test_a_long_protein_is_added_up_in_rounds(monkeypatch, device):
    """With spans of 16 rows, three at a time: 1,000 rows are four rounds, and leave no trace in their neighbours."""
    for name in ("global_attention", "global_track", "protein_sums"):
        module = sys.modules[f"proteinbert_fast.ops.kernels.{name}"]
        monkeypatch.setattr(module, "SPAN", 16)
    monkeypatch.setattr(sys.modules["proteinbert_fast.ops.kernels.global_attention"], "SPANS_AT_ONCE", 3)
    case = Case(config_of(32), (1000, 20, 60, 0), torch.float32, device)
    with torch.no_grad():
        _, local = case.local_block()
        track, last = case.global_track(local), case.global_track(local, is_last=True)
        right = case.right_track(local)
        means = kernels.residue_mean(local, case.batch)
        close(track.global_state, right.global_state, 2e-5)
        close(track.attention, right.attention, 2e-5)
        close(means, right.residue_mean, 1e-5)
        close(last.residue_mean, right.residue_mean, 1e-5)
        for i in range(1, 4):
            rows = slice(int(case.batch.starts[i]) - 20, int(case.batch.starts[i] + case.batch.lengths[i]) + 20)
            case_alone = Case(config_of(32), (1000, 20, 60, 0), torch.float32, device)
            case_alone.batch, case_alone.state = case.batch[i], case.state[i : i + 1]
            case_alone.message = Message(*(m[i : i + 1] for m in case.message))
            alone = case_alone.global_track(local[rows], is_last=True)
            assert torch.equal(alone.global_state[0], last.global_state[i])
            assert torch.equal(alone.residue_mean[0], last.residue_mean[i])
            assert torch.equal(kernels.residue_mean(local[rows], case.batch[i])[0], means[i])


@pytest.mark.slow
def test_lengths_1_to_300_tokens_densely(device):
    """In the interpreter the shortest and every fifth, which takes long enough."""
    sizes = {"d_local": 32, "d_global": 16, "n_blocks": 1, "n_heads": 1, "d_key": 16, "kernel_size": 3}
    residues = [*range(20), *range(20, 299, 5)] if IS_INTERPRETED else range(299)
    check(Case(ProteinBertConfig(n_annotations=3, **sizes), residues, torch.float32, device))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("residues", "dtype"),
    [
        pytest.param([34_350], torch.float32, id="longest protein, float32"),
        pytest.param([34_350], torch.bfloat16, id="longest protein, bfloat16"),
        pytest.param([i % 3 for i in range(1_500)], torch.bfloat16, id="1,500 proteins, bfloat16"),
        pytest.param(
            [i % 3 for i in range(10_000)],
            torch.bfloat16,
            id="10,000 proteins, bfloat16",
            marks=[pytest.mark.long] * IS_INTERPRETED,
        ),
    ],
)
def test_the_longest_protein_and_the_largest_batch(residues, dtype, device):
    """A small model and no more than a forward pass runs: programs take milliseconds in the interpreter."""
    sizes = {"d_local": 32, "d_global": 16, "n_blocks": 1, "n_heads": 1, "d_key": 16, "kernel_size": 3}
    case = Case(ProteinBertConfig(n_annotations=3, **sizes), residues, dtype, device)
    with torch.no_grad():
        _, local = case.local_block(keep_hidden=False)
        track, right_track = case.global_track(local, is_last=True, return_attention=False), case.right_track(local)
        right = reference.local_block(
            case.x.double(), case.word.double(), case.batch.segments, case.exact.local_weights(), 5
        )
    close(local, right.local, TOLERANCE[dtype])
    assert not local[~case.inside.squeeze(-1)].any()
    close(track.global_state, right_track.global_state, TOLERANCE[dtype])
    close(track.residue_mean, right_track.residue_mean, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_rounding_the_reference(dtype, device):
    """The reference with its own intermediates rounded to 16 bits is the measure; 1.3 times its error is allowed."""
    case = Case(config_of(128), (150, 40), dtype, device)
    with torch.no_grad():
        _, local = case.local_block()
        args = (case.x, case.word, case.batch.segments)
        exact = reference.local_block(*(a.double() for a in args[:2]), args[2], case.exact.local_weights(), 5).local
        rounded = reference.local_block(*args, case.block.local_weights(), 5).local
        embedded, broadcast, where = case.embedded, case.word, case.batch.segments
        _, first = case.local_block(x=embedded)
        rows = reference.embed_tokens(*embedded)
        exact_first = reference.local_block(
            rows.double(), broadcast.double(), where, case.exact.local_weights(), 5
        ).local
        rounded_first = reference.local_block(rows, broadcast, where, case.block.local_weights(), 5).local

    def error(states: Tensor, right: Tensor) -> float:
        return float((states.double() - right).square().mean().sqrt())

    assert error(local, exact) <= 1.3 * error(rounded, exact)
    assert error(first, exact_first) <= 1.3 * error(rounded_first, exact_first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descriptors_and_pointers_agree(dtype, device):
    case = Case(config_of(128), (200, 31), dtype, device)
    rows = 128 if dtype != torch.float32 else 64
    results = []
    for descriptors in (False, True):
        chosen = Configuration(rows, 32, 8, 2, descriptors, False)
        arguments = (
            case.x,
            None,
            case.word,
            case.batch.segments,
            list(case.block.local_weights()),
            case.batch.gap,
            5,
            True,
            False,
        )
        with torch.no_grad():
            results.append(launch(*arguments, chosen)[:2])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU: the interpreter's products are NumPy's")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configurations_give_the_same_bits(dtype, device):
    case = Case(config_of(128), (200, 31, 700), dtype, device)
    arguments = (
        case.x,
        None,
        case.word,
        case.batch.segments,
        list(case.block.local_weights()),
        case.batch.gap,
        5,
        True,
        False,
    )
    with torch.no_grad():
        results = [
            launch(*arguments, Configuration(rows, 32, warps, 2, False, False))[:2]
            for rows, warps in ((32, 4), (64, 4), (64, 8), (128, 8))
        ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_none_stay_in_their_protein(value, dtype, device):
    case = Case(config_of(32), (50, 50), dtype, device)
    place = int(case.batch.starts[1]) + 7
    case.x[place, 3] = value
    with torch.no_grad():
        _, local = case.local_block()
        states = case.global_track(local).global_state
    assert local[place].isnan().all()
    assert case.batch.unpack(local)[0].isfinite().all()
    assert states[0].isfinite().all()
    assert states[1].isnan().all()


@pytest.mark.parametrize("activation", ["none", "gelu", "tanh", "sigmoid", "softmax"])
@pytest.mark.parametrize(("rows", "inputs", "columns"), [(0, 16, 3), (1, 64, 26), (17, 100, 65), (40, 33, 200)])
def test_linear(rows, inputs, columns, activation, device):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s).to(device) for s in ((rows, inputs), (columns, inputs), (columns,)))
    functions = {"gelu": reference.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
    plain = functions.get(activation, lambda t: t.softmax(-1) if activation == "softmax" else t)
    if activation == "softmax" and columns > 64:
        with pytest.raises(ValueError, match="a softmax takes at most 64 columns"):
            linear(x, weight, bias, activation)
        return
    for b in (None, bias):
        right = plain(torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double()))
        close(linear(x, weight, b, activation), right, 2e-5)


def test_an_unknown_activation_is_refused(device):
    x = torch.zeros(1, 16, device=device)
    with pytest.raises(ValueError, match="'relu' is unknown; choose one of none, gelu"):
        linear(x, x, None, "relu")


def test_activations_to_float32_precision(device):
    steps = torch.linspace(-30, 30, 20_000, dtype=torch.float64).view(-1, 16)
    one = torch.eye(16, device=device)
    for name, plain in (("gelu", reference.gelu), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid)):
        x = steps.float().to(device)
        close(linear(x, one, None, name), plain(x.double()), 1e-6)
    ends = torch.tensor([[float("inf")], [float("-inf")], [float("nan")]], device=device)
    got = linear(ends, torch.ones(1, 1, device=device), None, "gelu")
    assert got.isnan().flatten().tolist() == [False, True, True]
    assert got[0] == float("inf")


def test_operators_are_described_rightly(device):
    """Fake implementations, schemas and aliasing, as torch.compile and torch.export rely on."""
    case = Case(config_of(32), (5, 9), torch.float32, device)
    batch, operators = case.batch, torch.ops.proteinbert_fast
    local_weights = [w.detach() for w in case.block.local_weights()]
    key, value, block = case.block.global_weights()
    track = [w.detach() for w in (key, value, *block)]
    message = [w.detach() for w in case.block.message_weights()]
    query, table, tokens, word = case.message.query, case.embedded.weight, case.embedded.tokens, case.word
    spans, tiles = batch.spans(512), batch.spans(64)
    places = (batch.segments, batch.starts, batch.lengths, *spans)
    rows = (batch.starts, batch.lengths, batch.segments, *spans, *tiles)
    calls = [
        (operators.local_block, (case.x, None, word, *places, local_weights, 20, 5, 11, True, True)),
        (operators.local_block, (table, tokens, word, *places, local_weights, 20, 5, 11, False, False)),
        (operators.linear, (case.state, message[0], None, "tanh", torch.float32, False)),
        (operators.residue_mean, (case.x, batch.segments, batch.starts, batch.lengths, batch.longest)),
        (operators.global_track, (case.x, case.state, query, track, *rows, 2, 11, False, True)),
        (operators.global_track, (case.x, case.state, query, track + message, *rows, 2, 11, True, False)),
        # Without gradients, no table of tiles is made.
        (operators.global_track, (case.x, case.state, query, track, *rows[:5], *spans, 2, 11, False, False)),
    ]
    for saved in (torch.randn_like(case.x), case.x.new_empty(0, 32)):
        arguments = (case.x, None, case.x, None, saved, saved.clone(), word, *places, local_weights, 20, 5, 11)
        calls.append((operators.local_block_backward, arguments))
    saved = torch.randn_like(case.x)
    for x, of_x in ((table, tokens), (turned(table), tokens), (turned(case.x), None)):
        arguments = (case.x, None, x, of_x, saved, saved.clone(), turned(word), *places, local_weights, 20, 5, 11)
        calls.append((operators.local_block_backward, arguments))
    for following in ([], message):
        inputs = (case.x, case.state, query, track + following, *rows, 2, 11, False, True)
        hidden, out, next_query, next_word, mean, _, pooled, denominator = operators.global_track(*inputs)
        d_mean = None if following else mean
        for local, state, asked in (
            (case.x, case.state, query), (turned(case.x), turned(case.state), turned(query)),
        ):  # fmt: skip
            arguments = (
                hidden, out, next_query if following else None, next_word if following else None, d_mean, local, state,
                asked, hidden, out, next_query, pooled, denominator, track + following, batch.starts, batch.lengths,
                *spans, *tiles, 2, 11,
            )  # fmt: skip
            calls.append((operators.global_track_backward, arguments))
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def turned(x: Tensor) -> Tensor:
    """The same with the strides of a transposed tensor."""
    return x.t().contiguous().t()


def test_weights_of_another_layout_are_taken(device):
    """Transposed storage, as some checkpoints and compilers leave it."""
    case = Case(config_of(32), (40,), torch.float32, device)
    weights = case.block.local_weights()
    turned = LocalBlockWeights(*(w.detach().t().contiguous().t() if w.dim() == 2 else w.detach() for w in weights))
    with torch.no_grad():
        a = kernels.local_block(case.x, case.word, case.batch, weights, 5)[1]
        b = kernels.local_block(case.x, case.word, case.batch, turned, 5)[1]
    assert torch.equal(a, b)
