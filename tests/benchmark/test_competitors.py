"""The straightforward implementation is a fair one: its numbers are the reference's."""

import pytest
import torch

from proteinbert_fast import ProteinBert, Tokenizer
from proteinbert_fast.benchmark import competitors
from proteinbert_fast.benchmark.cases import Unavailable
from proteinbert_fast.benchmark.competitors import PaddedBlock, PaddedProteinBert, padded_batches, run_padded
from proteinbert_fast.benchmark.groups.forward import padded_states
from proteinbert_fast.benchmark.setup import Setup, random_model


@pytest.mark.parametrize("batch_tokens", [1, 700, 10_000])
@pytest.mark.parametrize("channels_last", [False, True])
def test_padded_equals_the_reference(setup: Setup, channels_last: bool, batch_tokens: int):
    model = random_model(setup.settings.config).double()
    reference = ProteinBert(setup.settings.config, backend="reference").double()
    reference.load_state_dict(model.state_dict())
    with torch.inference_mode():
        right = reference(Tokenizer()([p.sequence for p in setup.proteins]))
    padded = PaddedProteinBert(model, channels_last)
    states = list(padded_states(run_padded(padded, padded_batches(setup.tokens, batch_tokens))))
    assert sorted(s.number for s in states) == list(range(len(setup.proteins)))
    for found in states:
        torch.testing.assert_close(found.local, right.local[found.number], rtol=0, atol=1e-10)
        torch.testing.assert_close(found.global_state, right.global_state[found.number], rtol=0, atol=1e-10)


@pytest.mark.parametrize("batch_tokens", [1, 30, 100, 10_000])
def test_padded_batches_are_sorted_and_within_the_budget(batch_tokens: int):
    lengths = [7, 3, 50, 12, 12, 2, 31]
    tokens = [torch.full((n,), n, dtype=torch.uint8) for n in lengths]
    batches = padded_batches(tokens, batch_tokens)
    assert sorted(i for batch in batches for i in batch.numbers) == list(range(len(lengths)))
    in_order = [lengths[i] for batch in batches for i in batch.numbers]
    assert in_order == sorted(lengths, reverse=True)
    for batch in batches:
        assert batch.tokens.numel() <= batch_tokens or len(batch.numbers) == 1
        assert batch.mask.sum(1).tolist() == [lengths[i] for i in batch.numbers]
        assert (batch.tokens[~batch.mask] == competitors.PAD).all()
        for k, i in enumerate(batch.numbers):
            assert torch.equal(batch.tokens[k][batch.mask[k]], tokens[i].long())


def test_a_missing_package_is_said(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(competitors, "import_module", missing)
    with pytest.raises(Unavailable, match="not installed"):
        competitors.other_package(setup.settings.config, torch.float32)


def test_a_compiler_that_fails_is_said(setup: Setup, monkeypatch: pytest.MonkeyPatch):
    def fails(block: PaddedBlock, **_: object) -> None:
        def run(*_: object) -> None:
            raise RuntimeError("no C++ compiler\nand more")

        block.forward = run

    monkeypatch.setattr(PaddedBlock, "compile", fails)
    with pytest.raises(Unavailable, match=r"no C\+\+ compiler$"):
        setup.compiled("float32")
