"""The numbers of each instruction set side by side, and what the project aims at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.sets.keras_peer import NAME as KERAS
from benchmarks.sets.plan import FEW, MODEL_ALONE
from benchmarks.sets.watch import BEYOND
from proteinbert_fast.benchmark import competitors, machine
from proteinbert_fast.benchmark.groups import forward, train
from proteinbert_fast.benchmark.report import percent, short, times
from proteinbert_fast.benchmark.timing import Target

OURS, PADDED, SCRIPT = "ours", "padded", "script"
PERS = ("per protein", "per residue")
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Peak:
    """The fastest product that verifiably stays within a set.

    Attributes:
        rate: in GFLOP/s.
        by: the product and how it is known to stay there.
    """

    rate: float
    by: str


class Numbers:
    """What one set's report says; each number is None where nothing was measured.

    Args:
        report: as `Report.to_dict` gives it.
    """

    def __init__(self, report: Values) -> None:
        self.rows: list[Values] = [row for group in report["groups"] for row in group["rows"]]

    def row(self, table: str, name: str, dtype: str | None) -> Values | None:
        """A row that was measured."""
        return next((r for r in self._rows(table, dtype) if r["case"] == name), None)

    def rate(self, table: str, name: str, dtype: str) -> float | None:
        """Work per second, p50."""
        row = self.row(table, name, dtype)
        return row["rate"]["p50"] if row else None

    def peak(self, dtype: str) -> Peak | None:
        """The set's own, of a dtype."""
        rows = self._rows(machine.TABLE, dtype)
        best = max(rows, key=lambda r: r["rate"]["p50"], default=None)
        if best is None:
            return None
        return Peak(best["rate"]["p50"], f"{best['case']}: {best['owner'].partition(': ')[2] or best['owner']}")

    def of_peak(self, dtype: str) -> float | None:
        """Our rate over that peak, in the arithmetic of the plain formula."""
        row = self.row(forward.MANY, OURS, dtype)
        return row["of_matrix_rate"]["p50"] if row and "of_matrix_rate" in row else None

    def over(self, table: str, dtype: str, *names: str) -> float | None:
        """Our rate over that of the fastest whose name begins so."""
        others = [r for r in self._rows(table, dtype) if r["case"].startswith(names) and "ours_over_this" in r]
        best = max(others, key=lambda r: r["rate"]["p50"], default=None)
        return best["ours_over_this"]["p50"] if best else None

    def over_padded_bfloat16(self) -> float | None:
        """In bfloat16: on the batch, or on a few proteins where others cannot be run on it."""
        ratio = self.over(forward.MANY, "bfloat16", PADDED)
        return self.over(FEW, "bfloat16", PADDED) if ratio is None else ratio

    def quotient(self, a: tuple[str, str, str], b: tuple[str, str, str], what: str = "tokens") -> float | None:
        """How much of ``what`` per second one case does over another, within rounds."""
        rows = self.row(*a), self.row(*b)
        if rows[0] is None or rows[1] is None:
            return None
        rounds = zip(*([row["work"][what] / s for s in row["seconds"]["rounds"]] for row in rows if row), strict=True)
        return median(x / y for x, y in rounds)

    def share_of_batch(self, dtype: str) -> float | None:
        """Rate of one protein alone over that of the batch."""
        return self.quotient((forward.ONE, OURS, dtype), (forward.MANY, OURS, dtype))

    def embed_over_script(self, dtype: str) -> float | None:
        """The lower of per protein and per residue."""
        return _least(self.over(per, dtype, SCRIPT) for per in PERS)

    def embed_over_model(self, dtype: str) -> float | None:
        """The lower of per protein and per residue, over the model's own rate on the same proteins."""
        alone = (MODEL_ALONE, OURS, dtype)
        return _least(self.quotient((per, OURS, dtype), alone, "residues") for per in PERS)

    def bfloat16_over_float32(self) -> float | None:
        """Of ours, on the batch."""
        return self.quotient((forward.MANY, OURS, "bfloat16"), (forward.MANY, OURS, "float32"))

    def _rows(self, table: str, dtype: str | None) -> list[Values]:
        return [r for r in self.rows if r["table"] == table and r["dtype"] == dtype and r["status"] == "measured"]


def _least(values: Any) -> float | None:
    return min((value for value in values if value is not None), default=None)


