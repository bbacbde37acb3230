"""The report of all instruction sets: everything as JSON, tables to read as Markdown, a picture."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.sets.holding import InstructionSet
from benchmarks.sets.keras_peer import NAME as KERAS
from benchmarks.sets.summary import OURS, Numbers, lines, targets
from proteinbert_fast.benchmark import report as reports
from proteinbert_fast.benchmark.groups import forward
from proteinbert_fast.benchmark.picture import figure_type
from proteinbert_fast.benchmark.report import JSON_NAME, MARKDOWN_NAME, PICTURE_NAME, markdown
from proteinbert_fast.benchmark.timing import Target

SUFFIX = "-instruction-sets"


@dataclass
class SetsReport:
    """What a run has found so far.

    Attributes:
        environment: of the machine; see `machine.environment`.
        size: "full", or another, whose numbers are not worth keeping.
        sets: those that were asked for, by name.
        variables: that hold each set's process, by its name.
        found: of each set that was measured, its report as `Report.to_dict` gives it, and "markdown".
        failed: why a set was not measured, by its name.
        seconds: the run took.
    """

    environment: Mapping[str, Any]
    size: str
    sets: Mapping[str, InstructionSet]
    variables: Mapping[str, Mapping[str, str]]
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def numbers(self) -> dict[str, Numbers]:
        """Of each set that was measured, in the sets' order."""
        return {name: Numbers(self.found[name]) for name in self.sets if name in self.found}

    @property
    def wrong(self) -> list[str]:
        """Cases whose check failed."""
        return [
            f"{name}: {row['table']} / {row['case']} / {row['dtype']}: {row['check']}"
            for name, n in self.numbers.items()
            for row in n.rows
            if row["status"] == "wrong"
        ]

    def targets(self) -> dict[str, list[Target]]:
        """Of each set that was measured."""
        numbers = self.numbers
        return {name: targets(name, numbers, self.sets[name].has_bfloat16) for name in numbers}

    def summary(self) -> dict[str, dict[str, str]]:
        """The columns of the summary, by set."""
        return {name: lines(n, self.sets[name].has_bfloat16) for name, n in self.numbers.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "environment": dict(self.environment),
            "size": self.size,
            "seconds": self.seconds,
            "variables": {name: dict(variables) for name, variables in self.variables.items()},
            "failed": self.failed,
            "summary": self.summary(),
            "targets": {
                name: [asdict(target) | {"reached": target.reached} for target in found]
                for name, found in self.targets().items()
            },
            "sets": {
                name: {key: value for key, value in found.items() if key != "markdown"}
                for name, found in self.found.items()
            },
        }

    def to_markdown(self) -> str:
        """Tables to read."""
        e = self.environment
        what = f"commit {e['commit']}" if e["commit"] else f"release {e['proteinbert_fast']}"
        is_full = self.size == "full"
        text = [
            f"# proteinbert_fast by instruction set on {e['cpu']}, {e['cores']} cores",
            "",
            *([] if is_full else ["**Quick run: sizes too small for numbers worth keeping.**", ""]),
            f"{e['date']}, proteinbert_fast {e['proteinbert_fast']} ({what}); {e['threads']} threads, "
            f"{e['memory_bytes'] / 2**30:.0f} GiB; torch {e['torch']}, numpy {e['numpy']}, Python {e['python']}. "
            f"Took {self.seconds / 60:.1f} minutes.",
            "",
            "Each set in a process of its own, in which our kernels, PyTorch's, oneDNN's and MKL's are held to it. "
            "Ratios are formed within rounds, p50. The measured GEMM peak is that of the fastest product that "
            "verifiably stays within the set; with it stand its kernel and the instructions that it executed.",
            "",
            "## Summary",
            "",
            *self._summary(),
            "",
            "## Targets",
            "",
            *self._targets(),
        ]
        for name in self.numbers:
            _, *rest = self.found[name]["markdown"].splitlines()
            text += ["", f"## With {name}", "", "Held by " + _variables(self.variables[name]) + ".", ""]
            text += [f"#{line}" if line.startswith("#") else line for line in rest[1:]]
        return "\n".join(text) + "\n"

    def _summary(self) -> list[str]:
        columns = self.summary()
        body = [["held by", *(_variables(self.variables[name]) for name in columns)]]
        for what in next(iter(columns.values()), {}):
            body.append([what, *(column[what] for column in columns.values())])
        table = markdown(["", *columns], body) if columns else []
        return table + [f"\n**{name} was not measured: {why}.**" for name, why in self.failed.items()]

    def _targets(self) -> list[str]:
        body = []
        for name, found in self.targets().items():
            for target in found:
                value = "not measured" if target.value is None else f"{target.value:.2f}x"
                reached = {True: "reached", False: "**not reached**", None: ""}[target.reached]
                body.append([name, target.what, f"at least {target.wanted:g}x", value, reached])
        return markdown(["set", "target", "wanted", "measured", ""], body)


def _variables(variables: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in variables.items())


def default_folder(environment: Mapping[str, Any]) -> Path:
    """Where results go unless said otherwise."""
    folder = reports.default_folder(dict(environment))
    return folder.with_name(folder.name + SUFFIX)


def write(report: SetsReport, folder: Path) -> list[Path]:
    """Writes JSON and Markdown, replacing earlier ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    (folder / MARKDOWN_NAME).write_text(report.to_markdown())
    return [folder / JSON_NAME, folder / MARKDOWN_NAME]


def draw(report: SetsReport, folder: Path) -> Path:
    """Draws the rates on the batch of real lengths, a group of bars for each set.

    Raises:
        InputError: matplotlib is not installed.
    """
    figure = figure_type()(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    numbers = report.numbers
    names = [("ours, float32", OURS, "float32", "#1b6ca8"), ("ours, bfloat16", OURS, "bfloat16", "#63a8d8")]
    padded = ["padded eager", "padded eager, channels last", "padded compiled"]
    bars = [(label, {s: n.rate(forward.MANY, case, dtype) for s, n in numbers.items()}, color)
            for label, case, dtype, color in names]  # fmt: skip
    for dtype, color in (("float32", "#888d94"), ("bfloat16", "#b9bec5")):
        rates = {s: [n.rate(forward.MANY, case, dtype) or 0.0 for case in padded] for s, n in numbers.items()}
        bars.append((f"best padded, {dtype}", {s: max(of) for s, of in rates.items()}, color))
    keras = {s: n.rate(forward.MANY, KERAS, "float32") for s, n in numbers.items()}
    if any(keras.values()):
        bars.append(("original Keras model, float32", keras, "#e8c36a"))
    width = 0.8 / len(bars)
    for k, (label, rates, color) in enumerate(bars):
        places = [i + (k - (len(bars) - 1) / 2) * width for i in range(len(numbers))]
        heights = [(rates[s] or 0.0) / 1e3 for s in numbers]
        drawn = axes.bar(places, heights, width * 0.94, label=label, color=color)
        axes.bar_label(drawn, [f"{h:.3g}" if h else "" for h in heights], fontsize=7)
    e = report.environment
    axes.set_xticks(range(len(numbers)), list(numbers))
    axes.set_ylabel("thousand tokens/s")
    axes.set_title(
        f"Forward pass by instruction set, proteinbert_fast {e['proteinbert_fast']} ({e['commit'] or 'installed'}) on "
        f"{e['cpu']}, {e['threads']} threads, {e['date'][:10]}" + ("" if report.size == "full" else "; QUICK RUN"),
        fontsize=9,
    )
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / PICTURE_NAME
    figure.savefig(path, dpi=110)
    return path
