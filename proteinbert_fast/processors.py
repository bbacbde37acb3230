"""How many processors this process may use: its affinity, and the CPU limits of its control groups (containers)."""

import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PROC = Path("/proc/self")


def usable_processors() -> int:
    """Processors that threads of this process can run on at the same time, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return allowed if limit is None else max(min(allowed, math.ceil(limit)), 1)


def limit_threads() -> None:
    """Has PyTorch start with no more threads than can run at once, unless it is loaded already.

    It asks for the processors of the machine or of this process's affinity, and knows no control groups: in a container
    of two CPUs on a machine of 64 it would run 64 threads, which wait for each other.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    processors = usable_processors()
    if "torch" not in sys.modules and (int(threads) > processors if threads.isdecimal() else cpu_limit() is not None):
        os.environ["OMP_NUM_THREADS"] = str(processors)


@cache
def cpu_limit(proc: Path = _PROC) -> float | None:
    """Processors' worth of time that the control groups grant, or None where they set no limit; read once.

    A group's limit holds for all groups below it, so the least counts. Both versions of control groups are read:
    ``cpu.max`` of the second, ``cpu.cfs_quota_us`` of the first.

    Args:
        proc: where the kernel describes the process.
    """
    limits = [limit for folder in _groups(proc) if (limit := _limit_of(folder)) is not None]
    return min(limits, default=None)


def _groups(proc: Path) -> Iterator[Path]:
    """Folders of the groups that the process is in, each with those above it as far as they can be seen."""
    try:
        memberships = (proc / "cgroup").read_text().splitlines()
        mounts = (proc / "mountinfo").read_text().splitlines()
    except OSError:
        return
    paths = {}
    for line in memberships:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            paths["cgroup" if controllers else "cgroup2"] = path
    for line in mounts:
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(" ")[-1].split(",")):
            continue
        root, top = (_unescaped(field) for field in before.split(" ")[3:5])
        # A container sees its own group as the root, under the path that the host gave it.
        path = paths[kind].removeprefix(root.rstrip("/")) if paths[kind].startswith(root) else ""
        folder = Path(top) / path.strip("/")
        while True:
            yield folder
            if folder == Path(top) or folder == folder.parent:
                break
            folder = folder.parent


def _unescaped(field: str) -> str:
    """Of mountinfo, which writes spaces and the like in octal."""
    return field.encode().decode("unicode_escape") if "\\" in field else field


def _limit_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        if quota == "max" or int(quota) <= 0:
            return None
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
