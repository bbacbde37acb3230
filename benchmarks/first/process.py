"""One probe, as a process: ``python -m benchmarks.first.process JOB.json``; see `runner`."""

import ctypes
import faulthandler
import json
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.first import verdicts

if TYPE_CHECKING:
    import torch

    from proteinbert_fast.benchmark.gpu.bench import Bench
    from proteinbert_fast.benchmark.gpu.precision import Precision
    from proteinbert_fast.benchmark.gpu.settings import GpuSettings
    from proteinbert_fast.benchmark.timing import Row

NO_GPU = "not measured: no CUDA GPU here"
_PR_SET_PDEATHSIG = 1


class Context:
    """What a probe is given, and how it tells what it found.

    Args:
        job: as the runner wrote it.
        descriptor: of the file that lines go to.
    """

    def __init__(self, job: Mapping[str, Any], descriptor: int) -> None:
        self.job = job
        self.options: dict[str, Any] = job["options"]
        self.seconds: float = job["seconds"]
        self.so_far: dict[str, Any] = job["so_far"]
        self.scratch = Path(job["scratch"])
        self._descriptor = descriptor

    def emit(self, ok: bool | None, **values: Any) -> None:
        """A line: whether what it tells is right, None for what is neither, and anything that JSON can hold."""
        self.write({"ok": ok} | values)

    def begin(self, name: str) -> None:
        """Says what comes next, so that whoever reads on knows in what a process died."""
        self.write({"begun": name})

    def text(self, file: str, text: str, **values: Any) -> None:
        """Adds text to one of `folder.TEXTS`."""
        self.write({"file": file, "text": text} | values)

    def write(self, values: Mapping[str, Any]) -> None:
        """A line in one piece."""
        left = memoryview((json.dumps(values, default=str) + "\n").encode())
        while left:
            left = left[os.write(self._descriptor, left) :]

    @cached_property
    def device(self) -> "torch.device | None":
        """To run on: the GPU, the CPU in Triton's interpreter, or none."""
        import torch

        if _is_interpreted():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    @property
    def on_gpu(self) -> bool:
        """Whether there is a CUDA GPU, and not the interpreter."""
        return self.device is not None and self.device.type == "cuda"

    def can_run(self) -> bool:
        """Whether the probe can run here: on a GPU, or in the interpreter where that will do. A line says if not."""
        if self.device is not None and (self.on_gpu or not self.job["needs_gpu"]):
            return True
        self.emit(None, note=NO_GPU)
        return False

    @property
    def settings(self) -> "GpuSettings":
        """How much to do."""
        from proteinbert_fast.benchmark.gpu.settings import GpuSettings

        settings = GpuSettings().tiny() if self.job["tiny"] else GpuSettings()
        # A new case must not begin when the process is about to be ended.
        return replace(settings, limit_seconds=0.7 * self.seconds, precisions=(self.precision.name,))

    @property
    def precision(self) -> "Precision":
        """That the options name; bfloat16 where they name none."""
        from proteinbert_fast.benchmark.gpu.precision import PRECISIONS

        return PRECISIONS[self.options.get("precision", "bfloat16")]

    def bench(self, gradients: bool = False, **changes: Any) -> "Bench":
        """For timings, which are refused where a check of this run found a kernel wrong.

        Where the local block for Hopper is what is wrong, the portable one is timed; a line says so.

        Args:
            gradients: those of the backward pass are needed too.
            changes: of the settings.
        """
        from proteinbert_fast.benchmark.cost_model import Peaks
        from proteinbert_fast.benchmark.gpu.bench import Bench

        bench = Bench(replace(self.settings, **changes), self._say, self.device)
        decided, name = self.so_far["verdicts"], self.precision.name
        if (reason := verdicts.hopper_failed(decided, name)) is not None:
            self.run_portable(reason)
            self.emit(None, note=f"the portable local block runs: {reason}")
        for operation, why in verdicts.failed(decided, name, gradients).items():
            bench.failed[operation, name] = why
        if self.so_far["peaks"] is not None:
            bench.peaks = Peaks(**self.so_far["peaks"])
        return bench

    @staticmethod
    def run_portable(reason: str) -> None:
        """The portable local block runs in this process where that for Hopper would."""
        from proteinbert_fast.ops.kernels.local_block import distrust_hopper

        distrust_hopper(reason)

    def row(self, row: "Row", **more: Any) -> None:
        """A row of a report as a line: right, wrong and without a time, or not measured."""
        from proteinbert_fast.benchmark.timing import percentiles

        values: dict[str, Any] = {"check": row.case.name, "table": row.case.table, "dtype": row.case.dtype,
                                  "found": row.check, "note": row.note, "values": row.values}  # fmt: skip
        if row.seconds:
            values["seconds"] = percentiles(row.seconds)
            if amount := row.case.work.amount(row.case.unit):
                values["rate"] = [amount / values["seconds"]["p50"], row.case.unit]
        if row.of_matrix_rate:
            values["of_matrix_rate"] = percentiles(row.of_matrix_rate)["p50"]
        self.emit({"measured": True, "wrong": False}.get(row.status), **values, **more)

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Compiled:
    """Counts what Triton compiles and what it finds in its cache."""

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self.seconds = 0.0

    def watch(self) -> None:
        """Begins to count, where Triton is there and tells."""
        try:
            from triton import knobs

            knobs.compilation.listener = self._hear
        except (ImportError, AttributeError):
            pass

    def _hear(self, *, times: Any = None, cache_hit: bool = False, **_: Any) -> None:
        self.hits, self.misses = self.hits + cache_hit, self.misses + (not cache_hit)
        self.seconds += float(getattr(times, "total", 0) or 0) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """For the last line."""
        return {"hits": self.hits, "misses": self.misses, "seconds": round(self.seconds, 2)}


def main() -> int:
    """Runs the job; its lines go to standard output, and nothing else does."""
    job = json.loads(Path(sys.argv[1]).read_text())
    is_below = job.get("below", False)  # a tool, not the runner, has started it
    # If the runner is killed, nobody would end this process. Of a tool, it would be the thread that started this one.
    if sys.platform == "linux" and not is_below:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    descriptor = os.dup(1)
    os.set_inheritable(descriptor, False)
    os.dup2(2, 1)  # what libraries print is no line
    faulthandler.enable()
    if job["seconds"] > 4:
        # Says where it hangs, before it is ended.
        faulthandler.dump_traceback_later(job["seconds"] - 2, exit=is_below)
    context = Context(job, descriptor)
    compiled = Compiled()
    if _is_interpreted() and job["needs_gpu"]:
        context.emit(None, note=NO_GPU)  # before anything large is imported
        context.write({"done": True})
        return 0
    if _is_interpreted():
        _mend_interpreter()
    if not job["options"].get("plain"):
        compiled.watch()
    try:
        import_module(job["module"]).run(context)
    except Exception as error:
        from proteinbert_fast.errors import first_line

        context.emit(False, found=first_line(error))
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    context.write({"done": True, "compiled": compiled.to_dict()})
    return 0


def _is_interpreted() -> bool:
    """As `launching.is_interpreted`, which needs triton."""
    return os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


def _mend_interpreter() -> None:
    """Triton's interpreter computes bfloat16 wrongly; the tests know how to mend it."""
    try:
        from tests.ops.kernels import interpreter
    except ImportError:
        return
    interpreter.mend()


if __name__ == "__main__":
    sys.exit(main())
