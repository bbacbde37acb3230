// The kernels, written once in 16-lane vectors and included once per instruction set (see cpu_kernels.cpp).
// No include guard and no includes: the includer sets the namespace and the target.
//
// Every operation is element-wise over lanes or sums in a fixed order, so a row's result depends neither
// on its neighbours nor on the number of threads, nor on the tile it was computed in.
//
// The includer defines PBF_ROWS and PBF_VECTORS, the accumulators of a register tile (rows x 16 columns), and
// PBF_BF16_DOT where the processor multiplies pairs of bfloat16.

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

inline float widened(bf16 x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

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

// What products multiply: bfloat16 where the processor has an instruction for it, else float32.
#ifdef PBF_BF16_DOT
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

constexpr int kColumns = 16 * PBF_VECTORS;  // of a panel of packed weights

inline f16x multiply_add(f16x total, float x, const float* w) { return total + x * load(w); }

#ifdef PBF_BF16_DOT
inline f16x multiply_add(f16x total, std::int32_t pair, const bf16* w) {
    const __m512i weights = _mm512_loadu_si512(w);
    return reinterpret_cast<f16x>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total),
                                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                                                   reinterpret_cast<__m512bh>(weights)));
}
#endif

// What one multiply_add takes of a row: a float32, or two neighbouring bfloat16.
template <class E>
using Step = std::conditional_t<std::is_same_v<E, float>, float, std::int32_t>;
template <class E>
constexpr int kPerStep = sizeof(Step<E>) / sizeof(E);

// `ROWS` rows by 16 * VECTORS columns: out[r][c] = bias[c] + sum over taps t and inputs k, in this order, of
// x[r + (t - taps / 2) * dilation][k] * w[t][k][c]. All sums stay in registers.
template <int ROWS, int VECTORS, class E>
void product_tile(const Product<E>& p, const E* x, const E* w, const float* bias, float* out) {
    f16x total[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const f16x start = bias ? load(bias + 16 * v) : f16x{};
        for (int r = 0; r < ROWS; ++r) total[r][v] = start;
    }
    x -= std::int64_t{p.taps / 2} * p.dilation * p.inputs;
    for (int t = 0; t < p.taps; ++t, x += std::int64_t{p.dilation} * p.inputs)
        for (int k = 0; k < p.inputs; k += kPerStep<E>, w += 16 * VECTORS * kPerStep<E>)
            for (int r = 0; r < ROWS; ++r) {
                Step<E> step;
                std::memcpy(&step, x + r * p.inputs + k, sizeof step);
                for (int v = 0; v < VECTORS; ++v)
                    total[r][v] = multiply_add(total[r][v], step, w + 16 * v * kPerStep<E>);
            }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(out + r * p.out_stride + 16 * v, total[r][v]);
}

template <int VECTORS, class E, int... ROWS>
void product_tile_of(int rows, std::integer_sequence<int, ROWS...>, const Product<E>& p, const E* x, const E* w,
                     const float* bias, float* out) {
    using Tile = void (*)(const Product<E>&, const E*, const E*, const float*, float*);
    static constexpr Tile tiles[] = {product_tile<ROWS + 1, VECTORS, E>...};
    tiles[rows - 1](p, x, w, bias, out);
}

// Rows [0, rows) of a product, panel by panel so that a panel's weights stay in the cache.
template <class E>
void product(const Product<E>& p, const E* x, const Runs& runs, float* out) {
    for (int column = 0; column < p.columns; column += kColumns) {
        const E* w = p.weights + std::int64_t{column} * p.taps * p.inputs;
        const float* bias = p.bias ? p.bias + column : nullptr;
        for (const Run& run : runs) {
            // Tiles of nearly equal heights; the last panel may be half as wide.
            const int tiles = (run.rows + PBF_ROWS - 1) / PBF_ROWS;
            for (int i = 0; i < tiles; ++i) {
                const int first = run.first + i * run.rows / tiles;
                const int rows = run.first + (i + 1) * run.rows / tiles - first;
                const E* at = x + std::int64_t{first} * p.inputs;
                float* to = out + std::int64_t{first} * p.out_stride + column;
                constexpr auto heights = std::make_integer_sequence<int, PBF_ROWS>{};
                if (p.columns - column >= kColumns)
                    product_tile_of<PBF_VECTORS>(rows, heights, p, at, w, bias, to);
                else
                    product_tile_of<1>(rows, heights, p, at, w, bias, to);
            }
        }
    }
}

