"""Does training on the kernels go the way of the float32 reference? One model, trained in several ways on one data set.

All ways start from the same weights and see the same proteins, corrupted alike, in the same order; only precision and
back end differ. A curve keeps to the reference's if its loss, a mean over `SMOOTHED` steps, is within `BAND` of the
reference's at every step. For scale, the float32 reference is trained a second time with other corruption: that is how
far apart curves lie that differ by chance alone.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from proteinbert_fast.benchmark.picture import figure_type
from proteinbert_fast.benchmark.report import markdown
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import InputError
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.ops.backends import Backend
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.pretraining.corruption import corrupt_annotations, corrupt_tokens
from proteinbert_fast.pretraining.losses import annotation_loss, token_loss
from proteinbert_fast.pretraining.optimizers import Lamb
from proteinbert_fast.tokenizer import Tokenizer

BAND = 0.01  # of the float32 reference's loss
SMOOTHED = 10  # steps
JSON_NAME, MARKDOWN_NAME, PICTURE_NAME = "results.json", "results.md", "results.png"

SMALL = {"d_local": 32, "d_global": 64, "n_blocks": 2, "n_heads": 4, "d_key": 16}


class Proteins(NamedTuple):
    """What to learn from.

    Attributes:
        sequences: residues.
        terms: numbers of each protein's GO terms, rising.
        n_terms: how many there are.
    """

    sequences: list[str]
    terms: list[list[int]]
    n_terms: int


def read_proteins(path: Path, at_least: int = 3) -> Proteins:
    """Proteins and the GO terms that at least so many of them have.

    Args:
        path: tab-separated, with columns sequence, go_bp, go_mf and go_cc, terms separated by semicolons.
        at_least: proteins.

    Raises:
        InputError: a column is missing.
    """
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    places = {name: k for k, name in enumerate(lines[0])}
    wanted = ("go_bp", "go_mf", "go_cc", "sequence")
    if missing := [name for name in wanted if name not in places]:
        raise InputError(f"{path}: there is no column {missing[0]}")
    found = [sorted({t for c in wanted[:3] for t in line[places[c]].split(";") if t}) for line in lines[1:]]
    counts = Counter(term for terms in found for term in terms)
    numbers = {t: k for k, t in enumerate(sorted(t for t, n in counts.items() if n >= at_least))}
    sequences = [line[places["sequence"]] for line in lines[1:]]
    return Proteins(sequences, [[numbers[t] for t in terms if t in numbers] for terms in found], len(numbers))


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: in tables and pictures.
        backend: of the model.
        dtype: under autocast; float32 for none.
        seed: of the corruption.
    """

    name: str
    backend: Backend
    dtype: torch.dtype
    seed: int = 0

    @property
    def is_scaled(self) -> bool:
        """Whether the loss is scaled, as float16 needs."""
        return self.dtype == torch.float16


