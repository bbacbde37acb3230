"""Which implementation of the operations runs, chosen by rule and never silently."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import BackendError, InputError
from proteinbert_fast.ops import cpu, reference
from proteinbert_fast.ops.reference import Attended, GlobalBlockWeights, GlobalStates, LocalBlockWeights
from proteinbert_fast.packing import PackedBatch

Backend = Literal["auto", "triton", "cpu", "reference"]


@dataclass(frozen=True)
class Operations:
    """One back end's way to run the operations that have more than one.

    Attributes:
        name: the back end.
        local_block: as ``cpu.local_block``.
        global_attention: as ``cpu.global_attention``.
        global_block: as ``reference.global_block``.
        broadcast_global: as ``reference.broadcast_global``.
        sum_annotations: as ``reference.sum_annotations``.
        by_protein: calls a function on (B, ...) tensors, row by row independent.
        dense_by_protein: a linear layer on (B, K).
        dense_by_row: a linear layer on (R, K).
        sigmoid: of (B, N).
    """

    name: str
    local_block: Callable[..., tuple[Tensor | None, Tensor]]
    global_attention: Callable[..., Attended]
    global_block: Callable[[Tensor, Tensor, GlobalBlockWeights], GlobalStates]
    broadcast_global: Callable[[Tensor, Tensor, Tensor], Tensor]
    sum_annotations: Callable[[Tensor | tuple[Tensor, Tensor], Tensor], Tensor]
    by_protein: Callable[..., Tensor]
    dense_by_protein: Callable[[nn.Linear, Tensor], Tensor]
    dense_by_row: Callable[[nn.Linear, Tensor], Tensor]
    sigmoid: Callable[[Tensor], Tensor]


def _local_block(
    x: Tensor,
    broadcast: Tensor,
    batch: PackedBatch,
    weights: LocalBlockWeights,
    wide_dilation: int,
    keep_hidden: bool = False,
) -> tuple[Tensor | None, Tensor]:
    hidden, local = reference.local_block(x, broadcast, batch.segments, weights, wide_dilation)
    return (hidden if keep_hidden else None), local


def _global_attention(local: Tensor, global_state: Tensor, batch: PackedBatch, *rest: Tensor | int | bool) -> Attended:
    return reference.global_attention(local, global_state, batch.segments, *rest)  # type: ignore[arg-type]


def _whole(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    return function(*rows)


REFERENCE = Operations(
    "reference",
    _local_block,
    _global_attention,
    reference.global_block,
    reference.broadcast_global,
    reference.sum_annotations,
    by_protein=_whole,
    dense_by_protein=_whole,
    dense_by_row=_whole,
    sigmoid=torch.sigmoid,
)
CPU = Operations(
    "cpu",
    cpu.local_block,
    cpu.global_attention,
    cpu.global_block,
    cpu.broadcast_global,
    cpu.sum_annotations,
    by_protein=cpu.in_groups,
    dense_by_protein=cpu.in_groups,
    dense_by_row=partial(cpu.in_groups, size=cpu.ROW_GROUP),
    # PyTorch computes the last few numbers of an array by another formula: one protein to an array.
    sigmoid=partial(cpu.in_groups, torch.sigmoid, size=1),
)


_imported: list[Operations] = []


def _triton() -> Operations:
    """The Triton kernels, imported when first used: Triton takes a second, and need not be installed."""
    if not _imported:
        from proteinbert_fast.ops import kernels

        _imported.append(
            Operations(
                "triton",
                kernels.local_block,
                kernels.global_attention,
                kernels.global_block,
                kernels.broadcast_global,
                kernels.sum_annotations,
                by_protein=_whole,
                dense_by_protein=kernels.dense,
                dense_by_row=kernels.dense,
                sigmoid=torch.sigmoid,
            )
        )
    return _imported[0]


class Choice(NamedTuple):
    """A back end and why it was chosen."""

    operations: Operations
    reason: str


def _no_triton(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run this, or None when they can."""
    from proteinbert_fast.ops import kernels

    return kernels.unsupported(device, config, dtype)


def check_backend(backend: str) -> None:
    """Refuses a back end that there is not.

    Raises:
        InputError: the name is unknown.
        BackendError: the back end cannot run in this installation.
    """
    if backend not in get_args(Backend):
        raise InputError(f"backend {backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise BackendError("backend 'triton': triton is not installed: pip install 'proteinbert-fast[kernels]'")


def choose(backend: str, device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> Choice:
    """The back end for a model of these sizes computing in ``dtype`` on ``device``.

    Args:
        backend: "auto", or the one to insist on.
        device: where weights and batch lie.
        config: sizes of the model.
        dtype: the dtype computed in, autocast counted in.

    Raises:
        InputError: the name is unknown.
        BackendError: the back end that was insisted on cannot run this; says why.
    """
    check_backend(backend)
    if backend == "reference":
        return Choice(REFERENCE, "asked for")
    if backend == "triton":
        if obstacle := _no_triton(device, config, dtype):
            raise BackendError(f"backend 'triton' cannot run this: {obstacle}; use 'auto' or 'reference'")
        return Choice(_triton(), "asked for")
    obstacle = f"the device is {device.type}" if device.type != "cpu" else cpu.unsupported(config, dtype)
    if backend == "cpu" and obstacle:
        raise BackendError(f"backend 'cpu' cannot run this: {obstacle}; use 'auto' or 'reference'")
    if backend == "cpu":
        return Choice(CPU, "asked for")
    if torch.compiler.is_compiling():
        return Choice(REFERENCE, "torch.compile fuses the plain operations itself")
    if obstacle:
        return Choice(REFERENCE, obstacle)
    return Choice(CPU, "the device is cpu, and sizes and dtype fit")
