"""Weights as kernels take them, made once and kept for as long as the weights stay what they were.

Kernels want convolutions' taps in another order, and matrices in the dtype that they compute in. In evaluation mode
without gradients weights rarely change, so what was made of them is kept, at most once each. It is made again when a
weight has been written to or replaced.

How a weight is recognized: it is the same tensor (a weak reference says so, so that an address that is used again never
passes for it), of the same storage (another weak reference), place in it and layout, and of the same version, which
PyTorch counts up with every write in place. Not by storage and version alone: versions belong to tensors, and
``weight.data`` or a view that compiled code makes is another tensor over the same storage, counted from 0.

Some writes are not counted: those through ``weight.data``, those of PyTorch's own fused optimizers, and those of
kernels and replayed graphs. So nothing is kept in training mode or where gradients are enabled; the step of any
``torch.optim.Optimizer`` drops what was made of its parameters; and so do ``train``, ``eval``, ``load_state_dict``,
``to`` and forward passes with gradients of a model. ``forget_prepared_weights`` is for whatever else writes.
"""

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

_PLAIN = (Tensor, nn.Parameter)


class _Thread(threading.local):
    """What holds for the calls of one thread."""

    may_reuse = False
    recorded: "list[Prepared] | None" = None


_thread = _Thread()
# Reentrant: what is prepared may be made of what is prepared.
_lock = threading.RLock()
_kept: "dict[Hashable, Prepared]" = {}
# Those that CUDA graphs read too, which hold them for themselves.
_known: "weakref.WeakValueDictionary[Hashable, Prepared]" = weakref.WeakValueDictionary()
_hooks: list[object] = []


class _Source:
    """A tensor that something was made of.

    Attributes:
        tensor: a weak reference.
        storage: a weak reference too. It keeps the memory of no weight, but the storage's own address from being used
            again.
    """

    __slots__ = ("storage", "tensor")

    def __init__(self, tensor: Tensor, when_gone: Callable[[object], object]) -> None:
        self.tensor = weakref.ref(tensor, when_gone)
        self.storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


class Prepared:
    """What was made of weights.

    Attributes:
        value: the tensor, the same one for good, because CUDA graphs read it; or what kernels for CPUs take.
    """

    value: Any

    __slots__ = (
        "__weakref__", "_event", "_is_stale", "_key", "_make", "_places", "_sources", "_stream", "_versions", "value",
    )  # fmt: skip

    def __init__(
        self,
        make: Callable[..., Any],
        key: tuple[Hashable, ...],
        sources: tuple[Tensor, ...],
        when_gone: Callable[[object], object],
    ) -> None:
        self._make, self._key = make, key
        self._sources = [_Source(tensor, when_gone) for tensor in sources]
        # From before: a write by another thread meanwhile must not go unnoticed.
        self._places, self._versions = _places(sources), _versions(sources)
        self._is_stale = False
        self.value = self._made(sources)
        self._note_stream()

    def _made(self, sources: tuple[Tensor, ...]) -> Any:
        # A buffer made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            return self._make(*sources, *self._key)

    def _note_stream(self) -> None:
        self._stream = _stream_of(self.value)
        self._event = None if self._stream is None else self._stream.record_event()

    def is_current(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are its sources, where they were, and none was written to since."""
        return (
            not self._is_stale
            and all(source.tensor() is tensor for source, tensor in zip(self._sources, tensors, strict=True))
            and _versions(tensors) == self._versions
            and _places(tensors) == self._places
        )

    def sources(self) -> tuple[Tensor, ...] | None:
        """What it was made of; None if any of that is gone or has moved."""
        found = tuple(tensor for source in self._sources if (tensor := source.tensor()) is not None)
        return found if len(found) == len(self._sources) and _places(found) == self._places else None

    def is_stale(self) -> bool:
        """Whether a source was, or may have been, written to since."""
        sources = self.sources()
        return self._is_stale or sources is None or _versions(sources) != self._versions

    def renew(self, sources: tuple[Tensor, ...]) -> None:
        """Makes it again, in place where it is a tensor.

        Whoever wrote to the weights has done so after all that read them: other kernels do as well, without a copy. So
        nobody on any stream still reads the old numbers. Where nothing was written, the new numbers are the old ones.

        Args:
            sources: as ``sources`` gives them.
        """
        versions = _versions(sources)
        value = self._made(sources)
        if isinstance(value, Tensor):
            with torch.inference_mode(False), torch.no_grad():
                self.value.copy_(value)
        else:  # others may be reading the old one, which lives as long as they do
            self.value = value
        self._versions = versions
        self._is_stale = False
        self._note_stream()

    def wait(self) -> torch.cuda.Stream | None:
        """The current stream may read it, whichever stream made it; returns the current one if that is another."""
        if self._event is None:
            return None
        stream = _stream_of(self.value)
        if stream is None or stream == self._stream:
            return None
        stream.wait_event(self._event)
        return stream

    def lend(self) -> Any:
        """The value, for the current stream to read."""
        if (stream := self.wait()) is not None:
            # Its memory must not be given away before this stream is through.
            self.value.record_stream(stream)
        return self.value

    def expire(self) -> None:
        """It is made again before it is next used."""
        self._is_stale = True

    def is_made_of(self, storages: set[int]) -> bool:
        """Whether any of these storages has one of its sources."""
        return any(source.storage.cdata in storages for source in self._sources)


Made = TypeVar("Made")


def prepared(make: Callable[..., Made], *sources: Tensor, key: tuple[Hashable, ...] = ()) -> Made:
    """``make(*sources, *key)``, or what that call gave before.

    Made without being kept where ``reusing`` does not say otherwise, of tensors whose writes are not counted (those of
    inference mode, fake and wrapped ones), and in CUDA graphs other than those of ``recording``: nothing would renew
    what they read, so such a graph makes it in every replay.

    Args:
        make: a function of a module, of its arguments alone. Its result shares no memory with them.
        sources: weights.
        key: whatever else the result depends on.
    """
    if not _thread.may_reuse:
        return make(*sources, *key)
    at = (make, key, *map(id, sources))
    is_capturing = _is_capturing(sources[0].device)
    if not is_capturing:
        # The usual case first: a short protein on a CPU waits for it 24 times.
        with _lock:
            current = _kept.get(at)
            if current is not None and current.is_current(sources):
                same: Made = current.lend()
                return same
    if not all(map(_has_versions, sources)) or (is_capturing and _thread.recorded is None):
        return make(*sources, *key)
    with _lock:
        found = _known.get(at)
        # Another tensor may have the address of one that is gone: then the weak reference is dead.
        if found is None or found.sources() is None:
            if is_capturing:
                return make(*sources, *key)
            if not _hooks:
                _hooks.append(register_optimizer_step_post_hook(_after_step))
            found = Prepared(make, key, sources, lambda _: _kept.pop(at, None))
            _known[at] = found
        elif found.is_stale():
            if is_capturing:
                return make(*sources, *key)
            found.renew(sources)
        _kept[at] = found
        if not is_capturing:
            lent: Made = found.lend()
            return lent
        assert _thread.recorded is not None
        _thread.recorded.append(found)
        value: Made = found.value
        return value


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype, contiguous; itself where it is that already."""
    if weight.dtype == dtype and weight.is_contiguous():
        return weight
    return prepared(_in_dtype, weight, key=(dtype,))


def _in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).contiguous()


