"""Pickles that attack whoever reads them. Each is harmless here: at worst it makes an empty sentinel file.

``LIVE`` ones do so when plain ``pickle`` reads them, which a test shows; none may do anything in our reader.
"""

import io
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .conftest import NANO

MARK, STOP, NONE = b"(", b".", b"N"
TUPLE1, TUPLE2, TUPLE3, REDUCE, BUILD = b"\x85", b"\x86", b"\x87", b"R", b"b"
P3, P4 = b"\x80\x03", b"\x80\x04"
EXTENSION_CODE = 0xF7


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stacked(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + b"t" + REDUCE


def data(content: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(content)) + content


def number_type(code: str = "f4", order: str = "<") -> bytes:
    made = call(name("numpy", "dtype"), text(code), b"\x89", b"\x88")
    return made + MARK + b"K\x03" + text(order) + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00t" + BUILD


def raw_array(kind: bytes = name("numpy", "ndarray"), shape: bytes = b"K\x00\x85", letter: bytes = b"C\x01b") -> bytes:
    return call(name("numpy.core.multiarray", "_reconstruct"), kind, shape, letter)


def array(shape: bytes, code: bytes, content: bytes, fortran: bytes = b"\x89") -> bytes:
    return raw_array() + MARK + b"K\x01" + shape + code + fortran + content + b"t" + BUILD


def checkpoint(weights: bytes, terms: bytes = b"K\x05", optimizer: bytes = NONE) -> bytes:
    """An official file with these opcodes for its list of weights."""
    return P3 + terms + b"](" + weights + b"e" + optimizer + TUPLE3 + STOP


class _Calls:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def live_attacks(sentinel: Path) -> dict[str, bytes]:
    """Attacks by name that make ``sentinel`` when plain pickle reads them."""
    import os

    path = str(sentinel)
    code = f"open({path!r}, 'w').close()"
    touch = f"touch {path}"
    nested = pickle.dumps(_Calls(os.system, touch))
    real = NANO.read_bytes()
    set_state = P3 + name("types", "SimpleNamespace") + b")\x81}" + text("__setstate__")
    return {
        "os.system by REDUCE": pickle.dumps(_Calls(os.system, touch), 3),
        "os.system by STACK_GLOBAL": pickle.dumps(_Calls(os.system, touch), 4),
        "os.system, protocol 0": pickle.dumps(_Calls(os.system, touch), 0),
        "os.system, protocol 1": pickle.dumps(_Calls(os.system, touch), 1),
        "os.system, protocol 2": pickle.dumps(_Calls(os.system, touch), 2),
        "os.system, protocol 5": pickle.dumps(_Calls(os.system, touch), 5),
        "INST": P3 + MARK + text(touch) + b"iposix\nsystem\n" + STOP,
        "OBJ": P3 + MARK + name("posix", "system") + text(touch) + b"o" + STOP,
        "BUILD into __setstate__": set_state + name("posix", "system") + b"s" + BUILD + text(touch) + BUILD + STOP,
        "EXT1": P3 + b"\x82" + bytes([EXTENSION_CODE]) + text(touch) + TUPLE1 + REDUCE + STOP,
        "EXT2": P3 + b"\x83" + struct.pack("<H", EXTENSION_CODE) + text(touch) + TUPLE1 + REDUCE + STOP,
        "EXT4": P3 + b"\x84" + struct.pack("<i", EXTENSION_CODE) + text(touch) + TUPLE1 + REDUCE + STOP,
        "builtins.exec": P3 + call(name("builtins", "exec"), text(code)) + STOP,
        "builtins.eval": P4 + call(stacked("builtins", "eval"), text(code)) + STOP,
        "builtins.getattr": P3
        + call(
            call(name("builtins", "getattr"), call(name("builtins", "__import__"), text("os")), text("system")),
            text(touch),
        )
        + STOP,
        "dotted name": P4 + call(stacked("os", "path.os.system"), text(touch)) + STOP,
        "functools.partial": P3 + call(call(name("functools", "partial"), name("os", "system"), text(touch))) + STOP,
        "NEWOBJ": P3 + name("functools", "partial") + name("os", "system") + text(touch) + TUPLE2 + b"\x81)R" + STOP,
        "NEWOBJ_EX": P4
        + name("functools", "partial")
        + name("os", "system")
        + text(touch)
        + TUPLE2
        + b"}\x92)R"
        + STOP,
        "subprocess.Popen": P3 + call(name("subprocess", "Popen"), MARK + text("touch") + text(path) + b"l") + STOP,
        "pathlib.Path.touch": P4
        + call(stacked("pathlib", "Path.touch"), call(name("pathlib", "Path"), text(path)))
        + STOP,
        "pickle in a pickle": P3 + call(name("pickle", "loads"), data(nested)) + STOP,
        "numpy.load of a pickle": P3 + call(name("pickle", "load"), call(name("io", "BytesIO"), data(nested))) + STOP,
        "numpy runstring": P3 + call(name("numpy.testing._private.utils", "runstring"), text(code), b"}") + STOP,
        "numpy.memmap": P3
        + call(name("numpy", "memmap"), text(path), text("u1"), text("w+"), b"K\x00", b"K\x01")
        + STOP,
        "after real weights": real[:-1] + b"0" + call(name("os", "system"), text(touch)) + STOP,
        "before real weights": P3 + call(name("os", "system"), text(touch)) + b"0" + real[2:],
        "as one weight": checkpoint(call(name("os", "system"), text(touch))),
        "as the number of terms": checkpoint(b"", terms=call(name("os", "system"), text(touch))),
        "as the optimiser state": checkpoint(b"", optimizer=call(name("os", "system"), text(touch))),
        "as the shape of an array": checkpoint(
            array(call(name("os", "system"), text(touch)) + TUPLE1, number_type(), data(b""))
        ),
        "as an object array": checkpoint(
            array(b"K\x01\x85", number_type_of_objects(), MARK + call(name("os", "system"), text(touch)) + b"l")
        ),
        "object array by numpy": np_object_array(_Calls(os.system, touch)),
    }


def number_type_of_objects() -> bytes:
    made = call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
    return made + MARK + b"K\x03" + text("|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x3ft" + BUILD


def np_object_array(item: object) -> bytes:
    stream = io.BytesIO()
    pickle.Pickler(stream, 4).dump((5, [np.array([item, 1], dtype=object)], None))
    return stream.getvalue()


FORBIDDEN_NAMES = [
    ("os", "system"), ("posix", "system"), ("nt", "system"), ("os", "execv"), ("os", "remove"), ("os", "popen"),
    ("builtins", "eval"), ("builtins", "exec"), ("builtins", "compile"), ("builtins", "open"),
    ("builtins", "getattr"), ("builtins", "__import__"), ("builtins", "print"), ("builtins", "object"),
    ("__builtin__", "eval"), ("importlib", "import_module"), ("subprocess", "Popen"),
    ("subprocess", "check_output"),
    ("runpy", "run_path"), ("shutil", "rmtree"), ("pty", "spawn"), ("socket", "create_connection"), ("ctypes", "CDLL"),
    ("webbrowser", "open"), ("timeit", "timeit"), ("code", "interact"), ("pip", "main"), ("cProfile", "run"),
    ("pickle", "loads"), ("_pickle", "loads"), ("marshal", "loads"), ("torch", "load"), ("torch.hub", "load"),
    ("copyreg", "_reconstructor"), ("copyreg", "__newobj__"), ("_codecs", "encode"), ("operator", "attrgetter"),
    ("operator", "methodcaller"), ("functools", "partial"), ("types", "FunctionType"), ("types", "CodeType"),
    ("collections", "OrderedDict"), ("numpy", "load"), ("numpy", "fromfile"), ("numpy", "memmap"),
    ("numpy", "matrix"),
    ("numpy", "float32"), ("numpy", "ndarray.tofile"), ("numpy", "dtype.__class__"), ("numpy", "__dict__"),
    ("numpy", "_reconstruct"), ("numpy.core.multiarray", "fromfile"), ("numpy.core.multiarray", "ndarray"),
    ("numpy.core.multiarray", "scalar.__self__"), ("numpy._core.multiarray", "__builtins__"),
    ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core", "multiarray._reconstruct"),
    ("numpy.testing._private.utils", "runstring"), ("numpy.f2py.crackfortran", "getlincoef"),
    ("numpy.f2py.crackfortran", "param_eval"), ("numpy.f2py.diagnose", "run_command"),
    ("numpy.distutils.exec_command", "exec_command"),
    ("numpy.ctypeslib", "load_library"), ("numpy.core.multiarray ", "scalar"), (" numpy", "ndarray"),
    ("Numpy", "ndarray"),
    ("numpy\x00", "ndarray"), ("", ""), ("numpy", ""), ("nump\u0443", "ndarray"), ("evil\x1b[2Jmodule", "na\rme"),
]  # fmt: skip


def malformed() -> dict[str, bytes]:
    """Attacks on the reader itself: memory, time, stack, and values that are not what they seem."""
    real = NANO.read_bytes()
    f4 = number_type()
    plain = array(b"K\x01\x85", f4, data(bytes(4)))
    laugh = b"](K\x01K\x01e"
    for i in range(60):
        laugh += b"q" + bytes([i]) + b"h" + bytes([i]) + TUPLE2
    dtype = name("numpy", "dtype")
    return {
        "empty": b"",
        "one byte": b"\x80",
        "only a protocol": P3,
        "no protocol": b"N.",
        "stop at once": P3 + STOP,
        "two protocols": P3 + P3 + NONE + STOP,
        "protocol 255": b"\x80\xff" + NONE + STOP,
        "two pickles": real + real,
        "one byte more": real + b"\x00",
        "no stop": real[:-1],
        "stop inside a mark": P3 + MARK + NONE + STOP,
        "values left over": P3 + NONE + NONE + STOP,
        "PERSID": P3 + b"Pevil\n" + STOP,
        "BINPERSID": P3 + text("evil") + b"Q" + STOP,
        "EXT1 unknown": P3 + b"\x82\x01" + STOP,
        "dictionary": P3 + b"}" + STOP,
        "unhashable key": P3 + b"}]Ns" + STOP,
        "set": P4 + b"\x8f(K\x01\x90" + STOP,
        "frozenset of lists": P4 + b"(]\x91" + STOP,
        "POP": P3 + NONE + b"0" + STOP,
        "POP_MARK": P3 + b"(1" + STOP,
        "DUP": P3 + NONE + b"2" + STOP,
        "float": P3 + b"G" + bytes(8) + STOP,
        "LONG4 of a negative length": P3 + b"\x8b\xff\xff\xff\xff" + STOP,
        "LONG4 of 2 GB": P3 + b"\x8b\xff\xff\xff\x7f" + STOP,
        "LONG1": P3 + b"\x8a\xff" + b"\xff" * 255 + STOP,
        "INT with a million digits": P3 + b"I" + b"9" * 1_000_000 + b"\n" + STOP,
        "BINBYTES of 4 GB": P3 + b"B\xff\xff\xff\xff" + STOP,
        "BINBYTES8 of 2**63": P4 + b"\x8e" + struct.pack("<Q", 2**63) + STOP,
        "BINBYTES8 of 2**64 - 1": P4 + b"\x8e" + b"\xff" * 8 + STOP,
        "BINUNICODE of 4 GB": P3 + b"X\xff\xff\xff\xff" + STOP,
        "BINUNICODE8": P4 + b"\x8d" + struct.pack("<Q", 2**60) + STOP,
        "BYTEARRAY8": P4 + b"\x96" + struct.pack("<Q", 2**60) + STOP,
        "NEXT_BUFFER": P4 + b"\x97" + STOP,
        "READONLY_BUFFER": P4 + b"N\x98" + STOP,
        "a long text": P3 + text("x" * 100_000) + STOP,
        "text that is not UTF-8": P3 + b"X\x02\x00\x00\x00\xff\xfe" + STOP,
        "lone surrogate": P3 + b"X\x03\x00\x00\x00\xed\xa0\x80" + STOP,
        "name without an end": P3 + b"c" + b"a" * 100_000,
        "name of a megabyte": P3 + b"c" + b"a" * 1_000_000 + b"\nb\n" + STOP,
        "name from numbers": P4 + b"K\x01K\x02\x93" + STOP,
        "name from nothing": P4 + b"\x93" + STOP,
        "frame of 2**64 - 1": P4 + b"\x95" + b"\xff" * 8 + NONE + STOP,
        "frame longer than the file": P4 + b"\x95" + struct.pack("<Q", 100) + NONE + STOP,
        "frame that cuts a value": P4 + b"\x95" + struct.pack("<Q", 3) + text("abcdef") + STOP,
        "frame in a frame": P4 + b"\x95" + struct.pack("<Q", 11) + b"\x95" + struct.pack("<Q", 1) + NONE + STOP,
        "empty frames": P4 + (b"\x95" + bytes(8)) * 600_000,
        "memo 2**32 - 1": P3 + b"]r\xff\xff\xff\xff" + STOP,
        "memo number twice": P3 + b"]q\x01]q\x01" + STOP,
        "memo number that is not there": P3 + b"h\x07" + STOP,
        "memo of nothing": P3 + b"q\x00" + STOP,
        "memo across a mark": P3 + b"](\x94" + STOP,
        "memo bomb": P3
        + b"]"
        + b"".join(b"r" + struct.pack("<I", i * 4_000_003 % 2**32) for i in range(520_000))
        + STOP,
        "billion laughs": P3 + laugh + STOP,
        "billion laughs as the number of terms": P3 + laugh + b"]N" + TUPLE3 + STOP,
        "billion laughs as weights": P3 + b"K\x05" + laugh + NONE + TUPLE3 + STOP,
        "billion laughs as one weight": checkpoint(laugh * 1 + b"N" * 29),
        "billion laughs as a shape": checkpoint(array(laugh, f4, data(b""))),
        "a list in itself": P3 + b"]q\x00h\x00a" + STOP,
        "a list in itself as weights": P3 + b"K\x05]q\x00(" + b"h\x00" * 30 + b"eN" + TUPLE3 + STOP,
        "deep tuples": P3 + NONE + TUPLE1 * 400_000 + STOP,
        "deep lists": P3 + b"]" * 200_000 + b"a" * 199_999 + STOP,
        "deep marks": P3 + MARK * 400_000 + STOP,
        "deep marks closed": P3 + MARK * 200_000 + b"t" * 200_000 + STOP,
        "too many opcodes": P3 + NONE * 600_000 + STOP,
        "append to nothing": P3 + NONE + b"a" + STOP,
        "append to a number": P3 + b"K\x01Na" + STOP,
        "appends to a tuple": P3 + b")(Ne" + STOP,
        "appends without a mark": P3 + b"]Ne" + STOP,
        "tuple without values": P3 + TUPLE3 + STOP,
        "tuple across a mark": P3 + b"NN(N" + TUPLE3 + STOP,
        "REDUCE of nothing": P3 + REDUCE + STOP,
        "REDUCE of a number": P3 + b"K\x01)R" + STOP,
        "REDUCE of an array class": P3 + name("numpy", "ndarray") + b"K\x01\x85" + TUPLE1 + REDUCE + STOP,
        "REDUCE with a list": P3 + dtype + b"]R" + STOP,
        "REDUCE of a result": P3 + raw_array() + b")R" + STOP,
        "BUILD of nothing": P3 + NONE + BUILD + STOP,
        "BUILD of a name": P3 + dtype + b")" + BUILD + STOP,
        "BUILD of a tuple": P3 + b"))" + BUILD + STOP,
        "BUILD with a list": P3 + raw_array() + b"]" + BUILD + STOP,
        "_reconstruct of a dtype": P3 + raw_array(kind=dtype) + STOP,
        "_reconstruct of a text": P3 + raw_array(kind=text("ndarray")) + STOP,
        "_reconstruct of a number": P3 + raw_array(kind=b"K\x01") + STOP,
        "_reconstruct of a huge shape": P3 + raw_array(shape=b"J\xff\xff\xff\x7f\x85") + STOP,
        "_reconstruct with False as 0": P3 + raw_array(shape=b"\x89\x85") + STOP,
        "_reconstruct of objects": P3 + raw_array(letter=b"C\x01O") + STOP,
        "_reconstruct with a text letter": P3 + raw_array(letter=text("b")) + STOP,
        "_reconstruct with more arguments": P3 + call(name("numpy.core.multiarray", "_reconstruct"), NONE * 4) + STOP,
        "dtype of objects": checkpoint(array(b"K\x01\x85", number_type("O8", "|"), data(bytes(8)))),
        "dtype O": P3 + number_type("O", "|") + STOP,
        "dtype of fields": P3 + number_type("f4,O", "<") + STOP,
        "dtype V with a count": P3 + number_type("V1000000000", "|") + STOP,
        "dtype with a shape": P3 + number_type("(1000000000,)f4") + STOP,
        "dtype from a list": P3 + call(dtype, MARK + text("f4") + b"l", b"\x89", b"\x88") + STOP,
        "dtype from an object": P3 + call(dtype, dtype, b"\x89", b"\x88") + STOP,
        "dtype with 0 and 1": P3 + call(dtype, text("f4"), b"K\x00", b"K\x01") + STOP,
        "dtype complex": P3 + number_type("c8") + STOP,
        "dtype of dates": P3 + number_type("M8") + STOP,
        "dtype described twice": P3
        + f4
        + MARK
        + b"K\x03"
        + text(">")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"
        + BUILD
        + STOP,
        "dtype never described": checkpoint(
            array(b"K\x01\x85", call(dtype, text("f4"), b"\x89", b"\x88"), data(bytes(4)))
        ),
        "dtype with metadata": P3
        + call(dtype, text("f4"), b"\x89", b"\x88")
        + b"(K\x04"
        + text("<")
        + b"NNNK\x00K\x00K\x00Nt"
        + BUILD
        + STOP,
        "dtype with field names": P3
        + call(dtype, text("f4"), b"\x89", b"\x88")
        + b"(K\x03"
        + text("|")
        + b"N)NK\x04K\x01K\x00t"
        + BUILD
        + STOP,
        "dtype with flags": P3
        + call(dtype, text("f4"), b"\x89", b"\x88")
        + b"(K\x03"
        + text("<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ft"
        + BUILD
        + STOP,
        "dtype in native order": P3 + number_type("f4", "=") + STOP,
        "array without content": checkpoint(raw_array() * 30),
        "array described twice": P3 + plain + b"(K\x01K\x01\x85" + f4 + b"\x89" + data(bytes(4)) + b"t" + BUILD + STOP,
        "array of too few bytes": P3 + array(b"K\xff\x85", f4, data(bytes(4))) + STOP,
        "array of too many bytes": P3 + array(b"K\x01\x85", f4, data(bytes(4096))) + STOP,
        "array of a negative size": P3 + array(b"J\xff\xff\xff\xff\x85", f4, data(bytes(4))) + STOP,
        "array whose sizes overflow": P3 + array(MARK + b"J\x00\x00\x00\x40" * 4 + b"t", f4, data(b"")) + STOP,
        "array of sizes 0 and 2**31": checkpoint(array(b"K\x00J\xff\xff\xff\x7f\x86", f4, data(b"")) * 30),
        "array of 300 dimensions": P3 + array(MARK + b"K\x01" * 300 + b"t", f4, data(bytes(4))) + STOP,
        "array of a list shape": P3 + array(b"](K\x01e", f4, data(bytes(4))) + STOP,
        "array of a truth shape": P3 + array(b"\x88\x85", f4, data(bytes(4))) + STOP,
        "array of a text shape": P3 + array(text("1") + TUPLE1, f4, data(bytes(4))) + STOP,
        "array of an array shape": P3 + array(plain + TUPLE1, f4, data(bytes(4))) + STOP,
        "array with text content": P3 + array(b"K\x01\x85", f4, text("abcd")) + STOP,
        "array with list content": P3 + array(b"K\x01\x85", f4, b"](K\x01e") + STOP,
        "array with itself as content": P3 + raw_array() + b"q\x00(K\x01K\x01\x85" + f4 + b"\x89h\x00t" + BUILD + STOP,
        "array with 0 as memory order": P3 + array(b"K\x01\x85", f4, data(bytes(4)), b"K\x00") + STOP,
        "array of version 2": P3
        + raw_array()
        + b"(K\x02K\x01\x85"
        + f4
        + b"\x89"
        + data(bytes(4))
        + b"t"
        + BUILD
        + STOP,
        "arrays that share memory": checkpoint(
            data(bytes(400_000))
            + b"q\x00"
            + b"0" * 0
            + b"".join(array(b"J\xa0\x86\x01\x00\x85", f4, b"h\x00") for _ in range(1000))
        ),
        "scalar of objects": P3
        + call(name("numpy.core.multiarray", "scalar"), number_type_of_objects(), data(pickle.dumps(1)))
        + STOP,
        "scalar of a pickle": P3
        + call(name("numpy.core.multiarray", "scalar"), number_type("i8"), data(pickle.dumps(1)))
        + STOP,
        "scalar of text": P3
        + call(name("numpy.core.multiarray", "scalar"), number_type("i8"), text("12345678"))
        + STOP,
        "scalar of nothing": P3 + call(name("numpy.core.multiarray", "scalar"), number_type("i8")) + STOP,
        "scalar of a short number": P3
        + call(name("numpy.core.multiarray", "scalar"), number_type("i8"), data(bytes(4)))
        + STOP,
        "bytes by protocol 2": pickle.dumps((5, [np.zeros(4, np.float32)], None), 2),
        "arrays by protocol 5": pickle.dumps((5, [np.zeros(4, np.float32)], None), 5),
        "a torch tensor's names": P3 + name("torch._utils", "_rebuild_tensor_v2") + STOP,
        "zeros": bytes(1000),
        "ones": b"\xff" * 1000,
    }
