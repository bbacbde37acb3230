// Gradients of matrices and convolutions: sums over all rows, block by block.

// Rows as sums over them take them: `columns` values of gradients from the `first` on, and x from `reach` rows before to `reach`
// after, packed in panels both.
template <class E>
struct Block {
    const E* x[2];  // from the first row and, for pairs where a tap is an odd number of rows away, from the second
    const E* gradient;
    int rows, first;
    int steps[2];  // of the panels of x
};

template <class E>
std::int64_t whole_steps(std::int64_t rows) {
    return (rows + kPerStep<E> - 1) / kPerStep<E> * kPerStep<E>;
}

// How often x is packed: twice where pairs begin at odd rows too.
template <class T, class E>
int copies_of_x(const WeightGradient<T>& a) {
    return kPerStep<E> > 1 && a.taps > 1 && a.dilation % 2 ? 2 : 1;
}

template <class T, class E>
std::int64_t block_size(const WeightGradient<T>& a, int columns) {
    const std::int64_t window = whole_steps<E>(kBlock + 2 * std::int64_t{a.taps / 2} * a.dilation);
    return copies_of_x<T, E>(a) * window * a.inputs + kBlock * columns;
}

// `n` rows, in `room` of block_size().
template <class T, class E>
Block<E> block_of(const WeightGradient<T>& a, std::int64_t row, int n, int first, int columns, E* room) {
    const int reach = a.taps / 2 * a.dilation, window = n + 2 * reach;
    const T* x = a.x + (row - reach) * a.inputs;
    Block<E> block{{}, room, static_cast<int>(whole_steps<E>(n)), first, {}};
    pack_rows(a.gradient + row * a.columns + first, n, a.columns, columns, kColumns, room);
    room += kBlock * columns;
    for (int i = 0; i < copies_of_x<T, E>(a); ++i) {
        pack_inputs(x + i * a.inputs, window - i, a.inputs, room);
        block.x[i] = room;
        block.steps[i] = static_cast<int>(whole_steps<E>(window - i) / kPerStep<E>);
        room += whole_steps<E>(window - i) * a.inputs;
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
    const int away = tap * a.dilation, copy = away % kPerStep<E>, skipped = away / kPerStep<E>;
    const E* gradient = block.gradient + std::int64_t{column - block.first} * block.rows;
    float* out = a.out + std::int64_t{tap} * a.inputs * a.columns + column;
    for (int t = begin; t < end; ++t) {
        const int first = t * PBF_ROWS, height = std::min(PBF_ROWS, a.inputs - first);
        const E* at = block.x[copy] + (std::int64_t{first} * block.steps[copy] + std::int64_t{skipped} * height) * kPerStep<E>;
        float* to = out + std::int64_t{first} * a.columns;
        constexpr auto heights = std::make_integer_sequence<int, PBF_ROWS>{};
        if (!kHasHalfPanels || a.columns - column >= kColumns)
            row_sum_tile_of<PBF_VECTORS>(height, heights, block.rows, at, gradient, to, a.columns);
        else if constexpr (kHasHalfPanels)
            row_sum_tile_of<PBF_VECTORS / 2>(height, heights, block.rows, at, gradient, to, a.columns);
    }
}

// Asks for the `part`-th of `parts` parts of what the block of rows [row, row + n) is packed of.
template <class T>
void prefetch_block(const WeightGradient<T>& a, std::int64_t row, int n, int first, int columns, int part, int parts) {
    constexpr int line = 64 / sizeof(T);
    const int reach = a.taps / 2 * a.dilation, begin = n * part / parts, end = n * (part + 1) / parts;
    for (std::int64_t r = row + begin; r < row + end; ++r) {
        for (int c = 0; c < a.inputs; c += line) __builtin_prefetch(a.x + (r + reach) * a.inputs + c, 0, 2);
        for (int c = 0; c < columns; c += line) __builtin_prefetch(a.gradient + r * a.columns + first + c, 0, 2);
    }
}

// Rows [first, last). Threads share out columns, taps and, where those are few, inputs; each takes every block to its own
// cache.
template <class T>
void direct_weight_gradient(const WeightGradient<T>& a, std::int64_t first, std::int64_t last, int threads) {
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
            const auto rows_next = static_cast<int>(std::clamp<std::int64_t>(last - row - kBlock, 0, kBlock));
            for (int i = begin; i < end; ++i) {
                // Packing would wait for memory; these products do not read any.
                prefetch_block(a, row + kBlock, rows_next, column, columns, i - begin, end - begin);
                const int slab = i % slabs, tap = i / slabs % a.taps;
                add_row_sums(a, block, tap, i / of_panel * kColumns, slab * tiles / slabs, (slab + 1) * tiles / slabs);
            }
        }
    });
}
