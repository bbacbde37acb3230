"""What can be done before a GPU is there: extensions built, kernels compiled, and how much must travel."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from benchmarks.first.cache import warm
from benchmarks.first.runner import ROOT, TRITON_CACHE

PYTHON, TRITON = "3.12", "3.6.0"
MOST_BYTES = 64 << 20


def prepare(root: Path = ROOT) -> int:
    """Builds, compiles and counts; the exit code is 1 where something failed or is too large to travel."""
    version, triton = ".".join(map(str, sys.version_info[:2])), triton_version()
    if (version, triton) != (PYTHON, TRITON):
        print(f"prepare: note: what is built here is for Python {version} and triton {triton} alone; a GPU machine may "
              f"have Python {PYTHON} and triton {TRITON}", flush=True)  # fmt: skip
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=root, check=False)
    if done.returncode:
        print(f"prepare: error: the extensions were not built: exit code {done.returncode}", file=sys.stderr)
        return 1
    print(f"prepare: extensions built for Python {version}", flush=True)
    print(f"prepare: {warm(TRITON_CACHE)}")
    try:
        sizes = {"checked in, and not ignored": _size(root, _kept(root)), "extensions": _size(root, _extensions(root)),
                 "compiled kernels": _size(root, _cached(root))}  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"prepare: error: this is no git checkout that can be counted: {error}", file=sys.stderr)
        return 1
    total = sum(sizes.values())
    for name, size in sizes.items():
        print(f"{size / 2**20:8.1f} MiB  {name}")
    print(f"{total / 2**20:8.1f} MiB  of {MOST_BYTES >> 20} that may travel")
    if total > MOST_BYTES:
        print("prepare: error: that is too much: ignore or remove files", file=sys.stderr)
        return 1
    return 0


def triton_version() -> str | None:
    """Of Triton, or None where it is not installed."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _kept(root: Path) -> list[str]:
    """Tracked files, and those that are new and not ignored."""
    found: list[str] = []
    for options in (["--cached"], ["--others", "--exclude-standard"]):
        command = ["git", "ls-files", "-z", *options]
        output = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        found += [os.fsdecode(name) for name in output.split(b"\0") if name]
    return found


def _extensions(root: Path) -> list[str]:
    """Of this Python only: those of others need not travel."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
    return [str(path.relative_to(root)) for path in (root / "proteinbert_fast").glob(f"*{suffix}")]


def _cached(root: Path) -> list[str]:
    folder = root / TRITON_CACHE.name
    return [str(path.relative_to(root)) for path in folder.rglob("*") if path.is_file()]


def _size(root: Path, names: Iterable[str]) -> int:
    return sum((root / name).lstat().st_size for name in set(names) if (root / name).exists())
