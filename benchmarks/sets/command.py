"""The command line of ``instruction_sets.py``."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.sets import holding, keras_peer, report
from benchmarks.sets.holding import InstructionSet
from benchmarks.sets.process import Failed, Run
from benchmarks.sets.report import SetsReport
from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.cases import Unavailable
from proteinbert_fast.cli.arguments import names, positive
from proteinbert_fast.errors import InputError

PROGRAM = "instruction_sets"
SECONDS = 3600.0  # of one set: only a process that hangs takes them
EPILOG = """\
Every result is checked before it is timed; a wrong one is shown as WRONG, without a time, and the exit code is 1.
docs/benchmarks.md says how each is held to its set. For numbers worth keeping, let nothing else run meanwhile.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, writes the reports; returns the exit code."""
    known = holding.known()
    args = _parser(tuple(known)).parse_args(arguments)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:4.0f} s] {line}", file=sys.stderr, flush=True)

    try:
        keras = keras_peer.environment(say) if args.keras else None
    except Unavailable as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    found = SetsReport(
        machine.environment(),
        args.size,
        {name: known[name] for name in known if name in args.sets},
        {name: holding.environment(known[name], tuple(known)) for name in known},
    )
    folder = args.output or report.default_folder(found.environment)
    measure(found, args.rounds, keras, say, lambda: report.write(found, folder))
    print(found.to_markdown())
    written = report.write(found, folder)
    try:
        written.append(report.draw(found, folder))
    except InputError as error:
        print(f"{PROGRAM}: note: {error}", file=sys.stderr)
    print("written: " + ", ".join(str(path) for path in written), file=sys.stderr)
    for line in [*(f"WRONG: {line}" for line in found.wrong), *(f"{n}: {why}" for n, why in found.failed.items())]:
        print(f"{PROGRAM}: error: {line}", file=sys.stderr)
    return 1 if found.wrong or found.failed else 0


def _parser(known: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Measure the model with each instruction set of this CPU, beside others held to the same set.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sets", type=names(known), default=known, metavar="A,B", help=f"of {', '.join(known)}")
    parser.add_argument("--rounds", type=positive, metavar="N", help="default: 5")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"default: benchmarks/results/DATE-DEVICE{report.SUFFIX}"
    )
    parser.add_argument(
        "--keras",
        action="store_true",
        help="the original Keras model too, in an environment of its own "
        f"({keras_peer.FOLDER.relative_to(keras_peer.ROOT)}); the first time it downloads TensorFlow",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="full",
                      help="small sizes, to see that everything works")  # fmt: skip
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help=argparse.SUPPRESS)
    return parser


def measure(
    found: SetsReport,
    rounds: int | None,
    keras: str | None,
    say: Callable[[str], None],
    keep: Callable[[], object],
) -> None:
    """Runs a process for each set, the best set first: it computes the reference's answers for all.

    Args:
        found: takes what they find.
        rounds: timings of each case; the size's own when None.
        keras: the Python of the Keras model's environment, or None.
        say: is told what goes on, a line each.
        keep: is called after each set.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="proteinbert-fast-sets-") as temporary:
        folder = Path(temporary)
        for name in reversed(found.sets):
            try:
                found.found[name] = _one(found.sets[name], found, rounds, keras, say, folder)
            except Failed as error:
                found.failed[name] = str(error)
                say(f"{name}: {error}")
            found.seconds = time.perf_counter() - started
            keep()


def _one(
    held: InstructionSet,
    found: SetsReport,
    rounds: int | None,
    keras: str | None,
    say: Callable[[str], None],
    folder: Path,
) -> dict[str, object]:
    job = {"set": held.name, "size": found.size, "rounds": rounds, "keras": keras, "folder": str(folder)}
    # Inductor keeps what it compiled by source, not by the vectors that it was compiled for.
    variables: Mapping[str, str] = {
        **found.variables[held.name],
        "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor-{held.name}"),
    }
    run = Run(job, variables, folder / f"{held.name}.log", lambda line: say(f"{held.name}: {line}"))
    values: dict[str, object] = json.loads(run.to_end(SECONDS).read_text())
    return values
