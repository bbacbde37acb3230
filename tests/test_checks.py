"""What the whole check leaves to `make test-long`: nothing is in neither, and CONTRIBUTING.md lists it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import missing

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
MARKED = re.compile(r"pytest\.mark\.long\b")


def marked() -> set[str]:
    """The files with tests that are marked long."""
    files = (path for path in TESTS.rglob("test_*.py") if path != Path(__file__))
    return {path.relative_to(ROOT).as_posix() for path in files if MARKED.search(path.read_text("utf-8"))}


def test_what_is_long_is_listed() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = re.findall(r"^\| `(tests/[\w/]+\.py)`", page, re.MULTILINE)
    assert sorted(listed) == sorted(marked())


SUITE = """
import pytest
@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.slow)])
def test_numbers(n): ...
@pytest.mark.long
def test_long(): ...
"""


def test_every_test_runs_with_one_setting_alone(tmp_path: Path) -> None:
    """Whatever else chooses among them: here all that are not slow."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_some.py").write_text(SUITE)

    def collected(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *options]
        command += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr
        return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]

    assert collected() == ["test_numbers[1]", "test_numbers[3]"]
    assert collected("--long", "only") == ["test_numbers[2]", "test_long"]
    assert collected("--long", "only", "-m", "not slow") == ["test_numbers[2]", "test_long"]


def test_a_missing_tool_fails_where_the_whole_check_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"no objdump \(a skip where CI is not true\)"):
        missing("no objdump")
    for value in ("false", ""):
        monkeypatch.setenv("CI", value)
        with pytest.raises(pytest.skip.Exception, match="no objdump"):
            missing("no objdump")
