"""A forward pass of two million tokens, a training step, and both kernel by kernel."""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.first.process import Context
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.sections import forward, machine, profile, training
from proteinbert_fast.benchmark.timing import Row, percentiles

_CHANGES: dict[str, Any] = {"matrix_sizes": (8192,), "batch_rows": (524_288, 2_200_000)}


def run(context: Context) -> None:
    """What the options say: forward, training or profile."""
    if not context.can_run():
        return
    what = context.options["what"]
    bench = context.bench(gradients=what != "forward", **{} if context.job["tiny"] else _CHANGES)
    {"forward": _forward, "training": _training, "profile": _profile}[what](context, bench)


def _forward(context: Context, bench: Bench) -> None:
    """Launched kernel by kernel first, then the whole pass as a CUDA graph: each is a line before the next begins."""
    chosen, precision = forward.sample(bench), context.precision
    for in_graph in (False, True):
        context.begin("forward in a CUDA graph" if in_graph else "forward")
        _forget_peak(bench)
        case = forward.ours(bench, chosen, precision, in_graph=in_graph)
        row, *others = bench.measure([case, *machine.matrix_probes(bench, precision.name)])
        forward.finish(bench, row, chosen)
        context.row(row, peak_bytes=_peak(bench))
        if not in_graph:
            for other in others:
                context.row(other)


def _training(context: Context, bench: Bench) -> None:
    """With each of the two choices of what to keep for the backward pass."""
    chosen = forward.sample(bench)
    for save in ("preactivations", "inputs"):
        context.begin(f"training, save {save}")
        counted: dict[str, Any] = {}
        _forget_peak(bench)
        case = training.ours(bench, chosen, save, counted)
        row, *_ = bench.measure([case, *machine.matrix_probes(bench, context.precision.name)])
        row.values.update(counted)
        if row.seconds:
            row.values["residues_per_second"] = row.case.work.residues / percentiles(row.seconds)["p50"]
        context.row(row, peak_bytes=_peak(bench))


def _profile(context: Context, bench: Bench) -> None:
    """All kernels by name, without asking which there should be."""
    rows = profile.rows(bench)
    for row in rows:
        context.row(row)
    context.text("profile.txt", "\n".join(_lines(rows)) + "\n")


def _lines(rows: Sequence[Row]) -> list[str]:
    lines, seen = [f"{'ms':>10} {'share':>7} {'launches':>8}  kernel"], set()
    for row in rows:
        if not row.seconds:
            lines.append(f"{row.case.table}: {row.check or row.note}")
            continue
        share, launches = row.values["share"], row.values["launches"]
        name = f"{row.case.table}, all kernels" if row.case.table not in seen else row.case.name
        seen.add(row.case.table)
        lines.append(f"{1e3 * row.seconds[0]:10.4f} {share:7.1%} {launches:8d}  {name}")
    return lines


def _forget_peak(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def _peak(bench: Bench) -> int | None:
    """Bytes that were allocated at most since then: weights, inputs and results too."""
    return torch.cuda.max_memory_allocated() if bench.on_gpu else None
