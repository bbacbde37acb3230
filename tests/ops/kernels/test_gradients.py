"""Gradients of every kernel against float64 autograd of the reference: dtypes, widths, odd lengths, poisoned memory."""

import sys

import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops import backends, kernels, reference
from proteinbert_fast.ops.kernels.launching import DTYPES
from proteinbert_fast.ops.kernels.linear import linear
from proteinbert_fast.ops.reference import Embedded, Message

from .conftest import IS_INTERPRETED
from .test_operations import Case, config_of

# Of the largest number of each gradient. float32: rounding in sums of a thousand terms and more. The others: states and
# the gradients on the way are rounded to 8 or 11 bits a few times over; sums are kept in float32.
TOLERANCE = {torch.float32: 4e-5, torch.bfloat16: 0.06, torch.float16: 0.008}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def gradients(case: Case, operations, block, dtype, *, is_last=False, save="preactivations", first_only=False):
    """Of a sum of everything that two local blocks, the first from tokens, and a global track give."""
    batch = case.batch
    parts = (case.embedded.weight, case.word, case.state, case.message.query)
    leaves = [t.detach().to(dtype if i < 3 else max(dtype, torch.float32, key=lambda d: d.itemsize)).requires_grad_()
              for i, t in enumerate(parts)]  # fmt: skip
    table, word, state, query = leaves
    block.zero_grad()
    weights, following = block.local_weights(), None if is_last else block.message_weights()
    embedded = Embedded(batch.tokens, table)
    hidden, local = operations.local_block(embedded, word, batch, weights, 5, True, save)
    made = [hidden, local]
    if not first_only:
        hidden, local = operations.local_block(local, word, batch, weights, 5, True, save)
        message = Message(query, word)
        track = operations.global_track(
            local, state, message, batch, block.global_weights(), following, case.config.n_heads
        )
        made += [hidden, local, track.hidden, track.global_state, *(track.message or ())]
        if is_last:
            made.append(operations.residue_mean(local, batch) if track.residue_mean is None else track.residue_mean)
    generator = torch.Generator().manual_seed(1)
    looked_at = [torch.randn(m.shape, dtype=torch.float64, generator=generator).to(m.device) for m in made]
    # Numbers that 16 bits can hold exactly, so that both sides start from the same.
    sum((m * seen.bfloat16().to(m.dtype)).sum() for m, seen in zip(made, looked_at, strict=True)).backward()
    named = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return named | {n: t.grad for n, t in zip(("table", "word", "state", "query"), leaves, strict=True)}