// Weights of one output column, w[k * k_stride + t * tap_stride], to where product() reads them.
template <class T, class E>
void pack_column(const T* w, int k_stride, int tap_stride, const Product<E>& p, int column, E* packed) {
    constexpr int per_step = kPerStep<E>;
    const int panel = column / kColumns * kColumns;
    const int width = std::min(kColumns, p.columns - panel);
    E* out = packed + std::int64_t{panel} * p.taps * p.inputs + (column - panel) * per_step;
    for (int t = 0; t < p.taps; ++t)
        for (int k = 0; k < p.inputs; k += per_step, out += width * per_step)
            for (int i = 0; i < per_step; ++i) {
                const T value = w[std::int64_t{k + i} * k_stride + t * tap_stride];
                if constexpr (std::is_same_v<T, E>)
                    out[i] = value;
                else
                    out[i] = widened(value);
            }
}

// Rows as products take them: themselves, or widened into `room`.
template <class T>
const Factor<T>* factors(const T* rows, std::int64_t values, Factor<T>* room) {
    if constexpr (std::is_same_v<T, Factor<T>>) {
        return rows;
    } else {
        for (std::int64_t i = 0; i < values; i += 16) store(room + i, load(rows + i));
        return room;
    }
}

template <class T>
constexpr bool kWidens = !std::is_same_v<T, Factor<T>>;

// The local block for a layer's weights, packed for this instruction set.
template <class T>
struct PackedLocalBlock {
    using E = Factor<T>;
    const LocalBlock<T>& a;
    Buffer<E> weights;
    Product<E> narrow, wide, dense;

    PackedLocalBlock(const LocalBlock<T>& a, int threads) : a(a) {
        const std::int64_t convolution = std::int64_t{a.taps} * a.channels * a.channels;
        E* room = weights.room(2 * convolution + std::int64_t{a.channels} * a.channels);
        narrow = {room, a.narrow_bias, a.channels, a.channels, a.taps, 1, a.channels};
        wide = {room + convolution, a.wide_bias, a.channels, a.channels, a.taps, a.wide_dilation, a.channels};
        dense = {room + 2 * convolution, a.dense_bias, a.channels, a.channels, 1, 1, a.channels};
        parallel_for(a.channels / 16, threads, [&](std::int64_t sixteen) {
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c) {
                const std::int64_t at = std::int64_t{c} * a.channels;
                pack_column(a.narrow_weight + at * a.taps, a.taps, 1, narrow, c, room);
                pack_column(a.wide_weight + at * a.taps, a.taps, 1, wide, c, room + convolution);
                pack_column(a.dense_weight + at, 1, 0, dense, c, room + 2 * convolution);
            }
        });
    }

    // Rows [first, last) of the batch.
    void operator()(std::int64_t first, std::int64_t last) const {
        static thread_local Buffer<float> sums;
        static thread_local Buffer<T> states;
        static thread_local Buffer<E> widened_rows;
        const int rows = static_cast<int>(last - first);
        const std::int64_t values = std::int64_t{rows} * a.channels;
        const std::int64_t reach = std::int64_t{a.taps / 2} * a.wide_dilation * a.channels;
        float* narrow_sums = sums.room(2 * values);
        float* wide_sums = narrow_sums + values;
        T* hidden = a.hidden ? a.hidden + first * a.channels : states.room(values);
        E* room = kWidens<T> ? widened_rows.room(values + 2 * reach) : nullptr;
        const T* x = a.x + first * a.channels;
        const std::int32_t* segments = a.segments + first;
        const Runs runs = runs_of(segments, rows);

        const E* window = factors(x - reach, values + 2 * reach, room) + reach;
        product(narrow, window, runs, narrow_sums);
        product(wide, window, runs, wide_sums);
        merge_convolutions(x, narrow_sums, wide_sums, segments, rows, hidden);
        product(dense, factors<T>(hidden, values, room), runs, narrow_sums);
        merge_dense(hidden, narrow_sums, segments, rows, a.local + first * a.channels);
    }

    // out = LN(x + broadcast[segment] + gelu(narrow) + gelu(wide)); zeros in gap rows.
    void merge_convolutions(const T* x, const float* narrow, const float* wide, const std::int32_t* segments,
                            int rows, T* out) const {
        float row[kMaxChannels];
        for (int r = 0; r < rows; ++r, x += a.channels, narrow += a.channels, wide += a.channels, out += a.channels) {
            if (segments[r] < 0) {
                std::memset(out, 0, sizeof(T) * a.channels);
                continue;
            }
            const float* broadcast = a.broadcast + std::int64_t{segments[r]} * a.channels;
            for (int c = 0; c < a.channels; c += 16)
                store(row + c, load(x + c) + load(broadcast + c) + gelu(load(narrow + c)) + gelu(load(wide + c)));
            layer_norm(row, a.norm1_weight, a.norm1_bias, out, a.channels);
        }
    }

    // out = LN(hidden + gelu(dense)); zeros in gap rows.
    void merge_dense(const T* hidden, const float* dense, const std::int32_t* segments, int rows, T* out) const {
        float row[kMaxChannels];
        for (int r = 0; r < rows; ++r, hidden += a.channels, dense += a.channels, out += a.channels) {
            if (segments[r] < 0) {
                std::memset(out, 0, sizeof(T) * a.channels);
                continue;
            }
            for (int c = 0; c < a.channels; c += 16) store(row + c, load(hidden + c) + gelu(load(dense + c)));
            layer_norm(row, a.norm2_weight, a.norm2_bias, out, a.channels);
        }
    }
};

