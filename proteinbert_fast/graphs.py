"""Small forward passes as CUDA graphs: one launch for a call whose kernels are shorter than their launches."""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proteinbert_fast._tokenizer import GAP
from proteinbert_fast.errors import BackendError, InputError
from proteinbert_fast.model import Annotations, AttentionReader, ProteinBert
from proteinbert_fast.ops import prepared
from proteinbert_fast.ops.precision import product_precision
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.spans import HostLayout

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

ROWS = 256  # graphs are made for multiples of it
MOST_ROWS = 8192
MOST_PROTEINS = 64
_ALIGNMENT = 256  # bytes; Triton compiles other kernels for addresses that are no multiples of 16
_DTYPES = {"int64": torch.int64, "int32": torch.int32, "uint8": torch.uint8}
# PyTorch's allocator and its streams are shared by all that captures.
_capturing = threading.Lock()


class _Size(NamedTuple):
    """What a graph is made for."""

    rows: int
    proteins: int
    gap: int
    hidden_states: bool
    attentions: bool


class _Memory(NamedTuple):
    """What all graphs allocate from; PyTorch shares a pool's memory among captures on one stream only."""

    pool: "_POOL_HANDLE"
    stream: torch.cuda.Stream


class _Inputs:
    """All that a graph reads of a batch, in one buffer of bytes: the layout, then the tokens.

    Args:
        size: of the batch.
        device: where the buffer lies.
    """

    def __init__(self, size: _Size, device: torch.device) -> None:
        from proteinbert_fast.ops.kernels.global_attention import SPAN

        self._size, self._span = size, SPAN
        parts: list[tuple[int, np.dtype[Any]]] = [
            *((n, np.dtype(np.int64)) for n in (size.proteins, size.proteins, size.proteins + 1)),
            *((n, np.dtype(np.int32)) for n in (size.rows, size.rows // SPAN + size.proteins)),
            (size.rows, np.dtype(np.uint8)),
        ]
        self._places, end = [], 0
        for n, dtype in parts:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + n * dtype.itemsize
            self._places.append((slice(start, end), dtype))
        self._buffer = torch.empty(end, dtype=torch.uint8, device=device)

    def write(self, batch: PackedBatch) -> None:
        """Copies a batch from the host in one go; tokens that lie on a device are copied from there."""
        # A new one for every call: PyTorch gives pinned memory away again only when copies from it are done.
        host = _pinned(len(self._buffer))
        array = host.numpy()
        *layout, tokens = (array[place].view(dtype) for place, dtype in self._places)
        HostLayout(*layout).fill(batch.host_starts, batch.host_lengths, batch.gap, self._span)
        n_rows = batch.n_rows
        if _is_on_host(batch.tokens):
            tokens[:n_rows], tokens[n_rows:] = batch.tokens.numpy(), GAP
            self._buffer.copy_(host, non_blocking=True)
        else:
            place, _ = self._places[-1]
            self._buffer[: place.start].copy_(host[: place.start], non_blocking=True)
            self._buffer[place][:n_rows].copy_(batch.tokens, non_blocking=True)
            self._buffer[place][n_rows:] = GAP

    def batch(self) -> PackedBatch:
        """What a graph runs on: views of the buffer."""
        starts, lengths, first_span, segments, span_protein, tokens = self._views(self._buffer)
        spans = {self._span: (span_protein, first_span)}
        return PackedBatch.on_device(tokens, starts, lengths, self._size.gap, self._size.rows, segments, spans)

    def copied(self, batch: PackedBatch) -> PackedBatch:
        """The batch that was written, on the device."""
        if not _is_on_host(batch.tokens):
            return batch.to(self._buffer.device)
        starts, lengths, *_, tokens = self._views(self._buffer.clone())
        return batch.moved(tokens[: batch.n_rows], starts[: len(batch)], lengths[: len(batch)])

    def _views(self, buffer: Tensor) -> list[Tensor]:
        """int64 starts, lengths and first_span, int32 segments and span_protein, uint8 tokens."""
        return [buffer[place].view(_DTYPES[dtype.name]) for place, dtype in self._places]


@dataclass
class _Graph:
    """A captured forward pass.

    Attributes:
        inputs: written before each replay.
        replay: launches it on the current stream.
        out: written by each replay.
        weights: what kernels made of the model's weights, which each replay reads.
        done: after the last replay and the copy of its output.
    """

    inputs: _Inputs
    replay: Callable[[], None]
    out: ProteinBertOutput
    weights: list[prepared.Prepared]
    done: torch.cuda.Event | None = None


class GraphedForward:
    """A model whose small forward passes are replayed as CUDA graphs, with the same bits as the model's own.

    A graph is captured the first time that a batch of its size comes: rows rounded up to a multiple of 256, proteins to
    a power of two. Batches of more than 8,192 rows or 64 proteins, and calls with annotations, run as they would
    without. Weights may be changed in place; if they move (``model.to``), graphs are captured anew. No gradients.

    In evaluation mode, graphs read what kernels made of the weights, which is made again, in place, before the next
    replay if weights have changed; ``forget_prepared_weights`` says which writes go unnoticed. In training mode they
    make it in every replay.

    Args:
        model: on a CUDA GPU; its back end must run the Triton kernels.
        most_graphs: that are kept. Beyond it, the one that was not used for the longest time goes. They share the
            memory of their intermediate results, so that each further one takes that of its inputs and results.

    Raises:
        BackendError: the model is not on a GPU, or its back end is another one.
        InputError: ``most_graphs`` is below 1.
    """

    def __init__(self, model: ProteinBert, most_graphs: int = 32) -> None:
        device = model.token_embedding.weight.device
        if not _can_capture(device):
            raise BackendError(f"GraphedForward: the model is on {device}, CUDA graphs need a CUDA GPU: call the model")
        if (report := model.backend_report()).split()[0] != "triton":
            raise BackendError(f"GraphedForward: needs the Triton kernels, but the back end is {report}")
        if most_graphs < 1:
            raise InputError(f"GraphedForward: most_graphs must be from 1, got {most_graphs}")
        self.model = model
        self.most_graphs = most_graphs
        self._graphs: dict[_Size, _Graph] = {}  # least recently used first
        self._memory: _Memory | None = None
        self._made_for: object = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()
        # At exit nothing is waited for: the driver may be gone by then.
        weakref.finalize(self, _drop, self._graphs).atexit = False

    def __call__(
        self,
        batch: PackedBatch,
        annotations: Annotations | None = None,
        *,
        hidden_states: bool = False,
        attentions: bool | AttentionReader = False,
    ) -> ProteinBertOutput:
        """As ``ProteinBert.forward`` on a PackedBatch, which may still lie on the CPU.

        Args:
            batch: the proteins.
            annotations: as for the model; with them, no graph is used.
            hidden_states: keep the states after every norm of every block.
            attentions: as for the model; with what reads them, no graph is used.
        """
        device = self.model.token_embedding.weight.device
        is_small = batch.n_rows <= MOST_ROWS and 0 < len(batch) <= MOST_PROTEINS
        if annotations is not None or callable(attentions) or not is_small:
            with torch.no_grad():
                return self._run(batch.to(device), annotations, hidden_states, attentions)
        rows = -(-batch.n_rows // ROWS) * ROWS
        size = _Size(rows, 1 << (len(batch) - 1).bit_length(), batch.gap, hidden_states, attentions)
        # Buffers made in inference mode could not be written outside it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            # Replays come one after another, whatever streams they are on: they share inputs, results and memory.
            if self._done is not None:
                torch.cuda.current_stream(device).wait_event(self._done)
            graph = self._ready(size, batch, device)
            graph.inputs.write(batch)
            try:
                graph.replay()
                return _part_of(graph, batch)
            finally:
                self._done = graph.done = torch.cuda.current_stream(device).record_event()

    def _run(
        self,
        batch: PackedBatch,
        annotations: Annotations | None,
        hidden_states: bool,
        attentions: bool | AttentionReader,
    ) -> ProteinBertOutput:
        out = self.model(batch, annotations, hidden_states=hidden_states, attentions=attentions)
        assert isinstance(out, ProteinBertOutput)
        return out

    def _ready(self, size: _Size, batch: PackedBatch, device: torch.device) -> _Graph:
        """The graph of a size, which reads the weights as they are now."""
        model, dtype = self.model, self.model.compute_dtype()
        made_for = (dtype, product_precision(dtype), model.training, [p.data_ptr() for p in model.parameters()])
        if made_for != self._made_for:
            _drop(self._graphs)
            self._made_for = made_for
        graph = self._graphs.pop(size, None)
        if graph is not None and not prepared.renewed(graph.weights):
            self._graphs[size] = graph
            _drop(self._graphs)
            graph = None
        if graph is None:
            _drop(self._graphs, self.most_graphs - 1)
            graph = self._capture(size, batch, device)
        self._graphs[size] = graph
        return graph

    def _capture(self, size: _Size, batch: PackedBatch, device: torch.device) -> _Graph:
        inputs = _Inputs(size, device)
        inputs.write(batch)  # kernels are compiled by running them

        def run() -> ProteinBertOutput:
            return self._run(inputs.batch(), None, size.hidden_states, size.attentions)

        # One pool for all: a graph's intermediate results may lie where another one's do, or where another one's
        # results do. That is safe because replays never overlap, each writes all that it reads there, and its results
        # are copied before the next begins. What must outlast a replay (inputs, weights and what was made of them) is
        # not in the pool. A pool ends with its last graph, and may not be captured into again.
        if not self._graphs or self._memory is None:
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._memory = _Memory(torch.cuda.graph_pool_handle(), stream)
        with _capturing, prepared.recording() as weights:
            replay, out = _captured(run, device, self._memory)
        prepared.renewed(weights)  # by other threads, on other streams, meanwhile
        return _Graph(inputs, replay, out, weights)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _is_on_host(tokens: Tensor) -> bool:
    return tokens.device.type == "cpu"


def _pinned(n_bytes: int) -> Tensor:
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)


def _captured(
    run: Callable[[], ProteinBertOutput], device: torch.device, memory: _Memory
) -> tuple[Callable[[], None], ProteinBertOutput]:
    """A graph of ``run``: what replays it, and the output that is written by each replay."""
    with torch.cuda.device(device):
        pool, beside = memory
        beside.wait_stream(torch.cuda.current_stream())
        # Compiling and a library's first call are no part of a graph.
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: what others do meanwhile, memory that they ask for, is neither captured nor an error.
        with torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
            out = run()
    return graph.replay, out


def _drop(graphs: dict[_Size, _Graph], n_kept: int = 0) -> None:
    """The least recently used graphs go, each after its last replay, which would lose the memory that it uses."""
    while len(graphs) > n_kept:
        oldest = next(iter(graphs))
        if (done := graphs[oldest].done) is not None:
            done.synchronize()
        del graphs[oldest]


def _part_of(graph: _Graph, batch: PackedBatch) -> ProteinBertOutput:
    """A copy of what a graph wrote, without what was filled up."""
    n_rows, n_proteins, out = batch.n_rows, len(batch), graph.out

    def all_of(layers: tuple[Tensor, ...] | None, n: int) -> tuple[Tensor, ...] | None:
        return None if layers is None else tuple(layer[:n].clone() for layer in layers)

    return ProteinBertOutput(
        batch=graph.inputs.copied(batch),
        local_rows=out.local_rows[:n_rows].clone(),
        global_state=out.global_state[:n_proteins].clone(),
        hidden_local=all_of(out.hidden_local, n_rows),
        hidden_global=all_of(out.hidden_global, n_proteins),
        attentions=all_of(out.attentions, n_rows),
        local_mean=out.residue_mean()[:n_proteins].clone(),
        heads=out.heads,
    )
