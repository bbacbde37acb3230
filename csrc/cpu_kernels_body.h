// The kernels, written once in 16-lane vectors and included once per instruction set (see cpu_kernels.cpp).
// No include guard and no includes: the includer sets the namespace and the target.
//
// Every operation is element-wise over lanes or sums in a fixed order, so a row's result depends neither
// on its neighbours nor on the number of threads.

using f16x = float __attribute__((vector_size(64)));
using i16x = std::int32_t __attribute__((vector_size(64)));
using u16x = std::uint32_t __attribute__((vector_size(64)));
using h16x = std::uint16_t __attribute__((vector_size(32)));

inline f16x load(const float* p) {
    f16x v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store(float* p, f16x v) { std::memcpy(p, &v, sizeof v); }

inline f16x load(const bf16* p) {
    h16x h;
    std::memcpy(&h, p, sizeof h);
    return reinterpret_cast<f16x>(__builtin_convertvector(h, u16x) << 16);
}

// Rounds to nearest even. NaN is set apart: the carry would turn it into a number.
inline void store(bf16* p, f16x v) {
    const u16x bits = reinterpret_cast<u16x>(v);
    const u16x rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const u16x is_nan = reinterpret_cast<u16x>(v != v);
    const h16x h = __builtin_convertvector((rounded & ~is_nan) | (0x7fc0u & is_nan), h16x);
    std::memcpy(p, &h, sizeof h);
}

inline f16x splat(float x) { return f16x{} + x; }

inline f16x absolute(f16x x) { return reinterpret_cast<f16x>(reinterpret_cast<i16x>(x) & 0x7fffffff); }

// Both keep NaN: the comparison is false for it, and the second operand is x itself. One instruction each.
inline f16x at_least(f16x x, float low) { return splat(low) > x ? splat(low) : x; }
inline f16x at_most(f16x x, float high) { return splat(high) < x ? splat(high) : x; }

// 2^x to 2e-7 relative for |x| <= 126, by rounding x to an integer in the low mantissa bits of a large float. A NaN may
// come out as a number: its bits are added to.
inline f16x exp2_of_number(f16x x) {
    const f16x shifted = x + 12582912.0f;  // 1.5 * 2^23
    const f16x f = x - (shifted - 12582912.0f);
    f16x p = splat(1.32764666e-3f);
    p = p * f + 9.67554189e-3f;
    p = p * f + 5.55071346e-2f;
    p = p * f + 2.40221202e-1f;
    p = p * f + 6.93146944e-1f;
    p = p * f + 1.0f;
    return reinterpret_cast<f16x>(reinterpret_cast<i16x>(p) + (reinterpret_cast<i16x>(shifted) << 23));
}

inline f16x exp2_(f16x x) { return x == x ? exp2_of_number(at_most(at_least(x, -126.0f), 126.0f)) : x; }

// The erf form of GELU to 8e-8 absolute: max(x, 0) - |x| 2^P(|x|), where 2^P is the normal distribution's upper tail and
// P a least-maximum fit on [0, 6]; beyond, the second term stays below 6e-9. As the exact form, +inf gives +inf, and
// -inf and NaN give NaN.
inline f16x gelu(f16x x) {
    const f16x magnitude = absolute(x);
    const f16x a = at_most(magnitude, 6.0f);
    f16x p = splat(3.3093125e-5f);
    p = p * a - 7.6922245e-4f;
    p = p * a + 8.0807256e-3f;
    p = p * a - 5.3412117e-2f;
    p = p * a - 4.5877096e-1f;
    p = p * a - 1.1512017f;
    p = p * a - 9.9999309e-1f;
    return 0.5f * (x + magnitude) - a * exp2_of_number(p);
}

// tanh to 3e-7 absolute.
inline f16x tanh_(f16x x) { return 1.0f - 2.0f / (1.0f + exp2_(2.885390082f * x)); }

// The lanes' sum, always in the same order.
inline float sum(f16x v) {
    float lanes[16];
    store(lanes, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

// out = LayerNorm(row) * gamma + beta over `channels` float32 values already in `row`.
template <class T>
inline void layer_norm(const float* row, const float* gamma, const float* beta, T* out, int channels) {
    f16x total{};
    for (int c = 0; c < channels; c += 16) total += load(row + c);
    const float mean = sum(total) / static_cast<float>(channels);
    f16x squares{};
    for (int c = 0; c < channels; c += 16) {
        const f16x d = load(row + c) - mean;
        squares += d * d;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(channels) + kLayerNormEpsilon);
    for (int c = 0; c < channels; c += 16)
        store(out + c, (load(row + c) - mean) * scale * load(gamma + c) + load(beta + c));
}

// out = LN(x + broadcast[segment] + gelu(narrow) + gelu(wide)); zeros in gap rows.
template <class T>
void merge_convolutions(const MergeConvolutions<T>& a, std::int64_t first, std::int64_t last) {
    float row[kMaxChannels];
    for (std::int64_t r = first; r < last; ++r) {
        const std::int64_t at = r * a.channels;
        if (a.segments[r] < 0) {
            std::memset(a.out + at, 0, sizeof(T) * a.channels);
            continue;
        }
        const float* broadcast = a.broadcast + std::int64_t{a.segments[r]} * a.channels;
        for (int c = 0; c < a.channels; c += 16)
            store(row + c, load(a.x + at + c) + load(broadcast + c) + gelu(load(a.narrow + at + c)) +
                               gelu(load(a.wide + at + c)));
        layer_norm(row, a.gamma, a.beta, a.out + at, a.channels);
    }
}

// out = LN(hidden + gelu(dense)); zeros in gap rows.
template <class T>
void merge_dense(const MergeDense<T>& a, std::int64_t first, std::int64_t last) {
    float row[kMaxChannels];
    for (std::int64_t r = first; r < last; ++r) {
        const std::int64_t at = r * a.channels;
        if (a.segments[r] < 0) {
            std::memset(a.out + at, 0, sizeof(T) * a.channels);
            continue;
        }
        for (int c = 0; c < a.channels; c += 16)
            store(row + c, load(a.hidden + at + c) + gelu(load(a.dense + at + c)));
        layer_norm(row, a.gamma, a.beta, a.out + at, a.channels);
    }
}

// One head of one tile (kTile rows of one protein, counted from its own first row, cut where the piece ends):
// adds sum(e) and sum(e * gelu(v)) to the tile's slot, row by row, so that the cut leaves no trace in the bits.
template <class T>
void attention_tile(const Attention<T>& a, const TileRun& run, int head) {
    const int width = a.heads * (a.d_key + a.d_value);
    const float* query = a.query + (std::int64_t{run.protein} * a.heads + head) * a.d_key;
    const T* keys = a.keys_values + run.row * width + head * a.d_key;
    const T* values = a.keys_values + run.row * width + a.heads * a.d_key + head * a.d_value;
    float* slot = a.partials + (run.slot * a.heads + head) * (1 + a.d_value);
    float e[16];
    for (int done = 0; done < run.rows; done += 16) {
        const int rows = std::min(16, run.rows - done);
        for (int r = 0; r < 16; ++r) {
            f16x products{};
            if (r < rows)
                for (int c = 0; c < a.d_key; c += 16)
                    products += load(query + c) * tanh_(load(keys + std::int64_t{done + r} * width + c));
            e[r] = sum(products);
        }
        // |logit| <= sqrt(d_key): no running maximum is needed, and partial sums simply add.
        store(e, exp2_(load(e) * a.scale_log2));
        for (int r = 0; r < rows; ++r) slot[0] += e[r];
        if (a.weights)
            for (int r = 0; r < rows; ++r) a.weights[(a.first_row + run.row + done + r) * a.heads + head] = e[r];
        for (int c = 0; c < a.d_value; c += 16) {
            f16x total = load(slot + 1 + c);
            for (int r = 0; r < rows; ++r)
                total += e[r] * gelu(load(values + std::int64_t{done + r} * width + c));
            store(slot + 1 + c, total);
        }
    }
}
