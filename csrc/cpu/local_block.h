// The local block, forward.

// A row's state, its own or its token's.
template <class T, class Block>
const T* state_of(const Block& a, const T* embedding, std::int64_t row, int channels) {
    return a.tokens ? embedding + std::int64_t{a.tokens[row]} * channels : a.x + row * channels;
}

// The vectors of a local block, which need no packing: copies that live as long as what is packed.
struct Vectors {
    const float *narrow_bias, *wide_bias, *norm1, *norm1_bias, *dense_bias, *norm2, *norm2_bias;

    template <class T>
    explicit Vectors(const LocalBlockWeights<T>& w) {
        float* room = room_.room(7 * std::int64_t{w.channels});
        const auto kept = [&](const float* values) {
            std::copy(values, values + w.channels, room);
            room += w.channels;
            return room - w.channels;
        };
        narrow_bias = kept(w.narrow_bias), wide_bias = kept(w.wide_bias);
        norm1 = kept(w.norm1), norm1_bias = kept(w.norm1_bias);
        dense_bias = kept(w.dense_bias), norm2 = kept(w.norm2), norm2_bias = kept(w.norm2_bias);
    }

private:
    Buffer<float> room_;
};

// A dense layer, packed; `w` is w[column * column_stride + input * input_stride].
template <class T>
class Dense {
public:
    Dense(const T* w, std::int64_t column_stride, int input_stride, const float* bias, int inputs, int columns, int threads) {
        Factor<T>* room = room_.room(std::int64_t{inputs} * columns);
        product_ = {room, bias, inputs, columns, 1, 1, columns};
        parallel_for(columns / 16, threads, [&](std::int64_t sixteen) {
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c)
                pack_column(w + c * column_stride, input_stride, 0, product_, c, room);
        });
    }

    const Product<Factor<T>>& product() const { return product_; }

private:
    Buffer<Factor<T>> room_;
    Product<Factor<T>> product_;
};

// For the first block: a row of every token and every tap, of both convolutions.
template <class T>
class TokenTables {
public:
    TokenTables(const LocalBlockWeights<T>& w, int threads) : channels_(w.channels), taps_(w.taps), wide_dilation_(w.wide_dilation) {
        const std::int64_t width = std::int64_t{w.taps} * w.channels, values = kTokens * width;
        embedding_ = std::copy_n(w.embedding, std::int64_t{kTokens} * w.channels,
                                 states_.room(std::int64_t{kTokens} * w.channels)) - std::int64_t{kTokens} * w.channels;
        Buffer<Factor<T>> packed, widened_rows;
        Factor<T>* room = packed.room(width * w.channels);
        const Factor<T>* rows = factors<T>(embedding_, std::int64_t{kTokens} * w.channels,
                                           kWidens<T> ? widened_rows.room(std::int64_t{kTokens} * w.channels) : nullptr);
        float* table = tables_.room(2 * values);
        for (const T* weight : {w.narrow, w.wide}) {
            // Columns are taps, then channels.
            const Product<Factor<T>> p{room, nullptr, w.channels, static_cast<int>(width), 1, 1, static_cast<int>(width)};
            parallel_for(w.channels / 16, threads, [&](std::int64_t sixteen) {
                for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c)
                    for (int t = 0; t < w.taps; ++t)
                        pack_column(weight + std::int64_t{c} * w.channels * w.taps + t, w.taps, 0, p, t * w.channels + c, room);
            });
            product(p, rows, Runs{{0, kTokens, kTokens}}, table);
            table += values;
        }
    }

    const T* embedding() const { return embedding_; }

    // Both convolutions of rows [first + run) of the batch.
    void operator()(const std::uint8_t* tokens, const Runs& runs, const Vectors& v, float* narrow, float* wide) const {
        const float* table = tables_.data();
        add_rows(table, v.narrow_bias, 1, tokens, runs, narrow);
        add_rows(table + std::int64_t{kTokens} * taps_ * channels_, v.wide_bias, wide_dilation_, tokens, runs, wide);
    }

private:
    // out = bias + the sum over taps of the table's rows of the tokens there.
    void add_rows(const float* table, const float* bias, int dilation, const std::uint8_t* tokens, const Runs& runs,
                  float* out) const {
        const std::int64_t width = std::int64_t{taps_} * channels_;
        for (const Run& run : runs)
            for (int r = run.first; r < run.first + run.rows; ++r) {
                const std::uint8_t* token = tokens + r - std::int64_t{taps_ / 2} * dilation;
                for (int c = 0; c < channels_; c += kLanes) {
                    Floats total = load(bias + c);
                    for (int t = 0; t < taps_; ++t)
                        total += load(table + token[t * dilation] * width + t * channels_ + c);
                    store(out + std::int64_t{r} * channels_ + c, total);
                }
            }
    }

    int channels_, taps_, wide_dilation_;
    Buffer<T> states_;
    Buffer<float> tables_;
    const T* embedding_;
};

// What a local block needs of its weights, packed for this instruction set. It keeps no pointer to them.
template <class T>
struct PackedLocalBlock : PackedWeights {
    using E = Factor<T>;
    const int channels, taps, wide_dilation;
    const Vectors vectors;
    const Dense<T> dense;
    std::unique_ptr<const TokenTables<T>> tables;  // or
    std::unique_ptr<const Convolution<T>> narrow, wide;

