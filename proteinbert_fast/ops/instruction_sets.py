"""Which instruction set the CPU kernels run with, and the record of it in runs: it decides the bits of results."""

import os
import platform
from collections.abc import Sequence
from typing import NamedTuple

from proteinbert_fast import _cpu_kernels
from proteinbert_fast.errors import InputError
from proteinbert_fast.ops.switches import is_enabled

# Of the numbers that kernels of one instruction set give: counted up with every change of any bit.
KERNELS_VERSION = 3
ISA_SWITCH, AMX_SWITCH = "PROTEINBERT_FAST_ISA", "PROTEINBERT_FAST_AMX"
FLAG = "--allow-different-kernels"
UNKNOWN = "unknown"  # a record that an earlier version has left out
MIXED = "%s: is continued by other kernels than those before (%s): bits differ from here on"
_SEPARATOR = "; "


def force_instruction_set(name: str | None) -> None:
    """Makes kernels run with an instruction set that this CPU has, whichever is the best.

    Args:
        name: of the set, as the environment variable PROTEINBERT_FAST_ISA gives it; nothing is changed where it is
            None or empty.

    Raises:
        InputError: this CPU, or this build, has no such set.
    """
    if not name:
        return
    known = _cpu_kernels.instruction_sets()
    if name not in known:
        raise InputError(f"{ISA_SWITCH} is {name!r} in the environment: this CPU has {', '.join(known)}")
    _cpu_kernels.use_instruction_set(name)


def kernels_in_use() -> str:
    """What decides the bits of these kernels' results: the same on any CPU that has the instruction set."""
    return f"{_cpu_kernels.instruction_set()}, version {KERNELS_VERSION}"


def describe_instruction_sets() -> str:
    """The set in use, whether it was forced, those that this CPU has, and what rules AMX out."""
    known, used = _cpu_kernels.instruction_sets(), _cpu_kernels.instruction_set()
    forced = f" ({ISA_SWITCH}={os.environ[ISA_SWITCH]})" if os.environ.get(ISA_SWITCH) else ""
    failure = _cpu_kernels.amx_failure() if platform.machine() in {"x86_64", "AMD64"} else ""
    without = f"; not amx_bf16: {failure}" if failure else ""
    return f"{used}{forced}, of {', '.join(known)}{without}"


class Rates(NamedTuple):
    """What the instruction set in use reaches on this machine.

    Attributes:
        registers: FLOP/s of multiply-adds whose operands stay in registers: the set's own peak.
        products: FLOP/s of a matrix product, 240 rows by 128 by 128.
    """

    registers: float
    products: float

    @property
    def fraction(self) -> float:
        """Of the peak, that products reach."""
        return self.products / self.registers

    def __str__(self) -> str:
        return f"{self.registers / 1e9:,.0f} GFLOP/s in registers, matrix products reach {self.fraction:.0%} of it"


def measure_rates(seconds: float, threads: int) -> dict[str, Rates]:
    """Rates of the instruction set in use, by the dtype of what is multiplied: bfloat16 only where the set can.

    Args:
        seconds: to measure for, in all.
        threads: to run on.
    """
    dtypes = ["float32", "bfloat16"] if "bf16" in _cpu_kernels.instruction_set() else ["float32"]
    return {
        dtype: Rates(*_cpu_kernels.rates(dtype == "bfloat16", seconds / len(dtypes), threads)) for dtype in dtypes
    }


def joined(records: Sequence[str]) -> str:
    """One record of all kernels that took part, each named once, in this order."""
    return _SEPARATOR.join(dict.fromkeys(one for record in records for one in record.split(_SEPARATOR)))


def check_resumed(before: str | None, now: str, where: str, is_allowed: bool) -> str:
    """The record of a run that is resumed; an error if other kernels have begun it and that was not allowed.

    Args:
        before: the run's record, of one or more kernels; None where an earlier version has written none.
        now: the record of what would continue it.
        where: the run is kept.
        is_allowed: whether other kernels may continue it.

    Raises:
        InputError: the records differ: says what differs and what to do.
    """
    before = before or UNKNOWN
    if set(before.split(_SEPARATOR)) == set(now.split(_SEPARATOR)):
        return before
    if not is_allowed:
        if before == UNKNOWN:
            was = f"does not say which kernels computed it, which may be others than {_quoted(now)} here"
        else:
            was = f"was computed by the kernels {_quoted(before)}, whose bits are not those of {_quoted(now)} here"
        raise InputError(f"{where}: {was}: {_remedy(before)}, or resume with {FLAG}")
    return joined([before, now])


def check_ranks(records: Sequence[str], sets: Sequence[Sequence[str]], where: str, is_allowed: bool) -> str:
    """The record of what all ranks run; an error if that is not the same everywhere and that was not allowed.

    Args:
        records: of each rank.
        sets: instruction sets that each rank's CPU has, the best last.
        where: the run is kept.
        is_allowed: whether ranks may differ.

    Raises:
        InputError: ranks differ: says how, and what to do.
    """
    if len(set(records)) == 1 or is_allowed:
        return joined(records)
    first, other = records[0], next(i for i, record in enumerate(records) if record != records[0])
    shared = [name for name in sets[0] if all(name in of_rank for of_rank in sets)]
    if {record.partition(", version ")[2] for record in records} != {str(KERNELS_VERSION)}:
        remedy = "give all ranks the same release and back end"
    elif shared:
        remedy = f"set {ISA_SWITCH}={shared[-1]} for all ranks"
    else:
        remedy = "run them on one kind of CPU"
    raise InputError(
        f"{where}: rank 0 runs the kernels {_quoted(first)} and rank {other} {_quoted(records[other])}, whose bits "
        f"differ: {remedy}, or start them with {FLAG}"
    )


def _quoted(record: str) -> str:
    return " and ".join(f'"{one}"' for one in record.split(_SEPARATOR))


def _remedy(before: str) -> str:
    """How to have the kernels of a record again."""
    name, _, version = before.partition(", version ")
    if _SEPARATOR in before or not version:
        return "start again"
    if version != str(KERNELS_VERSION):
        return f"use the release that has version {version} of them"
    known = _cpu_kernels.instruction_sets()
    if name not in known:
        return f"run it on a CPU that has {name} (this one has {', '.join(known)})"
    return f"set {ISA_SWITCH}={name}"


is_enabled(AMX_SWITCH)  # csrc/cpu/instruction_sets.h asks too; here, what is no answer is said in one line
force_instruction_set(os.environ.get(ISA_SWITCH))
