"""Every kernel against the float64 reference: all dtypes, odd lengths, all widths, poisoned memory, gradients."""

import pytest
import torch
from torch import Tensor

from proteinbert_fast import PackedBatch, ProteinBertConfig, Tokenizer
from proteinbert_fast.model import Block
from proteinbert_fast.ops import kernels, reference
from proteinbert_fast.ops.kernels.launching import DTYPES
from proteinbert_fast.ops.kernels.linear import linear
from proteinbert_fast.ops.kernels.local_block import CHANNELS, Configuration, launch
from proteinbert_fast.ops.reference import LocalBlockWeights

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
        self.batch: PackedBatch = Tokenizer()(["M" * n for n in residues]).to(device)
        self.inside = (self.batch.segments >= 0).unsqueeze(-1)
        x = torch.randn(self.batch.n_rows, config.d_local)
        self.x = x.to(device, dtype) * self.inside
        self.word = torch.randn(len(self.batch), config.d_local).to(device, dtype)
        self.state = torch.randn(len(self.batch), config.d_global).to(device, dtype)

    def attention_weights(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        return block.query.weight, block.key.weight, block.value.weight

    def local_block(self, keep_hidden: bool = True):
        return kernels.local_block(self.x, self.word, self.batch, self.block.local_weights(), 5, keep_hidden)

    def global_attention(self, local: Tensor, return_weights: bool = True):
        weights = self.attention_weights(self.block)
        return kernels.global_attention(local, self.state, self.batch, *weights, self.config.n_heads, return_weights)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance, rtol=tolerance)


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
    tolerance = TOLERANCE[case.x.dtype]
    batch, exact = case.batch, case.exact
    with torch.no_grad():
        hidden, local = case.local_block()
        _, alone = case.local_block(keep_hidden=False)
        right = reference.local_block(case.x.double(), case.word.double(), batch.segments, exact.local_weights(), 5)
        attended = case.global_attention(local)
        unweighted = case.global_attention(local, return_weights=False)
        weights = case.attention_weights(exact)
        right_attended = reference.global_attention(
            local.double(), case.state.double(), batch.segments, *weights, case.config.n_heads, True
        )
        states = kernels.global_block(case.state, attended.pooled, case.block.global_weights())
        right_states = reference.global_block(case.state.double(), attended.pooled.double(), exact.global_weights())
        word = kernels.broadcast_global(case.state, case.block.broadcast.weight, case.block.broadcast.bias)
        right_word = reference.broadcast_global(case.state.double(), exact.broadcast.weight, exact.broadcast.bias)
    close(hidden, right.hidden, tolerance)
    close(local, right.local, tolerance)
    assert torch.equal(alone, local)
    assert not hidden[~case.inside.squeeze(-1)].any()
    assert not local[~case.inside.squeeze(-1)].any()
    close(attended.pooled, right_attended.pooled, tolerance)
    close(attended.weights, right_attended.weights, tolerance)
    assert torch.equal(unweighted.pooled, attended.pooled)
    assert unweighted.weights is None
    close(states.hidden, right_states.hidden, tolerance)
    close(states.global_state, right_states.global_state, tolerance)
    close(word, right_word, tolerance)
    assert {t.dtype for t in (hidden, local, *attended, *states, word)} == {case.x.dtype}


