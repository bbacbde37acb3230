"""The program: commands, exit codes, errors of one line, quick help."""

import logging
import subprocess
import sys

import pytest

import proteinbert_fast
from proteinbert_fast.cli import main as program
from proteinbert_fast.cli.main import COMMANDS, main
from proteinbert_fast.errors import InputError

RUN = "import sys; from proteinbert_fast.cli.main import main; sys.exit(main())"


@pytest.mark.parametrize("argument", ["--help", "-h"])
def test_help_lists_the_commands(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 0
    out = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert name in out
        assert line in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"proteinbert-fast {proteinbert_fast.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["embed"], ["embed", "x.fasta"], ["embed", "x", "-o", "y", "--per", "atom"]]
)
def test_wrong_use(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: proteinbert-fast")


def test_help_needs_neither_torch_nor_h5py() -> None:
    code = (
        "import sys; from proteinbert_fast.cli.main import main; main(['--help']); main(['embed', '--help']);"
        "assert not {'torch', 'numpy', 'h5py', 'tqdm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


class Command:
    """Stands in for a command's module."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def add_parser(self, subparsers):  # type: ignore[no-untyped-def]
        return subparsers.add_parser("embed")

    def run(self, args: object) -> int:
        logging.getLogger("proteinbert_fast").warning("look: %s", "out")
        logging.getLogger("proteinbert_fast").info("by the way")
        if self.error is not None:
            raise self.error
        return 0


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (InputError("in.fasta:3: bad\nrecord"), 1, "proteinbert-fast: error: in.fasta:3: bad record\n"),
        (
            PermissionError(13, "Permission denied", "x.h5"),
            1,
            "proteinbert-fast: error: x.h5: Permission denied\n",
        ),
        (OSError("odd"), 1, "proteinbert-fast: error: odd\n"),
        (KeyboardInterrupt(), 130, "proteinbert-fast: interrupted\n"),
        (program._Terminated(), 143, "proteinbert-fast: interrupted\n"),
    ],
)
def test_exit_codes_and_lines(
    error: BaseException | None,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "import_module", lambda name: Command(error))
    assert main(["embed"]) == code
    assert capsys.readouterr().err == (
        f"proteinbert-fast: warning: look: out\nproteinbert-fast: note: by the way\n{line}"
    )
    assert logging.getLogger("proteinbert_fast").handlers == []


def test_debug_shows_where_an_error_arose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "import_module", lambda name: Command(InputError("bad")))
    monkeypatch.setenv("PROTEINBERT_FAST_DEBUG", "1")
    with pytest.raises(InputError, match="bad"):
        main(["embed"])


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "import_module", lambda name: Command(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["embed"])


def test_nobody_reads_the_output() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=120) == 141
