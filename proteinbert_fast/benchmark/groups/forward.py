"""Forward pass: tokens to the states of all residues and proteins, many proteins and one, beside other code."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from proteinbert_fast.benchmark import competitors, machine
from proteinbert_fast.benchmark.cases import Case, Ready
from proteinbert_fast.benchmark.competitors import PaddedBatch, PaddedModel, PaddedResult
from proteinbert_fast.benchmark.setup import OURS, PLAIN, Setup, States
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import batches_by_tokens
from proteinbert_fast.tokenizer import Tokenizer

MANY = "many proteins"
ONE = "one protein"
OURS_BATCH_TOKENS = 32_768  # as embed() on CPUs
_ONE_CALLS = 10

OursResult = list[tuple[list[int], ProteinBertOutput]]


def cases(setup: Setup) -> list[Case]:
    """Ours, padded eager, the same compiled, protein-bert-pytorch; on the sample and on one protein."""
    other = f"{competitors.OTHER_PACKAGE} {competitors.other_package_version()}"
    found: list[Case] = []
    for dtype in setup.settings.dtypes:
        sources: list[tuple[str, str, str, Callable[[str, bool], Ready[Any]]]] = [
            ("ours", "ProteinBert on packed batches", OURS, lambda d, one: _ours(setup, d, one)),
            ("padded eager", "nn.Conv1d, padded batches, mask", PLAIN, lambda d, one: _eager(setup, d, one, False)),
            (
                "padded eager, channels last",
                "the same with convolutions as channels-last images",
                PLAIN,
                lambda d, one: _eager(setup, d, one, True),
            ),
        ]
        if setup.settings.compile:
            what = "the faster of the two under torch.compile"
            sources.append(("padded compiled", what, PLAIN, lambda d, one: _compiled(setup, d, one)))
        what = "another model of equal widths, padded batches, mask"
        sources.append((competitors.OTHER_PACKAGE, what, other, lambda d, one: _other(setup, d, one)))
        for table, numbers in ((MANY, range(len(setup.proteins))), (ONE, [setup.typical])):
            for name, what, owner, prepare in sources:
                found.append(
                    Case(
                        table=table,
                        name=name,
                        what=what,
                        owner=owner,
                        ours=owner == OURS,
                        work=setup.work(numbers, dtype),
                        unit="tokens/s",
                        prepare=lambda p=prepare, d=dtype, one=table == ONE: p(d, one),  # type: ignore[misc]
                        dtype=dtype,
                    )
                )
    return found + machine.probes(setup.settings, "matrix", "copy")


def _ours(setup: Setup, dtype: str, one: bool) -> Ready[OursResult]:
    model = setup.ours(dtype)
    numbers = [setup.typical] if one else list(range(len(setup.proteins)))
    tokenizer = Tokenizer()
    lengths = [len(setup.tokens[i]) for i in numbers]
    batches = []
    for chosen in batches_by_tokens(lengths, OURS_BATCH_TOKENS):
        members = [numbers[k] for k in chosen]
        batches.append((members, tokenizer([setup.proteins[i].sequence for i in members])))

    def run() -> OursResult:
        with torch.inference_mode():
            return [(members, model(batch)) for members, batch in batches]

    def states(result: OursResult) -> Iterator[States]:
        for members, out in result:
            for k, i in enumerate(members):
                yield States(i, out.local[k], out.global_state[k])

    with torch.inference_mode():
        report = model.backend_report().split()[0]
    note = f"back end {report}" + ("" if one else f", batches of {OURS_BATCH_TOKENS:,} rows")
    return _ready(setup, run, states, dtype, one, note)


def _eager(setup: Setup, dtype: str, one: bool, channels_last: bool) -> Ready[PaddedResult]:
    model = setup.padded(dtype, channels_last)
    if one:
        return _padded(setup, model, _typical(setup), dtype, one, "")
    choice = setup.fastest_eager(dtype, channels_last)
    return _padded(setup, model, choice.batches, dtype, one, str(choice))


def _compiled(setup: Setup, dtype: str, one: bool) -> Ready[PaddedResult]:
    model, seconds = setup.compiled(dtype)
    layout = "channels last" if model.channels_last else "nn.Conv1d"
    note = f"{layout}, dynamic shapes, {seconds:.0f} s of compiling not counted"
    if one:
        return _padded(setup, model, _typical(setup), dtype, one, note)
    choice = competitors.fastest_batches(model, setup.tokens, setup.settings.batch_tokens)
    return _padded(setup, model, choice.batches, dtype, one, f"{choice}; {note}")


def _padded(
    setup: Setup, model: PaddedModel, batches: list[PaddedBatch], dtype: str, one: bool, note: str
) -> Ready[PaddedResult]:
    return _ready(setup, lambda: competitors.run_padded(model, batches), padded_states, dtype, one, note)


def _other(setup: Setup, dtype: str, one: bool) -> Ready[PaddedResult]:
    model = competitors.other_package(setup.settings.config, getattr(torch, dtype))
    note = "not checked: another model"
    if one:
        batches = _typical(setup)
    else:
        choice = competitors.fastest_batches(model, setup.tokens, setup.settings.batch_tokens)
        batches, note = choice.batches, f"{choice}; {note}"
    return Ready(lambda: competitors.run_padded(model, batches), None, note, _ONE_CALLS if one else 1)


def _typical(setup: Setup) -> list[PaddedBatch]:
    (batch,) = competitors.padded_batches([setup.tokens[setup.typical]], 1)
    return [batch._replace(numbers=[setup.typical])]


def padded_states(result: PaddedResult) -> Iterator[States]:
    """Each protein's states, without the padding."""
    for batch, (local, global_state) in result:
        lengths = batch.mask.sum(1).tolist()
        for k, i in enumerate(batch.numbers):
            yield States(i, local[k, : lengths[k]], global_state[k])


def _ready(
    setup: Setup,
    run: Callable[[], Any],
    states: Callable[[Any], Iterable[States]],
    dtype: str,
    one: bool,
    note: str,
) -> Ready[Any]:
    expected = 1 if one else None
    return Ready(
        run,
        lambda result: setup.check(states(result), dtype, expected=expected),
        note,
        _ONE_CALLS if one else 1,
    )
