// The element-wise halves of the local block and the reduction of global attention, for the CPU.
//
// The matrix products stay with PyTorch's libraries; these kernels do in one pass what would otherwise be four to
// ten passes over memory. Each has a plain twin in proteinbert_fast/ops/reference.py, which defines it.

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace py = pybind11;

// The 64-byte vectors never cross the border of this file.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace {

using bf16 = std::uint16_t;
constexpr float kLayerNormEpsilon = 1e-3f;
constexpr int kMaxChannels = 4096;
constexpr std::int64_t kTile = 256;  // rows of a protein whose attention sums are formed apart, then added in order

template <class T>
struct MergeConvolutions {
    const T *x, *narrow, *wide;
    const float* broadcast;        // (proteins, channels)
    const std::int32_t* segments;  // (rows,) protein of each row, -1 in gaps
    const float *gamma, *beta;
    T* out;
    int channels;
};

template <class T>
struct MergeDense {
    const T *hidden, *dense;
    const std::int32_t* segments;
    const float *gamma, *beta;
    T* out;
    int channels;
};

template <class T>
struct Attention {
    const T* keys_values;  // (rows of the piece, heads * d_key + heads * d_value), before tanh and GELU
    const float* query;    // (proteins, heads, d_key), after tanh
    float* partials;       // (slots, heads, 1 + d_value): sum of e, sum of e * value
    float* weights;        // (rows of the batch, heads) or null: e of each row
    std::int64_t first_row;
    int heads, d_key, d_value;
    float scale_log2;
};

struct TileRun {
    std::int64_t row;  // within the piece
    std::int64_t slot;
    std::int32_t protein;
    int rows;
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PBF_DISPATCH 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "cpu_kernels_body.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu_kernels_body.h"
}
#pragma GCC pop_options
#endif
namespace baseline {
#include "cpu_kernels_body.h"
}

enum class Isa { baseline, avx2, avx512 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

Isa best_isa() {
#ifdef PBF_DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return Isa::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
    return Isa::baseline;
}

Isa isa = best_isa();

void use_instruction_set(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
        if (name == kIsaNames[i]) {
            isa = static_cast<Isa>(i);
            return;
        }
    throw std::invalid_argument("instruction set '" + name + "' is not to be had here; the best is " +
                                kIsaNames[static_cast<int>(best_isa())]);
}

#ifdef PBF_DISPATCH
#define PBF_CALL(function, ...)                                        \
    switch (isa) {                                                     \
        case Isa::avx512: avx512::function(__VA_ARGS__); break;        \
        case Isa::avx2: avx2::function(__VA_ARGS__); break;            \
        case Isa::baseline: baseline::function(__VA_ARGS__); break;    \
    }
#else
#define PBF_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif

// Runs body(i) for i in [0, items) on the OpenMP threads that PyTorch already has. A pool of our own would fight with
// that one: its threads spin for a while after each of PyTorch's operations. Without PyTorch's pool, one thread.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp_parallel() {
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

template <class Body>
void parallel_for(std::int64_t items, int threads, const Body& body) {
    if (threads <= 1 || items <= 1 || !gomp_parallel()) {
        for (std::int64_t i = 0; i < items; ++i) body(i);
        return;
    }
    struct Shared {
        const Body& body;
        std::int64_t items;
        std::atomic<std::int64_t> next{0};
    } shared{body, items};
    gomp_parallel()(
        [](void* p) {
            auto& s = *static_cast<Shared*>(p);
            for (std::int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) s.body(i);
        },
        &shared, static_cast<unsigned>(threads), 0);
}

constexpr std::int64_t kRowsPerItem = 64;

template <class Kernel>
void over_rows(std::int64_t rows, int threads, const Kernel& kernel) {
    parallel_for((rows + kRowsPerItem - 1) / kRowsPerItem, threads, [&](std::int64_t i) {
        kernel(i * kRowsPerItem, std::min(rows, (i + 1) * kRowsPerItem));
    });
}

// Addresses come as integers from Tensor.data_ptr(): bfloat16 has no buffer format. ops/cpu.py checks every shape.
template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check_channels(const char* name, int channels) {
    if (channels < 16 || channels > kMaxChannels || channels % 16)
        throw std::invalid_argument(std::string(name) + " must be a multiple of 16 up to " +
                                    std::to_string(kMaxChannels) + ", got " + std::to_string(channels));
}

template <class Function>
void by_dtype(bool is_bf16, const Function& function) {
    py::gil_scoped_release unlocked;
    if (is_bf16)
        function(bf16{});
    else
        function(float{});
}

void merge_convolutions(std::uintptr_t x, std::uintptr_t narrow, std::uintptr_t wide, std::uintptr_t broadcast,
                        std::uintptr_t segments, std::uintptr_t gamma, std::uintptr_t beta, std::uintptr_t out,
                        std::int64_t rows, int channels, bool is_bf16, int threads) {
    check_channels("channels", channels);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const MergeConvolutions<T> a{at<const T>(x), at<const T>(narrow), at<const T>(wide), at<const float>(broadcast),
                                     at<const std::int32_t>(segments), at<const float>(gamma), at<const float>(beta),
                                     at<T>(out), channels};
        over_rows(rows, threads, [&](std::int64_t first, std::int64_t last) {
            PBF_CALL(merge_convolutions, a, first, last);
        });
    });
}

