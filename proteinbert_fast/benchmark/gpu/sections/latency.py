"""Latency of one protein, call by call: launched one kernel at a time, and as a CUDA graph."""

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.gpu.sections.long import of_period
from proteinbert_fast.benchmark.setup import OURS
from proteinbert_fast.benchmark.timing import Row, Target, percentiles
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

TITLE = "Latency of one protein"
NO_GRAPHS = "no graph replay in this version"
_WARM_CALLS = 20

Forward = Callable[[PackedBatch], ProteinBertOutput]


def rows(bench: Bench) -> list[Row]:
    """Per precision: eager, and in a graph."""
    found = []
    for precision in bench.precisions:
        for in_graph in (False, True):
            row, ready = bench.checked(_case(bench, precision, in_graph))
            if ready is not None:
                row.seconds = _calls(bench, ready)
            if in_graph and precision.dtype.itemsize == 2:
                value = 1e3 * percentiles(row.seconds)["p50"] if row.seconds else None
                row.targets.append(Target("p50 latency in a graph", 0.4, "ms", False, value))
            found.append(row)
        bench.tidy()
    return found


def _calls(bench: Bench, ready: Ready[Any]) -> list[float]:
    """Seconds of each call, from its launch until its result is there, by the host's clock."""
    for _ in range(min(_WARM_CALLS, bench.settings.latency_calls)):
        ready.run()
    bench.synchronize()
    seconds = []
    for _ in range(bench.settings.latency_calls):
        started = time.perf_counter()
        ready.run()
        bench.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds


def graphed(model: Any) -> Forward:
    """A model that replays CUDA graphs.

    Raises:
        Unavailable: this version has none.
    """
    try:
        module = import_module("proteinbert_fast.graphs")
    except ModuleNotFoundError as error:
        raise Unavailable(NO_GRAPHS) from error
    forward: Forward = module.GraphedForward(model)
    return forward


def _case(bench: Bench, precision: Precision, in_graph: bool) -> Case:
    n = bench.settings.latency_residues

    def prepare() -> Ready[ProteinBertOutput]:
        model: Any = bench.model(precision.name)
        if in_graph and not bench.on_gpu:
            raise Unavailable("graphs need a GPU")
        forward: Forward = graphed(model) if in_graph else model
        tokenizer = Tokenizer(gap=bench.settings.config.reach)
        one, other = (tokenizer([of_period(n + 50, n + 50)[k : n + k]]).to(bench.device) for k in (0, 50))

        def ask(asked: Forward, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode(), precision.active():
                out = asked(batch)
            # Copied: a graph's next run overwrites its results.
            return out.local_rows.clone(), out.global_state.clone()

        def run() -> ProteinBertOutput:
            with torch.inference_mode(), precision.active():
                return forward(one)

        def check(_: ProteinBertOutput) -> Check:
            right = [ask(model, batch) for batch in (one, other)]
            # One protein, another, the first again: a replay must take its input anew.
            found = [ask(forward, batch) for batch in (one, other, one)]
            return _equal(found, [*right, right[0]])

        return Ready(run, check, "input on the device, cache warm, layout known" + ("" if in_graph else "; no graph"))

    return Case(
        table=f"one protein of {n:,} residues",
        name="ours, CUDA graph" if in_graph else "ours, eager",
        what="each call waited for" if not in_graph else "proteinbert_fast.graphs.GraphedForward, each call waited for",
        owner=OURS,
        ours=True,
        work=Work(proteins=1, residues=n, tokens=n + 2),
        unit="tokens/s",
        prepare=prepare,
        dtype=precision.name,
    )


def _equal(found: Sequence[tuple[torch.Tensor, ...]], right: Sequence[tuple[torch.Tensor, ...]]) -> Check:
    for a, b in zip(found, right, strict=True):
        if not all(torch.equal(x, y) for x, y in zip(a, b, strict=True)):
            return Check(False, "differs from an eager call")
        if not all(bool(x.isfinite().all()) for x in a):
            return Check(False, "not finite")
    return Check(True, "the bits of an eager call")
