"""The losses of a model's output: the original's golden numbers, both forms, every way to give targets."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from proteinbert_fast import InputError, PackedBatch, ProteinBert, Tokenizer
from proteinbert_fast.checkpoints.layouts import weight_layouts
from proteinbert_fast.ops import reference
from proteinbert_fast.pretraining.corruption import corrupt_annotations, corrupt_tokens
from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
from proteinbert_fast.pretraining.optimizers import KerasAdam, Lamb, check_gradients
from tests.test_golden import BACKENDS, as_tensor

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "M", "ACDEFGHIKLMNPQRSTVWY" * 3]


def golden_losses(model: ProteinBert, golden) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = model.token_embedding.weight.dtype
    device = model.token_embedding.weight.device

    def given(key: str) -> torch.Tensor:
        return as_tensor(golden[f"batch_{key}"]).to(device)

    out = model(given("x_tokens"), given("x_annotations").to(dtype))
    return (
        token_loss(out, given("y_tokens")[..., 0], given("w_seq")),
        annotation_loss(out, given("y_annotations"), given("w_annotations")),
    )


def check_golden(model: ProteinBert, golden) -> None:
    """Losses and gradients of all weights are those of the original, float32's rounding aside."""
    is_double = model.token_embedding.weight.dtype == torch.float64
    pair = golden_losses(model, golden)
    ours = [sum(pair).item(), *(loss.item() for loss in pair)]
    np.testing.assert_allclose(ours, golden["loss_total_seq_annotations"], rtol=1e-9 if is_double else 3e-7)
    sum(pair).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    offsets, index = golden["grad_sample_offsets"], golden["grad_sample_index"]
    rtol = 2e-7 if is_double else 3e-5  # as in test_golden, whose reasons these are
    for i, layout in enumerate(weight_layouts(model.config)):
        sample = slice(offsets[i], offsets[i + 1])
        found = layout.to_official(gradients[layout.key]).astype(np.float64).ravel()[index[sample]]
        np.testing.assert_allclose(
            found, golden["grad_sample_value"][sample], atol=rtol * golden["grad_maxabs"][i], rtol=rtol
        )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_golden(tiny_model, golden, backend, dtype):
    tiny_model.backend = backend
    check_golden(tiny_model.to(dtype), golden)


def test_golden_from_what_the_batch_shows(tiny_model, golden):
    """Default weights are the original's, but for held-out proteins; so are the loss's parts by token and protein."""
    out = tiny_model(as_tensor(golden["batch_x_tokens"]), as_tensor(golden["batch_x_annotations"]).float())
    tokens, terms = as_tensor(golden["batch_y_tokens"])[..., 0], as_tensor(golden["batch_y_annotations"])
    by_token = as_tensor(golden["loss_ce_per_token"])
    counts = as_tensor(golden["batch_w_seq"]).float()
    assert torch.equal(counts, (tokens != 25).float())
    torch.testing.assert_close(token_loss(out, tokens).item(), (counts * by_token).mean().item(), rtol=1e-6, atol=0)
    mean = ((counts * by_token).sum() / counts.sum()).item()
    torch.testing.assert_close(token_loss(out, tokens, form="weighted_mean").item(), mean, rtol=1e-6, atol=0)
    held_out = as_tensor(golden["batch_test_set_mask"]).bool()
    known = terms.any(1) & ~held_out
    assert torch.equal(known.int(), as_tensor(golden["batch_w_annotations"]).int())
    by_protein = as_tensor(golden["loss_bce_per_protein"])
    for form, mean in (
        ("original", (terms.any(1) * by_protein).mean()),
        ("weighted_mean", by_protein[terms.any(1)].mean()),
    ):
        torch.testing.assert_close(annotation_loss(out, terms, form=form).item(), mean.item(), rtol=1e-6, atol=0)


@pytest.fixture(params=["reference", "cpu"])
def model(request, small_model) -> ProteinBert:
    small_model.backend = request.param
    return small_model


def by_hand(out, targets: list[torch.Tensor]) -> list[torch.Tensor]:
    """Cross entropies of each protein's tokens."""
    logits = out.batch.unpack(out.token_logits)
    return [F.cross_entropy(a, b.long(), reduction="none") for a, b in zip(logits, targets, strict=True)]


