"""What kernels make of weights: kept while the weights stay what they were, and not a moment longer."""

import gc
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from proteinbert_fast import forget_prepared_weights
from proteinbert_fast.ops import prepared as module
from proteinbert_fast.ops.prepared import in_dtype, prepared, recording, renewed, reusing

made = []


def doubled(weight: Tensor, *key) -> Tensor:
    made.append(key)
    return 2 * weight.detach()


def product(a: Tensor, b: Tensor) -> Tensor:
    return a.detach() @ prepared(doubled, b)


@pytest.fixture(autouse=True)
def clean():
    made.clear()
    module.forget()
    gc.collect()
    assert not module._kept
    yield
    module.forget()


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.arange(12.0).view(3, 4))


@pytest.fixture
def reuse():
    with torch.no_grad(), reusing(True):
        yield


def write_in_place(w):
    w.add_(1)


def write_in_inference_mode(w):
    with torch.inference_mode():
        w.add_(1)


def write_through_a_view(w):
    w[1].fill_(7)


def write_through_a_view_in_inference_mode(w):
    with torch.inference_mode():
        w[1].fill_(7)


def write_through_detached(w):
    w.detach().add_(1)


def replace_data(w):
    w.data = w.data + 1


def reshape_data(w):
    w.data = w.data.view(w.shape[::-1])


def write_uncounted_and_say_so(w):
    w.data.add_(1)
    forget_prepared_weights()


def write_uncounted_and_say_so_of_the_model(w):
    model = nn.ParameterList([w])
    w.data.add_(1)
    forget_prepared_weights(model)


def say_so_of_an_alias(w):
    w.data.add_(1)
    module.forget([w.data.view(-1)[2:]])


def step(**options):
    def write(w):
        w.grad = torch.ones_like(w)
        torch.optim.AdamW([w], **options).step()

    return write


class Descent(torch.optim.Optimizer):
    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= 1


