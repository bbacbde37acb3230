"""Configurations found on this machine by ``proteinbert-fast bench --tune``, used instead of the shipped ones.

They lie in a file of their own per GPU, Triton and version of this package, which is read once per process. A file that
is damaged or of something else is named in one warning and left alone; the shipped configurations run then. Tuned ones
have been checked to give the same bits as shipped ones.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from proteinbert_fast._version import __version__
from proteinbert_fast.cache import cache_directory

logger = logging.getLogger(__name__)

FORMAT = 2
Chosen = TypeVar("Chosen", bound=tuple[Any, ...])


class Machine(NamedTuple):
    """What a table is for."""

    device: str  # the GPU's name
    capability: int  # 90 for 9.0
    triton: str
    package: str


@dataclass(frozen=True)
class Table:
    """A tuned table that was read.

    Attributes:
        path: of the file.
        date: it was made, in ISO form.
        capability: of the GPU.
        configurations: fields of the configuration of each key, see `key_of`.
    """

    path: Path
    date: str
    capability: int
    configurations: Mapping[str, Mapping[str, int | bool | None]]


class Unusable(Exception):
    """A table cannot be used; the message says why, in a line."""


# By index of the GPU; None where there is no table.
_tables: dict[int, Table | None] = {}
# Configurations to use whatever a table says, by kernel; None for the shipped ones throughout.
_forced: list[Mapping[str, tuple[Any, ...]] | None] = []


def key_of(kernel: str, dtype: torch.dtype, channels: int, precision: str = "ieee") -> str:
    """The name of an entry: "local_block/bfloat16/128"; "tf32" stands for float32 with products in TF32."""
    name = "tf32" if precision == "tf32" else str(dtype).removeprefix("torch.")
    return f"{kernel}/{name}/{channels}"


def machine_of(index: int) -> Machine:
    """What a table for a GPU of this machine is for."""
    major, minor = torch.cuda.get_device_capability(index)
    return Machine(torch.cuda.get_device_name(index), 10 * major + minor, triton.__version__, __version__)


def path_of(machine: Machine) -> Path:
    """The file of a machine's table, in the folder where fetched weights are kept too."""
    device = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    return cache_directory() / "tuning" / f"{device}-{machine.triton}-{machine.package}.json"


def read(path: Path, machine: Machine) -> Table:
    """A table from its file.

    Raises:
        Unusable: it cannot be read, is damaged, or is not for this machine.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise Unusable(f"is no tuned table of format {FORMAT}")
    for name, wanted in machine._asdict().items():
        if values.get(name) != wanted:
            raise Unusable(f"is for {name} {values.get(name)!r}, this is {wanted!r}")
    found = values.get("configurations")
    if not isinstance(found, dict) or not all(_is_configuration(fields) for fields in found.values()):
        raise Unusable("holds something else than configurations")
    return Table(path, str(values.get("date")), machine.capability, found)


def _is_configuration(fields: Any) -> bool:
    return isinstance(fields, dict) and all(
        value is None or isinstance(value, bool) or (isinstance(value, int) and 0 <= value <= 4096)
        for value in fields.values()
    )


def table(index: int) -> Table | None:
    """The table for a GPU; None where there is none that can be used. Read the first time, then kept."""
    if index not in _tables:
        machine = machine_of(index)
        path = path_of(machine)
        _tables[index] = None
        if path.exists():
            try:
                _tables[index] = read(path, machine)
            except Unusable as error:
                _warn(f"{path} {error}")
    return _tables[index]


def forget() -> None:
    """Reads tables again when they are next needed."""
    _tables.clear()


@contextmanager
def using(configurations: Mapping[str, tuple[Any, ...]] | None) -> Iterator[None]:
    """Kernels take these configurations, by kernel, whatever a table says; None: the shipped ones."""
    _forced.append(configurations)
    try:
        yield
    finally:
        _forced.pop()


def lookup(
    kernel: str, kind: type[Chosen], capability: int, channels: int, dtype: torch.dtype, precision: str = "ieee"
) -> Chosen | None:
    """The configuration to use instead of the shipped one, or None.

    Args:
        kernel: its name.
        kind: NamedTuple of configurations.
        capability: of the GPU that the shipped one would be for; 0 in the interpreter, which has no table.
        channels: D.
        dtype: of the states.
        precision: "tf32" or "ieee", of float32 products.
    """
    if _forced:
        forced = None if _forced[-1] is None else _forced[-1].get(kernel)
        return None if forced is None else kind(*forced)
    if not capability or not torch.cuda.is_initialized():
        return None
    index = torch.cuda.current_device()
    found = table(index)
    if found is None or found.capability != capability:
        return None
    fields = found.configurations.get(key_of(kernel, dtype, channels, precision))
    if fields is None:
        return None
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    if fields.keys() != set(names):
        _warn(f"{found.path} has other fields for {kernel} than {', '.join(names)}")
        _tables[index] = None
        return None
    return kind(*[fields[name] for name in names])  # type: ignore[arg-type]


def _warn(what: str) -> None:
    again = "make it anew with 'proteinbert-fast bench --tune', or delete it"
    logger.warning("%s: shipped configurations are used; %s", what, again)


def report() -> str:
    """For people: whether a tuned table is in use on the current GPU, and where it lies."""
    if not torch.cuda.is_available():
        return "shipped configurations (no CUDA GPU)"
    index = torch.cuda.current_device()
    found = table(index)
    if found is None:
        return f"shipped configurations (no tuned table at {path_of(machine_of(index))})"
    return f"tuned table of {found.date[:10]}, {len(found.configurations)} configurations: {found.path}"
