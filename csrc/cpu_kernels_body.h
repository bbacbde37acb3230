// The kernels, written once in 16-lane vectors and included once per instruction set (see cpu_kernels.cpp).
// No include guard and no includes: the includer sets the namespace and the target.
//
// Every operation is element-wise over lanes or sums in a fixed order, so a row's result depends neither
// on its neighbours nor on the number of threads, nor on the tile it was computed in.
//
// The includer defines PBF_ROWS and PBF_VECTORS, the accumulators of a register tile (rows x 16 columns), and
// PBF_BF16_DOT where the processor multiplies pairs of bfloat16.

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

// Both keep NaN: the comparison is false for it, and the second operand is x itself. One instruction each.
inline Floats at_least(Floats x, float low) { return splat(low) > x ? splat(low) : x; }
inline Floats at_most(Floats x, float high) { return splat(high) < x ? splat(high) : x; }

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

// The lanes' sum, always in the same order.
inline float sum(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

struct Moments {
    float mean, scale;  // scale is 1 / standard deviation
};

// Of `channels` values in `row`.
inline Moments moments(const float* row, int channels) {
    Floats total{};
    for (int c = 0; c < channels; c += kLanes) total += load(row + c);
    const float mean = sum(total) / static_cast<float>(channels);
    Floats squares{};
    for (int c = 0; c < channels; c += kLanes) {
        const Floats d = load(row + c) - mean;
        squares += d * d;
    }
    return {mean, 1.0f / std::sqrt(sum(squares) / static_cast<float>(channels) + kLayerNormEpsilon)};
}

// out = LayerNorm(row) * gamma + beta over `channels` float32 values already in `row`.
template <class T>
inline void layer_norm(const float* row, const float* gamma, const float* beta, T* out, int channels) {
    const Moments m = moments(row, channels);
    for (int c = 0; c < channels; c += kLanes)
        store(out + c, (load(row + c) - m.mean) * m.scale * load(gamma + c) + load(beta + c));
}

// The gradient of what a norm normalised, in place of `gradient`, that of its result; those of gamma and beta are
// added to.
inline void layer_norm_backward(const float* normalised, float scale, const float* gamma, float* gradient,
                                float* d_gamma, float* d_beta, int channels) {
    Floats total{}, along{};
    for (int c = 0; c < channels; c += kLanes) {
        const Floats d = load(gradient + c), n = load(normalised + c), g = d * load(gamma + c);
        store(d_gamma + c, load(d_gamma + c) + d * n);
        store(d_beta + c, load(d_beta + c) + d);
        total += g;
        along += g * n;
    }
    const float mean = sum(total) / static_cast<float>(channels);
    const float slope = sum(along) / static_cast<float>(channels);
    for (int c = 0; c < channels; c += kLanes)
        store(gradient + c, scale * (load(gradient + c) * load(gamma + c) - mean - load(normalised + c) * slope));
}

// What products multiply: bfloat16 where the processor has an instruction for it, else float32.
#ifdef PBF_BF16_DOT
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

constexpr int kColumns = kLanes * PBF_VECTORS;  // of a panel of packed weights

inline Floats multiply_add(Floats total, float x, const float* w) { return total + x * load(w); }

#ifdef PBF_BF16_DOT
inline Floats multiply_add(Floats total, std::int32_t pair, const bf16* w) {
    const __m512i weights = _mm512_loadu_si512(w);
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total),
                                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                                                   reinterpret_cast<__m512bh>(weights)));
}
#endif

// What one multiply_add takes of a row: a float32, or two neighbouring bfloat16.
template <class E>
using Step = std::conditional_t<std::is_same_v<E, float>, float, std::int32_t>;
template <class E>
constexpr int kPerStep = sizeof(Step<E>) / sizeof(E);

// `ROWS` rows by kLanes * VECTORS columns: out[r][c] = bias[c] + sum over taps t and inputs k, in this order, of
// x[r + (t - taps / 2) * dilation][k] * w[t][k][c]. All sums stay in registers.
template <int ROWS, int VECTORS, class E>
void product_tile(const Product<E>& p, const E* x, const E* w, const float* bias, float* out) {
    Floats total[ROWS][VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const Floats start = bias ? load(bias + kLanes * v) : Floats{};
        for (int r = 0; r < ROWS; ++r) total[r][v] = start;
    }
    x -= std::int64_t{p.taps / 2} * p.dilation * p.inputs;
    for (int t = 0; t < p.taps; ++t, x += std::int64_t{p.dilation} * p.inputs)
        for (int k = 0; k < p.inputs; k += kPerStep<E>, w += kLanes * VECTORS * kPerStep<E>)
            for (int r = 0; r < ROWS; ++r) {
                Step<E> step;
                std::memcpy(&step, x + r * p.inputs + k, sizeof step);
                for (int v = 0; v < VECTORS; ++v)
                    total[r][v] = multiply_add(total[r][v], step, w + kLanes * v * kPerStep<E>);
            }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(out + r * p.out_stride + kLanes * v, total[r][v]);
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
        for (std::int64_t i = 0; i < values; i += kLanes) store(room + i, load(rows + i));
        return room;
    }
}

