"""Finds the fastest configuration of each kernel on this machine's GPU: what ``proteinbert-fast bench --tune`` runs.

A candidate is refused when it does not compile, fit or end well, when it spills more registers than the shipped one,
or when its result has other bits: a protein's numbers must not depend on tuning. What is left is timed beside the
shipped one, and the fastest goes into the table that `ops.kernels.tuning` reads. Candidates run in a process of their
own: one that crashes costs itself only.

    python -m proteinbert_fast.benchmark.tune < job.json

is that process; it prints a JSON line when a candidate begins and one when it has ended.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from proteinbert_fast.benchmark import apart
from proteinbert_fast.benchmark.cases import Ready
from proteinbert_fast.benchmark.gpu.bench import NO_GPU, Bench
from proteinbert_fast.benchmark.gpu.gradients import GRADIENTS
from proteinbert_fast.benchmark.gpu.operations import OPERATIONS, Inputs, Operation, Tensors, same
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS
from proteinbert_fast.benchmark.gpu.sections.kernels import kernel_lengths
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.config import ProteinBertConfig
from proteinbert_fast.errors import BackendError, InputError, first_line
from proteinbert_fast.ops.backends import check_backend

# Operations that a kernel's configuration decides, the plain one first.
KERNELS = {
    # The first block is run by this kernel everywhere; on Hopper it is the only one.
    "local_block": ("local_block, first", "local_block", "local_block, hidden kept"),
    "local_block_hopper": ("local_block", "local_block, hidden kept"),
    "global_attention": ("global_track", "global_track, last", "global_track, with weights"),
}
# Those of the backward pass, by their gradients.
BACKWARD = {
    "local_block_backward": ("local_block", "local_block, first"),
    "local_block_backward_hopper": ("local_block",),
    "global_attention_backward": ("global_track", "global_track, last"),
}
# A gain smaller than timings vary is none.
LEAST_GAIN = 0.02
_OUTPUTS = 192  # keys and values of a head at the published sizes
ODD_LENGTHS = (0, 1, 13, 61, 126, 127, 509, 510, 1030)
_TIMINGS = 5
# A process that takes longer than this and as much again per candidate hangs in the candidate it is at.
_START_SECONDS, _CANDIDATE_SECONDS = 120.0, 20.0

Timer = Callable[[Callable[[], object]], float]


class Job(NamedTuple):
    """One kernel in one dtype and width."""

    kernel: str
    dtype: str
    channels: int

    def __str__(self) -> str:
        return f"{self.kernel}, {self.dtype}, d_local {self.channels}"


class Tried(NamedTuple):
    """A candidate: the seconds it takes, or None and why it is refused."""

    chosen: tuple[Any, ...]
    seconds: float | None
    refused: str


def candidates(job: Job, capability: int) -> list[tuple[Any, ...]]:
    """Configurations worth a try on a GPU; those that cannot fit are left out."""
    from proteinbert_fast.ops.kernels.launching import has_large_tiles, shared_memory

    dtype = PRECISIONS[job.dtype].dtype
    itemsize = dtype.itemsize
    matrix_units = itemsize == 2 and capability >= 80
    found: list[tuple[Any, ...]] = []
    if job.kernel in BACKWARD:
        return _candidates_of_backward(job, capability) if matrix_units else []
    if job.kernel == "local_block_hopper":
        if _module("local_block").portable_because(capability, job.channels, dtype) is None:
            tiles = ((64, 4), (128, 4), (128, 8), (256, 8))
            found = [(rows, 64, warps, stages, registers) for rows, warps in tiles for stages in (2, 3, 4, 6)
                     for registers in (128, 168, None) if rows * job.channels <= 128 * 32 * warps]  # fmt: skip
    elif job.kernel == "local_block" and matrix_units:
        large = has_large_tiles(capability)
        for rows, warps in ((64, 4), (64, 8), (128, 8), (128, 16), (256, 16)):
            for chunk in sorted({min(size, job.channels) for size in (32, 64, 128)}):
                for stages in (2, 3, 4):
                    for descriptors in (True, False) if capability >= 90 else (False,):
                        # More accumulators spill; only what is usual through the other way to memory.
                        unusual = (
                            descriptors != large and capability >= 90 and (chunk, stages) != (min(64, job.channels), 3)
                        )
                        fits = stages * (rows + job.channels) * chunk * itemsize <= shared_memory(capability)
                        if rows * job.channels <= 64 * 32 * warps and fits and not unusual:
                            found.append((rows, chunk, warps, stages, descriptors, False))
    elif job.kernel == "local_block" and job.dtype == "tf32":
        found = [(rows, chunk, warps, 2, False, True) for rows in (32, 64, 128) for chunk in (16, 32)
                 for warps in (4, 8)]  # fmt: skip
    elif job.kernel == "local_block":
        found = [(rows, chunk, warps, stages, False, True) for rows in (16, 32) for chunk in (16, 32) if
                 chunk <= job.channels for warps in (4, 8) for stages in (1, 2)]  # fmt: skip
    elif job.dtype == "tf32":
        found = [(rows, warps, stages, 32) for rows in (32, 64, 128) for warps in (4, 8) for stages in (1, 2)]
    elif matrix_units:
        found = [(rows, warps, stages, 0) for rows in (32, 64, 128) for warps in (4, 8) for stages in (1, 2, 3, 4)]
        attention = _module("global_attention")
        found = [
            c
            for c in found
            if not attention.fitted(attention.Configuration(*c), capability, _OUTPUTS, job.channels, itemsize).chunk
        ]
    else:
        found = [(rows, warps, 1, chunk) for rows in (16, 32) for warps in (4, 8) for chunk in (16, 32)]
    return found


def _candidates_of_backward(job: Job, capability: int) -> list[tuple[Any, ...]]:
    """What may leave every sum in its order, in 16 bits; candidates that give other bits after all are refused."""
    from proteinbert_fast.ops.kernels import tuning
    from proteinbert_fast.ops.kernels.launching import is_hopper

    def fit(warps: int, registers: int | None) -> bool:
        """Into a multiprocessor."""
        return 32 * warps * (registers or 0) <= 65536

    dtype, module = PRECISIONS[job.dtype].dtype, _module(job.kernel)
    runs_hopper = _module("local_block").portable_because(capability, job.channels, dtype) is None
    bounds = (None, 128, 168)  # of registers
    if job.kernel == "local_block_backward_hopper":
        tiles = ((128, 4), (128, 8), (256, 8), (256, 16)) if runs_hopper else ()
        return [(rows, 64, warps, stages, registers) for rows, warps in tiles for stages in (2, 3, 4)
                for registers in bounds if fit(warps, registers)]  # fmt: skip
    with tuning.using(None):
        shipped = module.configuration(capability, job.channels, dtype)
    if job.kernel == "local_block_backward":
        rows = (shipped.convolution_rows,) if runs_hopper else (64, 128)
        chunks = (shipped.chunk,) if runs_hopper else sorted({min(chunk, job.channels) for chunk in (32, 64)})
        return [tuple(shipped._replace(convolution_rows=n, chunk=chunk, warps=warps, registers=registers))
                for n in rows for chunk in chunks for warps in (4, 8, 16) for registers in bounds
                if fit(warps, registers)]  # fmt: skip
    # The gradients of rows, and those of weights, each with the shipped choice for the other.
    of_rows = [shipped._replace(values=values, chunk=chunk, stages=stages) for values in (64, 128)
               for chunk in ((0, 64) if is_hopper(capability) else (64,)) for stages in (1, 2, 3)]  # fmt: skip
    of_weights = [shipped._replace(weight_stages=stages, registers=registers) for stages in (2, 3, 4)
                  for registers in bounds if fit(shipped.warps, registers)]  # fmt: skip
    found = dict.fromkeys((*of_rows, *of_weights))
    return [tuple(c) for c in found if module.fitted(c, capability, _OUTPUTS, job.channels, dtype.itemsize) == c]


def _module(kernel: str) -> Any:
    from proteinbert_fast.ops import kernels

    return import_module(f"{kernels.__name__}.{kernel}")


def operations_of(kernel: str) -> list[Operation]:
    """Those that a kernel's configuration decides, the plain one first."""
    by_name = {operation.name: operation for operation in (GRADIENTS if kernel in BACKWARD else OPERATIONS)}
    return [by_name[name] for name in (KERNELS | BACKWARD)[kernel]]


