"""Training step: forward pass, both losses, backward pass, optimiser; beside padded PyTorch on the same proteins."""

import copy
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from proteinbert_fast.benchmark import competitors, machine
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Work
from proteinbert_fast.benchmark.competitors import PaddedTraining
from proteinbert_fast.benchmark.setup import OURS, PLAIN, Setup
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import batches_by_tokens
from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
from proteinbert_fast.pretraining.optimizers import Lamb
from proteinbert_fast.tokenizer import Tokenizer

TABLE = "one step over many proteins"
PROTEINS = 40
TERMS = 4  # GO terms of each protein
# Largest error of any parameter's gradient against the float64 reference's, of its length. float32 sums are good to
# 1e-5; under bfloat16 autocast states and gradients are rounded to 8 bits on their way through six blocks.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}

Losses = Iterator[Tensor]  # a micro-batch's share of the loss each
Pass = Callable[[int], Callable[[], Losses]]  # batch size to what computes them


class Step(NamedTuple):
    """What a step has found, before its parameters moved."""

    loss: float
    gradients: dict[str, Tensor]


def cases(setup: Setup) -> list[Case]:
    """Ours and padded eager in both layouts, in float32 and under bfloat16 autocast."""
    exact = cache(lambda: _exact(setup))
    found = []
    for dtype in setup.settings.dtypes:
        for name, what, owner, prepare in (
            ("ours", "ProteinBert on packed batches, LAMB", OURS, _ours),
            ("padded eager", "nn.Conv1d, padded batches, mask, fused AdamW", PLAIN, _eager),
            (
                "padded eager, channels last",
                "the same with convolutions as channels-last images",
                PLAIN,
                _eager_channels_last,
            ),
        ):
            found.append(
                Case(
                    table=TABLE,
                    name=name,
                    what=what,
                    owner=owner,
                    ours=owner == OURS,
                    work=_work(setup, dtype),
                    unit="residues/s",
                    prepare=lambda p=prepare, d=dtype: p(setup, d, exact),  # type: ignore[misc]
                    dtype=dtype,
                )
            )
    return found + machine.probes(setup.settings, "matrix", "copy")


def _numbers(setup: Setup) -> range:
    return range(min(PROTEINS, len(setup.proteins)))


def _terms(setup: Setup) -> Tensor:
    """(B, TERMS) GO terms that the proteins are said to have."""
    generator = torch.Generator().manual_seed(0)
    n_terms = setup.settings.config.n_annotations
    return torch.stack([torch.randperm(n_terms, generator=generator)[:TERMS] for _ in _numbers(setup)])


def _work(setup: Setup, dtype: str) -> Work:
    """Three times a forward pass."""
    forward = setup.work(_numbers(setup), dtype)
    return Work(forward.proteins, forward.residues, forward.tokens, 3 * forward.flops, 3 * forward.bytes)


def _ours(setup: Setup, dtype: str, exact: Callable[[], Step]) -> Ready[Step]:
    model = copy.deepcopy(setup.model).train()
    optimizer = Lamb(model.parameters(), lr=1e-5)
    ready = _ready(setup, dtype, exact, model, optimizer, lambda size: _packed_losses(setup, model, size), dict)
    return Ready(ready.run, ready.check, f"back end {model.backend_report().split()[0]}, {ready.note}")


def _packed_losses(setup: Setup, model: ProteinBert, size: int) -> Callable[[], Losses]:
    tokenizer, terms = Tokenizer(), _terms(setup)
    lengths = [len(setup.tokens[i]) for i in _numbers(setup)]
    batches = []
    for members in batches_by_tokens(lengths, size):
        batch = tokenizer([setup.proteins[i].sequence for i in members])
        true = terms[members].flatten(), torch.arange(len(members)) * terms.shape[1]
        batches.append((batch, true))

    def losses() -> Losses:
        for batch, true in batches:
            out = model(batch)
            assert isinstance(out, ProteinBertOutput)
            yield (
                token_loss(out, batch) * (batch.n_tokens / sum(lengths))
                + annotation_loss(out, true) * (len(batch) / len(lengths))
            )

    return losses


def _eager(setup: Setup, dtype: str, exact: Callable[[], Step], channels_last: bool = False) -> Ready[Step]:
    model = PaddedTraining(setup.model, channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return _ready(
        setup, dtype, exact, model, optimizer, lambda size: _padded_losses(setup, model, size), PaddedTraining.named
    )


def _eager_channels_last(setup: Setup, dtype: str, exact: Callable[[], Step]) -> Ready[Step]:
    return _eager(setup, dtype, exact, True)


def _padded_losses(setup: Setup, model: PaddedTraining, size: int) -> Callable[[], Losses]:
    terms, numbers = _terms(setup), _numbers(setup)
    n_tokens = sum(len(setup.tokens[i]) for i in numbers)
    batches = []
    for batch in competitors.padded_batches([setup.tokens[i] for i in numbers], size):
        true = torch.zeros(len(batch.numbers), setup.settings.config.n_annotations)
        batches.append((batch, true.scatter_(1, terms[batch.numbers], 1.0)))

    def losses() -> Losses:
        for batch, true in batches:
            token, annotation = model(batch.tokens, batch.mask, true)
            yield token * (int(batch.mask.sum()) / n_tokens) + annotation * (len(true) / len(numbers))

    return losses


def _ready(
    setup: Setup,
    dtype: str,
    exact: Callable[[], Step],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses_of: Pass,
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> Ready[Step]:
    """A step in micro-batches of the size with which it is fastest, by one run each after one that is not timed."""

    def step(losses: Callable[[], Losses]) -> Step:
        total = 0.0
        optimizer.zero_grad()
        passes = losses()
        while True:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = next(passes, None)
            if loss is None:
                break
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        return Step(total, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    before = copy.deepcopy(model.state_dict())
    choices = {}
    for size in setup.settings.batch_tokens:
        losses = losses_of(size)
        step(losses)
        started = time.perf_counter()
        step(losses)
        choices[time.perf_counter() - started] = size, losses
    size, losses = choices[min(choices)]
    # The checked run is to start where the reference does.
    model.load_state_dict(before)

    def check(found: Step) -> Check:
        right = exact()
        gradients = named(found.gradients)
        if missing := right.gradients.keys() ^ gradients.keys():
            return Check(False, f"gradients of other parameters: {', '.join(sorted(missing)[:3])}")
        worst, where = 0.0, ""
        for name, gradient in right.gradients.items():
            error = float((gradients[name].double() - gradient).norm() / gradient.norm())
            if not error <= worst:
                worst, where = error, name
        loss, limit = abs(found.loss / right.loss - 1), TOLERANCE[dtype]
        return Check(
            worst <= limit and loss <= limit,
            f"loss within {loss:.0e}, gradients within {worst:.0e} of their length, allowed {limit:g} ({where})",
        )

    name = "one protein" if size == 1 else f"{size:,} tokens"
    precision = "bfloat16 autocast, weights in float32" if dtype == "bfloat16" else "all in float32"
    return Ready(lambda: step(losses), check, f"{precision}, micro-batches of {name}")


def _exact(setup: Setup) -> Step:
    """Loss and gradients of the float64 reference."""
    reference = ProteinBert(setup.settings.config, backend="reference").double()
    reference.load_state_dict(setup.model.state_dict())
    total = 0.0
    for loss in _packed_losses(setup, reference, 4096)():
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return Step(total, {name: p.grad for name, p in reference.named_parameters() if p.grad is not None})