// Global attention's keys and values, packed for this instruction set.
template <class T>
struct PackedAttention {
    using E = Factor<T>;
    const Attention<T>& a;
    int width;  // of a head: its keys, then its values
    Buffer<E> weights;

    PackedAttention(const Attention<T>& a, int threads) : a(a), width(a.d_key + a.d_value) {
        E* room = weights.room(std::int64_t{a.heads} * width * a.channels);
        parallel_for(a.heads, threads, [&](std::int64_t head) {
            for (int c = 0; c < width; ++c) {
                const T* w = c < a.d_key ? a.key_weight + (head * a.d_key + c) * a.channels
                                         : a.value_weight + (head * a.d_value + c - a.d_key) * a.channels;
                pack_column(w, 1, 0, of(static_cast<int>(head)), c, room + head * width * a.channels);
            }
        });
    }

    Product<E> of(int head) const {
        return {weights.data() + std::int64_t{head} * width * a.channels, nullptr, a.channels, width, 1, 1, width};
    }

    // One head of one tile: sums of e and of e * gelu(v) over its rows, in order, to the tile's slot.
    void operator()(const Tile& tile, int head) const {
        static thread_local Buffer<float> sums;
        static thread_local Buffer<E> widened_rows;
        const std::int64_t values = std::int64_t{tile.rows} * a.channels;
        float* keys = sums.room(std::int64_t{tile.rows} * width);
        E* room = kWidens<T> ? widened_rows.room(values) : nullptr;
        product(of(head), factors(a.local + tile.row * a.channels, values, room), Runs{{0, tile.rows}}, keys);

        const float* query = a.query + (std::int64_t{tile.protein} * a.heads + head) * a.d_key;
        float* slot = a.partials + (tile.slot * a.heads + head) * (1 + a.d_value);
        std::fill(slot, slot + 1 + a.d_value, 0.0f);
        float e[16];
        for (int done = 0; done < tile.rows; done += 16, keys += 16 * width) {
            const int rows = std::min(16, tile.rows - done);
            for (int r = 0; r < 16; ++r) {
                f16x products{};
                if (r < rows)
                    for (int c = 0; c < a.d_key; c += 16) products += load(query + c) * tanh_(load(keys + r * width + c));
                e[r] = sum(products);
            }
            // |logit| <= sqrt(d_key): no running maximum is needed, and partial sums simply add.
            store(e, exp2_(load(e) * a.scale_log2));
            for (int r = 0; r < rows; ++r) slot[0] += e[r];
            if (a.weights)
                for (int r = 0; r < rows; ++r) a.weights[(tile.row + done + r) * a.heads + head] = e[r];
            for (int c = 0; c < a.d_value; c += 16) {
                f16x total = load(slot + 1 + c);
                for (int r = 0; r < rows; ++r) total += e[r] * gelu(load(keys + r * width + a.d_key + c));
                store(slot + 1 + c, total);
            }
        }
    }
};

template <class T>
void local_block(const LocalBlock<T>& a, std::int64_t first, std::int64_t last, int threads) {
    const PackedLocalBlock<T> block(a, threads);
    const std::int64_t unit = rows_per_unit(last - first, threads);
    parallel_for((last - first + unit - 1) / unit, threads, [&](std::int64_t i) {
        block(first + i * unit, std::min(last, first + (i + 1) * unit));
    });
}

template <class T>
void attention(const Attention<T>& a, const std::vector<Tile>& tiles, int threads) {
    const PackedAttention<T> attend(a, threads);
    parallel_for(static_cast<std::int64_t>(tiles.size()) * a.heads, threads, [&](std::int64_t i) {
        attend(tiles[static_cast<std::size_t>(i / a.heads)], static_cast<int>(i % a.heads));
    });
}