class Search:
    """Tries candidates of a kernel.

    Args:
        job: the kernel, dtype and width.
        lengths: residues of the proteins that it is timed on.
        device: to run on.
        time: gives the seconds of one call.
        config: sizes of the model but for ``d_local``; the published ones when None.
        odd: residues of the proteins on which bits are compared beside those.

    Attributes:
        inputs: gives those that are timed (True), and those of odd lengths (False).
    """

    def __init__(
        self,
        job: Job,
        lengths: Sequence[int],
        device: torch.device,
        time: Timer,
        config: ProteinBertConfig | None = None,
        odd: Sequence[int] = ODD_LENGTHS,
    ) -> None:
        sizes = (config or ProteinBertConfig()).to_dict() | {"d_local": job.channels}
        self.job, self.device, self.time = job, device, time
        self.inputs = cache(
            lambda many: Inputs(
                ProteinBertConfig(**sizes), lengths if many else odd, PRECISIONS[job.dtype], device, device
            )
        )

    def run(self, candidates: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...] | Tried]:
        """Each candidate before it begins, then what came of it. The shipped one is the first and the last."""
        shipped = self._shipped()
        right = self._results(None, thorough=True)
        spilled = self.spills()
        for chosen in [shipped, *(c for c in candidates if c != shipped), shipped]:
            yield chosen
            yield self._try(chosen, right, spilled)

    def confirm(self, chosen: tuple[Any, ...]) -> str:
        """Why a candidate that was fast must be refused after all, or nothing: all variants, odd lengths."""
        try:
            if self._same(self._results(chosen, thorough=True), self._results(None, thorough=True)):
                return ""
            return "other bits in some variant"
        except Exception as error:
            return first_line(error)

    def spills(self) -> int:
        """Registers that the kernels compiled so far have spilled."""
        return sum(int(getattr(kernel, "n_spills", 0) or 0) for kernel in _compiled(self.job.kernel).values())

    def _shipped(self) -> tuple[Any, ...]:
        from proteinbert_fast.ops.kernels import tuning
        from proteinbert_fast.ops.kernels.launching import capability_of
        from proteinbert_fast.ops.precision import product_precision

        module, rows = _module(self.job.kernel), self.inputs(False).rows
        with tuning.using(None), PRECISIONS[self.job.dtype].active():
            if self.job.kernel.endswith("_hopper"):
                return tuple(module.configuration(self.job.channels, rows.dtype))
            precision = product_precision(rows.dtype)
            return tuple(module.configuration(capability_of(rows), self.job.channels, rows.dtype, precision))

    def _try(self, chosen: tuple[Any, ...], right: list[Tensors], shipped_spills: int) -> Tried:
        before = self.spills()
        try:
            found = self._results(chosen, thorough=False)
            self._wait()
            if not self._same(found, right[: len(found)]):
                return Tried(chosen, None, "other bits than the shipped configuration")
            spilled = self.spills() - before
            if spilled > shipped_spills:
                return Tried(chosen, None, f"spills {spilled} registers, the shipped one {shipped_spills}")
            return Tried(chosen, self.time(lambda: self._results(chosen, thorough=False, odd=False)), "")
        except Exception as error:
            return Tried(chosen, None, first_line(error))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _results(self, chosen: tuple[Any, ...] | None, thorough: bool, odd: bool = True) -> list[Tensors]:
        """Of the plain operation on many proteins and on odd lengths; of its variants too where thorough."""
        from proteinbert_fast.ops.kernels import tuning

        forced = None if chosen is None else {self.job.kernel: chosen}
        plain, *variants = operations_of(self.job.kernel)
        with tuning.using(forced), torch.inference_mode(), PRECISIONS[self.job.dtype].active():
            found = [plain.run(self.inputs(True))]
            if odd:
                found.append(plain.run(self.inputs(False)))
            if thorough:
                found += [operation.run(self.inputs(many)) for operation in variants for many in (True, False)]
        return found

    @staticmethod
    def _same(found: list[Tensors], right: list[Tensors]) -> bool:
        return all(same(a, b) for a, b in zip(found, right, strict=True))


