"""A training step on real proteins: forward, both losses, backward, optimiser; ours beside padded PyTorch."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work, flops_per_token
from proteinbert_fast.benchmark.competitors import PaddedTraining, padded_batches
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS
from proteinbert_fast.benchmark.gpu.sections.forward import Sample, fastest, ratio, sample, to_device, waste
from proteinbert_fast.benchmark.gpu.sections.kernels import training_prediction
from proteinbert_fast.benchmark.gpu.sections.machine import matrix_probes
from proteinbert_fast.benchmark.setup import OURS, PLAIN
from proteinbert_fast.benchmark.timing import Row, Target, percentiles
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.ops.backends import Save
from proteinbert_fast.packing import PackedBatch, batches_by_tokens
from proteinbert_fast.tokenizer import PAD, Tokenizer

TITLE = "Training step: real proteins, forward, losses, backward, optimiser"
TABLE = "one batch of many proteins"
EAGER, COMPILED = "padded eager", "padded, torch.compile"
# What the paper's pretraining saw, and the mean length of its proteins.
RECORDS, MEAN_RESIDUES = 670e6, 339
# Of each gradient's length, against the float64 reference's: states and gradients are rounded to 8 bits on their way
# through six blocks.
TOLERANCE = 0.1
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Data:
    """A batch of real proteins, and something to predict.

    Attributes:
        batch: packed, on the device.
        numbers: of its proteins in the set-up.
        terms: (B, N) booleans: every protein has a few.
        work: three times a forward pass.
    """

    batch: PackedBatch
    numbers: list[int]
    terms: Tensor
    work: Work


def rows(bench: Bench) -> list[Row]:
    """Ours with both choices of what to save; padded eager, and compiled where there is time; the matrix rates."""
    chosen = sample(bench)
    memory: list[dict[str, Any]] = [{}, {}]
    saves: tuple[Save, Save] = ("preactivations", "inputs")
    cases = [ours(bench, chosen, save, found) for save, found in zip(saves, memory, strict=True)]
    cases += [_padded(bench, chosen, name) for name in (EAGER, COMPILED)]
    found = bench.measure([*cases, *matrix_probes(bench)], rounds=min(bench.settings.rounds, 5))
    for row, counted, most in zip(found[:2], memory, (8192.0, 3072.0), strict=True):
        row.values.update(counted)
        value = row.values.get("bytes_per_residue")
        row.targets.append(Target("memory beyond weights and optimiser", most, "B per residue", False, value))
    for row in found:
        if row.seconds and row.case.probe is None:
            rate = row.case.work.residues / percentiles(row.seconds)["p50"]
            row.values["residues_per_second"] = rate
            row.values["hours_for_670_million_records"] = RECORDS * MEAN_RESIDUES / rate / 3600
    for row in found[:2]:
        if row.seconds:
            lengths = [int(n) - 2 for n in training_data(bench, chosen).batch.host_lengths]
            predicted = training_prediction(bench, lengths, PRECISIONS["bfloat16"])
            total = sum(predicted.values())
            row.values["predicted_residues_per_second"] = row.case.work.residues / total
            row.values["predicted_bounds"] = {bound: seconds / total for bound, seconds in predicted.items() if seconds}
    _aim(found)
    return found


def _aim(rows: Sequence[Row]) -> None:
    best = fastest(rows, lambda case: case.ours)
    other = fastest(rows, lambda case: case.name in (EAGER, COMPILED))
    bears = best or rows[0]
    fraction = percentiles(best.of_matrix_rate)["p50"] if best and best.of_matrix_rate else None
    values = {} if best is None else best.values
    bears.targets += [
        Target("training step", 25e6, "residues/s", True, values.get("residues_per_second")),
        Target("training step, of the matrix rate", 0.45, "of the rate", True, fraction),
        Target("ours over padded, compiled where it could be", 1.7, "x", True, ratio(best, other)),
        Target("670 M records of 339 residues", 4.0, "hours", False, values.get("hours_for_670_million_records")),
    ]


def training_data(bench: Bench, chosen: Sample) -> Data:
    """The sample's first batch of the size that trainings take; neighbours in length, as batches of the sample are."""

    def make() -> Data:
        reach, size = bench.settings.config.reach, bench.settings.training_rows
        batches = batches_by_tokens([n + 2 for n in chosen.lengths], size, gap=reach)
        # The middle one: about the median length, so that the padded model hardly pads.
        places = batches[len(batches) // 2]
        numbers = [chosen.numbers[k] for k in places]
        packed = Tokenizer(gap=reach)([bench.setup.proteins[i].sequence for i in numbers])
        generator = torch.Generator().manual_seed(0)
        terms = torch.rand(len(numbers), bench.settings.config.n_annotations, generator=generator) < 0.001
        work = Work(
            proteins=len(numbers),
            residues=packed.n_tokens - 2 * len(numbers),
            tokens=packed.n_tokens,
            flops=3.0 * packed.n_tokens * flops_per_token(bench.settings.config),
        )
        return Data(packed.to(bench.device), numbers, terms.to(bench.device), work)

    return bench.once("training data", make)


def _case(bench: Bench, chosen: Sample, name: str, what: str, ours: bool, prepare: Callable[[], Ready[Any]]) -> Case:
    return Case(
        table=TABLE,
        name=name,
        what=what,
        owner=OURS if ours else PLAIN,
        ours=ours,
        work=training_data(bench, chosen).work,
        unit="tokens/s",
        prepare=prepare,
        dtype="bfloat16",
    )


def ours(bench: Bench, chosen: Sample, save: Save, found: dict[str, Any]) -> Case:
    """A training step of ours, with a choice of what to keep; ``found`` takes the memory that was counted."""

    def prepare() -> Ready[float]:
        data = training_data(bench, chosen)
        run = training_step(bench, data, save)
        run()
        bench.tidy()
        before = torch.cuda.memory_allocated() if bench.on_gpu else 0
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        run()
        bench.synchronize()
        if bench.on_gpu:
            peak = torch.cuda.max_memory_allocated() - before
            found.update(peak_bytes=peak, bytes_per_residue=peak / data.work.residues)
        note = f"{data.batch.n_rows:,} rows, weights in float32 under autocast, LAMB"
        return Ready(run, lambda loss: _checked(bench, save, float(loss)), note)

    return _case(bench, chosen, f"ours, save {save}", "ProteinBert on a packed batch", True, prepare)


def training_step(bench: Bench, data: Data, save: Save) -> Callable[[], float]:
    """A step of a model of its own, to be called as often as wanted; gives the loss."""
    from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
    from proteinbert_fast.pretraining.optimizers import Lamb

    with torch.inference_mode(False):
        model = copy.deepcopy(bench.setup.model).to(bench.device)
    model.backend = "triton"
    for block in model.blocks:
        block.save = save  # type: ignore[assignment]
    model.train()
    optimizer = Lamb(model.parameters(), lr=1e-5)
    clean, terms = data.batch, data.terms

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast(bench.device.type, _DTYPE):
            out: Any = model(clean)
            loss = token_loss(out, clean) + annotation_loss(out, terms)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()  # type: ignore[return-value]

    return run


def _checked(bench: Bench, save: Save, loss: float) -> Check:
    """Every weight's gradient against the float64 reference's, on a few proteins."""
    if not math.isfinite(loss):
        return Check(False, f"the loss is {loss}")
    worst, where = 0.0, ""
    exact = _gradients(bench, bench.exact_model, "reference", save)
    ours = _gradients(bench, bench.setup.model, "triton", save)
    for name, right in exact.items():
        size = right.norm().item()
        error = (ours[name].double().cpu() - right.cpu()).norm().item() / max(size, 1e-12)
        if not error <= worst:
            worst, where = error, name
    return Check(worst <= TOLERANCE, f"gradients within {worst:.1e} of their length, allowed {TOLERANCE:g} ({where})")


def _gradients(bench: Bench, model: ProteinBert, backend: str, save: Save) -> dict[str, Tensor]:
    is_exact = backend == "reference"
    with torch.inference_mode(False), torch.enable_grad():
        twin = copy.deepcopy(model).train()
        twin.backend = backend  # type: ignore[assignment]
        if not is_exact:
            twin = twin.to(bench.device)
        for block in twin.blocks:
            block.save = save  # type: ignore[assignment]
        device = twin.token_embedding.weight.device
        lengths = [n for n in bench.settings.model_lengths if n <= 2000]
        batch = Tokenizer(gap=bench.settings.config.reach)(
            [b"MKTAYIAKQR" * (n // 10) + b"W" * (n % 10) for n in lengths]
        )
        batch = batch.to(device)
        with torch.autocast(device.type, _DTYPE, enabled=not is_exact):
            out: Any = twin(batch)
            inside = (batch.segments >= 0).unsqueeze(-1)
            local = (out.token_logits.double() * inside).square().mean()
            loss = local + out.go_logits.double().square().mean() + out.residue_mean().double().square().mean()
        loss.backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def _padded(bench: Bench, chosen: Sample, name: str) -> Case:
    def prepare() -> Ready[float]:
        data = training_data(bench, chosen)
        if name == COMPILED and bench.seconds > bench.settings.training_compile_before:
            raise Unavailable(f"out of time to compile: {bench.seconds:.0f} s had passed")
        torch.backends.cudnn.benchmark = True
        with torch.inference_mode(False):
            model = PaddedTraining(copy.deepcopy(bench.setup.model).to(bench.device), channels_last=True)
        tokens = [bench.setup.tokens[i] for i in data.numbers]
        longest = max(map(len, tokens))
        (batch,) = to_device(padded_batches(tokens, longest * len(tokens)), bench.device)
        places = torch.tensor(batch.numbers, device=bench.device)
        terms = data.terms[places].float()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=bench.on_gpu)
        step: Callable[..., tuple[Tensor, Tensor]] = model
        note = f"one batch, {waste([batch])}, weights in float32 under autocast, AdamW"
        if name == COMPILED:
            options = {key: value for key, value in bench.settings.compile_options.items() if key != "mode"}
            step = torch.compile(model, **options)
            note += ", torch.compile in its default mode"

        def run() -> float:
            optimizer.zero_grad()
            with torch.autocast(bench.device.type, _DTYPE):
                token, annotation = step(batch.tokens.where(batch.mask, PAD), batch.mask, terms)
                loss = token + annotation
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss.detach()  # type: ignore[return-value]

        run()
        return Ready(run, lambda loss: Check(math.isfinite(float(loss)), f"the loss is {float(loss):.3f}"), note)

    return _case(bench, chosen, name, "the padded model with both heads, channels last", False, prepare)
