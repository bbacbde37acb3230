"""What a GPU report writes: everything as JSON, tables to read as Markdown, and a picture."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from proteinbert_fast.benchmark.cases import flops_per_token
from proteinbert_fast.benchmark.gpu.bench import GRADIENTS, KERNELS
from proteinbert_fast.benchmark.gpu.sections import profile, title
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.benchmark.report import JSON_NAME, MARKDOWN_NAME, markdown, percent, short, three, times
from proteinbert_fast.benchmark.timing import Row, Target, percentiles

TRIAL = "Trial run in Triton's interpreter or in tiny sizes: not numbers worth keeping."


@dataclass
class GpuReport:
    """What a run has found so far.

    Attributes:
        settings: of the run.
        environment: of the machine.
        obstacle: why nothing could be measured; None where it could.
        sections: rows by section, as far as the run has come.
        seconds: that each section took.
    """

    settings: GpuSettings
    environment: dict[str, Any]
    obstacle: str | None
    sections: dict[str, Sequence[Row]]
    seconds: dict[str, float]

    @property
    def rows(self) -> list[Row]:
        """Of all sections."""
        return [row for rows in self.sections.values() for row in rows]

    @property
    def wrong(self) -> list[Row]:
        """Rows whose check failed."""
        return [row for row in self.rows if row.status == "wrong"]

    @property
    def targets(self) -> list[tuple[Row, Target]]:
        """What the project aims at, with the row that it was measured in."""
        return [(row, target) for row in self.rows for target in row.targets]

    def summary(self) -> list[str]:
        """The targets, a line each, for the end of a log."""
        lines = []
        for _, target in self.targets:
            value = "not measured" if target.value is None else f"{_number(target.value)} {target.unit}"
            bound = f"{'at least' if target.at_least else 'at most'} {_number(target.wanted)}"
            reached = {True: ": reached", False: ": not reached", None: ""}[target.reached]
            lines.append(f"{target.what}: {value}, wanted {bound}{reached}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values. Every row stands for itself: it carries the machine and the versions."""
        return {
            "environment": self.environment,
            "settings": self.settings.to_dict(),
            "not_measured_because": self.obstacle,
            "seconds": self.seconds,
            "sections": [
                {"name": name, "title": title(name), "rows": [self._row(name, row) for row in rows]}
                for name, rows in self.sections.items()
            ],
        }

    def _row(self, section: str, row: Row) -> dict[str, Any]:
        case = row.case
        values: dict[str, Any] = {
            "section": section,
            "table": case.table,
            "case": case.name,
            "what": case.what,
            "owner": case.owner,
            "ours": case.ours,
            "dtype": case.dtype,
            "status": row.status,
            "check": row.check,
            "note": row.note,
            "work": asdict(case.work),
            "values": row.values,
            "targets": [asdict(target) | {"reached": target.reached} for target in row.targets],
            "is_trial": self.settings.is_trial,
        }
        for name, numbers, unit in (
            ("seconds", row.seconds, "s"),
            ("rate", row.rates if case.work.amount(case.unit) else [], case.unit),
            ("of_matrix_rate", row.of_matrix_rate, "1"),
            ("ours_over_this", row.ours_over_this, "1"),
        ):
            if numbers:
                values[name] = {"unit": unit, **percentiles(numbers), "rounds": numbers}
        return values | self.environment

    def to_markdown(self) -> str:
        """Tables to read."""
        e = self.environment
        what = f"commit {e['commit']}" if e["commit"] else f"release {e['proteinbert_fast']}"
        device = e["gpu"] or f"{e['cpu']}, no GPU"
        lines = [f"# proteinbert_fast on {device}", ""]
        if self.settings.is_trial:
            lines += [f"**{TRIAL}**", ""]
        if self.obstacle:
            lines += [f"**Nothing was measured: {self.obstacle}.** All is ready to run.", ""]
        lines += [
            f"{e['date']}, proteinbert_fast {e['proteinbert_fast']} ({what}); torch {e['torch']}, CUDA {e['cuda']}, "
            f"triton {e['triton']}, Python {e['python']}. {_device(e)}Took "
            f"{', '.join(f'{name} {seconds:.0f} s' for name, seconds in self.seconds.items())}.",
            "",
            "p20 / p50 / p80. Times are the device's own (events), of work launched without pause, but for latencies, "
            "which are the host's. Inputs of big batches are larger than the L2 cache, which is not flushed; single "
            f"small proteins find it warm. Work is {flops_per_token(self.settings.config) / 1e6:.2f} MFLOP per token, "
            "padding and gaps never counted. Random weights.",
            "",
            "## Targets",
            "",
            *_targets(self.targets),
        ]
        for name, rows in self.sections.items():
            lines += ["", f"## {title(name)}"]
            for table in dict.fromkeys(row.case.table for row in rows):
                members = [row for row in rows if row.case.table == table]
                lines += ["", f"### {table[0].upper()}{table[1:]}", "", *_TABLES.get(table, _table)(members)]
        return "\n".join(lines) + "\n"


def _device(e: dict[str, Any]) -> str:
    if not e["gpu"]:
        return ""
    state = ", ".join(f"{name} {value}" for name, value in e.get("gpu_state", {}).items())
    after = e.get("gpu_state_after_products", {}).get("clocks.sm")
    return (
        f"{e['multiprocessors']} multiprocessors, {e['gpu_memory_bytes'] / 2**30:.0f} GiB; {state}"
        + (f"; after large products clocks.sm {after}" if after else "")
        + f". Kernels: {e['tuned']}. "
    )


