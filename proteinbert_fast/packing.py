"""Proteins packed into one flat array of rows, with gaps between them instead of padding.

Layout of a batch with gap ``g``::

    g gap rows | protein 0 | g gap rows | protein 1 | ... | last protein | g gap rows

so ``rows = g + sum(length_i + g)``. A gap as wide as the reach of the wide convolution (20 rows) makes the
zero padding of "same" convolution part of the array: an operation runs over all rows at once, and loads need no
mask.

The layout follows from the lengths and the gap alone, and both are always known on the host. So nothing here
waits for a GPU, except for the checks of token values that lie on one (each says so).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from proteinbert_fast._tokenizer import GAP, PAD, START
from proteinbert_fast.errors import BackendError, InputError
from proteinbert_fast.spans import cut_into_spans

__all__ = ["PackedBatch", "batches_by_tokens"]

Int64Array = npt.NDArray[np.int64]


class PackedBatch:
    """A batch of proteins as one array of token rows. Treat it as immutable.

    Args:
        tokens: uint8 tensor (rows,): GAP in gap rows, 0..25 in the others.
        lengths: tokens of each protein, START and END included; host integers (batch,), each at least 1.
        gap: gap rows before, between and after the proteins.
        ids: one name per protein, or None.

    Attributes:
        tokens: uint8 tensor (rows,).
        starts: int64 tensor (batch,): first row of each protein.
        lengths: int64 tensor (batch,): tokens of each protein.
        gap: gap rows before, between and after the proteins.
        ids: tuple of one name per protein, or None.
        host_starts, host_lengths: starts and lengths as read-only numpy arrays, which stay on the host.

    Raises:
        InputError: the lengths, the number of rows and the gap rows do not agree, or a row holds no token.
            (This reads every row once; on a GPU it waits for it.)
    """

    __slots__ = (
        "_longest",
        "_n_residues",
        "_segments",
        "_spans",
        "gap",
        "host_lengths",
        "host_starts",
        "ids",
        "lengths",
        "starts",
        "tokens",
    )

    tokens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    gap: int
    ids: tuple[str, ...] | None
    host_starts: Int64Array
    host_lengths: Int64Array
    _longest: int  # an int of its own, because compiled code cannot read the arrays
    _segments: torch.Tensor | None
    _spans: dict[int, tuple[torch.Tensor, torch.Tensor]]
    _n_residues: int | None

    def __init__(
        self,
        tokens: torch.Tensor,
        lengths: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor,
        gap: int = 20,
        ids: Sequence[str] | None = None,
    ) -> None:
        check_gap(gap)
        if tokens.dtype != torch.uint8 or tokens.dim() != 1:
            got = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise InputError(f"packed batch: tokens must be uint8 (rows,), got {got}")
        host_lengths = _host_lengths(lengths)
        n_rows = gap + int((host_lengths + gap).sum())
        if n_rows != len(tokens):
            raise InputError(f"packed batch: lengths and gap want {n_rows} rows, tokens has {len(tokens)}")
        self._set(tokens, _starts(host_lengths, gap), host_lengths, gap, ids)
        in_gap = self.segments < 0
        wrong = (tokens > GAP) | ((tokens == GAP) != in_gap)
        if wrong.any():
            row = int(wrong.to(torch.uint8).argmax())
            protein = int(self.segments[row])
            expected = f"GAP ({GAP})" if protein < 0 else f"a token 0..{PAD}"
            where = f"row {row}" if protein < 0 else f"row {row}, {self._name(protein)},"
            raise InputError(f"packed batch: {where} must hold {expected}, got {int(tokens[row])}")

    def _set(
        self,
        tokens: torch.Tensor,
        host_starts: Int64Array,
        host_lengths: Int64Array,
        gap: int,
        ids: Sequence[str] | None,
    ) -> None:
        if ids is not None and (isinstance(ids, str) or len(ids) != len(host_lengths)):
            raise InputError(f"packed batch: ids must be one name for each of {len(host_lengths)} proteins")
        self.tokens = tokens
        self.starts = torch.from_numpy(host_starts).to(tokens.device)
        self.lengths = torch.from_numpy(host_lengths).to(tokens.device)
        self.gap = gap
        self.ids = None if ids is None else tuple(ids)
        self.host_starts = _read_only(host_starts)
        self.host_lengths = _read_only(host_lengths)
        self._longest = int(host_lengths.max(initial=0))
        self._segments = None
        self._spans = {}
        self._n_residues = None

    @classmethod
    def _trusted(
        cls,
        tokens: torch.Tensor,
        lengths: Int64Array,
        gap: int,
        ids: Sequence[str] | None,
        starts: Int64Array | None = None,
    ) -> "PackedBatch":
        """A batch of rows that are known to be right: the tokenizer's, or part of another batch."""
        batch = cls.__new__(cls)
        batch._set(tokens, _starts(lengths, gap) if starts is None else starts, lengths, gap, ids)
        return batch

    @classmethod
    def on_device(
        cls,
        tokens: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        gap: int,
        longest: int,
        segments: torch.Tensor | None = None,
        spans: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> "PackedBatch":
        """A batch whose layout lies on the device alone, as CUDA graphs and exported programs need it.

        Nothing is checked, and what needs the layout on the host (unpacking, choosing proteins) is not to be had.

        Args:
            tokens: uint8 (rows,), GAP in gap rows.
            starts: int64 (batch,), rising; those of empty places lie behind all rows.
            lengths: int64 (batch,); 0 in empty places.
            gap: gap rows before, between and after the proteins, at least.
            longest: tokens of the longest protein, or more.
            segments: as the attribute; computed on the device when None.
            spans: what ``spans`` returns, by size; sizes that are missing are computed on the device.
        """
        batch = cls.__new__(cls)
        batch.tokens, batch.starts, batch.lengths = tokens, starts, lengths
        batch.gap, batch.ids, batch._longest = gap, None, longest
        if segments is None:
            rows = torch.arange(tokens.shape[0], device=tokens.device)
            protein = (torch.searchsorted(starts, rows, right=True) - 1).clamp(min=0)
            inside = (rows >= starts[protein]) & (rows < starts[protein] + lengths[protein])
            segments = protein.where(inside, -1).int()
        batch._segments, batch._spans, batch._n_residues = segments, dict(spans or {}), None
        return batch

    def __reduce__(self) -> tuple[Any, ...]:
        tokens = self.tokens
        if tokens.untyped_storage().nbytes() != tokens.numel():
            tokens = tokens.clone()  # a view would take the rows of the whole batch along
        return PackedBatch._trusted, (tokens, self.host_lengths.copy(), self.gap, self.ids)

    def __repr__(self) -> str:
        return (
            f"PackedBatch(proteins={len(self)}, tokens={self.n_tokens}, rows={self.n_rows}, "
            f"gap={self.gap}, device={str(self.device)!r})"
        )

    def __len__(self) -> int:
        """Number of proteins."""
        return self.lengths.shape[0]

    @property
    def n_rows(self) -> int:
        """Rows of the packed array, gaps included."""
        return self.tokens.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest protein; 0 in an empty batch."""
        return self._longest

    @property
    def n_tokens(self) -> int:
        """Tokens of all proteins: rows that are not in a gap."""
        return self.n_rows - self.gap * (len(self) + 1)

    @property
    def n_residues(self) -> int:
        """Tokens that stand for a residue: not START, END or PAD. Counted on the device the first time."""
        if self._n_residues is None:
            self._n_residues = int((self.tokens < START).sum())
        return self._n_residues

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.tokens.device

    @property
    def segments(self) -> torch.Tensor:
        """int32 tensor (rows,): the protein of each row, -1 in gap rows. Made the first time, then kept."""
        if self._segments is None:
            # Kept for later calls, which may want gradients: never an inference tensor.
            with torch.inference_mode(False):
                proteins = torch.full((2 * len(self) + 1,), -1, dtype=torch.int32, device=self.device)
                proteins[1::2] = torch.arange(len(self), dtype=torch.int32, device=self.device)
                rows = torch.full((2 * len(self) + 1,), self.gap, dtype=torch.int64, device=self.device)
                rows[1::2] = self.lengths
                # output_size: the number of rows is known, so a GPU need not be asked for it.
                self._segments = torch.repeat_interleave(proteins, rows, output_size=self.n_rows)
        return self._segments

    def spans(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The proteins cut into spans of ``size`` rows, each counted from its own first row. Kept after the first time.

        Returns:
            int32 (S,): the protein of each span; B in those beyond the last, because S is an upper bound.
            int64 (B + 1,): the first span of each protein, and how many there are.
        """
        if size not in self._spans:
            with torch.inference_mode(False):
                self._spans[size] = cut_into_spans(self.lengths, size, self.n_rows // size + self.lengths.shape[0])
        return self._spans[size]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PackedBatch":
        """This batch on ``device``; itself when it is there already."""
        tokens = self.tokens.to(device, non_blocking=non_blocking)
        if tokens is self.tokens:
            return self
        return self.moved(
            tokens,
            self.starts.to(device, non_blocking=non_blocking),
            self.lengths.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "PackedBatch":
        """This batch in page-locked memory, so that ``to(device, non_blocking=True)`` copies in the background.

        Raises:
            BackendError: there is no accelerator to pin memory for.
        """
        if not torch.accelerator.is_available():
            raise BackendError("pin_memory: no accelerator to pin memory for; leave it off on a CPU")
        return self.moved(self.tokens.pin_memory(), self.starts.pin_memory(), self.lengths.pin_memory())

    def moved(self, tokens: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> "PackedBatch":
        """This batch, of tensors that hold the same elsewhere."""
        batch = PackedBatch.__new__(PackedBatch)
        batch.tokens, batch.starts, batch.lengths = tokens, starts, lengths
        batch.gap, batch.ids = self.gap, self.ids
        batch.host_starts, batch.host_lengths = self.host_starts, self.host_lengths
        batch._longest = self._longest
        batch._segments, batch._spans, batch._n_residues = None, {}, self._n_residues
        return batch

    def with_tokens(self, tokens: torch.Tensor) -> "PackedBatch":
        """A batch of the same layout with other tokens, whose values are not checked.

        Args:
            tokens: uint8 tensor (rows,) on the same device: GAP in gap rows, 0..25 in the others.

        Raises:
            InputError: the tensor has another shape or dtype, or lies on another device.
        """
        if tokens.shape != self.tokens.shape or tokens.dtype != torch.uint8 or tokens.device != self.device:
            raise InputError(
                f"packed batch: tokens must be uint8 ({self.n_rows},) on {self.device}, "
                f"got {tokens.dtype} {tuple(tokens.shape)} on {tokens.device}"
            )
        batch = PackedBatch.__new__(PackedBatch)
        for name in PackedBatch.__slots__:
            if hasattr(self, name):  # a batch whose layout lies on the device alone has no more
                setattr(batch, name, getattr(self, name))
        batch.tokens, batch._n_residues = tokens, None
        return batch

    def __getitem__(self, index: int | slice | Sequence[int] | npt.NDArray[Any] | torch.Tensor) -> "PackedBatch":
        """The chosen proteins as a batch.

        One protein, or a slice of neighbours, is a view of the same rows; a list, an integer or boolean array,
        or a slice with a step copies them.

        Raises:
            IndexError: there is no such protein.
        """
        if isinstance(index, int | np.integer):
            i = range(len(self))[int(index)]
            return self._neighbours(i, i + 1)
        if isinstance(index, slice):
            first, stop, step = index.indices(len(self))
            if step == 1:
                return self._neighbours(first, max(first, stop))
            return self._gathered(np.arange(first, stop, step))
        chosen = np.asarray(index.cpu() if isinstance(index, torch.Tensor) else index)
        if chosen.ndim == 1 and chosen.size == 0:
            chosen = chosen.astype(np.int64)  # numpy makes an empty list float
        if chosen.ndim != 1 or chosen.dtype.kind not in "iub":
            raise IndexError(f"proteins are chosen by an int, a slice or a list of integers, not {index!r}")
        # numpy checks the range, resolves negative numbers and reads masks.
        return self._gathered(np.arange(len(self))[chosen])

    def parts(self, n_rows: int) -> Iterator[tuple[int, slice, "PackedBatch"]]:
        """Views of neighbouring proteins, as many at a time as fit into ``n_rows`` rows, but at least one.

        Yields:
            The first of the proteins, where their rows lie, and the batch of them.
        """
        ends, first = self.host_starts + self.host_lengths + self.gap, 0
        while first < len(self):
            start = int(self.host_starts[first]) - self.gap
            stop = max(int(np.searchsorted(ends, start + n_rows, side="right")), first + 1)
            yield first, slice(start, int(ends[stop - 1])), self._neighbours(first, stop)
            first = stop

    def _neighbours(self, first: int, stop: int) -> "PackedBatch":
        if first == stop:
            rows = self.tokens[: self.gap]
        else:
            end = int(self.host_starts[stop - 1] + self.host_lengths[stop - 1])
            rows = self.tokens[int(self.host_starts[first]) - self.gap : end + self.gap]
        ids = None if self.ids is None else self.ids[first:stop]
        return PackedBatch._trusted(rows, self.host_lengths[first:stop].copy(), self.gap, ids)

    def _gathered(self, proteins: Int64Array) -> "PackedBatch":
        # Each block is a protein and the gap before it; the last gap of the batch ends the array.
        blocks = self.host_lengths[proteins] + self.gap
        rows = np.empty(int(blocks.sum()) + self.gap, dtype=np.int64)
        rows[: rows.size - self.gap] = _ranges(self.host_starts[proteins] - self.gap, blocks)
        rows[rows.size - self.gap :] = np.arange(self.gap)
        ids = None if self.ids is None else [self.ids[i] for i in proteins]
        tokens = self.tokens[torch.from_numpy(rows).to(self.device)]
        return PackedBatch._trusted(tokens, self.host_lengths[proteins], self.gap, ids)

    def unpack(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Views of each protein's rows, gaps left out.

        Args:
            rows: any tensor (n_rows, ...).

        Returns:
            One tensor (length_i, ...) per protein.

        Raises:
            InputError: the tensor has another number of rows.
        """
        self._check_rows(rows)
        sizes = np.full(2 * len(self) + 1, self.gap)
        sizes[1::2] = self.host_lengths
        # One split, not a slice per protein: the gradient of a slice is as big as all rows.
        return list(torch.split(rows, sizes.tolist()))[1::2]

    def to_padded(
        self, rows: torch.Tensor | None = None, value: float | None = None, length: int | None = None
    ) -> torch.Tensor:
        """The proteins below each other, filled up at the end. Differentiable.

        Args:
            rows: any tensor (n_rows, ...); the tokens when None.
            value: fills the rest; when None, PAD for the tokens and 0 for other rows.
            length: columns of the result; the longest protein's tokens when None.

        Returns:
            Tensor (batch, length, ...) of the dtype of ``rows``.

        Raises:
            InputError: a protein has more tokens than ``length``, or the tensor has another number of rows.
        """
        if value is None:
            value = PAD if rows is None else 0
        rows = self.tokens if rows is None else rows
        self._check_rows(rows)
        if length is None:
            length = self._longest
        elif length < self._longest:
            record = self._name(int(self.host_lengths.argmax()))
            raise InputError(f"to_padded: {record} has {self._longest} tokens, more than length {length}")
        padded = rows.new_full((len(self) * length, *rows.shape[1:]), value)
        source, target = self._token_rows(length)
        padded = padded.index_copy(0, target, rows.index_select(0, source))
        return padded.view(len(self), length, *rows.shape[1:])

    def rows_of_padded(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of ``to_padded``: what belongs to the proteins' tokens as packed rows, zeros in gaps.

        Args:
            values: any tensor (batch, length, ...), with at least the longest protein's columns.

        Returns:
            Tensor (n_rows, ...) of the same dtype.

        Raises:
            InputError: the shape does not fit.
        """
        if values.dim() < 2 or values.shape[0] != len(self) or values.shape[1] < self._longest:
            wanted = f"({len(self)}, {self._longest} or more, ...)"
            raise InputError(f"packed batch: a padded tensor {tuple(values.shape)} where {wanted} is wanted")
        target, source = self._token_rows(values.shape[1])
        rows = values.new_zeros(self.n_rows, *values.shape[2:])
        return rows.index_copy(0, target, values.flatten(0, 1).index_select(0, source))

    def _token_rows(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token in turn: its row here, and its row in a flattened (batch, length) array."""
        protein = torch.repeat_interleave(self.lengths, output_size=self.n_tokens)
        # The k-th token of the batch lies gap * (i + 1) rows on, where i is its protein.
        token = torch.arange(self.n_tokens, device=self.device)
        row = token + self.gap * (protein + 1)
        return row, row - self.starts[protein] + protein * length

    @classmethod
    def from_padded(
        cls,
        tokens: torch.Tensor,
        lengths: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        gap: int = 20,
    ) -> "PackedBatch":
        """Packs a padded batch.

        Without lengths and mask every column is taken literally: PAD tokens are ordinary tokens, as in the
        original. With them, each protein is cut to its own tokens and what lies beyond is ignored.
        On a GPU this waits for the values once or twice, to check them.

        Args:
            tokens: integer tensor (batch, length) of tokens 0..25.
            lengths: tokens of each protein, 1..length.
            mask: boolean or 0/1 integer tensor (batch, length): true for each protein's tokens, false after.
            gap: gap rows before, between and after the proteins.

        Raises:
            TypeError: tokens or mask are not tensors.
            InputError: a value is no token, a protein has no token, the mask has a hole or does not begin at
                the first column, or the shapes do not agree; names the record.
        """
        check_gap(gap)
        _check_padded(tokens, "tokens")
        n, width = tokens.shape
        if lengths is not None and mask is not None:
            raise InputError("from_padded: give lengths or mask, not both")
        if mask is not None:
            host = _lengths_of_mask(mask, tokens)
        elif lengths is not None:
            host = _host_lengths(lengths)
        else:
            host = _host_lengths(np.full(n, width))
        if len(host) != n:
            raise InputError(f"from_padded: {len(host)} lengths for {n} records")
        if n and host.max() > width:
            i = int(host.argmax())
            raise InputError(f"from_padded: record {i} has length {host[i]} in an array of {width} columns")

        n_rows = gap + int((host + gap).sum())
        rows = torch.full((n_rows,), GAP, dtype=torch.uint8, device=tokens.device)
        batch = cls._trusted(rows, host, gap, None)
        target, source = batch._token_rows(width)
        kept = tokens.reshape(-1)[source]
        wrong = (kept < 0) | (kept > PAD)
        if wrong.any():
            first = int(source[int(wrong.to(torch.uint8).argmax())])
            i, column = divmod(first, width)
            value = int(tokens[i, column])
            raise InputError(f"from_padded: record {i} holds {value} in column {column}; tokens are 0..{PAD}")
        rows.index_copy_(0, target, kept.to(torch.uint8))
        return batch

    def _check_rows(self, rows: torch.Tensor) -> None:
        if rows.dim() == 0 or rows.shape[0] != self.n_rows:
            raise InputError(f"packed batch: a tensor {tuple(rows.shape)} does not have {self.n_rows} rows")

    def _name(self, i: int) -> str:
        return f"record {i}" if self.ids is None else f"record {i} ({self.ids[i]})"


def batches_by_tokens(
    lengths: Sequence[int] | npt.NDArray[np.integer],
    tokens_per_batch: int,
    gap: int = 20,
    window: int | None = None,
) -> list[Int64Array]:
    """Splits records into batches of like length that fill a budget of rows.

    Longest first, so that a budget too large for the memory fails at once; equal lengths stay in input order.
    Each record is in exactly one batch. To put results back in input order::

        for batch in batches_by_tokens(lengths, 65536):
            results[batch] = compute(batch)

    Args:
        lengths: tokens of each record, START and END included.
        tokens_per_batch: most rows of a batch, gaps included. A record that is longer goes alone.
        gap: gap rows before, between and after the proteins.
        window: sort within runs of this many records only, so that a stream is done piece by piece: no batch
            spans two runs. None sorts everything.

    Returns:
        Record indices of each batch, in the order to compute them.

    Raises:
        InputError: a length, the budget, the gap or the window is too small.
    """
    check_gap(gap)
    blocks = _host_lengths(lengths) + gap
    if tokens_per_batch < 1 or (window is not None and window < 1):
        raise InputError(f"tokens_per_batch and window must be from 1, got {tokens_per_batch} and {window}")
    batches: list[Int64Array] = []
    window = window or max(len(blocks), 1)
    for offset in range(0, len(blocks), window):
        order = offset + np.argsort(-blocks[offset : offset + window], kind="stable")
        ends = np.cumsum(blocks[order])  # rows of a batch from the first record on, less the first gap
        first = done = 0
        while first < len(order):
            fits = int(np.searchsorted(ends, done + tokens_per_batch - gap, side="right"))
            stop = max(fits, first + 1)
            batches.append(order[first:stop])
            first, done = stop, int(ends[stop - 1])
    return batches


def check_gap(gap: int) -> None:
    """Raises InputError unless ``gap`` is a count of rows."""
    if type(gap) is not int or not 0 <= gap < 2**31:
        raise InputError(f"gap must be a number of rows from 0, got {gap!r}")


def _starts(lengths: Int64Array, gap: int) -> Int64Array:
    starts: Int64Array = np.cumsum(lengths + gap) - lengths
    return starts


def _read_only(values: Int64Array) -> Int64Array:
    view = values.view()
    view.flags.writeable = False
    return view


def _ranges(starts: Int64Array, sizes: Int64Array) -> Int64Array:
    """All of ``range(starts[i], starts[i] + sizes[i])``, one after another."""
    shifts = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    values: Int64Array = np.arange(len(shifts)) + shifts
    return values


def _host_lengths(lengths: Sequence[int] | npt.NDArray[np.integer] | torch.Tensor) -> Int64Array:
    values = np.asarray(lengths.cpu() if isinstance(lengths, torch.Tensor) else lengths)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(f"lengths must be integers (batch,), got {values.dtype} {values.shape}")
    if values.size and values.min() < 1:
        i = int(values.argmin())
        raise InputError(f"record {i} has length {values[i]}; the shortest is one token")
    return values.astype(np.int64)  # always a copy: the batch's own


def _check_padded(values: torch.Tensor, name: str) -> None:
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"from_padded: {name} must be a torch.Tensor, got {type(values)}")
    if values.dim() != 2:
        raise InputError(f"from_padded: {name} must be (batch, length), got {tuple(values.shape)}")
    if values.is_floating_point() or values.is_complex() or (name == "tokens" and values.dtype == torch.bool):
        raise InputError(f"from_padded: {name} must hold integers, got {values.dtype}")


def _lengths_of_mask(mask: torch.Tensor, tokens: torch.Tensor) -> Int64Array:
    _check_padded(mask, "mask")
    if mask.shape != tokens.shape:
        raise InputError(f"from_padded: mask is {tuple(mask.shape)} and tokens {tuple(tokens.shape)}")
    kept = mask.bool()
    lengths = kept.sum(1)
    prefix = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    wrong = (kept != prefix).any(1)
    if wrong.any():
        i = int(wrong.to(torch.uint8).argmax())
        raise InputError(f"from_padded: the mask of record {i} must be true up to its length and false after it")
    return _host_lengths(lengths)
