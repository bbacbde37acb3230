"""Every kernel against the float64 reference on the device, one precision at a time; also as a process of its own.

    python -m proteinbert_fast.benchmark.gpu.checks < job.json

reads ``{"settings": ..., "precision": ..., "device": ...}`` and prints a JSON line when a check begins and one when it
has ended, so that whoever started it knows how far it came when it crashes.
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from proteinbert_fast.benchmark import apart
from proteinbert_fast.benchmark import inputs as proteins
from proteinbert_fast.benchmark.cases import Check
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS, Inputs, Operation, Tensors, compared, error, same
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS, Precision
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.benchmark.setup import TOLERANCE, random_model
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import first_line
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

MODEL, SAME_BITS, MEAN = "whole model", "same bits", "residue mean, same bits"
# Name of each check and what it does.
CHECKS = {
    **{operation.name: "against the float64 reference, twice, in poisoned memory" for operation in OPERATIONS},
    MODEL: "all states, attention weights and logits against the float64 reference",
    SAME_BITS: "of all of these: each protein alone, in a batch, and once more",
    MEAN: "alone, in a batch, and once more",
}
# What is no part of a forward pass forbids no timing of one.
APART = (MEAN,)


class Outcome(NamedTuple):
    """What a check found: its name, and as `cases.Check`."""

    name: str
    passed: bool
    found: str


class Compared(NamedTuple):
    """What the check of one operation found, and the largest error of each of its results over all batches."""

    check: Check
    errors: tuple[float, ...]


class Setting(NamedTuple):
    """What checks of one precision have in common."""

    settings: GpuSettings
    precision: Precision
    device: torch.device
    exact_device: torch.device  # where the float64 reference runs


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors are full of NaN, so that a number which nobody wrote shows."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def run(settings: GpuSettings, precision: Precision, device: torch.device) -> Iterator[str | Outcome]:
    """All checks in a precision: the name of each before it begins, then what it found."""
    with precision.active(), torch.inference_mode():
        setting = Setting(settings, precision, device, exact_device(device))
        pairs: list[tuple[Inputs, Inputs]] = []
        for operation in OPERATIONS:
            yield operation.name
            yield guarded(operation.name, partial(_operation, setting, operation, pairs))
        pairs.clear()
        model = random_model(settings.config)
        for name, check in MODEL_CHECKS.items():
            yield name
            yield guarded(name, partial(check, setting, model))


def guarded(name: str, check: Callable[[], Check]) -> Outcome:
    """A check's outcome; one that raises has failed, and says how in a line."""
    try:
        outcome = check()
    except Exception as problem:
        return Outcome(name, False, first_line(problem))
    return Outcome(name, outcome.passed, outcome.found)


def exact_device(device: torch.device) -> torch.device:
    """Where the float64 reference runs: on the device, if that computes it as the CPU does; else on the CPU."""
    cpu = torch.device("cpu")
    if device.type == "cpu":
        return cpu
    config = ProteinBertConfig(n_annotations=3, d_local=32, d_global=32, n_blocks=1, n_heads=2, d_key=16)
    try:
        there = Inputs(config, (5, 40), PRECISIONS["float32"], device, device)
        here = copy.copy(there)
        here.exact_device = cpu
        twins = there.exact(), here.exact()
        if all(error(operation.exact(twins[0]), operation.exact(twins[1])) < 1e-9 for operation in OPERATIONS):
            return device
    except RuntimeError:
        pass
    return cpu


def _operation(setting: Setting, operation: Operation, pairs: list[tuple[Inputs, Inputs]]) -> Check:
    return check_operation(setting, operation, pairs).check


def check_operation(setting: Setting, operation: Operation, pairs: list[tuple[Inputs, Inputs]]) -> Compared:
    """An operation, or the gradient of one, against the float64 reference: twice each batch, in poisoned memory.

    Args:
        setting: its ``check_lengths`` are the batches.
        operation: to check.
        pairs: inputs and their float64 twins, a pair per batch; made by the first operation, used by those after it.
    """
    settings, precision = setting.settings, setting.precision
    if not pairs:
        with torch.inference_mode(False):  # gradients of the reference need other tensors than those of inference
            for residues in settings.check_lengths:
                made = Inputs(settings.config, residues, precision, setting.device, setting.exact_device)
                pairs.append((made, made.exact()))
    worst: list[float] = []
    for residues, (made, exact) in zip(settings.check_lengths, pairs, strict=True):
        with poisoned_memory(), torch.inference_mode():
            found, again = (operation.defined(made, operation.run(made)) for _ in range(2))
        with torch.inference_mode(False):
            right = operation.defined(exact, operation.exact(exact))
        check = compared(found, right, precision.name, operation.by_largest)
        errors = [error((a,), (b,), operation.by_largest) for a, b in zip(found, right, strict=True)]
        worst = [max(pair) for pair in zip(worst, errors, strict=True)] if worst else errors
        if not check.passed:
            return Compared(Check(False, f"{check.found}, residues {_lengths(residues)}"), tuple(errors))
        if not same(found, again):
            return Compared(Check(False, f"two runs differ, residues {_lengths(residues)}"), tuple(errors))
    longest = max(map(max, settings.check_lengths))
    batches = f"{len(settings.check_lengths)} batches of 0 to {longest:,} residues"
    return Compared(Check(True, f"largest error {max(worst):.1e} in {batches}; two runs equal"), tuple(worst))


def _lengths(residues: Sequence[int]) -> str:
    return f"{residues[0]} to {residues[-1]}" if len(residues) > 4 else ", ".join(f"{n:,}" for n in residues)


