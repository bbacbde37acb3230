"""What the model returns: packed, per protein, or padded. Probabilities and logits are computed when first read."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, overload

import torch
from torch import Tensor

from proteinbert_fast.errors import InputError
from proteinbert_fast.packing import PackedBatch


class ByProtein(Sequence[Tensor]):
    """Packed rows (R, ...) read protein by protein: ``rows[i]`` is a view (length_i, ...), START and END included."""

    def __init__(self, batch: PackedBatch, rows: Tensor) -> None:
        self.batch = batch
        self.rows = rows

    def __len__(self) -> int:
        return len(self.batch)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = int(self.batch.host_starts[i])
        return self.rows[start : start + int(self.batch.host_lengths[i])]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batch.unpack(self.rows))


class Head(NamedTuple):
    """An output head, run when its result is first read.

    Attributes:
        logits: of states.
        probabilities: of states, in one step; None where they are made of the logits.
        loss: of states, targets and weights: the weighted sum of cross entropies; ``pretraining.losses`` has the means.
        n_outputs: classes or terms.
    """

    logits: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None
    loss: Callable[..., Tensor]
    n_outputs: int


class Heads(NamedTuple):
    """What an output computes when it is read.

    Attributes:
        token: the token head, of (R, d_local).
        annotation: the GO head, of (B, d_global).
        sigmoid: of GO logits.
        residue_mean: means of (R, C) rows over each protein's residues.
    """

    token: Head
    annotation: Head
    sigmoid: Callable[[Tensor], Tensor]
    residue_mean: Callable[[Tensor, PackedBatch], Tensor]


class ProteinBertOutput:
    """The model's answer to a PackedBatch of B proteins in R rows.

    Attributes:
        batch: the batch that was asked.
        local_rows: (R, d_local) local states, zeros in gap rows.
        global_state: (B, d_global).
        hidden_local: 2 * n_blocks tensors (R, d_local), after each norm of each block; None unless asked for.
        hidden_global: 1 + 2 * n_blocks tensors (B, d_global), the first before block 1; None unless asked for.
        attentions: n_blocks tensors (R, n_heads) that sum to 1 over each protein; None unless asked for.
        heads: what computes the rest.
    """

    def __init__(
        self,
        *,
        batch: PackedBatch,
        local_rows: Tensor,
        global_state: Tensor,
        hidden_local: tuple[Tensor, ...] | None,
        hidden_global: tuple[Tensor, ...] | None,
        attentions: tuple[Tensor, ...] | None,
        local_mean: Tensor | None,
        heads: Heads,
    ) -> None:
        self.batch = batch
        self.local_rows = local_rows
        self.global_state = global_state
        self.hidden_local = hidden_local
        self.hidden_global = hidden_global
        self.attentions = attentions
        self._local_mean = local_mean
        self.heads = heads

    @property
    def local(self) -> ByProtein:
        """Local states by protein: ``local[i]`` is (length_i, d_local), START and END included."""
        return ByProtein(self.batch, self.local_rows)

    def residues(self, index: int) -> Tensor:
        """Local states of one protein's residues, (length - 2, d_local): its first and last token left out."""
        return self.local[index][1:-1]

    def residue_mean(self, rows: Tensor | None = None) -> Tensor:
        """Means over each protein's residues, (B, C), at least float32; a protein of no residues gets zeros.

        Args:
            rows: (R, C) packed rows such as one of ``hidden_local``; the local states when None.
        """
        if rows is None and self._local_mean is not None:
            return self._local_mean
        return self.heads.residue_mean(self.local_rows if rows is None else rows, self.batch)

    @cached_property
    def token_logits(self) -> Tensor:
        """(R, 26); rows in gaps mean nothing."""
        return self.heads.token.logits(self.local_rows)

    @cached_property
    def token_probabilities(self) -> Tensor:
        """(R, 26), at least float32; rows in gaps mean nothing."""
        if self.heads.token.probabilities is not None:
            return self.heads.token.probabilities(self.local_rows)
        return self.token_logits.softmax(-1, dtype=_at_least_float32(self.token_logits))

    @cached_property
    def go_logits(self) -> Tensor:
        """(B, n_annotations)."""
        return self.heads.annotation.logits(self.global_state)

    @cached_property
    def go_probabilities(self) -> Tensor:
        """(B, n_annotations), at least float32."""
        if self.heads.annotation.probabilities is not None:
            return self.heads.annotation.probabilities(self.global_state)
        return self.heads.sigmoid(self.go_logits.to(_at_least_float32(self.go_logits)))

    def original_local(self, index: int) -> Tensor:
        """The original's concatenation of all local layers of one protein: (length, 2 * n_blocks * d_local + 26).

        At the published sizes 1562 wide: both norms of each block, then the token probabilities.

        Raises:
            InputError: the model was called without ``hidden_states=True``.
        """
        layers = [*_required(self.hidden_local), self.token_probabilities]
        return torch.cat([ByProtein(self.batch, layer)[index] for layer in layers], dim=-1)

    def original_global(self) -> Tensor:
        """The original's concatenation of all global layers, (B, (1 + 2 * n_blocks) * d_global + n_annotations).

        At the published sizes 15,599 wide: the input layer, both norms of each block, then the GO probabilities.

        Raises:
            InputError: the model was called without ``hidden_states=True``.
        """
        return torch.cat([*_required(self.hidden_global), self.go_probabilities], dim=-1)


