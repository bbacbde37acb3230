"""The table that a run prints last, from its lines. Standard library only."""

from collections.abc import Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]
_WIDTH = 200  # characters of a cell


def summary(lines: Sequence[Line]) -> str:
    """How each probe ended, what was wrong, and what was timed, as Markdown."""
    machine: Line = next((line["environment"] for line in lines if isinstance(line.get("environment"), dict)), {})
    ends = [line for line in lines if "end" in line]
    wrong = [line for line in lines if line.get("ok") is False and "end" not in line]
    hits, misses = (sum(line.get("compiled", {}).get(name, 0) for line in ends) for name in ("hits", "misses"))
    oks = [line["ok"] for line in ends]
    parts = [
        f"# First minutes on {machine.get('gpu') or 'no GPU'}",
        "",
        _machine(machine, hits, misses),
        "",
        f"{len(ends)} probes: {oks.count(True)} right, {oks.count(False)} wrong or ended, "
        f"{oks.count(None)} not measured.",
        "",
    ]
    told: dict[str, list[Line]] = {}
    for line in lines:
        if ("check" in line or line.get("note")) and not isinstance(line.get("seconds"), dict):
            told.setdefault(line["probe"], []).append(line)
    parts += _rows(["probe", "", "seconds", "end", "found"],
                   [[e["probe"], _verdict(e["ok"]), f"{e.get('seconds', 0):.1f}", e["end"],
                     "; ".join(map(_told, told.get(e["probe"], [])))] for e in ends])  # fmt: skip
    if timed := [line for line in lines if "check" in line and isinstance(line.get("seconds"), dict)]:
        parts += ["", "## Times", ""]
        parts += _rows(["probe", "case", "ms p20 / p50 / p80", "rate", "ns per token", "predicted", "check"],
                       [_timed(line) for line in timed])  # fmt: skip
    # Last: what a terminal shows of a long output.
    if wrong:
        parts += ["", "## Wrong", ""]
        parts += _rows(["probe", "check", "found"], [[w["probe"], w.get("check", ""), _found(w)] for w in wrong])
    return "\n".join(parts) + "\n"


def _machine(machine: Line, hits: int, misses: int) -> str:
    known = ("date", "commit", "torch", "cuda", "triton", "python")
    words = [f"{name} {machine[name]}" for name in known if machine.get(name)]
    words += [f"{name} {value}" for name, value in (machine.get("gpu_state") or {}).items()]
    words.append(f"kernels compiled {misses}, found in the cache {hits}")
    return ", ".join(words) + "."


def _verdict(ok: Any) -> str:
    return "right" if ok is True else "**WRONG**" if ok is False else "not measured"


def _found(line: Line) -> str:
    words = str(line.get("found") or line.get("note") or line.get("local_block") or "")
    seconds = line.get("check_seconds") or line.get("embed_seconds")
    return f"{words}, {seconds} s" if seconds else words


def _told(line: Line) -> str:
    """A check in few words: the whole is in the lines."""
    if "check" not in line:
        return str(line["note"])
    kernel = str(line.get("implementation") or "").partition(" ")[0]
    verdict = _verdict(line.get("ok")).strip("*")
    errors = [error for error in (line.get("errors") or {}).values() if isinstance(error, float)]
    how = f"{max(errors):.1e}" if errors and line.get("ok") else _found(line)
    how = "" if how == verdict else how
    return " ".join(filter(None, (f"{line['check']}: {verdict}", kernel and f"({kernel})", how)))


def _timed(line: Line) -> list[str]:
    times = " / ".join(f"{1e3 * line['seconds'][p]:.4g}" for p in ("p20", "p50", "p80"))
    values = line.get("values") or {}
    rate = f"{line['rate'][0] / 1e6:,.4g} M {line['rate'][1]}" if line.get("rate") else ""
    if values.get("residues_per_second"):
        rate = f"{values['residues_per_second'] / 1e6:,.4g} M residues/s"
    named = ("check", "dtype", "wide_dilation", "configuration")
    name = " ".join(str(line[key]) for key in named if line.get(key) is not None)
    ns = values.get("ns_per_token")
    predicted = values.get("predicted_ns_per_token")
    return [line["probe"], name, times, rate, f"{ns:.3g}" if ns else "", f"{predicted:.3g}" if predicted else "",
            str(line.get("found") or "")]  # fmt: skip


def _rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(cell).replace("|", "/").split())[:_WIDTH] for cell in cells) + " |"

    return [row(header), "|" + " --- |" * len(header), *map(row, body)]