def _targets(targets: Sequence[tuple[Row, Target]]) -> list[str]:
    body = []
    for row, target in targets:
        bound = f"{'at least' if target.at_least else 'at most'} {_number(target.wanted)} {target.unit}"
        value = f"{_number(target.value)} {target.unit}" if target.value is not None else "not measured"
        reached = {True: "reached", False: "**not reached**", None: _reason(row)}[target.reached]
        body.append([target.what, bound, value, reached, ", ".join(filter(None, (row.case.name, row.case.dtype)))])
    return markdown(["target", "wanted", "measured", "", "in"], body)


def _number(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:,.4g} M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _reason(row: Row) -> str:
    return "**WRONG: no time**" if row.status == "wrong" else f"not measured: {row.note}" if not row.seconds else ""


def _table(rows: Sequence[Row]) -> list[str]:
    if not any(row.seconds or row.targets for row in rows) and all(
        not row.case.work.amount(row.case.unit) for row in rows
    ):
        return markdown(
            ["check", "dtype", "", "found"],
            [[row.case.name, row.case.dtype or "", _verdict(row), row.check or row.note] for row in rows],
        )
    body = []
    for row in rows:
        case, ours = row.case, row.case.ours
        time = _time(row) if row.seconds else _reason(row)
        rate = f"{_number(percentiles(row.rates)['p50'])} {case.unit}" if row.seconds else ""
        fraction = percent(percentiles(row.of_matrix_rate)["p50"]) if row.of_matrix_rate else ""
        over = times(percentiles(row.ours_over_this)["p50"]) if row.ours_over_this else ""
        others = "; ".join(part for part in (case.owner, case.what, row.note if row.seconds else "") if part)
        body.append([f"**{case.name}**" if ours else case.name, case.dtype or "", time, rate, fraction, over,
                     _values(row), row.check or ("" if not row.seconds else "none"), others])  # fmt: skip
    header = ["case", "dtype", "ms", "rate", "of matrix rate", "ours / this", "", "check", "what"]
    return markdown(header, body)


def _verdict(row: Row) -> str:
    return {"measured": "right", "wrong": "**WRONG**", "unavailable": "not measured"}[row.status]


def _time(row: Row) -> str:
    return three(row.seconds, 1e3)


def _values(row: Row) -> str:
    known: dict[str, Callable[[Any], str]] = {
        "residues_per_second": lambda v: f"{_number(v)} residues/s",
        "predicted_residues_per_second": lambda v: f"predicted {_number(v)}",
        "predicted_bounds": lambda v: "bound by " + ", ".join(f"{name} {percent(part)}" for name, part in v.items()),
        "ns_per_residue": lambda v: f"{v:.3g} ns per residue",
        "bytes_per_residue": lambda v: f"{v:,.0f} B per residue beyond the weights",
        "compile_seconds": lambda v: f"compiled in {v:.0f} s",
    }
    return "; ".join(show(row.values[name]) for name, show in known.items() if name in row.values)


def _kernel_table(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        name, v = row.case.name, row.values
        if not row.seconds:
            body.append([name, row.case.dtype or "", _reason(row), *[""] * 8, row.check or "", ""])
            continue
        body.append(
            [
                name,
                row.case.dtype or "",
                _time(row),
                short(v["ns_per_token"]),
                f"{_number(v['flops_per_token'])} FLOP, {_number(v['hbm_bytes_per_token'])} B HBM, "
                f"{_number(v['l2_bytes_per_token'])} B L2",
                percent(v["of_matrix_peak"]),
                percent(v["of_hbm_peak"]),
                percent(v["of_l2_peak"]),
                percent(v["of_instruction_peak"]),
                str(v["bound_by"]),
                f"{short(v['predicted_ns_per_token'])} to {short(v['predicted_serial_ns_per_token'])} "
                f"({times(v['measured_over_predicted'])})",
                row.check or "none",
                "; ".join(part for part in (row.case.what, row.note, f"peaks {v['peaks']}") if part),
            ]
        )
    header = ["kernel", "dtype", "ms", "ns per token", "per token", "of matrix peak", "of HBM", "of L2",
              "of instructions", "bound by", "predicted ns per token (measured / least)", "check", "what"]  # fmt: skip
    return markdown(header, body)


def _profile_table(rows: Sequence[Row]) -> list[str]:
    body = [
        [row.case.name, row.case.dtype or "", f"{1e3 * row.seconds[0]:.3g}", f"{row.values['launches']}",
         percent(row.values["share"]), short(row.values["ns_per_token"])]
        if row.seconds else [row.case.name, row.case.dtype or "", _reason(row), "", "", ""]
        for row in rows
    ]  # fmt: skip
    return markdown(["kernel", "dtype", "ms", "launches", "share", "ns per token"], body)


_TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    KERNELS: _kernel_table, GRADIENTS: _kernel_table, profile.TABLE: _profile_table, profile.TRAINING: _profile_table,
}  # fmt: skip


def write(report: GpuReport, folder: Path) -> list[Path]:
    """Writes JSON and Markdown, replacing earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    (folder / MARKDOWN_NAME).write_text(report.to_markdown())
    return [folder / JSON_NAME, folder / MARKDOWN_NAME]
