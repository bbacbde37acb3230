// The kernels of cpu/kernels.h once for each instruction set, and the choice among them.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "threads.h"
#include "types.h"

namespace pbf {

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PBF_DISPATCH 1
#ifdef __clang__
#define PBF_TARGET(features) _Pragma(PBF_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define PBF_TARGET_END _Pragma("clang attribute pop")
#else
#define PBF_TARGET(features) _Pragma("GCC push_options") _Pragma(PBF_TEXT(GCC target(features)))
#define PBF_TARGET_END _Pragma("GCC pop_options")
#endif
#define PBF_TEXT(x) #x

#define PBF_BYTES 64
#define PBF_ROWS 12
#define PBF_VECTORS 2
#define PBF_BF16_DOT 1
PBF_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace avx512_bf16 {
#include "kernels.h"
}
PBF_TARGET_END
#undef PBF_BF16_DOT
PBF_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
#include "kernels.h"
}
PBF_TARGET_END
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS

// 12 sums, two vectors of weights and a number of a row: 15 of 16 registers.
#define PBF_BYTES 32
#define PBF_ROWS 6
#define PBF_VECTORS 2
PBF_TARGET("avx2,fma")
namespace avx2 {
#include "kernels.h"
}
PBF_TARGET_END
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS
#endif

// What every processor of a family has: SSE2, or NEON with its 32 registers.
#define PBF_BYTES 16
#define PBF_ROWS 6
#ifdef __aarch64__
#define PBF_VECTORS 4
#else
#define PBF_VECTORS 2
#endif
namespace baseline {
#include "kernels.h"
}
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

inline Isa best_isa() {
#ifdef PBF_DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

// The instruction set in use.
inline Isa isa = best_isa();

inline void use_instruction_set(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
        if (name == kIsaNames[i]) {
            isa = static_cast<Isa>(i);
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is unavailable on this CPU; the best is " +
                                kIsaNames[static_cast<int>(best_isa())]);
}

// A call with the kernels of an instruction set, and what stands before it: PBF_CALL(isa, result =, function(a, b)).
#ifdef PBF_DISPATCH
#define PBF_CALL(which, before, ...)                                         \
    switch (which) {                                                         \
        case Isa::avx512_bf16: before avx512_bf16::__VA_ARGS__; break;       \
        case Isa::avx512: before avx512::__VA_ARGS__; break;                 \
        case Isa::avx2: before avx2::__VA_ARGS__; break;                     \
        case Isa::baseline: before baseline::__VA_ARGS__; break;             \
    }
#else
#define PBF_CALL(which, before, ...) (void)which, before baseline::__VA_ARGS__
#endif

}  // namespace pbf