template <class T>
constexpr bool kWidens = !std::is_same_v<T, Factor<T>>;

// `columns` values of each row to where sums over rows read them: in panels of `width` columns, and where values are
// multiplied by twos each beside the one below it, the last beside zero.
template <class T, class E>
void pack_rows(const T* rows, int n, std::int64_t stride, int columns, int width, E* out) {
    for (int panel = 0; panel < columns; panel += width) {
        const int wide = std::min(width, columns - panel);
        const T* row = rows + panel;
        for (int r = 0; r < n; r += kPerStep<E>, row += kPerStep<E> * stride, out += wide * kPerStep<E>)
            for (int c = 0; c < wide; c += kLanes) {
                if constexpr (kPerStep<E> == 1) {
                    store(out + c, load(row + c));
                } else {
                    Halves upper, lower{};
                    std::memcpy(&upper, row + c, sizeof upper);
                    if (r + 1 < n) std::memcpy(&lower, row + stride + c, sizeof lower);
                    const Words pairs = __builtin_convertvector(upper, Words) | __builtin_convertvector(lower, Words) << 16;
                    std::memcpy(out + 2 * c, &pairs, sizeof pairs);
                }
            }
    }
}

// `INPUTS` by kLanes * VECTORS columns: out[i][c] += the sum over rows r, in order, of x[r][i] * gradient[r][c]. The sum is
// formed apart: added to one by one, a sum over a million rows would lose them.
template <int INPUTS, int VECTORS, class E>
void row_sum_tile(int rows, int inputs, const E* x, const E* gradient, float* out, int columns) {
    Floats total[INPUTS][VECTORS] = {};
    for (int r = 0; r < rows; r += kPerStep<E>) {
        for (int i = 0; i < INPUTS; ++i) {
            Step<E> step;
            std::memcpy(&step, x + i * kPerStep<E>, sizeof step);
            for (int v = 0; v < VECTORS; ++v)
                total[i][v] = multiply_add(total[i][v], step, gradient + kLanes * v * kPerStep<E>);
        }
        x += inputs * kPerStep<E>;
        gradient += kLanes * VECTORS * kPerStep<E>;
    }
    for (int i = 0; i < INPUTS; ++i)
        for (int v = 0; v < VECTORS; ++v) {
            float* sum = out + std::int64_t{i} * columns + kLanes * v;
            store(sum, load(sum) + total[i][v]);
        }
}

template <int VECTORS, class E, int... INPUTS>
void row_sum_tile_of(int height, std::integer_sequence<int, INPUTS...>, int rows, int inputs, const E* x,
                     const E* gradient, float* out, int columns) {
    using Tile = void (*)(int, int, const E*, const E*, float*, int);
    static constexpr Tile tiles[] = {row_sum_tile<INPUTS + 1, VECTORS, E>...};
    tiles[height - 1](rows, inputs, x, gradient, out, columns);
}

// Rows as sums over them take them: `columns` values of gradients from the `first` on, packed in panels, and x from `reach`
// rows before to `reach` after.
template <class E>
struct Block {
    const E* x[2];  // from the first row and, for pairs where a tap is an odd number of rows away, from the second
    const E* gradient;
    int rows, first;
};

// How often x is packed: twice where pairs begin at odd rows too.
template <class T, class E>
int copies_of_x(const WeightGradient<T>& a) {
    return kPerStep<E> > 1 && a.taps > 1 && a.dilation % 2 ? 2 : 1;
}

template <class T, class E>
std::int64_t block_size(const WeightGradient<T>& a, int columns) {
    const std::int64_t window = kBlock + 2 * std::int64_t{a.taps / 2} * a.dilation;
    return copies_of_x<T, E>(a) * window * a.inputs + kBlock * columns;
}

// `n` rows, in `room` of block_size().
template <class T, class E>
Block<E> block_of(const WeightGradient<T>& a, std::int64_t row, int n, int first, int columns, E* room) {
    const int reach = a.taps / 2 * a.dilation, window = n + 2 * reach;
    const T* x = a.x + (row - reach) * a.inputs;
    Block<E> block{{}, room, (n + kPerStep<E> - 1) / kPerStep<E> * kPerStep<E>, first};
    pack_rows(a.gradient + row * a.columns + first, n, a.columns, columns, kColumns, room);
    room += kBlock * columns;
    if constexpr (kPerStep<E> == 1) {
        block.x[0] = factors(x, std::int64_t{window} * a.inputs, room);
    } else {
        for (int i = 0; i < copies_of_x<T, E>(a); ++i, room += (kBlock + 2 * std::int64_t{reach}) * a.inputs) {
            pack_rows(x + i * a.inputs, window - i, a.inputs, a.inputs, a.inputs, room);
            block.x[i] = room;
        }
    }
    return block;
}