def test_token_loss_of_a_packed_batch(model):
    clean = Tokenizer()(SEQUENCES)
    noisy = corrupt_tokens(clean, range(3), seed=0, step=0, probability=0.3)
    out = model(noisy)
    targets = clean.unpack(clean.tokens)
    entropies = torch.cat(by_hand(out, targets))
    for given in (clean, clean.tokens, clean.tokens.long()):
        torch.testing.assert_close(token_loss(out, given), entropies.mean())
        torch.testing.assert_close(token_loss(out, given, form="weighted_mean"), entropies.mean())
    torch.testing.assert_close(token_loss(out, clean, length=64), entropies.sum() / (3 * 64))
    # By default PAD does not count; by weights, what they say; gap rows never.
    padded = clean.with_tokens(torch.where(clean.tokens == 10, 25, clean.tokens))
    counts = torch.cat(padded.unpack(padded.tokens)) != 25
    assert not counts.all()
    torch.testing.assert_close(token_loss(out, padded), entropies[counts].sum() / len(counts))
    torch.testing.assert_close(token_loss(out, padded, form="weighted_mean"), entropies[counts].mean())
    weights = torch.rand(clean.n_rows)
    used = torch.cat(clean.unpack(weights))
    torch.testing.assert_close(
        token_loss(out, clean, weights, form="weighted_mean"), (used * entropies).sum() / used.sum()
    )
    nothing = token_loss(out, clean, torch.zeros(clean.n_rows), form="weighted_mean")
    assert nothing.item() == 0


def test_a_padded_batch_has_the_loss_of_the_packed_one(model):
    batch = Tokenizer()(SEQUENCES)
    padded = batch.to_padded()
    out, packed = model(padded, lengths=batch.lengths), model(batch)
    torch.testing.assert_close(token_loss(out, padded, form="weighted_mean"), token_loss(packed, batch))
    b, length = padded.shape
    torch.testing.assert_close(token_loss(out, padded), token_loss(packed, batch, length=length))
    weights = torch.rand(b, length)
    torch.testing.assert_close(
        token_loss(out, padded.int(), weights), token_loss(packed, batch, batch.rows_of_padded(weights), length=length)
    )
    terms = torch.rand(b, 30) < 0.1
    torch.testing.assert_close(annotation_loss(out, terms), annotation_loss(packed, terms))


@pytest.mark.parametrize("terms", [[[3, 7], [], [29]], [[], [1, 2], []], [[], [], []]], ids=str)
def test_annotation_loss(model, terms):
    out = model(Tokenizer()(SEQUENCES))
    dense = torch.zeros(3, 30)
    for i, some in enumerate(terms):
        dense[i, some] = 1
    offsets = torch.tensor(np.cumsum([0, len(terms[0]), len(terms[1])]))
    sparse = (torch.tensor([t for some in terms for t in some], dtype=torch.int64), offsets)
    entropy = F.binary_cross_entropy_with_logits(out.go_logits, dense, reduction="none")
    known, u, w = dense.any(1).float(), torch.rand(30), torch.rand(3)
    for given in (sparse, (sparse[0].int(), offsets.int()), dense, dense.bool()):
        torch.testing.assert_close(annotation_loss(out, given), (known * entropy.mean(1)).sum() / 3)
        mean = (known * entropy.mean(1)).sum() / max(float(known.sum()), 1)
        torch.testing.assert_close(annotation_loss(out, given, form="weighted_mean"), mean)
        torch.testing.assert_close(
            annotation_loss(out, given, w, term_weights=u, form="weighted_mean"),
            (w * (u * entropy).mean(1)).sum() / w.sum(),
        )


def test_frozen_parts_and_gradients(model):
    """The states' gradient reaches the trunk where the heads are frozen, and the heads' where the trunk is."""
    batch, terms = Tokenizer()(SEQUENCES), torch.rand(3, 30) < 0.2
    heads = ("token_head", "annotation_head")
    given = torch.ones(3, 30)
    out = model(batch, given)
    plain = reference.token_loss(torch.cat(out.batch.unpack(out.token_logits)), torch.cat(batch.unpack(batch.tokens)),
                                 torch.ones(batch.n_tokens))  # fmt: skip
    (plain + reference.annotation_loss(out.go_logits, terms, terms.any(1).float())).backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    for frozen in ("heads", "trunk"):
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(name.startswith(heads) == (frozen == "trunk"))
        out = model(batch, given)
        (token_loss(out, batch) + annotation_loss(out, terms)).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, exact[name], atol=1e-6, rtol=1e-5)
            else:
                assert p.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(model, dtype):
    batch, terms = Tokenizer()(SEQUENCES), torch.rand(3, 30) < 0.2
    if dtype == torch.float16:
        model.backend = "reference"  # the CPU kernels have no float16
    exact = token_loss(model(batch), batch), annotation_loss(model(batch), terms)
    with torch.autocast("cpu", dtype):
        out = model(batch)
    ours = token_loss(out, batch), annotation_loss(out, terms)
    assert {t.dtype for t in ours} == {torch.float32}
    sum(ours).backward()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=0)


