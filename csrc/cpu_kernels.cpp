// The local block and global attention, for the CPU: products and everything around them, a cacheful of rows at a time.
//
// Each has a plain twin in proteinbert_fast/ops/reference.py, which defines it. The products are our own because a
// row's bits must not depend on the shape of the batch, as they do in the matrix libraries, and because the rows
// between proteins need not be computed.

#include <dlfcn.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using bf16 = std::uint16_t;
constexpr float kLayerNormEpsilon = 1e-3f;
constexpr int kMaxChannels = 4096;
constexpr std::int64_t kTile = 256;  // rows of a protein whose attention sums are formed apart, then added in order
constexpr std::int64_t kBlock = 256;  // rows that a gradient of weights sums up before it goes to the next

// The first block's states are those of tokens: a convolution of them is a sum of rows of a small table.
constexpr int kTokens = 27;  // the last one is that of gaps, whose state is zeros

template <class T>
struct LocalBlock {
    const T* x;                    // (rows, channels), or
    const std::uint8_t* tokens;    // (rows,), and null where there are states
    const T* embedding;            // (kTokens, channels)
    const float* broadcast;        // (proteins, channels)
    const std::int32_t* segments;  // (rows,) protein of each row, -1 in gaps
    const T *narrow_weight, *wide_weight, *dense_weight;  // (out, in, taps) twice, (out, in)
    const float *narrow_bias, *wide_bias, *dense_bias;
    const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
    T *hidden, *local;  // (rows, channels) after the first norm, or null; after the second
    T *narrow, *wide;   // (rows, channels) what the convolutions gave, for the backward pass; both or neither null
    int channels, taps, wide_dilation;
};

// The local block's gradients but for those of its matrices; see local_block_backward and weight_gradient.
template <class T>
struct LocalBlockBackward {
    const T* x;                    // (rows, channels), as are all states and gradients here; or
    const std::uint8_t* tokens;    // (rows,), and null where there are states
    const T* embedding;            // (kTokens, channels)
    const float* broadcast;        // (proteins, channels)
    const std::int32_t* segments;  // (rows,)
    const T *narrow, *wide;        // what the convolutions gave
    const T *d_local, *d_hidden;   // d_hidden may be null
    const T *narrow_weight, *wide_weight, *dense_weight;  // as in the forward pass
    const float *dense_bias, *norm1_weight, *norm1_bias, *norm2_weight;
    T *hidden, *d_dense, *d_narrow, *d_wide;  // states after the first norm; gradients of what the products gave
    T* d_sum;      // gradients of what the first norm normalised
    T* d_x;        // or null
    float* d_tables;  // (kParts, kTokens, 2 * taps + 1, channels), those of all in the first; see token_sums
    float* sums;   // (units, kSums, channels), each unit's, those of all in the first
    int channels, taps, wide_dilation;
};
enum Sums { kNarrowBias, kWideBias, kNorm1Weight, kNorm1Bias, kDenseBias, kNorm2Weight, kNorm2Bias, kSums };
constexpr std::int64_t kUnit = 192;  // rows whose sums are formed apart, then added in order
constexpr std::int64_t kParts = 16;  // of a batch, whose sums by token are formed apart, then added in order

template <class T>
struct Attention {
    const T* local;                       // (rows, channels)
    const T *key_weight, *value_weight;   // (heads * d_key, channels), (heads * d_value, channels)
    const float* query;                   // (proteins, heads, d_key), after tanh
    float* partials;                      // (slots, heads, 1 + d_value): sum of e, sum of e * value
    float* weights;                       // (rows, heads) or null: e of each row
    int channels, heads, d_key, d_value;
    float scale_log2;
};

template <class T>
struct AttentionBackward {
    Attention<T> forward;       // partials and weights are not used
    const float* denominators;  // (proteins, heads)
    const float* pooled;        // (proteins, heads, d_value), the result
    const float* d_pooled;      // (proteins, heads, d_value)
    T* d_local;                 // (rows, channels)
    float* d_query;             // (slots, heads, d_key)
    float* d_weights;           // (channels, heads * d_key + heads * d_value), which is added to, or null
};

