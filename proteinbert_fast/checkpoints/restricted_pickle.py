"""A pickle reader that can only make numbers: for files from strangers, which ``pickle.load`` would let run
code.

It is an interpreter of its own for the few opcodes that a list of numpy arrays needs. The four numpy names
that such a file mentions become inert marks; no function is ever looked up, imported or called, so there is
nothing to escape to. Arrays are described here (shape, type, bytes) and built by the caller once everything
has been checked.

Neither memory nor time can run away: every byte an array points to is a byte of the file, no byte belongs to
two arrays, and the numbers of opcodes and of dimensions are bounded.
"""

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NoReturn, TypeAlias

PROTOCOLS = (3, 4)
MAX_OPCODES = 500_000  # an official file of 6 blocks has 13 thousand
MAX_TEXT_BYTES = 256
MAX_DIMENSIONS = 8

NUMBER_TYPE_NAMES = {
    "b1": "bool",
    "i1": "int8",
    "u1": "uint8",
    "i2": "int16",
    "u2": "uint16",
    "f2": "float16",
    "i4": "int32",
    "u4": "uint32",
    "f4": "float32",
    "i8": "int64",
    "u8": "uint64",
    "f8": "float64",
}
ITEM_SIZES = {code: int(code[1:]) for code in NUMBER_TYPE_NAMES}


class UnsafePickleError(Exception):
    """A pickle that this reader does not accept; the message is one line with the place in the file."""


class NumpyName(Enum):
    """The four numpy names that a pickle of arrays mentions; nothing but marks."""

    RECONSTRUCT = "_reconstruct"
    SCALAR = "scalar"
    NDARRAY = "ndarray"
    DTYPE = "dtype"


KNOWN_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): NumpyName.RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): NumpyName.RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): NumpyName.SCALAR,
    ("numpy._core.multiarray", "scalar"): NumpyName.SCALAR,
    ("numpy", "ndarray"): NumpyName.NDARRAY,
    ("numpy", "dtype"): NumpyName.DTYPE,
}


@dataclass(eq=False)
class NumberType:
    """A numpy number type, such as ``f4``; ``ready`` once the file has said that it is little-endian."""

    code: str
    ready: bool = False


@dataclass(eq=False)
class ArrayContent:
    """An array as the file describes it: shape, number type, and the bytes of the file that hold it.

    ``data`` is None until the file has given the content.
    """

    shape: tuple[int, ...] = (0,)
    code: str = ""
    fortran_order: bool = False
    data: memoryview | None = None


@dataclass(eq=False)
class ScalarContent:
    """A numpy scalar as the file describes it."""

    code: str
    data: memoryview


Value: TypeAlias = (
    "bool | int | str | memoryview | tuple[Value, ...] | list[Value] | "
    "NumpyName | NumberType | ArrayContent | ScalarContent | None"
)


def shown(text: str) -> str:
    """Foreign text for an error line: ASCII, no control characters, the first 60 characters."""
    printable = ascii(text[:60])[1:-1]
    return printable if len(text) <= 60 else f"{printable}..."


_KINDS: dict[type, str] = {
    type(None): "nothing",
    bool: "a truth value",
    int: "a number",
    str: "a text",
    memoryview: "bytes",
    tuple: "a tuple",
    list: "a list",
    NumpyName: "a numpy name",
    NumberType: "a number type",
    ArrayContent: "an array",
    ScalarContent: "a scalar",
}


def describe(value: Value) -> str:
    """The kind of a value from the file, never its content, which may be endless."""
    return _KINDS[type(value)]


def is_int(value: object) -> bool:
    """True for an int that is not a bool."""
    return type(value) is int


def read_pickle(data: bytes) -> Value:
    """The value that the pickle ``data`` holds, arrays as :class:`ArrayContent`.

    Raises:
        UnsafePickleError: the pickle is damaged, or holds anything but numbers, texts, tuples, lists and
            arrays.
    """
    return _Machine(data).run()


