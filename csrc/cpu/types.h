// What kernels of every instruction set take, and memory to work in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace pbf {

using bf16 = std::uint16_t;
constexpr float kLayerNormEpsilon = 1e-3f;
constexpr int kMaxChannels = 4096;
constexpr std::int64_t kTile = 256;  // rows of a protein whose attention sums are formed apart, then added in order
constexpr std::int64_t kBlock = 256;  // rows that a gradient of weights sums up before it goes to the next

// The first block's states are those of tokens: a convolution of them is a sum of rows of a small table.
constexpr int kTokens = 27;  // the last one is that of gaps, whose state is zeros

// Of a local block, in the order of ops/reference.py.
template <class T>
struct LocalBlockWeights {
    const T* narrow;  // (out, in, taps), as is wide
    const float* narrow_bias;
    const T* wide;
    const float *wide_bias, *norm1, *norm1_bias;
    const T* dense;  // (out, in)
    const float *dense_bias, *norm2, *norm2_bias;
    const T* embedding;  // (kTokens, channels), null where the block takes states
    int channels, taps, wide_dilation;
};

template <class T>
struct LocalBlock {
    const T* x;                    // (rows, channels), or
    const std::uint8_t* tokens;    // (rows,), and null where there are states
    const float* broadcast;        // (proteins, channels)
    const std::int32_t* segments;  // (rows,) protein of each row, -1 in gaps
    T *hidden, *local;  // (rows, channels) after the first norm, or null; after the second
    T *narrow, *wide;   // (rows, channels) what the convolutions gave, for the backward pass; both or neither null
};

// Where a batch's proteins lie.
struct Layout {
    const std::int64_t *starts, *lengths;  // (proteins,)
    std::int64_t proteins, gap, rows;      // `gap` rows before the first and behind the last
};

// The local block's gradients but for those of its matrices; see local_block_backward and weight_gradient.
template <class T>
struct LocalBlockBackward {
    const T* x;                    // (rows, channels), as are all states and gradients here; or
    const std::uint8_t* tokens;    // (rows,), and null where there are states
    const float* broadcast;        // (proteins, channels)
    const std::int32_t* segments;  // (rows,)
    const T *narrow, *wide;        // what the convolutions gave
    const T *d_local, *d_hidden;   // d_hidden may be null
    T *hidden, *d_dense, *d_narrow, *d_wide;  // states after the first norm; gradients of what the products gave
    T* d_sum;      // gradients of what the first norm normalised
    T* d_x;        // or null
    float* d_tables;  // (kParts, kTokens, 2 * taps + 1, channels), those of all in the first; see token_sums
    float* sums;   // (units, kSums, channels), each unit's, those of all in the first
};
enum Sums { kNarrowBias, kWideBias, kNorm1Weight, kNorm1Bias, kDenseBias, kNorm2Weight, kNorm2Bias, kSums };
constexpr std::int64_t kUnit = 192;  // rows whose sums are formed apart, then added in order
constexpr std::int64_t kParts = 16;  // of a batch, whose sums by token are formed apart, then added in order

// Of global attention.
template <class T>
struct AttentionWeights {
    const T *key, *value;  // (heads * d_key, channels), (heads * d_value, channels)
    int channels, heads, d_key, d_value;
};

template <class T>
struct Attention {
    const T* local;      // (rows, channels)
    const float* query;  // (proteins, heads, d_key), after tanh
    float* partials;     // (slots, heads, 1 + d_value): sum of e, sum of e * value
    float* weights;      // (rows, heads) or null: e of each row
};

template <class T>
struct AttentionBackward {
    const T* local;             // (rows, channels)
    const float* query;         // (proteins, heads, d_key), after tanh
    const float* denominators;  // (proteins, heads)
    const float* pooled;        // (proteins, heads, d_value), the result
    const float* d_pooled;      // (proteins, heads, d_value)
    T* d_local;                 // (rows, channels)
    float* d_query;             // (slots, heads, d_key)
    float* d_weights;           // (channels, heads * d_key + heads * d_value), which is added to, or null
};

// Of a block's global track.
template <class T>
struct GlobalBlockWeights {
    const T* dense1;  // (width, width), as is dense2
    const float *dense1_bias, *norm1, *norm1_bias;
    const T* dense2;
    const float *dense2_bias, *norm2, *norm2_bias;
    int width;
};

template <class T>
struct GlobalBlock {
    const T *state, *pooled;  // (proteins, width)
    T *hidden, *out;          // (proteins, width), after the first norm and the second
};

// Of what a block takes from the global states: a query for attention, and what is broadcast to a protein's rows.
template <class T>
struct ConditioningWeights {
    const T *query, *broadcast;  // (keys, width), (channels, width)
    const float* broadcast_bias;
    int width, keys, channels;
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

// Neighboring rows of a unit of work that are none of a gap.
struct Run {
    int first, rows;
    int end;  // of the protein, which may go on behind the unit
};
using Runs = std::vector<Run>;

// Of rows [0, rows); `behind` more can be read.
inline Runs runs_of(const std::int32_t* segments, int rows, int behind) {
    Runs runs;
    for (int r = 0; r < rows; ++r) {
        if (segments[r] < 0) continue;
        if (runs.empty() || runs.back().end < r) runs.push_back({r, 0, r});
        runs.back().end = r + 1;
        ++runs.back().rows;
    }
    if (!runs.empty() && runs.back().end == rows)
        while (runs.back().end < rows + behind && segments[runs.back().end] == segments[rows - 1]) ++runs.back().end;
    return runs;
}

// Where units of about `wanted` rows begin, and the last ends: at a protein's first row or a multiple of `alignment` behind it.
inline std::vector<std::int64_t> cut(const Layout& layout, std::int64_t wanted, std::int64_t alignment) {
    const std::int64_t last = layout.rows - layout.gap;
    std::vector<std::int64_t> cuts{layout.gap};
    for (std::int64_t p = 0; p < layout.proteins; ++p)
        for (;;) {
            const std::int64_t ahead = std::max<std::int64_t>(cuts.back() + wanted - layout.starts[p], 0);
            const std::int64_t offset = (ahead + alignment - 1) / alignment * alignment;
            if (offset >= layout.lengths[p]) break;
            cuts.push_back(layout.starts[p] + offset);
        }
    if (last > layout.gap) cuts.push_back(last);
    return cuts;
}

// Weights as an instruction set's kernels take them, for as many calls as there are.
struct PackedWeights {
    virtual ~PackedWeights() = default;
};

// Arithmetic to be timed.
struct Workload {
    virtual ~Workload() = default;
    virtual double run() = 0;  // FLOP done
};

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

}  // namespace pbf
