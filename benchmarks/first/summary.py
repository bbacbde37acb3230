"""The table that a run prints last, from its lines. Standard library only."""

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
_WIDTH = 110  # characters of what was found


def summary(lines: Sequence[Line]) -> str:
    """How each probe ended, what was wrong, and what was timed, as Markdown."""
    machine = next((line["environment"] for line in lines if isinstance(line.get("environment"), dict)), {})
    ends = [line for line in lines if "end" in line]
    told = [line for line in lines if "check" in line]
    wrong = [line for line in lines if line.get("ok") is False and "end" not in line]
    hits, misses = (sum(line.get("compiled", {}).get(name, 0) for line in ends) for name in ("hits", "misses"))
    oks = [line["ok"] for line in ends]
    parts = [
        f"# First minutes on {machine.get('gpu') or 'no GPU'}",
        "",
        _machine(machine, hits, misses),
        "",
        f"{len(ends)} probes: {oks.count(True)} right, {oks.count(False)} wrong or ended, {oks.count(None)} not run.",
        "",
    ]
    if wrong:
        parts += ["## Wrong", ""]
        parts += _rows(["probe", "check", "found"], [[w["probe"], w.get("check", ""), _found(w)] for w in wrong])
    if timed := [line for line in told if isinstance(line.get("seconds"), dict)]:
        parts += ["", "## Times", ""]
        parts += _rows(["probe", "case", "ms p20 / p50 / p80", "rate", "ns per token", "predicted", "check"],
                       [_timed(line) for line in timed])  # fmt: skip
    if checks := [line for line in told if not isinstance(line.get("seconds"), dict)]:
        parts += ["", "## Checks", ""]
        parts += _rows(["probe", "check", "", "found"],
                       [[c["probe"], c["check"], _verdict(c.get("ok")), _found(c)] for c in checks])  # fmt: skip
    parts += ["", "## Probes", ""]
    parts += _rows(["probe", "", "seconds", "end"],
                   [[e["probe"], _verdict(e["ok"]), f"{e.get('seconds', 0):.1f}", e["end"]] for e in ends])  # fmt: skip
    return "\n".join(parts) + "\n"


def _machine(machine: Line, hits: int, misses: int) -> str:
    known = ("date", "commit", "torch", "cuda", "triton", "python")
    words = [f"{name} {machine[name]}" for name in known if machine.get(name)]
    words += [f"{name} {value}" for name, value in (machine.get("gpu_state") or {}).items()]
    words.append(f"kernels compiled {misses}, found in the cache {hits}")
    return ", ".join(words) + "."


def _verdict(ok: Any) -> str:
    return {True: "right", False: "**WRONG**"}.get(ok, "not measured")


def _found(line: Line) -> str:
    words = str(line.get("found") or line.get("note") or "")
    seconds = line.get("check_seconds") or line.get("embed_seconds")
    return f"{words}, {seconds} s" if seconds else words


def _timed(line: Line) -> list[str]:
    times = " / ".join(f"{1e3 * line['seconds'][p]:.4g}" for p in ("p20", "p50", "p80"))
    values = line.get("values") or {}
    rate = f"{line['rate'][0] / 1e6:,.4g} M {line['rate'][1]}" if line.get("rate") else ""
    if values.get("residues_per_second"):
        rate = f"{values['residues_per_second'] / 1e6:,.4g} M residues/s"
    name = " ".join(str(line[key]) for key in ("check", "dtype", "wide_dilation") if line.get(key) is not None)
    ns = values.get("ns_per_token")
    predicted = values.get("predicted_ns_per_token")
    return [line["probe"], name, times, rate, f"{ns:.3g}" if ns else "", f"{predicted:.3g}" if predicted else "",
            str(line.get("found") or "")]  # fmt: skip


def _rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "/").split())[:_WIDTH] for cell in cells) + " |"

    return [row(header), "|" + " --- |" * len(header), *map(row, body)]
