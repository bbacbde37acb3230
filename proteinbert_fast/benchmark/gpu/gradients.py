"""The kernels of the backward pass, as entries like those of ``operations.py``: inputs' gradients, given results'.

Weights' gradients are large sums, so that all are compared by the largest number of each tensor.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from proteinbert_fast.benchmark import cost_model
from proteinbert_fast.benchmark.cost_model import Cost
from proteinbert_fast.benchmark.gpu.operations import Inputs, Operation, Tensors, tile_rows, tile_stays
from proteinbert_fast.ops import reference
from proteinbert_fast.ops.reference import GlobalBlockWeights, LocalBlockWeights, Message, MessageWeights


def _seen(t: Tensor) -> Tensor:
    """A gradient for a result of this shape: other numbers, the same for the kernels and for the reference."""
    return t.flip(-1).contiguous()


def _kept(i: Inputs, name: str, make: Callable[[], Any]) -> Any:
    """What the forward pass leaves for a gradient, made once for these inputs."""
    found = i.__dict__.setdefault("kept", {})
    if name not in found:
        found[name] = make()
    return found[name]


def _exactly(results: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor], seen: Sequence[Tensor]) -> Tensors:
    """Gradients of the leaves by autograd, given those of the results."""
    with torch.inference_mode(False), torch.enable_grad():
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        found = torch.autograd.grad(results(*own), own, [s.clone() for s in seen])
    return tuple(found)


def _local_block(first: bool) -> Operation:
    def run(i: Inputs) -> Tensors:
        module = _module("local_block")
        batch, weights = i.batch, i.block.local_weights()  # type: ignore[operator]
        x, tokens = (i.embedded.weight, i.embedded.tokens) if first else (i.rows, None)
        narrow, wide = _kept(
            i,
            f"local_block {first}",
            lambda: module.launch(
                x, tokens, i.word, batch.segments, list(weights), batch.gap, i.config.wide_dilation, False, True, None
            )[2:],
        )
        d_x, d_word, d_weights = module._local_block_backward(
            _seen_rows(i), None, x, tokens, narrow, wide, i.word, batch.segments, batch.starts, batch.lengths,
            *batch.spans(module.SPAN), list(weights), batch.gap, i.config.wide_dilation, batch.longest,
        )  # fmt: skip
        return d_x, d_word, *d_weights

    def exact(i: Inputs) -> Tensors:
        weights = i.block.local_weights()  # type: ignore[operator]

        def results(x: Tensor, word: Tensor, *weights: Tensor) -> list[Tensor]:
            x = reference.embed_tokens(i.batch.tokens, x) if first else x
            w = LocalBlockWeights(*weights)
            return [reference.local_block(x, word, i.batch.segments, w, i.config.wide_dilation).local]

        return _exactly(results, [i.embedded.weight if first else i.rows, i.word, *weights], [_seen_rows(i)])

    def cost(i: Inputs) -> Cost:
        if first:
            return cost_model.pointwise(i.config, i.size) + cost_model.token_gradient(i.config, i.size)
        return cost_model.local_block_gradient(i.config, i.size, tile_rows(i), tile_stays(i))

    def defined(i: Inputs, found: Tensors) -> Tensors:
        """Where x holds states, their gradient says nothing in gap rows."""
        x = found[0]
        assert x is not None
        return x if first else x.where((i.batch.segments >= 0).unsqueeze(-1).to(x.device), 0.0), *found[1:]

    note = "pointwise part and one-hot products" if first else "pointwise part, x, weights"
    return Operation("local_block, first" if first else "local_block", run, exact, cost, note, True, defined)


def _seen_rows(i: Inputs) -> Tensor:
    found: Tensor = _kept(i, "seen rows", lambda: _seen(i.rows))
    return found


def _module(name: str) -> Any:
    """Of a kernel; imported here, because Triton may be missing."""
    return import_module(f"proteinbert_fast.ops.kernels.{name}")


def _global_track(last: bool) -> Operation:
    def run(i: Inputs) -> Tensors:
        module = _module("global_track")
        batch, heads = i.batch, i.config.n_heads
        flat = _flat(i, last)
        places = (batch.starts, batch.lengths)
        spans = *batch.spans(module.SPAN), *batch.spans(module.TILE)
        out = _kept(
            i,
            f"global_track {last}",
            lambda: module._global_track(
                i.rows, i.state, i.message.query, flat, *places, batch.segments, *spans, heads, batch.longest, False,
                True,
            ),
        )  # fmt: skip
        hidden, state, query, _, _, _, pooled, denominator = out
        d_state, (d_query, d_word, d_mean) = _kept(i, f"seen {last}", lambda: (_seen(i.state), _said(i, last)))
        d_local, d_state, d_asked, d_weights = module._global_track_backward(
            None, d_state, d_query, d_word, d_mean, i.rows, i.state, i.message.query, hidden, state, query,
            pooled, denominator, flat, *places, *spans, heads, batch.longest,
        )  # fmt: skip
        return d_local, d_state, d_asked, *d_weights

    def exact(i: Inputs) -> Tensors:
        batch = i.batch
        n = 2 + len(GlobalBlockWeights._fields)

        def results(local: Tensor, state: Tensor, query: Tensor, *weights: Tensor) -> list[Tensor]:
            pooled = reference.global_attention(
                local, query, batch.segments, weights[0], weights[1], i.config.n_heads, False
            ).pooled
            state = reference.global_block(state, pooled, GlobalBlockWeights(*weights[2:n])).global_state
            if last:
                return [state, reference.residue_mean(local, batch.segments, batch.starts, batch.lengths)]
            return [state, *reference.message(state, MessageWeights(*weights[n:]))]

        seen = [_seen(i.state), *(s for s in _said(i, last) if s is not None)]
        return _exactly(results, [i.rows, i.state, i.message.query, *_flat(i, last)], seen)

    def cost(i: Inputs) -> Cost:
        attention = cost_model.attention_rows_gradient(i.config, i.size)
        attention += cost_model.attention_weights_gradient(i.config, i.size)
        return attention + cost_model.global_track_gradient(i.config, i.size)

    return Operation("global_track, last" if last else "global_track", run, exact, cost,
                     "attention in two kernels, then the track", by_largest=True)  # fmt: skip


def _flat(i: Inputs, last: bool) -> list[Tensor]:
    weights = i.block.global_weights()  # type: ignore[operator]
    following = () if last else i.block.message_weights()  # type: ignore[operator]
    return [weights.key_weight, weights.value_weight, *weights.block, *following]


def _said(i: Inputs, last: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the next block's query and broadcast, or of the residues' mean."""
    if last:
        return None, None, _seen(i.word).to(i.message.query.dtype)
    said = Message(*map(_seen, i.message))
    return said.query, said.broadcast, None


