"""What a checkpoint holds once it has been read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from proteinbert_fast.config import ProteinBertConfig


class GoTerm(NamedTuple):
    """The GO term behind one annotation output."""

    accession: str
    name: str


@dataclass(frozen=True)
class OptimizerState:
    """State of the original's Adam or LAMB, by ``state_dict`` key and in this package's layouts.

    Attributes:
        iteration: optimiser steps made so far.
        first_moments: running mean of the gradient of each weight, float32.
        second_moments: running mean of the squared gradient of each weight, float32, never negative.
    """

    iteration: int
    first_moments: Mapping[str, torch.Tensor]
    second_moments: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory: everything was checked against ``config`` and is finite.

    Attributes:
        config: sizes of the model.
        state_dict: tensors on the CPU, in the type they are stored in (float32, float16 or bfloat16).
        sha256: of the weights file, in hex; None for weights that came from no file.
        source: where it came from: the published or hub name, or the absolute path.
        optimizer_state: None where the checkpoint has none or it was not asked for.
        go_terms: the term behind each annotation output; None where that is not known.
    """

    config: ProteinBertConfig
    state_dict: dict[str, torch.Tensor]
    sha256: str | None
    source: str
    optimizer_state: OptimizerState | None = None
    go_terms: tuple[GoTerm, ...] | None = None
