"""A whole run: set-up, groups, report."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from proteinbert_fast.benchmark import machine
from proteinbert_fast.benchmark.registry import GROUPS
from proteinbert_fast.benchmark.report import Report
from proteinbert_fast.benchmark.settings import Settings
from proteinbert_fast.benchmark.setup import Setup
from proteinbert_fast.errors import InputError


def run(settings: Settings, groups: Sequence[str], say: Callable[[str], None]) -> Report:
    """Measures groups one after another.

    Args:
        settings: how much to do.
        groups: names of them.
        say: is told what goes on, a line each.

    Raises:
        InputError: a group is unknown, or the proteins cannot be used.
    """
    if unknown := [name for name in groups if name not in GROUPS]:
        raise InputError(f"benchmark group {unknown[0]!r} is unknown; there are {', '.join(GROUPS)}")
    started = time.perf_counter()
    environment = machine.environment() | machine.instruction_set_rates(settings.rate_seconds)
    setup = Setup(settings)
    proteins = described(setup)
    found = []
    with torch.random.fork_rng(devices=[]):
        for name in groups:
            group = GROUPS[name]
            rows = group.measure(group.cases(setup), settings.rounds, lambda line, name=name: say(f"{name}: {line}"))  # type: ignore[misc]
            found.append((group, rows))
    return Report(settings, environment, proteins, found, time.perf_counter() - started)


def described(setup: Setup) -> dict[str, Any]:
    """The sample of proteins, for a report.

    Raises:
        InputError: the proteins cannot be used.
    """
    lengths = [len(protein.sequence) for protein in setup.proteins]
    return {
        "source": setup.settings.fasta or "UniProtKB/Swiss-Prot (they come with the package)",
        "proteins": len(lengths),
        "residues": sum(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
    }
