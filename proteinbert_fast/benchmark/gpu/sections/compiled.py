"""Ours beside the same padded model under torch.compile, tuned as far as the compiler goes.

Compiling takes most of a report's time, so it comes last, and what is compiled follows from how long the first shape
took. That first shape has proteins of one length and no padding at all: more than any real batch can offer. Then come
the batches of eager mode under dynamic shapes, and batches in as few static shapes as there is time for.
"""

import time
from collections.abc import Sequence

import torch

from proteinbert_fast.benchmark.cases import Case, Ready, Unavailable, Work, flops_per_token
from proteinbert_fast.benchmark.competitors import PAD, PaddedBatch, PaddedProteinBert, PaddedResult, run_padded
from proteinbert_fast.benchmark.gpu.bench import Bench
from proteinbert_fast.benchmark.gpu.precision import Precision
from proteinbert_fast.benchmark.gpu.sections import forward
from proteinbert_fast.benchmark.gpu.sections.forward import Sample
from proteinbert_fast.benchmark.gpu.sections.machine import matrix_probes
from proteinbert_fast.benchmark.setup import PLAIN
from proteinbert_fast.benchmark.timing import Row, Target
from proteinbert_fast.errors import first_line

TITLE = "Forward pass: beside torch.compile"
TABLE = "many proteins, beside torch.compile"
COMPILED, IDEAL = "padded compiled", "padded compiled, no padding at all"
DYNAMIC, STATIC = "padded compiled, dynamic shapes", "padded compiled, static shapes"
_LATER = 0.7  # of the first shape's time, which starts the compiler's own processes too
_NO_LIMIT = 256


class Compiler:
    """The padded model under torch.compile, and how long compiling took.

    Args:
        bench: the run.
        precision: to compute in.
    """

    def __init__(self, bench: Bench, precision: Precision) -> None:
        self.bench, self.precision = bench, precision
        self.seconds: list[float] = []
        self.failed: str | None = None
        self._models: dict[bool, PaddedProteinBert] = {}

    @property
    def left(self) -> float:
        """Seconds that compiling may still take."""
        settings = self.bench.settings
        return min(settings.compile_seconds - sum(self.seconds), settings.limit_seconds - self.bench.seconds)

    @property
    def shapes(self) -> int:
        """For how many more shapes there is time."""
        first = self.seconds[0] if self.seconds else 0.0
        return int(self.left / max(_LATER * first, 1e-3))

    def model(self, batches: Sequence[PaddedBatch], dynamic: bool = False) -> PaddedProteinBert:
        """The model, compiled for the shapes of these batches.

        Raises:
            Unavailable: it cannot be compiled here, or not in the time that is left.
        """
        if self.failed:
            raise Unavailable(self.failed)
        if self.shapes < 1:
            raise Unavailable(f"no time left to compile, {sum(self.seconds):.0f} s have gone into it")
        if dynamic not in self._models:
            model = PaddedProteinBert(self.bench.model(self.precision.name), channels_last=True)
            # 8 versions of a function, the default, are soon used up; then it would run eagerly.
            torch._dynamo.config.recompile_limit = _NO_LIMIT
            for block in model.blocks:
                block.compile(**self.bench.settings.compile_options | {"dynamic": dynamic})
            self._models[dynamic] = model
        started = time.perf_counter()
        try:
            with self.precision.active():
                run_padded(self._models[dynamic], list(batches))
            self.bench.synchronize()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failed = f"torch.compile fails here: {first_line(error)}"
            raise Unavailable(self.failed) from error
        self.seconds.append(time.perf_counter() - started)
        return self._models[dynamic]


def rows(bench: Bench) -> list[Row]:
    """Ours, eager and compiled in the first precision, in the same rounds."""
    chosen, precision = forward.sample(bench), bench.precisions[0]
    compiler = Compiler(bench, precision)
    in_graph = precision.dtype.itemsize == 2
    cases = [
        forward.ours(bench, chosen, precision, table=TABLE),
        *([forward.ours(bench, chosen, precision, True, TABLE)] if in_graph else []),
        forward.eager(bench, chosen, precision, True, TABLE),
        _ideal(bench, compiler, precision),
        *(
            _real(bench, compiler, chosen, precision, name, graph)
            for name in (DYNAMIC, STATIC)
            for graph in (False, True)
        ),
        *matrix_probes(bench, precision.name),
    ]
    found = bench.measure(cases)
    for row in found:
        forward.finish(bench, row, chosen)
        if row.seconds and row.case.name.startswith(COMPILED):
            row.values["compile_seconds"] = sum(compiler.seconds)
    best = forward.fastest(found, lambda case: case.ours)
    real = forward.fastest(found, lambda case: case.name.startswith(COMPILED) and case.name != IDEAL)
    ideal = forward.fastest(found, lambda case: case.name == IDEAL)
    what = "ours over torch.compile, max-autotune"
    (best or found[0]).targets += [
        Target(f"{what}, real lengths", 1.8, "x", True, forward.ratio(best, real)),
        Target(f"{what}, which need not pad", 1.8, "x", True, forward.ratio(best, ideal)),
    ]
    return found


def _note(compiler: Compiler) -> str:
    seconds, options = compiler.seconds, compiler.bench.settings.compile_options
    how = options.get("mode") or options.get("backend") or "default"
    return f"{how}, channels last, compiling took {sum(seconds):.0f} s so far, not counted"