void merge_dense(std::uintptr_t hidden, std::uintptr_t dense, std::uintptr_t segments, std::uintptr_t gamma,
                 std::uintptr_t beta, std::uintptr_t out, std::int64_t rows, int channels, bool is_bf16, int threads) {
    check_channels("channels", channels);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const MergeDense<T> a{at<const T>(hidden), at<const T>(dense), at<const std::int32_t>(segments),
                              at<const float>(gamma), at<const float>(beta), at<T>(out), channels};
        over_rows(rows, threads,
                  [&](std::int64_t first, std::int64_t last) { PBF_CALL(merge_dense, a, first, last); });
    });
}

// Adds the rows [first_row, first_row + rows) of the batch to the partial sums of their proteins' tiles.
void attention(std::uintptr_t keys_values, std::uintptr_t query, std::uintptr_t starts, std::uintptr_t lengths,
               std::uintptr_t slots, std::int64_t proteins, std::uintptr_t partials, std::uintptr_t weights,
               std::int64_t first_row, std::int64_t rows, int heads, int d_key, int d_value, bool is_bf16,
               int threads) {
    check_channels("d_key", d_key);
    check_channels("d_value", d_value);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const Attention<T> a{at<const T>(keys_values), at<const float>(query), at<float>(partials), at<float>(weights),
                             first_row, heads, d_key, d_value,
                             1.4426950408889634f / std::sqrt(static_cast<float>(d_key))};
        const auto* start = at<const std::int64_t>(starts);
        const auto* length = at<const std::int64_t>(lengths);
        const auto* slot = at<const std::int64_t>(slots);
        const std::int64_t end_row = first_row + rows;
        std::vector<TileRun> runs;
        // Starts ascend: the first protein that can reach into the piece is the last one that starts before it.
        std::int64_t p = std::upper_bound(start, start + proteins, first_row) - start;
        for (p = std::max<std::int64_t>(p - 1, 0); p < proteins && start[p] < end_row; ++p) {
            std::int64_t row = std::max(start[p], first_row);
            const std::int64_t end = std::min(start[p] + length[p], end_row);
            while (row < end) {
                const std::int64_t tile = (row - start[p]) / kTile;
                const std::int64_t next = std::min(end, start[p] + (tile + 1) * kTile);
                runs.push_back({row - first_row, slot[p] + tile, static_cast<std::int32_t>(p),
                                static_cast<int>(next - row)});
                row = next;
            }
        }
        parallel_for(static_cast<std::int64_t>(runs.size()) * heads, threads, [&](std::int64_t i) {
            PBF_CALL(attention_tile, a, runs[static_cast<std::size_t>(i / heads)], static_cast<int>(i % heads));
        });
    });
}

// out = (sum over tiles of sum(e * value)) / (sum over tiles of sum(e)), tiles in order; denominators on the side.
void attention_finish(std::uintptr_t partials, std::uintptr_t slots, std::int64_t proteins, std::uintptr_t out,
                      std::uintptr_t denominators, int heads, int d_value) {
    py::gil_scoped_release unlocked;
    const auto* partial = at<const float>(partials);
    const auto* slot = at<const std::int64_t>(slots);
    auto* result = at<float>(out);
    auto* denominator = at<float>(denominators);
    for (std::int64_t p = 0; p < proteins; ++p)
        for (int h = 0; h < heads; ++h) {
            float* o = result + (p * heads + h) * d_value;
            float total = 0;
            std::fill(o, o + d_value, 0.0f);
            for (std::int64_t s = slot[p]; s < slot[p + 1]; ++s) {
                const float* tile = partial + (s * heads + h) * (1 + d_value);
                total += tile[0];
                for (int c = 0; c < d_value; ++c) o[c] += tile[1 + c];
            }
            denominator[p * heads + h] = total;
            for (int c = 0; c < d_value; ++c) o[c] /= total;
        }
}

}  // namespace

PYBIND11_MODULE(_cpu_kernels, m) {
    m.doc() = "Fused element-wise passes and attention sums of the CPU back end; see ops/cpu.py.";
    m.attr("TILE") = kTile;
    m.def("merge_convolutions", &merge_convolutions);
    m.def("merge_dense", &merge_dense);
    m.def("attention", &attention);
    m.def("attention_finish", &attention_finish);
    m.def("instruction_set", [] { return kIsaNames[static_cast<int>(isa)]; }, "The one in use.");
    m.def("use_instruction_set", &use_instruction_set, "Uses a lesser one than the best, to test it or to compare.");
    m.def("shares_threads", [] { return gomp_parallel() != nullptr; },
          "Whether PyTorch's OpenMP threads were found; if not, these kernels run on one thread.");
}
