"""The folder of results: few files, none too large, whole at every moment. Standard library only."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LINES, SUMMARY, LOG, ENVIRONMENT = "first.jsonl", "first.md", "log.txt", "environment.json"
# What probes may write beside their lines; replaced as a whole where the name ends in .json, else appended to.
TEXTS = (ENVIRONMENT, "tuned.json", "profile.txt", "ncu.txt", "sanitizer.txt")
FILES = (LINES, SUMMARY, LOG, *TEXTS)
MOST_BYTES = {LINES: 12 << 20, LOG: 8 << 20}
MOST_TEXT_BYTES = 4 << 20
_KEPT_FOR_RUNNER = 1 << 20
CUT = "\n[cut here: the file has reached its limit]\n"


class Folder:
    """Where results go.

    Args:
        path: made if it is missing.

    Raises:
        FileExistsError: it holds an earlier run.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        if (path / LINES).exists():
            raise FileExistsError(f"{path} holds an earlier run: name another folder")
        self.path = path
        self.lines: list[dict[str, Any]] = []
        self._sizes: dict[str, int] = {}

    def line(self, values: Mapping[str, Any], of_runner: bool = False) -> None:
        """Adds a line to first.jsonl, written to the disk before this returns; left out when the file is full.

        Args:
            values: what JSON can hold.
            of_runner: how a probe ended, for which there is always room.
        """
        plain = _finite(dict(values))
        data = (json.dumps(plain) + "\n").encode()
        if self._append(LINES, data, MOST_BYTES[LINES] - (0 if of_runner else _KEPT_FOR_RUNNER), cut=b""):
            self.lines.append(plain)

    def log(self, data: bytes) -> None:
        """Adds to the log."""
        self._append(LOG, data, MOST_BYTES[LOG], CUT.encode())

    def text(self, name: str, text: str) -> None:
        """Adds text of a probe to a file of its own, or replaces that."""
        if name.endswith(".json"):
            self.replace(name, text[:MOST_TEXT_BYTES])
        else:
            self._append(name, text.encode(errors="replace"), MOST_TEXT_BYTES, CUT.encode())

    def replace(self, name: str, text: str) -> None:
        """Writes a file as a whole: a reader finds the old text or the new one."""
        new = self.path / f".{name}"
        try:
            new.write_text(text)
            os.replace(new, self.path / name)
        except OSError as error:
            print(f"{name}: {error}", file=sys.stderr)

    def _append(self, name: str, data: bytes, most: int, cut: bytes) -> bool:
        size = self._sizes.get(name, 0)
        if size >= most:
            return False
        fits = size + len(data) <= most
        if not fits:
            if not cut:  # a line is whole or not there
                return False
            data = data[: most - size] + cut
        try:
            _write(self.path / name, data, size, synchronize=name == LINES)
        except OSError as error:  # a full disk must not end the run
            print(f"{name}: {error}", file=sys.stderr)
            return False
        self._sizes[name] = size + len(data)
        return fits


def _write(path: Path, data: bytes, size: int, synchronize: bool) -> None:
    """Adds to a file of a size; all of it, or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        if synchronize:
            os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which are no JSON; words stand for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