def test_lengths_1_to_300_tokens_densely(device):
    """In the interpreter the shortest and every fifth, which takes long enough."""
    sizes = {"d_local": 32, "d_global": 16, "n_blocks": 1, "n_heads": 1, "d_key": 16, "kernel_size": 3}
    residues = [*range(20), *range(20, 299, 5)] if IS_INTERPRETED else range(299)
    check(Case(ProteinBertConfig(n_annotations=3, **sizes), residues, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_rounding_the_reference(dtype, device):
    """The reference with its own intermediates rounded to 16 bits is the measure; 1.3 times its error is allowed."""
    case = Case(config_of(128), (150, 40), dtype, device)
    with torch.no_grad():
        _, local = case.local_block()
        args = (case.x, case.word, case.batch.segments)
        exact = reference.local_block(*(a.double() for a in args[:2]), args[2], case.exact.local_weights(), 5).local
        rounded = reference.local_block(*args, case.block.local_weights(), 5).local
    ours, theirs = ((t.double() - exact).square().mean().sqrt() for t in (local, rounded))
    assert ours <= 1.3 * theirs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descriptors_and_pointers_agree(dtype, device):
    case = Case(config_of(128), (200, 31), dtype, device)
    rows = 128 if dtype != torch.float32 else 64
    results = []
    for descriptors in (False, True):
        chosen = Configuration(rows, 32, 8, 2, descriptors, False)
        arguments = (case.x, case.word, case.batch.segments, list(case.block.local_weights()), case.batch.gap, 5, True)
        with torch.no_grad():
            results.append(launch(*arguments, chosen))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU: the interpreter's products are NumPy's")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_configurations_give_the_same_bits(dtype, device):
    case = Case(config_of(128), (200, 31, 700), dtype, device)
    arguments = (case.x, case.word, case.batch.segments, list(case.block.local_weights()), case.batch.gap, 5, True)
    with torch.no_grad():
        results = [
            launch(*arguments, Configuration(rows, 32, warps, 2, False, False))
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
        pooled = case.global_attention(local).pooled
        states = kernels.global_block(case.state, pooled, case.block.global_weights()).global_state
    assert local[place].isnan().all()
    assert case.batch.unpack(local)[0].isfinite().all()
    assert pooled[0].isfinite().all()
    assert pooled[1].isnan().all()
    assert states[0].isfinite().all()
    assert states[1].isnan().all()


@pytest.mark.parametrize("activation", ["none", "gelu", "tanh", "sigmoid"])
@pytest.mark.parametrize(("rows", "inputs", "columns"), [(0, 16, 3), (1, 64, 26), (17, 100, 65), (40, 33, 200)])
def test_linear(rows, inputs, columns, activation, device):
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s).to(device) for s in ((rows, inputs), (columns, inputs), (columns,)))
    plain = {"none": lambda t: t, "gelu": reference.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}[activation]
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


def test_gradients_are_those_of_the_reference(device):
    case = Case(config_of(32), (0, 5, 80), torch.float32, device)

    def gradients(operations, block, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (case.x, case.word, case.state)]
        rows, word, state = leaves
        block.zero_grad()
        weights = case.attention_weights(block)
        where = case.batch if operations is kernels else case.batch.segments
        hidden, local = operations.local_block(
            rows * case.inside, word, where, block.local_weights(), 5, *([True] if operations is kernels else [])
        )
        attended = operations.global_attention(local, state, where, *weights, 2, True)
        states = operations.global_block(state, attended.pooled, block.global_weights())
        spoken = operations.broadcast_global(states.global_state, block.broadcast.weight, block.broadcast.bias)
        torch.manual_seed(1)
        parts = (hidden, attended.weights, states.hidden, spoken)
        sum((part * torch.randn(part.shape, dtype=torch.float64).to(device)).sum() for part in parts).backward()
        return {name: p.grad for name, p in block.named_parameters()} | {f"{i}": t.grad for i, t in enumerate(leaves)}

    ours, exact = gradients(kernels, case.block, torch.float32), gradients(reference, case.exact, torch.float64)
    assert ours.keys() == exact.keys()
    for name, gradient in exact.items():
        close(ours[name] / gradient.abs().max(), gradient / gradient.abs().max(), 2e-5)


def test_operators_are_described_rightly(device):
    """Fake implementations, schemas and aliasing, as torch.compile and torch.export rely on."""
    case = Case(config_of(32), (5, 9), torch.float32, device)
    weights = [w.detach() for w in case.block.local_weights()]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.proteinbert_fast.local_block.default,
        (case.x, case.word, case.batch.segments, weights, case.batch.gap, 5, True),
        test_utils=checks,
    )
    q, k, v = (w.detach() for w in case.attention_weights(case.block))
    query = linear(case.state, q, None, "tanh", torch.float32)
    batch = case.batch
    torch.library.opcheck(
        torch.ops.proteinbert_fast.global_attention.default,
        (case.x, query, k, v, batch.starts, batch.lengths, batch.segments, *batch.spans(512), 2, True),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.proteinbert_fast.global_track.default,
        (case.state, case.state, [w.detach() for w in case.block.global_weights()]),
        test_utils=checks,
    )
    torch.library.opcheck(
        torch.ops.proteinbert_fast.linear.default,
        (case.state, q, None, "tanh", torch.float32),
        test_utils=checks,
    )


def test_weights_of_another_layout_are_taken(device):
    """Transposed storage, as some checkpoints and compilers leave it."""
    case = Case(config_of(32), (40,), torch.float32, device)
    weights = case.block.local_weights()
    turned = LocalBlockWeights(*(w.detach().t().contiguous().t() if w.dim() == 2 else w.detach() for w in weights))
    with torch.no_grad():
        a = kernels.local_block(case.x, case.word, case.batch, weights, 5)[1]
        b = kernels.local_block(case.x, case.word, case.batch, turned, 5)[1]
    assert torch.equal(a, b)
