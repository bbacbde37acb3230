"""A forward pass and a training step, kernel by kernel. Last of all: the profiler may leave launches slower."""

from collections.abc import Callable
from typing import Any

import torch

from proteinbert_fast.benchmark.cases import Case, Ready, Unavailable, Work
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.sections.forward import sample
from proteinbert_fast.benchmark.gpu.sections.kernels import kernel_lengths
from proteinbert_fast.benchmark.gpu.sections.training import training_data, training_step
from proteinbert_fast.benchmark.setup import OURS
from proteinbert_fast.benchmark.timing import Row
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.packing import PackedBatch
from proteinbert_fast.tokenizer import Tokenizer

TITLE = "Where the time of a forward pass and of a training step goes"
TABLE = "one forward pass, kernel by kernel"
TRAINING = "one training step, kernel by kernel"
_SHOWN = 14  # kernels; the others are added up
_SHOWN_OF_TRAINING = 30
_NAME = 100  # characters


def rows(bench: Bench) -> list[Row]:
    """Device time of each kernel, without asking which kernels there should be."""
    return _forward(bench) + _training(bench)


def _forward(bench: Bench) -> list[Row]:
    """Of a forward pass in the first precision."""
    precision, lengths = bench.precisions[0], kernel_lengths(bench)
    work = Work(proteins=len(lengths), residues=sum(lengths), tokens=sum(lengths) + 2 * len(lengths))

    def prepare() -> Callable[[], object]:
        model: ProteinBert = bench.model(precision.name)
        batch: PackedBatch = Tokenizer(gap=bench.settings.config.reach)([b"M" * n for n in lengths]).to(bench.device)

        def run() -> None:
            with torch.inference_mode(), precision.active():
                model(batch)

        return run

    return _profiled(bench, TABLE, precision.name, work, prepare, _SHOWN)


def _training(bench: Bench) -> list[Row]:
    """Of a training step in bfloat16, keeping what makes it fastest."""
    if bench.obstacle or bench.lost:
        return _profiled(bench, TRAINING, "bfloat16", Work(), lambda: lambda: None, 0)
    data = training_data(bench, sample(bench))
    return _profiled(
        bench, TRAINING, "bfloat16", data.work, lambda: training_step(bench, data, "preactivations"), _SHOWN_OF_TRAINING
    )


def _profiled(
    bench: Bench, table: str, dtype: str, work: Work, prepare: Callable[[], Callable[[], object]], shown_at_most: int
) -> list[Row]:
    found: dict[str, tuple[int, float]] = {}

    def case(name: str, ready: Callable[[], Ready[Any]]) -> Case:
        return Case(table=table, name=name, what="device time in torch.profiler", owner=OURS, ours=True, work=work,
                    unit="tokens/s", prepare=ready, dtype=dtype)  # fmt: skip

    def ready() -> Ready[None]:
        run = prepare()
        if not bench.on_gpu:
            run()
            raise Unavailable("there is no device to profile")
        for _ in range(2):
            run()
        bench.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            run()
            bench.synchronize()
        found.update(_device_times(profiler))
        if not found:
            raise Unavailable("the profiler saw no kernel")
        return Ready(lambda: None, None)

    whole, _ = bench.checked(case("all kernels", ready))
    if whole.status != "measured":
        return [whole]
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    total = sum(seconds for _, (_, seconds) in ordered)
    shown = ordered[:shown_at_most]
    if rest := ordered[shown_at_most:]:
        shown.append((f"{len(rest)} others", (sum(n for _, (n, _) in rest), sum(s for _, (_, s) in rest))))
    whole.seconds, whole.values = [total], {"launches": sum(n for _, (n, _) in ordered), "share": 1.0}
    result = [whole]
    for name, (launches, seconds) in shown:
        row = Row(case(name, lambda: Ready(lambda: None, None)), "measured", seconds=[seconds])
        row.values = {"launches": launches, "share": seconds / total}
        result.append(row)
    for row in result:
        row.values["ns_per_token"] = 1e9 * row.seconds[0] / work.tokens
    return result


def _device_times(profiler: Any) -> dict[str, tuple[int, float]]:
    """Launches and seconds of each kernel."""
    found: dict[str, tuple[int, float]] = {}
    for event in profiler.key_averages():
        microseconds = getattr(event, "self_device_time_total", 0) or 0
        if microseconds:
            # Names of templates are long, and alike at the beginning.
            name = event.key.replace("|", "/")[:_NAME]
            launches, seconds = found.get(name, (0, 0.0))
            found[name] = launches + int(event.count), seconds + microseconds / 1e6
    return found
