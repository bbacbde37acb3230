"""One protein alone, in any batch, in any order: the same bits (on the CPU, without gradients or with)."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer

RESIDUES = "ACDEFGHIKLMNPQRSTUVWXY"
DTYPES = [torch.float32, torch.bfloat16]
sequences = st.lists(
    st.one_of(
        st.text(RESIDUES, max_size=40),
        st.integers(0, 3000).map(lambda n: "".join(random.Random(n).choices(RESIDUES, k=n))),
    ),
    min_size=1,
    max_size=12,
)
tokenizer = Tokenizer()


def model_of(config: ProteinBertConfig, dtype: torch.dtype) -> ProteinBert:
    torch.manual_seed(0)
    model = ProteinBert(config).to(dtype).eval()
    assert model.backend_report().startswith("cpu")
    return model


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def small(request):
    config = ProteinBertConfig(n_annotations=30, d_local=32, d_global=64, n_blocks=2, n_heads=4, d_key=16)
    return model_of(config, request.param)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def published(request):
    return model_of(ProteinBertConfig(), request.param)


def everything(out, i: int) -> list[torch.Tensor]:
    """All numbers of protein i."""
    rows = slice(int(out.batch.host_starts[i]), int(out.batch.host_starts[i] + out.batch.host_lengths[i]))
    packed = [*out.hidden_local, *out.attentions, out.token_probabilities]
    return [r[rows] for r in packed] + [g[i] for g in (*out.hidden_global, out.go_probabilities, out.residue_mean())]


def answers(model, batch_of_sequences, annotations=None) -> list[list[torch.Tensor]]:
    with torch.inference_mode():
        out = model(tokenizer(batch_of_sequences), annotations, hidden_states=True, attentions=True)
        return [everything(out, i) for i in range(len(batch_of_sequences))]


def assert_same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences, st.randoms(use_true_random=False))
def test_same_bits_alone_in_any_batch_in_any_order(small, batch, rng):
    together = answers(small, batch)
    order = list(range(len(batch)))
    rng.shuffle(order)
    shuffled = answers(small, [batch[i] for i in order])
    for place, i in enumerate(order):
        assert_same_bits(together[i], shuffled[place])
    chosen = rng.randrange(len(batch))
    assert_same_bits(together[chosen], answers(small, [batch[chosen]])[0])


def test_same_bits_at_published_sizes_on_real_proteins(published, real_sequences):
    batch = [*real_sequences[:14], "", "M", *real_sequences[14:20]]
    together = answers(published, batch)
    backwards = answers(published, batch[::-1])[::-1]
    for i, sequence in enumerate(batch):
        assert_same_bits(together[i], backwards[i])
        if i % 5 == 0:
            assert_same_bits(together[i], answers(published, [sequence])[0])


def test_same_bits_with_annotations(small):
    batch = ["MKTAYIAKQR", "", "MSDNGPQNQRNAPRITFGG" * 30]
    dense = torch.zeros(3, 30)
    dense[0, [1, 4, 29]] = 1
    dense[2, 7] = 1
    together = answers(small, batch, dense)
    sparse = answers(small, batch, (torch.tensor([1, 4, 29, 7]), torch.tensor([0, 3, 3])))
    for i, sequence in enumerate(batch):
        assert_same_bits(together[i], answers(small, [sequence], dense[i : i + 1])[0])
        terms = dense[i].nonzero()[:, 0]
        assert_same_bits(sparse[i], answers(small, [sequence], (terms, torch.tensor([0])))[0])


def test_same_bits_between_two_runs_and_with_gradients(small):
    batch = tokenizer(["MKTAYIAKQR" * 50, "M"])
    with torch.inference_mode():
        first = small(batch).local_rows.clone()
        again = small(batch).local_rows
    assert torch.equal(first, again)
    assert torch.equal(first, small(batch).local_rows)


def test_same_bits_as_a_padded_tensor(small):
    batch = tokenizer(["MKTAYIAKQR" * 9, "", "MKV"])
    padded = batch.to_padded()
    with torch.inference_mode():
        packed = small(batch)
        out = small(padded.long(), lengths=batch.lengths)
    for i, n in enumerate(batch.host_lengths):
        assert torch.equal(out.local[i, :n], packed.local[i])
        assert not out.local[i, n:].any()
    assert torch.equal(out.global_state, packed.global_state)