def check(case: Case, **options) -> None:
    dtype = case.x.dtype
    ours = gradients(case, backends._triton(), case.block, dtype, **options)
    exact = gradients(case, backends.REFERENCE, case.exact, torch.float64, **options)
    wanted = {name for name, g in exact.items() if g is not None}
    assert {name for name, g in ours.items() if g is not None} == wanted
    for name in wanted:
        size = exact[name].abs().max().clamp(min=1e-12)
        error = float(((ours[name].double() - exact[name]) / size).abs().max())
        assert error <= TOLERANCE[dtype], f"{name} is off by {error:.1e} of its largest"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("residues", "is_last"),
    [((0,), False), ((13, 0, 7), True), ((126, 31), False), ((520, 1), True)],
    ids=str,
)
def test_equal_the_reference(residues, is_last, dtype, device):
    check(Case(config_of(64 if sum(residues) > 100 else 32), residues, dtype, device), is_last=is_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_local", [128, 256])
def test_wide_states(d_local, dtype, device):
    check(Case(config_of(d_local), (70, 3), dtype, device))


@pytest.mark.parametrize(
    ("n_heads", "d_key", "d_global", "dtype"),
    [
        (3, 48, 144, torch.float32),
        (1, 16, 256, torch.bfloat16),
        (6, 32, 192, torch.bfloat16),
        (4, 16, 64, torch.float32),
        (2, 128, 64, torch.bfloat16),
        (3, 80, 96, torch.float32),
    ],
)
def test_heads_of_any_size(n_heads, d_key, d_global, dtype, device):
    """Groups of heads' keys, keys that fill no tile, values in several parts: programs of the weights' gradients."""
    config = ProteinBertConfig(n_annotations=3, d_local=32, d_global=d_global, n_blocks=1, n_heads=n_heads, d_key=d_key)
    check(Case(config, (70, 3), dtype, device))


def test_gap_rows_get_zeros(device):
    case = Case(config_of(32), (5, 600, 511, 40), torch.float32, device)
    x = case.x.clone().requires_grad_()
    track = case.global_track(x, return_attention=False)
    (track.global_state.sum() + track.message.query.sum()).backward()
    assert torch.equal(x.grad.any(dim=1), case.inside[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_the_plain_operations_in_16_bits(dtype, device):
    case = Case(config_of(64), (150, 40), dtype, device)
    exact = gradients(case, backends.REFERENCE, case.exact, torch.float64)
    plain = gradients(case, backends.REFERENCE, case.block, dtype)
    errors = []
    plain = {name: (g.double() - exact[name]).square().mean().sqrt() for name, g in plain.items()}
    ours = gradients(case, backends._triton(), case.block, dtype)
    for name, g in ours.items():
        errors.append(float((g.double() - exact[name]).square().mean().sqrt() / plain[name]))
        assert errors[-1] <= 2, f"{name}: {errors[-1]:.2f} times the error of the plain operations"
    assert sorted(errors)[len(errors) // 2] <= 1.3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saving_inputs_alone_gives_the_same_bits(dtype, device):
    case = Case(config_of(32), (70, 3), dtype, device)
    kept = gradients(case, backends._triton(), case.block, dtype)
    kept = {name: g.clone() for name, g in kept.items()}
    computed = gradients(case, backends._triton(), case.block, dtype, save="inputs")
    assert kept.keys() == computed.keys()
    for name, gradient in kept.items():
        assert torch.equal(gradient, computed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("save", "most"), [("preactivations", 8 * 1024), ("inputs", 3 * 1024)])
def test_what_is_kept_for_the_backward_pass(save, most, device):
    """Bytes per residue at the published width, in bfloat16, weights left out."""
    config = ProteinBertConfig(n_annotations=3)
    model = ProteinBert(config, backend="triton", save=save).to(device, torch.bfloat16)
    batch = Tokenizer()(["M" * 300]).to(device)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = model(batch)
    by_protein = 3 * 300 * 64 + 40_000  # states and sums of a protein, which do not grow with its length
    per_residue = (sum(kept.values()) - by_protein) / 300
    expected = 256 * 5 + (512 * 6 if save == "preactivations" else 0)
    assert expected * 0.8 <= per_residue <= expected * 1.25 <= most
    assert out.local_rows.requires_grad


@pytest.mark.slow
def test_long_proteins_are_added_up_in_rounds(monkeypatch, device):
    for name in ("global_attention", "global_track", "local_block", "protein_sums", "global_attention_backward"):
        __import__(f"proteinbert_fast.ops.kernels.{name}")
        monkeypatch.setattr(sys.modules[f"proteinbert_fast.ops.kernels.{name}"], "SPAN", 16)
    monkeypatch.setattr(sys.modules["proteinbert_fast.ops.kernels.global_attention"], "SPANS_AT_ONCE", 3)
    for is_last in (False, True):
        check(Case(config_of(32), (400, 20, 60, 0), torch.float32, device), is_last=is_last)


def test_what_needs_no_gradient_gets_none(device):
    case = Case(config_of(32), (5, 40), torch.float32, device)
    case.block.requires_grad_(False)
    word = case.word.clone().requires_grad_()
    _, local = kernels.local_block(case.x, word, case.batch, case.block.local_weights(), 5)
    local.sum().backward()
    assert word.grad is not None
    assert all(p.grad is None for p in case.block.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "tanh", "sigmoid", "softmax"])
def test_linear_layers(activation, dtype, device):
    torch.manual_seed(0)
    shapes = ((40, 33), (26, 33), (26,))
    ours = [torch.randn(*s).to(device, dtype).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in ours]
    seen = torch.randn(40, 26).to(device, dtype)
    (linear(*ours, activation, torch.float32) * seen).sum().backward()
    plain = {"gelu": reference.gelu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softmax": lambda t: t.softmax(-1)}
    result = torch.nn.functional.linear(*exact)
    (plain.get(activation, lambda t: t)(result) * seen.double()).sum().backward()
    for a, b in zip(ours, exact, strict=True):
        error = float((a.grad.double() - b.grad).abs().max() / b.grad.abs().max())
        assert error <= (1e-5 if dtype == torch.float32 else 0.02)


def test_residue_means(device):
    case = Case(config_of(32), (5, 0, 600), torch.float32, device)
    x, exact = (case.x.clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    seen = torch.randn(3, 32).to(device)
    (kernels.residue_mean(x, case.batch) * seen).sum().backward()
    (backends.REFERENCE.residue_mean(exact, case.batch) * seen.double()).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-7, rtol=1e-5)


def test_twice_through_one_module_and_twice_backward(device):
    case = Case(config_of(32), (5, 40), torch.float32, device)
    weights = case.block.local_weights()
    _, once = kernels.local_block(case.embedded, case.word, case.batch, weights, 5)
    _, twice = kernels.local_block(once, case.word, case.batch, weights, 5)
    twice.square().sum().backward(retain_graph=True)
    first = case.block.narrow_conv.weight.grad.clone()
    twice.square().sum().backward()
    torch.testing.assert_close(case.block.narrow_conv.weight.grad, 2 * first)


def test_attention_weights_have_gradients_too(device):
    case = Case(config_of(32), (5, 40), torch.float32, device)
    for operations, block in ((backends._triton(), case.block), (backends.REFERENCE, case.exact)):
        block.zero_grad()
        dtype = block.key.weight.dtype
        message = Message(case.message.query.to(dtype), case.word.to(dtype))
        x = case.x.to(dtype)
        track = operations.global_track(
            x, case.state.to(dtype), message, case.batch, block.global_weights(), None, 2, True
        )
        (track.attention.square().sum() + track.global_state.sum()).backward()
    right = case.exact.key.weight.grad
    torch.testing.assert_close(case.block.key.weight.grad.double(), right, atol=2e-5 * float(right.abs().max()), rtol=0)


def test_an_unknown_choice_of_what_to_save_is_refused():
    with pytest.raises(InputError, match="save 'all' is unknown; choose one of preactivations, inputs"):
        ProteinBert(save="all")


@pytest.mark.skipif(IS_INTERPRETED, reason="needs a GPU: the interpreter has one program at a time")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_in_every_run(dtype, device):
    case = Case(config_of(128), (700, 3, 2000, 41), dtype, device)
    kept = gradients(case, backends._triton(), case.block, dtype)
    kept = {name: g.clone() for name, g in kept.items()}
    for _ in range(3):
        again = gradients(case, backends._triton(), case.block, dtype)
        for name, gradient in kept.items():
            assert torch.equal(gradient, again[name]), name
