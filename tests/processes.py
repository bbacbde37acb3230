"""Processes that tests start and expect to end."""

import os
import sys
import time
from pathlib import Path


def ends(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process is gone, or a zombie that nobody here can reap, within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if _is_gone(pid):
            return True
        time.sleep(0.05)
    return False


def _is_gone(pid: int) -> bool:
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False
