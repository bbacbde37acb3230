// Gradients of convolutions' weights by Winograd's F(4, 3) backward, where products are of float32.
//
// Forward, a group's three taps w and six rows d give four outputs A^T [(G w) * (B^T d)]. So the gradient of w is
// G^T [(A dy) * (B^T d)]: for each of the six points a sum over fours of rows of products of two transformed ones, half as many
// as row by row, and three taps of six such matrices at the end. Fours are counted from the first row of all, whatever
// proteins they lie in: gradients of rows in gaps are zeros.

template <class T>
class ConvolutionGradient {
    using Filter = Winograd<float>;
    static constexpr int kPoints = Filter::points;

public:
    // Rows [first, last).
    ConvolutionGradient(const WeightGradient<T>& a, std::int64_t first, std::int64_t last)
        : a_(a), first_(first), last_(last), groups_(a.taps / kGroupTaps), matrices_(kPoints * groups_),
          tiles_((a.inputs + PBF_ROWS - 1) / PBF_ROWS), fours_(std::max(kAtOnce / a.dilation, 1) * a.dilation) {}

    void operator()(int threads) const {
        static thread_local Buffer<float> buffer;
        const std::int64_t size = std::int64_t{a_.inputs} * a_.columns;
        float* sums = buffer.room(matrices_ * size);
        std::fill(sums, sums + matrices_ * size, 0.0f);
        const int panels = (a_.columns + kColumns - 1) / kColumns, pieces = panels * matrices_;
        // One for each thread, no more: each transforms all of x.
        const int shares = std::min(pieces, threads);
        parallel_for(shares, threads, [&](std::int64_t share) {
            add(static_cast<int>(pieces * share / shares), static_cast<int>(pieces * (share + 1) / shares), sums);
        });
        parallel_for(a_.taps, threads, [&](std::int64_t tap) {
            float* out = a_.out + tap * size;
            for (int j = 0; j < kPoints; ++j) {
                const auto factor = static_cast<float>(Filter::from_taps[j][tap % kGroupTaps]);
                const float* from = sums + (j * groups_ + tap / kGroupTaps) * size;
                if (factor != 0)
                    for (std::int64_t i = 0; i < size; i += kLanes) store(out + i, load(out + i) + factor * load(from + i));
            }
        });
    }

private:
    // Fours whose transformed rows a thread keeps in its second-level cache.
    static constexpr int kAtOnce = 64;

    // Pieces [begin, end) of the sums, panels of columns and in each the matrices.
    void add(int begin, int end, float* sums) const {
        static thread_local Buffer<float> buffer;
        const int column = begin / matrices_ * kColumns;
        const int columns = std::min(a_.columns, (end + matrices_ - 1) / matrices_ * kColumns) - column;
        float* x = buffer.room(std::int64_t{fours_} * (matrices_ * a_.inputs + kPoints * columns));
        float* gradient = x + std::int64_t{fours_} * matrices_ * a_.inputs;
        const std::int64_t rows = std::int64_t{Filter::outputs} * fours_;
        for (std::int64_t row = first_; row < last_; row += rows) {
            const std::int64_t whole = std::int64_t{Filter::outputs} * a_.dilation;  // rows of `dilation` fours
            const auto n = static_cast<int>(std::min(rows, (last_ - row + whole - 1) / whole * whole) / Filter::outputs);
            pack_x(row, n, x);
            pack_gradient(row, n, column, columns, gradient);
            const auto rows_next = static_cast<int>(std::clamp<std::int64_t>(last_ - row - rows, 0, rows));
            for (int i = begin; i < end; ++i) {
                prefetch_block(a_, row + rows, rows_next, column, columns, i - begin, end - begin);
                add_products(n, i % matrices_, i / matrices_ * kColumns, column, columns, x, gradient, sums);
            }
        }
    }

    // The first of a block's outputs that are computed together, `dilation` rows apart.
    std::int64_t row_of(std::int64_t row, int four) const {
        return row + four / a_.dilation * std::int64_t{Filter::outputs} * a_.dilation + four % a_.dilation;
    }

