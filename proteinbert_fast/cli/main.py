"""``proteinbert-fast``: finds the command, runs it, and turns errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted (Ctrl-C), 141 nobody read the output, 143
terminated.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NoReturn

from proteinbert_fast._version import __version__
from proteinbert_fast.errors import ProteinBertError
from proteinbert_fast.processors import limit_threads

PROGRAM = "proteinbert-fast"
DEBUG = "PROTEINBERT_FAST_DEBUG"

# Name: module with add_parser(subparsers) and run(args), and a line of help. Only the command that is asked for is
# imported, so that the others cost nothing.
COMMANDS = {
    "embed": ("proteinbert_fast.cli.embed", "embed the proteins of FASTA files to an HDF5 file"),
    "build-corpus": (
        "proteinbert_fast.cli.build_corpus",
        "build a corpus from UniRef, UniProtKB or FASTA files",
    ),
    "corpus": ("proteinbert_fast.cli.corpus", "look at a corpus, or check it"),
    "pretrain": ("proteinbert_fast.cli.pretrain", "pretrain a model on a corpus"),
    "plot-pretraining": ("proteinbert_fast.cli.plot_pretraining", "draw the losses of a pretraining run"),
    "convert": ("proteinbert_fast.cli.convert", "convert checkpoints from and to the original's pickle"),
    "doctor": ("proteinbert_fast.cli.doctor", "show versions, devices and back ends, and run a self-check"),
    "compile-kernels": (
        "proteinbert_fast.cli.compile_kernels",
        "compile the GPU kernels ahead, without a GPU too",
    ),
    "bench": ("proteinbert_fast.cli.bench", "measure speed and memory on this machine"),
}


class _Terminated(KeyboardInterrupt):
    """SIGTERM: the same as Ctrl-C but for the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit code.

    Args:
        argv: arguments after the program's name; those of this process when None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    limit_threads()
    try:
        with _console(), _terminable():
            args = _parser(name).parse_args(arguments)
            code: int = import_module(COMMANDS[args.command][0]).run(args)
            sys.stdout.flush()
            return code
    except SystemExit as exit_:  # argparse: --help, --version, wrong use
        return exit_.code if isinstance(exit_.code, int) else 2
    except BrokenPipeError:
        # Nobody reads on, as in `proteinbert-fast doctor | head -1`. Python flushes stdout once more at its
        # exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as interrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 143 if isinstance(interrupt, _Terminated) else 130
    except (ProteinBertError, OSError) as error:
        if os.environ.get(DEBUG):
            raise
        print(f"{PROGRAM}: error: {_line(error)}", file=sys.stderr)
        return 1


def _parser(named: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="ProteinBERT, fast: embeddings of proteins on CPUs and GPUs.",
        epilog=f"Exit codes: 0 done, 1 failed, 2 wrong use, 130 interrupted. {DEBUG}=1 shows where an error arose.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        if name == named:
            import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=help_line)
    return parser


def _line(error: Exception) -> str:
    """An error as one line."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


class _ConsoleHandler(logging.Handler):
    """What the library has to say, a line each on stderr; a progress bar makes way for it."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        line = f"{PROGRAM}: {level}: {record.getMessage()}"
        tqdm = sys.modules.get("tqdm")
        if tqdm is None:
            print(line, file=sys.stderr)
        else:
            tqdm.tqdm.write(line, file=sys.stderr)


@contextmanager
def _console() -> Iterator[None]:
    logger = logging.getLogger("proteinbert_fast")
    handler, level = _ConsoleHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextmanager
def _terminable() -> Iterator[None]:
    """Batch systems end jobs with SIGTERM: work that is done is kept then, as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
