"""``proteinbert-fast bench``: speed and memory on this machine, beside other implementations."""

import argparse
import sys
import time
from pathlib import Path

from proteinbert_fast.benchmark.registry import GROUPS
from proteinbert_fast.benchmark.settings import DTYPES, Settings
from proteinbert_fast.cli.arguments import names, positive

TUNED_DTYPES = ("bfloat16", "float16", "tf32", "float32")

EPILOG = """\
Every result is checked before it is timed; a wrong one is shown as WRONG, without a time, and the exit code is 1.
docs/benchmarks.md says what each row means. For numbers worth keeping, let nothing else run meanwhile.

examples:
  proteinbert-fast bench                                  # everything, about eight minutes on two cores
  proteinbert-fast bench --groups forward --rounds 15
  proteinbert-fast bench --quick --fasta mine.fasta
  proteinbert-fast bench --tune                           # find and keep the fastest kernels for this GPU
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    """Add the command to the program's parser."""
    defaults = Settings()
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory on this machine",
        description="Measure speed and memory on this machine, beside other implementations on the same proteins.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--groups", type=names(tuple(GROUPS)), default=tuple(GROUPS), metavar="A,B", help=f"of {', '.join(GROUPS)}"
    )
    parser.add_argument("--dtypes", type=names(DTYPES), default=DTYPES, metavar="A,B", help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--rounds", type=positive, default=defaults.rounds, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--proteins", type=positive, default=defaults.proteins, metavar="N", help="at most; default: %(default)s"
    )
    parser.add_argument("--fasta", metavar="F", help="draw them from this file, not from the 400 that come along")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: benchmarks/results/DATE-DEVICE in a checkout, else proteinbert-fast-bench/DATE-DEVICE",
    )
    parser.add_argument(
        "--tune",
        type=names(TUNED_DTYPES),
        nargs="?",
        const=TUNED_DTYPES,
        metavar="A,B",
        help="measure nothing; find the fastest configuration of each GPU kernel and use it from now on on this "
        f"machine; for states in these dtypes, of {', '.join(TUNED_DTYPES)} (default: all)",
    )
    parser.add_argument(
        "--d-local",
        type=positive,
        default=128,
        metavar="N",
        help="with --tune: width of the local states; %(default)s",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything works")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the reports; returns the exit code.

    Raises:
        InputError: the proteins cannot be used, or there is no GPU to tune for.
    """
    if args.tune:
        return _tune(args)
    from proteinbert_fast.benchmark import report as reports
    from proteinbert_fast.benchmark.picture import draw
    from proteinbert_fast.benchmark.run import run as measure
    from proteinbert_fast.errors import InputError

    settings = Settings(dtypes=args.dtypes, rounds=args.rounds, proteins=args.proteins, fasta=args.fasta)
    if args.quick:
        settings = settings.quick()
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {line}", file=sys.stderr)

    report = measure(settings, args.groups, say)
    folder = args.output or reports.default_folder(report.environment)
    written = reports.write(report, folder)
    print(report.to_markdown())
    try:
        picture = folder / reports.PICTURE_NAME
        draw(report, picture)
        written.append(picture)
    except InputError as error:
        print(f"proteinbert-fast: note: {error}", file=sys.stderr)
    print("written: " + ", ".join(str(path) for path in written), file=sys.stderr)
    for row in report.wrong:
        print(f"proteinbert-fast: error: WRONG: {row.case.label}: {row.check}", file=sys.stderr)
    return 1 if report.wrong else 0


def _tune(args: argparse.Namespace) -> int:
    from proteinbert_fast.benchmark.tune import tune

    written = tune(args.tune, [args.d_local], lambda line: print(line, file=sys.stderr, flush=True))
    print(f"written: {written}", file=sys.stderr)
    return 0