def _compiled(kernel: str) -> dict[Any, Any]:
    """Kernels of a module that this process has compiled; none in the interpreter."""
    found = {}
    for name, function in vars(_module(kernel)).items():
        for device, caches in list(getattr(function, "device_caches", {}).items()):
            for key, compiled in caches[0].items():
                found[name, device, key] = compiled
    return found


def best_of(
    tried: Sequence[Tried], shipped: tuple[Any, ...], confirm: Callable[[tuple[Any, ...]], str]
) -> Tried | None:
    """The fastest that is confirmed and gains enough on the shipped one's best time; None where none does.

    Args:
        tried: all that was tried, the shipped one among them.
        shipped: the shipped configuration.
        confirm: why a candidate must be refused after all, or nothing.
    """
    times = [t.seconds for t in tried if t.chosen == shipped and t.seconds is not None]
    if not times:
        return None
    faster = [t for t in tried if t.seconds is not None and t.seconds < (1 - LEAST_GAIN) * min(times)]
    for found in sorted(faster, key=lambda t: t.seconds or 0.0):
        if not confirm(found.chosen):
            return found
    return None


def tune(dtypes: Sequence[str], channels: Sequence[int], say: Callable[[str], None]) -> Path:
    """Tunes all kernels and writes the table.

    Args:
        dtypes: of the states, "bfloat16", "float16", "tf32" or "float32".
        channels: widths of the local states.
        say: is told what goes on, a line each.

    Returns:
        The file that was written.

    Raises:
        InputError: there is no GPU, or Triton is missing.
        CheckpointError: the file cannot be written.
    """
    if not torch.cuda.is_available():
        raise InputError(f"--tune: {NO_GPU}; the shipped configurations are used")
    try:
        check_backend("triton")
    except BackendError as error:
        raise InputError(f"--tune: {error}") from error
    from proteinbert_fast.ops.kernels import tuning

    machine = tuning.machine_of(torch.cuda.current_device())
    found: dict[str, tuple[Any, ...]] = {}
    for job in [Job(kernel, dtype, width) for kernel in KERNELS | BACKWARD for dtype in dtypes for width in channels]:
        if not candidates(job, machine.capability):
            continue
        say(f"{job}: {len(candidates(job, machine.capability))} candidates, a few seconds each")
        best = _in_processes(job, candidates(job, machine.capability), say)
        key = f"{job.kernel}/{job.dtype}/{job.channels}"
        if best is not None:
            found[key] = best.chosen
    return write(machine, found)


