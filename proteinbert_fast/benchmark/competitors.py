"""Other implementations, to run beside ours on the same proteins.

`PaddedProteinBert` is what one writes first: padded batches, ``nn.Conv1d``, a mask so that its numbers are right. It
loads our weights, so its results are checked. Batches are sorted by length, and of a few sizes the fastest is taken.
"""

import copy
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteinbert_fast.benchmark.cases import Unavailable
from proteinbert_fast.config import LAYER_NORM_EPS, VOCABULARY_SIZE, ProteinBertConfig
from proteinbert_fast.model import ProteinBert

PAD = 25
OTHER_PACKAGE = "protein-bert-pytorch"


class PaddedBatch(NamedTuple):
    """Proteins of like length below each other.

    Attributes:
        numbers: of the proteins.
        tokens: int64 (B, L), filled up with PAD.
        mask: bool (B, L), true at the proteins' own tokens.
    """

    numbers: list[int]
    tokens: Tensor
    mask: Tensor


class PaddedBlock(nn.Module):
    """One block over padded states, as the paper's formulas read."""

    def __init__(self, config: ProteinBertConfig, channels_last: bool) -> None:
        super().__init__()
        d, g, taps, dilation = config.d_local, config.d_global, config.kernel_size, config.wide_dilation
        self.n_heads = config.n_heads
        self.channels_last = channels_last
        self.broadcast = nn.Linear(g, d)
        self.narrow_conv = nn.Conv1d(d, d, taps, padding=taps // 2)
        self.wide_conv = nn.Conv1d(d, d, taps, padding=taps // 2 * dilation, dilation=dilation)
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

    def forward(self, local: Tensor, global_state: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Local (B, L, D) and global (B, G) states to the next ones; ``mask`` is (B, L)."""
        own = local * mask.unsqueeze(-1)
        narrow = F.gelu(self.convolve(own, self.narrow_conv))
        wide = F.gelu(self.convolve(own, self.wide_conv))
        broadcast = F.gelu(self.broadcast(global_state)).unsqueeze(1)
        local = self.local_norm1(local + broadcast + narrow + wide)
        local = self.local_norm2(local + F.gelu(self.local_dense(local)))

        n_proteins, length, _ = local.shape
        query = torch.tanh(self.query(global_state)).view(n_proteins, self.n_heads, -1)
        key = torch.tanh(self.key(local)).view(n_proteins, length, self.n_heads, -1)
        value = F.gelu(self.value(local)).view(n_proteins, length, self.n_heads, -1)
        logits = torch.einsum("bhk,blhk->bhl", query, key) / key.shape[-1] ** 0.5
        attention = logits.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1)
        attended = torch.einsum("bhl,blhv->bhv", attention, value).flatten(1)

        dense = F.gelu(self.global_dense1(global_state))
        hidden = self.global_norm1(global_state + dense + attended)
        return local, self.global_norm2(hidden + F.gelu(self.global_dense2(hidden)))

    def convolve(self, local: Tensor, convolution: nn.Conv1d) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        if not self.channels_last:
            return cast(Tensor, convolution(local.transpose(1, 2))).transpose(1, 2)
        image = local.unsqueeze(1).permute(0, 3, 1, 2)
        weight = convolution.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
        padding, dilation = cast(int, convolution.padding[0]), convolution.dilation[0]
        out = F.conv2d(image, weight, convolution.bias, padding=(0, padding), dilation=(1, dilation))
        return out.permute(0, 2, 3, 1).squeeze(1)


class PaddedProteinBert(nn.Module):
    """The model without its two output heads, over padded batches, straightforwardly.

    Args:
        model: whose weights to take, in its dtype and on its device.
        channels_last: run the convolutions as 2-D ones of height 1 on channels-last images, which libraries for CPUs
            compute faster, instead of as ``nn.Conv1d``.
    """

    def __init__(self, model: ProteinBert, channels_last: bool = False) -> None:
        super().__init__()
        config = model.config
        self.channels_last = channels_last
        self.token_embedding = nn.Embedding(VOCABULARY_SIZE, config.d_local)
        self.global_input_bias = nn.Parameter(torch.empty(config.d_global))
        self.blocks = nn.ModuleList(PaddedBlock(config, channels_last) for _ in range(config.n_blocks))
        weights = model.state_dict()
        weights["global_input_bias"] = weights["annotation_input.bias"]
        self.load_state_dict({name: weights[name] for name in self.state_dict()})
        weight = model.token_embedding.weight
        self.to(weight.device, weight.dtype).eval()

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, L) and mask (B, L) to local (B, L, D) and global (B, G) states; no annotations."""
        local = self.token_embedding(tokens)
        global_state = F.gelu(self.global_input_bias).expand(len(tokens), -1)
        for block in self.blocks:
            local, global_state = block(local, global_state, mask)
        return local, global_state


class PaddedTraining(nn.Module):
    """The padded model with both heads and losses, in float32.

    Args:
        model: whose weights to take, and whose device.
        channels_last: as for ``PaddedProteinBert``.
    """

    def __init__(self, model: ProteinBert, channels_last: bool = False) -> None:
        super().__init__()
        model = copy.deepcopy(model)
        self.model = PaddedProteinBert(model, channels_last).train()
        self.token_head, self.annotation_head = model.token_head, model.annotation_head

    def forward(self, tokens: Tensor, mask: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and mask (B, L) and true terms (B, N) to the means over tokens, and over proteins and terms."""
        local, state = self.model(tokens, mask)
        true = tokens.where(mask, -100)
        logits = self.token_head(local).view(-1, VOCABULARY_SIZE).float()
        entropy = F.cross_entropy(logits, true.view(-1))
        return entropy, F.binary_cross_entropy_with_logits(self.annotation_head(state).float(), terms)

    @staticmethod
    def named(values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values by this model's names of parameters as ``ProteinBert`` names them."""
        return {
            name.removeprefix("model.").replace("global_input_bias", "annotation_input.bias"): value
            for name, value in values.items()
        }


def padded_batches(tokens: Sequence[Tensor], batch_tokens: int) -> list[PaddedBatch]:
    """Proteins sorted by length, in batches of at most ``batch_tokens`` padded tokens, or one protein.

    Args:
        tokens: of each protein, integers (length,).
        batch_tokens: most tokens, padding counted in.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(tokens)), key=lambda i: -len(tokens[i])):
        if groups and len(tokens[groups[-1][0]]) * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    batches = []
    for numbers in groups:
        rows = nn.utils.rnn.pad_sequence([tokens[i].long() for i in numbers], True, padding_value=-1)
        batches.append(PaddedBatch(numbers, rows.masked_fill(rows < 0, PAD), rows >= 0))
    return batches


PaddedModel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PaddedResult = list[tuple[PaddedBatch, tuple[Tensor, Tensor]]]


def run_padded(model: PaddedModel, batches: list[PaddedBatch]) -> PaddedResult:
    """All batches and their local (B, L, D) and global (B, G) states."""
    with torch.inference_mode():
        return [(batch, model(batch.tokens, batch.mask)) for batch in batches]


class Choice(NamedTuple):
    """Batches, how long a run over them took, and how they were made."""

    batches: list[PaddedBatch]
    seconds: float
    batch_tokens: int

    def __str__(self) -> str:
        if self.batch_tokens == 1:
            return "one protein at a time"
        return f"sorted by length, batches of {self.batch_tokens:,} padded tokens"


def fastest_batches(model: PaddedModel, tokens: Sequence[Tensor], sizes: Sequence[int]) -> Choice:
    """The size of batches with which the model is fastest, by one run each after a short one that is not timed."""
    choices = []
    for size in sizes:
        batches = padded_batches(tokens, size)
        run_padded(model, batches[:1] + batches[-1:])
        started = time.perf_counter()
        run_padded(model, batches)
        choices.append(Choice(batches, time.perf_counter() - started, size))
    return min(choices, key=lambda choice: choice.seconds)


def compile_blocks(model: PaddedProteinBert, batches: list[PaddedBatch]) -> float:
    """Puts the model's blocks under torch.compile and runs it; returns the seconds that compiling took.

    Compiled block by block, all six share their code; as a whole the model compiles six times as long and runs no
    faster.

    Args:
        model: is changed.
        batches: of all shapes to come; shapes too unlike are compiled anew.

    Raises:
        Unavailable: it cannot be compiled here.
    """
    # 8 versions of a function, the default, are soon used up; then it would run eagerly, which fullgraph forbids.
    torch._dynamo.config.recompile_limit = 64
    for block in model.blocks:
        # Lengths differ from batch to batch: static shapes would be compiled anew for each.
        block.compile(dynamic=True, fullgraph=True)
    started = time.perf_counter()
    try:
        run_padded(model, batches)
    except (RuntimeError, OSError) as error:
        raise Unavailable(f"torch.compile fails here: {str(error).strip().splitlines()[0]}") from error
    first = time.perf_counter() - started
    started = time.perf_counter()
    run_padded(model, batches)
    return first - (time.perf_counter() - started)


def other_package_version() -> str:
    """Version of protein-bert-pytorch, or "not installed"."""
    try:
        return version(OTHER_PACKAGE)
    except PackageNotFoundError:
        return "not installed"


def other_package(config: ProteinBertConfig, dtype: torch.dtype) -> PaddedModel:
    """``protein-bert-pytorch`` at equal widths, random weights, without GO input and output heads.

    It is another model: heads have values as wide as keys, a null key, an output projection and no residual.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        package: Any = import_module("protein_bert_pytorch")
    except ImportError as error:
        raise Unavailable("not installed: pip install 'proteinbert-fast[bench]'") from error
    model = package.ProteinBERT(
        num_tokens=VOCABULARY_SIZE,
        num_annotation=1,
        dim=config.d_local,
        dim_global=config.d_global,
        depth=config.n_blocks,
        narrow_conv_kernel=config.kernel_size,
        wide_conv_kernel=config.kernel_size,
        wide_conv_dilation=config.wide_dilation,
        attn_heads=config.n_heads,
        attn_dim_head=config.d_key,
    )
    model.to_token_logits = model.to_annotation_logits = nn.Identity()
    model = model.to(dtype).eval()

    def run(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        local, global_state = model(tokens, torch.zeros(len(tokens), 1, dtype=dtype), mask=mask)
        return local, global_state

    return run
