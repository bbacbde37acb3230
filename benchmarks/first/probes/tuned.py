"""A short list of configurations of one kernel: compiled side by side first, then timed beside the shipped one."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.first.process import Context
from proteinbert_fast.benchmark import tune
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.sections.kernels import kernel_lengths
from proteinbert_fast.benchmark.timing import percentiles

MOST = 6
# What the compiled code and the counts speak for; others of tune.py's candidates fill the list up.
PREFERRED: dict[str, tuple[tuple[Any, ...], ...]] = {
    "local_block_hopper": (
        (128, 64, 4, 3, None), (256, 64, 8, 4, None), (64, 64, 4, 3, None), (128, 64, 8, 2, 128), (128, 64, 4, 2, 168),
        (64, 64, 4, 4, 128),
    ),
    "local_block": (
        (128, 64, 8, 4, True, False), (128, 64, 8, 2, True, False), (64, 64, 4, 4, True, False),
        (256, 64, 16, 3, True, False), (128, 128, 8, 2, True, False),
    ),
    "global_attention": ((64, 8, 2, 0), (128, 8, 2, 0), (32, 4, 3, 0), (128, 8, 1, 0), (64, 4, 3, 0)),
    "local_block_backward_hopper": (
        (128, 64, 4, 3, None), (256, 64, 8, 4, None), (128, 64, 8, 2, 128), (128, 64, 8, 4, 128),
    ),
}  # fmt: skip


def chosen(job: tune.Job, capability: int) -> list[tuple[Any, ...]]:
    """At most six of the tuner's candidates: the preferred ones, then others evenly from the whole list."""
    known = tune.candidates(job, capability)
    found = [c for c in PREFERRED.get(job.kernel, ()) if c in known]
    rest = [c for c in known if c not in found]
    step = max(1, len(rest) // max(MOST - len(found), 1))
    return [*found, *rest[::step]][:MOST]


def run(context: Context) -> None:
    """A line per configuration; when timed, the table of those that gained, as the tuner writes it."""
    if not context.can_run():
        return
    bench = context.bench(gradients=True)
    job = tune.Job(context.options["kernel"], context.precision.name, bench.settings.config.d_local)
    operations = {o.name for o in tune.operations_of(job.kernel)}
    if wrong := {name: why for (name, _), why in bench.failed.items() if name in operations}:
        name, why = next(iter(wrong.items()))
        context.emit(False, check=str(job), found=f"no time: {name} failed its check: {why}")
        return
    from proteinbert_fast.ops.kernels import tuning

    machine = tuning.machine_of(bench.device.index or 0)
    if not (wanted := chosen(job, machine.capability)):
        context.emit(None, check=str(job), note="nothing to try: this kernel does not run here")
        return
    search(context, bench, job, wanted, machine)


def search(context: Context, bench: Bench, job: tune.Job, wanted: Sequence[tuple[Any, ...]], machine: Any) -> None:
    """Tries configurations as ``bench --tune`` does."""
    timed: bool = context.options["timed"]
    spread: list[float] = []  # of the timings of the last configuration
    timer = tune.device_timer(bench, spread.extend) if timed else lambda run: 0.0
    config = bench.settings.config
    odd = (0, 1, 13) if context.job["tiny"] else tune.ODD_LENGTHS
    found = tune.Search(job, kernel_lengths(bench), bench.device, timer, config, odd)
    tried: list[tune.Tried] = []
    for step in found.run(wanted):
        if not isinstance(step, tune.Tried):
            context.begin(f"{job}: {step}")
            continue
        tried.append(step)
        values = {"seconds": percentiles(spread), "values": _beside_prediction(bench, found, step)} if spread else {}
        spread.clear()
        # One that is refused is no fault: that is what trying is for.
        context.emit(None if step.refused else True, check=str(job), configuration=step.chosen,
                     found=step.refused or "the same bits", **values)  # fmt: skip
    if not timed:
        return
    best = tune.best_of(tried, tried[0].chosen, found.confirm)
    key = f"{job.kernel}/{job.dtype}/{job.channels}"
    table = tune.table(machine, {key: best.chosen} if best else {}, context.so_far["tuned"])
    context.text("tuned.json", json.dumps(table, indent=1) + "\n", tuned=table["configurations"])
    context.emit(True, check=f"{job}: best", configuration=best.chosen if best else tried[0].chosen,
                 found=_gain(tried, best) if best else "the shipped one")  # fmt: skip


def _beside_prediction(bench: Bench, search: tune.Search, step: tune.Tried) -> dict[str, float]:
    """ns per token, as timed and as the cost model has it for such tiles."""
    from proteinbert_fast.ops.kernels import tuning

    inputs, job = search.inputs(True), search.job
    with tuning.using({job.kernel: step.chosen}):
        cost = tune.operations_of(job.kernel)[0].cost(inputs)
    assert step.seconds is not None
    per_token = 1e9 / inputs.batch.n_tokens
    return {"ns_per_token": step.seconds * per_token,
            "predicted_ns_per_token": cost.times(bench.peaks, job.dtype).least * per_token}  # fmt: skip


def _gain(tried: Sequence[tune.Tried], best: tune.Tried) -> str:
    shipped = [t.seconds for t in tried if t.chosen == tried[0].chosen and t.seconds is not None]
    assert best.seconds is not None
    return f"{1 - best.seconds / min(shipped):.1%} less time than the shipped one"


