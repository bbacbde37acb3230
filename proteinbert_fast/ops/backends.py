"""Which implementation of the operations runs, chosen by rule and never silently."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import BackendError, InputError
from proteinbert_fast.ops import cpu, cpu_blocks, losses, reference
from proteinbert_fast.ops.reference import (
    Attended,
    Embedded,
    GlobalBlockWeights,
    GlobalStates,
    GlobalTrack,
    GlobalTrackWeights,
    LocalBlockWeights,
    Message,
    MessageWeights,
)
from proteinbert_fast.ops.switches import KERNELS_ENABLED, KERNELS_SWITCH
from proteinbert_fast.packing import PackedBatch

Backend = Literal["auto", "triton", "cpu", "reference"]
Save = Literal["preactivations", "inputs"]

# Once, on import: torch.compile of PyTorch 2.11 cannot trace the search, and a model is asked in every forward pass.
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = "triton is not installed: pip install 'proteinbert-fast[kernels]'"


@dataclass(frozen=True)
class Operations:
    """One back end's way to run the operations that have more than one.

    Attributes:
        name: the back end.
        local_block: as ``kernels.local_block``.
        message: as ``reference.message``; to the first block.
        global_track: as ``kernels.global_track``.
        residue_mean: means of (R, C) rows over each protein's residues.
        sum_annotations: as ``reference.sum_annotations``.
        gelu: as ``reference.gelu``, of the first global states.
        token_logits: the token head on (R, D).
        go_logits: the GO head on (B, G).
        sigmoid: of (B, N).
        token_loss: of the token head, (R, D), targets and weights (R,): ``reference.token_loss_sum``.
        annotation_loss: of the GO head, (B, G), targets (B, N), weights (B,) and the terms' weights (N,) or None:
            ``reference.annotation_loss_sum``.
        token_probabilities: the token head and a softmax in one, float32; None where it is two steps.
        go_probabilities: the GO head and a sigmoid in one, float32; None where it is two steps.
        run_blocks: all blocks in one call, as ``cpu_blocks.run_blocks``, with the bits of the operations above; None
            where there is no such call.
    """

    name: str
    local_block: Callable[..., tuple[Tensor | None, Tensor]]
    message: Callable[[Tensor, MessageWeights], Message]
    global_track: Callable[..., GlobalTrack]
    residue_mean: Callable[[Tensor, PackedBatch], Tensor]
    sum_annotations: Callable[[Tensor | tuple[Tensor, Tensor], Tensor], Tensor]
    gelu: Callable[[Tensor], Tensor]
    token_logits: Callable[[nn.Linear, Tensor], Tensor]
    go_logits: Callable[[nn.Linear, Tensor], Tensor]
    sigmoid: Callable[[Tensor], Tensor]
    token_loss: Callable[[nn.Linear, Tensor, Tensor, Tensor], Tensor]
    annotation_loss: Callable[[nn.Linear, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    token_probabilities: Callable[[nn.Linear, Tensor], Tensor] | None = None
    go_probabilities: Callable[[nn.Linear, Tensor], Tensor] | None = None
    run_blocks: Callable[..., tuple[Tensor, Tensor] | None] | None = None


def _reference_local_block(
    x: Tensor | Embedded,
    broadcast: Tensor,
    batch: PackedBatch,
    weights: LocalBlockWeights,
    wide_dilation: int,
    keep_hidden: bool = False,
    save: Save = "preactivations",
) -> tuple[Tensor | None, Tensor]:
    rows = reference.embed_tokens(*x) if isinstance(x, Embedded) else x
    hidden, local = reference.local_block(rows, broadcast, batch.segments, weights, wide_dilation)
    return (hidden if keep_hidden else None), local


def _reference_attention(local: Tensor, query: Tensor, batch: PackedBatch, *rest: Any) -> Attended:
    return reference.global_attention(local, query, batch.segments, *rest)


def _in_steps(
    attention: Callable[..., Attended],
    block: Callable[[Tensor, Tensor, GlobalBlockWeights], GlobalStates],
    speak: Callable[[Tensor, MessageWeights], Message],
    local: Tensor,
    global_state: Tensor,
    message: Message,
    batch: PackedBatch,
    weights: GlobalTrackWeights,
    following: MessageWeights | None,
    n_heads: int,
    return_attention: bool = False,
) -> GlobalTrack:
    """A global track of an attention, a block and a message that are functions of their own."""
    pooled, attention_weights = attention(
        local, message.query, batch, weights.key_weight, weights.value_weight, n_heads, return_attention
    )
    hidden, state = block(global_state, pooled, weights.block)
    return GlobalTrack(hidden, state, following and speak(state, following), attention_weights, None)


def _residue_mean(rows: Tensor, batch: PackedBatch) -> Tensor:
    return reference.residue_mean(rows, batch.segments, batch.starts, batch.lengths)


def _whole(function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    return function(*rows)


def _reference_token_loss(layer: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    return reference.token_loss_sum(states, layer.weight, layer.bias, targets, weights)


def _reference_annotation_loss(
    layer: nn.Linear, states: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None = None
) -> Tensor:
    return reference.annotation_loss_sum(states, layer.weight, layer.bias, targets, weights, term_weights)


REFERENCE = Operations(
    "reference",
    local_block=_reference_local_block,
    message=reference.message,
    global_track=partial(_in_steps, _reference_attention, reference.global_block, reference.message),
    residue_mean=_residue_mean,
    sum_annotations=reference.sum_annotations,
    gelu=reference.gelu,
    token_logits=_whole,
    go_logits=_whole,
    sigmoid=torch.sigmoid,
    token_loss=_reference_token_loss,
    annotation_loss=_reference_annotation_loss,
)
CPU = Operations(
    "cpu",
    local_block=cpu.local_block,
    message=cpu.message,
    global_track=partial(_in_steps, cpu.global_attention, cpu.global_block, cpu.message),
    residue_mean=_residue_mean,
    sum_annotations=cpu.sum_annotations,
    gelu=cpu.gelu,
    token_logits=partial(cpu.in_groups, size=cpu.ROW_GROUP),
    go_logits=cpu.in_groups,
    # PyTorch computes the last few numbers of an array by another formula: one protein to an array.
    sigmoid=partial(cpu.in_groups, torch.sigmoid, size=1),
    token_loss=losses.token_loss,
    annotation_loss=losses.annotation_loss,
    run_blocks=cpu_blocks.run_blocks,
)


_imported: list[Operations] = []


def _triton() -> Operations:
    """The Triton kernels, imported when first used: Triton takes a second, and need not be installed."""
    if not _imported:
        from proteinbert_fast.ops import kernels

        _imported.append(
            Operations(
                "triton",
                local_block=kernels.local_block,
                message=kernels.message,
                global_track=kernels.global_track,
                residue_mean=kernels.residue_mean,
                sum_annotations=kernels.sum_annotations,
                gelu=reference.gelu,
                token_logits=partial(kernels.head, by_row=True),
                go_logits=kernels.head,
                sigmoid=torch.sigmoid,
                token_loss=kernels.token_loss,
                annotation_loss=kernels.annotation_loss,
                token_probabilities=partial(kernels.head, activation="softmax", out_dtype=torch.float32, by_row=True),
                go_probabilities=partial(kernels.head, activation="sigmoid", out_dtype=torch.float32),
            )
        )
    return _imported[0]


class Choice(NamedTuple):
    """A back end and why it was chosen."""

    operations: Operations
    reason: str


def _no_triton(device: torch.device, config: ProteinBertConfig, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run this, or None when they can."""
    if not KERNELS_ENABLED:
        return f"{KERNELS_SWITCH}=0 in the environment"
    if not HAS_TRITON:
        return NO_TRITON
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
    if backend == "triton" and not HAS_TRITON:
        raise BackendError(f"backend 'triton': {NO_TRITON}")


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
    if backend == "auto" and _is_gpu(device):
        if obstacle := _no_triton(device, config, dtype):
            _say_once(f"on {device} the plain operations run, slower than the Triton kernels: {obstacle}")
            return Choice(REFERENCE, obstacle)
        return Choice(_triton(), "the device is a CUDA GPU, and sizes and dtype fit")
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


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


_said: set[str] = set()


def _say_once(line: str) -> None:
    if not torch.compiler.is_compiling() and line not in _said:
        _said.add(line)
        warnings.warn(f"proteinbert-fast: {line}", RuntimeWarning, stacklevel=4)