def lines(n: Numbers, has_bfloat16: bool) -> dict[str, str]:
    """A set's column of the summary: what, and its number for people."""
    other = f"{competitors.OTHER_PACKAGE}, float32"
    found = {}
    for dtype in ("float32", "bfloat16"):
        peak, of_peak = n.peak(dtype), n.of_peak(dtype)
        no_peak = "no instructions" if dtype == "bfloat16" and not has_bfloat16 else "unavailable"
        found[f"measured GEMM peak, {dtype}"] = f"{short(peak.rate)} GFLOP/s" if peak else no_peak
        found[f"by, {dtype}"] = peak.by if peak else ""
        found[f"ours, {dtype}"] = _tokens(n.rate(forward.MANY, OURS, dtype))
        found[f"of that peak in direct FLOPs, {dtype}"] = percent(of_peak) if of_peak is not None else no_peak
        padded = n.over(forward.MANY, dtype, PADDED) if dtype == "float32" else n.over_padded_bfloat16()
        few = dtype == "bfloat16" and n.over(forward.MANY, dtype, PADDED) is None and padded is not None
        found[f"over the best padded, {dtype}"] = _times(padded) + (" (a few proteins)" if few else "")
    found["ours, bfloat16 over float32"] = _times(n.bfloat16_over_float32())
    for dtype in ("float32", "bfloat16"):
        found[f"training step over the best padded, {dtype}"] = _times(n.over(train.TABLE, dtype, PADDED))
    for dtype in ("float32", "bfloat16"):
        one, share = n.row(forward.ONE, OURS, dtype), n.share_of_batch(dtype)
        found[f"one protein of about 350, {dtype}"] = (
            f"{1e3 * one['seconds']['p50']:.1f} ms, {percent(share)} of the batch's rate"
            if one and share is not None
            else "not measured"
        )
    for dtype in ("float32", "bfloat16"):
        found[f"embed over the script, {dtype}"] = _times(n.embed_over_script(dtype))
        share = n.embed_over_model(dtype)
        found[f"embed, of the model's own rate, {dtype}"] = percent(share) if share is not None else "not measured"
    found[other] = _other(n, competitors.OTHER_PACKAGE)
    found["original Keras model, float32"] = _other(n, KERAS)
    beyond = [f"{r['table']} / {r['case']} / {r['dtype']}" for r in n.rows if BEYOND in r["note"]]
    found["cases seen to leave the set"] = ", ".join(beyond) or "none"
    return found


def _tokens(rate: float | None) -> str:
    return "not measured" if rate is None else f"{short(rate)} tokens/s"


def _times(ratio: float | None) -> str:
    return "not measured" if ratio is None else times(ratio)


def _other(n: Numbers, name: str) -> str:
    ratio = n.over(forward.MANY, "float32", name)
    return "not measured" if ratio is None else f"{_tokens(n.rate(forward.MANY, name, 'float32'))}, ours {times(ratio)}"


def targets(name: str, numbers: Mapping[str, Numbers], has_bfloat16: bool) -> list[Target]:
    """What the project aims at with a set.

    Args:
        name: of the set.
        numbers: of all sets that were measured.
        has_bfloat16: whether the set multiplies bfloat16.
    """
    n = numbers[name]

    def target(what: str, wanted: float, value: float | None) -> Target:
        return Target(what, wanted, "x", True, value)

    dtypes: Sequence[str] = ("float32", "bfloat16")
    found = [
        target("float32 over the measured GEMM peak, direct FLOPs", 1.3, n.of_peak("float32")),
        target("float32 over the best padded", 2.0, n.over(forward.MANY, "float32", PADDED)),
    ]
    if name == "avx512_bf16":
        found += [
            target("bfloat16 over the measured GEMM peak, direct FLOPs", 0.85, n.of_peak("bfloat16")),
            target("bfloat16 over the best padded", 1.7, n.over(forward.MANY, "bfloat16", PADDED)),
        ]
    if name == "amx_bf16":
        pair = [
            numbers[s].rate(forward.MANY, OURS, "bfloat16") if s in numbers else None for s in (name, "avx512_bf16")
        ]
        ratio = pair[0] / pair[1] if pair[0] and pair[1] else None
        found.append(target("bfloat16 over that of avx512_bf16", 1.5, ratio))
    if not has_bfloat16:
        found.append(target("bfloat16 over float32", 0.95, n.bfloat16_over_float32()))
    for dtype in dtypes if has_bfloat16 else dtypes[:1]:
        found.append(target(f"training step over the best padded, {dtype}", 1.6, n.over(train.TABLE, dtype, PADDED)))
        found.append(target(f"embed over the script, {dtype}", 2.0, n.embed_over_script(dtype)))
    for dtype in dtypes:
        found.append(target(f"one protein over the batch's rate, {dtype}", 0.8, n.share_of_batch(dtype)))
        found.append(target(f"embed over the model's own rate, {dtype}", 0.93, n.embed_over_model(dtype)))
    return found
