// Matrix products of rows with packed weights, and sums over rows of products.

// What products multiply: bfloat16 where the processor has an instruction for it, else float32.
#ifdef PBF_BF16_DOT
template <class T>
using Factor = T;
#else
template <class T>
using Factor = float;
#endif

constexpr int kColumns = kLanes * PBF_VECTORS;  // of a panel of packed weights
constexpr bool kHasHalfPanels = kColumns > 16;  // products have multiples of 16 columns

inline Floats multiply_add(Floats total, float x, const float* w) { return total + x * load(w); }

#if defined(PBF_EMULATED)
inline Floats multiply_add(Floats total, std::int32_t pair, const bf16* w) {
    Words weights;
    std::memcpy(&weights, w, sizeof weights);
    const auto bits = static_cast<std::uint32_t>(pair);
    return total + widened(static_cast<bf16>(bits >> 16)) * reinterpret_cast<Floats>(weights & 0xffff0000u) +
           widened(static_cast<bf16>(bits)) * reinterpret_cast<Floats>(weights << 16);
}
#elif defined(PBF_BF16_DOT)
inline Floats multiply_add(Floats total, std::int32_t pair, const bf16* w) {
#ifdef __aarch64__
    // Rounds the sum of the two products to odd, so its bits are not those of AVX-512's instruction.
    bfloat16x8_t weights;
    std::memcpy(&weights, w, sizeof weights);
    const bfloat16x8_t pairs = vreinterpretq_bf16_s32(vdupq_n_s32(pair));
    return reinterpret_cast<Floats>(vbfdotq_f32(reinterpret_cast<float32x4_t>(total), pairs, weights));
#else
    const __m512i weights = _mm512_loadu_si512(w);
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(total),
                                                   reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair)),
                                                   reinterpret_cast<__m512bh>(weights)));
#endif
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
    // 64 bits, because an int that may wrap is widened again for every row; counted up to zero, because twelve rows' addresses
    // leave no register for an end.
    const std::int64_t inputs = p.inputs;
    x += inputs - p.taps / 2 * p.dilation * inputs;
    for (int t = 0; t < p.taps; ++t, x += p.dilation * inputs)
        for (std::int64_t k = -inputs; k < 0; k += kPerStep<E>, w += kLanes * VECTORS * kPerStep<E>)
            for (int r = 0; r < ROWS; ++r) {
                Step<E> step;
                std::memcpy(&step, x + r * inputs + k, sizeof step);
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
                if (!kHasHalfPanels || p.columns - column >= kColumns)
                    product_tile_of<PBF_VECTORS>(rows, heights, p, at, w, bias, to);
                else if constexpr (kHasHalfPanels)
                    product_tile_of<PBF_VECTORS / 2>(rows, heights, p, at, w, bias, to);
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

// The same for what such sums multiply gradients by: panels of PBF_ROWS inputs, the last narrower. Read from where they are, a
// tile's few inputs of each row would be a cache line of their own.
template <class T, class E>
void pack_inputs(const T* rows, int n, int inputs, E* out) {
    Step<E> row[kMaxChannels];
    const int steps = (n + kPerStep<E> - 1) / kPerStep<E>;
    for (int s = 0; s < steps; ++s) {
        const int r = s * kPerStep<E>;
        pack_rows(rows + std::int64_t{r} * inputs, std::min(n - r, kPerStep<E>), inputs, inputs, inputs, reinterpret_cast<E*>(row));
        int first = 0;
        for (; first + PBF_ROWS <= inputs; first += PBF_ROWS)
            std::memcpy(out + (std::int64_t{first} * steps + s * PBF_ROWS) * kPerStep<E>, row + first, sizeof *row * PBF_ROWS);
        if (const int rest = inputs - first)
            std::memcpy(out + (std::int64_t{first} * steps + s * rest) * kPerStep<E>, row + first, sizeof *row * rest);
    }
}

// `INPUTS` by kLanes * VECTORS columns: out[i][c] += the sum over rows r, in order, of x[r][i] * gradient[r][c]. The sum is
// formed apart: added to one by one, a sum over a million rows would lose them.
template <int INPUTS, int VECTORS, class E>
void row_sum_tile(int rows, const E* x, const E* gradient, float* out, int columns) {
    Floats total[INPUTS][VECTORS] = {};
    for (int r = 0; r < rows; r += kPerStep<E>) {
        for (int i = 0; i < INPUTS; ++i) {
            Step<E> step;
            std::memcpy(&step, x + i * kPerStep<E>, sizeof step);
            for (int v = 0; v < VECTORS; ++v)
                total[i][v] = multiply_add(total[i][v], step, gradient + kLanes * v * kPerStep<E>);
        }
        x += INPUTS * kPerStep<E>;
        gradient += kLanes * VECTORS * kPerStep<E>;
    }
    for (int i = 0; i < INPUTS; ++i)
        for (int v = 0; v < VECTORS; ++v) {
            float* sum = out + std::int64_t{i} * columns + kLanes * v;
            store(sum, load(sum) + total[i][v]);
        }
}

template <int VECTORS, class E, int... INPUTS>
void row_sum_tile_of(int height, std::integer_sequence<int, INPUTS...>, int rows, const E* x, const E* gradient, float* out,
                     int columns) {
    using Tile = void (*)(int, const E*, const E*, float*, int);
    static constexpr Tile tiles[] = {row_sum_tile<INPUTS + 1, VECTORS, E>...};
    tiles[height - 1](rows, x, gradient, out, columns);
}