template <class T>
int tiles_of_inputs(const WeightGradient<T>& a) {
    return (a.inputs + PBF_ROWS - 1) / PBF_ROWS;
}

// Adds the sum over a block's rows to a.out, for one tap, one panel of columns, and tiles [begin, end) of inputs.
template <class T, class E>
void add_row_sums(const WeightGradient<T>& a, const Block<E>& block, int tap, int column, int begin, int end) {
    const int away = tap * a.dilation, tiles = tiles_of_inputs(a);
    const E* x = block.x[away % kPerStep<E>] + std::int64_t{away / kPerStep<E>} * kPerStep<E> * a.inputs;
    const E* gradient = block.gradient + std::int64_t{column - block.first} * block.rows;
    float* out = a.out + std::int64_t{tap} * a.inputs * a.columns + column;
    for (int t = begin; t < end; ++t) {
        const int first = t * a.inputs / tiles, height = (t + 1) * a.inputs / tiles - first;
        const E* at = x + std::int64_t{first} * kPerStep<E>;
        float* to = out + std::int64_t{first} * a.columns;
        constexpr auto heights = std::make_integer_sequence<int, PBF_ROWS>{};
        if (a.columns - column >= kColumns)
            row_sum_tile_of<PBF_VECTORS>(height, heights, block.rows, a.inputs, at, gradient, to, a.columns);
        else
            row_sum_tile_of<1>(height, heights, block.rows, a.inputs, at, gradient, to, a.columns);
    }
}

// A row's state, its own or its token's.
template <class Block>
auto state_of(const Block& a, std::int64_t row) {
    return a.tokens ? a.embedding + std::int64_t{a.tokens[row]} * a.channels : a.x + row * a.channels;
}

// The local block for a layer's weights, packed for this instruction set.
template <class T>
struct PackedLocalBlock {
    using E = Factor<T>;
    const LocalBlock<T>& a;
    Buffer<E> weights;
    Buffer<float> tables;
    Product<E> narrow, wide, dense;

