"""The command line of a GPU report."""

import argparse
import faulthandler
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from proteinbert_fast.benchmark import report as reports
from proteinbert_fast.benchmark.gpu import sections
from proteinbert_fast.benchmark.gpu.bench import NO_GPU, Bench
from proteinbert_fast.benchmark.gpu.picture import draw
from proteinbert_fast.benchmark.gpu.precision import PRECISIONS
from proteinbert_fast.benchmark.gpu.report import GpuReport, write
from proteinbert_fast.benchmark.gpu.settings import GpuSettings
from proteinbert_fast.benchmark.timing import Row
from proteinbert_fast.cli.arguments import names
from proteinbert_fast.errors import InputError, first_line
from proteinbert_fast.ops.backends import check_backend

PROGRAM = "gpu_report"
DEFAULT_SECONDS = 560.0
FIRST_SECONDS = 300.0
FIRST_SECTIONS = ("checks", "kernels", "profile", "forward", "latency")
EPILOG = """\
Every kernel is checked against the float64 reference before it is timed, those of the forward pass before anything
else; what is wrong is shown as WRONG, without a time, and the exit code is 1. Without a GPU the tables say what would
be measured; the exit code is 0. docs/benchmarks.md says what each row means. Let nothing else run on the GPU meanwhile.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; returns the exit code."""
    args = _parser().parse_args(arguments)
    settings = GpuSettings().tiny() if args.interpreter or args.tiny else GpuSettings()
    if args.first:
        args.sections, args.limit = args.sections or FIRST_SECTIONS, args.limit or FIRST_SECONDS
        settings = replace(settings, precisions=("bfloat16",), limit_seconds=0.8 * args.limit)
    args.sections, args.limit = args.sections or sections.SECTIONS, args.limit or DEFAULT_SECONDS
    if args.precisions:
        settings = replace(settings, precisions=args.precisions)
    try:
        device, obstacle = _device(args.interpreter)
        report = run(settings, args.sections, device, obstacle, args.output, args.limit)
        print(report.to_markdown())
        folder = _folder(report, args.output)
        if folder is not None:
            _write(report, folder, with_picture=True)
    except InputError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    lines = [f"{PROGRAM}: note: {obstacle}: nothing was measured"] if obstacle else report.summary()
    print("\n".join(lines), file=sys.stderr)
    for row in report.wrong:
        print(f"{PROGRAM}: error: WRONG: {row.case.label}: {row.check}", file=sys.stderr)
    return 1 if report.wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Check the kernels on this machine's GPU, measure them, and write tables, numbers and a picture.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = sections.SECTIONS
    parser.add_argument("--sections", type=names(known), metavar="A,B",
                        help=f"of {', '.join(known)}; without checks, kernels are not known to be right")  # fmt: skip
    parser.add_argument("--first", action="store_true",
                        help=f"the second run on a new GPU, after gpu_first.py: {', '.join(FIRST_SECTIONS)}, "
                        f"in bfloat16, in {FIRST_SECONDS:.0f} s")  # fmt: skip
    parser.add_argument("--precisions", type=names(tuple(PRECISIONS)), metavar="A,B",
                        help=f"of {', '.join(PRECISIONS)}")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR",
                        help="default: benchmarks/results/DATE-DEVICE in a checkout; without a GPU, none")  # fmt: skip
    parser.add_argument("--limit", type=float, metavar="SECONDS",
                        help="end the process after so long, whatever it does; "
                        f"default: {DEFAULT_SECONDS:.0f}")  # fmt: skip
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--interpreter", action="store_true",
                        help="tiny sizes in Triton's interpreter on the CPU, to see that everything works")  # fmt: skip
    return parser


def _device(interpreted: bool) -> tuple[torch.device | None, str | None]:
    """Where to run, or why nowhere.

    Raises:
        InputError: the interpreter was asked for and cannot run.
    """
    if interpreted:
        try:
            check_backend("triton")
        except RuntimeError as error:
            raise InputError(str(error)) from error
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        return None, NO_GPU
    try:
        check_backend("triton")
    except RuntimeError as error:
        return None, str(error)
    return torch.device("cuda", torch.cuda.current_device()), None


def run(
    settings: GpuSettings,
    names: Sequence[str],
    device: torch.device | None,
    obstacle: str | None,
    output: Path | None = None,
    limit_seconds: float = 0.0,
) -> GpuReport:
    """Runs sections one after another; what is found is written after each, so that a crash loses only its own.

    Args:
        settings: how much to do.
        names: of the sections.
        device: to run on, or None.
        obstacle: why there is none.
        output: folder to write to; None for the default one, which is used on a GPU only.
        limit_seconds: the process ends itself after so long; 0 for never.
    """

    def say(line: str) -> None:
        print(f"[{bench.seconds:4.0f} s] {line}", file=sys.stderr, flush=True)

    bench = Bench(settings, say, device, obstacle)
    report = GpuReport(settings, bench.environment, obstacle, {}, {})
    if limit_seconds and bench.on_gpu:
        # A kernel that never ends cannot be interrupted otherwise. Says where it hung.
        faulthandler.dump_traceback_later(limit_seconds, exit=True)
    try:
        for name in names:
            started = bench.seconds
            report.sections[name] = _rows(name, bench)
            report.seconds[name] = bench.seconds - started
            if not obstacle:
                say(f"{name}: took {report.seconds[name]:.0f} s")
            bench.tidy()
            folder = _folder(report, output)
            if folder is not None and not obstacle:
                _write(report, folder, with_picture=False)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return report


def _rows(name: str, bench: Bench) -> Sequence[Row]:
    """A section's rows. One that fails as a whole spoils only itself."""
    try:
        return sections.rows(name, bench)
    except InputError:
        raise
    except Exception as error:
        from proteinbert_fast.benchmark.gpu.sections.failed import row

        bench.say(f"{name} failed: {first_line(error)}")
        bench.tidy()
        return [row(name, error)]


def _folder(report: GpuReport, output: Path | None) -> Path | None:
    if output is not None:
        return output
    return reports.default_folder(report.environment) if report.environment["gpu"] else None


def _write(report: GpuReport, folder: Path, with_picture: bool) -> None:
    written = write(report, folder)
    if not with_picture:
        return
    try:
        draw(report, folder / reports.PICTURE_NAME)
        written.append(folder / reports.PICTURE_NAME)
    except InputError as error:
        print(f"{PROGRAM}: note: {error}", file=sys.stderr)
    print("written: " + ", ".join(map(str, written)), file=sys.stderr)
