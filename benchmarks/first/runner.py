"""Runs probes in processes of their own and keeps what they print, whatever becomes of them. Standard library only.

A probe prints JSON lines. One that dies, hangs, prints something else, half a line or without end costs its own lines:
its process group is ended, and the next one begins.
"""

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.first.folder import SUMMARY, TEXTS, Folder

ROOT = Path(__file__).resolve().parents[2]
TRITON_CACHE = ROOT / ".triton-cache"
# Of one probe: a process that prints more has lost its way.
MOST_PRINTED = 4 << 20
MOST_LINE = 1 << 20  # texts of tools come as one line
MOST_LOGGED = 1 << 20
OUT_OF_TIME = "not run: out of time"
_KEPT_SECONDS = 4.0  # of the whole, for ending what still runs and for the summary
_CHUNK = 1 << 16
# By which processes of a probe are known that left its process group.
_MARK = "PROTEINBERT_FIRST_PROBE"


@dataclass(frozen=True)
class Probe:
    """One process.

    Attributes:
        name: in lines and on the command line.
        module: its ``run(context)`` does the work.
        seconds: it may take.
        alone: nothing runs beside it; for whatever is timed.
        least: seconds under which it is not worth beginning.
        needs_gpu: Triton's interpreter will not do.
        options: for the module; what JSON can hold.
        decides: keys of `verdicts` that its lines must give; what is missing when it ends badly is wrong.
    """

    name: str
    module: str
    seconds: float
    alone: bool = True
    least: float = 10.0
    needs_gpu: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    decides: tuple[str, ...] = ()


class Ended(NamedTuple):
    """How a probe ended: in words, whether well, how many of its lines say that something is wrong."""

    name: str
    end: str
    well: bool
    wrong: int


class _Process:
    """A probe that runs."""

    def __init__(self, probe: Probe, popen: "subprocess.Popen[bytes]", mark: str, seconds: float) -> None:
        self.probe, self.popen, self.mark, self.seconds = probe, popen, mark, seconds
        self.started = time.monotonic()
        self.rest = b""
        self.printed = self.logged = self.garbage = self.wrong = self.right = 0
        self.begun: str | None = None
        self.done: dict[str, Any] | None = None
        self.left: bytearray = bytearray()  # of standard error, beyond what goes to the log at once

    @property
    def age(self) -> float:
        return time.monotonic() - self.started