    PackedLocalBlock(const LocalBlock<T>& a, int threads) : a(a) {
        const std::int64_t convolution = std::int64_t{a.taps} * a.channels * a.channels;
        E* room = weights.room(2 * convolution + std::int64_t{a.channels} * a.channels);
        narrow = {room, a.narrow_bias, a.channels, a.channels, a.taps, 1, a.channels};
        wide = {room + convolution, a.wide_bias, a.channels, a.channels, a.taps, a.wide_dilation, a.channels};
        dense = {room + 2 * convolution, a.dense_bias, a.channels, a.channels, 1, 1, a.channels};
        if (a.tokens) {
            // Every token's row times every tap: columns are taps, then channels.
            for (Product<E>* p : {&narrow, &wide})
                *p = {p->weights, nullptr, a.channels, a.taps * a.channels, 1, 1, a.taps * a.channels};
        }
        parallel_for(a.channels / 16, threads, [&](std::int64_t sixteen) {
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c) {
                const std::int64_t at = std::int64_t{c} * a.channels;
                pack_column(a.dense_weight + at, 1, 0, dense, c, room + 2 * convolution);
                if (!a.tokens) {
                    pack_column(a.narrow_weight + at * a.taps, a.taps, 1, narrow, c, room);
                    pack_column(a.wide_weight + at * a.taps, a.taps, 1, wide, c, room + convolution);
                    continue;
                }
                for (int t = 0; t < a.taps; ++t) {
                    pack_column(a.narrow_weight + at * a.taps + t, a.taps, 0, narrow, t * a.channels + c, room);
                    pack_column(a.wide_weight + at * a.taps + t, a.taps, 0, wide, t * a.channels + c, room + convolution);
                }
            }
        });
        if (a.tokens) {
            const std::int64_t values = std::int64_t{kTokens} * a.channels;
            float* table = tables.room(2 * values * a.taps);
            Buffer<E> widened_rows;
            const E* rows = factors(a.embedding, values, kWidens<T> ? widened_rows.room(values) : nullptr);
            product(narrow, rows, Runs{{0, kTokens}}, table);
            product(wide, rows, Runs{{0, kTokens}}, table + values * a.taps);
        }
    }

    // out = bias + the sum over taps of the table's rows of the tokens there.
    void add_rows(const float* table, const float* bias, int dilation, std::int64_t first, const Runs& runs,
                  float* out) const {
        const std::int64_t width = std::int64_t{a.taps} * a.channels;
        for (const Run& run : runs)
            for (int r = run.first; r < run.first + run.rows; ++r) {
                const std::uint8_t* token = a.tokens + first + r - std::int64_t{a.taps / 2} * dilation;
                for (int c = 0; c < a.channels; c += kLanes) {
                    Floats total = load(bias + c);
                    for (int t = 0; t < a.taps; ++t)
                        total += load(table + token[t * dilation] * width + t * a.channels + c);
                    store(out + std::int64_t{r} * a.channels + c, total);
                }
            }
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
        const std::int32_t* segments = a.segments + first;
        const Runs runs = runs_of(segments, rows);

        if (a.tokens) {
            add_rows(tables.data(), a.narrow_bias, 1, first, runs, narrow_sums);
            add_rows(tables.data() + std::int64_t{kTokens} * a.taps * a.channels, a.wide_bias, a.wide_dilation, first,
                     runs, wide_sums);
        } else {
            const E* window = factors(a.x + first * a.channels - reach, values + 2 * reach, room) + reach;
            product(narrow, window, runs, narrow_sums);
            product(wide, window, runs, wide_sums);
        }
        if (a.narrow) {
            keep(narrow_sums, runs, a.narrow + first * a.channels);
            keep(wide_sums, runs, a.wide + first * a.channels);
        }
        merge_convolutions(first, narrow_sums, wide_sums, segments, rows, hidden);
        product(dense, factors<T>(hidden, values, room), runs, narrow_sums);
        merge_dense(hidden, narrow_sums, segments, rows, a.local + first * a.channels);
    }

    // Rows of gaps are left as they are: nobody reads them.
    void keep(const float* sums, const Runs& runs, T* out) const {
        for (const Run& run : runs)
            for (std::int64_t i = std::int64_t{run.first} * a.channels, n = i + std::int64_t{run.rows} * a.channels; i < n;
                 i += kLanes)
                store(out + i, load(sums + i));
    }

    // out = LN(x + broadcast[segment] + gelu(narrow) + gelu(wide)); zeros in gap rows.
    void merge_convolutions(std::int64_t first, const float* narrow, const float* wide, const std::int32_t* segments,
                            int rows, T* out) const {
        float row[kMaxChannels];
        for (int r = 0; r < rows; ++r, narrow += a.channels, wide += a.channels, out += a.channels) {
            if (segments[r] < 0) {
                std::memset(out, 0, sizeof(T) * a.channels);
                continue;
            }
            const float* broadcast = a.broadcast + std::int64_t{segments[r]} * a.channels;
            const T* x = state_of(a, first + r);
            for (int c = 0; c < a.channels; c += kLanes)
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
            for (int c = 0; c < a.channels; c += kLanes) store(row + c, load(hidden + c) + gelu(load(dense + c)));
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
                Floats products{};
                if (r < rows)
                    for (int c = 0; c < a.d_key; c += kLanes) products += load(query + c) * tanh_(load(keys + r * width + c));
                e[r] = sum(products);
            }
            // |logit| <= sqrt(d_key): no running maximum is needed, and partial sums simply add.
            for (int r = 0; r < 16; r += kLanes) store(e + r, exp2_(load(e + r) * a.scale_log2));
            for (int r = 0; r < rows; ++r) slot[0] += e[r];
            if (a.weights)
                for (int r = 0; r < rows; ++r) a.weights[(tile.row + done + r) * a.heads + head] = e[r];
            for (int c = 0; c < a.d_value; c += kLanes) {
                Floats total = load(slot + 1 + c);
                for (int r = 0; r < rows; ++r) total += e[r] * gelu(load(keys + r * width + a.d_key + c));
                store(slot + 1 + c, total);
            }
        }
    }
};

// The local block's gradients, weights packed for this instruction set.
template <class T>
struct PackedLocalBlockBackward {
    using E = Factor<T>;
    const LocalBlockBackward<T>& a;
    Buffer<E> weights;
    Product<E> dense, dense_back, narrow_back, wide_back;

