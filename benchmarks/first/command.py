"""The command line of ``gpu_first.py``. Nothing heavy is imported: what may crash runs in processes of its own."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.first import fakes, schedule
from benchmarks.first.cache import relocate
from benchmarks.first.folder import Folder
from benchmarks.first.runner import TRITON_CACHE, Ended, Probe, Runner
from benchmarks.first.summary import summary

PROGRAM = "gpu_first"
SECONDS = 420.0
DRY_SECONDS = 300.0
# Checks side by side: their time is mostly the compiler's and PyTorch's start.
MOST_PROCESSES = 10
EPILOG = """\
Each probe runs in a process of its own and prints JSON lines, which go to FOLDER/first.jsonl at once. The exit code is
1 if a probe found something wrong, died or hung. docs/benchmarks.md says more.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is asked; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        probes = schedule.chosen(args.only or [])
    except ValueError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    if args.list:
        print(schedule.table(probes))
        return 0
    if args.prepare:
        from benchmarks.first.prepare import prepare

        return prepare()
    try:
        if args.dry_run:
            return dry_run(probes, args.output)
        if args.output is None:
            print(f"{PROGRAM}: error: say where results go: --output FOLDER", file=sys.stderr)
            return 2
        folder = Folder(args.output)
        relocate(TRITON_CACHE)
        ended = _run(probes, folder, args.seconds)
    except OSError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    return 0 if _all_right(ended) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Check and time every kernel on a GPU that none of them has run on.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for results; it must not hold an earlier run")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N",
                        help="for everything; default: %(default).0f")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="NAME", help="probes whose names begin so")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="show the probes in their order")
    what.add_argument("--dry-run", action="store_true",
                      help="without a GPU: probes that go wrong, small checks in Triton's interpreter")  # fmt: skip
    what.add_argument("--prepare", action="store_true",
                      help="without a GPU: build extensions, compile kernels, say how much must travel")  # fmt: skip
    return parser


def _run(probes: Sequence[Probe], folder: Folder, seconds: float, tiny: bool = False,
         environment: dict[str, str] | None = None) -> list[Ended]:  # fmt: skip
    """Runs probes and prints the summary last."""
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", file=sys.stderr, flush=True)

    def stop(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    width = max(1, min(MOST_PROCESSES, os.cpu_count() or 1))
    runner = Runner(folder, seconds, width=width, tiny=tiny, environment=environment, say=say, summarize=summary)
    try:
        return runner.run(probes)
    finally:
        signal.signal(signal.SIGTERM, before)
        print(summary(folder.lines), end="", flush=True)


def _all_right(ended: Sequence[Ended]) -> bool:
    return all(probe.well and not probe.wrong for probe in ended)


def dry_run(probes: Sequence[Probe], output: Path | None) -> int:
    """Without a GPU: fakes must be recorded as they are, and the small checks must pass; the exit code."""
    with tempfile.TemporaryDirectory(prefix="proteinbert-first-") as temporary:
        folder = Folder(output or Path(temporary) / "dry-run")
        fake = Path(temporary) / "fakes"
        faked = Folder(fake)
        _run(fakes.probes(), faked, DRY_SECONDS)
        failures = fakes.failures(faked.lines)
        # bfloat16 only: the interpreter takes seconds for what takes a GPU milliseconds.
        small = [probe for probe in probes if "float16" not in probe.name.replace("bfloat16", "")]
        small = [probe for probe in small if "float32" not in probe.name]
        alone = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        ended = _run(small, folder, DRY_SECONDS, tiny=True, environment=alone)
    for line in failures:
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    for probe in ended:
        if not probe.well or probe.wrong:
            print(f"{PROGRAM}: error: {probe.name}: {probe.end}, {probe.wrong} wrong", file=sys.stderr)
    return 1 if failures or not _all_right(ended) else 0