class Runner:
    """One run.

    Args:
        folder: for results.
        seconds: for everything.
        width: processes side by side at most.
        tiny: probes take the smallest sizes.
        environment: of the processes, beside this one's.
        say: is told what goes on, a line each.
        summarize: gives the summary of all lines so far.
    """

    def __init__(
        self,
        folder: Folder,
        seconds: float,
        *,
        width: int,
        tiny: bool = False,
        environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] = lambda _: None,
        summarize: Callable[[Sequence[Mapping[str, Any]]], str] = lambda _: "",
    ) -> None:
        self.folder, self.width, self.tiny, self.say, self.summarize = folder, width, tiny, say, summarize
        self.begun = time.monotonic()
        self.deadline = self.begun + seconds - min(_KEPT_SECONDS, seconds / 10)
        self.ended: list[Ended] = []
        self.so_far: dict[str, Any] = {"verdicts": {}, "peaks": None, "tuned": {}, "failed": []}
        self._environment = dict(environment or {})
        self._running: list[_Process] = []
        self._listening = selectors.DefaultSelector()
        self._count = 0

    def run(self, probes: Sequence[Probe]) -> list[Ended]:
        """Runs all, in this order, and writes the summary after each; how they ended."""
        # A dump of a process that holds a GPU's memory takes longer than most probes.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        waiting = deque(probes)
        with tempfile.TemporaryDirectory(prefix="proteinbert-first-") as scratch:
            self._scratch = Path(scratch)
            try:
                while waiting or self._running:
                    self._start(waiting)
                    self._listen()
                    self._reap()
            finally:
                for process in list(self._running):
                    self._finish(process, "ended: the run was interrupted")
        return self.ended

    def _start(self, waiting: deque[Probe]) -> None:
        while waiting:
            probe, left = waiting[0], self.deadline - time.monotonic()
            if left < min(probe.least, probe.seconds):
                self._record(waiting.popleft(), OUT_OF_TIME, well=False, ok=None)
                continue
            alone = probe.alone or any(process.probe.alone for process in self._running)
            if self._running and (alone or len(self._running) >= self.width):
                return
            self._spawn(waiting.popleft(), min(probe.seconds, left))

    def _spawn(self, probe: Probe, seconds: float) -> None:
        self._count += 1
        mark = f"{os.getpid()}.{self._count}.{time.time_ns()}"
        job = self._scratch / f"{self._count}.json"
        values = {"name": probe.name, "module": probe.module, "options": dict(probe.options), "tiny": self.tiny,
                  "needs_gpu": probe.needs_gpu, "seconds": seconds, "so_far": self.so_far,
                  "scratch": str(self._scratch)}  # fmt: skip
        job.write_text(json.dumps(values))
        try:
            popen = subprocess.Popen(
                command_of(job),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=ROOT,
                env=self._environment_of(probe) | {_MARK: mark},
                start_new_session=True,
            )
        except OSError as error:
            self._record(probe, f"could not be started: {error}", well=False, ok=False)
            return
        process = _Process(probe, popen, mark, seconds)
        self._running.append(process)
        for stream in (popen.stdout, popen.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self._listening.register(stream, selectors.EVENT_READ, process)
        self.say(f"{probe.name} (at most {seconds:.0f} s)")

    def _environment_of(self, probe: Probe) -> dict[str, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        # No tuned table and no verdict of an earlier run.
        found["PROTEINBERT_FAST_CACHE"] = str(self._scratch / "cache")
        if TRITON_CACHE.is_dir():
            found["TRITON_CACHE_DIR"] = str(TRITON_CACHE)
        if not probe.alone:
            found["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.width))
        return found | self._environment

    def _listen(self) -> None:
        now = time.monotonic()
        ends = [process.started + process.seconds for process in self._running]
        wait = min([0.1, *(max(end - now, 0.0) for end in ends)])
        if not self._listening.get_map():
            time.sleep(wait)
            return
        for key, _ in self._listening.select(wait):
            self._read(key.data, key.fileobj)

    def _read(self, process: _Process, stream: Any) -> bool:
        """Takes what has come; whether anything had."""
        try:
            data = os.read(stream.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._listening.unregister(stream)
            stream.close()
            return False
        if stream is process.popen.stderr:
            self._log(process, data)
            return True
        process.printed += len(data)
        *lines, process.rest = (process.rest + data).split(b"\n")
        self._garbage(process, [line + b"\n" for line in lines if line.strip() and not self._line(process, line)])
        if len(process.rest) > MOST_LINE:
            self._garbage(process, [process.rest])
            process.rest = b""
        return True

    def _line(self, process: _Process, line: bytes) -> bool:
        """Keeps a line of a probe; False where it is none."""
        try:
            # Most of what is no line does not begin like one.
            values = json.loads(line) if line.startswith(b"{") and len(line) <= MOST_LINE else None
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict) or process.done is not None:
            return False
        if "done" in values:
            process.done = values
            return True
        if "begun" in values:
            process.begun = str(values["begun"])
        if "file" in values and "text" in values:
            name, text = values["file"], str(values.pop("text"))
            if name not in TEXTS:
                return False
            self.folder.text(name, text)
            values["characters"] = len(text)
        ok = values.get("ok")
        process.wrong += ok is False
        process.right += ok is True
        if isinstance(key := values.get("decides"), str) and isinstance(ok, bool):
            self.so_far["verdicts"][key] = None if ok else str(values.get("found"))
        if isinstance(values.get("peaks"), dict):
            self.so_far["peaks"] = values["peaks"]
        if isinstance(values.get("tuned"), dict):
            self.so_far["tuned"] |= values["tuned"]
        self.folder.line({"probe": process.probe.name, "at": round(time.monotonic() - self.begun, 2)} | values)
        return True

    def _garbage(self, process: _Process, lines: Sequence[bytes]) -> None:
        process.garbage += len(lines)
        if lines:
            self._log(process, b"".join(lines))

    def _log(self, process: _Process, data: bytes) -> None:
        """The beginning goes to the log at once, of the rest the end when the process has ended."""
        most = MOST_LOGGED // 2
        if process.logged >= most:
            process.left += data
            if len(process.left) > 2 * most:
                del process.left[:-most]
            return
        # Lines of processes side by side are told apart by their beginning.
        start = f"[{process.probe.name}] ".encode()
        marked = b"".join(start + line + b"\n" for line in data.splitlines())[: most - process.logged]
        process.logged += len(marked)
        self.folder.log(marked)

    def _reap(self) -> None:
        for process in list(self._running):
            end = self._end_of(process)
            if end is not None:
                self._finish(process, end)

    def _end_of(self, process: _Process) -> str | None:
        """How a process has ended or must end now; None while it may run."""
        if process.printed > MOST_PRINTED:
            return f"ended: it printed more than {MOST_PRINTED >> 20} MiB"
        # Not waited for before its group is ended: until then its number belongs to no other.
        found = os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            if found.si_code == os.CLD_EXITED:
                return "finished" if found.si_status == 0 else f"exit code {found.si_status}"
            return f"died of {signal.Signals(found.si_status).name}"
        if process.age > process.seconds:
            return f"hung: ended after {process.seconds:.0f} s"
        return None

    def _finish(self, process: _Process, end: str) -> None:
        """Ends whatever is left of a process, takes what it had printed, and records how it ended."""
        _kill_group(process.popen.pid)
        _kill_marked(process.mark)
        for stream in (process.popen.stdout, process.popen.stderr):
            while stream is not None and not stream.closed and process.printed <= MOST_PRINTED:
                if not self._read(process, stream):
                    break
            if stream is not None and not stream.closed:
                self._listening.unregister(stream)
                stream.close()
        try:
            process.popen.wait(5)
        except subprocess.TimeoutExpired:
            end += "; it does not end, the driver may hold it"
        self._running.remove(process)
        if process.rest:
            self._garbage(process, [process.rest + b"\n"])
            end += "; its last line is torn"
        if end == "finished" and process.done is None:
            end = "exit code 0 before it was done"
        if process.left:
            last = bytes(process.left[-MOST_LOGGED // 2 :])
            self.folder.log(f"[{process.probe.name}] [...]\n".encode() + last + b"\n")
        well = end == "finished"
        where = f", in {process.begun}" if process.begun and not well else ""
        more = {key: value for key, value in (process.done or {}).items() if key != "done"}
        if process.garbage:
            more["garbage"] = process.garbage
        # Nothing wrong is not right where nothing was measured.
        ok = (None if not process.right else True) if well and not process.wrong else False
        self._record(process.probe, end + where, well, ok, process, **more)

    def _record(
        self, probe: Probe, end: str, well: bool, ok: bool | None, process: _Process | None = None, **more: Any
    ) -> None:
        decided: dict[str, str | None] = self.so_far["verdicts"]
        if process is not None and not well:
            for key in probe.decides:
                decided.setdefault(key, end)
        wrong = process.wrong if process else 0
        if ok is False:
            self.so_far["failed"].append(probe.name)
        seconds = round(process.age, 2) if process else 0.0
        line = {"probe": probe.name, "at": round(time.monotonic() - self.begun, 2), "ok": ok, "end": end,
                "seconds": seconds, "wrong": wrong}  # fmt: skip
        self.folder.line(line | more, of_runner=True)
        self.ended.append(Ended(probe.name, end, well, wrong))
        self.folder.replace(SUMMARY, self.summarize(self.folder.lines))
        self.say(f"{probe.name}: {end}, {seconds:.1f} s" + (f", {wrong} WRONG" if wrong else ""))


def command_of(job: Path) -> list[str]:
    """What runs a job's file as a process."""
    return [sys.executable, "-m", "benchmarks.first.process", str(job)]


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _kill_marked(mark: str) -> None:
    """Ends processes of a probe that left its group: the environment that they inherited names it."""
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in entry.read_bytes().split(b"\0"):
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue
