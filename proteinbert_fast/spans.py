"""Proteins cut into spans of rows, the shares that kernels work on: on the device of their lengths, or on the host."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


def cut_into_spans(lengths: torch.Tensor, size: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Proteins cut into spans of ``size`` rows, each protein from its own first row.

    Args:
        lengths: int64 (B,).
        size: rows of a span.
        most: S, an upper bound on the number of spans.

    Returns:
        int32 (S,): the protein of each span; B in those beyond the last.
        int64 (B + 1,): the first span of each protein, and how many there are.
    """
    first = torch.zeros(lengths.shape[0] + 1, dtype=torch.int64, device=lengths.device)
    torch.cumsum((lengths + size - 1) // size, 0, out=first[1:])
    spans = torch.arange(most, device=lengths.device)
    return torch.searchsorted(first[1:], spans, right=True, out_int32=True), first


class HostLayout(NamedTuple):
    """Where proteins lie in packed rows, as arrays on the host to write to.

    Attributes:
        starts: int64 (B,), first row of each protein; of empty places, the number of rows.
        lengths: int64 (B,), rows of each protein; 0 in empty places.
        first_span: int64 (B + 1,), the first span of each protein, and how many there are.
        segments: int32 (R,), the protein of each row, -1 in gap rows.
        span_protein: int32 (S,), the protein of each span; B in those beyond the last.
    """

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    first_span: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int32]
    span_protein: npt.NDArray[np.int32]

    def fill(self, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], gap: int, size: int) -> None:
        """Writes the layout of proteins, at most B of at most R rows, as ``PackedBatch`` and ``cut_into_spans`` do.

        Args:
            starts: first row of each protein.
            lengths: rows of each protein.
            gap: rows before, between and after the proteins.
            size: rows of a span.
        """
        n_rows, n_places, n = len(self.segments), len(self.starts), len(lengths)
        self.starts[:n], self.starts[n:] = starts, n_rows
        self.lengths[:n], self.lengths[n:] = lengths, 0
        self.first_span[0] = 0
        np.cumsum((self.lengths + size - 1) // size, out=self.first_span[1:])
        n_spans = int(self.first_span[-1])
        self.span_protein[:n_spans] = np.repeat(np.arange(n_places), np.diff(self.first_span))
        self.span_protein[n_spans:] = n_places
        proteins, rows = np.full(2 * n + 1, -1), np.full(2 * n + 1, gap)
        proteins[1::2], rows[1::2] = np.arange(n), lengths
        used = int(rows.sum())
        self.segments[:used], self.segments[used:] = np.repeat(proteins, rows), -1