def reusing(allowed: bool) -> AbstractContextManager[None]:
    """Whether ``prepared`` keeps results and gives them again, for calls of this thread inside.

    Compiled code does not: it may call operators with other tensors over a weight's storage.

    Args:
        allowed: only for what wants no gradients.
    """
    return nullcontext() if torch.compiler.is_compiling() else _reusing(allowed)


@contextmanager
def _reusing(allowed: bool) -> Iterator[None]:
    before, _thread.may_reuse = _thread.may_reuse, allowed
    try:
        yield
    finally:
        _thread.may_reuse = before


@contextmanager
def recording() -> Iterator[list[Prepared]]:
    """For a graph that is captured inside: the list of what it reads, for ``renewed``. To be held as long as it."""
    before, _thread.recorded = _thread.recorded, []
    try:
        yield _thread.recorded
    finally:
        _thread.recorded = before


def renewed(recorded: Iterable[Prepared]) -> bool:
    """Brings what a graph reads up to date, in place.

    To be called on the stream that is to replay it, after all earlier replays.

    Returns:
        False if a weight is gone or has moved, so that the graph must be captured again.
    """
    with _lock:
        for each in recorded:
            if (sources := each.sources()) is None:
                return False
            if each.is_stale():
                each.renew(sources)
            else:
                each.wait()
    return True


def forget(tensors: Iterable[Tensor] | None = None) -> None:
    """Drops what was made of these tensors, or of any others over the same storages; of all tensors when None.

    What CUDA graphs read stays, to be made again, in place, before the next replay.
    """
    if not _known:
        return
    storages = None if tensors is None else set(filter(None, map(_storage, tensors)))
    with _lock:
        for at, each in list(_known.items()):
            if storages is None or each.is_made_of(storages):
                each.expire()
                _kept.pop(at, None)


def forget_prepared_weights(model: nn.Module | None = None) -> None:
    """Says that weights were written to in a way that PyTorch does not count.

    To be called after writes through ``weight.data``, by kernels of one's own, or by a CUDA graph with an optimizer in
    it, if the model is in evaluation mode and neither ``model.train()`` nor ``model.eval()`` is called before the next
    forward pass. Without that, a forward pass on a GPU could still read copies of the old weights.

    Args:
        model: whose weights; those of all models when None.
    """
    forget(None if model is None else model.parameters())


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        forget(p for group in optimizer.param_groups for p in group["params"])


def _has_versions(tensor: Tensor) -> bool:
    return (
        type(tensor) in _PLAIN
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _versions(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    return tuple([tensor._version for tensor in tensors])


def _places(tensors: tuple[Tensor, ...]) -> tuple[object, ...]:
    """Storages, places in them, and layouts, a list for each: a short protein on a CPU waits for 140 tensors."""
    storages = [storage._cdata for storage in map(Tensor.untyped_storage, tensors)]  # devices, too
    places, shapes = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.size, tensors))
    return storages, places, shapes, list(map(Tensor.stride, tensors)), [tensor.dtype for tensor in tensors]


def _storage(tensor: Tensor) -> int | None:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a subclass without one, which nothing is kept of
        return None


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _stream_of(value: object) -> torch.cuda.Stream | None:
    return _current_stream(value.device) if isinstance(value, Tensor) else None


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