def test_compiles_with_the_model_as_one_graph(small_model):
    batch = Tokenizer()(SEQUENCES)
    terms = (torch.tensor([3, 7, 29]), torch.tensor([0, 2, 2]))
    batch.segments  # noqa: B018  made once, then kept

    def losses() -> torch.Tensor:
        out = small_model(batch)
        return token_loss(out, batch) + annotation_loss(out, terms)

    compiled = torch.compile(losses, backend="aot_eager", fullgraph=True)()
    plain = losses()
    torch.testing.assert_close(compiled, plain)
    compiled.backward()
    assert all(p.grad.isfinite().all() for p in small_model.parameters() if p.grad is not None)


def test_losses_of_a_compiled_model(small_model):
    batch, terms = Tokenizer()(SEQUENCES), torch.rand(3, 30) < 0.2
    compiled = torch.compile(small_model, backend="aot_eager", fullgraph=True)
    gradients = []
    for model in (small_model, compiled):
        small_model.zero_grad()
        out = model(batch)
        (token_loss(out, batch) + annotation_loss(out, terms)).backward()
        gradients.append([p.grad.clone() for p in small_model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        # The compiled model runs the plain operations, the other the CPU kernels: rounding, of the largest entry.
        torch.testing.assert_close(a, b, atol=1e-4 * float(a.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", [Lamb, KerasAdam])
def test_a_few_steps_learn_a_few_proteins(small_model, kind):
    """Losses, optimiser and corruption together: both losses fall by more than half."""
    clean, terms = Tokenizer()(SEQUENCES), (torch.tensor([3, 7, 29]), torch.tensor([0, 2, 2]))
    optimizer, losses = kind(small_model.parameters(), lr=1e-2), []
    for step in range(60):
        shown = corrupt_annotations(terms, 30, range(3), seed=0, step=step)
        out = small_model(corrupt_tokens(clean, range(3), seed=0, step=step), shown)
        both = token_loss(out, clean), annotation_loss(out, terms, form="weighted_mean")
        losses.append([loss.item() for loss in both])
        optimizer.zero_grad()
        sum(both).backward()
        assert check_gradients(small_model)
        optimizer.step()
    first, last = losses[0], np.mean(losses[-5:], axis=0)
    assert (last < np.array(first) / 2).all()


def test_bad_input_is_refused(small_model):
    batch = Tokenizer()(SEQUENCES)
    out, padded = small_model(batch), small_model(batch.to_padded())
    other = Tokenizer()(["MKT"])
    wrong_token = batch.tokens.clone()
    wrong_token[25] = 26
    terms = torch.zeros(3, 30)
    for says, call in (
        ("form 'mean' is unknown; choose one of original, weighted_mean", lambda: token_loss(out, batch, form="mean")),
        ("form 'mean' is unknown", lambda: annotation_loss(out, terms, form="mean")),
        (r"targets have 45 rows, the output 169", lambda: token_loss(out, other)),
        (r"targets \(45,\) where \(169,\) is wanted", lambda: token_loss(out, other.tokens)),
        (r"weights \(2,\) where \(169,\) is wanted", lambda: token_loss(out, batch, torch.ones(2))),
        (r"targets \(169,\) where \(3, 62\) is wanted", lambda: token_loss(padded, batch.tokens)),
        (r"target 26 in row 25 is no token; tokens are 0\.\.25", lambda: token_loss(out, wrong_token)),
        (r"targets \(3, 31\) where \(3, 30\) is wanted", lambda: annotation_loss(out, torch.zeros(3, 31))),
        (r"weights \(2,\) where \(3,\) is wanted", lambda: annotation_loss(out, terms, torch.ones(2))),
        (r"term_weights \(2,\) where \(30,\)", lambda: annotation_loss(out, terms, term_weights=torch.ones(2))),
        (r"term indices must lie in 0\.\.29", lambda: annotation_loss(out, (torch.tensor([30]), torch.zeros(3)))),
        (r"indices \(1,\) and offsets \(2,\)", lambda: annotation_loss(out, (torch.tensor([3]), torch.zeros(2)))),
    ):
        with pytest.raises(InputError, match=says):
            call()


def test_rows_of_padded_undoes_to_padded():
    batch = Tokenizer()(SEQUENCES)
    rows = torch.randn(batch.n_rows, 2) * (batch.segments >= 0)[:, None]
    for length in (None, 100):
        assert torch.equal(batch.rows_of_padded(batch.to_padded(rows, length=length)), rows)
    with pytest.raises(InputError, match=r"a padded tensor \(3, 61\) where \(3, 62 or more, \.\.\.\) is wanted"):
        batch.rows_of_padded(torch.zeros(3, 61))
    assert PackedBatch.from_padded(batch.to_padded(), batch.lengths).n_rows == batch.n_rows