class PaddedOutput:
    """The model's answer to a padded (B, L) tensor; the same names as ProteinBertOutput, per-token tensors (B, L, ...).

    Places beyond a row's own tokens hold zeros.

    Attributes:
        packed: the same answer over packed rows.
        length: L.
    """

    def __init__(self, packed: ProteinBertOutput, length: int) -> None:
        self.packed = packed
        self.length = length

    def _padded(self, rows: Tensor) -> Tensor:
        return self.packed.batch.to_padded(rows, length=self.length)

    @cached_property
    def local(self) -> Tensor:
        """(B, L, d_local)."""
        return self._padded(self.packed.local_rows)

    @property
    def global_state(self) -> Tensor:
        """(B, d_global)."""
        return self.packed.global_state

    @cached_property
    def hidden_local(self) -> tuple[Tensor, ...] | None:
        """2 * n_blocks tensors (B, L, d_local), or None."""
        layers = self.packed.hidden_local
        return None if layers is None else tuple(self._padded(layer) for layer in layers)

    @property
    def hidden_global(self) -> tuple[Tensor, ...] | None:
        """1 + 2 * n_blocks tensors (B, d_global), or None."""
        return self.packed.hidden_global

    @cached_property
    def attentions(self) -> tuple[Tensor, ...] | None:
        """n_blocks tensors (B, n_heads, L) that sum to 1 over each row's own tokens, or None."""
        layers = self.packed.attentions
        return None if layers is None else tuple(self._padded(layer).transpose(1, 2) for layer in layers)

    @cached_property
    def token_logits(self) -> Tensor:
        """(B, L, 26)."""
        return self._padded(self.packed.token_logits)

    @cached_property
    def token_probabilities(self) -> Tensor:
        """(B, L, 26), at least float32."""
        return self._padded(self.packed.token_probabilities)

    @property
    def go_logits(self) -> Tensor:
        """(B, n_annotations)."""
        return self.packed.go_logits

    @property
    def go_probabilities(self) -> Tensor:
        """(B, n_annotations), at least float32."""
        return self.packed.go_probabilities

    def original_local(self) -> Tensor:
        """The original's concatenation of all local layers, (B, L, 2 * n_blocks * d_local + 26).

        Raises:
            InputError: the model was called without ``hidden_states=True``.
        """
        return torch.cat([*_required(self.hidden_local), self.token_probabilities], dim=-1)

    def original_global(self) -> Tensor:
        """The original's concatenation of all global layers, (B, (1 + 2 * n_blocks) * d_global + n_annotations).

        Raises:
            InputError: the model was called without ``hidden_states=True``.
        """
        return self.packed.original_global()


def _required(layers: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    if layers is None:
        raise InputError("the concatenation of all layers needs model(batch, hidden_states=True)")
    return layers


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