// The gradient of a matrix, or of a convolution's: out[t][i][o] += the sum over rows r of
// x[r + (t - taps / 2) * dilation][i] * gradient[r][o].
template <class T>
struct WeightGradient {
    const T* x;         // (rows, inputs)
    const T* gradient;  // (rows, columns), of what the product gave
    float* out;         // (taps, inputs, columns)
    int inputs, columns, taps, dilation;
};

// kTile rows of one protein, counted from its own first row.
struct Tile {
    std::int64_t row, slot;
    std::int32_t protein;
    int rows;
};

// Neighbouring rows of a unit of work that are none of a gap.
struct Run {
    int first, rows;
};
using Runs = std::vector<Run>;

Runs runs_of(const std::int32_t* segments, int rows) {
    Runs runs;
    for (int r = 0; r < rows; ++r) {
        if (segments[r] < 0) continue;
        if (runs.empty() || runs.back().first + runs.back().rows < r) runs.push_back({r, 0});
        ++runs.back().rows;
    }
    return runs;
}

// A matrix product, or a convolution as one product per tap.
template <class E>
struct Product {
    const E* weights;   // packed
    const float* bias;  // (columns,) or null
    int inputs, columns, taps, dilation, out_stride;
};

// Room that is aligned, grows, and is not cleared.
template <class T>
class Buffer {
public:
    T* room(std::int64_t values) {
        if (values > size_) {
            data_.reset(static_cast<T*>(::operator new(values * sizeof(T), kAlignment)));
            size_ = values;
        }
        return data_.get();
    }
    const T* data() const { return data_.get(); }

private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(T* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<T, Free> data_;
    std::int64_t size_ = 0;
};

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

// Rows whose sums and states a thread keeps in its second-level cache; fewer when there would be too few for all threads.
std::int64_t rows_per_unit(std::int64_t rows, int threads) {
    const std::int64_t share = (rows + threads - 1) / std::max(threads, 1);
    return std::clamp<std::int64_t>((share + 11) / 12 * 12, 48, 240);
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PBF_DISPATCH 1
#define PBF_BYTES 64
#define PBF_ROWS 12
#define PBF_VECTORS 2
#define PBF_BF16_DOT 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
namespace avx512_bf16 {
#include "cpu_kernels_body.h"
}
#pragma GCC pop_options
#undef PBF_BF16_DOT
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#include "cpu_kernels_body.h"
}
#pragma GCC pop_options
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS
#define PBF_BYTES 32
#define PBF_ROWS 6
#define PBF_VECTORS 2
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu_kernels_body.h"
}
#pragma GCC pop_options
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS
#endif
#define PBF_BYTES 16
#define PBF_ROWS 6
#define PBF_VECTORS 2
namespace baseline {
#include "cpu_kernels_body.h"
}

enum class Isa { baseline, avx2, avx512, avx512_bf16 };
constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Isa best_isa() {
#ifdef PBF_DISPATCH
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") ? Isa::avx512_bf16 : Isa::avx512;
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
#define PBF_CALL(function, ...)                                              \
    switch (isa) {                                                           \
        case Isa::avx512_bf16: avx512_bf16::function(__VA_ARGS__); break;    \
        case Isa::avx512: avx512::function(__VA_ARGS__); break;              \
        case Isa::avx2: avx2::function(__VA_ARGS__); break;                  \
        case Isa::baseline: baseline::function(__VA_ARGS__); break;          \
    }
#else
#define PBF_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif

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

// Rows [first, last) of the batch, from states `x`, or from tokens where that is 0; `hidden`, and `narrow` with `wide`, may be 0.
void local_block(std::uintptr_t x, std::uintptr_t tokens, std::uintptr_t embedding, std::uintptr_t broadcast,
                 std::uintptr_t segments, const std::vector<std::uintptr_t>& weights, std::uintptr_t hidden,
                 std::uintptr_t local, std::uintptr_t narrow, std::uintptr_t wide, std::int64_t first,
                 std::int64_t last, int channels, int taps, int wide_dilation, bool is_bf16, int threads) {
    check_channels("channels", channels);
    if (weights.size() != 10) throw std::invalid_argument("a local block has 10 weights");
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const auto& w = weights;
        const LocalBlock<T> a{at<const T>(x),           at<const std::uint8_t>(tokens), at<const T>(embedding),
                              at<const float>(broadcast), at<const std::int32_t>(segments),
                              at<const T>(w[0]),        at<const T>(w[2]),              at<const T>(w[6]),
                              at<const float>(w[1]),    at<const float>(w[3]),          at<const float>(w[7]),
                              at<const float>(w[4]),    at<const float>(w[5]),          at<const float>(w[8]),
                              at<const float>(w[9]),    at<T>(hidden),                  at<T>(local),
                              at<T>(narrow),            at<T>(wide),                    channels,
                              taps,                     wide_dilation};
        PBF_CALL(local_block, a, first, last, threads);
    });
}

