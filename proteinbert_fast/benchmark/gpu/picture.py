"""A GPU report as a picture: rates beside each other, time per residue by length, kernels beside predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from proteinbert_fast.benchmark.gpu.bench import GRADIENTS, KERNELS
from proteinbert_fast.benchmark.gpu.report import TRIAL, GpuReport
from proteinbert_fast.benchmark.gpu.sections import compiled, forward, long
from proteinbert_fast.benchmark.picture import figure_type
from proteinbert_fast.benchmark.timing import Row, percentiles
from proteinbert_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _OTHERS, _PREDICTED = "#1b6ca8", "#b9bec5", "#e8c36a"


def draw(report: GpuReport, path: Path) -> None:
    """Draws a panel for each kind of row that was measured.

    Raises:
        InputError: matplotlib is not installed, or nothing was measured.
    """
    figure_class = figure_type()
    rows = [row for row in report.rows if row.seconds and row.case.probe is None]
    rates = [row for row in rows if row.case.table in {forward.TABLE, compiled.TABLE}]
    lengths = [row for row in rows if row.case.table in {long.ONE, long.MANY, long.LARGEST}]
    kernels = [row for row in rows if row.case.table in {KERNELS, GRADIENTS}]
    panels = [
        (panel, members) for panel, members in ((_rates, rates), (_lengths, lengths), (_kernels, kernels)) if members
    ]
    if not panels:
        raise InputError("nothing was measured: there is nothing to draw")
    heights = [4.0 if panel is _lengths else 1.0 + 0.3 * len(members) for panel, members in panels]
    figure = figure_class(figsize=(10, sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)[:, 0]
    e = report.environment
    figure.suptitle(
        f"proteinbert_fast {e['proteinbert_fast']} ({e['commit'] or 'installed'}) on {e['gpu'] or e['cpu']}, "
        f"torch {e['torch']}, triton {e['triton']}, {e['date'][:10]}"
        + (f"\n{TRIAL}" if report.settings.is_trial else ""),
        fontsize=10,
    )
    for ax, (panel, members) in zip(axes, panels, strict=True):
        panel(ax, members)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _label(row: Row) -> str:
    name = f"{row.case.name}, gradient" if row.case.table == GRADIENTS else row.case.name
    return ", ".join(filter(None, (name, row.case.dtype)))


def _rates(ax: "Axes", rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        p = percentiles([rate / 1e6 for rate in row.rates])
        color = _OURS if row.case.ours else _OTHERS
        ax.barh(y, p["p50"], xerr=[[p["p50"] - p["p20"]], [p["p80"] - p["p50"]]], color=color, capsize=3)
        ax.text(p["p80"], y, f" {p['p50']:.3g}", va="center", fontsize=8)
    ax.set_yticks(range(len(rows)), [_label(row) for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("million tokens/s, p20 to p80", fontsize=8)
    ax.set_title("forward pass over real proteins", loc="left", fontsize=10, fontweight="bold")


def _lengths(ax: "Axes", rows: Sequence[Row]) -> None:
    for table, color in ((long.ONE, _OURS), (long.MANY, _OTHERS), (long.LARGEST, _PREDICTED)):
        members = [row for row in rows if row.case.table == table]
        if members:
            x = [row.case.work.residues / row.case.work.proteins for row in members]
            ax.plot(x, [row.values["ns_per_residue"] for row in members], "o-", color=color, label=table)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("residues of a protein", fontsize=8)
    ax.set_ylabel("ns per residue", fontsize=8)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title("time per residue", loc="left", fontsize=10, fontweight="bold")


def _kernels(ax: "Axes", rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        ax.barh(y - 0.2, row.values["ns_per_token"], 0.4, color=_OURS)
        ax.barh(y + 0.2, row.values["predicted_ns_per_token"], 0.4, color=_PREDICTED)
    ax.set_yticks(range(len(rows)), [_label(row) for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("ns per token, measured and least by the cost model (yellow)", fontsize=8)
    ax.set_title(KERNELS, loc="left", fontsize=10, fontweight="bold")
