"""ProteinBERT as an ordinary ``torch.nn.Module`` over packed batches.

The architecture is that of Brandes et al. (2022, doi:10.1093/bioinformatics/btac020): a local state per token and a
global state per protein; each block runs two convolutions over the local track, lets the global track attend to it,
and tells the local track of the next block what the global track has become.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Self, cast, get_args

import torch
from torch import Tensor, nn

from proteinbert_fast.config import LAYER_NORM_EPS, VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops import backends, prepared
from proteinbert_fast.ops.backends import Choice, Operations
from proteinbert_fast.ops.reference import (
    BlockWeights,
    Embedded,
    GlobalBlockWeights,
    GlobalTrack,
    GlobalTrackWeights,
    LocalBlockWeights,
    Message,
    MessageWeights,
)
from proteinbert_fast.outputs import Head, Heads, PaddedOutput, ProteinBertOutput
from proteinbert_fast.packing import PackedBatch

if TYPE_CHECKING:
    from proteinbert_fast.checkpoints import GoTerm

Annotations = Tensor | tuple[Tensor, Tensor]
# Called with the block, the protein and its weights (length, n_heads).
AttentionReader = Callable[[int, int, Tensor], object]

_ROWS_READ = 16_384  # whose attention weights are in memory at a time when they are read, not kept


class AnnotationInput(nn.Module):
    """First global states from GO annotations; the kernel lies as (N, G), so that set terms are rows to add up."""

    def __init__(self, config: ProteinBertConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_annotations, config.d_global))
        self.bias = nn.Parameter(torch.empty(config.d_global))

    def forward(self, annotations: Annotations | None, n_proteins: int, operations: Operations) -> Tensor:
        """(B, G) from dense (B, N), sparse (indices, offsets), or no annotations."""
        if annotations is None:
            return operations.gelu(self.bias).expand(n_proteins, -1)
        return operations.gelu(operations.sum_annotations(annotations, self.weight) + self.bias)


class Block(nn.Module):
    """One block: local track, global attention, global track.

    Attributes:
        save: what the local track keeps for the backward pass; see ProteinBert.
    """

    def __init__(self, config: ProteinBertConfig, save: backends.Save = "preactivations") -> None:
        super().__init__()
        self.save: backends.Save = save
        d, g, taps = config.d_local, config.d_global, config.kernel_size
        self.n_heads = config.n_heads
        self.wide_dilation = config.wide_dilation
        self.broadcast = nn.Linear(g, d)
        self.narrow_conv = nn.Conv1d(d, d, taps)
        self.wide_conv = nn.Conv1d(d, d, taps, dilation=config.wide_dilation)
        self.local_norm1 = nn.LayerNorm(d, LAYER_NORM_EPS)
        self.local_dense = nn.Linear(d, d)
        self.local_norm2 = nn.LayerNorm(d, LAYER_NORM_EPS)
        self.global_dense1 = nn.Linear(g, g)
        self.query = nn.Linear(g, config.n_heads * config.d_key, bias=False)
        self.key = nn.Linear(d, config.n_heads * config.d_key, bias=False)
        self.value = nn.Linear(d, g, bias=False)
        self.global_norm1 = nn.LayerNorm(g, LAYER_NORM_EPS)
        self.global_dense2 = nn.Linear(g, g)
        self.global_norm2 = nn.LayerNorm(g, LAYER_NORM_EPS)

    def local_weights(self) -> LocalBlockWeights:
        """The local track's parameters, as the operations take them."""
        return LocalBlockWeights(
            *_weight_and_bias(self.narrow_conv),
            *_weight_and_bias(self.wide_conv),
            *_weight_and_bias(self.local_norm1),
            *_weight_and_bias(self.local_dense),
            *_weight_and_bias(self.local_norm2),
        )

    def global_weights(self) -> GlobalTrackWeights:
        """The parameters of global attention and the global track, as the operations take them."""
        block = GlobalBlockWeights(
            *_weight_and_bias(self.global_dense1),
            *_weight_and_bias(self.global_norm1),
            *_weight_and_bias(self.global_dense2),
            *_weight_and_bias(self.global_norm2),
        )
        return GlobalTrackWeights(self.key.weight, self.value.weight, block)

    def message_weights(self) -> MessageWeights:
        """The parameters of what this block hears of the global states, as the operations take them."""
        return MessageWeights(self.query.weight, *_weight_and_bias(self.broadcast))

    def weights(self) -> BlockWeights:
        """All parameters, as the operations take them."""
        return BlockWeights(
            self.local_weights(), self.global_weights(), self.message_weights(), self.wide_dilation, self.n_heads
        )

    def is_plain(self) -> bool:
        """Whether nobody would see that ``forward`` is not called: it has no hooks, and is the one below."""
        return not (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._compiled_call_impl
            or "forward" in self.__dict__
        )

    def forward(
        self,
        local: Tensor | Embedded,
        global_state: Tensor,
        message: Message,
        batch: PackedBatch,
        operations: Operations,
        following: MessageWeights | None,
        keep_hidden: bool,
        return_attention: bool,
    ) -> tuple[Tensor | None, Tensor, GlobalTrack]:
        """Local (R, D) and global (B, G) states to the next ones.

        Args:
            local: (R, D), or the tokens that have these states.
            global_state: (B, G).
            message: what this block hears of the global states.
            batch: the packed layout.
            operations: the back end.
            following: the next block's ``message_weights``; None after the last block.
            keep_hidden: also return the local states after the first norm.
            return_attention: also return attention weights.

        Returns:
            hidden local (R, D) or None, local (R, D), and what the global track computed.
        """
        hidden, local = operations.local_block(
            local, message.broadcast, batch, self.local_weights(), self.wide_dilation, keep_hidden, self.save
        )
        track = operations.global_track(
            local, global_state, message, batch, self.global_weights(), following, self.n_heads, return_attention
        )
        return hidden, local, track

    @torch.no_grad()
    def read_attention(
        self,
        read: Callable[[int, Tensor], object],
        local: Tensor,
        global_state: Tensor,
        message: Message,
        parts: Iterable[tuple[int, slice, PackedBatch]],
        operations: Operations,
    ) -> None:
        """Attention weights of a few proteins at a time, from a second run of the global track over their rows.

        Args:
            read: called with each protein and its weights (length, n_heads).
            local: (R, D), the block's new local states.
            global_state: (B, G), from before the block.
            message: what this block heard of them.
            parts: as ``PackedBatch.parts`` gives them.
            operations: the back end.
        """
        for first, rows, part in parts:
            chosen = slice(first, first + len(part))
            heard = Message(message.query[chosen], message.broadcast[chosen])
            track = operations.global_track(
                local[rows], global_state[chosen], heard, part, self.global_weights(), None, self.n_heads, True
            )
            for protein, weights in enumerate(part.unpack(cast(Tensor, track.attention)), first):
                read(protein, weights)