    // To (matrices, panels of PBF_ROWS inputs, n, inputs of the panel).
    void pack_x(std::int64_t row, int n, float* out) const {
        static constexpr T zeros[kMaxChannels] = {};
        const std::int64_t readable = last_ + std::int64_t{a_.taps / 2} * a_.dilation, size = std::int64_t{n} * a_.inputs;
        static thread_local Buffer<float> buffer;
        float* points = buffer.room(std::int64_t{kPoints} * a_.inputs);
        for (int four = 0; four < n; ++four)
            for (int g = 0; g < groups_; ++g) {
                const T* rows[kPoints];
                for (int i = 0; i < kPoints; ++i) {
                    const std::int64_t at = row_of(row, four) + std::int64_t{kGroupTaps * g + i - a_.taps / 2} * a_.dilation;
                    rows[i] = at < readable ? a_.x + at * a_.inputs : zeros;
                }
                Filter::transform_input(rows, a_.inputs, points, a_.inputs);
                for (int j = 0; j < kPoints; ++j) {
                    const float* from = points + j * a_.inputs;
                    float* to = out + (j * groups_ + g) * size;
                    int first = 0;
                    for (; first + PBF_ROWS <= a_.inputs; first += PBF_ROWS)
                        std::memcpy(to + std::int64_t{first} * n + four * PBF_ROWS, from + first, sizeof *to * PBF_ROWS);
                    if (const int rest = a_.inputs - first)
                        std::memcpy(to + std::int64_t{first} * n + four * rest, from + first, sizeof *to * rest);
                }
            }
    }

    // To (points, panels of kColumns, n, columns of the panel): the transpose of transform_output.
    void pack_gradient(std::int64_t row, int n, int column, int columns, float* out) const {
        static constexpr T zeros[kMaxChannels] = {};
        const std::int64_t size = std::int64_t{n} * columns;
        for (int four = 0; four < n; ++four) {
            const T* rows[Filter::outputs];
            for (int i = 0; i < Filter::outputs; ++i) {
                const std::int64_t at = row_of(row, four) + std::int64_t{i} * a_.dilation;
                rows[i] = at < last_ ? a_.gradient + at * a_.columns + column : zeros;
            }
            for (int c = 0; c < columns; c += kLanes) {
                const int panel = c / kColumns * kColumns, wide = std::min(kColumns, columns - panel);
                float* to = out + std::int64_t{panel} * n + std::int64_t{four} * wide + c - panel;
                const Floats y0 = load(rows[0] + c), y1 = load(rows[1] + c), y2 = load(rows[2] + c), y3 = load(rows[3] + c);
                const Floats even = y0 + y2, odd = y1 + y3, far = y0 + 4.0f * y2, odd_far = 2.0f * y1 + 8.0f * y3;
                store(to, y0);
                store(to + size, even + odd);
                store(to + 2 * size, even - odd);
                store(to + 3 * size, far + odd_far);
                store(to + 4 * size, far - odd_far);
                store(to + 5 * size, y3);
            }
        }
    }

    void add_products(int n, int matrix, int panel, int column, int columns, const float* x, const float* gradient,
                      float* sums) const {
        const float* from = x + std::int64_t{matrix} * n * a_.inputs;
        const float* of = gradient + std::int64_t{matrix / groups_} * n * columns + std::int64_t{panel - column} * n;
        float* out = sums + std::int64_t{matrix} * a_.inputs * a_.columns + panel;
        constexpr auto heights = std::make_integer_sequence<int, PBF_ROWS>{};
        for (int t = 0; t < tiles_; ++t) {
            const int first = t * PBF_ROWS, height = std::min(PBF_ROWS, a_.inputs - first);
            float* to = out + std::int64_t{first} * a_.columns;
            const float* at = from + std::int64_t{first} * n;
            if (!kHasHalfPanels || a_.columns - panel >= kColumns)
                row_sum_tile_of<PBF_VECTORS>(height, heights, n, at, of, to, a_.columns);
            else if constexpr (kHasHalfPanels)
                row_sum_tile_of<PBF_VECTORS / 2>(height, heights, n, at, of, to, a_.columns);
        }
    }

    const WeightGradient<T>& a_;
    std::int64_t first_, last_;
    int groups_, matrices_, tiles_, fours_;
};

// See WeightGradient; rows [first, last).
template <class T>
void weight_gradient(const WeightGradient<T>& a, std::int64_t first, std::int64_t last, int threads) {
    if constexpr (std::is_same_v<Factor<T>, float>)
        if (a.taps % kGroupTaps == 0) {
            ConvolutionGradient<T>(a, first, last)(threads);
            return;
        }
    direct_weight_gradient(a, first, last, threads);
}
