"""The log of a pretraining run as a picture: both losses against what was seen, by length. Needs matplotlib."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from proteinbert_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

By = Literal["records", "residues"]
Floats = npt.NDArray[np.float64]

LOG_FILE = "log.jsonl"
LOSSES = {
    "token_loss": "sequence loss, nats per token",
    "annotation_loss": "GO loss, nats per protein and term",
}
_SMOOTHED = 50  # a point of a training curve is a mean over one part in so many of the rows
_BEGINNING = 20  # part of a run whose losses may lie above the picture
_COLORS = ("#1b6ca8", "#d95f02", "#1b9e77", "#7b4f9d")
_ALL_COLOR = "#5d646b"


@dataclass(frozen=True)
class Curve:
    """A line of the picture.

    Attributes:
        loss: "token_loss" or "annotation_loss".
        length: most tokens of the proteins, such as "512"; "longer"; or "all".
        is_training: of training batches, or of held-out proteins.
        x: float64 (n,): records or residues seen.
        y: float64 (n,): the loss.
    """

    loss: str
    length: str
    is_training: bool
    x: Floats
    y: Floats

    @property
    def label(self) -> str:
        """For the legend."""
        tokens = f"{'windows of' if self.is_training else 'up to'} {self.length} tokens"
        tokens = {"all": "all lengths", "longer": "longer"}.get(self.length, tokens)
        return f"{'training' if self.is_training else 'held out'}, {tokens}"


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a run's log, in their order.

    Args:
        path: a file of JSON lines, or the folder of a run. A last line that is still being written is left out.

    Raises:
        InputError: there is no log, or a line is no row of one; says which.
    """
    file = Path(path)
    if file.is_dir():
        file = file / LOG_FILE
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file: the log of a run is {LOG_FILE} in its folder") from None
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"], **{name: int(row[name]) for name in get_args(By)}})
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}:{number}: is no row of a pretraining log") from None
    return rows


def curves(rows: Iterable[dict[str, Any]], by: By = "records") -> list[Curve]:
    """The lines of a picture.

    Training curves are running means over a fiftieth of the rows: one for each window where a run has several (as in
    the original's episodes), else one for all lengths. Held-out curves are as they were measured, one for each class of
    lengths, or one for all where a row has no classes.

    Args:
        rows: of a log.
        by: what to count on the x axis.
    """
    points: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}

    def add(row: dict[str, Any], found: dict[str, Any], length: str, is_training: bool) -> None:
        for loss in LOSSES:
            if isinstance(found.get(loss), int | float) and math.isfinite(found[loss]):
                points.setdefault((loss, length, is_training), []).append((row[by], found[loss]))

    for row in rows:
        if row["kind"] == "train":
            add(row, row, str(row.get("window") or "all"), True)
        elif row["kind"] == "validation":
            for length, found in (row.get("classes") or {"all": row}).items():
                add(row, found, length, False)
    made = []
    for (loss, length, is_training), pairs in sorted(points.items(), key=lambda item: _order(*item[0])):
        x, y = np.array(pairs, dtype=np.float64).T
        made.append(Curve(loss, length, is_training, x, smoothed(y, len(y) // _SMOOTHED) if is_training else y))
    return made


def smoothed(y: Floats, reach: int) -> Floats:
    """Means of each value and of up to ``reach`` on each side of it: fewer near the ends, as many on either side."""
    places = np.arange(len(y))
    near = np.minimum(reach, np.minimum(places, len(y) - 1 - places))
    total = np.concatenate([[0.0], np.cumsum(y)])
    means: Floats = (total[places + near + 1] - total[places - near]) / (2 * near + 1)
    return means


def _order(loss: str, length: str, is_training: bool) -> tuple[Any, ...]:
    rank = {"all": -1.0, "longer": np.inf}
    return list(LOSSES).index(loss), not is_training, rank[length] if length in rank else float(length)


def draw(rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], by: By = "records", title: str = "") -> None:
    """Draws a panel for each loss, as in figure 2 of the paper.

    Args:
        rows: of a log.
        path: of the picture; its suffix says the format.
        by: what to count on the x axis.
        title: above it.

    Raises:
        InputError: matplotlib is not installed or does not know the format, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise InputError("a picture needs matplotlib: pip install 'proteinbert-fast[plots]'") from error
    lines = curves(rows, by)
    panels = [loss for loss in LOSSES if any(curve.loss == loss for curve in lines)]
    if not panels:
        raise InputError("the log has no losses yet: there is nothing to draw")
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes: list[Axes] = list(figure.subplots(1, len(panels), squeeze=False)[0])
    for ax, loss in zip(axes, panels, strict=True):
        for curve in lines:
            if curve.loss == loss:
                _line(ax, curve, lines)
        if loss == "annotation_loss" and all((curve.y > 0).all() for curve in lines if curve.loss == loss):
            ax.set_yscale("log")
        else:
            ax.set_ylim(*_limits([curve for curve in lines if curve.loss == loss]))
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
        ax.set_xlabel(f"{by} seen", fontsize=9)
        ax.set_ylabel(LOSSES[loss], fontsize=9)
        ax.tick_params(which="both", labelsize=8)
        ax.grid(color="#e6e8ea", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.legend(fontsize=8, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise InputError(f"{os.fspath(path)}: {' '.join(str(error).split())}") from error


def _limits(lines: Sequence[Curve]) -> tuple[float, float]:
    """Of the y axis: all that comes after a twentieth of the run. The first drop is steep and would dwarf the rest."""
    begin = max(curve.x[-1] for curve in lines) / _BEGINNING
    shown = np.concatenate([curve.y[curve.x >= begin] for curve in lines])
    margin = 0.08 * (shown.max() - shown.min()) or 0.1
    return float(shown.min() - margin), float(shown.max() + margin)


def _line(ax: "Axes", curve: Curve, lines: Sequence[Curve]) -> None:
    """The same colour for the same length; training thin, held-out proteins thick, with their points."""
    lengths = list(dict.fromkeys(other.length for other in lines if other.length != "all"))
    lengths.sort(key=lambda length: _order(curve.loss, length, False))
    color = _ALL_COLOR if curve.length == "all" else _COLORS[lengths.index(curve.length) % len(_COLORS)]
    style: dict[str, Any] = {"linewidth": 0.9, "alpha": 0.8} if curve.is_training else {"linewidth": 1.8, "marker": "."}
    ax.plot(curve.x, curve.y, color=color, label=curve.label, **style)