    PackedLocalBlockBackward(const LocalBlockBackward<T>& a, int threads) : a(a) {
        const std::int64_t square = std::int64_t{a.channels} * a.channels, convolution = square * a.taps;
        E* room = weights.room(2 * square + 2 * convolution);
        dense = {room, a.dense_bias, a.channels, a.channels, 1, 1, a.channels};
        dense_back = {room + square, nullptr, a.channels, a.channels, 1, 1, a.channels};
        narrow_back = {room + 2 * square, nullptr, a.channels, a.channels, a.taps, 1, a.channels};
        wide_back = {room + 2 * square + convolution, nullptr, a.channels, a.channels, a.taps, a.wide_dilation,
                     a.channels};
        parallel_for(a.channels / 16, threads, [&](std::int64_t sixteen) {
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c) {
                // Backwards, outputs are inputs and the taps are in reverse.
                const int last_tap = c * a.taps + a.taps - 1, stride = a.channels * a.taps;
                pack_column(a.dense_weight + std::int64_t{c} * a.channels, 1, 0, dense, c, room);
                pack_column(a.dense_weight + c, a.channels, 0, dense_back, c, room + square);
                if (!a.d_x) continue;
                pack_column(a.narrow_weight + last_tap, stride, -1, narrow_back, c, room + 2 * square);
                pack_column(a.wide_weight + last_tap, stride, -1, wide_back, c, room + 2 * square + convolution);
            }
        });
    }

    // Rows [first, last): all but the gradients of x. `sums` are the unit's.
    void around_products(std::int64_t first, std::int64_t last, float* sums) const {
        static thread_local Buffer<float> buffer;
        static thread_local Buffer<E> widened_rows;
        const int rows = static_cast<int>(last - first);
        const std::int64_t values = std::int64_t{rows} * a.channels, offset = first * a.channels;
        float* normalised = buffer.room(5 * values + rows);
        float* narrow_slopes = normalised + values;
        float* wide_slopes = narrow_slopes + values;
        float* dense_sums = wide_slopes + values;
        float* back = dense_sums + values;
        float* scales = back + values;
        E* room = kWidens<T> ? widened_rows.room(values) : nullptr;
        const std::int32_t* segments = a.segments + first;
        const Runs runs = runs_of(segments, rows);
        float row[kMaxChannels];

        std::fill(sums, sums + kSums * a.channels, 0.0f);
        for (int r = 0; r < rows; ++r) {
            const std::int64_t at = offset + std::int64_t{r} * a.channels;
            if (segments[r] < 0) {
                for (T* out : {a.hidden, a.d_dense, a.d_narrow, a.d_wide, a.d_sum})
                    std::memset(out + at, 0, sizeof(T) * a.channels);
                continue;
            }
            const float* broadcast = a.broadcast + std::int64_t{segments[r]} * a.channels;
            const std::int64_t in_unit = std::int64_t{r} * a.channels;
            const T* x = state_of(a, first + r);
            for (int c = 0; c < a.channels; c += kLanes) {
                const Gelu narrow = gelu_and_slope(load(a.narrow + at + c)), wide = gelu_and_slope(load(a.wide + at + c));
                store(row + c, load(x + c) + load(broadcast + c) + narrow.value + wide.value);
                store(narrow_slopes + in_unit + c, narrow.slope);
                store(wide_slopes + in_unit + c, wide.slope);
            }
            const Moments m = moments(row, a.channels);
            scales[r] = m.scale;
            for (int c = 0; c < a.channels; c += kLanes) {
                const Floats n = (load(row + c) - m.mean) * m.scale;
                store(normalised + in_unit + c, n);
                store(a.hidden + at + c, n * load(a.norm1_weight + c) + load(a.norm1_bias + c));
            }
        }

        product(dense, factors<T>(a.hidden + offset, values, room), runs, dense_sums);
        for (int r = 0; r < rows; ++r) {
            if (segments[r] < 0) continue;
            const std::int64_t at = offset + std::int64_t{r} * a.channels;
            float* sum = dense_sums + std::int64_t{r} * a.channels;
            float* gradient = back + std::int64_t{r} * a.channels;
            for (int c = 0; c < a.channels; c += kLanes) {
                const Gelu dense = gelu_and_slope(load(sum + c));
                store(row + c, load(a.hidden + at + c) + dense.value);
                store(sum + c, dense.slope);
            }
            const Moments m = moments(row, a.channels);
            for (int c = 0; c < a.channels; c += kLanes) {
                store(row + c, (load(row + c) - m.mean) * m.scale);
                store(gradient + c, load(a.d_local + at + c));
            }
            layer_norm_backward(row, m.scale, a.norm2_weight, gradient, sums + kNorm2Weight * a.channels,
                                sums + kNorm2Bias * a.channels, a.channels);
            float* d_bias = sums + kDenseBias * a.channels;
            for (int c = 0; c < a.channels; c += kLanes) {
                const Floats d = load(gradient + c), d_sum = d * load(sum + c);
                store(a.d_dense + at + c, d_sum);
                store(d_bias + c, load(d_bias + c) + d_sum);
                store(sum + c, d);
            }
        }

        product(dense_back, factors<T>(a.d_dense + offset, values, room), runs, back);
        for (int r = 0; r < rows; ++r) {
            if (segments[r] < 0) continue;
            const std::int64_t at = offset + std::int64_t{r} * a.channels;
            const std::int64_t in_unit = std::int64_t{r} * a.channels;
            float* gradient = back + in_unit;
            const float* beside = dense_sums + in_unit;
            for (int c = 0; c < a.channels; c += kLanes) {
                Floats d = load(beside + c) + load(gradient + c);
                if (a.d_hidden) d += load(a.d_hidden + at + c);
                store(gradient + c, d);
            }
            layer_norm_backward(normalised + in_unit, scales[r], a.norm1_weight, gradient,
                                sums + kNorm1Weight * a.channels, sums + kNorm1Bias * a.channels, a.channels);
            float *narrow_bias = sums + kNarrowBias * a.channels, *wide_bias = sums + kWideBias * a.channels;
            for (int c = 0; c < a.channels; c += kLanes) {
                const Floats d = load(gradient + c);
                const Floats narrow = d * load(narrow_slopes + in_unit + c), wide = d * load(wide_slopes + in_unit + c);
                store(a.d_sum + at + c, d);
                store(a.d_narrow + at + c, narrow);
                store(a.d_wide + at + c, wide);
                store(narrow_bias + c, load(narrow_bias + c) + narrow);
                store(wide_bias + c, load(wide_bias + c) + wide);
            }
        }
    }

    // Rows [first, last) of the gradients of x; zeros in gap rows.
    void of_x(std::int64_t first, std::int64_t last) const {
        static thread_local Buffer<float> buffer;
        static thread_local Buffer<E> widened_rows;
        const int rows = static_cast<int>(last - first);
        const std::int64_t values = std::int64_t{rows} * a.channels, offset = first * a.channels;
        const std::int64_t reach = std::int64_t{a.taps / 2} * a.wide_dilation * a.channels;
        float* narrow_sums = buffer.room(2 * values);
        float* wide_sums = narrow_sums + values;
        E* room = kWidens<T> ? widened_rows.room(values + 2 * reach) : nullptr;
        const Runs runs = runs_of(a.segments + first, rows);
        product(narrow_back, factors(a.d_narrow + offset - reach, values + 2 * reach, room) + reach, runs, narrow_sums);
        product(wide_back, factors(a.d_wide + offset - reach, values + 2 * reach, room) + reach, runs, wide_sums);
        std::memset(a.d_x + offset, 0, sizeof(T) * values);
        for (const Run& run : runs)
            for (std::int64_t i = std::int64_t{run.first} * a.channels, n = i + std::int64_t{run.rows} * a.channels; i < n;
                 i += kLanes)
                store(a.d_x + offset + i, load(a.d_sum + offset + i) + load(narrow_sums + i) + load(wide_sums + i));
    }
};

