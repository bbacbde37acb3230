// Vectors as wide as the registers of an instruction set, and what lanes do one by one.

constexpr int kLanes = PBF_BYTES / 4;
using Floats = float __attribute__((vector_size(PBF_BYTES)));
using Ints = std::int32_t __attribute__((vector_size(PBF_BYTES)));
using Words = std::uint32_t __attribute__((vector_size(PBF_BYTES)));
using Halves = std::uint16_t __attribute__((vector_size(PBF_BYTES / 2)));

inline Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline float widened(bf16 x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline Floats load(const bf16* p) {
    Halves h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<Floats>(__builtin_convertvector(h, Words) << 16);
}

// Rounds to nearest even. NaN is set apart: the carry would turn it into a number.
inline void store(bf16* p, Floats v) {
    const Words bits = reinterpret_cast<Words>(v);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words is_nan = reinterpret_cast<Words>(v != v);
    const Halves h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0u & is_nan), Halves);
    std::memcpy(p, &h, sizeof h);
}

inline Floats splat(float x) { return Floats{} + x; }

inline Floats absolute(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & 0x7fffffff); }

// Both keep NaN: the comparison is false for it, and the second operand is x itself. x86's instructions do just that; GCC
// does not find them, and blends. (With a mask because GCC warns of the operand that the intrinsic without one leaves open.)
#if !defined(__x86_64__) || defined(PBF_EMULATED)
inline Floats at_least(Floats x, float low) { return splat(low) > x ? splat(low) : x; }
inline Floats at_most(Floats x, float high) { return splat(high) < x ? splat(high) : x; }
#elif PBF_BYTES == 64
inline Floats at_least(Floats x, float low) { return _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x); }
inline Floats at_most(Floats x, float high) { return _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), x); }
#elif PBF_BYTES == 32
inline Floats at_least(Floats x, float low) { return _mm256_max_ps(_mm256_set1_ps(low), x); }
inline Floats at_most(Floats x, float high) { return _mm256_min_ps(_mm256_set1_ps(high), x); }
#else
inline Floats at_least(Floats x, float low) { return _mm_max_ps(_mm_set1_ps(low), x); }
inline Floats at_most(Floats x, float high) { return _mm_min_ps(_mm_set1_ps(high), x); }
#endif
