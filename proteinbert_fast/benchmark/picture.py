"""The report as a picture: bars with p20 to p80 whiskers, and memory against length. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.groups import memory
from proteinbert_fast.benchmark.report import Report, percent, times
from proteinbert_fast.benchmark.timing import Row, percentiles
from proteinbert_fast.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _OTHERS, _PROBES = "#1b6ca8", "#b9bec5", "#e8c36a"
_SHORT_DTYPE = {"float32": "float32", "bfloat16": "bf16"}


def figure_type() -> "type[Figure]":
    """Matplotlib's figure.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "a picture needs matplotlib: pip install 'proteinbert-fast[plots]' (tables are written without it)"
        ) from error
    return Figure


def draw(report: Report, path: Path) -> None:
    """Draws a panel per table and one for memory.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure_class = figure_type()
    panels = [(group, table, rows) for group, all_rows in report.groups for table, rows in _tables(all_rows)]
    bars = [(group, table, rows) for group, table, rows in panels if group.name != "memory"]
    lines = [rows for group, rows in report.groups if group.name == "memory" and any(row.bytes for row in rows)]
    heights = [0.9 + 0.3 * len(rows) for _, _, rows in bars] + [4.2] * len(lines)
    if not heights:
        raise InputError("nothing was measured: there is nothing to draw")
    figure = figure_class(figsize=(10, sum(heights) + 1.0), layout="constrained")
    axes: list[Axes] = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    e = report.environment
    figure.suptitle(
        f"proteinbert_fast {e['proteinbert_fast']} ({e['commit'] or 'installed'}) on {e['cpu']}, "
        f"{e['threads']} threads, torch {e['torch']}, {e['date'][:10]}\n{report.proteins['proteins']} proteins, "
        f"{report.proteins['mean_length']:.0f} residues on average; p50 of {report.settings.rounds} rounds, "
        "whiskers p20 to p80" + ("; QUICK RUN" if report.settings.is_quick else ""),
        fontsize=10,
    )
    for ax, (group, table, rows) in zip(axes, bars, strict=False):
        _bars(ax, f"{group.name}: {table}", rows)
    for ax, rows in zip(axes[len(bars) :], lines, strict=True):
        _memory(ax, rows)
    figure.savefig(path, dpi=110)


def _tables(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Measured rows by table; the machine's own rates are drawn only through the fractions."""
    tables = dict.fromkeys(row.case.table for row in rows if row.seconds and row.case.table != machine.TABLE)
    return [(table, [row for row in rows if row.seconds and row.case.table == table]) for table in tables]


def _bars(ax: "Axes", title: str, rows: Sequence[Row]) -> None:
    unit = rows[0].case.unit
    scale, prefix = (1e3, "thousand ") if unit in {"tokens/s", "residues/s"} else (1.0, "")
    longest = max(percentiles(row.rates)["p80"] for row in rows) / scale
    places = [k + 0.4 * len({r.case.dtype for r in rows[: k + 1]}) for k in range(len(rows))]  # dtypes apart
    for y, row in zip(places, rows, strict=True):
        p = {name: value / scale for name, value in percentiles(row.rates).items()}
        error: Any = [[p["p50"] - p["p20"]], [p["p80"] - p["p50"]]]
        ax.barh(y, p["p50"], xerr=error, color=_OURS if row.case.ours else _OTHERS, capsize=3, height=0.72)
        ax.text(p["p80"] + 0.012 * longest, y, _text(row, p["p50"]), va="center", fontsize=8)
    ax.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.75 * longest)
    ax.set_xlabel(f"{prefix}{unit}", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.set_title(title, loc="left", fontsize=10, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)


def _label(row: Row) -> str:
    dtype = row.case.dtype
    return f"{row.case.name}, {_SHORT_DTYPE[dtype]}" if dtype else row.case.name


def _text(row: Row, rate: float) -> str:
    parts = [f"{rate:.3g}"]
    if row.of_matrix_rate:
        parts.append(f"{percent(percentiles(row.of_matrix_rate)['p50'])} of matrix rate")
    elif row.of_copy_rate:
        parts.append(f"{percent(percentiles(row.of_copy_rate)['p50'])} of copy rate")
    if row.case.table == "one protein":
        parts.append(f"{1e3 * percentiles(row.seconds)['p50']:.1f} ms")
    if row.ours_over_this:
        parts.append(f"ours is {times(percentiles(row.ours_over_this)['p50'])} as fast")
    return "  |  ".join(parts)


def _memory(ax: "Axes", rows: Sequence[Row]) -> None:
    colors = {"ours": (_OURS, "#63a8d8"), "script": ("#888d94", _OTHERS)}
    used: dict[str, int] = {}
    longest = max(row.case.work.residues for row in rows if row.bytes)
    for line in memory.fit(rows):
        name = line["table"].partition(",")[0]
        color = colors[name][min(used.get(name, 0), 1)]
        used[name] = used.get(name, 0) + 1
        points = [row for row in rows if row.case.table == line["table"] and row.bytes]
        x = [row.case.work.residues for row in points]
        y = [(row.bytes["peak"] - row.bytes["baseline"]) / 1e9 for row in points]
        end = max(x)
        fitted = [(line["bytes_at_0"] + line["bytes_per_residue"] * n) / 1e9 for n in (0, end)]
        label = f"{line['table']}: {line['bytes_per_residue']:,.0f} B per residue"
        ax.plot([0, end], fitted, color=color, linewidth=1.2)
        ax.plot(x, y, "o", color=color, label=f"{label} (line: fit)")
    ax.plot(
        [0, longest],
        [0, memory.LIMIT * longest / 1e9],
        "--",
        color=_PROBES,
        label=f"limit: {memory.LIMIT:,} B per residue",
    )
    ax.set_xlim(0)
    ax.set_ylim(0)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1e3:,.0f} k")
    ax.set_xlabel("residues of one protein", fontsize=8)
    ax.set_ylabel("GB above a process that has\nembedded a short protein", fontsize=8)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, frameon=False)
    ax.set_title("memory: peak resident, float32", loc="left", fontsize=10, fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