// Gradients of a batch of `rows` rows whose first and last `gap` are gaps. Of the weights' gradients, those of norms and
// biases, in the order of Sums, and what weight_gradient makes the others of. `d_hidden` may be 0; where `x` is, `d_tables`
// are made and not `d_x`, and either may be 0.
void local_block_backward(std::uintptr_t x, std::uintptr_t tokens, std::uintptr_t embedding, std::uintptr_t broadcast,
                          std::uintptr_t segments, const std::vector<std::uintptr_t>& weights, std::uintptr_t narrow,
                          std::uintptr_t wide, std::uintptr_t d_local, std::uintptr_t d_hidden,
                          const std::vector<std::uintptr_t>& results, std::uintptr_t d_x, std::uintptr_t d_tables,
                          std::uintptr_t sums, std::int64_t gap, std::int64_t rows, int channels, int taps,
                          int wide_dilation, bool is_bf16, int threads) {
    check_channels("channels", channels);
    if (weights.size() != 10) throw std::invalid_argument("a local block has 10 weights");
    if (results.size() != 5) throw std::invalid_argument("a local block's backward pass has 5 results");
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const auto& w = weights;
        const auto& r = results;
        const LocalBlockBackward<T> a{
            at<const T>(x),        at<const std::uint8_t>(tokens), at<const T>(embedding),
            at<const float>(broadcast), at<const std::int32_t>(segments),
            at<const T>(narrow),   at<const T>(wide),          at<const T>(d_local),
            at<const T>(d_hidden), at<const T>(w[0]),          at<const T>(w[2]),
            at<const T>(w[6]),     at<const float>(w[7]),      at<const float>(w[4]),
            at<const float>(w[5]), at<const float>(w[8]),      at<T>(r[0]),
            at<T>(r[1]),           at<T>(r[2]),                at<T>(r[3]),
            at<T>(r[4]),           at<T>(d_x),                 at<float>(d_tables),
            at<float>(sums),       channels,                   taps,
            wide_dilation};
        PBF_CALL(local_block_backward, a, gap, rows - gap, rows, threads);
    });
}

std::vector<Tile> tiles_of(const std::int64_t* starts, const std::int64_t* lengths, const std::int64_t* slots,
                           std::int64_t proteins) {
    std::vector<Tile> tiles;
    for (std::int64_t p = 0; p < proteins; ++p)
        for (std::int64_t row = 0; row < lengths[p]; row += kTile)
            tiles.push_back({starts[p] + row, slots[p] + row / kTile, static_cast<std::int32_t>(p),
                             static_cast<int>(std::min(kTile, lengths[p] - row))});
    return tiles;
}