def write(machine: Any, found: dict[str, tuple[Any, ...]]) -> Path:
    """Writes a machine's table, keeping entries of an earlier one for kernels that were not tuned now.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from proteinbert_fast.checkpoints.files import write_atomically
    from proteinbert_fast.ops.kernels import tuning

    path = tuning.path_of(machine)
    try:
        earlier = dict(tuning.read(path, machine).configurations)
    except tuning.Unusable:
        earlier = {}
    write_atomically(path, [(json.dumps(table(machine, found, earlier), indent=1) + "\n").encode()])
    tuning.forget()
    return path


def table(
    machine: Any, found: Mapping[str, tuple[Any, ...]], earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a table's file holds.

    Args:
        machine: a `tuning.Machine`.
        found: the configuration of each key, see `tuning.key_of`.
        earlier: entries that stay where nothing else was found.
    """
    from proteinbert_fast.ops.kernels import tuning

    entries = {key: dict(zip(_fields(key), values, strict=True)) for key, values in found.items()}
    return {
        "format": tuning.FORMAT,
        **machine._asdict(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "configurations": {**(earlier or {}), **entries},
    }


def _fields(key: str) -> tuple[str, ...]:
    module = _module(key.partition("/")[0])
    kind = getattr(module, "Configuration", None) or module.HopperConfiguration
    fields: tuple[str, ...] = kind._fields
    return fields


def _in_processes(job: Job, wanted: Sequence[tuple[Any, ...]], say: Callable[[str], None]) -> Tried | None:
    """The best candidate. A process that dies is followed by one without the candidate that it died of."""
    left = list(wanted)
    while True:
        lines, end = _process(job, left)
        outcome = outcome_of(lines)
        for tried in outcome.tried:
            cost = f"{1e3 * tried.seconds:.4g} ms" if tried.seconds is not None else f"refused: {tried.refused}"
            say(f"  {tried.chosen}: {cost}")
        if outcome.finished:
            say(f"  best: {outcome.best.chosen if outcome.best else 'the shipped one'}")
            return outcome.best
        if outcome.begun is None or outcome.begun not in left:
            say(f"  given up: {end}")
            return None
        say(f"  {outcome.begun}: refused: {end}")
        left.remove(outcome.begun)


class Outcome(NamedTuple):
    """What a process has printed.

    Attributes:
        tried: candidates that ended.
        begun: the last that began.
        finished: whether the process came to its end.
        best: what it chose.
    """

    tried: list[Tried]
    begun: tuple[Any, ...] | None
    finished: bool
    best: Tried | None


def outcome_of(lines: Sequence[str]) -> Outcome:
    """Reads a process's output; other lines than its own are passed over."""
    tried: list[Tried] = []
    begun: tuple[Any, ...] | None = None
    for line in lines:
        try:
            values = json.loads(line)
        except ValueError:
            continue
        match values:
            case {"begun": fields}:
                begun = tuple(fields)
            case {"tried": [fields, seconds, refused]}:
                tried.append(Tried(tuple(fields), seconds, refused))
            case {"best": None}:
                return Outcome(tried, begun, True, None)
            case {"best": [fields, seconds, refused]}:
                return Outcome(tried, begun, True, Tried(tuple(fields), seconds, refused))
    return Outcome(tried, begun, False, None)


def _process(job: Job, wanted: Sequence[tuple[Any, ...]]) -> tuple[list[str], str]:
    """Lines that the search printed in a process of its own, and how that ended."""
    seconds = _START_SECONDS + _CANDIDATE_SECONDS * len(wanted)
    ended = apart.run(__name__, {"job": job, "candidates": wanted}, seconds)
    last = (ended.errors or [""])[-1][:200]
    return ended.output, f"{ended.end} {last}".strip()


def device_timer(bench: Bench, keep: Callable[[list[float]], object] = lambda _: None) -> Timer:
    """The median of a few timings, each of as many calls as make it long enough; ``keep`` is given all of them."""

    def time(run: Callable[[], object]) -> float:
        ready = bench.enough_calls(Ready(run, None))
        seconds = [bench.clock(ready) for _ in range(_TIMINGS)]
        keep(seconds)
        return median(seconds)

    return time


def main() -> None:
    """One kernel; see above."""
    values = json.load(sys.stdin)
    job, wanted = Job(*values["job"]), [tuple(fields) for fields in values["candidates"]]
    bench = Bench(GpuSettings(), lambda _: None, torch.device("cuda", torch.cuda.current_device()))
    search = Search(job, kernel_lengths(bench), bench.device, device_timer(bench))
    tried: list[Tried] = []
    for found in search.run(wanted):
        if isinstance(found, Tried):
            tried.append(found)
            print(json.dumps({"tried": found}), flush=True)
        else:
            print(json.dumps({"begun": found}), flush=True)
    print(json.dumps({"best": best_of(tried, tried[0].chosen, search.confirm)}), flush=True)


if __name__ == "__main__":
    main()