// Adds the gradients of rows [first, last) to `out` (kTokens, 2 * taps + 1, channels) by token: for each tap of the narrow
// and the wide convolution the gradient of what it gave, by the token there, and last that of the row's own state.
template <class T>
void token_sums(const LocalBlockBackward<T>& a, std::int64_t first, std::int64_t last, float* out) {
    const std::int64_t width = (2 * std::int64_t{a.taps} + 1) * a.channels;
    std::fill(out, out + kTokens * width, 0.0f);
    const auto add = [&](std::int64_t token, int place, const T* row) {
        float* sum = out + token * width + std::int64_t{place} * a.channels;
        for (int c = 0; c < a.channels; c += kLanes) store(sum + c, load(sum + c) + load(row + c));
    };
    for (std::int64_t r = first; r < last; ++r) {
        if (a.segments[r] < 0) continue;
        const std::int64_t at = r * a.channels;
        for (int t = 0; t < a.taps; ++t) {
            const int away = t - a.taps / 2;
            add(a.tokens[r + away], t, a.d_narrow + at);
            add(a.tokens[r + std::int64_t{away} * a.wide_dilation], a.taps + t, a.d_wide + at);
        }
        add(a.tokens[r], 2 * a.taps, a.d_sum + at);
    }
}

// Global attention's gradients, weights packed for this instruction set.
template <class T>
struct PackedAttentionBackward {
    using E = Factor<T>;
    const AttentionBackward<T>& a;
    PackedAttention<T> forward;
    int keys, both;  // columns of d_keys_values: of the keys, in all
    Buffer<E> weights;
    Product<E> keys_values_back;

