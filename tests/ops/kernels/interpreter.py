"""Triton's interpreter, mended where it computes bfloat16 wrongly (3.6 to 3.9).

There, products of bfloat16 operands are garbage, float32 is cut off instead of rounded, and arithmetic is done on the
bits. Here operands are widened to float32, results rounded to nearest even. Inline assembly is emulated for the one
instruction that kernels use. Import before any kernel runs.
"""

import operator

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def is_bf16(handle: Handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


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
