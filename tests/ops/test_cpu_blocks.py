"""All blocks in one call of the kernels: the bits of one by one, and only where nobody sees a difference."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from proteinbert_fast import ProteinBertConfig, Tokenizer, _cpu_kernels
from proteinbert_fast.benchmark.setup import random_model
from proteinbert_fast.ops import backends, cpu, cpu_blocks
from proteinbert_fast.ops.reference import Embedded

SMALL = ProteinBertConfig(n_annotations=3, d_local=16, d_global=64, n_blocks=3, n_heads=4, d_key=16)
SIZES = {
    "small": SMALL,
    "odd": ProteinBertConfig(n_annotations=3, d_local=48, d_global=96, n_blocks=2, n_heads=2, d_key=32),
    "published": ProteinBertConfig(n_annotations=3, n_blocks=1),
}
LENGTHS = [(0,), (13, 0, 7), (300, 1, 509)]


def batch_of(lengths):
    return Tokenizer()([("MKTAYIAKQRQISFVKSHFSRQ"[i % 22 :] + "G" * n)[:n] for i, n in enumerate(lengths)])


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call that ran all blocks."""
    made = []
    kernel = _cpu_kernels.run_blocks
    monkeypatch.setattr(_cpu_kernels, "run_blocks", lambda *a: made.append(len(a[0])) or kernel(*a))
    return made


@pytest.mark.usefixtures("poisoned_memory", "instruction_set")
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_same_bits_as_one_by_one(monkeypatch, calls, lengths, size, dtype):
    model, batch = random_model(SIZES[size]).to(dtype), batch_of(lengths)
    annotations = torch.rand(len(batch), 3).to(dtype)
    with torch.inference_mode():
        at_once = model(batch, annotations)
        assert calls == [SIZES[size].n_blocks]
        monkeypatch.setattr(backends, "CPU", dataclasses.replace(backends.CPU, run_blocks=None))
        one_by_one = model(batch, annotations)
    assert len(calls) == 1
    assert torch.equal(at_once.local_rows, one_by_one.local_rows)
    assert torch.equal(at_once.global_state, one_by_one.global_state)
    assert not at_once.local_rows[batch.segments < 0].any()


@pytest.mark.parametrize("threads", [2, 3, 64])
def test_same_bits_on_any_number_of_threads(calls, threads):
    model, batch, before = random_model(SMALL), batch_of((300, 1, 509)), torch.get_num_threads()
    try:
        found = []
        for n in (1, threads):
            torch.set_num_threads(n)
            with torch.inference_mode():
                found.append(model(batch))
    finally:
        torch.set_num_threads(before)
    assert calls == [3, 3]
    assert torch.equal(found[0].local_rows, found[1].local_rows)
    assert torch.equal(found[0].global_state, found[1].global_state)


def test_whoever_watches_a_block_sees_it_run(calls):
    """Hooks, replaced methods and modules, and everything that asks for what is between blocks."""
    model, batch, seen = random_model(SMALL), batch_of((20, 3)), []

    def runs_at_once(**asked):
        calls.clear()
        with torch.inference_mode():
            model(batch, **asked)
        return bool(calls)

    assert runs_at_once()
    assert not runs_at_once(hidden_states=True)
    assert not runs_at_once(attentions=True)
    for register in (
        model.blocks[1].register_forward_hook,
        model.blocks[1].register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
    ):
        hook = register(lambda *_: seen.append(1))
        assert not runs_at_once()
        hook.remove()
        assert seen
        seen.clear()
        assert runs_at_once()
    block = model.blocks[2]
    forward = block.forward
    block.forward = lambda *a: seen.append(1) or forward(*a)
    assert not runs_at_once()
    assert seen
    del block.forward
    assert runs_at_once()

    class Watched(type(block)):
        def forward(self, *arguments):
            seen.append(2)
            return super().forward(*arguments)

    block.__class__ = Watched
    assert not runs_at_once()
    assert seen[-1] == 2


def test_gradients_go_block_by_block(calls):
    model, batch = random_model(SMALL), batch_of((20, 3))
    model(batch).global_state.sum().backward()
    assert not calls
    assert all(block.narrow_conv.weight.grad.any() for block in model.blocks)


def test_parametrized_weights_are_computed(calls):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model, batch = random_model(SMALL), batch_of((20, 3))
    twice = random_model(SMALL)
    with torch.inference_mode():
        twice.blocks[1].wide_conv.weight.mul_(2)
        parametrize.register_parametrization(model.blocks[1].wide_conv, "weight", Doubled())
        assert torch.equal(model(batch).local_rows, twice(batch).local_rows)
    assert calls == [3, 3]


def test_states_of_no_annotations_are_the_callers_own():
    """They are kept with the weights: writing to what the model gives must not change its next answer."""
    model, batch = random_model(SMALL), batch_of((20, 3))
    with torch.inference_mode():
        first = model(batch, hidden_states=True)
        expected = first.global_state.clone()
        first.hidden_global[0].zero_()
        assert torch.equal(model(batch).global_state, expected)
        model.annotation_input.bias.add_(1.0)
        assert not torch.equal(model(batch).global_state, expected)


def test_weights_of_different_models_are_refused():
    model, batch = random_model(SMALL), batch_of((20, 3))
    other = random_model(SIZES["odd"])
    state = torch.zeros(2, 64)
    embedded = Embedded(batch.tokens, model.token_embedding.weight)
    with torch.inference_mode():
        mixed = [model.blocks[0].weights(), other.blocks[0].weights()]
        with pytest.raises(ValueError, match="these blocks' weights are packed for different states"):
            cpu_blocks.run_blocks(embedded, state, batch, mixed)
        assert cpu_blocks.run_blocks(embedded, state.double(), batch, mixed[:1]) is None, "another dtype"
        local = cpu.packed_local_block(mixed[0].local, embedded.weight, False, 5, backward=False)
        with pytest.raises(ValueError, match="the first block takes tokens, and no other"):
            _cpu_kernels.run_blocks(
                [(local, cpu.packed_attention(*mixed[0].track[:2], 4, torch.float32, backward=False),
                  cpu.packed_global_block(mixed[0].track.block, torch.float32), None)],
                0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1,
            )  # fmt: skip
        with pytest.raises(ValueError, match="tokens where these weights take states"):
            _cpu_kernels.local_block(local, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
