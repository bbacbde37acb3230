"""Activations and norms inside kernels, in float32."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tail(a, PRECISE: tl.constexpr):
    """The normal distribution's upper tail at 0 <= a <= 6, as a power of two."""
    if PRECISE:
        p = 3.3093125e-5 * a - 7.6922245e-4
        p = p * a + 8.0807256e-3
        p = p * a - 5.3412117e-2
        p = p * a - 4.5877096e-1
        p = p * a - 1.1512017
        p = p * a - 9.9999309e-1
    else:
        p = -0.00047329469 * a + 0.0070844661
        p = p * a - 0.0518271811
        p = p * a - 0.4599926472
        p = p * a - 1.1507878304
        p = p * a - 1.0000376701
    return tl.exp2(p)


@triton.jit
def gelu(x, PRECISE: tl.constexpr):
    """The erf form: max(x, 0) - |x| 2^P(|x|), where 2^P is the normal distribution's upper tail.

    To 8e-8 where PRECISE, which is for float32 states, else to 7e-7 with one step less. As the exact form, +inf gives
    +inf, and -inf and NaN give NaN. Beyond 6 the second term is below 6e-9.
    """
    magnitude = tl.abs(x)
    a = tl.minimum(magnitude, 6.0)
    return 0.5 * (x + magnitude) - a * _tail(a, PRECISE)


@triton.jit
def gelu_and_slope(x, PRECISE: tl.constexpr):
    """GELU as above, and its derivative Phi(x) + x phi(x) to as many digits; 0 or 1 at infinities."""
    magnitude = tl.abs(x)
    a = tl.minimum(magnitude, 6.0)
    tail = _tail(a, PRECISE)
    # 1 / sqrt(2 pi) is a power of two as well.
    density = tl.exp2(a * a * -0.7213475204 - 1.3257480647)
    # Both halves are the tail's: Phi(-a) = tail, Phi(a) = 1 - tail.
    slope = tail - a * density
    return 0.5 * (x + magnitude) - a * tail, tl.where(x > 0, 1.0 - slope, slope)


@triton.jit
def tanh(x):
    """To 2e-7."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.885390081777927))


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of a layer, by name."""
    if NAME == "gelu":
        x = gelu(x, True)
    elif NAME == "tanh":
        x = tanh(x)
    elif NAME == "sigmoid":
        x = 1.0 / (1.0 + tl.exp2(x * -LOG2_E))
    return x


@triton.jit
def layer_norm(x, weight, bias, columns, EPSILON: tl.constexpr):
    """Of rows (M, N) of which ``columns`` are real; the others must be 0. ``weight`` and ``bias`` are (N,)."""
    inside = (tl.arange(0, x.shape[1]) < columns)[None, :]
    mean = tl.sum(x, axis=1) / columns
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / columns + EPSILON)
    return centred * scale[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def kept_16_bit(x):
    """A 16-bit value that stays one: without it the compiler keeps its float32 origin alive and spills it."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)


@triton.jit
def settled(x):
    """A float32 sum of products on Hopper, waited for; no instruction is left of this.

    Left in flight from one turn of a loop to the next, it makes ptxas let every product wait for the one before.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=True, pack=1)
