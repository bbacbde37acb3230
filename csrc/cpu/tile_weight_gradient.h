// Sums over rows of products of bfloat16 on the tile unit: what weight_gradient.h does, by other means, for blocks of the same
// rows.
//
// A block's gradients are packed as weights are. Its x is transposed, so that 32 neighboring rows of an input are what one
// instruction multiplies, and a tap reads the same numbers from another address. Both are filled up with zeros to whole
// instructions; rows of x that a filled-up row meets are those of a gap.

constexpr int kInputs = 2 * kTileRows;  // of a tile of sums

// From one input's rows to the next one's: an odd number of cache lines, so that neighbors do not compete for places.
inline std::int64_t transposed_stride(const WeightGradient<bf16>& a) {
    const std::int64_t lines = (kBlock + 2 * std::int64_t{a.taps / 2} * a.dilation + kDepth - 1) / kDepth;
    return (lines | 1) * kDepth;
}

inline int whole_depths(int rows) { return (rows + kDepth - 1) / kDepth * kDepth; }

// Of two vectors, as rows: the transposed of each 2 by 2 blocks of STEP lanes, its row UPPER or the other one.
template <int STEP, bool UPPER, int... LANE>
Words swapped(Words a, Words b, std::integer_sequence<int, LANE...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (LANE & STEP ? kLanes + LANE - UPPER * STEP : LANE + !UPPER * STEP)...);
#else
    return __builtin_shuffle(a, b, Words{(LANE & STEP ? kLanes + LANE - UPPER * STEP : LANE + !UPPER * STEP)...});
#endif
}

// kLanes by kLanes numbers, in place: blocks of 1, 2, 4 and more lanes change places.
template <int STEP = 1>
void transpose(Words (&v)[kLanes]) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    for (int i = 0; i < kLanes; ++i) {
        if (i & STEP) continue;
        const Words upper = v[i], lower = v[i + STEP];
        v[i] = swapped<STEP, true>(upper, lower, lanes);
        v[i + STEP] = swapped<STEP, false>(upper, lower, lanes);
    }
    if constexpr (2 * STEP < kLanes) transpose<2 * STEP>(v);
}

// `n` rows of `inputs` values to out[input * stride + row], followed by zeros up to `room` rows, a multiple of 2 * kLanes.
inline void transpose_rows(const bf16* x, int n, int inputs, bf16* out, std::int64_t stride, int room) {
    static constexpr bf16 zeros[kLanes] = {};
    const auto numbers = [&](int row, int input) {
        Halves h;
        std::memcpy(&h, row < n ? x + std::int64_t{row} * inputs + input : zeros, sizeof h);
        return __builtin_convertvector(h, Words);
    };
    for (int row = 0; row < room; row += 2 * kLanes)
        for (int input = 0; input < inputs; input += kLanes) {
            Words pairs[kLanes];
            for (int i = 0; i < kLanes; ++i)
                pairs[i] = numbers(row + 2 * i, input) | numbers(row + 2 * i + 1, input) << 16;
            transpose(pairs);
            for (int i = 0; i < kLanes; ++i) std::memcpy(out + (input + i) * stride + row, &pairs[i], sizeof pairs[i]);
        }
}

template <>
inline std::int64_t block_size<bf16, bf16>(const WeightGradient<bf16>& a, int columns) {
    return a.inputs * transposed_stride(a) + kBlock * columns;
}

template <>
inline int tiles_of_inputs<bf16>(const WeightGradient<bf16>& a) {
    return (a.inputs + kInputs - 1) / kInputs;
}

template <>
inline Block<bf16> block_of<bf16, bf16>(const WeightGradient<bf16>& a, std::int64_t row, int n, int first, int columns,
                                        bf16* room) {
    const int reach = a.taps / 2 * a.dilation, rows = whole_depths(n);
    const Block<bf16> block{{room + kBlock * columns, nullptr}, room, rows, first, {}};
    for (int panel = 0; panel < columns; panel += kColumns) {
        const int width = std::min(kColumns, columns - panel), packed = (n + 1) / 2 * 2;
        bf16* to = room + std::int64_t{panel} * rows;
        pack_rows(a.gradient + row * a.columns + first + panel, n, a.columns, width, width, to);
        std::memset(to + std::int64_t{packed} * width, 0, sizeof(bf16) * (rows - packed) * width);
    }
    transpose_rows(a.x + (row - reach) * a.inputs, n + 2 * reach, a.inputs, room + kBlock * columns, transposed_stride(a),
                   whole_depths(rows + 2 * reach));
    return block;
}

template <>
inline void add_row_sums<bf16, bf16>(const WeightGradient<bf16>& a, const Block<bf16>& block, int tap, int column, int begin,
                                     int end) {
    const std::int64_t stride = transposed_stride(a);
    const bf16* gradient = block.gradient + std::int64_t{column - block.first} * block.rows;
    const int columns = std::min(kColumns, a.columns - column);
    const Product<bf16> p{gradient, nullptr, block.rows, columns, 1, 1, kColumns};
    alignas(64) float sums[kInputs * kColumns];
    PBF_TILES::configure(configuration_of({kInputs, kDepth}));
    for (int t = begin; t < end; ++t) {
        const int first = t * kInputs, rows = std::min(kInputs, a.inputs - first);
        tile_sums_of(rows, columns, p, block.x[0] + first * stride + tap * a.dilation, stride, gradient, nullptr, sums);
        // Formed apart, then added: one by one, a sum over a million rows would lose them.
        float* out = a.out + (std::int64_t{tap} * a.inputs + first) * a.columns + column;
        for (int i = 0; i < rows; ++i, out += a.columns)
            for (int c = 0; c < columns; c += kLanes) store(out + c, load(out + c) + load(sums + i * kColumns + c));
    }
    PBF_TILES::release();
}
