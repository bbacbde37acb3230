"""Small forward passes as CUDA graphs: one launch for a call whose kernels are shorter than their launches."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from proteinbert_fast._tokenizer import GAP
from proteinbert_fast.errors import BackendError
from proteinbert_fast.model import Annotations, AttentionReader, ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch

ROWS = 256  # graphs are made for multiples of it
MOST_ROWS = 8192
MOST_PROTEINS = 64


class _Size(NamedTuple):
    """What a graph is made for."""

    rows: int
    proteins: int
    gap: int
    hidden_states: bool
    attentions: bool


class _Graph(NamedTuple):
    """A captured forward pass."""

    tokens: Tensor  # (rows,) uint8: written before each replay
    places: Tensor  # (2, proteins) int64, starts and lengths: written before each replay
    replay: Callable[[], None]
    out: ProteinBertOutput  # written by each replay


class GraphedForward:
    """A model whose small forward passes are replayed as CUDA graphs, with the same bits as the model's own.

    A graph is captured the first time that a batch of its size comes: rows rounded up to a multiple of 256, proteins to
    a power of two. Batches of more than 8,192 rows or 64 proteins, and calls with annotations, run as they would
    without. Weights may be changed in place; if they move (``model.to``), graphs are captured anew. No gradients.

    Args:
        model: on a CUDA GPU; its back end must run the Triton kernels.

    Raises:
        BackendError: the model is not on a GPU, or its back end is another one.
    """

    def __init__(self, model: ProteinBert) -> None:
        device = model.token_embedding.weight.device
        if not _can_capture(device):
            raise BackendError(f"GraphedForward: the model is on {device}, CUDA graphs need a CUDA GPU: call the model")
        if (report := model.backend_report()).split()[0] != "triton":
            raise BackendError(f"GraphedForward: needs the Triton kernels, but the back end is {report}")
        self.model = model
        self._graphs: dict[_Size, _Graph] = {}
        self._made_for: object = None
        self._done: torch.cuda.Event | None = None
        self._lock = threading.Lock()

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
            self._forget_if_changed()
            if size not in self._graphs:
                self._graphs[size] = self._capture(size, device)
            graph = self._graphs[size]
            self._wait(device)
            graph.tokens[: batch.n_rows].copy_(batch.tokens, non_blocking=True)
            graph.tokens[batch.n_rows :] = GAP
            places = torch.zeros(2, size.proteins, dtype=torch.int64, pin_memory=device.type == "cuda")
            # Places of no protein lie behind all rows and are empty.
            places[0] = rows
            places[0, : len(batch)] = torch.from_numpy(batch.host_starts.copy())
            places[1, : len(batch)] = torch.from_numpy(batch.host_lengths.copy())
            graph.places.copy_(places, non_blocking=True)
            graph.replay()
            out = _part_of(graph.out, batch, device)
            if device.type == "cuda":
                self._done = torch.cuda.current_stream(device).record_event()
            return out

    def _wait(self, device: torch.device) -> None:
        """The last call's output was copied, also if that was on another stream."""
        if self._done is not None:
            torch.cuda.current_stream(device).wait_event(self._done)

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

    def _forget_if_changed(self) -> None:
        from proteinbert_fast.ops.precision import product_precision

        model, dtype = self.model, self.model.compute_dtype()
        made_for = (dtype, product_precision(dtype), [p.data_ptr() for p in model.parameters()])
        if made_for != self._made_for:
            self._graphs.clear()
            self._made_for = made_for

    def _capture(self, size: _Size, device: torch.device) -> _Graph:
        tokens = torch.full((size.rows,), GAP, dtype=torch.uint8, device=device)
        places = torch.zeros(2, size.proteins, dtype=torch.int64, device=device)
        # Something to run on while kernels are compiled.
        places[0] = size.rows
        places[0, 0], places[1, 0] = size.gap, 2

        def run() -> ProteinBertOutput:
            batch = PackedBatch.on_device(tokens, places[0], places[1], size.gap, longest=size.rows)
            return self._run(batch, None, size.hidden_states, size.attentions)

        replay, out = _captured(run, device)
        return _Graph(tokens, places, replay, out)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


def _captured(
    run: Callable[[], ProteinBertOutput], device: torch.device
) -> tuple[Callable[[], None], ProteinBertOutput]:
    """A graph of ``run``: what replays it, and the output that is written by each replay."""
    with torch.cuda.device(device):
        beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        # Compiling and a library's first call are no part of a graph.
        with torch.cuda.stream(beside):
            run()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
    return graph.replay, out


def _part_of(out: ProteinBertOutput, batch: PackedBatch, device: torch.device) -> ProteinBertOutput:
    """A copy of what a graph wrote, without what was filled up."""
    n_rows, n_proteins = batch.n_rows, len(batch)

    def all_of(layers: tuple[Tensor, ...] | None, n: int) -> tuple[Tensor, ...] | None:
        return None if layers is None else tuple(layer[:n].clone() for layer in layers)

    return ProteinBertOutput(
        batch=batch.to(device),
        local_rows=out.local_rows[:n_rows].clone(),
        global_state=out.global_state[:n_proteins].clone(),
        hidden_local=all_of(out.hidden_local, n_rows),
        hidden_global=all_of(out.hidden_global, n_proteins),
        attentions=all_of(out.attentions, n_rows),
        local_mean=out.residue_mean()[:n_proteins].clone(),
        heads=out.heads,
    )
