"""What all sections of a GPU report have in common: device, clock, models, peaks, failures, time that is left."""

import copy
import gc
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, TypeVar

import torch

from proteinbert_fast.benchmark import cost_model, machine, timing
from proteinbert_fast.benchmark.cases import Case, Ready
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS, Precision
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.benchmark.setup import Setup, States
from proteinbert_fast.benchmark.timing import Row
from proteinbert_fast.errors import first_line
from proteinbert_fast.model import ProteinBert
from proteinbert_fast.outputs import ProteinBertOutput

Result = TypeVar("Result")
NO_GPU = "no CUDA GPU here"
_MOST_CALLS = 200


class Bench:
    """One run.

    Args:
        settings: how much to do.
        say: is told what goes on, a line each.
        device: to run on; None where there is none, and ``obstacle`` says why.
        obstacle: why nothing can be measured; None where it can.

    Attributes:
        environment: of the machine, for every row.
        peaks: of the device: estimates first, replaced by what is measured.
        failed: why a check failed, by operation and precision.
        lost: why the device can no longer be used; None while it can.
    """

    def __init__(
        self,
        settings: GpuSettings,
        say: Callable[[str], None],
        device: torch.device | None,
        obstacle: str | None = None,
    ) -> None:
        self.settings = settings
        self.say = say
        self.device = device or torch.device("cpu")
        self.obstacle = obstacle
        self.environment = environment(self.device)
        self.peaks = cost_model.estimated_peaks(self.environment["gpu"] or "")
        self.failed: dict[tuple[str, str], str] = {}
        self.lost: str | None = None
        self.started = time.perf_counter()
        self.model = cache(self._model)
        self._known: dict[Any, Any] = {}

    @property
    def on_gpu(self) -> bool:
        """Whether kernels run on a GPU, not in the interpreter."""
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.perf_counter() - self.started

    @property
    def precisions(self) -> list[Precision]:
        """To compute in."""
        return [PRECISIONS[name] for name in self.settings.precisions]

    @cached_property
    def setup(self) -> Setup:
        """Proteins, weights and right answers; on the CPU."""
        s = self.settings
        setup = Setup(Settings(proteins=s.proteins, config=s.config, batch_tokens=s.padded_tokens))
        if s.longest is not None:
            setup.__dict__["proteins"] = [replace(p, sequence=p.sequence[: s.longest]) for p in setup.proteins]
        return setup

    def _model(self, precision: str) -> ProteinBert:
        """Ours with random weights on the device; always the same weights."""
        with torch.inference_mode(False):  # it is kept, for whoever asks next
            model = copy.deepcopy(self.setup.model).to(self.device, PRECISIONS[precision].dtype)
        model.backend = "triton"
        return model

    @cached_property
    def exact_model(self) -> ProteinBert:
        """The float64 reference with the same weights; on the device where that computes it rightly."""
        from proteinbert_fast.benchmark.gpu.checks import exact_device

        model = copy.deepcopy(self.setup.model).to(exact_device(self.device), torch.float64)
        model.backend = "reference"
        return model

    def once(self, key: Any, make: Callable[[], Result]) -> Result:
        """What ``make`` gives, made the first time and then kept."""
        if key not in self._known:
            self._known[key] = make()
        found: Result = self._known[key]
        return found

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def clock(self, ready: Ready[Any]) -> float:
        """Seconds of one run: by the device's own events, or by the host's clock where there is no device."""
        if not self.on_gpu:
            return timing.seconds(ready)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        gc.disable()
        try:
            torch.cuda.synchronize()
            start.record()
            for _ in range(ready.calls):
                ready.run()
            end.record()
            end.synchronize()
        finally:
            gc.enable()
        return float(start.elapsed_time(end)) / 1e3 / ready.calls

    def enough_calls(self, ready: Ready[Result]) -> Ready[Result]:
        """The same, with as many calls per timing as make it long enough."""
        if not self.settings.timed_seconds:
            return ready
        once = max(self.clock(replace(ready, calls=1)), 1e-7)
        calls = min(max(round(self.settings.timed_seconds / once), 1), _MOST_CALLS)
        return replace(ready, calls=calls)

    def captured(self, run: Callable[[], Result]) -> tuple[Callable[[], Result], str]:
        """The same work in a CUDA graph, so that the host's time to launch it does not count; and a note.

        Where it cannot be captured the work itself is given, and the note says so. Results lie in the graph's own
        memory: each run overwrites them.
        """
        if not self.on_gpu:
            return run, ""
        try:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = run()
        except Exception as error:
            torch.cuda.synchronize()
            return run, f"not in a CUDA graph: {first_line(error)}"

        def replay() -> Result:
            graph.replay()
            return result

        return replay, "in a CUDA graph"

    def measure(self, cases: Sequence[Case], rounds: int | None = None) -> list[Row]:
        """Checks cases, then times those that passed, in interleaved rounds; a row for each.

        What goes wrong becomes a row: a wrong result or an error of ours is "wrong", an error of other code or too
        little memory "unavailable".
        """
        rows, timed = [], []
        for case in cases:
            row, ready = self.checked(case)
            rows.append(row)
            if ready is not None:
                timed.append((row, ready))
        if timed and not self.lost:
            try:
                timed = [(row, self.enough_calls(ready)) for row, ready in timed]
                timing.in_rounds(timed, rounds or self.settings.rounds, lambda _: None, self.clock)
            except Exception as error:
                for row, _ in timed:
                    row.seconds.clear()
                    self._spoil(row, error)
        timing.relate([row for row in rows if row.seconds])
        return rows

    def checked(self, case: Case) -> tuple[Row, Ready[Any] | None]:
        """A case's row without numbers, and the case made ready if it may be measured."""
        if (reason := self.reason_not_to(case)) is not None:
            return Row(case, "unavailable", reason), None
        if (reason := self.reason_for_wrong(case)) is not None:
            return Row(case, "wrong", check=reason), None
        self.say(case.label)
        try:
            row, ready, _ = timing.checked(case)
            self.synchronize()
        except Exception as error:
            row = Row(case, "unavailable")
            self._spoil(row, error)
            return row, None
        if row.status == "wrong":
            self.say(f"WRONG: {case.label}: {row.check}")
        return row, ready

    def reason_not_to(self, case: Case) -> str | None:
        """Why a case cannot be measured, or None when it can."""
        if self.obstacle or self.lost:
            return self.obstacle or self.lost
        if self.seconds > self.settings.limit_seconds:
            return f"out of time: {self.seconds:.0f} s had passed"
        return None

    def reason_for_wrong(self, case: Case) -> str | None:
        """Which check of what a case runs has failed, or None."""
        if case.ours and case.dtype is not None:
            # The model needs all operations; a case of one kernel alone, or of its gradient, has its name.
            for (operation, precision), why in self.failed.items():
                if precision == case.dtype and (case.table not in {KERNELS, GRADIENTS} or case.name == operation):
                    return f"{operation} failed its check: {why}"
        return None

    def _spoil(self, row: Row, error: Exception) -> None:
        text = first_line(error)
        memory = isinstance(error, torch.OutOfMemoryError)
        row.status = "wrong" if row.case.ours and not memory else "unavailable"
        row.check, row.note = (text, "") if row.status == "wrong" else (None, text)
        self.say(f"{'WRONG' if row.status == 'wrong' else 'not measured'}: {row.case.label}: {text}")
        self.tidy()

    def tidy(self) -> None:
        """Gives memory back, and notices when the device can no longer be used."""
        if not self.on_gpu or self.lost:
            return
        gc.collect()
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            self.lost = f"the device was lost: {first_line(error)}"
            self.say(self.lost)

    def states(self, answers: Iterable[tuple[Sequence[int], ProteinBertOutput]]) -> Iterator[States]:
        """Results for `Setup.check`: of each protein with a known answer the first that comes, on the CPU."""
        wanted = set(self.setup.answers)
        for numbers, out in answers:
            for k, i in enumerate(numbers):
                if i in wanted:
                    wanted.discard(i)
                    yield States(i, out.local[k].cpu(), out.global_state[k].cpu())


# Rows of this table are named after the operation that they measure.
KERNELS = "each kernel alone"
GRADIENTS = "each gradient alone"


def environment(device: torch.device) -> dict[str, Any]:
    """`machine.environment`, with the GPU: its name, driver, memory, clocks and power as they are now."""
    found = machine.environment() | {"gpu": None, "triton": triton_version(), "cuda": torch.version.cuda}
    if device.type != "cuda":
        return found
    properties: Any = torch.cuda.get_device_properties(device)
    return found | {
        "device": "cuda",
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "gpu_state": gpu_state(),
        "tuned": tuned_table(),
    }


def triton_version() -> str | None:
    """Of Triton, or None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def tuned_table() -> str:
    """Whether the kernels use a tuned table."""
    try:
        from proteinbert_fast.ops.kernels import tuning
    except ImportError as error:
        return first_line(error)
    return tuning.report()


def gpu_state() -> dict[str, str]:
    """Driver, clocks, power and temperature of the first GPU, as nvidia-smi reads them; nothing where it is missing."""
    names = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw",
             "power.limit", "temperature.gpu", "pstate")  # fmt: skip
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(names, values, strict=False))