def _ours(setting: Setting, model: ProteinBert) -> ProteinBert:
    ours = copy.deepcopy(model).to(setting.device, setting.precision.dtype)
    ours.backend = "triton"
    return ours


def _batch(setting: Setting) -> tuple[PackedBatch, Tensor]:
    """Proteins of all lengths, and GO terms of some of them."""
    settings = setting.settings
    batch = Tokenizer(gap=settings.config.reach)([proteins.of_length(n) for n in settings.model_lengths])
    annotations = torch.zeros(len(batch), settings.config.n_annotations)
    for i in range(0, len(batch), 2):
        annotations[i, i::7] = 1
    return batch, annotations


def _everything(out: ProteinBertOutput) -> tuple[list[Tensor], list[Tensor]]:
    """Results by row and by protein."""
    assert out.hidden_local is not None
    assert out.hidden_global is not None
    assert out.attentions is not None
    return [*out.hidden_local, *out.attentions, out.token_logits], [*out.hidden_global, out.go_logits]


def _asked(model: ProteinBert, batch: PackedBatch, annotations: Tensor) -> ProteinBertOutput:
    device, dtype = model.token_embedding.weight.device, model.token_embedding.weight.dtype
    out = model(batch.to(device), annotations.to(device, dtype), hidden_states=True, attentions=True)
    assert isinstance(out, ProteinBertOutput)
    return out


def _model(setting: Setting, model: ProteinBert) -> Check:
    reference = copy.deepcopy(model).to(setting.exact_device, torch.float64)
    reference.backend = "reference"
    batch, annotations = _batch(setting)
    inside = batch.segments >= 0

    def tensors(asked: ProteinBert) -> Tensors:
        rows, whole = _everything(_asked(asked, batch, annotations))
        return tuple([r[inside.to(r.device)] for r in rows] + whole)

    right = tensors(reference)
    with poisoned_memory():
        found = tensors(_ours(setting, model))
    worst, allowed = error(found, right), TOLERANCE[setting.precision.name]
    longest = max(setting.settings.model_lengths)
    return Check(worst <= allowed, f"largest error {worst:.1e}, allowed {allowed:.2g}, to {longest:,} residues")


def _by_protein(out: ProteinBertOutput, i: int) -> Tensors:
    rows, whole = _everything(out)
    start, length = int(out.batch.host_starts[i]), int(out.batch.host_lengths[i])
    return tuple([r[start : start + length] for r in rows] + [w[i] for w in whole])


def _same_bits(setting: Setting, model: ProteinBert) -> Check:
    return _compared_alone(setting, model, _by_protein)


def _mean(setting: Setting, model: ProteinBert) -> Check:
    return _compared_alone(setting, model, lambda out, i: (out.residue_mean()[i],))


def _compared_alone(
    setting: Setting, model: ProteinBert, results: Callable[[ProteinBertOutput, int], Tensors]
) -> Check:
    ours = _ours(setting, model)
    batch, annotations = _batch(setting)
    together, again = _asked(ours, batch, annotations), _asked(ours, batch, annotations)
    for i, n in enumerate(setting.settings.model_lengths):
        found = results(together, i)
        if not same(found, results(again, i)):
            return Check(False, f"two runs differ for a protein of {n:,} residues")
        if not same(found, results(_asked(ours, batch[i], annotations[i : i + 1]), 0)):
            return Check(False, f"a protein of {n:,} residues differs alone and in a batch")
    return Check(True, f"equal for {len(batch)} proteins of 0 to {max(setting.settings.model_lengths):,} residues")


MODEL_CHECKS: dict[str, Callable[[Setting, ProteinBert], Check]] = {MODEL: _model, SAME_BITS: _same_bits, MEAN: _mean}


def run_apart(settings: GpuSettings, precisions: Sequence[Precision], device: torch.device) -> dict[str, list[Outcome]]:
    """All checks of several precisions, each in a process of its own, all at once.

    Args:
        settings: what to check; a process that takes longer than ``apart_seconds`` is ended.
        precisions: to check.
        device: to check on.

    Returns:
        By precision, what was found. A check in which a process ended has failed; there is none for those after it.
    """
    with ThreadPoolExecutor(len(precisions) or 1) as pool:
        found = pool.map(lambda precision: _process(settings, precision, device), precisions)
        return {precision.name: outcomes for precision, outcomes in zip(precisions, found, strict=True)}


def _process(settings: GpuSettings, precision: Precision, device: torch.device) -> list[Outcome]:
    job = {"settings": settings.to_dict(), "precision": precision.name, "device": str(device)}
    ended = apart.run(__name__, job, settings.apart_seconds)
    return outcomes_of(ended.output, ended.end, ended.errors)


def outcomes_of(lines: Sequence[str], end: str, errors: Sequence[str]) -> list[Outcome]:
    """What a process printed, and how it ended.

    Args:
        lines: of its standard output; other lines than its own are passed over.
        end: how it ended, in words.
        errors: lines of its standard error.
    """
    outcomes: list[Outcome] = []
    begun = next(iter(CHECKS))
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, list) and len(values) == 3:
            outcomes.append(Outcome(*values))
        elif isinstance(values, str):
            begun = values
    if len(outcomes) < len(CHECKS):
        why = f": {errors[-1][:200]}" if errors else ""
        done = {outcome.name for outcome in outcomes}
        name = begun if begun not in done else next(name for name in CHECKS if name not in done)
        outcomes.append(Outcome(name, False, f"{end}{why}"))
    return outcomes


def main() -> None:
    """One precision; see above."""
    job = json.load(sys.stdin)
    settings, precision = GpuSettings.from_dict(job["settings"]), PRECISIONS[job["precision"]]
    for found in run(settings, precision, torch.device(job["device"])):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
