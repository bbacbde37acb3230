"""The process of one instruction set: reads its job from standard input, measures, writes a report.

Its environment holds it to the set; `holding.environment` gives it. What it writes to standard output is for
`process.run`.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.sets import holding
from benchmarks.sets.holding import InstructionSet
from benchmarks.sets.keras_peer import KerasPeer
from benchmarks.sets.plan import Plan, Stages, plan
from benchmarks.sets.watch import Channel, instructions
from proteinbert_fast import _cpu_kernels
from proteinbert_fast.benchmark import machine, timing
from proteinbert_fast.benchmark.registry import Group
from proteinbert_fast.benchmark.report import Report
from proteinbert_fast.benchmark.run import described
from proteinbert_fast.benchmark.timing import Row


def report(sizes: Plan, held: InstructionSet, channel: Channel, folder: Path, keras: str | None) -> Report:
    """Measures all stages.

    Args:
        sizes: settings of each stage.
        held: the set that this process is held to.
        channel: to the process that watches.
        folder: for what sets share.
        keras: the Python of the original Keras model's environment; without it None.
    """
    started = time.perf_counter()
    peer = KerasPeer(keras, folder) if keras else None
    stages = Stages(sizes, held, channel, folder, peer.cases if peer else lambda _: ())
    found: list[tuple[Group, list[Row]]] = []
    try:
        with torch.random.fork_rng(devices=[]):
            for group, cases, rounds in stages:
                rows = timing.measure(cases, rounds, lambda line, name=group.name: channel.say(f"{name}: {line}"))  # type: ignore[misc]
                found.append((group, [explained(row, stages) for row in rows]))
    finally:
        if peer:
            peer.close()
    return Report(
        sizes.forward,
        environment(held) | machine.instruction_set_rates(sizes.forward.rate_seconds),
        described(stages.setup),
        found,
        time.perf_counter() - started,
    )


def explained(row: Row, stages: Stages) -> Row:
    """The row with what is known of the instructions that ran."""
    label = row.case.label
    if label in stages.evidence:
        owner = f"{row.case.owner}: {stages.evidence[label]}"
        return replace(row, case=replace(row.case, owner=owner))
    if label in stages.seen:
        note = "; ".join(part for part in (row.note, instructions(stages.seen[label], stages.held)) if part)
        return replace(row, note=note)
    return row


def environment(held: InstructionSet) -> dict[str, Any]:
    """The machine's, with what holds this process to the set."""
    return machine.environment() | {
        "instruction_set": _cpu_kernels.instruction_set(),
        "held_by": dict(held.environment),
        "inductor_vectors": inductor_vectors(),
    }


def inductor_vectors() -> str:
    """What torch.compile's code for CPUs takes as vectors."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return str(vectors) if (vectors := pick_vec_isa()) else "none"


def main() -> None:
    """One set; see above.

    Raises:
        RuntimeError: this process is not held to the set.
    """
    job = json.loads(sys.stdin.readline())
    channel, folder = Channel(), Path(job["folder"])
    held = holding.known()[job["set"]]
    capability = torch.backends.cpu.get_cpu_capability()
    if _cpu_kernels.instruction_set() != held.name:
        raise RuntimeError(f"our kernels run with {_cpu_kernels.instruction_set()}, not {held.name}")
    if held.capability not in {None, capability}:
        raise RuntimeError(f"PyTorch's kernels run with {capability}, not {held.capability}")
    found = report(plan(job["size"], job["rounds"]), held, channel, folder, job["keras"])
    file = folder / f"{held.name}.json"
    file.write_text(json.dumps(found.to_dict() | {"markdown": found.to_markdown()}))
    channel.done(str(file))


if __name__ == "__main__":
    main()
