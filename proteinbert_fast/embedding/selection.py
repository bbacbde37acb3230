"""Which of the model's states make an embedding, and how they are taken from its output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from proteinbert_fast.config import VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.data.fasta import check_choice
from proteinbert_fast.errors import InputError
from proteinbert_fast.outputs import ProteinBertOutput

Per = Literal["protein", "residue"]
Pooling = Literal["global", "mean", "both"]
Layers = Literal["last", "all", "original"] | Sequence[int]


class Column(NamedTuple):
    """A run of columns of the embedding: what it holds, its first column, and the one after its last."""

    name: str
    first: int
    stop: int


@dataclass(frozen=True)
class Selection:
    """What is taken from the model's output, for a model of given sizes.

    The output of block ``b`` (1 is the first) is its state after the second norm: ``hidden_global[2 * b]`` of
    the global track, ``hidden_local[2 * b - 1]`` of the local one. "original" is everything that the
    published code concatenates: all norms of all blocks and the predicted probabilities (1562 wide for
    residues, 15,599 for the global track at the published sizes).

    Args:
        config: sizes of the model.
        per: one row per "protein" or per "residue".
        pooling: for proteins the "global" state, the "mean" of the residues, or "both" side by side. None for
            residues.
        layers: "last" block, "all" blocks, the "original" concatenation, or block numbers from 1.

    Raises:
        InputError: a value is unknown or does not fit the others.
    """

    config: ProteinBertConfig
    per: Per
    pooling: Pooling | None
    layers: tuple[int, ...] | Literal["original"]

    @classmethod
    def of(cls, config: ProteinBertConfig, per: Per, pooling: Pooling | None, layers: Layers) -> "Selection":
        """The selection, with defaults filled in and names resolved to block numbers."""
        check_choice("per", per, ("protein", "residue"))
        if per == "residue" and pooling is not None:
            raise InputError(f"pooling {pooling!r} is for embeddings per protein; leave it out per residue")
        if per == "protein":
            pooling = pooling or "global"
            check_choice("pooling", pooling, ("global", "mean", "both"))
        return cls(config, per, pooling, _blocks(layers, config.n_blocks))

    @property
    def needs_hidden_states(self) -> bool:
        """Whether the model must keep its hidden states."""
        return self.layers != (self.config.n_blocks,)

    @property
    def columns(self) -> list[Column]:
        """What each column of the embedding is, in order."""
        config = self.config
        names: list[tuple[str, int]] = []
        if self.per == "protein" and self.pooling != "mean":
            names += self._track("global", config.d_global, "GO probabilities", config.n_annotations)
        if self.per == "protein" and self.pooling != "global":
            names += self._track("mean of residues", config.d_local, "token probabilities", VOCABULARY_SIZE)
        if self.per == "residue":
            names += self._track("local", config.d_local, "token probabilities", VOCABULARY_SIZE)
        columns, first = [], 0
        for name, width in names:
            columns.append(Column(name, first, first + width))
            first += width
        return columns

    @property
    def width(self) -> int:
        """Columns of the embedding."""
        return self.columns[-1].stop

    def of_proteins(self, out: ProteinBertOutput) -> Tensor:
        """(B, width), at least float32."""
        parts: list[Tensor] = []
        if self.pooling != "mean":
            parts += self._global_layers(out)
        if self.pooling != "global":
            parts += [out.residue_mean(layer) for layer in self._local_layers(out)]
        return torch.cat([part.to(_at_least_float32(part)) for part in parts], dim=-1)

    def of_rows(self, out: ProteinBertOutput, first: int, stop: int) -> Tensor:
        """(stop - first, width): these packed rows; rows in gaps mean nothing."""
        parts = [layer[first:stop] for layer in self._local_layers(out)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def describe(self) -> dict[str, Any]:
        """The choices as plain values."""
        layers = self.layers if self.layers == "original" else list(self.layers)
        return {"per": self.per, "pooling": self.pooling, "layers": layers}

    def _track(self, track: str, width: int, head: str, head_width: int) -> list[tuple[str, int]]:
        if self.layers != "original":
            return [(f"{track}, block {b}", width) for b in self.layers]
        layers = [(f"{track}, input", width)] if track == "global" else []
        for b in range(1, self.config.n_blocks + 1):
            layers += [(f"{track}, block {b}, norm {norm}", width) for norm in (1, 2)]
        return [*layers, (head if track != "mean of residues" else f"{track}, {head}", head_width)]

    def _global_layers(self, out: ProteinBertOutput) -> list[Tensor]:
        if self.layers == "original":
            return [out.original_global()]
        if out.hidden_global is None:
            return [out.global_state]
        return [out.hidden_global[2 * b] for b in self.layers]

    def _local_layers(self, out: ProteinBertOutput) -> list[Tensor]:
        if out.hidden_local is None:
            return [out.local_rows]
        if self.layers == "original":
            return [*out.hidden_local, out.token_probabilities]
        return [out.hidden_local[2 * b - 1] for b in self.layers]


def _blocks(layers: Layers, n_blocks: int) -> tuple[int, ...] | Literal["original"]:
    if isinstance(layers, str):
        check_choice("layers", layers, ("last", "all", "original"))
        if layers == "original":
            return "original"
        return (n_blocks,) if layers == "last" else tuple(range(1, n_blocks + 1))
    blocks = tuple(layers)
    if not blocks:
        raise InputError("layers: no block number given")
    for block in blocks:
        if type(block) is not int or not 1 <= block <= n_blocks:
            raise InputError(f"layers: there is no block {block!r}; this model has blocks 1 to {n_blocks}")
    if len(set(blocks)) < len(blocks):
        raise InputError(f"layers: a block is named twice in {', '.join(map(str, blocks))}")
    return blocks


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