def _ideal(bench: Bench, compiler: Compiler, precision: Precision) -> Case:
    typical = bench.setup.tokens[bench.setup.typical]
    count = max(1, bench.settings.compiled_tokens // len(typical))
    work = Work(
        proteins=count,
        residues=count * (len(typical) - 2),
        tokens=count * len(typical),
        flops=float(count * len(typical) * flops_per_token(bench.settings.config)),
    )

    def prepare() -> Ready[PaddedResult]:
        tokens = typical.long().expand(count, -1).contiguous()
        batch = PaddedBatch([bench.setup.typical] * count, tokens, torch.ones_like(tokens, dtype=torch.bool))
        batches = forward.to_device([batch], bench.device)
        model = compiler.model(batches)

        def check_one(result: PaddedResult) -> object:
            states = forward.padded_states(bench, result)
            return bench.setup.check(states, precision.name, expected=1)

        ready = forward.padded(bench, model, batches, precision, f"one protein {count:,} times; {_note(compiler)}")
        return Ready(ready.run, check_one, ready.note)  # type: ignore[arg-type]

    return _case(IDEAL, f"{count:,} proteins of {len(typical) - 2} residues", work, prepare, precision)


def _real(bench: Bench, compiler: Compiler, chosen: Sample, precision: Precision, name: str, in_graph: bool) -> Case:
    def compiled() -> tuple[PaddedProteinBert, list[PaddedBatch]]:
        if name == DYNAMIC:
            batches = forward.eager_at_best(bench, chosen, precision, True).batches
        else:
            tokens = [bench.setup.tokens[i] for i in chosen.numbers]
            shapes = max(1, min(bench.settings.compile_shapes, compiler.shapes))
            few = static_batches(tokens, chosen.numbers, shapes, bench.settings.compiled_tokens)
            batches = forward.to_device(few, bench.device)
        return compiler.model(batches, name == DYNAMIC), batches

    def prepare() -> Ready[PaddedResult]:
        model, batches = bench.once(name, compiled)
        shapes = len({batch.tokens.shape for batch in batches})
        note = f"{len(batches)} batches of {shapes} shapes, {forward.waste(batches)}; {_note(compiler)}"
        ready = forward.padded(bench, model, batches, precision, note)
        if not in_graph:
            return ready
        if not bench.on_gpu:
            raise Unavailable("graphs need a GPU")
        run, how = bench.captured(ready.run)
        if run is ready.run:
            raise Unavailable(how)
        return Ready(run, ready.check, f"{note}; {how}")

    what = "the batches of eager mode" if name == DYNAMIC else "sorted by length, as few shapes as there is time for"
    graph = ", CUDA graph" if in_graph else ""
    return _case(f"{name}{graph}", what, forward.work(bench, chosen), prepare, precision)


def _case(name: str, what: str, work: Work, prepare: object, precision: Precision) -> Case:
    return Case(table=TABLE, name=name, what=what, owner=PLAIN, ours=False, work=work, unit="tokens/s",
                prepare=prepare, dtype=precision.name)  # type: ignore[arg-type]  # fmt: skip


def static_batches(
    tokens: Sequence[torch.Tensor], numbers: Sequence[int], shapes: int, batch_tokens: int
) -> list[PaddedBatch]:
    """Proteins sorted by length in batches of few shapes, chosen so that there is least padding.

    Args:
        tokens: of each protein, integers (length,).
        numbers: of each protein.
        shapes: most different shapes.
        batch_tokens: padded tokens of a batch, about. The last batch of a shape is filled up with copies of its first
            protein, whose results nobody asks for.
    """
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    batches = []
    begin = 0
    for end in _cuts([len(tokens[i]) for i in order], shapes):
        members, begin = order[begin:end], end
        length = len(tokens[members[-1]])
        count = max(1, round(len(members) * length / batch_tokens))
        size = -(-len(members) // count)
        for first in range(0, len(members), size):
            chosen = members[first : first + size]
            filled = chosen + [chosen[0]] * (size - len(chosen))
            rows = torch.full((size, length), PAD)
            mask = torch.zeros(size, length, dtype=torch.bool)
            for k, i in enumerate(filled):
                rows[k, : len(tokens[i])] = tokens[i].long()
                mask[k, : len(tokens[i])] = True
            batches.append(PaddedBatch([numbers[i] for i in chosen], rows, mask))
    return batches


def _cuts(lengths: Sequence[int], pieces: int) -> list[int]:
    """Where to cut ascending lengths into pieces so that filling each up to its longest takes least."""
    ends = [i for i in range(1, len(lengths) + 1) if i == len(lengths) or lengths[i] != lengths[i - 1]]
    least: dict[int, tuple[int, list[int]]] = {0: (0, [])}
    best: tuple[int, list[int]] | None = None
    for _ in range(pieces):
        following: dict[int, tuple[int, list[int]]] = {}
        for end in ends:
            options = [
                (filled + (end - begin) * lengths[end - 1], [*cuts, end])
                for begin, (filled, cuts) in least.items()
                if begin < end
            ]
            if options:
                following[end] = min(options)
        if len(lengths) in following and (best is None or following[len(lengths)][0] < best[0]):
            best = following[len(lengths)]
        least = following
    assert best is not None
    return best[1]
