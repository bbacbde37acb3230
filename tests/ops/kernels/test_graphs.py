"""Small forward passes replayed as graphs: the same bits as without, whatever ran before."""

import pytest
import torch

from proteinbert_fast import GraphedForward, ProteinBert, Tokenizer, graphs
from proteinbert_fast.errors import BackendError

from .conftest import IS_INTERPRETED
from .test_model import SMALL

BATCHES = [["MKTAYIAKQRQISFVKSHFSRQ"], ["M", "", "ACDEFGHIKLMNPQRSTVWY" * 9], ["A" * 40], ["", "W" * 130, "K" * 3]]


@pytest.fixture
def graphed(device, monkeypatch) -> GraphedForward:
    """On a GPU the real thing; else a run over the same buffers stands for a replay."""
    if IS_INTERPRETED:

        def rerun(run, device):
            out = run()
            names = ("local_rows", "global_state", "_local_mean")

            def replay() -> None:
                again = run()
                for name in names:
                    getattr(out, name).copy_(getattr(again, name))
                for name in ("hidden_local", "hidden_global", "attentions"):
                    for old, new in zip(getattr(out, name) or (), getattr(again, name) or (), strict=True):
                        if 0 not in old.stride():  # one bias, seen by all proteins
                            old.copy_(new)

            return replay, out

        monkeypatch.setattr(graphs, "_captured", rerun)
        monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
        monkeypatch.setattr(graphs, "ROWS", 64)
    torch.manual_seed(0)
    return GraphedForward(ProteinBert(SMALL, backend="triton").to(device).eval())


def check(graphed: GraphedForward, sequences, device, **options) -> None:
    batch = Tokenizer()(sequences, ids=[str(i) for i in range(len(sequences))])
    out = graphed(batch, **options)
    with torch.no_grad():
        plain = graphed.model(batch.to(device), **options)
    assert out.batch.ids == batch.ids
    for name in ("local_rows", "global_state", "go_probabilities", "token_logits"):
        assert torch.equal(getattr(out, name), getattr(plain, name)), name
    assert torch.equal(out.residue_mean(), plain.residue_mean())
    assert torch.equal(out.local[0], plain.local[0])
    for name in ("hidden_local", "hidden_global", "attentions"):
        assert (getattr(out, name) is None) == (getattr(plain, name) is None)
        for a, b in zip(getattr(out, name) or (), getattr(plain, name) or (), strict=True):
            assert torch.equal(a, b)


def test_inference_mode_once_and_not_again(graphed, device):
    """Buffers of a first call in inference mode are written outside it."""
    batch = Tokenizer()(BATCHES[0])
    with torch.inference_mode():
        first = graphed(batch).local_rows.clone()
    with torch.no_grad():
        assert torch.equal(graphed(batch).local_rows, first)
    assert torch.equal(graphed(batch).local_rows, first)


def test_same_bits_as_the_model(graphed, device):
    for sequences in (*BATCHES, BATCHES[0], BATCHES[2]):
        check(graphed, sequences, device)
    assert {(size.rows, size.proteins) for size in graphed._graphs} >= {(graphs.ROWS * -(-62 // graphs.ROWS), 1)}
    check(graphed, BATCHES[1], device, hidden_states=True, attentions=True)


def test_results_outlive_the_next_replay(graphed):
    batch = Tokenizer()(["MKT"])
    first = graphed(batch)
    kept = first.local_rows.clone()
    graphed(Tokenizer()(["WWW"]))
    assert torch.equal(first.local_rows, kept)


@pytest.mark.slow
def test_weights_that_change_or_move_are_seen(graphed, device):
    batch = Tokenizer()(["MKT"])
    before = graphed(batch).local_rows
    with torch.no_grad():
        graphed.model.blocks[0].local_dense.bias.add_(1.0)
    assert not torch.equal(graphed(batch).local_rows, before)
    check(graphed, ["MKT"], device)
    graphed.model.to(torch.bfloat16)
    assert graphed(batch).local_rows.dtype == torch.bfloat16
    check(graphed, ["MKT"], device)


@pytest.mark.slow
def test_what_no_graph_is_made_for_runs_as_ever(graphed, device, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_ROWS", 64)
    monkeypatch.setattr(graphs, "MOST_PROTEINS", 2)
    for sequences in (["A" * 200], ["A", "C", "D"]):
        check(graphed, sequences, device)
    batch = Tokenizer()(["MKT"])
    annotations = torch.ones(1, SMALL.n_annotations, device=device)
    with torch.no_grad():
        plain = graphed.model(batch.to(device), annotations)
    assert torch.equal(graphed(batch, annotations).global_state, plain.global_state)
    seen = []
    graphed(batch, attentions=lambda block, protein, weights: seen.append((block, protein, weights.shape)))
    assert seen == [(block, 0, (5, SMALL.n_heads)) for block in range(SMALL.n_blocks)]
    assert not graphed._graphs


def test_models_that_cannot_be_captured_are_refused(device, monkeypatch):
    with pytest.raises(BackendError, match="the model is on cpu, CUDA graphs need a CUDA GPU"):
        GraphedForward(ProteinBert(SMALL))
    monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
    with pytest.raises(BackendError, match="needs the Triton kernels, but the back end is reference"):
        GraphedForward(ProteinBert(SMALL, backend="reference"))
