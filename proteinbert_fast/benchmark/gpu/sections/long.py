"""Time and memory per residue: one protein of a thousand to ten million residues, and the largest that fits."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from proteinbert_fast.benchmark import inputs
from proteinbert_fast.benchmark.cases import Case, Check, Ready, Work, flops_per_token
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.setup import OURS, TOLERANCE
from proteinbert_fast.benchmark.timing import Row, Target, percentiles
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.tokenizer import Tokenizer

TITLE = "Long proteins: time and memory per residue"
ONE, MANY, LARGEST = "one protein", "proteins of one length, as many as fill a batch", "the largest piece"


def rows(bench: Bench) -> list[Row]:
    """A row per length, alone and in full batches; then the largest piece."""
    s = bench.settings
    precision = bench.precisions[0]
    one = [_measured(bench, ONE, n, 1, precision) for n in s.lengths]
    filled = max(s.lengths[-1] // 5, 1) if len(s.lengths) > 2 else s.lengths[-1]
    many = [_measured(bench, MANY, n, filled // n, precision) for n in s.lengths if filled // n > 1]
    for row in one:
        # Of the longer ones: what does not grow with the protein would be divided among too few residues.
        if row.case.work.residues >= s.lengths[-1] // 10:
            value = row.values.get("bytes_per_residue")
            row.targets.append(Target("memory beyond the weights", 1024.0, "B per residue", False, value))
    _flat(one, "time per residue, slowest over fastest length")
    _flat([*many, *one[len(many) :]], "the same, short proteins in full batches")
    return [*one, *many, *_largest(bench, precision)]


def _flat(rows: Sequence[Row], what: str) -> None:
    """The last of the rows bears the target of all."""
    times = [row.values["ns_per_residue"] for row in rows if row.seconds]
    value = max(times) / min(times) if rows and len(times) == len(rows) else None
    if rows:
        rows[-1].targets.append(Target(what, 1.10, "x", False, value))


def _measured(bench: Bench, table: str, residues: int, proteins: int, precision: Precision) -> Row:
    found: dict[str, Any] = {}
    case = _case(bench, table, residues, proteins, precision, found)
    (row,) = bench.measure([case], rounds=min(bench.settings.rounds, 5))
    if row.seconds:
        row.values.update(found)
        row.values["ns_per_residue"] = 1e9 * percentiles(row.seconds)["p50"] / (residues * proteins)
    bench.tidy()
    return row


def _case(bench: Bench, table: str, residues: int, proteins: int, precision: Precision, found: dict[str, Any]) -> Case:
    work = Work(
        proteins=proteins,
        residues=residues * proteins,
        tokens=(residues + 2) * proteins,
        flops=(residues + 2) * proteins * flops_per_token(bench.settings.config),
    )

    def prepare() -> Ready[ProteinBertOutput]:
        model = bench.model(precision.name)
        sequence = of_period(residues, bench.settings.period)
        host = Tokenizer(gap=bench.settings.config.reach)([sequence] * proteins)
        bench.tidy()
        if bench.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        before = _allocated(bench)
        batch = host.to(bench.device)

        def run() -> ProteinBertOutput:
            with torch.inference_mode(), precision.active():
                out = model(batch)
            assert isinstance(out, ProteinBertOutput)
            return out

        run()
        bench.synchronize()
        if bench.on_gpu:
            peak = torch.cuda.max_memory_allocated() - before
            found.update(peak_bytes=peak, bytes_per_residue=peak / (residues * proteins))
        return Ready(
            run, partial(_check, bench, residues, precision), "tokens, layout and all states counted in memory"
        )

    name = f"{residues:,} residues" if proteins == 1 else f"{proteins:,} of {residues:,} residues"
    return Case(table=table, name=name, what="ProteinBert on one batch", owner=OURS, ours=True, work=work,
                unit="residues/s", prepare=prepare, dtype=precision.name)  # fmt: skip


def of_period(n: int, period: int) -> bytes:
    """A protein of ``n`` residues that repeats itself after ``period``."""
    piece = inputs.of_length(period)
    return (piece * (n // period + 1))[:n]


def _allocated(bench: Bench) -> int:
    return torch.cuda.memory_allocated() if bench.on_gpu else 0


def _check(bench: Bench, residues: int, precision: Precision, out: ProteinBertOutput) -> Check:
    """Numbers of the first protein against the reference; a longer one against ours in float32 and itself."""
    settings, allowed = bench.settings, TOLERANCE[precision.name]
    with torch.inference_mode():
        local, state = out.local[0], out.global_state[0].double()
        repeats = _repeats(bench, local)
        if not repeats.passed:
            return repeats
        if residues > settings.compared_residues:
            # Means over many whole periods hardly depend on how many there are.
            few = settings.compared_residues // settings.period * settings.period
            error = _error(state, _answer(bench, few, bench.model("float32")).global_state[0].double())
            found = f"global state within {error:.1e} of {few:,} residues', allowed {allowed:.2g}"
            return Check(error <= allowed, f"{repeats.found}; {found}")
        exact = residues <= settings.exact_residues
        twin = _answer(bench, residues, bench.exact_model if exact else bench.model("float32"))
        error = _error(state, twin.global_state[0].double())
        error = max(error, _error(local.double(), twin.local[0].double()))
        against = "float64 reference" if exact else "ours in float32"
        return Check(error <= allowed, f"largest error {error:.1e}, allowed {allowed:.2g} ({against}); {repeats.found}")


def _error(found: Tensor, right: Tensor) -> float:
    error = (found - right.to(found.device)).abs().max().item()
    return float("inf") if error != error else float(error)


def _answer(bench: Bench, residues: int, model: ProteinBert) -> ProteinBertOutput:
    batch = Tokenizer(gap=bench.settings.config.reach)([of_period(residues, bench.settings.period)])
    out = model(batch.to(model.token_embedding.weight.device))
    assert isinstance(out, ProteinBertOutput)
    return out


def _repeats(bench: Bench, local: Tensor) -> Check:
    """A protein that repeats itself has states that do, bit for bit, but near its ends. Shows offsets that overflow."""
    s = bench.settings
    reach = s.config.reach * s.config.n_blocks + 1
    periods = (len(local) - 2 * reach) // s.period
    if periods < 2:
        return Check(True, "too short to repeat itself")
    first = local[reach : reach + s.period]
    for k in range(1, periods):
        if not torch.equal(local[reach + k * s.period : reach + (k + 1) * s.period], first):
            return Check(False, f"period {k} of {periods} differs from the first")
    return Check(bool(first.isfinite().all()), f"{periods} periods of equal bits")


def _largest(bench: Bench, precision: Precision) -> list[Row]:
    """The first of the sizes that fits."""
    wanted = bench.settings.largest[0]
    tried: list[Row] = []
    for n in bench.settings.largest:
        row = _measured(bench, LARGEST, n, 1, precision)
        tried.append(row)
        if row.seconds or bench.obstacle or bench.lost:
            break
    fits = float(tried[-1].case.work.residues) if tried[-1].seconds else None
    tried[-1].targets.append(Target("the largest piece that fits", float(wanted), "residues", True, fits))
    return tried
