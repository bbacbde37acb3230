// Gradients of matrices and convolutions: sums over all rows, block by block.

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
        if (!kHasHalfPanels || a.columns - column >= kColumns)
            row_sum_tile_of<PBF_VECTORS>(height, heights, block.rows, a.inputs, at, gradient, to, a.columns);
        else if constexpr (kHasHalfPanels)
            row_sum_tile_of<PBF_VECTORS / 2>(height, heights, block.rows, a.inputs, at, gradient, to, a.columns);
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