// Sums over each tile of each protein; see attention_finish. `weights` may be 0.
void attention(std::uintptr_t local, std::uintptr_t key_weight, std::uintptr_t value_weight, std::uintptr_t query,
               std::uintptr_t starts, std::uintptr_t lengths, std::uintptr_t slots, std::int64_t proteins,
               std::uintptr_t partials, std::uintptr_t weights, int channels, int heads, int d_key, int d_value,
               bool is_bf16, int threads) {
    check_channels("channels", channels);
    check_channels("d_key", d_key);
    check_channels("d_value", d_value);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const Attention<T> a{at<const T>(local), at<const T>(key_weight), at<const T>(value_weight),
                             at<const float>(query), at<float>(partials), at<float>(weights),
                             channels, heads, d_key, d_value,
                             1.4426950408889634f / std::sqrt(static_cast<float>(d_key))};
        const auto tiles = tiles_of(at<const std::int64_t>(starts), at<const std::int64_t>(lengths),
                                    at<const std::int64_t>(slots), proteins);
        PBF_CALL(attention, a, tiles, threads);
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

// Gradients from those of the pooled values. `keys_values_weight` are all heads' keys, then all heads' values; so are the
// columns of `d_weights`, which are added to, or 0. `d_query` has a part for each slot; protein_sums adds them up.
void attention_backward(std::uintptr_t local, std::uintptr_t keys_values_weight, std::uintptr_t query,
                        std::uintptr_t starts, std::uintptr_t lengths, std::uintptr_t slots, std::int64_t proteins,
                        std::uintptr_t denominators, std::uintptr_t pooled, std::uintptr_t d_pooled,
                        std::uintptr_t d_local, std::uintptr_t d_query, std::uintptr_t d_weights, int channels,
                        int heads, int d_key, int d_value, bool is_bf16, int threads) {
    check_channels("channels", channels);
    check_channels("d_key", d_key);
    check_channels("d_value", d_value);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const T* weight = at<const T>(keys_values_weight);
        const AttentionBackward<T> a{{at<const T>(local), weight, weight + std::int64_t{heads} * d_key * channels,
                                      at<const float>(query), nullptr, nullptr, channels, heads, d_key, d_value,
                                      1.4426950408889634f / std::sqrt(static_cast<float>(d_key))},
                                     at<const float>(denominators), at<const float>(pooled), at<const float>(d_pooled),
                                     at<T>(d_local), at<float>(d_query), at<float>(d_weights)};
        const auto tiles = tiles_of(at<const std::int64_t>(starts), at<const std::int64_t>(lengths),
                                    at<const std::int64_t>(slots), proteins);
        PBF_CALL(attention_backward, a, weight, tiles, threads);
    });
}

// See WeightGradient; rows [first, last), and as many around them as the taps reach.
void weight_gradient(std::uintptr_t x, std::uintptr_t gradient, std::uintptr_t out, std::int64_t first,
                     std::int64_t last, int inputs, int columns, int taps, int dilation, bool is_bf16, int threads) {
    check_channels("inputs", inputs);
    check_channels("columns", columns);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const WeightGradient<T> a{at<const T>(x), at<const T>(gradient), at<float>(out), inputs, columns, taps, dilation};
        PBF_CALL(weight_gradient, a, first, last, threads);
    });
}

// out = sums of (rows, channels) over each protein, in order.
void protein_sums(std::uintptr_t rows, std::uintptr_t starts, std::uintptr_t lengths, std::int64_t proteins,
                  std::uintptr_t out, int channels, bool is_bf16, int threads) {
    check_channels("channels", channels);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        PBF_CALL(protein_sums, at<const T>(rows), at<const std::int64_t>(starts), at<const std::int64_t>(lengths),
                 proteins, at<float>(out), channels, threads);
    });
}

}  // namespace

PYBIND11_MODULE(_cpu_kernels, m) {
    m.doc() = "The local block and global attention of the CPU back end; see ops/cpu.py.";
    m.attr("TILE") = kTile;
    m.def("local_block", &local_block);
    m.def("attention", &attention);
    m.def("attention_finish", &attention_finish);
    m.attr("UNIT") = kUnit;
    m.attr("PARTS") = kParts;
    m.attr("SUMS") = static_cast<int>(kSums);
    m.def("local_block_backward", &local_block_backward);
    m.def("attention_backward", &attention_backward);
    m.def("weight_gradient", &weight_gradient);
    m.def("protein_sums", &protein_sums);
    m.def("instruction_set", [] { return kIsaNames[static_cast<int>(isa)]; }, "The one in use.");
    m.def("use_instruction_set", &use_instruction_set, "Uses a lesser one than the best, to test it or to compare.");
    m.def("shares_threads", [] { return gomp_parallel() != nullptr; },
          "Whether PyTorch's OpenMP threads were found; if not, these kernels run on one thread.");
}
