// Matrix products of bfloat16 on the tile unit, for the sets that have one: PBF_TILES.
//
// Packed weights are as elsewhere: two rows of a panel interleaved, which is what the unit takes. A tap's rows are read where
// they lie, 2 * inputs bytes apart. The last tile of a run ends with it and computes some rows again; runs of fewer than 16
// rows get lower tiles, which take another configuration, longer than many products. Inputs that are no multiple of 32 go 16
// at a time, so that no tile reaches into the next row: 0 * NaN would be NaN. The unit computes row by row, so a row's bits
// depend neither on the height of its tile nor on its neighbors.

static_assert(kColumns == 2 * kTileColumns);

// HIGH by WIDE tiles of sums, for rows from `x` on that are `row_values` apart, and one panel of columns. All sums stay in
// tiles.
template <int HIGH, int WIDE>
__attribute__((noinline)) void tile_sums(const Product<bf16>& p, const bf16* x, std::int64_t row_values, const bf16* w,
                                         const float* bias, float* out) {
    constexpr bool low = HIGH == 2, right = WIDE == 2;
    constexpr std::int64_t weight_stride = 4 * kTileColumns * WIDE;
    const std::int64_t inputs = p.inputs, row_stride = 2 * row_values, next_rows = kTileRows * row_values;
    const std::int64_t tap_stride = p.dilation * row_values;
    const std::int64_t depth = inputs % kDepth ? kDepth / 2 : kDepth, step = depth * kTileColumns * WIDE;
    if (bias) {
        // Every row of the tile from the same address.
        PBF_TILES::load<0>(bias, 0);
        if constexpr (right) PBF_TILES::load<1>(bias + kTileColumns, 0);
        if constexpr (low) PBF_TILES::load<2>(bias, 0);
        if constexpr (low && right) PBF_TILES::load<3>(bias + kTileColumns, 0);
    } else {
        PBF_TILES::zero<0>();
        if constexpr (right) PBF_TILES::zero<1>();
        if constexpr (low) PBF_TILES::zero<2>();
        if constexpr (low && right) PBF_TILES::zero<3>();
    }
    x -= p.taps / 2 * tap_stride;
    for (int taps = p.taps; taps; --taps, x += tap_stride)
        for (const bf16 *at = x, *end = x + inputs; at != end; at += depth, w += step) {
            PBF_TILES::load<6>(w, weight_stride);
            PBF_TILES::load<4>(at, row_stride);
            PBF_TILES::dot<0, 4, 6>();
            if constexpr (right) {
                PBF_TILES::load<7>(w + 2 * kTileColumns, weight_stride);
                PBF_TILES::dot<1, 4, 7>();
            }
            if constexpr (low) {
                PBF_TILES::load<5>(at + next_rows, row_stride);
                PBF_TILES::dot<2, 5, 6>();
                if constexpr (right) PBF_TILES::dot<3, 5, 7>();
            }
        }
    const std::int64_t out_stride = 4 * std::int64_t{p.out_stride};
    PBF_TILES::store<0>(out, out_stride);
    if constexpr (right) PBF_TILES::store<1>(out + kTileColumns, out_stride);
    if constexpr (low) {
        float* below = out + kTileRows * std::int64_t{p.out_stride};
        PBF_TILES::store<2>(below, out_stride);
        if constexpr (right) PBF_TILES::store<3>(below + kTileColumns, out_stride);
    }
}

inline void tile_sums_of(int rows, int columns, const Product<bf16>& p, const bf16* x, std::int64_t row_values, const bf16* w,
                         const float* bias, float* out) {
    const bool wide = columns > kTileColumns;
    if (rows > kTileRows)
        (wide ? tile_sums<2, 2> : tile_sums<2, 1>)(p, x, row_values, w, bias, out);
    else
        (wide ? tile_sums<1, 2> : tile_sums<1, 1>)(p, x, row_values, w, bias, out);
}

// As product() of product.h; this one is chosen for bfloat16.
inline void product(const Product<bf16>& p, const bf16* x, const Runs& runs, float* out) {
    constexpr int two = 2 * kTileRows;
    TileShape now{};
    for (int column = 0; column < p.columns; column += kColumns) {
        const bf16* w = p.weights + std::int64_t{column} * p.taps * p.inputs;
        const float* bias = p.bias ? p.bias + column : nullptr;
        for (const Run& run : runs) {
            const TileShape shape{run.rows < kTileRows ? run.rows : two, p.inputs % kDepth ? kDepth / 2 : kDepth};
            if (!(shape == now)) PBF_TILES::configure(configuration_of(shape));
            now = shape;
            for (int done = 0; done < run.rows;) {
                const bool high = run.rows >= two && run.rows - done > kTileRows;
                const int rows = high ? two : std::min(run.rows, kTileRows), first = std::min(done, run.rows - rows);
                const bf16* at = x + std::int64_t{run.first + first} * p.inputs;
                float* to = out + std::int64_t{run.first + first} * p.out_stride + column;
                tile_sums_of(rows, p.columns - column, p, at, p.inputs, w, bias, to);
                done = first + rows;
            }
        }
    }
    if (now.rows) PBF_TILES::release();
}