class ProteinBert(nn.Module):
    """The protein language model ProteinBERT.

    Args:
        config: sizes; the published ones when None.
        backend: "auto" (the fastest that fits), "cpu", "triton" or "reference".
        save: what training keeps of each block until the backward pass, with the kernels for GPUs and for CPUs:
            "preactivations", the block's input and both convolutions' results (768 bytes per token and block in
            16 bits), or "inputs", which keeps the input alone (256 bytes) and computes the convolutions again.
            Gradients have the same bits. Each block's own ``save`` may be set too. The reference operations keep all
            that autograd needs.

    Attributes:
        config: sizes of the model.
        backend: the back end asked for; see ``backend_report``.
        checkpoint_source: where the weights came from, or None.
        checkpoint_sha256: SHA-256 of the weights file, or None.
        go_terms: id and name of the GO term behind each annotation, or None where they are unknown.
        is_pretrained: whether the weights came from a checkpoint.

    Raises:
        InputError: the back end or what to save is unknown.
        BackendError: the back end cannot run in this installation.
    """

    def __init__(
        self,
        config: ProteinBertConfig | None = None,
        backend: backends.Backend = "auto",
        save: backends.Save = "preactivations",
    ) -> None:
        super().__init__()
        backends.check_backend(backend)
        if save not in get_args(backends.Save):
            raise InputError(f"save {save!r} is unknown; choose one of {', '.join(get_args(backends.Save))}")
        self.config = config or ProteinBertConfig()
        self.backend: backends.Backend = backend
        self.checkpoint_source: str | None = None
        self.checkpoint_sha256: str | None = None
        self.go_terms: tuple[GoTerm, ...] | None = None
        self.is_pretrained = False
        self._failure: str | None = None  # by the self-check of the last call
        self.annotation_input = AnnotationInput(self.config)
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, self.config.d_local)
        self.blocks = nn.ModuleList(Block(self.config, save) for _ in range(self.config.n_blocks))
        self.token_head = nn.Linear(self.config.d_local, VOCABULARY_SIZE)
        self.annotation_head = nn.Linear(self.config.d_global, self.config.n_annotations)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new weights from the distributions that the original starts from (Keras's defaults)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            elif name == "token_embedding.weight":
                nn.init.uniform_(parameter, -0.05, 0.05)
            elif name.rpartition(".")[0].endswith(("query", "key", "value")):
                # Keras takes the heads of the original's (head, in, out) arrays for a receptive field.
                fan_in, fan_out = parameter.shape[1] * self.config.n_heads, parameter.shape[0]
                bound = math.sqrt(6 / (fan_in + fan_out))
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        backend: backends.Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        offline: bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
    ) -> "ProteinBert":
        """A model with trained weights, in evaluation mode.

        Args:
            name_or_path: a directory, a .safetensors or official .pkl file, a hub repository ("owner/name"), or
                "proteinbert-swissprot" for those that come with this package, "proteinbert" for the official ones,
                which are fetched once.
            backend: as for the constructor.
            device: where to put the model.
            dtype: floating-point dtype of the weights.
            offline: never use the network.
            cache_dir: where fetched weights are kept.

        Raises:
            CheckpointError: the weights cannot be had or are not sound; says why.
        """
        from proteinbert_fast.checkpoints import load_pretrained

        checkpoint = load_pretrained(name_or_path, offline=offline, cache_dir=cache_dir, optimizer=False)
        model = cls(checkpoint.config, backend=backend)
        model.load_state_dict(checkpoint.state_dict)
        model.checkpoint_source = checkpoint.source
        model.checkpoint_sha256 = checkpoint.sha256
        model.go_terms = checkpoint.go_terms
        model.is_pretrained = True
        return model.to(device=device, dtype=dtype).eval()

    def save_pretrained(self, directory: str | PathLike[str]) -> None:
        """Writes config.json and model.safetensors, which ``from_pretrained`` and the hub read.

        Args:
            directory: made if it is not there.
        """
        from proteinbert_fast.checkpoints import save_pretrained

        save_pretrained(self, directory)

    def backend_report(self) -> str:
        """Which back end would run now, on the model's device and in its dtype, and why."""
        choice = self._choose()
        return f"{choice.operations.name} ({choice.reason})"

    def _choose(self) -> Choice:
        weight, dtype = self.token_embedding.weight, self.compute_dtype()
        choice = backends.choose(self.backend, weight.device, self.config, dtype)
        if self.backend == "auto" and choice.operations.name == "triton":
            if not torch.compiler.is_compiling():  # then what the last call found holds
                from proteinbert_fast import self_check

                self._failure = self_check.failure_reason(weight.device, self.config, dtype, weight.dtype)
            if self._failure is not None:
                return Choice(backends.REFERENCE, f"the Triton kernels fail their self-check: {self._failure}")
        return choice

    def compute_dtype(self) -> torch.dtype:
        """The dtype that a forward pass would compute in now, autocast counted in."""
        weight = self.token_embedding.weight
        if torch.is_autocast_enabled(weight.device.type) and weight.dtype != torch.float64:
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def forward(
        self,
        batch: PackedBatch | Tensor,
        annotations: Annotations | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        hidden_states: bool = False,
        attentions: bool | AttentionReader = False,
    ) -> ProteinBertOutput | PaddedOutput:
        """Runs the model.

        Args:
            batch: a PackedBatch, or a padded integer tensor (B, L). A padded tensor without lengths or mask is taken
                literally: PAD tokens are ordinary tokens, as in the original. With lengths or a mask each row is
                computed at its natural length.
            annotations: GO terms known of each protein: dense (B, N) or sparse (indices (k,), offsets (B,)).
            lengths: tokens of each row of a padded tensor.
            mask: true at the tokens of each row of a padded tensor.
            hidden_states: keep the states after every norm of every block.
            attentions: keep the attention weights; or what reads them, ``attentions(block, protein, weights)`` with
                weights (length, n_heads), block by block and protein by protein, so that none are kept. It may keep
                copies; weights that it is given are views. They carry no gradients.

        Returns:
            ProteinBertOutput for a PackedBatch, PaddedOutput for a padded tensor.

        Raises:
            InputError: shapes do not fit, or a token is out of range; names the record.
        """
        length = None
        if isinstance(batch, Tensor):
            length = batch.shape[-1]
            batch = PackedBatch.from_padded(batch, lengths, mask, gap=self.config.reach)
        elif lengths is not None or mask is not None:
            raise InputError("a PackedBatch knows its lengths: give no lengths and no mask with it")
        with self._reusing_weights():
            out = self._forward(batch, annotations, hidden_states, attentions)
        return out if length is None else PaddedOutput(out, length)

    def _reusing_weights(self) -> AbstractContextManager[None]:
        """Kernels may keep what they make of the weights, where these are not about to change."""
        if torch.compiler.is_compiling():
            return nullcontext()
        wants_gradients = torch.is_grad_enabled()
        if wants_gradients:
            # What follows may change weights in a way that PyTorch does not count: p.data -= rate * p.grad.
            prepared.forget(self.parameters())
        return prepared.reusing(not wants_gradients and not self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module; also drops what kernels made of the weights, which may have been changed in any way."""
        prepared.forget(self.parameters())
        return super().train(mode)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of any module; also drops what kernels made of the weights."""
        prepared.forget(self.parameters())
        return super().load_state_dict(state_dict, strict, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Before: weights that are swapped for others must have no weak references.
        prepared.forget(self.parameters())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _forward(
        self,
        batch: PackedBatch,
        annotations: Annotations | None,
        hidden_states: bool,
        attentions: bool | AttentionReader,
    ) -> ProteinBertOutput:
        if batch.gap < self.config.reach:
            raise InputError(
                f"the batch has gaps of {batch.gap} rows, the model needs {self.config.reach}: "
                f"make it with Tokenizer(gap={self.config.reach})"
            )
        weight = self.token_embedding.weight
        if batch.device != weight.device:
            raise InputError(f"the batch is on {batch.device}, the model on {weight.device}: use batch.to(device)")
        n_proteins = batch.lengths.shape[0]  # len(batch) would be a constant to torch.export
        _check_annotations(annotations, n_proteins, self.config.n_annotations)
        operations = self._choose().operations

        embedded = Embedded(batch.tokens, weight.to(self.compute_dtype()))
        global_state = self.annotation_input(annotations, n_proteins, operations)
        blocks = cast(list[Block], list(self.blocks))
        if not (hidden_states or attentions) and operations.run_blocks and _may_run_at_once(blocks):
            weights = [block.weights() for block in blocks]
            if (states := operations.run_blocks(embedded, global_state, batch, weights)) is not None:
                return self._output(operations, batch, *states)
        local_layers, global_layers, attention_layers = [], [global_state], []
        # Each block's global track also makes what the next block hears of it: one kernel then does all that.
        heard = [block.message_weights() for block in blocks]
        message, local, mean = operations.message(global_state, heard[0]), None, None
        keep = not callable(attentions) and attentions
        parts = list(batch.parts(_ROWS_READ)) if callable(attentions) else []
        for i, (block, following) in enumerate(zip(blocks, [*heard[1:], None], strict=True)):
            hidden_local, local, track = block(
                embedded if local is None else local,
                global_state, message, batch, operations, following, hidden_states, keep,
            )  # fmt: skip
            if callable(attentions):
                block.read_attention(partial(attentions, i), local, global_state, message, parts, operations)
            global_state, message, mean = track.global_state, track.message, track.residue_mean
            if hidden_states:
                local_layers += [hidden_local, local]
                global_layers += [track.hidden, global_state]
            if keep:
                attention_layers.append(track.attention)
        return self._output(
            operations, batch, cast(Tensor, local), global_state,
            hidden_local=tuple(local_layers) if hidden_states else None,
            hidden_global=tuple(global_layers) if hidden_states else None,
            attentions=tuple(attention_layers) if keep else None,
            local_mean=mean,
        )  # fmt: skip

    def _output(
        self, operations: Operations, batch: PackedBatch, local: Tensor, global_state: Tensor, **kept: Any
    ) -> ProteinBertOutput:
        kept = {"hidden_local": None, "hidden_global": None, "attentions": None, "local_mean": None, **kept}
        return ProteinBertOutput(
            batch=batch,
            local_rows=local,
            global_state=global_state,
            **kept,
            heads=Heads(
                self._head(
                    self.token_head, operations.token_logits, operations.token_probabilities, operations.token_loss
                ),
                self._head(
                    self.annotation_head, operations.go_logits, operations.go_probabilities, operations.annotation_loss
                ),
                operations.sigmoid,
                operations.residue_mean,
            ),
        )

    def _head(
        self,
        layer: nn.Linear,
        logits: Callable[[nn.Linear, Tensor], Tensor],
        probabilities: Callable[[nn.Linear, Tensor], Tensor] | None,
        loss: Callable[..., Tensor],
    ) -> Head:
        later = probabilities and self._later(probabilities, layer)
        return Head(self._later(logits, layer), later, self._later(loss, layer), layer.out_features)

    def _later(self, apply: Callable[..., Tensor], head: nn.Linear) -> Callable[..., Tensor]:
        """A head to be run when its result is first read, with gradients and autocast as they are now."""
        gradients, device = torch.is_grad_enabled(), head.weight.device.type
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def run(*inputs: Tensor) -> Tensor:  # plain types: torch.compile builds this again
            reusing = prepared.reusing(not gradients and not head.training)
            with torch.set_grad_enabled(gradients), torch.autocast(device, dtype, enabled=autocast), reusing:
                return apply(head, *inputs)

        return run

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"{self.config}, backend={self.backend!r}"


def _may_run_at_once(blocks: list[Block]) -> bool:
    return not (
        torch.compiler.is_compiling()
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        or not all(type(block) is Block and block.is_plain() for block in blocks)
    )


def _weight_and_bias(layer: nn.Linear | nn.Conv1d | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    # Modules look attributes up in Python, six times as slowly, and a short protein waits for 140 of them.
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or bias is None:  # parametrized
        return layer.weight, cast(Tensor, layer.bias)
    return weight, bias


def _check_annotations(annotations: Any, n_proteins: int, n_annotations: int) -> None:
    if annotations is None:
        return
    if isinstance(annotations, Tensor):
        if annotations.shape != (n_proteins, n_annotations):
            raise InputError(
                f"annotations: {tuple(annotations.shape)} where {n_proteins} proteins of "
                f"{n_annotations} terms are ({n_proteins}, {n_annotations})"
            )
        return
    if not isinstance(annotations, tuple) or len(annotations) != 2:
        raise InputError("annotations: give a (batch, terms) tensor or a pair (indices, offsets) of integer tensors")
    indices, offsets = annotations
    if indices.dim() != 1 or offsets.shape != (n_proteins,):
        raise InputError(
            f"annotations: indices {tuple(indices.shape)} and offsets {tuple(offsets.shape)} "
            f"where (k,) and ({n_proteins},) are wanted"
        )
    if (
        indices.device.type == "cpu"
        and len(indices)
        and not 0 <= int(indices.min()) <= int(indices.max()) < n_annotations
    ):
        raise InputError(f"annotations: term indices must lie in 0..{n_annotations - 1}")
