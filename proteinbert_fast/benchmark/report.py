"""Reports: everything as JSON, a table to read as Markdown."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.groups import memory
from proteinbert_fast.benchmark.registry import Group
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.benchmark.timing import Row, best_probe, percentiles
from proteinbert_fast.ops.instruction_sets import Rates

JSON_NAME, MARKDOWN_NAME, PICTURE_NAME = "results.json", "results.md", "results.png"


@dataclass(frozen=True)
class Report:
    """What a run has found.

    Attributes:
        settings: of the run.
        environment: of the machine; see `machine.environment`.
        proteins: of the sample: where from, how many, residues.
        groups: each with its rows.
        seconds: the run took.
    """

    settings: Settings
    environment: dict[str, Any]
    proteins: dict[str, Any]
    groups: list[tuple[Group, list[Row]]]
    seconds: float

    @property
    def wrong(self) -> list[Row]:
        """Rows whose check failed."""
        return [row for _, rows in self.groups for row in rows if row.status == "wrong"]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values. Every row stands for itself: it carries the machine and the versions."""
        return {
            "environment": self.environment,
            "settings": self.settings.to_dict(),
            "proteins": self.proteins,
            "seconds": self.seconds,
            "groups": [
                {
                    "name": group.name,
                    "title": group.title,
                    "rows": [self._row(group, row) for row in rows],
                    **({"lines": memory.fit(rows)} if group.name == "memory" else {}),
                }
                for group, rows in self.groups
            ],
        }

    def _instruction_set(self) -> list[str]:
        """Lines on that of the CPU kernels: which it is, its peak, and what their products reach of it."""
        of_dtype = [
            f"{dtype} {Rates(rates['registers_flops'], rates['products_flops'])}"
            for dtype, rates in self.environment["instruction_set_rates"].items()
        ]
        return [f"Instruction set: {self.environment['instruction_set']}. Its peak: {'; '.join(of_dtype)}.", ""]

    def _row(self, group: Group, row: Row) -> dict[str, Any]:
        case = row.case
        values: dict[str, Any] = {
            "group": group.name,
            "table": case.table,
            "case": case.name,
            "what": case.what,
            "owner": case.owner,
            "ours": case.ours,
            "dtype": case.dtype,
            "cores_used": case.cores,
            "status": row.status,
            "check": row.check,
            "note": row.note,
            "work": asdict(case.work),
        }
        for name, numbers, unit in (
            ("seconds", row.seconds, "s"),
            ("rate", row.rates, case.unit),
            ("of_matrix_rate", row.of_matrix_rate, "1"),
            ("of_copy_rate", row.of_copy_rate, "1"),
            ("ours_over_this", row.ours_over_this, "1"),
        ):
            if numbers:
                values[name] = {"unit": unit, **percentiles(numbers), "rounds": numbers}
        if row.bytes:
            values["bytes"] = row.bytes
        return values | self.environment

    def to_markdown(self) -> str:
        """Tables to read."""
        e = self.environment
        what = f"commit {e['commit']}" if e["commit"] else f"release {e['proteinbert_fast']}"
        lines = [
            f"# proteinbert_fast on {e['cpu']}, {e['cores']} cores",
            "",
            *(["**Quick run: sizes too small for numbers worth keeping.**", ""] if self.settings.is_quick else []),
            f"{e['date']}, proteinbert_fast {e['proteinbert_fast']} ({what}); {e['threads']} threads, "
            f"{e['cpu_capability']}, {e['memory_bytes'] / 2**30:.0f} GiB; torch {e['torch']}, numpy {e['numpy']}, "
            f"Python {e['python']}. Took {self.seconds / 60:.1f} minutes.",
            "",
            *self._instruction_set(),
            f"Input: {self.proteins['proteins']} proteins of {self.proteins['source']}, "
            f"{self.proteins['residues']:,} residues, {self.proteins['mean_length']:.0f} on average, "
            f"{self.proteins['shortest']:,} to {self.proteins['longest']:,}. Random weights.",
            "",
            f"p20 / p50 / p80 of {self.settings.rounds} interleaved rounds. Fractions and ratios are formed within "
            'rounds. The matrix and copy rates are the fastest product and copy of "the machine itself", measured in '
            f"the same rounds. Work is {_flops(self.settings)} MFLOP per token of a protein, padding never counted.",
        ]
        for group, rows in self.groups:
            lines += ["", f"## {group.title}"]
            tables = dict.fromkeys(row.case.table for row in rows)
            for table in tables:
                lines += ["", f"### {table[0].upper()}{table[1:]}", ""]
                members = [row for row in rows if row.case.table == table]
                lines += _memory_table(members) if group.name == "memory" else _table(members, rows)
            if group.name == "memory":
                lines += ["", *_fits(rows)]
        return "\n".join(lines) + "\n"


