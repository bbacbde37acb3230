"""Every operation of the model in plain PyTorch: the definition, and the oracle of all tests.

The formulas are those of Brandes et al. (2022, doi:10.1093/bioinformatics/btac020), as their published Keras code
computes them. All functions work on packed rows (see ``packing.PackedBatch``) in any floating-point dtype, float64
included, on any device, and are differentiable.

Shapes: R rows, B proteins, D local channels, G global channels, H heads, K and V channels of a head's keys and values,
N annotations.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proteinbert_fast.config import LAYER_NORM_EPS


class LocalBlockWeights(NamedTuple):
    """Parameters of one block's local track, in torch layouts."""

    narrow_weight: Tensor  # (D, D, taps): out, in, tap
    narrow_bias: Tensor  # (D,)
    wide_weight: Tensor  # (D, D, taps)
    wide_bias: Tensor  # (D,)
    norm1_weight: Tensor  # (D,)
    norm1_bias: Tensor  # (D,)
    dense_weight: Tensor  # (D, D)
    dense_bias: Tensor  # (D,)
    norm2_weight: Tensor  # (D,)
    norm2_bias: Tensor  # (D,)


class GlobalBlockWeights(NamedTuple):
    """Parameters of one block's global track, in torch layouts."""

    dense1_weight: Tensor  # (G, G)
    dense1_bias: Tensor  # (G,)
    norm1_weight: Tensor  # (G,)
    norm1_bias: Tensor  # (G,)
    dense2_weight: Tensor  # (G, G)
    dense2_bias: Tensor  # (G,)
    norm2_weight: Tensor  # (G,)
    norm2_bias: Tensor  # (G,)


class Embedded(NamedTuple):
    """Local states of tokens, not looked up yet."""

    tokens: Tensor  # (R,) integers; 0..25 are tokens, 26 marks a gap row
    weight: Tensor  # (26, D)


class MessageWeights(NamedTuple):
    """Parameters of what a block hears of the global states, in torch layouts."""

    query_weight: Tensor  # (H * K, G), head-major
    broadcast_weight: Tensor  # (D, G)
    broadcast_bias: Tensor  # (D,)


class GlobalTrackWeights(NamedTuple):
    """Parameters of one block's global attention and global track, in torch layouts."""

    key_weight: Tensor  # (H * K, D), head-major
    value_weight: Tensor  # (H * V, D), head-major
    block: GlobalBlockWeights


class Message(NamedTuple):
    """What a block hears of the global states."""

    query: Tensor  # (B, H * K), heads concatenated: what its attention asks for
    broadcast: Tensor  # (B, D): the word to every position


class BlockWeights(NamedTuple):
    """Parameters of one block, and what is fixed in it."""

    local: LocalBlockWeights
    track: GlobalTrackWeights
    message: MessageWeights
    wide_dilation: int
    n_heads: int


class LocalStates(NamedTuple):
    """What a local block computes."""

    hidden: Tensor  # (R, D) after the first norm
    local: Tensor  # (R, D) after the second norm: the block's output


class GlobalStates(NamedTuple):
    """What a global block computes."""

    hidden: Tensor  # (B, G) after the first norm
    global_state: Tensor  # (B, G) after the second norm: the block's output


class Attended(NamedTuple):
    """What global attention computes."""

    pooled: Tensor  # (B, H * V), heads concatenated
    weights: Tensor | None  # (R, H), summing to 1 over each protein; None unless asked for


class GlobalTrack(NamedTuple):
    """What attention and the global track of one block compute."""

    hidden: Tensor  # (B, G) after the first norm
    global_state: Tensor  # (B, G) after the second norm: the block's output
    message: Message | None  # to the next block; None after the last
    attention: Tensor | None  # (R, H), summing to 1 over each protein; None unless asked for
    residue_mean: Tensor | None  # (B, D) of the new local states; None where no pass over the rows made it


