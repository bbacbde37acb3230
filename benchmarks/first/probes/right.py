"""Kernels, their gradients and the whole model against the float64 reference, as in the GPU report's checks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.first import verdicts
from benchmarks.first.probes.versions import implementations
from benchmarks.first.process import Context
from proteinbert_fast.benchmark.cases import Check
from proteinbert_fast.benchmark.gpu import checks
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS, Inputs, Operation
from proteinbert_fast.benchmark.setup import random_model
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.ops.reference import LocalBlockWeights

# Residues of the proteins of each batch: of one residue, and of about 200, 5,000 and 60,000 rows, gaps counted in;
# around tiles of 64 and 128 rows and spans of 512, and more spans than are added up at once.
BATCHES = (
    (1,),
    (3, 0, 130),
    (61, 62, 63, 125, 126, 127, 0, 1, 300, 509, 510, 511, 1030, 1201),
    (34_350, *[349] * 60, 2047),
)
_SMALL = 5000  # rows, under a sanitizer
_RESULTS = {f"{verdicts.GRADIENT}local_block": ("x", "broadcast", *LocalBlockWeights._fields)}


def run(context: Context) -> None:
    """A line per name in the options, with the largest error of each result."""
    names: list[str] = context.options["names"]
    if not context.can_run():
        return
    kernels = verdicts.PORTABLE if context.options.get("portable") else verdicts.CHOSEN
    if kernels == verdicts.PORTABLE:
        context.run_portable("the portable kernels were asked for")
    settings, device, precision = context.settings, context.device, context.precision
    assert device is not None
    if context.on_gpu:
        batches = BATCHES[:-1] if context.options.get("small") else BATCHES
        settings = replace(settings, check_lengths=batches)
        if context.options.get("small"):
            settings = replace(settings, model_lengths=tuple(n for n in settings.model_lengths if n < _SMALL))
    setting = checks.Setting(settings, precision, device, checks.exact_device(device))
    said = implementations(context, precision.name)["local_block"]
    pairs: list[tuple[Inputs, Inputs]] = []
    with precision.active():
        model = random_model(settings.config) if any(name in checks.MODEL_CHECKS for name in names) else None
        for name in names:
            context.begin(name)
            errors: list[float] = []
            outcome = checks.guarded(name, partial(_check, setting, name, pairs, model, errors))
            context.emit(
                outcome.passed, check=name, decides=verdicts.key_of(precision.name, kernels, name), kernels=kernels,
                implementation=said, found=outcome.found, errors=_named(name, errors),
            )  # fmt: skip


def _check(
    setting: checks.Setting,
    name: str,
    pairs: list[tuple[Inputs, Inputs]],
    model: ProteinBert | None,
    errors: list[float],
) -> Check:
    if name in checks.MODEL_CHECKS:
        assert model is not None
        of_model: Callable[[checks.Setting, ProteinBert], Check] = checks.MODEL_CHECKS[name]
        with torch.inference_mode():
            return of_model(setting, model)
    found = checks.check_operation(setting, operation(name), pairs)
    errors += found.errors
    return found.check


def operation(name: str) -> Operation:
    """An operation, or the gradient of one, by its name."""
    known = {o.name: o for o in OPERATIONS} | {f"{verdicts.GRADIENT}{o.name}": o for o in GRADIENTS}
    return known[name]


def _named(name: str, errors: list[float]) -> dict[str, float]:
    """Which result is off says which of an operation's kernels is."""
    known = _RESULTS.get(name, ())
    return {known[i] if i < len(known) else f"result {i}": value for i, value in enumerate(errors)}