    PackedAttentionBackward(const AttentionBackward<T>& a, const T* keys_values_weight, int threads)
        : a(a), forward(a.forward, threads), keys(a.forward.heads * a.forward.d_key),
          both(keys + a.forward.heads * a.forward.d_value) {
        const int channels = a.forward.channels;
        E* room = weights.room(std::int64_t{both} * channels);
        keys_values_back = {room, nullptr, both, channels, 1, 1, channels};
        parallel_for(channels / 16, threads, [&](std::int64_t sixteen) {
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c)
                pack_column(keys_values_weight + c, channels, 0, keys_values_back, c, room);
        });
    }

    // What the gradients of the weights sum up, in `block_room`; nothing where that is null.
    Block<E> operator()(const Tile& tile, E* block_room) const {
        static thread_local Buffer<float> buffer;
        static thread_local Buffer<E> widened_rows;
        static thread_local Buffer<T> gradients;
        const Attention<T>& f = a.forward;
        const int width = forward.width;
        const std::int64_t values = std::int64_t{tile.rows} * f.channels;
        float* sums = buffer.room(std::int64_t{tile.rows} * std::max(width, f.channels));
        E* room = kWidens<T> ? widened_rows.room(std::int64_t{tile.rows} * std::max(both, f.channels)) : nullptr;
        const T* local = f.local + tile.row * f.channels;
        const E* rows = factors(local, values, room);
        T* d_rows = gradients.room(std::int64_t{tile.rows} * both);
        const Runs runs{{0, tile.rows}};
        for (int head = 0; head < f.heads; ++head) {
            product(forward.of(head), rows, runs, sums);
            of_head(tile, head, sums, d_rows + head * f.d_key, d_rows + keys + head * f.d_value);
        }
        product(keys_values_back, factors(static_cast<const T*>(d_rows), std::int64_t{tile.rows} * both, room), runs,
                sums);
        T* d_local = a.d_local + tile.row * f.channels;
        for (std::int64_t i = 0; i < values; i += kLanes) store(d_local + i, load(sums + i));
        if (!block_room) return {};
        const WeightGradient<T> rest{local, d_rows, nullptr, f.channels, both, 1, 1};
        return block_of(rest, 0, tile.rows, 0, both, block_room);
    }

    // `products` are (rows, d_key + d_value), as the keys' and values' weights gave them.
    void of_head(const Tile& tile, int head, float* products, T* d_keys, T* d_values) const {
        const Attention<T>& f = a.forward;
        const std::int64_t at = std::int64_t{tile.protein} * f.heads + head;
        const float* query = f.query + at * f.d_key;
        const float* d_pooled = a.d_pooled + at * f.d_value;
        const float inverse = 1.0f / a.denominators[at], scale = 1.0f / std::sqrt(static_cast<float>(f.d_key));
        float* d_query = a.d_query + (tile.slot * f.heads + head) * f.d_key;
        Floats along{};
        for (int c = 0; c < f.d_value; c += kLanes) along += load(d_pooled + c) * load(a.pooled + at * f.d_value + c);
        const float mean = sum(along);
        std::fill(d_query, d_query + f.d_key, 0.0f);
        float share[16], d_logit[16];
        for (int done = 0; done < tile.rows; done += 16) {
            const int rows = std::min(16, tile.rows - done);
            for (int r = 0; r < 16; ++r) {
                Floats logit{}, dot{};
                if (r < rows) {
                    float* key = products + std::int64_t{done + r} * forward.width;
                    for (int c = 0; c < f.d_key; c += kLanes) {
                        const Floats k = tanh_(load(key + c));
                        store(key + c, k);
                        logit += load(query + c) * k;
                    }
                    for (int c = f.d_key; c < forward.width; c += kLanes) {
                        const Gelu value = gelu_and_slope(load(key + c));
                        store(key + c, value.slope);
                        dot += load(d_pooled + c - f.d_key) * value.value;
                    }
                }
                share[r] = sum(logit);
                d_logit[r] = sum(dot);
            }
            for (int r = 0; r < 16; r += kLanes) {
                const Floats p = exp2_(load(share + r) * f.scale_log2) * inverse;
                store(share + r, p);
                store(d_logit + r, p * (load(d_logit + r) - mean) * scale);
            }
            for (int r = 0; r < rows; ++r) {
                const float* key = products + std::int64_t{done + r} * forward.width;
                for (int c = 0; c < f.d_key; c += kLanes) {
                    const Floats k = load(key + c);
                    store(d_query + c, load(d_query + c) + d_logit[r] * k);
                    store(d_keys + std::int64_t{done + r} * both + c, d_logit[r] * load(query + c) * (1.0f - k * k));
                }
                for (int c = 0; c < f.d_value; c += kLanes)
                    store(d_values + std::int64_t{done + r} * both + c,
                          share[r] * load(d_pooled + c) * load(key + f.d_key + c));
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

// `first` and `last`: of the rows that may be none of the first or last gap.
template <class T>
void local_block_backward(const LocalBlockBackward<T>& a, std::int64_t first, std::int64_t last, std::int64_t rows,
                          int threads) {
    const PackedLocalBlockBackward<T> block(a, threads);
    const std::int64_t units = (rows + kUnit - 1) / kUnit, values = std::int64_t{kSums} * a.channels;
    parallel_for(units, threads, [&](std::int64_t i) {
        block.around_products(i * kUnit, std::min(rows, (i + 1) * kUnit), a.sums + i * values);
    });
    for (std::int64_t i = 1; i < units; ++i)
        for (std::int64_t c = 0; c < values; c += kLanes) store(a.sums + c, load(a.sums + c) + load(a.sums + i * values + c));
    if (a.d_tables) {
        const std::int64_t size = kTokens * (2 * std::int64_t{a.taps} + 1) * a.channels;
        parallel_for(kParts, threads, [&](std::int64_t i) {
            token_sums(a, rows * i / kParts, rows * (i + 1) / kParts, a.d_tables + i * size);
        });
        for (std::int64_t i = 1; i < kParts; ++i)
            for (std::int64_t c = 0; c < size; c += kLanes)
                store(a.d_tables + c, load(a.d_tables + c) + load(a.d_tables + i * size + c));
    }
    if (!a.d_x) return;
    std::memset(a.d_x, 0, sizeof(T) * std::min(first, rows) * a.channels);
    if (first >= last) return;
    std::memset(a.d_x + last * a.channels, 0, sizeof(T) * (rows - last) * a.channels);
    const std::int64_t unit = rows_per_unit(last - first, threads);
    parallel_for((last - first + unit - 1) / unit, threads, [&](std::int64_t i) {
        block.of_x(first + i * unit, std::min(last, first + (i + 1) * unit));
    });
}

template <class T>
void attention_backward(const AttentionBackward<T>& a, const T* keys_values_weight, const std::vector<Tile>& tiles,
                        int threads) {
    static_assert(kTile <= kBlock);
    static thread_local Buffer<Factor<T>> buffer;
    const PackedAttentionBackward<T> attend(a, keys_values_weight, threads);
    const WeightGradient<T> of_weights{nullptr, nullptr, a.d_weights, a.forward.channels, attend.both, 1, 1};
    const auto n_tiles = static_cast<std::int64_t>(tiles.size());
    const std::int64_t at_once = std::min<std::int64_t>(n_tiles, std::max(8, threads));
    const std::int64_t size = block_size<T, Factor<T>>(of_weights, attend.both);
    Factor<T>* room = a.d_weights ? buffer.room(at_once * size) : nullptr;
    for (std::int64_t done = 0; done < n_tiles; done += at_once) {
        std::vector<Block<Factor<T>>> blocks(std::min(at_once, n_tiles - done));
        parallel_for(blocks.size(), threads,
                     [&](std::int64_t i) { blocks[i] = attend(tiles[done + i], room ? room + i * size : nullptr); });
        if (!room) continue;
        parallel_for((attend.both + kColumns - 1) / kColumns, threads, [&](std::int64_t panel) {
            for (const auto& block : blocks)
                add_row_sums(of_weights, block, 0, static_cast<int>(panel) * kColumns, 0, tiles_of_inputs(of_weights));
        });
    }
}

// Rows [first, last). Threads share out columns, taps and, where those are few, inputs; each takes every block to its own
// cache.
template <class T>
void weight_gradient(const WeightGradient<T>& a, std::int64_t first, std::int64_t last, int threads) {
    const int panels = (a.columns + kColumns - 1) / kColumns, tiles = tiles_of_inputs(a);
    const int slabs = std::clamp((4 * threads + panels * a.taps - 1) / (panels * a.taps), 1, tiles);
    const int of_panel = a.taps * slabs, pieces = panels * of_panel, shares = std::min(pieces, 2 * threads);
    parallel_for(shares, threads, [&](std::int64_t share) {
        static thread_local Buffer<Factor<T>> buffer;
        const auto begin = static_cast<int>(pieces * share / shares), end = static_cast<int>(pieces * (share + 1) / shares);
        const int column = begin / of_panel * kColumns;
        const int columns = std::min(a.columns, (end + of_panel - 1) / of_panel * kColumns) - column;
        Factor<T>* room = buffer.room(block_size<T, Factor<T>>(a, columns));
        for (std::int64_t row = first; row < last; row += kBlock) {
            const auto rows = static_cast<int>(std::min(kBlock, last - row));
            const Block<Factor<T>> block = block_of(a, row, rows, column, columns, room);
            for (int i = begin; i < end; ++i) {
                const int slab = i % slabs, tap = i / slabs % a.taps;
                add_row_sums(a, block, tap, i / of_panel * kColumns, slab * tiles / slabs, (slab + 1) * tiles / slabs);
            }
        }
    });
}

// Sums of (rows, channels) over each protein, in order.
template <class T>
void protein_sums(const T* rows, const std::int64_t* starts, const std::int64_t* lengths, std::int64_t proteins,
                  float* out, int channels, int threads) {
    parallel_for(proteins, threads, [&](std::int64_t p) {
        float* total = out + p * channels;
        std::fill(total, total + channels, 0.0f);
        const T* row = rows + starts[p] * channels;
        for (std::int64_t r = 0; r < lengths[p]; ++r, row += channels)
            for (int c = 0; c < channels; c += kLanes) store(total + c, load(total + c) + load(row + c));
    });
}
