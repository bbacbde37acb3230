// GELU, tanh and powers of two, lane by lane.

// 2^x to 2e-7 relative for |x| <= 126, by rounding x to an integer in the low mantissa bits of a large float. A NaN may
// come out as a number: its bits are added to.
inline Floats exp2_of_number(Floats x) {
    const Floats shifted = x + 12582912.0f;  // 1.5 * 2^23
    const Floats f = x - (shifted - 12582912.0f);
    Floats p = splat(1.32764666e-3f);
    p = p * f + 9.67554189e-3f;
    p = p * f + 5.55071346e-2f;
    p = p * f + 2.40221202e-1f;
    p = p * f + 6.93146944e-1f;
    p = p * f + 1.0f;
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
}

inline Floats exp2_(Floats x) { return x == x ? exp2_of_number(at_most(at_least(x, -126.0f), 126.0f)) : x; }

// The normal distribution's upper tail beyond |x|, for 0 <= a = |x| <= 6: 2^P(a), P a fit that keeps the error of a * tail
// least, 6e-8; that of the tail itself is 3e-6 near 0.
inline Floats tail(Floats a) {
    Floats p = splat(3.3093125e-5f);
    p = p * a - 7.6922245e-4f;
    p = p * a + 8.0807256e-3f;
    p = p * a - 5.3412117e-2f;
    p = p * a - 4.5877096e-1f;
    p = p * a - 1.1512017f;
    p = p * a - 9.9999309e-1f;
    return exp2_of_number(p);
}

// The erf form of GELU to 8e-8 absolute: max(x, 0) - |x| tail(|x|); beyond 6, the second term stays below 6e-9. As the exact
// form, +inf gives +inf, and -inf and NaN give NaN.
inline Floats gelu(Floats x) {
    const Floats magnitude = absolute(x);
    const Floats a = at_most(magnitude, 6.0f);
    return 0.5f * (x + magnitude) - a * tail(a);
}

struct Gelu {
    Floats value, slope;
};

// GELU with its derivative, the normal distribution's share below x and x times its density, to 3e-6 absolute. Beyond 6 the
// slope is as at 6. NaN gives NaN.
inline Gelu gelu_and_slope(Floats x) {
    const Floats magnitude = absolute(x);
    const Floats a = at_most(magnitude, 6.0f);
    const Floats t = tail(a);
    const Floats beyond = t - a * (0.3989422804f * exp2_of_number(-0.7213475204f * a * a));
    return {0.5f * (x + magnitude) - a * t, x < 0.0f ? beyond : 1.0f - beyond};
}

// tanh to 3e-7 absolute.
inline Floats tanh_(Floats x) { return 1.0f - 2.0f / (1.0f + exp2_(2.885390082f * x)); }
