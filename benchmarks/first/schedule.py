"""What is asked of a GPU, the most valuable first: the order of `SCHEDULE`. Standard library only."""

from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.first import verdicts
from benchmarks.first.runner import Probe
from benchmarks.first.verdicts import CHOSEN, GRADIENT, PORTABLE

# By what a process checks: names, and whether the portable kernels run. A kernel that dies takes only these along.
GROUPS: dict[str, tuple[tuple[str, ...], bool]] = {
    "block": (("local_block", "local_block, hidden kept"), False),
    "block-gradient": ((f"{GRADIENT}local_block",), False),
    "model": ((*verdicts.WHOLE, *verdicts.APART), False),
    "track": (("global_track", "global_track, last", "global_track, with weights", "message", "residue_mean"), False),
    "track-gradient": ((f"{GRADIENT}global_track", f"{GRADIENT}global_track, last"), False),
    "first-block": (("local_block, first", f"{GRADIENT}local_block, first"), False),
    "heads": (("token head", "annotation head", f"{GRADIENT}token loss", f"{GRADIENT}annotation loss"), False),
    "portable": (("local_block", "local_block, hidden kept", f"{GRADIENT}local_block"), True),
}
# Of the kernels with configurations, those that a forward pass spends its time in, and the others.
TUNED_FIRST = ("local_block_hopper", "global_attention")
TUNED = (*TUNED_FIRST, "local_block_backward", "local_block", "local_block_backward_hopper",
         "global_attention_backward")  # fmt: skip
_PROBES = "benchmarks.first.probes"
_CHECK_SECONDS = 90.0


def _checks(precision: str) -> list[Probe]:
    found = []
    for group, (names, portable) in GROUPS.items():
        kernels = PORTABLE if portable else CHOSEN
        found.append(
            Probe(
                f"right-{group}-{precision}",
                f"{_PROBES}.right",
                _CHECK_SECONDS,
                alone=False,
                options={"precision": precision, "names": list(names), "portable": portable},
                decides=tuple(verdicts.key_of(precision, kernels, name) for name in names),
            )
        )
    return found


def _self_check(precision: str) -> Probe:
    return Probe(f"self-check-{precision}", f"{_PROBES}.selfcheck", _CHECK_SECONDS, alone=False,
                 options={"precision": precision})  # fmt: skip


def _timed(name: str, module: str, seconds: float, what: str, least: float = 15.0) -> Probe:
    return Probe(name, f"{_PROBES}.{module}", seconds, least=least, needs_gpu=True,
                 options={"what": what})  # fmt: skip


def _tuned(kernels: Sequence[str], timed: bool) -> list[Probe]:
    """Compiles configurations and compares their bits, or times them."""
    found = []
    for kernel in kernels:
        name, options = f"{'tune' if timed else 'compile'}-{kernel}", {"kernel": kernel, "timed": timed}
        found.append(Probe(name, f"{_PROBES}.tuned", 60, alone=timed, least=20.0, needs_gpu=True, options=options))
    return found


def _schedule() -> list[Probe]:
    checks = [
        Probe("versions", f"{_PROBES}.versions", 40, alone=False),
        *_checks("bfloat16"),
        _self_check("bfloat16"),
        Probe("graphs-bfloat16", f"{_PROBES}.graphs", _CHECK_SECONDS, alone=False, options={"precision": "bfloat16"}),
        *_checks("float16"),
        _self_check("float16"),
        _self_check("float32"),
    ]
    plain = [asdict(probe) for probe in checks]
    later = TUNED[len(TUNED_FIRST) :]
    return [
        *checks,
        # Compilers leave the GPU free, and checks leave processors free.
        *_tuned(TUNED_FIRST, timed=False),
        Probe("sanitizer", f"{_PROBES}.tools", 90, needs_gpu=True, options={"what": "sanitizer", "probes": plain}),
        _timed("device", "device", 45, "rates"),
        _timed("forward", "passes", 60, "forward"),
        _timed("training", "passes", 60, "training"),
        _timed("kernels", "timed", 80, "kernels"),
        _timed("gradients", "timed", 70, "gradients"),
        _timed("profile", "passes", 50, "profile"),
        _timed("dilations", "device", 40, "dilations"),
        *_tuned(TUNED_FIRST, timed=True),
        _timed("counters", "tools", 100, "counters", least=30.0),
        _timed("embed", "embed", 100, "embed", least=30.0),
        *_tuned(later, timed=False),
        *_tuned(later, timed=True),
    ]


SCHEDULE = tuple(_schedule())


def chosen(names: list[str]) -> list[Probe]:
    """Probes by their names or the beginnings of names, in the schedule's order; all where none is given.

    Raises:
        ValueError: nothing has such a name.
    """
    for name in names:
        if not any(probe.name.startswith(name) for probe in SCHEDULE):
            raise ValueError(f"no probe is called {name!r}: --list shows all")
    return [probe for probe in SCHEDULE if not names or any(probe.name.startswith(name) for name in names)]


def table(probes: list[Probe]) -> str:
    """For people: in which order, for how long, and what runs side by side."""
    how = {True: "alone", False: "side by side"}
    return "\n".join(f"{probe.name:40} at most {probe.seconds:4.0f} s, {how[probe.alone]}" for probe in probes)