class _Machine:
    """Stack, memo and place in the file of one reading."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.place = 0
        self.opcode_place = 0
        self.frame_end: int | None = None
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        self.memo: dict[int, Value] = {}
        self.claimed = 0  # bytes that arrays and scalars hold so far

    def fail(self, reason: str) -> NoReturn:
        raise UnsafePickleError(f"{reason} (byte {self.opcode_place})")

    # The file.

    def take(self, count: int) -> memoryview:
        end = self.place + count
        if end > len(self.data):
            self.fail(f"it is cut off: {count:,} bytes are announced, {len(self.data) - self.place:,} are left")
        if self.frame_end is not None and self.place < self.frame_end < end:
            self.fail("a value reaches over the end of its frame")
        piece = self.data[self.place : end]
        self.place = end
        return piece

    def unsigned(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def text(self, piece: memoryview) -> str:
        if len(piece) > MAX_TEXT_BYTES:
            self.fail(f"a text of {len(piece):,} bytes; such files have none over {MAX_TEXT_BYTES}")
        try:
            return str(piece, "utf-8")
        except UnicodeDecodeError:
            self.fail("a text that is not UTF-8")

    def line(self) -> str:
        start = self.place
        window = bytes(self.data[start : start + MAX_TEXT_BYTES + 1])
        length = window.find(b"\n")
        if length < 0:
            self.fail("a name without an end")
        piece = self.take(length)
        self.take(1)
        return self.text(piece)

    # The stack.

    def pop(self) -> Value:
        if not self.stack:
            self.fail("a value is missing")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Value]:
        if not self.marks:
            self.fail("a mark is missing")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def top_list(self) -> list[Value]:
        target = self.stack[-1] if self.stack else None
        if not isinstance(target, list):
            self.fail(f"values are appended to {describe(target)}")
        return target

    def remember(self, key: int) -> None:
        if not self.stack:
            self.fail("a value is missing")
        if key in self.memo:
            self.fail(f"two values have the number {key}")
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        if key not in self.memo:
            self.fail(f"no value has the number {key}")
        self.stack.append(self.memo[key])

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            self.fail("a value is missing")
        items = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(items)

    def tuple_from_mark(self) -> None:
        items = tuple(self.pop_to_mark())
        self.stack.append(items)

    # Opcodes with an own method; the short ones are in the table below.

    def start_frame(self) -> None:
        if self.frame_end is not None and self.place <= self.frame_end:
            self.fail("a frame inside a frame")
        self.frame_end = None
        length = self.unsigned(8)
        if length > len(self.data) - self.place:
            self.fail(f"a frame of {length:,} bytes is announced, {len(self.data) - self.place:,} are left")
        self.frame_end = self.place + length

    def push_name(self, module: Value, name: Value) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self.fail(f"a name made of {describe(module)} and {describe(name)}")
        known = KNOWN_NAMES.get((module, name))
        if known is None:
            hint = ""
            if (module, name) == ("_codecs", "encode"):
                hint = "; protocol 2 writes bytes that way, save the file with protocol 3 or 4"
            elif name == "_frombuffer":
                hint = "; protocol 5 writes arrays that way, save the file with protocol 3 or 4"
            self.fail(f"it asks for {shown(module)}.{shown(name)}, and weights need numpy arrays only{hint}")
        self.stack.append(known)

    def push_stacked_name(self) -> None:
        name = self.pop()
        self.push_name(self.pop(), name)

    def reduce(self) -> None:
        """Where ``pickle`` would call a function: only the three calls that describe arrays, in one form."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(arguments, tuple):
            self.fail(f"arguments that are {describe(arguments)}")
        made: Value
        if function is NumpyName.RECONSTRUCT:
            if not (
                len(arguments) == 3
                and arguments[0] is NumpyName.NDARRAY
                and isinstance(arguments[1], tuple)
                and len(arguments[1]) == 1
                and is_int(arguments[1][0])
                and arguments[1][0] == 0
                and isinstance(arguments[2], memoryview)
                and bytes(arguments[2][:2]) == b"b"
            ):
                self.fail("an array that is not a plain numpy.ndarray")
            made = ArrayContent()
        elif function is NumpyName.DTYPE:
            if not (
                len(arguments) == 3
                and isinstance(arguments[0], str)
                and isinstance(arguments[1], bool)
                and isinstance(arguments[2], bool)
            ):
                self.fail("a number type that is not a plain numpy.dtype")
            if arguments[0] not in ITEM_SIZES:
                self.fail(f"the number type {shown(arguments[0])}, which is no plain number")
            made = NumberType(arguments[0])
        elif function is NumpyName.SCALAR:
            if not (
                len(arguments) == 2 and isinstance(arguments[0], NumberType) and isinstance(arguments[1], memoryview)
            ):
                self.fail("a scalar that is not a plain number")
            made = ScalarContent(self.finished(arguments[0]), arguments[1])
            self.claim(made.data, ITEM_SIZES[made.code])
        else:
            what = f"numpy.{function.value}" if isinstance(function, NumpyName) else describe(function)
            self.fail(f"it calls {what}")
        self.stack.append(made)

    def build(self) -> None:
        """Where ``pickle`` would call ``__setstate__``: only for an array or a number type."""
        state = self.pop()
        target = self.stack[-1] if self.stack else None
        if not isinstance(state, tuple):
            self.fail(f"a state that is {describe(state)}")
        if isinstance(target, NumberType):
            self.build_number_type(target, state)
        elif isinstance(target, ArrayContent):
            self.build_array(target, state)
        else:
            self.fail(f"a state for {describe(target)}")

    def build_number_type(self, target: NumberType, state: tuple[Value, ...]) -> None:
        if target.ready:
            self.fail("a number type that is described twice")
        if len(state) != 8 or not is_int(state[0]) or state[0] != 3 or not isinstance(state[1], str):
            self.fail("a number type of an unknown form")
        order, fields, flags = state[1], state[2:5], state[5:]
        if any(field is not None for field in fields):
            self.fail("a number type with fields or of several numbers")
        if any(not is_int(flag) for flag in flags) or flags != (-1, -1, 0):
            self.fail("a number type with special alignment or flags")
        if order not in (("|",) if ITEM_SIZES[target.code] == 1 else ("<",)):
            self.fail(f"numbers in the byte order {shown(order)}, expected little-endian")
        target.ready = True

    def build_array(self, target: ArrayContent, state: tuple[Value, ...]) -> None:
        if target.data is not None:
            self.fail("an array whose content is given twice")
        if len(state) != 5 or not is_int(state[0]) or state[0] != 1:
            self.fail("an array of an unknown form")
        _, shape, number_type, fortran_order, data = state
        if not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
            self.fail(f"an array whose shape is {describe(shape)}, or of over {MAX_DIMENSIONS} dimensions")
        sizes = tuple(size for size in shape if isinstance(size, int) and not isinstance(size, bool) and size >= 0)
        if len(sizes) != len(shape):
            self.fail("an array whose shape holds something else than sizes")
        if not isinstance(number_type, NumberType):
            self.fail(f"an array whose number type is {describe(number_type)}")
        if not isinstance(fortran_order, bool):
            self.fail(f"an array whose memory order is {describe(fortran_order)}")
        if not isinstance(data, memoryview):
            self.fail(f"an array whose content is {describe(data)}, expected bytes")
        code = self.finished(number_type)
        self.claim(data, math.prod(sizes) * ITEM_SIZES[code])
        target.shape, target.code, target.fortran_order, target.data = sizes, code, fortran_order, data

    def finished(self, number_type: NumberType) -> str:
        if not number_type.ready:
            self.fail("a number type whose byte order is not given")
        return number_type.code

    def claim(self, data: memoryview, size: int) -> None:
        if len(data) != size:
            self.fail(f"{len(data):,} bytes of numbers where the shape asks for {size:,}")
        self.claimed += size
        if self.claimed > len(self.data):
            self.fail("its arrays hold more bytes than the file: they share memory")

    def append(self) -> None:
        item = self.pop()
        self.top_list().append(item)

    def extend(self) -> None:
        items = self.pop_to_mark()
        self.top_list().extend(items)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def run(self) -> Value:
        if not self.data:
            self.fail("the file is empty")
        if self.unsigned(1) != 0x80:
            self.fail("it is no pickle of protocol 3 or 4")
        if (protocol := self.unsigned(1)) not in PROTOCOLS:
            self.fail(f"it is a pickle of protocol {protocol}; save it with protocol 3 or 4")
        for _ in range(MAX_OPCODES):
            self.opcode_place = self.place
            opcode = self.take(1)[0]
            if opcode == STOP:
                return self.finish()
            action = self.ACTIONS.get(opcode)
            if action is None:
                self.fail(f"the opcode {OPCODE_NAMES.get(opcode, hex(opcode))}, which weights do not need")
            action(self)
        self.fail(f"over {MAX_OPCODES:,} opcodes")

    def finish(self) -> Value:
        value = self.pop()
        if self.stack or self.marks:
            self.fail("values are left over at its end")
        if self.place != len(self.data):
            self.fail(f"{len(self.data) - self.place:,} bytes follow its end")
        return value

    ACTIONS: ClassVar[dict[int, Callable[["_Machine"], None]]] = {
        ord("N"): lambda self: self.stack.append(None),
        0x88: lambda self: self.stack.append(True),
        0x89: lambda self: self.stack.append(False),
        ord("J"): lambda self: self.stack.append(struct.unpack("<i", self.take(4))[0]),
        ord("K"): lambda self: self.stack.append(self.unsigned(1)),
        ord("M"): lambda self: self.stack.append(self.unsigned(2)),
        ord("X"): lambda self: self.stack.append(self.text(self.take(self.unsigned(4)))),
        0x8C: lambda self: self.stack.append(self.text(self.take(self.unsigned(1)))),
        ord("B"): lambda self: self.stack.append(self.take(self.unsigned(4))),
        ord("C"): lambda self: self.stack.append(self.take(self.unsigned(1))),
        0x8E: lambda self: self.stack.append(self.take(self.unsigned(8))),
        ord("("): mark,
        ord(")"): lambda self: self.stack.append(()),
        0x85: lambda self: self.push_tuple(1),
        0x86: lambda self: self.push_tuple(2),
        0x87: lambda self: self.push_tuple(3),
        ord("t"): tuple_from_mark,
        ord("]"): lambda self: self.stack.append([]),
        ord("a"): append,
        ord("e"): extend,
        ord("q"): lambda self: self.remember(self.unsigned(1)),
        ord("r"): lambda self: self.remember(self.unsigned(4)),
        0x94: lambda self: self.remember(len(self.memo)),
        ord("h"): lambda self: self.recall(self.unsigned(1)),
        ord("j"): lambda self: self.recall(self.unsigned(4)),
        0x95: start_frame,
        ord("c"): lambda self: self.push_name(self.line(), self.line()),
        0x93: push_stacked_name,
        ord("R"): reduce,
        ord("b"): build,
    }


STOP = ord(".")

OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
