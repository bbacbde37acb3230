"""Which instructions another process executes: samples of where its main thread is, told apart by their encoding.

That a variable asked a library to stay within an instruction set does not show that it does: MKL does not heed its own
on every CPU, and does not say what it runs. The encoding of x86-64 instructions tells: AVX and AVX2 are VEX, AVX-512 is
EVEX. The C library's copies and functions, which take the widest vectors whatever the others do, are told apart.
"""

import ctypes
import os
import platform
from collections import Counter
from pathlib import Path

SSE, VEX, EVEX, AMX, OTHER = "SSE", "VEX", "EVEX", "AMX", "other"
C_LIBRARY = "C library"

_SEIZE, _INTERRUPT, _PEEKUSER, _DETACH = 0x4206, 0x4207, 3, 17
_EVENT_STOP, _WALL = 128, 0x40000000
_RIP = 16 * 8  # of struct user_regs_struct
_LEGACY_PREFIXES = frozenset(b"\x66\xf2\xf3\x2e\x36\x3e\x26\x64\x65\x67")
# Opcodes after 0F that compute with or move vectors; others of that page are jumps, prefetches and integers.
_SSE_OPCODES = frozenset([*range(0x10, 0x18), *range(0x28, 0x30), *range(0x50, 0x77), *range(0x7C, 0x80), 0xC2, 0xC6,
                          *range(0xD0, 0xFF)])  # fmt: skip
# AVX-512's operations on masks are encoded like AVX; BMI's on integers too, which are no vectors.
_MASK_OPCODES = frozenset([*range(0x41, 0x4C), *range(0x90, 0x94), 0x98, 0x99])
_BMI_OPCODES = frozenset([0xF0, 0xF2, 0xF3, 0xF5, 0xF6, 0xF7])
_AMX_OPCODES = frozenset([0x49, 0x4B, 0x5C, 0x5E])  # of the map 0F38: tile configuration, loads, products


class NotSampled(Exception):
    """Another process cannot be looked into here; the message says why."""


def kind(code: bytes) -> str:
    """The encoding of the x86-64 instruction that begins here.

    Args:
        code: its bytes and what follows, 16 of them.
    """
    i = 0
    while i < len(code) and code[i] in _LEGACY_PREFIXES:
        i += 1
    if len(code) < i + 4:
        return OTHER
    if code[i] == 0x62:
        return EVEX
    if code[i] == 0xC4 and code[i + 1] & 0x1F == 2 and code[i + 3] in _AMX_OPCODES:
        return AMX
    if code[i] == 0xC5:
        return EVEX if code[i + 2] in _MASK_OPCODES else VEX
    if code[i] == 0xC4:
        page, opcode = code[i + 1] & 0x1F, code[i + 3]
        if (page == 1 and opcode in _MASK_OPCODES) or (page == 3 and 0x30 <= opcode < 0x34):
            return EVEX
        return OTHER if page in (2, 3) and opcode in _BMI_OPCODES else VEX
    if code[i] & 0xF0 == 0x40:
        i += 1
    if code[i] != 0x0F:
        return OTHER
    if code[i + 1] in (0x38, 0x3A):
        return OTHER if code[i + 2] in (0xF0, 0xF1, 0xF6) else SSE
    return SSE if code[i + 1] in _SSE_OPCODES else OTHER


def sample(process: int) -> str:
    """The encoding of the instruction that the main thread of a child process is at; or C_LIBRARY.

    Args:
        process: its id. It is stopped for some ten microseconds.

    Raises:
        NotSampled: it has ended, or nobody may look into it here.
    """
    if platform.machine() not in {"x86_64", "AMD64"} or platform.system() != "Linux":
        raise NotSampled("instructions are told apart on x86-64 under Linux only")
    _ptrace(_SEIZE, process)
    _ptrace(_INTERRUPT, process)
    while True:
        _, status = os.waitpid(process, _WALL)
        if not os.WIFSTOPPED(status):
            raise NotSampled("the process has ended")
        if status >> 16 == _EVENT_STOP:
            break
        _ptrace(7, process, os.WSTOPSIG(status))  # a signal was on its way: it goes on with it
    try:
        at = _ptrace(_PEEKUSER, process, 0, _RIP)
        with open(f"/proc/{process}/mem", "rb", 0) as memory:
            memory.seek(at)
            found = kind(memory.read(16))
        return C_LIBRARY if found != OTHER and _is_in_c_library(process, at) else found
    except OSError as error:
        raise NotSampled(f"its memory cannot be read: {error}") from error
    finally:
        _ptrace(_DETACH, process)


def _is_in_c_library(process: int, address: int) -> bool:
    for line in Path(f"/proc/{process}/maps").read_text().splitlines():
        first, _, last = line.split(" ", 1)[0].partition("-")
        if int(first, 16) <= address < int(last, 16):
            return line.rpartition("/")[2].startswith(("libc.so", "libc-", "libm.so", "libm-"))
    return False


def _ptrace(request: int, process: int, data: int = 0, address: int = 0) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ctypes.set_errno(0)
    value: int = libc.ptrace(request, process, address, data)
    if value == -1 and ctypes.get_errno():
        raise NotSampled(f"ptrace: {os.strerror(ctypes.get_errno())}")
    return value & (1 << 64) - 1


def in_words(counts: Counter[str]) -> str:
    """For people: "VEX 185, other 15"."""
    return ", ".join(f"{name} {n}" for name, n in counts.most_common())
