"""Records to rows of embeddings: windows of records, length-sorted batches in each, results in input order.

A window is a run of records whose batches are put together at once. It ends where the input says (so many
residues, so many bytes of results), never by the clock: a run that starts again at the end of a window
computes the same batches.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from proteinbert_fast.data.fasta import FastaRecord
from proteinbert_fast.embedding.selection import Selection
from proteinbert_fast.embedding.sources import cut, n_residues
from proteinbert_fast.errors import BackendError, ProteinBertError
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch, batches_by_tokens
from proteinbert_fast.tokenizer import Tokenizer

Rows = npt.NDArray[Any]

NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {
    torch.float16: np.dtype("<f2"),
    torch.float32: np.dtype("<f4"),
}
_BATCHES_PER_WINDOW = 16
_WINDOW_BYTES = 1 << 26  # of results
_PIECE_ROWS = 1 << 16  # packed rows whose results are converted at a time


@dataclass(frozen=True)
class Window:
    """Records in input order, and the batches that compute them.

    Attributes:
        ids: of the records.
        places: where each record stands, for messages.
        lengths: residues to embed.
        full_lengths: residues of the record.
        batches: numbers of records within the window, and their tokens.
    """

    ids: list[str]
    places: list[str]
    lengths: list[int]
    full_lengths: list[int]
    batches: list[tuple[npt.NDArray[np.int64], PackedBatch]]


@dataclass(frozen=True)
class Plan:
    """How a run computes.

    Attributes:
        selection: what is taken from the model's output.
        storage: dtype of the results.
        autocast: dtype to compute in where the model's own is not to be used.
        tokens_per_batch: most packed rows of a batch.
        max_length: most residues of a record; the rest is cut off.
    """

    selection: Selection
    storage: torch.dtype
    autocast: torch.dtype | None
    tokens_per_batch: int
    max_length: int | None

    @property
    def per_residue(self) -> bool:
        """Whether a record has a row for each residue."""
        return self.selection.per == "residue"

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of results."""
        return self.selection.width * self.storage.itemsize

    @contextmanager
    def computing(self, device: torch.device) -> Iterator[None]:
        """The modes of torch to compute in. They are those of the whole thread: yield nothing within."""
        enabled = self.autocast is not None
        with torch.inference_mode(), torch.autocast(device.type, self.autocast, enabled=enabled):
            yield


