"""Triton's interpreter, mended where it computes bfloat16 wrongly (3.6 to 3.9).

There, products of bfloat16 operands are garbage, float32 is cut off instead of rounded, and arithmetic is done on the
bits. Here operands are widened to float32, results rounded to nearest even. Inline assembly is emulated for the one
instruction that kernels use. What it does anew in every call and for every tensor, two thirds of its time, is done
once. Import before any kernel runs.
"""

import math
import operator
from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
UINT16 = np.dtype(np.uint16)


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def is_bf16(handle: Handle) -> bool:
    return handle.data.dtype is UINT16 and handle.dtype.scalar == tl.bfloat16


def numbers(handle: Handle) -> np.ndarray:
    return widened(handle.data) if is_bf16(handle) else handle.data


class _One(list):
    """What the builder of an inline assembly call returns."""

    def get_result(self, i: int) -> Handle:
        return self[i]


def mend() -> None:
    builder = interpreter.InterpreterBuilder
    plain_cast, plain_convert, plain_binary = builder.cast_impl, builder.create_fp_to_fp, builder.binary_op

    def dot(self, a, b, total, input_precision, max_num_imprecise_acc):
        # In float64: NumPy's float32 products round a row otherwise at another place in the tile, matrix units do not.
        product = np.matmul(numbers(a), numbers(b), dtype=np.float64)
        return Handle((product + total.data).astype(total.data.dtype), total.dtype.scalar)

    def cast(self, source, dtype):
        old, new = source.dtype.scalar, dtype.scalar
        if old == tl.bfloat16 and new != tl.bfloat16 and is_bf16(source):
            return Handle(numbers(source).astype(interpreter._get_np_dtype(dtype)), new)
        if new == tl.bfloat16 and old != tl.bfloat16:
            return Handle(rounded(source.data.astype(np.float32)), new)
        return plain_cast(self, source, dtype)

    def convert(self, source, dtype, rounding):
        if tl.bfloat16 in (source.dtype.scalar, dtype.scalar):
            return cast(self, source, dtype)
        return plain_convert(self, source, dtype, rounding)

    def binary(self, left, right, function):
        if not (is_bf16(left) and is_bf16(right)):
            return plain_binary(self, left, right, function)
        out = function(numbers(left), numbers(right))
        return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(rounded(out), left.dtype.scalar)

    def compare(function):
        return lambda self, left, right: Handle(function(numbers(left), numbers(right)), tl.int1)

    def assembly(self, text, constraints, values, types, is_pure, pack):
        assert "mov.b32" in text, f"not emulated: {text}"
        return _One(values)

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = dot, cast, convert
    builder.binary_op, builder.create_inline_asm = binary, assembly
    for name, function in (("OLT", operator.lt), ("OGT", operator.gt), ("OLE", operator.le), ("OGE", operator.ge),
                           ("OEQ", operator.eq), ("UNE", operator.ne)):  # fmt: skip
        setattr(builder, f"create_fcmp{name}", compare(function))

    # Triton 3.6 takes int() of arrays of one number, which NumPy 2.4 refuses.
    plain_patch = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch
    _hasten()


def _hasten() -> None:
    """The language is patched here and stays so; else every call of one kernel function by another does that again."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()

    plain_dtype, plain_block, dtypes, blocks = interpreter._get_np_dtype, tl.block_type.__init__, {}, {}

    def numpy_dtype(dtype):
        scalar = dtype.scalar
        if scalar.name not in dtypes:
            dtypes[scalar.name] = plain_dtype(scalar)
        return dtypes[scalar.name]

    def make_block(self, element, shape):
        key = element.name, *(n.value if isinstance(n, tl.constexpr) else n for n in shape)
        if key not in blocks:
            plain_block(self, element, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    @cache
    def shape_and_size(*sizes):
        return tl.core.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(math.prod(sizes))

    def make_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape_and_size(*(type.shape.values if type.is_block() else ()))

    def same_sizes(self, other):
        return tl.constexpr(self.values == (other.values if isinstance(other, tl.core.tuple) else list(other)))

    def same_type(self, other):
        other = other.value if isinstance(other, tl.constexpr) else other
        return isinstance(other, tl.dtype) and self.name == other.name

    interpreter._get_np_dtype, tl.core.tuple.__eq__, tl.dtype.__eq__ = numpy_dtype, same_sizes, same_type
    tl.block_type.__init__, tl.tensor.__init__ = make_block, make_tensor