REFERENCE = Way("float32 reference", "reference", torch.float32)
OTHER_SEED = Way("float32 reference, other corruption", "reference", torch.float32, seed=1)
KERNELS = (
    Way("bfloat16 Triton kernels", "triton", torch.bfloat16),
    Way("float16 Triton kernels, loss scaled", "triton", torch.float16),
)
PLAIN_BFLOAT16 = Way("bfloat16 reference", "reference", torch.bfloat16)
ON_CPU = Way("bfloat16 CPU kernels", "cpu", torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """How to train.

    Attributes:
        config: sizes of the model.
        steps: of training.
        batch: proteins in each.
        residues: of each protein; longer ones are cut to their first ones.
        lr: learning rate of LAMB.
        device: to train on.
        ways: to train in, beside the float32 reference.
    """

    config: ProteinBertConfig
    steps: int = 200
    batch: int = 4
    residues: int = 62
    lr: float = 5e-3
    device: str = "cpu"
    ways: tuple[Way, ...] = (*KERNELS, PLAIN_BFLOAT16, OTHER_SEED)


@dataclass
class Curve:
    """What a training has done.

    Attributes:
        way: it was done in.
        token, annotation: the two losses before each step.
        scale: of the loss at each step; empty where it is not scaled.
        skipped: steps that were left out, because a scaled gradient overflowed.
        moved: what each parameter has moved by, on the host.
    """

    way: Way
    token: list[float] = field(default_factory=list)
    annotation: list[float] = field(default_factory=list)
    scale: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    moved: dict[str, Tensor] = field(default_factory=dict)

    @property
    def total(self) -> list[float]:
        """Both losses."""
        return [a + b for a, b in zip(self.token, self.annotation, strict=True)]

    @cached_property
    def smooth(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Mean of the loss over the last `SMOOTHED` steps, or as many as there were."""
        sums = np.concatenate([[0.0], np.cumsum(self.total)])
        last = np.arange(1, len(sums))
        first = np.maximum(last - SMOOTHED, 0)
        means: np.ndarray[Any, np.dtype[np.float64]] = (sums[last] - sums[first]) / (last - first)
        return means

    def off(self, reference: "Curve") -> np.ndarray[Any, np.dtype[np.float64]]:
        """How far this curve is from another at each step, as a share of that one; both smoothed."""
        share: np.ndarray[Any, np.dtype[np.float64]] = self.smooth / reference.smooth - 1
        return share

    def keeps_to(self, reference: "Curve") -> bool:
        """Whether it is within the band at every step; NaN is not."""
        return bool((np.abs(self.off(reference)) <= BAND).all())

    def direction(self, reference: "Curve") -> tuple[float, str]:
        """Of all parameters' movements, the least cosine with the reference's, and the parameter's name."""
        cosines = {}
        for name, right in reference.moved.items():
            moved, right = self.moved[name].double().flatten(), right.double().flatten()
            lengths = float(moved.norm() * right.norm())
            cosines[name] = float(moved @ right) / lengths if lengths else float(bool(moved.any() == right.any()))
        name = min(cosines, key=lambda n: -math.inf if math.isnan(cosines[n]) else cosines[n])
        return cosines[name], name


def train(plan: Plan, proteins: Proteins, way: Way) -> Curve:
    """Trains from the same weights on the same batches whatever the way.

    Args:
        plan: sizes, steps, device.
        proteins: to learn from.
        way: back end, precision, seed of the corruption.
    """
    device, curve = torch.device(plan.device), Curve(way)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ProteinBert(plan.config, backend=way.backend)
    model = model.to(device).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Lamb(model.parameters(), lr=plan.lr)
    # Starts low enough to begin at once, and grows often enough to be seen growing.
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, growth_interval=50, enabled=way.is_scaled)
    order = torch.randperm(len(proteins.sequences), generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(plan.steps):
        records = [order[(step * plan.batch + i) % len(order)] for i in range(plan.batch)]
        clean, terms = _batch(plan, proteins, records, device)
        noisy = corrupt_tokens(clean, records, seed=way.seed, step=step)
        shown = corrupt_annotations(terms, proteins.n_terms, records, seed=way.seed, step=step)
        with torch.autocast(device.type, way.dtype, enabled=way.dtype != torch.float32):
            out = model(noisy, annotations=shown)
            assert isinstance(out, ProteinBertOutput)
            losses = token_loss(out, clean), annotation_loss(out, terms)
        optimizer.zero_grad()
        scaler.scale(losses[0] + losses[1]).backward()  # type: ignore[no-untyped-call]
        if way.is_scaled:
            curve.scale.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        if way.is_scaled and scaler.get_scale() < curve.scale[-1]:
            curve.skipped.append(step)
        curve.token.append(float(losses[0].detach()))
        curve.annotation.append(float(losses[1].detach()))
    curve.moved = {name: (p.detach() - before[name]).cpu() for name, p in model.named_parameters()}
    return curve


def _batch(
    plan: Plan, proteins: Proteins, records: Sequence[int], device: torch.device
) -> tuple[PackedBatch, tuple[Tensor, Tensor]]:
    clean = Tokenizer(gap=plan.config.reach)([proteins.sequences[i][: plan.residues] for i in records])
    terms = [torch.tensor(proteins.terms[i], dtype=torch.int64) for i in records]
    offsets = torch.tensor([0, *(len(t) for t in terms)]).cumsum(0)[:-1]
    return clean.to(device), (torch.cat(terms).to(device), offsets.to(device))


def compare(
    plan: Plan, proteins: Proteins, environment: dict[str, Any], source: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Trains as float32 reference and in all ways of the plan.

    Args:
        plan: what to do.
        proteins: to learn from.
        environment: of the machine; see `machine.environment`.
        source: of the proteins.
        say: is told what goes on, a line each.

    Returns:
        Everything but the weights, as plain values.
    """
    curves: list[Curve] = []
    for way in (REFERENCE, *plan.ways):
        say(f"{way.name}: {plan.steps} steps")
        curves.append(train(plan, proteins, way))
    return {
        "environment": environment,
        "source": source,
        "plan": {name: value for name, value in asdict(plan).items() if name not in {"ways", "config"}}
        | {"config": plan.config.to_dict()},
        "band": BAND,
        "smoothed_steps": SMOOTHED,
        "curves": [_row(curve, curves[0]) for curve in curves],
    }


def _row(curve: Curve, reference: Curve) -> dict[str, Any]:
    cosine, name = curve.direction(reference)
    return {
        "name": curve.way.name,
        "is_reference": curve is reference,
        "is_for_scale": curve.way.seed != reference.way.seed,
        "backend": curve.way.backend,
        "dtype": str(curve.way.dtype).removeprefix("torch."),
        "token_loss": curve.token,
        "annotation_loss": curve.annotation,
        "loss_scale": curve.scale,
        "skipped_steps": curve.skipped,
        "smooth": curve.smooth.tolist(),
        "off": curve.off(reference).tolist(),
        "largest_off": float(np.abs(curve.off(reference)).max()),
        "within_band": curve.keeps_to(reference),
        "least_cosine_of_a_movement": {"value": cosine, "parameter": name},
    }


def outside(found: dict[str, Any]) -> list[str]:
    """Names of the curves that leave the band, of what `compare` gave."""
    return [curve["name"] for curve in found["curves"] if not curve["within_band"] and not curve["is_for_scale"]]


def to_markdown(found: dict[str, Any]) -> str:
    """What `compare` gave as a table to read."""
    e, plan = found["environment"], found["plan"]
    sizes = ", ".join(f"{name} {plan['config'][name]}" for name in (*SMALL, "n_annotations"))
    body = []
    for curve in found["curves"]:
        is_compared = not (curve["is_reference"] or curve["is_for_scale"])
        verdict = "yes" if curve["within_band"] else "**no**"
        scale = ""
        if curve["loss_scale"]:
            scale = f"{min(curve['loss_scale']):,.0f} to {max(curve['loss_scale']):,.0f}, "
            scale += f"{len(curve['skipped_steps'])} steps skipped"
        body.append(
            [
                curve["name"],
                f"{curve['smooth'][min(SMOOTHED, plan['steps']) - 1]:.4f}",
                f"{curve['smooth'][-1]:.4f}",
                "" if curve["is_reference"] else f"{curve['largest_off']:.2%}",
                verdict if is_compared else "for scale" if curve["is_for_scale"] else "",
                f"{curve['least_cosine_of_a_movement']['value']:.4f}" if is_compared else "",
                scale,
            ]
        )
    header = ["way", f"loss, first {SMOOTHED} steps", f"last {SMOOTHED}", "largest distance", "within the band",
              "least cosine", "loss scale"]  # fmt: skip
    lines = [
        f"# Loss curves on {e.get('gpu') or e['cpu']}",
        "",
        f"{e['date']}, proteinbert_fast {e['proteinbert_fast']} (commit {e['commit']}), torch {e['torch']}, triton "
        f"{e['triton']}{' in its interpreter' if e['interpreted'] else ''}, Python {e['python']}.",
        "",
        f"{plan['steps']} steps of LAMB (lr {plan['lr']:g}) from the same weights on the same batches of "
        f"{plan['batch']} proteins, cut to {plan['residues']} residues, of {found['source']}; {sizes}. Loss is that "
        "of tokens and GO terms together. Autocast with weights in float32.",
        "",
        f"**The band**, set beforehand: the mean loss of the last {found['smoothed_steps']} steps is within "
        f"{found['band']:.0%} of the float32 reference's at every step. The float32 reference with other corruption of "
        "the same proteins shows how far apart curves lie by chance. The least cosine is that between a parameter's "
        "way from first to last step and its way in the float32 reference, of the parameter where it is least.",
        "",
        *markdown(header, body),
    ]
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draws what `compare` gave: the curves, and their distance from the reference's.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure_class = figure_type()
    e, plan, band = found["environment"], found["plan"], 100 * found["band"]
    figure = figure_class(figsize=(10, 7.5), layout="constrained")
    losses, distances = figure.subplots(2, 1, height_ratios=[3, 2], sharex=True)
    interpreted, sizes = " (interpreter)" if e["interpreted"] else "", plan["config"]
    figure.suptitle(
        f"proteinbert_fast {e['proteinbert_fast']} ({e['commit'] or 'installed'}) on {e.get('gpu') or e['cpu']}, torch "
        f"{e['torch']}, triton {e['triton']}{interpreted}, {e['date'][:10]}\n{plan['steps']} steps of LAMB on real "
        f"proteins, {sizes['n_blocks']} blocks of {sizes['d_local']} and {sizes['d_global']} channels; "
        f"means over {found['smoothed_steps']} steps",
        fontsize=10,
    )
    steps = np.arange(1, plan["steps"] + 1)
    styles = iter([("#1b6ca8", "-"), ("#d1495b", "--"), ("#66a182", ":"), ("#8d6a9f", "-."), ("#444444", "--")])
    for curve in found["curves"]:
        is_reference, is_for_scale = curve["is_reference"], curve["is_for_scale"]
        color, style = ("#222222", "-") if is_reference else ("#b9bec5", "-") if is_for_scale else next(styles)
        order = 1 if is_reference or is_for_scale else 2
        losses.plot(
            steps, curve["smooth"], style, color=color, linewidth=3.2 if is_reference else 1.4, label=curve["name"],
            zorder=order,
        )  # fmt: skip
        if not is_reference:
            distances.plot(steps, 100 * np.array(curve["off"]), style, color=color, linewidth=1.4, zorder=order)
    distances.axhspan(-band, band, color="#e8c36a", alpha=0.35, zorder=0, label=f"the band: ±{band:g} %")
    distances.set_ylim(-3.2 * band, 3.2 * band)
    losses.set_title("loss of tokens and GO terms", loc="left", fontsize=10, fontweight="bold")
    distances.set_title("distance from the float32 reference", loc="left", fontsize=10, fontweight="bold")
    losses.set_ylabel("nats", fontsize=8)
    distances.set_ylabel("% of its loss", fontsize=8)
    distances.set_xlabel("step", fontsize=8)
    for ax in (losses, distances):
        ax.tick_params(labelsize=8)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlim(1, plan["steps"])
    figure.savefig(path, dpi=110)


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes JSON and Markdown, replacing earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(found, indent=1) + "\n")
    (folder / MARKDOWN_NAME).write_text(to_markdown(found))
    return [folder / JSON_NAME, folder / MARKDOWN_NAME]