def windows(
    records: Iterable[FastaRecord], plan: Plan, gap: int, on_cut: Callable[[str], object], skip: int = 0
) -> Iterator[Window]:
    """Cuts a stream of records into windows and tokenises them.

    Args:
        records: in input order.
        plan: sizes.
        gap: rows between proteins.
        on_cut: is told of each record that is longer than ``plan.max_length``, a line each.
        skip: records that are done already.
    """
    tokenizer = Tokenizer(gap=gap)
    most_residues = _BATCHES_PER_WINDOW * plan.tokens_per_batch
    most_rows = max(1, _WINDOW_BYTES // plan.row_bytes)
    if plan.per_residue:
        most_residues = min(most_residues, most_rows)
    gathered: list[FastaRecord] = []
    residues = 0
    for record in islice(records, skip, None):
        n = n_residues(record.sequence)
        if plan.max_length is not None:
            n = min(n, plan.max_length)
        full = residues + n > most_residues or (not plan.per_residue and len(gathered) == most_rows)
        if gathered and full:
            yield _window(gathered, plan, tokenizer, on_cut)
            gathered, residues = [], 0
        gathered.append(record)
        residues += n
    if gathered:
        yield _window(gathered, plan, tokenizer, on_cut)


def _window(records: list[FastaRecord], plan: Plan, tokenizer: Tokenizer, on_cut: Callable[[str], object]) -> Window:
    full_lengths = [n_residues(record.sequence) for record in records]
    lengths, sequences = full_lengths, [record.sequence for record in records]
    most = plan.max_length
    if most is not None and max(full_lengths) > most:
        lengths = [min(n, most) for n in full_lengths]
        for i, n in enumerate(full_lengths):
            if n > most:
                sequences[i] = cut(sequences[i], most)
                on_cut(f"{records[i].place}: {n:,} residues, cut to the first {most:,}")
    tokens = np.array(lengths) + 2
    batches = [
        (numbers, tokenizer([sequences[i] for i in numbers], ids=[records[i].id for i in numbers]))
        for numbers in batches_by_tokens(tokens, plan.tokens_per_batch, tokenizer.gap)
    ]
    return Window([r.id for r in records], [r.place for r in records], lengths, full_lengths, batches)


class Embedder:
    """Computes windows with a model.

    Args:
        model: on its device.
        plan: what to compute.
        on_residues: is told how many residues each batch had.
        on_overflow: is told of each record with a value too large for the storage dtype, a line each.

    Attributes:
        n_overflowed: such records in the last window.
    """

    def __init__(
        self,
        model: ProteinBert,
        plan: Plan,
        on_residues: Callable[[int], object],
        on_overflow: Callable[[str], object],
    ) -> None:
        self.n_overflowed = 0
        self._model = model
        self._plan = plan
        self._device = model.token_embedding.weight.device
        self._on_residues = on_residues
        self._on_overflow = on_overflow
        self._all_finite = True

    def rows(self, window: Window) -> Iterator[Rows]:
        """The window's results in input order, (some, width) at a time.

        Raises:
            ProteinBertError: the model's output is not finite; names the record.
            BackendError: the memory does not suffice for a batch.
        """
        self.n_overflowed = 0
        self._all_finite = True
        if self._plan.per_residue and len(window.ids) == 1:
            yield from self._long_protein(window)
            return
        sizes = np.array(window.lengths) if self._plan.per_residue else np.ones(len(window.ids), np.int64)
        ends = np.cumsum(sizes)
        results = np.empty((int(ends[-1]), self._plan.selection.width), NUMPY_DTYPE[self._plan.storage])
        for numbers, batch in window.batches:
            self._fill(results, (ends - sizes)[numbers], numbers, batch)
            self._on_residues(sum(window.lengths[i] for i in numbers))
        if not self._all_finite:
            broken = np.flatnonzero(~np.isfinite(results).all(axis=1))
            records = np.unique(np.searchsorted(ends, broken, side="right"))
            self._judge(window, records.tolist(), bool(np.isnan(results[broken]).any()))
        yield results

    def _long_protein(self, window: Window) -> Iterator[Rows]:
        """Results of a window of one protein: never all of them at a time."""
        ((_, batch),) = window.batches
        out = self._run(batch)
        begin = int(batch.host_starts[0]) + 1
        end = begin + window.lengths[0]
        has_nan = False
        for first in range(begin, end, _PIECE_ROWS):
            piece = self._rows_of(out, first, min(first + _PIECE_ROWS, end))
            has_nan = has_nan or (not self._all_finite and bool(np.isnan(piece).any()))
            yield piece
        if not self._all_finite:
            self._judge(window, [0], has_nan)
        self._on_residues(window.lengths[0])

    def _fill(
        self,
        results: Rows,
        offsets: npt.NDArray[np.int64],
        numbers: npt.NDArray[np.int64],
        batch: PackedBatch,
    ) -> None:
        """Computes one batch and puts its rows where they belong."""
        out = self._run(batch)
        if not self._plan.per_residue:
            with self._computing(batch):
                results[numbers] = self._stored(self._plan.selection.of_proteins(out))
            return
        begins = (batch.host_starts + 1).tolist()
        ends = (batch.host_starts + batch.host_lengths - 1).tolist()
        for first in range(0, batch.n_rows, _PIECE_ROWS):
            stop = min(first + _PIECE_ROWS, batch.n_rows)
            piece = self._rows_of(out, first, stop)
            for offset, begin, end in zip(offsets.tolist(), begins, ends, strict=True):
                low, high = max(begin, first), min(end, stop)
                if low < high:
                    results[offset + low - begin : offset + high - begin] = piece[low - first : high - first]

    def _run(self, batch: PackedBatch) -> ProteinBertOutput:
        with self._computing(batch):
            if self._device.type == "cuda":
                batch = batch.pin_memory().to(self._device, non_blocking=True)
            hidden_states = self._plan.selection.needs_hidden_states
            return cast(ProteinBertOutput, self._model(batch, hidden_states=hidden_states))

    def _rows_of(self, out: ProteinBertOutput, first: int, stop: int) -> Rows:
        with self._computing(out.batch):
            return self._stored(self._plan.selection.of_rows(out, first, stop))

    def _stored(self, values: torch.Tensor) -> Rows:
        values = values.to(self._plan.storage)
        # Rows in gaps count here too, so this only tells whether a closer look is due.
        if self._all_finite and values.numel():
            # Where there is a NaN, both are. In a tenth of the time of isfinite over all.
            least, largest = values.aminmax()
            self._all_finite = bool(torch.isfinite(least) & torch.isfinite(largest))
        rows: Rows = values.cpu().numpy()
        return rows

    @contextmanager
    def _computing(self, batch: PackedBatch) -> Iterator[None]:
        """Torch's modes for a piece of work, and a clear line when the memory does not suffice for it."""
        try:
            with self._plan.computing(self._device):
                yield
        except (MemoryError, RuntimeError) as error:
            out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not out_of_memory and "allocate memory" not in str(error):
                raise
            first = batch.ids[0] if batch.ids else "0"
            advice = f"use fewer tokens per batch (now {self._plan.tokens_per_batch:,})"
            if len(batch) == 1:
                advice = "cut it with a max length, or use a machine with more"
            raise BackendError(
                f"the memory of {self._device} does not suffice for {len(batch):,} proteins of "
                f"{batch.n_tokens:,} tokens, {first} the first: {advice}"
            ) from error

    def _judge(self, window: Window, records: list[int], has_nan: bool) -> None:
        if not records:
            return
        if has_nan or self._plan.storage != torch.float16:
            raise ProteinBertError(
                f"{window.places[records[0]]}: the model's output is not finite: its weights are damaged, "
                "or too large for this dtype"
            )
        self.n_overflowed = len(records)
        for i in records:
            self._on_overflow(
                f"{window.places[i]}: has values over 65,504, which float16 stores as infinite; "
                "storage dtype float32 keeps them"
            )
