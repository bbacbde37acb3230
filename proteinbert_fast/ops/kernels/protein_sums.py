"""Sums of rows over each protein, and means over its residues, in one fixed order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from proteinbert_fast.ops.kernels.global_attention import SPAN, SpanSums, add_spans
from proteinbert_fast.ops.kernels.launching import ANY_BATCH
from proteinbert_fast.ops.operators import operator
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.spans import cut_into_spans

_ROWS, _COLUMNS = 32, 128


@triton.jit(**ANY_BATCH)
def row_sums_kernel(
    X, STARTS, LENGTHS, SPAN_PROTEIN, FIRST_SPAN, SUMS, n_proteins, n_columns,
    SPAN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """Program (span, N columns): the sum of a span's rows, M rows after M rows, less ENDS at both ends of a protein."""
    span = tl.program_id(0)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    protein = tl.load(SPAN_PROTEIN + span)
    if protein < n_proteins:
        done = (span - tl.load(FIRST_SPAN + protein)) * SPAN
        first_row = tl.load(STARTS + protein) + done
        rows_left = tl.load(LENGTHS + protein) - done
        n_rows = tl.minimum(rows_left, SPAN).to(tl.int32)
        in_columns = (columns < n_columns)[None, :]
        total = tl.zeros((N,), tl.float32)
        for tile in range(0, n_rows, M):
            row = tile + tl.arange(0, M)
            inside = (row < n_rows) & (done + row >= ENDS) & (row + ENDS < rows_left)
            at = (first_row + row)[:, None] * n_columns + columns[None, :]
            total += tl.sum(tl.load(X + at, mask=inside[:, None] & in_columns, other=0.0).to(tl.float32), axis=0)
        tl.store(SUMS + span.to(tl.int64) * n_columns + columns, total, mask=columns < n_columns)


def protein_sums(
    x: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    ends: int = 0,
    spans: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Sums (B, C) float32 of rows (R, C) over each protein.

    Args:
        x: (R, C) of any floating-point dtype.
        starts: (B,) int64, first row of each protein.
        lengths: (B,) int64, rows of each protein.
        longest: rows of the longest protein, or more.
        ends: rows left out at both ends of each protein.
        spans: as ``PackedBatch.spans(SPAN)`` gives them; made here when None.
    """
    x = x.contiguous()
    n_proteins, (n_rows, n_columns) = len(starts), x.shape
    protein, first = spans or cut_into_spans(lengths, SPAN, n_rows // SPAN + n_proteins)
    sums = x.new_empty(len(protein), n_columns, dtype=torch.float32)
    if n_proteins:
        row_sums_kernel[(len(protein), triton.cdiv(n_columns, _COLUMNS))](
            x, starts, lengths, protein, first, sums, n_proteins, n_columns,
            SPAN=SPAN, M=_ROWS, N=_COLUMNS, ENDS=ends, num_warps=4,
        )  # fmt: skip
    sums, first = add_spans(SpanSums(sums, first), lengths, n_rows, longest, most=1)
    # A protein of no rows has no span.
    return sums[first[:n_proteins].clamp(max=len(sums) - 1)] if n_proteins else sums


@operator("residue_mean")
def _residue_mean(x: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    return protein_sums(x, starts, lengths, longest, ends=1) / _n_residues(lengths)


@_residue_mean.register_fake
def _(x: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor, longest: int) -> Tensor:
    return x.new_empty(starts.shape[0], x.shape[1], dtype=torch.float32)


def _n_residues(lengths: Tensor) -> Tensor:
    """(B, 1), at least 1."""
    return (lengths - 2).clamp(min=1).unsqueeze(-1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, segments, starts, lengths, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(segments, starts, lengths)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    segments, starts, lengths = ctx.saved_tensors
    protein = segments.clamp(min=0)
    row = torch.arange(segments.shape[0], device=segments.device) - starts[protein]
    is_residue = (segments >= 0) & (row > 0) & (row < lengths[protein] - 1)
    d_x = (gradient / _n_residues(lengths)).to(ctx.dtype)[protein]
    return d_x.where(is_residue.unsqueeze(-1), 0), None, None, None, None


_residue_mean.register_autograd(_backward, setup_context=_save)


def residue_mean(rows: Tensor, batch: PackedBatch) -> Tensor:
    """``reference.residue_mean``, (B, C) float32.

    Args:
        rows: (R, C) of any dtype, summed in float32.
        batch: the packed layout.
    """
    mean: Tensor = _residue_mean(rows, batch.segments, batch.starts, batch.lengths, batch.longest)
    return mean