def gelu(x: Tensor) -> Tensor:
    """The exact (erf) form of GELU."""
    return F.gelu(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer normalisation over the last axis: biased variance, epsilon 1e-3, affine."""
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), LAYER_NORM_EPS)


def embed_tokens(tokens: Tensor, weight: Tensor) -> Tensor:
    """Local states of the tokens, zeros in gap rows. The gradient of the weight is summed in at least float32.

    Args:
        tokens: (R,) integers; 0..25 are tokens, 26 marks a gap row.
        weight: (26, D).
    """
    return _looked_up(tokens.int(), weight, 0.0)


def embed_annotations(
    annotations: Tensor | tuple[Tensor, Tensor] | None, weight: Tensor, bias: Tensor, n_proteins: int
) -> Tensor:
    """First global states, ``gelu(annotations @ weight + bias)``, (B, G).

    Args:
        annotations: dense (B, N); or sparse as (indices (k,), offsets (B,)), protein b having the terms
            ``indices[offsets[b]:offsets[b + 1]]``; or None for no annotations at all.
        weight: (N, G).
        bias: (G,).
        n_proteins: B.
    """
    if annotations is None:
        return gelu(bias).expand(n_proteins, -1)
    return gelu(sum_annotations(annotations, weight) + bias)


def sum_annotations(annotations: Tensor | tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    """``annotations @ weight``, (B, G), from dense or sparse annotations as ``embed_annotations`` takes them."""
    if isinstance(annotations, tuple):
        indices, offsets = annotations
        return F.embedding_bag(indices, weight, offsets, mode="sum")
    return F.linear(annotations.to(weight.dtype), weight.t())


def convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int = 1) -> Tensor:
    """Cross-correlation along the rows, zero padded so that the length stays.

    Gap rows are zero and at least as long as the reach, so one call over the whole packed array is "same" zero padding
    of every protein. Written as a channels-last 2-D convolution of height 1: the packed rows are that layout already,
    and on CPUs it is up to a third faster than the 1-D form.

    Args:
        x: (R, D).
        weight: (D, D, taps), out, in, tap.
        bias: (D,).
        dilation: rows between taps.
    """
    image = x[None, None].permute(0, 3, 1, 2)
    padding = weight.shape[-1] // 2 * dilation
    out = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, padding), dilation=(1, dilation))
    return out.permute(0, 2, 3, 1)[0, 0]


def local_block(
    x: Tensor,
    broadcast: Tensor,
    segments: Tensor,
    weights: LocalBlockWeights,
    wide_dilation: int,
) -> LocalStates:
    """The local track of one block; gap rows come out as zeros.

        hidden = LN(x + broadcast + gelu(narrow convolution of x) + gelu(wide convolution of x))
        local  = LN(hidden + gelu(hidden @ W + b))

    Args:
        x: (R, D), zeros in gap rows.
        broadcast: (B, D), the global track's word to every position of a protein.
        segments: (R,) integers, the protein of each row, -1 in gap rows.
        weights: the block's parameters.
        wide_dilation: rows between the taps of the wide convolution.
    """
    inside = (segments >= 0).unsqueeze(-1)
    broadcast = of_each_row(broadcast, segments)
    narrow = gelu(convolution(x, weights.narrow_weight, weights.narrow_bias))
    wide = gelu(convolution(x, weights.wide_weight, weights.wide_bias, wide_dilation))
    hidden = layer_norm(x + broadcast + narrow + wide, weights.norm1_weight, weights.norm1_bias)
    hidden = hidden.where(inside, 0)
    dense = gelu(F.linear(hidden, weights.dense_weight, weights.dense_bias))
    local = layer_norm(hidden + dense, weights.norm2_weight, weights.norm2_bias)
    return LocalStates(hidden, local.where(inside, 0))


def of_each_row(values: Tensor, segments: Tensor, in_gaps: float = 0.0) -> Tensor:
    """(R, C): of (B, C) values, those of each row's protein.

    A look-up, because the gradient of indexing is summed in no fixed order, on CPUs too. In at least float32.

    Args:
        values: (B, C).
        segments: (R,) integers, the protein of each row, -1 in gap rows.
        in_gaps: what gap rows get.
    """
    return _looked_up(segments.where(segments >= 0, values.shape[0]), values, in_gaps)


def _looked_up(index: Tensor, values: Tensor, beyond: float) -> Tensor:
    """Rows of (B, C) values by number, ``beyond`` for number B."""
    # A row's gradient may have thousands of terms: their sum in bfloat16 would stop growing after a few hundred.
    wants_gradient = values.requires_grad and torch.is_grad_enabled()
    table = values.to(torch.promote_types(values.dtype, torch.float32)) if wants_gradient else values
    return F.embedding(index, F.pad(table, (0, 0, 0, 1), value=beyond)).to(values.dtype)


def sum_by_protein(rows: Tensor, segments: Tensor, n_proteins: int) -> Tensor:
    """Sums of (R, C) rows over each protein, in row order; gap rows are left out. (B, C)."""
    index = segments.long().where(segments >= 0, n_proteins).unsqueeze(-1).expand_as(rows)
    return rows.new_zeros(n_proteins + 1, rows.shape[-1]).scatter_add(0, index, rows)[:n_proteins]


def global_attention(
    local: Tensor,
    query: Tensor,
    segments: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    n_heads: int,
    return_weights: bool = False,
) -> Attended:
    """Each protein's global state attends to its rows; see ``message`` for the query.

        k = tanh(local @ Wk)   v = gelu(local @ Wv)
        pooled = sum over rows of softmax(q . k / sqrt(K)) v

    tanh bounds every logit by sqrt(K), so the softmax needs no running maximum. Sums are kept in at least float32.

    Args:
        local: (R, D), the block's new local states.
        query: (B, H * K), heads concatenated, of the global states from before the block.
        segments: (R,) integers, the protein of each row, -1 in gap rows.
        key_weight: (H * K, D), head-major.
        value_weight: (H * V, D), head-major.
        n_heads: H.
        return_weights: also return the softmax weights.
    """
    n_proteins = query.shape[0]
    keys = _by_head(torch.tanh(F.linear(local, key_weight)), n_heads)
    values = _by_head(gelu(F.linear(local, value_weight)), n_heads)
    accumulate = torch.promote_types(keys.dtype, torch.float32)
    query_of_row = _by_head(of_each_row(query, segments), n_heads)
    logits = (query_of_row.to(accumulate) * keys).sum(-1) / math.sqrt(keys.shape[-1])
    e = logits.exp()
    numerator = sum_by_protein((e.unsqueeze(-1) * values).flatten(1), segments, n_proteins)
    denominator = sum_by_protein(e, segments, n_proteins)
    pooled = (_by_head(numerator, n_heads) / denominator.unsqueeze(-1)).flatten(1)
    weights = None
    if return_weights:
        weights = (e / of_each_row(denominator, segments, 1.0)).where((segments >= 0).unsqueeze(-1), 0)
    return Attended(pooled.to(local.dtype), weights)


def _by_head(x: Tensor, n_heads: int) -> Tensor:
    return x.view(x.shape[0], n_heads, x.shape[1] // n_heads)


def message(global_state: Tensor, weights: MessageWeights) -> Message:
    """What a block hears of the global states from before it.

        query = tanh(global @ Wq)   broadcast = gelu(global @ W + b)

    Args:
        global_state: (B, G).
        weights: parameters of the block that hears.
    """
    query = torch.tanh(F.linear(global_state, weights.query_weight))
    return Message(query, gelu(F.linear(global_state, weights.broadcast_weight, weights.broadcast_bias)))


def global_block(global_state: Tensor, pooled: Tensor, weights: GlobalBlockWeights) -> GlobalStates:
    """The global track of one block.

        hidden = LN(global + gelu(global @ W1 + b1) + pooled)
        global = LN(hidden + gelu(hidden @ W2 + b2))

    Args:
        global_state: (B, G), from before the block.
        pooled: (B, G), what global attention gathered.
        weights: the block's parameters.
    """
    dense1 = gelu(F.linear(global_state, weights.dense1_weight, weights.dense1_bias))
    hidden = layer_norm(global_state + dense1 + pooled, weights.norm1_weight, weights.norm1_bias)
    dense2 = gelu(F.linear(hidden, weights.dense2_weight, weights.dense2_bias))
    return GlobalStates(hidden, layer_norm(hidden + dense2, weights.norm2_weight, weights.norm2_bias))


def residue_mean(rows: Tensor, segments: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Means of (R, C) rows over each protein's residues, its first and last token left out. (B, C).

    The result has at least float32; a protein of no residues gets zeros.
    """
    inside = segments.clone()
    occupied = lengths > 0
    inside[starts[occupied]] = -1
    inside[(starts + lengths - 1)[occupied]] = -1
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return sum_by_protein(rows, inside, starts.shape[0]) / (lengths - 2).clamp(min=1).unsqueeze(-1)


def token_loss(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """The original's loss of the token head: ``sum(w * cross entropy) / number of tokens``, PAD counted with weight 0.

    Args:
        logits: (T, 26).
        tokens: (T,) integers, the true tokens.
        weights: (T,), 0 at tokens whose answer does not matter.
    """
    return (weights * F.cross_entropy(logits, tokens.long(), reduction="none")).mean()


def annotation_loss(logits: Tensor, annotations: Tensor, weights: Tensor) -> Tensor:
    """The original's loss of the GO head: ``mean over proteins of w * mean over terms of binary cross entropy``.

    Args:
        logits: (B, N).
        annotations: (B, N) zeros and ones, the true terms.
        weights: (B,), 0 for proteins whose terms are unknown or held out.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, annotations.to(logits.dtype), reduction="none")
    return (weights * entropy.mean(-1)).mean()


def token_loss_sum(states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """``sum over rows of w * cross entropy`` of the token head, from the states; at least float32.

    Args:
        states: (R, D).
        weight: (C, D), the head's.
        bias: (C,).
        targets: (R,) integers, the true classes; not looked at where the weight is 0.
        weights: (R,), constants.
    """
    logits = F.linear(states, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.long().where(weights != 0, -100)
    return (weights.detach() * F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")).sum()


def annotation_loss_sum(
    states: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor, term_weights: Tensor | None = None
) -> Tensor:
    """``sum over proteins and terms of w_b * u_n * binary cross entropy`` of the GO head, from the states.

    At least float32.

    Args:
        states: (B, G).
        weight: (N, G), the head's.
        bias: (N,).
        targets: (B, N), from 0 to 1: the true terms.
        weights: (B,), w, constants.
        term_weights: (N,), u, constants; 1 when None.
    """
    logits = F.linear(states, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = targets.to(logits.dtype)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, term_weights, reduction="none")
    return (weights.detach() * entropy.sum(-1)).sum()
