"""The model's prepared weights: the same bits with them and without, whatever has been done to the weights."""

import copy
import threading

import numpy as np
import pytest
import torch

from proteinbert_fast import ProteinBert, ProteinBertConfig, Tokenizer, forget_prepared_weights
from proteinbert_fast.ops import prepared

from .conftest import IS_INTERPRETED
from .fake_cuda import Operations
from .test_model import SMALL

SEQUENCES = ["MKTAYIAKQR", ""]


@pytest.fixture
def model(device) -> ProteinBert:
    prepared.forget()
    torch.manual_seed(0)
    return ProteinBert(SMALL, backend="triton").to(device).eval()


def numbers(model: ProteinBert) -> list[torch.Tensor]:
    out = model(Tokenizer()(SEQUENCES).to(model.token_embedding.weight.device), hidden_states=True, attentions=True)
    return [*out.hidden_local, *out.hidden_global, *out.attentions, out.token_logits, out.go_logits]


def check(model: ProteinBert) -> None:
    """Nothing is kept for a copy in training mode."""
    copied = copy.deepcopy(model).train()
    with torch.no_grad():
        right, found, again = numbers(copied), numbers(model), numbers(model)
    for a, b, c in zip(right, found, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def rearranged(model: ProteinBert) -> int:
    """Operations of a call that rearrange or cast weights."""
    with Operations() as seen:
        numbers(model)
    return sum(name.split(".")[1] in {"cat", "_to_copy", "constant_pad_nd", "pad", "bmm"} for name in seen.launches())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits(model, dtype):
    check(model.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_under_autocast(model, device, dtype):
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        check(model)


@pytest.mark.skipif(not IS_INTERPRETED, reason="counts operations in the interpreter")
def test_rearranged_once(model):
    with torch.no_grad():
        assert rearranged(model) > SMALL.n_blocks
        assert rearranged(model) == 0
        model.train()
        for _ in range(2):
            assert rearranged(model) > SMALL.n_blocks
    model.eval()
    with torch.enable_grad():
        assert rearranged(model) > SMALL.n_blocks
    with torch.inference_mode():
        assert rearranged(model) > SMALL.n_blocks
        assert rearranged(model) == 0


def some(model: ProteinBert) -> list[torch.nn.Parameter]:
    return [model.token_embedding.weight, *(b.wide_conv.weight for b in model.blocks), model.token_head.weight]


def swap_and_eval(model) -> None:
    """A moving average of the weights is swapped in."""
    for p in some(model):
        p.data.copy_(p.data.roll(1, 0))
    model.eval()


def swap_and_say_so(model) -> None:
    for p in some(model):
        p.data.mul_(2)
    forget_prepared_weights(model)


def in_place(model) -> None:
    with torch.no_grad():
        for p in some(model):
            p.mul_(2)


def load(model) -> None:
    state = {name: value * 2 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def apply(model) -> None:
    model._apply(lambda x: x.mul_(2))  # of each parameter's ``data``


def fused_step(model) -> None:
    for p in some(model):
        p.grad = torch.ones_like(p)
    torch.optim.AdamW(some(model), lr=0.1, fused=True).step()


def descent(model) -> None:
    """Written out, without an optimizer and in evaluation mode."""
    out = model(Tokenizer()(["MKT"]).to(model.token_embedding.weight.device))
    (out.local_rows.float().square().sum() + out.token_logits.float().sum()).backward()
    for p in some(model):
        p.data -= 0.1 * p.grad


CHANGES = [swap_and_eval, swap_and_say_so, in_place, load, apply, fused_step, descent]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_weights_that_change_are_seen(model, device, change, autocast):
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast), torch.no_grad():
        before = numbers(model)
    change(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        check(model)
        with torch.no_grad():
            after = numbers(model)
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_training_that_nothing_announces(model, device, autocast):
    """In training mode weights may be written to in any way."""
    model.train()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for _ in range(2):
            with torch.no_grad():
                numbers(model)
            for p in some(model):
                p.data.mul_(2)
            check(model)
    assert not prepared._kept


def test_weights_that_are_swapped_may_have_no_weak_references(model):
    """PyTorch refuses to swap those that have."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for change in (lambda: model.load_state_dict(model.state_dict()), lambda: model.to(torch.bfloat16)):
            with torch.no_grad():
                numbers(model)
            change()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check(model)


def test_a_copy_of_the_model_has_its_own(model):
    with torch.no_grad():
        right = numbers(model)
        twin = copy.deepcopy(model)
        for p in some(twin):
            p.mul_(1.5)
    check(twin)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(numbers(model), right, strict=True))


def test_two_threads_at_once(model, monkeypatch):
    if IS_INTERPRETED:  # the interpreter runs one kernel at a time
        from triton.runtime.interpreter import InterpretedFunction

        lock, plain = threading.Lock(), InterpretedFunction.run

        def run(*args, **kwargs):
            with lock:
                return plain(*args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", run)
    with torch.no_grad():
        right = numbers(copy.deepcopy(model).train())
    found, barrier = {}, threading.Barrier(2)

    def work(i: int) -> None:
        with torch.no_grad(), np.errstate(all="ignore"):
            barrier.wait()
            found[i] = numbers(model)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[i], right, strict=True))
    # Block 1's taps and table, the states of its tokens, and the other block's taps: once each.
    assert len(prepared._kept) == len(prepared._known) == 3 + SMALL.n_blocks - 1


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs no kernel, so that the published sizes take no time")
@pytest.mark.parametrize(
    ("dtype", "autocast", "megabytes"),
    [(torch.bfloat16, False, 3.7), (torch.float32, False, 7.4), (torch.float32, True, 22.7)],
)
def test_memory_at_the_published_sizes(monkeypatch, dtype, autocast, megabytes):
    """What is kept of 16 million weights: the taps of the convolutions; under autocast, every matrix that is used."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **kwargs: None)
    prepared.forget()
    model = ProteinBert(ProteinBertConfig(), backend="triton").to(dtype).eval()
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            numbers(model)
    kept = sum(each.value.nbytes for each in prepared._kept.values())
    weights = sum(p.nbytes for p in model.parameters())
    assert kept / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert kept < weights
    del model
    assert not prepared._known


def test_weights_of_the_kernel_for_hopper_are_kept_too(monkeypatch, device):
    """What its host function hands over; the kernel itself does not run in the interpreter."""
    hopper = pytest.importorskip("proteinbert_fast.ops.kernels.local_block_hopper")
    handed = []
    kernel = type("Kernel", (), {"__getitem__": lambda self, grid: lambda x, tiles, *_, **__: handed.append(tiles)})()
    monkeypatch.setattr(hopper, "local_block_hopper_kernel", kernel)
    monkeypatch.setattr(hopper, "unsupported", lambda *_: None)
    prepared.forget()
    block = ProteinBert(ProteinBertConfig(n_annotations=30, n_blocks=2)).to(device, torch.bfloat16).blocks[1]
    weights = block.local_weights()
    x, segments = torch.zeros(64, 128, dtype=torch.bfloat16, device=device), torch.zeros(64, dtype=torch.int32)
    for change in (lambda: None, lambda: None, lambda: block.local_dense.weight.mul_(2)):
        with torch.no_grad(), prepared.reusing(True):
            change()
            hopper.launch(x, x[:1], segments, weights, 20, 5, False, False, hopper.configuration(128))
            assert torch.equal(handed[-1].base, hopper.weight_stream(weights, torch.bfloat16))
    assert len({tiles.base.data_ptr() for tiles in handed}) == 1
    assert len(prepared._kept) == 1
