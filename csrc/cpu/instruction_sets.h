// The kernels of cpu/kernels.h once for each instruction set, and the choice among them.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <arm_neon.h>
#include <sys/auxv.h>
#ifndef HWCAP2_BF16  // headers of Linux before 5.7
#define HWCAP2_BF16 (1 << 14)
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "amx.h"
#include "threads.h"
#include "types.h"
#ifdef PBF_AMX
#include "tile_emulator.h"
#endif

namespace pbf {

#ifdef __clang__
#define PBF_TARGET(features) _Pragma(PBF_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define PBF_TARGET_END _Pragma("clang attribute pop")
#else
#define PBF_TARGET(features) _Pragma("GCC push_options") _Pragma(PBF_TEXT(GCC target(features)))
#define PBF_TARGET_END _Pragma("GCC pop_options")
#endif
#define PBF_TEXT(x) #x

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define PBF_X86_SETS 1
#define PBF_BYTES 64
#define PBF_ROWS 12
#define PBF_VECTORS 2
#define PBF_BF16_DOT 1
#ifdef PBF_AMX
#define PBF_TILES HardwareTiles
PBF_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,amx-tile,amx-bf16")
namespace amx_bf16 {
#include "kernels.h"
}
PBF_TARGET_END
#undef PBF_TILES
#endif
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

// For tests alone: the products of amx_bf16 on any CPU with AVX2, all else as AVX2 has it. Panels as wide as a pair of tiles.
#ifdef PBF_AMX
#define PBF_BYTES 32
#define PBF_ROWS 2
#define PBF_VECTORS 4
#define PBF_BF16_DOT 1
#define PBF_EMULATED 1
#define PBF_TILES EmulatedTiles
PBF_TARGET("avx2,fma")
namespace amx_bf16_emulated {
#include "kernels.h"
}
PBF_TARGET_END
#undef PBF_TILES
#undef PBF_EMULATED
#undef PBF_BF16_DOT
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS
#endif
#endif

// 16 bytes: 12 sums in SSE2's 16 registers, 20 in NEON's 32. With 24, GCC loads all rows' numbers first, and spills sums.
#define PBF_BYTES 16
#ifdef __aarch64__
#define PBF_ROWS 5
#define PBF_VECTORS 4
#else
#define PBF_ROWS 6
#define PBF_VECTORS 2
#endif
// The intrinsics of BFDOT are there without a flag for the whole file, but for Clang before 16.
#if defined(__aarch64__) && defined(__linux__) && !(defined(__clang__) && __clang_major__ < 16)
#define PBF_NEON_BF16 1
#define PBF_BF16_DOT 1
#ifdef __clang__
PBF_TARGET("bf16")
#else
PBF_TARGET("arch=armv8.2-a+bf16")
#endif
namespace neon_bf16 {
#include "kernels.h"
}
PBF_TARGET_END
#undef PBF_BF16_DOT
#endif
// What every processor of a family has.
namespace baseline {
#include "kernels.h"
}
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS

#if defined(PBF_X86_SETS)
enum class Isa { baseline, avx2, avx512, avx512_bf16, amx_bf16, amx_bf16_emulated };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16", "amx_bf16_emulated"};
#elif defined(PBF_NEON_BF16)
enum class Isa { baseline, neon_bf16 };
constexpr const char* kIsaNames[] = {"baseline", "neon_bf16"};
#else
enum class Isa { baseline };
constexpr const char* kIsaNames[] = {"baseline"};
#endif

// Of those whose instructions CPUID, or the kernel, vouches for.
inline Isa best_vector_isa() {
#if defined(PBF_X86_SETS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#elif defined(PBF_NEON_BF16)
    if (getauxval(AT_HWCAP2) & HWCAP2_BF16) return Isa::neon_bf16;
#endif
    return Isa::baseline;
}

// Why amx_bf16 is not to be used, or nothing. Asks Linux for its permission, and checks the products on this very machine.
inline std::string amx_failure(Isa vectors) {
#ifdef PBF_AMX
    const char* set = std::getenv("PROTEINBERT_FAST_AMX");
    const std::string wanted = set ? set : "";
    if (wanted == "0") return "PROTEINBERT_FAST_AMX is 0 in the environment";
    if (wanted != "" && wanted != "1")
        throw std::invalid_argument("PROTEINBERT_FAST_AMX is '" + wanted +
                                    "' in the environment: set 0 to turn AMX off, 1 for the default");
    if (std::string found = amx_unsupported(amx_facts(vectors == Isa::avx512_bf16)); !found.empty()) return found;
    if (std::string found = amx_refused(request_amx()); !found.empty()) return found;
    const std::string found = check_amx<HardwareTiles>(amx_bf16::product, amx_bf16::pack_column<bf16, bf16>);
    return found.empty() ? found : "its self-check found " + found;
#else
    (void)vectors;
    return "it was built without AMX";
#endif
}

struct BestIsa {
    Isa isa;
    std::string amx_failure;
};

// Found out on first use, by one thread.
inline const BestIsa& best_isa() {
    static const BestIsa best = [] {
        const Isa vectors = best_vector_isa();
        const std::string failure = amx_failure(vectors);
#ifdef PBF_AMX
        if (failure.empty()) return BestIsa{Isa::amx_bf16, failure};
#endif
        return BestIsa{vectors, failure};
    }();
    return best;
}

// The one that use_instruction_set() chose, or none.
inline std::atomic<int> chosen_isa{-1};

// The instruction set in use.
inline Isa isa_in_use() {
    const int chosen = chosen_isa.load(std::memory_order_relaxed);
    return chosen < 0 ? best_isa().isa : static_cast<Isa>(chosen);
}

inline void use_instruction_set(const std::string& name) {
    int most = static_cast<int>(best_isa().isa);
#ifdef PBF_AMX
    if (name == kIsaNames[static_cast<int>(Isa::amx_bf16_emulated)] && best_vector_isa() >= Isa::avx2)
        most = static_cast<int>(Isa::amx_bf16_emulated);
#endif
    for (int i = 0; i <= most; ++i)
        if (name == kIsaNames[i]) {
            chosen_isa = i;
            return;
        }
    const std::string why = name == "amx_bf16" ? " (" + best_isa().amx_failure + ")" : "";
    throw std::invalid_argument("instruction set '" + name + "' is unavailable on this CPU" + why + "; the best is " +
                                kIsaNames[static_cast<int>(best_isa().isa)]);
}

// A call with the kernels of an instruction set, and what stands before it: PBF_CALL(isa, result =, function(a, b)).
#ifdef PBF_AMX
#define PBF_AMX_CASES(before, ...)                                            \
    case Isa::amx_bf16: before amx_bf16::__VA_ARGS__; break;                  \
    case Isa::amx_bf16_emulated: before amx_bf16_emulated::__VA_ARGS__; break;
#else
#define PBF_AMX_CASES(before, ...) \
    default: break;
#endif
#if defined(PBF_X86_SETS)
#define PBF_CALL(which, before, ...)                                         \
    switch (which) {                                                         \
        PBF_AMX_CASES(before, __VA_ARGS__)                                   \
        case Isa::avx512_bf16: before avx512_bf16::__VA_ARGS__; break;       \
        case Isa::avx512: before avx512::__VA_ARGS__; break;                 \
        case Isa::avx2: before avx2::__VA_ARGS__; break;                     \
        case Isa::baseline: before baseline::__VA_ARGS__; break;             \
    }
#elif defined(PBF_NEON_BF16)
#define PBF_CALL(which, before, ...)                                         \
    switch (which) {                                                         \
        case Isa::neon_bf16: before neon_bf16::__VA_ARGS__; break;           \
        case Isa::baseline: before baseline::__VA_ARGS__; break;             \
    }
#else
#define PBF_CALL(which, before, ...) (void)which, before baseline::__VA_ARGS__
#endif

}  // namespace pbf