    PackedLocalBlock(const LocalBlockWeights<T>& w, int threads)
        : channels(w.channels), taps(w.taps), wide_dilation(w.wide_dilation), vectors(w),
          dense(w.dense, w.channels, 1, vectors.dense_bias, w.channels, w.channels, threads) {
        if (w.embedding) {
            tables = std::make_unique<TokenTables<T>>(w, threads);
            return;
        }
        const std::int64_t column = std::int64_t{w.channels} * w.taps;
        narrow = std::make_unique<Convolution<T>>(w.narrow, column, w.taps, 1, vectors.narrow_bias, w.channels, w.taps, 1,
                                                  threads);
        wide = std::make_unique<Convolution<T>>(w.wide, column, w.taps, 1, vectors.wide_bias, w.channels, w.taps,
                                                w.wide_dilation, threads);
    }

    // Rows [first, last) of the batch, a unit of `cut`.
    void operator()(const LocalBlock<T>& a, std::int64_t first, std::int64_t last) const {
        static thread_local Buffer<float> sums;
        static thread_local Buffer<T> states;
        static thread_local Buffer<E> widened_rows;
        const int rows = static_cast<int>(last - first);
        const std::int64_t values = std::int64_t{rows} * channels;
        float* narrow_sums = sums.room(2 * values);
        float* wide_sums = narrow_sums + values;
        T* hidden = a.hidden ? a.hidden + first * channels : states.room(values);
        E* room = kWidens<T> ? widened_rows.room(values) : nullptr;
        const std::int32_t* segments = a.segments + first;
        const Runs runs = runs_of(segments, rows, (taps / 2 + kOutputs) * wide_dilation);

        if (tables) {
            (*tables)(a.tokens + first, runs, vectors, narrow_sums, wide_sums);
        } else {
            (*narrow)(a.x + first * channels, runs, narrow_sums);
            (*wide)(a.x + first * channels, runs, wide_sums);
        }
        if (a.narrow) {
            keep(narrow_sums, runs, a.narrow + first * channels);
            keep(wide_sums, runs, a.wide + first * channels);
        }
        merge_convolutions(a, first, narrow_sums, wide_sums, segments, rows, hidden);
        product(dense.product(), factors<T>(hidden, values, room), runs, narrow_sums);
        merge_dense(hidden, narrow_sums, segments, rows, a.local + first * channels);
    }

    // Rows of gaps are left as they are: nobody reads them.
    void keep(const float* sums, const Runs& runs, T* out) const {
        for (const Run& run : runs)
            for (std::int64_t i = std::int64_t{run.first} * channels, n = i + std::int64_t{run.rows} * channels; i < n;
                 i += kLanes)
                store(out + i, load(sums + i));
    }

    // out = LN(x + broadcast[segment] + gelu(narrow) + gelu(wide)); zeros in gap rows.
    void merge_convolutions(const LocalBlock<T>& a, std::int64_t first, const float* narrow, const float* wide, const std::int32_t* segments,
                            int rows, T* out) const {
        float row[kMaxChannels];
        for (int r = 0; r < rows; ++r, narrow += channels, wide += channels, out += channels) {
            if (segments[r] < 0) {
                std::memset(out, 0, sizeof(T) * channels);
                continue;
            }
            const float* broadcast = a.broadcast + std::int64_t{segments[r]} * channels;
            const T* x = state_of(a, tables ? tables->embedding() : nullptr, first + r, channels);
            for (int c = 0; c < channels; c += kLanes)
                store(row + c, load(x + c) + load(broadcast + c) + gelu(load(narrow + c)) + gelu(load(wide + c)));
            layer_norm(row, vectors.norm1, vectors.norm1_bias, out, channels);
        }
    }

    // out = LN(hidden + gelu(dense)); zeros in gap rows.
    void merge_dense(const T* hidden, const float* dense, const std::int32_t* segments, int rows, T* out) const {
        float row[kMaxChannels];
        for (int r = 0; r < rows; ++r, hidden += channels, dense += channels, out += channels) {
            if (segments[r] < 0) {
                std::memset(out, 0, sizeof(T) * channels);
                continue;
            }
            for (int c = 0; c < channels; c += kLanes) store(row + c, load(hidden + c) + gelu(load(dense + c)));
            layer_norm(row, vectors.norm2, vectors.norm2_bias, out, channels);
        }
    }
};

template <class T>
std::unique_ptr<PackedWeights> pack_local_block(const LocalBlockWeights<T>& w, int threads) {
    return std::make_unique<PackedLocalBlock<T>>(w, threads);
}

template <class T>
void local_block(const PackedWeights& packed, const LocalBlock<T>& a, const Layout& layout, int threads) {
    const auto& block = static_cast<const PackedLocalBlock<T>&>(packed);
    const std::int64_t first = layout.gap, last = layout.rows - layout.gap;
    const auto units = cut(layout, rows_per_unit(last - first, threads), kOutputs * block.wide_dilation);
    parallel_for(static_cast<std::int64_t>(units.size()) - 1, threads, [&](std::int64_t i) { block(a, units[i], units[i + 1]); });
}
