"""Building without a compiler: one line that says what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("/nonexistent/c++", "(looked for '/nonexistent/c++'; CXX chooses another)"),
        ("/bin/false", "(the compiler's own message is above)"),
    ],
)
def test_a_missing_compiler_is_one_line(tmp_path: Path, compiler: str, why: str) -> None:
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    if not SETUP.exists() or not Path("/bin/false").exists():
        pytest.skip("needs the source tree and a POSIX system")
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={tmp_path}/o", f"--build-lib={tmp_path}"],
        cwd=SETUP.parent,
        env=os.environ | {"CC": compiler, "CXX": compiler},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 1
    assert "Traceback" not in build.stderr
    last = build.stderr.splitlines()[-1]
    assert last.startswith("error: proteinbert_fast needs a C++17 compiler and the headers of Python")
    assert "apt-get install g++ python3-dev" in last
    assert last.endswith(why)
