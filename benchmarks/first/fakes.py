"""Probes that go wrong in every way there is, to see that they cost nothing but their own lines."""

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from benchmarks.first.runner import MOST_PRINTED, Probe

if TYPE_CHECKING:
    from benchmarks.first.process import Context

_FOREVER = 3600.0
_SECONDS, _HANGING_SECONDS = 30.0, 4.0
# What each does, how its end must be recorded, whether that is well, and how many of its own lines must be there.
WAYS: dict[str, tuple[str, bool, int]] = {
    "succeeds": ("finished", True, 2),
    "says-wrong": ("finished", True, 2),
    "dies": ("died of SIGSEGV, in the second", False, 2),
    "hangs": ("hung: ended after 4 s, in the second", False, 2),
    "prints-garbage": ("finished", True, 1),
    "tears-a-line": ("finished; its last line is torn", False, 1),
    "floods": (f"ended: it printed more than {MOST_PRINTED >> 20} MiB", False, 1),
    "floods-standard-error": ("finished", True, 1),
    "fails-late": ("exit code 3", False, 2),
    "leaves-early": ("exit code 0 before it was done", False, 1),
    "leaves-a-child": ("finished", True, 2),
    "ignores-signals": ("hung: ended after 4 s", False, 1),
    "is-too-late": ("not run: out of time", False, 0),
}


def probes() -> list[Probe]:
    """One of each, in this order; the last is never begun."""
    found = []
    for what in WAYS:
        seconds = _HANGING_SECONDS if what in {"hangs", "ignores-signals"} else _SECONDS
        least = 1e9 if what == "is-too-late" else 1.0
        found.append(Probe(f"fake-{what}", __name__, 1e9 if what == "is-too-late" else seconds, alone=what == "floods",
                           least=least, options={"plain": True, "what": what}))  # fmt: skip
    return found


def run(context: "Context") -> None:
    """Does what the options say."""
    what = context.options["what"]
    context.emit(True, check="the first", number=float("nan"))
    if what in {"succeeds", "fails-late"}:
        context.emit(True, check="the second")
    elif what == "says-wrong":
        context.emit(False, check="the second", found="off by 1")
    elif what in {"dies", "hangs"}:
        context.begin("the second")
    _misbehave(context, what)


def _misbehave(context: "Context", what: str) -> None:
    out = context._descriptor
    if what == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "hangs":
        time.sleep(_FOREVER)
    elif what == "ignores-signals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(_FOREVER)
    elif what == "prints-garbage":
        os.write(out, b"\xff\x00 no JSON\n[1, 2]\n{\n" + b"[" * 200_000)
        os.write(out, b'\n"text"\nNaN\n\n{"file": "../x", "text": ""}\n')
    elif what == "tears-a-line":
        context.write({"done": True})
        os.write(out, b'{"ok": true, "check": "the sec')
        os._exit(0)
    elif what == "floods":
        while True:
            os.write(out, b"y\n" * 10_000)
    elif what == "floods-standard-error":
        for _ in range(100):
            os.write(2, b"warning\n" * 10_000)
        os.write(2, b"the last words\n")
    elif what == "fails-late":
        sys.exit(3)
    elif what == "leaves-early":
        os._exit(0)
    elif what == "leaves-a-child":
        # In a session of its own, with the pipe to the runner open.
        child = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({_FOREVER})"], pass_fds=(out,),
                                 start_new_session=True)  # fmt: skip
        context.emit(True, check="the child", pid=child.pid)


def failures(lines: list[dict[str, object]]) -> list[str]:
    """What a run of these probes recorded otherwise than it must have."""
    found = []
    for what, (end, well, own) in WAYS.items():
        name = f"fake-{what}"
        ends = [line for line in lines if line["probe"] == name and "end" in line]
        others = [line for line in lines if line["probe"] == name and "end" not in line]
        if [line["end"] for line in ends] != [end]:
            found.append(f"{name} ended as {[line['end'] for line in ends]}, not {end!r}")
            continue
        right = None if what == "is-too-late" else well and what != "says-wrong"
        if ends[0]["ok"] is not right:
            found.append(f"{name} counts as {ends[0]['ok']}, not {right}")
        if len(others) != own:
            found.append(f"{name} has {len(others)} lines, not {own}")
    return found