WRITES = {
    "in place": write_in_place,
    "in inference mode": write_in_inference_mode,
    "view": write_through_a_view,
    "view in inference mode": write_through_a_view_in_inference_mode,
    "detached": write_through_detached,
    "data replaced": replace_data,
    "data of another shape": reshape_data,
    "uncounted": write_uncounted_and_say_so,
    "uncounted, of a model": write_uncounted_and_say_so_of_the_model,
    "uncounted, of an alias": say_so_of_an_alias,
    "fused optimizer": step(fused=True),
    "foreach optimizer": step(foreach=True),
    "plain optimizer": step(foreach=False),
    "optimizer that writes to data": lambda w: Descent([w]).step(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_made_once_and_again_after_each_write(reuse, weight, write):
    first = prepared(doubled, weight)
    assert prepared(doubled, weight) is first
    assert len(made) == 1
    for _ in range(2):
        n = len(made)
        write(weight)
        assert torch.equal(prepared(doubled, weight), 2 * weight)
        assert torch.equal(prepared(doubled, weight), 2 * weight)
        assert len(made) == n + 1


def test_keys_functions_and_dtypes_are_kept_apart(reuse, weight):
    values = [prepared(doubled, weight), prepared(doubled, weight, key=(1,)), in_dtype(weight, torch.float16)]
    assert len({v.data_ptr() for v in values}) == 3
    assert in_dtype(weight, torch.float32) is weight
    assert torch.equal(in_dtype(weight.t(), torch.float32), weight.t())
    assert in_dtype(weight.t(), torch.float32).is_contiguous()


def test_made_of_what_is_prepared(reuse, weight):
    other = nn.Parameter(torch.ones(4, 2))
    for write in (lambda: None, lambda: weight.add_(1), lambda: other.mul_(3)):
        write()
        assert torch.equal(prepared(product, weight, other), weight @ (2 * other))


def test_another_storage_at_the_same_address(reuse, weight):
    """As when weights are moved away and others take the memory: the tensor, address and version are the same."""
    memory = np.zeros((3, 4), np.float32)
    for number in (1.0, 2.0):
        weight.data = torch.empty(0)
        memory[:] = number
        weight.data = torch.from_numpy(memory)
        assert torch.equal(prepared(doubled, weight), torch.full((3, 4), 2 * number))


def test_other_tensors_over_the_same_storage_count_for_themselves(reuse, weight):
    """``weight.data`` is a new tensor each time, often at the address of the last one, and always of version 0."""
    for _ in range(20):
        weight.add_(1)
        assert torch.equal(prepared(doubled, weight.data), 2 * weight)
    assert not module._kept


def test_goes_with_its_source_and_keeps_no_weight_alive(reuse):
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
    prepared(product, *weights)
    assert len(module._kept) == 2
    storage = torch.multiprocessing.reductions.StorageWeakRef(weights[0].untyped_storage())
    del weights[0]
    gc.collect()
    assert storage.expired()
    assert len(module._kept) == 1
    weights.clear()
    gc.collect()
    assert not module._kept
    assert not module._known


def test_at_most_one_copy_of_a_weight(reuse, weight):
    for _ in range(5):
        weight.add_(1)
        prepared(doubled, weight)
        replace_data(weight)
        prepared(doubled, weight)
    gc.collect()
    assert len(module._kept) == len(module._known) == 1


def test_made_again_in_place(reuse, weight):
    """Graphs read it where it lies, and so does whoever holds it."""
    with torch.inference_mode():
        value = prepared(doubled, weight)
    at = value.data_ptr()
    weight.add_(1)
    assert prepared(doubled, weight).data_ptr() == at
    assert torch.equal(value, 2 * weight)
    assert not value.requires_grad


def test_not_kept_without_leave(weight):
    for allowed in (False, True, False):
        with torch.no_grad(), reusing(allowed):
            prepared(doubled, weight)
            with reusing(False):
                prepared(doubled, weight)
    prepared(doubled, weight)
    assert len(made) == 7
    assert len(module._kept) == 1


def test_not_kept_of_tensors_whose_writes_are_not_counted(reuse, weight):
    with torch.inference_mode():
        frozen = torch.ones(3, 4)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(weight)
        prepared(doubled, fake)

    class Odd(Tensor):
        pass

    for tensor in (frozen, torch.ones(2, 2).as_subclass(Odd)):
        prepared(doubled, tensor)
    torch.vmap(lambda row: prepared(doubled, row))(weight.detach())
    torch.func.grad(lambda w: (w * prepared(doubled, w)).sum())(weight.detach())
    assert len(made) == 5
    assert not module._known


def test_graphs_of_others_make_it_themselves(reuse, weight, monkeypatch):
    """Nothing would renew what their replays read; not even one that is there is read."""
    kept = prepared(doubled, weight)
    monkeypatch.setattr(module, "_is_capturing", lambda device: True)
    assert prepared(doubled, weight) is not kept
    assert prepared(doubled, weight, key=(1,)) is not prepared(doubled, weight, key=(1,))
    assert len(module._kept) == 1


class TestGraphs:
    def captured(self, monkeypatch, *sources):
        """What a graph reads, and what it would make itself."""
        with monkeypatch.context() as patch, recording() as read:
            patch.setattr(module, "_is_capturing", lambda device: True)
            values = [prepared(doubled, source) for source in sources]
        return read, values

    def test_only_what_is_up_to_date_is_read(self, reuse, weight, monkeypatch):
        other = nn.Parameter(torch.ones(2))
        value = prepared(doubled, weight)
        read, values = self.captured(monkeypatch, weight, other)
        assert [r.value for r in read] == [value] == values[:1]
        weight.add_(1)
        assert self.captured(monkeypatch, weight)[0] == []
        assert not torch.equal(value, 2 * weight)  # a capture runs nothing

    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    def test_renewed(self, reuse, weight, monkeypatch, write):
        value = prepared(doubled, weight)
        read, _ = self.captured(monkeypatch, weight)
        at = weight.data_ptr(), weight.stride()
        for _ in range(2):
            assert renewed(read)
        assert len(made) == 1
        write(weight)
        if (weight.data_ptr(), weight.stride()) != at:
            assert not renewed(read)
            return
        assert renewed(read)
        assert torch.equal(value, 2 * weight)
        assert prepared(doubled, weight) is value
        assert len(made) == 2

    def test_stays_as_long_as_its_graph(self, reuse, weight, monkeypatch):
        value = prepared(doubled, weight)
        read, _ = self.captured(monkeypatch, weight)
        module.forget()
        assert not module._kept
        assert prepared(doubled, weight) is value
        module.forget()
        del read
        assert not module._known

    def test_weights_that_are_gone(self, reuse, monkeypatch):
        weights = [nn.Parameter(torch.ones(2, 2))]
        prepared(doubled, weights[0])
        read, _ = self.captured(monkeypatch, weights[0])
        weights.clear()
        assert not renewed(read)


def test_a_write_while_it_is_made_is_seen_the_next_time(reuse, weight):
    """By another thread, perhaps."""
    writes = [lambda: weight.add_(1), lambda: weight.add_(1)]

    def slow(w: Tensor) -> Tensor:
        value = 2 * w.detach()
        if writes:
            writes.pop()()
        return value

    for _ in range(2):
        assert not torch.equal(prepared(slow, weight), 2 * weight)
    assert torch.equal(prepared(slow, weight), 2 * weight)


class Stream:
    def __init__(self, log, name) -> None:
        self.log, self.name = log, name

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event) -> None:
        self.log.append(f"{self.name} waits for {event}")


def test_other_streams_wait_and_keep_the_memory(reuse, weight, monkeypatch):
    log = []
    a, b = Stream(log, "a"), Stream(log, "b")
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name} keeps memory"))

    def on(stream) -> list[str]:
        log.clear()
        monkeypatch.setattr(module, "_current_stream", lambda device: stream)
        prepared(doubled, weight)
        return log.copy()

    assert on(a) == ["a records"]
    assert on(a) == []
    assert on(b) == ["b waits for event of a", "b keeps memory"]
    weight.add_(1)
    assert on(b) == ["b records"]
    assert on(a) == ["a waits for event of b", "a keeps memory"]
    log.clear()
    assert renewed(module._kept.values())
    assert log == ["a waits for event of b"]  # the graph keeps the memory


def test_a_failure_leaves_nothing_half_made(reuse, weight, monkeypatch):
    value = prepared(doubled, weight)
    weight.add_(1)
    with monkeypatch.context() as patch:
        patch.setattr(module.Prepared, "_made", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(doubled, weight)
    assert torch.equal(prepared(doubled, weight), 2 * weight)
    assert torch.equal(value, 2 * weight)


def test_threads_make_it_once_and_have_leave_for_themselves(weight):
    n, found, barrier = 8, [], threading.Barrier(8)

    def slow(w: Tensor) -> Tensor:
        made.append(())
        time.sleep(0.05)
        return 2 * w.detach()

    def run(i: int) -> None:
        with torch.no_grad(), reusing(i % 2 == 0):
            barrier.wait()
            found.append((i, prepared(slow, weight)))
            assert module._thread.may_reuse == (i % 2 == 0)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({v.data_ptr() for i, v in found if i % 2 == 0}) == 1
    assert len(made) == 1 + n // 2
    assert len(found) == n
    assert not module._thread.may_reuse
