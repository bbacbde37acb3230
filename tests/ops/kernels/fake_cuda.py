"""What GraphedForward needs of torch.cuda, on a CPU: streams and events that write down their order, and graphs.

A graph is what one is on a GPU: the operations and kernel launches of a run, with the very tensors that they had, and
nothing of the Python code around them. So a replay sees no weight that was prepared elsewhere since, nor anything
that was computed on the host. Memory that it allocates is filled with NaN before each replay.
"""

from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}


class Operation(NamedTuple):
    """One that was seen, with its own tensors."""

    func: Any
    args: tuple
    kwargs: dict
    out: Any

    def is_view(self) -> bool:
        """Whether all that came out was there before: operations such as ``contiguous`` are views at times."""
        if self.func._schema.is_mutable:
            return False
        there = {x.untyped_storage()._cdata for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)}
        return all(x.untyped_storage()._cdata in there for x in tree_leaves(self.out) if isinstance(x, Tensor))

    def is_allocation(self) -> bool:
        return self.func._schema.name.split("::")[1] in ALLOCATIONS

    def run_again(self) -> None:
        if self.is_view():
            return
        if self.is_allocation():
            if self.out.is_floating_point():
                self.out.fill_(float("nan"))
            return
        again = self.func(*self.args, **self.kwargs)
        if not self.func._schema.is_mutable:
            for old, new in zip(tree_leaves(self.out), tree_leaves(again), strict=True):
                old.copy_(new)


class Operations(TorchDispatchMode):
    """PyTorch's operations inside, those of our operators' bodies too; kernels are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "proteinbert_fast":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        self.seen.append(Operation(func, args, kwargs, out))
        return out

    def launches(self) -> list[str]:
        """Those that do something on the device: no views, and more than allocations."""
        operations = [x for x in self.seen if isinstance(x, Operation)]
        return [str(x.func) for x in operations if not (x.is_view() or x.is_allocation())]


class FakeCuda:
    """Stands for torch.cuda where it is installed.

    Attributes:
        log: what was asked of it, in order.
        captures: arguments of each capture.
        pinned: pinned memory that was handed out.
        current: the current stream.
        recorder: of the capture under way, or None.
    """

    def __init__(self) -> None:
        self.log, self.captures, self.pinned = [], [], []
        self.n_streams = self.n_events = self.n_pools = self.n_graphs = 0
        self.recorder = None
        self.current = self.stream()

    def stream(self, device=None) -> "Stream":
        self.n_streams += 1
        return Stream(self, f"stream {self.n_streams}")

    def pool(self) -> tuple[int, int]:
        self.n_pools += 1
        return 0, self.n_pools

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def capture(self, graph, **arguments):
        self.captures.append(arguments)
        self.log.append(f"capture {graph.number}")
        with self.on(arguments["stream"]):
            self.recorder = graph.recorder = Operations()
            try:
                with graph.recorder:
                    yield
            finally:
                self.recorder = None

    def make_pinned(self, n_bytes: int) -> torch.Tensor:
        self.pinned.append(torch.full((n_bytes,), 0xAA, dtype=torch.uint8))
        return self.pinned[-1]

    def install(self, monkeypatch) -> None:
        from triton.runtime.interpreter import InterpretedFunction

        from proteinbert_fast import graphs
        from proteinbert_fast.ops import prepared

        for name, value in {
            "Stream": self.stream,
            "CUDAGraph": lambda: Graph(self),
            "current_stream": lambda device=None: self.current,
            "device": lambda device: nullcontext(),
            "graph": self.capture,
            "graph_pool_handle": self.pool,
            "stream": self.on,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "_can_capture", lambda device: True)
        monkeypatch.setattr(graphs, "_pinned", self.make_pinned)
        monkeypatch.setattr(prepared, "_is_capturing", lambda device: self.recorder is not None)
        monkeypatch.setattr(prepared, "_current_stream", lambda device: self.current)
        lent = lambda tensor, stream: self.log.append(f"{stream.name} keeps memory")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", lent)
        plain = InterpretedFunction.run

        def run(kernel, *args, **kwargs):
            def launch() -> None:
                with _disable_current_modes():
                    plain(kernel, *args, **kwargs)

            if self.recorder is not None:
                self.recorder.seen.append(launch)
            launch()

        monkeypatch.setattr(InterpretedFunction, "run", run)


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self) -> "Event":
        self.cuda.n_events += 1
        self.cuda.log.append(f"{self.name} records {self.cuda.n_events}")
        return Event(self.cuda, self.cuda.n_events)

    def wait_event(self, event: "Event") -> None:
        self.cuda.log.append(f"{self.name} waits for {event.number}")

    def wait_stream(self, stream: "Stream") -> None:
        self.cuda.log.append(f"{self.name} waits for {stream.name}")


class Event:
    def __init__(self, cuda: FakeCuda, number: int) -> None:
        self.cuda, self.number = cuda, number

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.number}")


class Graph:
    def __init__(self, cuda: FakeCuda) -> None:
        cuda.n_graphs += 1
        self.cuda, self.number, self.recorder = cuda, cuda.n_graphs, None

    def replay(self) -> None:
        self.cuda.log.append(f"replay {self.number} on {self.cuda.current.name}")
        for each in self.recorder.seen:
            each.run_again() if isinstance(each, Operation) else each()

    def __del__(self) -> None:
        self.cuda.log.append(f"destroy {self.number}")
