"""Forward pass over real proteins: ours in every precision, beside padded batches in eager PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from proteinbert_fast.benchmark.cases import Case, Check, Ready, Unavailable, Work, flops_per_token
from proteinbert_fast.benchmark.competitors import (
    PaddedBatch,
    PaddedModel,
    PaddedProteinBert,
    PaddedResult,
    padded_batches,
    run_padded,
)
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.gpu.sections.kernels import forward_prediction
from proteinbert_fast.benchmark.gpu.sections.machine import matrix_probes
from proteinbert_fast.benchmark.setup import OURS, PLAIN, States
from proteinbert_fast.benchmark.timing import Row, Target, percentiles
from proteinbert_fast.outputs import ProteinBertOutput
from proteinbert_fast.packing import PackedBatch, batches_by_tokens
from proteinbert_fast.tokenizer import Tokenizer

TITLE = "Forward pass: real proteins, tokens to states"
TABLE = "many proteins"
EAGER = "padded eager"


class OursBatches(NamedTuple):
    """Rows of a batch at most; each batch with the numbers of its proteins."""

    rows: int
    batches: list[tuple[list[int], PackedBatch]]


OursResult = list[tuple[list[int], ProteinBertOutput]]


@dataclass(frozen=True)
class Sample:
    """Real proteins, repeated until there are enough tokens.

    Attributes:
        numbers: of each protein in the set-up.
        lengths: residues of each.
    """

    numbers: list[int]
    lengths: list[int]

    @property
    def work(self) -> tuple[int, int]:
        """Residues, tokens."""
        return sum(self.lengths), sum(self.lengths) + 2 * len(self.lengths)


def sample(bench: Bench) -> Sample:
    """All proteins of the set-up, as often as makes enough tokens."""
    lengths = [len(p.sequence) for p in bench.setup.proteins]
    times = max(1, -(-bench.settings.forward_tokens // (sum(lengths) + 2 * len(lengths))))
    return Sample(list(range(len(lengths))) * times, lengths * times)


def work(bench: Bench, chosen: Sample) -> Work:
    """Of a forward pass over a sample."""
    residues, tokens = chosen.work
    flops = float(tokens * flops_per_token(bench.settings.config))
    return Work(proteins=len(chosen.lengths), residues=residues, tokens=tokens, flops=flops)


def rows(bench: Bench) -> list[Row]:
    """Ours by precision, in graphs too; padded eager in the first; and the matrix rates, in the same rounds."""
    chosen, first = sample(bench), bench.precisions[0]
    cases = [ours(bench, chosen, precision) for precision in bench.precisions]
    cases += [ours(bench, chosen, p, in_graph=True) for p in bench.precisions if p.dtype.itemsize == 2]
    cases += [eager(bench, chosen, first, last) for last in (True, False)]
    found = bench.measure([*cases, *matrix_probes(bench)])
    for row in found:
        finish(bench, row, chosen)
    _aim(found, first)
    return found


def finish(bench: Bench, row: Row, chosen: Sample) -> None:
    """Rates in residues, and the cost model's prediction for ours."""
    if not row.seconds or row.case.probe is not None:
        return
    row.values["residues_per_second"] = row.case.work.residues / percentiles(row.seconds)["p50"]
    if row.case.ours:
        precision = next(p for p in bench.precisions if p.name == row.case.dtype)
        predicted = forward_prediction(bench, chosen.lengths, precision)
        total = sum(predicted.values())
        row.values["predicted_residues_per_second"] = row.case.work.residues / total
        row.values["predicted_bounds"] = {bound: seconds / total for bound, seconds in predicted.items() if seconds}


def fastest(rows: Sequence[Row], wanted: Callable[[Case], bool]) -> Row | None:
    """The fastest measured row of those wanted."""
    found = [row for row in rows if row.seconds and wanted(row.case)]
    return min(found, key=lambda row: percentiles(row.seconds)["p50"] / row.case.work.tokens, default=None)


def _aim(rows: Sequence[Row], precision: Precision) -> None:
    """Targets of the forward pass, borne by the first row: our first precision, eager or in graphs."""
    best = fastest(rows, lambda case: case.ours and case.dtype == precision.name)
    other = fastest(rows, lambda case: case.name.startswith(EAGER))
    bears = best or rows[0]
    rate = None if best is None else best.values["residues_per_second"]
    fraction = percentiles(best.of_matrix_rate)["p50"] if best and best.of_matrix_rate else None
    bears.targets += [
        Target(f"forward {precision.name}", 80e6, "residues/s", True, rate),
        Target(f"forward {precision.name}, of the matrix rate", 0.5, "of the rate", True, fraction),
        Target("ours over padded eager", 5.0, "x", True, ratio(best, other)),
    ]


def ratio(ours: Row | None, other: Row | None) -> float | None:
    """How many times as many tokens in a second; None where one is missing."""
    if ours is None or other is None:
        return None
    return percentiles(ours.rates)["p50"] / percentiles(other.rates)["p50"]