def _flops(settings: Settings) -> str:
    from proteinbert_fast.benchmark.cases import flops_per_token

    return f"{flops_per_token(settings.config) / 1e6:.2f}"


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    return [line(header), line(["---"] * len(header)), *map(line, body)]


def _table(members: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    is_machine = members[0].case.table == machine.TABLE
    body = []
    for row in members:
        case = row.case
        cells = [f"**{case.name}**" if case.ours else case.name, case.dtype or ""]
        if row.seconds:
            cells += [
                f"{three(row.seconds, 1e3)}",
                f"**{_rate(row)}**" if case.ours else _rate(row),
                *([] if is_machine else [_fractions(row.of_matrix_rate), _fractions(row.of_copy_rate),
                                         _ratios(row.ours_over_this)]),
            ]  # fmt: skip
        else:
            cells += [_status(row), "", *([] if is_machine else ["", "", ""])]
        if is_machine:
            cells += [case.owner, _standing(row, rows)]
        else:
            cells += [row.check or "none", "; ".join(part for part in (case.owner, case.what, row.note) if part)]
        body.append(cells)
    if is_machine:
        return markdown(["probe", "dtype", "ms", "rate", "by", ""], body)
    header = ["case", "dtype", "ms", "rate", "of matrix rate", "of copy rate", "ours / this", "check", "what"]
    return markdown(header, body)


def _standing(row: Row, rows: Sequence[Row]) -> str:
    """What a probe is to the machine's rates."""
    probe = row.case.probe
    if probe == "convolution":
        return f"{_fractions(row.of_matrix_rate)} of the product rate" if row.of_matrix_rate else ""
    if not row.seconds or probe is None or best_probe(rows, probe, row.case) is not row:
        return ""
    return f"the machine's {'product' if probe == 'matrix' else 'copy'} rate"


def _memory_table(members: Sequence[Row]) -> list[str]:
    body = []
    for row in members:
        cells = [row.case.name, row.case.dtype or ""]
        if row.bytes:
            cells += [
                f"{row.bytes['peak'] / 1e6:,.0f} MB",
                f"{row.bytes['baseline'] / 1e6:,.0f} MB",
                f"{row.bytes['per_residue']:,.0f} B",
                f"{row.seconds[0]:.1f} s",
                row.check or "none",
            ]
        else:
            cells += [_status(row), "", "", "", row.check or ""]
        body.append(cells)
    header = ["length", "dtype", "peak", "of it after a short protein", "rest per residue", "time", "check"]
    return markdown(header, body)


def _fits(rows: Sequence[Row]) -> list[str]:
    return [
        f"- {line['table']}: {line['bytes_per_residue']:,.0f} B per residue, straight line through all lengths; it "
        f"misses none by more than {line['largest_residual']:.1%} of the highest. "
        + (f"Under {LIMIT_TEXT} at every length." if line["within_limit"] else f"**Over {LIMIT_TEXT}.**")
        for line in memory.fit(rows)
    ]


LIMIT_TEXT = f"{memory.LIMIT:,} B per residue"


def _status(row: Row) -> str:
    return "**WRONG: no time**" if row.status == "wrong" else row.note


def three(values: Sequence[float], factor: float) -> str:
    """For people: p20, p50 and p80 of values times a factor."""
    return " / ".join(short(value * factor) for value in percentiles(values).values())


def short(value: float) -> str:
    """For people: three digits, or whole numbers from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rate(row: Row) -> str:
    return f"{short(percentiles(row.rates)['p50'])} {row.case.unit}"


def _fractions(values: Sequence[float]) -> str:
    return percent(percentiles(values)["p50"]) if values else ""


def _ratios(values: Sequence[float]) -> str:
    if not values:
        return ""
    p = percentiles(values)
    return f"**{times(p['p50'])}** ({times(p['p20'])} to {times(p['p80'])})"


def percent(fraction: float) -> str:
    """For people: "83%", "0.4%"."""
    return f"{fraction:.0%}" if fraction >= 0.095 else f"{100 * fraction:.1g}%"


def times(ratio: float) -> str:
    """For people: "1.53x", "460x"."""
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:,.0f}x"


def default_folder(environment: dict[str, Any]) -> Path:
    """Where results go unless said otherwise: ``benchmarks/results/`` of the checkout, or a new folder here."""
    root = machine.checkout()
    parent = root / "benchmarks" / "results" if root else Path("proteinbert-fast-bench")
    name = environment.get("gpu") or f"{environment['cpu']} {environment['cores']} cores"
    device = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return parent / f"{environment['date'][:10]}-{device}"


def write(report: Report, folder: Path) -> list[Path]:
    """Writes JSON and Markdown, replacing earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    (folder / MARKDOWN_NAME).write_text(report.to_markdown())
    return [folder / JSON_NAME, folder / MARKDOWN_NAME]