def _one(i: Inputs) -> Tensor:
    """The gradient of a loss."""
    found: Tensor = _kept(i, "one", lambda: i.message.query.new_ones(()))
    return found


def _losses() -> list[Operation]:
    def targets(i: Inputs) -> tuple[Tensor, Tensor]:
        """The true token of each row, and whether it counts."""
        inside = i.batch.segments >= 0
        return i.batch.tokens.where(inside, 0), inside.to(i.message.query.dtype)

    def terms(i: Inputs) -> tuple[Tensor, Tensor]:
        """A few GO terms of each protein, and its weight."""
        shape = len(i.batch), i.config.n_annotations
        true = (torch.arange(shape[0] * shape[1], device=i.state.device) % 89 == 0).view(shape)
        return true, torch.ones_like(i.message.query[:, 0])

    def run_token(i: Inputs) -> Tensors:
        module, head = _module("losses"), i.token_head
        at = i.rows, head.weight, head.bias, *_kept(i, "targets", lambda: targets(i))
        total, logs = module._token_forward(*at)
        return total, *module._token_backward(_one(i), *at, logs, True, True)

    def run_annotation(i: Inputs) -> Tensors:
        module, head = _module("losses"), i.annotation_head
        at = i.state, head.weight, head.bias, *_kept(i, "terms", lambda: terms(i)), None
        total = module._annotation_forward(*at)
        return total, *module._annotation_backward(_one(i), *at, True, True)

    def exact(of_rows: bool) -> Callable[[Inputs], Tensors]:
        def found(i: Inputs) -> Tensors:
            head = i.token_head if of_rows else i.annotation_head
            what: Callable[..., Tensor] = reference.token_loss_sum if of_rows else reference.annotation_loss_sum
            true = targets(i) if of_rows else terms(i)
            leaves: list[Any] = [i.rows if of_rows else i.state, head.weight, head.bias]
            gradients = _exactly(lambda *own: [what(*own, *true)], leaves, [_one(i)])
            return what(*leaves, *true), *gradients

        return found

    return [
        Operation("token loss", run_token, exact(True), lambda i: cost_model.token_loss(i.config, i.size),
                  "and its gradient", by_largest=True),
        Operation("annotation loss", run_annotation, exact(False),
                  lambda i: cost_model.annotation_loss(i.config, i.size), "and its gradient", by_largest=True),
    ]  # fmt: skip


GRADIENTS = (_local_block(False), _local_block(True), _global_track(False), _global_track(True), *_losses())