def ours(bench: Bench, chosen: Sample, precision: Precision, in_graph: bool = False, table: str = TABLE) -> Case:
    """ProteinBert on packed batches of the size that is fastest."""

    def prepare() -> Ready[OursResult]:
        model: Any = bench.model(precision.name)
        rows_per_batch, batches = _ours_batches(bench, chosen, precision)

        def check(result: OursResult) -> Check:
            return bench.setup.check(bench.states(result), precision.name)

        def run() -> OursResult:
            with torch.inference_mode(), precision.active():
                return [(numbers, model(batch)) for numbers, batch in batches]

        note = f"{len(batches)} batches of {rows_per_batch:,} rows at most; layout computed before"
        if in_graph:
            if not bench.on_gpu:
                raise Unavailable("graphs need a GPU")
            captured, how = bench.captured(run)
            if captured is run:
                raise Unavailable(how)
            return Ready(captured, check, f"{note}; all batches {how}")
        return Ready(run, check, note)

    return Case(
        table=table,
        name="ours, CUDA graph" if in_graph else "ours",
        what="ProteinBert on packed batches",
        owner=OURS,
        ours=True,
        work=work(bench, chosen),
        unit="tokens/s",
        prepare=prepare,
        dtype=precision.name,
    )


def _batches_of(bench: Bench, chosen: Sample, rows: int) -> list[tuple[list[int], PackedBatch]]:
    tokenizer = Tokenizer(gap=bench.settings.config.reach)
    batches = []
    for places in batches_by_tokens([n + 2 for n in chosen.lengths], rows, gap=bench.settings.config.reach):
        numbers = [chosen.numbers[k] for k in places]
        packed = tokenizer([bench.setup.proteins[i].sequence for i in numbers])
        batches.append((numbers, packed.to(bench.device)))
    return batches


def _ours_batches(bench: Bench, chosen: Sample, precision: Precision) -> OursBatches:
    """The fastest size of batches, found once per precision, and the batches."""

    def make() -> OursBatches:
        model = bench.model(precision.name)
        tried = []
        for rows in bench.settings.batch_rows:
            batches = _batches_of(bench, chosen, rows)

            def run(batches: list[tuple[list[int], PackedBatch]] = batches) -> None:
                with torch.inference_mode(), precision.active():
                    for _, batch in batches:
                        model(batch)

            run()
            tried.append((bench.clock(Ready(run, None)), OursBatches(rows, batches)))
        return min(tried, key=lambda t: t[0])[1]

    return bench.once(("ours", precision.name), make)


def eager(bench: Bench, chosen: Sample, precision: Precision, channels_last: bool, table: str = TABLE) -> Case:
    """The straightforward implementation at its fastest size of batches."""

    def prepare() -> Ready[PaddedResult]:
        best = eager_at_best(bench, chosen, precision, channels_last)
        note = f"sorted by length, {len(best.batches)} batches of {best.batch_tokens:,} padded tokens at most"
        note = f"{note}, {waste(best.batches)}; cuDNN chooses its algorithm by trying"
        return padded(bench, best.model, best.batches, precision, note)

    name = f"{EAGER}, channels last" if channels_last else EAGER
    return Case(
        table=table,
        name=name,
        what="convolutions as channels-last images" if channels_last else "nn.Conv1d, padded batches, mask",
        owner=PLAIN,
        ours=False,
        work=work(bench, chosen),
        unit="tokens/s",
        prepare=prepare,
        dtype=precision.name,
    )


class EagerAtBest(NamedTuple):
    """The straightforward implementation, its fastest size of batches, how long it takes, and the batches."""

    model: PaddedProteinBert
    batch_tokens: int
    seconds: float
    batches: list[PaddedBatch]


def eager_at_best(bench: Bench, chosen: Sample, precision: Precision, channels_last: bool) -> EagerAtBest:
    """Tries all sizes of batches once.

    Raises:
        Unavailable: none fits into memory.
    """

    def make() -> EagerAtBest:
        torch.backends.cudnn.benchmark = True
        model = PaddedProteinBert(bench.model(precision.name), channels_last)
        tokens = [bench.setup.tokens[i] for i in chosen.numbers]
        tried = []
        for batch_tokens in bench.settings.padded_tokens:
            batches = [
                b._replace(numbers=[chosen.numbers[k] for k in b.numbers])
                for b in to_device(padded_batches(tokens, batch_tokens), bench.device)
            ]

            def run(batches: list[PaddedBatch] = batches) -> None:
                with precision.active():
                    run_padded(model, batches)

            try:
                run()
                tried.append(EagerAtBest(model, batch_tokens, bench.clock(Ready(run, None)), batches))
            except torch.OutOfMemoryError:
                bench.tidy()
        if not tried:
            raise Unavailable("out of memory at every size of batches")
        return min(tried, key=lambda found: found.seconds)

    return bench.once(("eager", precision.name, channels_last), make)


def to_device(batches: Sequence[PaddedBatch], device: torch.device) -> list[PaddedBatch]:
    """The same batches on a device."""
    return [PaddedBatch(b.numbers, b.tokens.to(device), b.mask.to(device)) for b in batches]


def waste(batches: Sequence[PaddedBatch]) -> str:
    """How much of the batches is padding, in words."""
    kept, all_ = sum(int(b.mask.sum()) for b in batches), sum(b.mask.numel() for b in batches)
    return f"{1 - kept / all_:.1%} padding"


def padded(bench: Bench, model: PaddedModel, batches: list[PaddedBatch], precision: Precision, note: str) -> Ready[Any]:
    """A run of padded batches, checked against the reference."""

    def run() -> PaddedResult:
        with precision.active():
            return run_padded(model, batches)

    return Ready(run, lambda result: bench.setup.check(padded_states(bench, result), precision.name), note)


def padded_states(bench: Bench, result: PaddedResult) -> Iterator[States]:
    """Of each protein with a known answer the first that comes, without the padding, on the CPU."""
    wanted = set(bench.setup.answers)
    for batch, (local, global_state) in result:
        for k, i in enumerate(batch.numbers):
            if i in wanted:
                wanted.discard(i)
                yield States(i, local[k, batch.mask[k]].cpu(), global_state[k].cpu())
