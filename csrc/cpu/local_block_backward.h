// The local block's gradients, but for those of its matrices.

// What the local block's gradients need of its weights, packed for this instruction set. It keeps no pointer to them.
template <class T>
struct PackedLocalBlockBackward : PackedWeights {
    using E = Factor<T>;
    const int channels, taps, wide_dilation;
    const Vectors vectors;
    const Dense<T> dense, dense_back;
    Buffer<T> embedding;
    std::unique_ptr<const Convolution<T>> narrow_back, wide_back;  // where the block takes states

    PackedLocalBlockBackward(const LocalBlockWeights<T>& w, int threads)
        : channels(w.channels), taps(w.taps), wide_dilation(w.wide_dilation), vectors(w),
          dense(w.dense, w.channels, 1, vectors.dense_bias, w.channels, w.channels, threads),
          dense_back(w.dense, 1, w.channels, nullptr, w.channels, w.channels, threads) {
        if (w.embedding) {
            std::copy_n(w.embedding, std::int64_t{kTokens} * w.channels, embedding.room(std::int64_t{kTokens} * w.channels));
            return;
        }
        // Backward, outputs are inputs and the taps are in reverse.
        const int last_tap = w.taps - 1, stride = w.channels * w.taps;
        narrow_back = std::make_unique<Convolution<T>>(w.narrow + last_tap, w.taps, stride, -1, nullptr, w.channels, w.taps, 1,
                                                       threads);
        wide_back = std::make_unique<Convolution<T>>(w.wide + last_tap, w.taps, stride, -1, nullptr, w.channels, w.taps,
                                                     w.wide_dilation, threads);
    }

    // Rows [first, last): all but the gradients of x. `sums` are the unit's.
    void around_products(const LocalBlockBackward<T>& a, std::int64_t first, std::int64_t last, float* sums) const {
        static thread_local Buffer<float> buffer;
        static thread_local Buffer<E> widened_rows;
        const int rows = static_cast<int>(last - first);
        const std::int64_t values = std::int64_t{rows} * channels, offset = first * channels;
        float* normalised = buffer.room(5 * values + rows);
        float* narrow_slopes = normalised + values;
        float* wide_slopes = narrow_slopes + values;
        float* dense_sums = wide_slopes + values;
        float* back = dense_sums + values;
        float* scales = back + values;
        E* room = kWidens<T> ? widened_rows.room(values) : nullptr;
        const std::int32_t* segments = a.segments + first;
        const Runs runs = runs_of(segments, rows, 0);
        float row[kMaxChannels];

        std::fill(sums, sums + kSums * channels, 0.0f);
        for (int r = 0; r < rows; ++r) {
            const std::int64_t at = offset + std::int64_t{r} * channels;
            if (segments[r] < 0) {
                for (T* out : {a.hidden, a.d_dense, a.d_narrow, a.d_wide, a.d_sum})
                    std::memset(out + at, 0, sizeof(T) * channels);
                continue;
            }
            const float* broadcast = a.broadcast + std::int64_t{segments[r]} * channels;
            const std::int64_t in_unit = std::int64_t{r} * channels;
            const T* x = state_of(a, embedding.data(), first + r, channels);
            for (int c = 0; c < channels; c += kLanes) {
                const Gelu narrow = gelu_and_slope(load(a.narrow + at + c)), wide = gelu_and_slope(load(a.wide + at + c));
                store(row + c, load(x + c) + load(broadcast + c) + narrow.value + wide.value);
                store(narrow_slopes + in_unit + c, narrow.slope);
                store(wide_slopes + in_unit + c, wide.slope);
            }
            const Moments m = moments(row, channels);
            scales[r] = m.scale;
            for (int c = 0; c < channels; c += kLanes) {
                const Floats n = (load(row + c) - m.mean) * m.scale;
                store(normalised + in_unit + c, n);
                store(a.hidden + at + c, n * load(vectors.norm1 + c) + load(vectors.norm1_bias + c));
            }
        }

        product(dense.product(), factors<T>(a.hidden + offset, values, room), runs, dense_sums);
        for (int r = 0; r < rows; ++r) {
            if (segments[r] < 0) continue;
            const std::int64_t at = offset + std::int64_t{r} * channels;
            float* sum = dense_sums + std::int64_t{r} * channels;
            float* gradient = back + std::int64_t{r} * channels;
            for (int c = 0; c < channels; c += kLanes) {
                const Gelu dense = gelu_and_slope(load(sum + c));
                store(row + c, load(a.hidden + at + c) + dense.value);
                store(sum + c, dense.slope);
            }
            const Moments m = moments(row, channels);
            for (int c = 0; c < channels; c += kLanes) {
                store(row + c, (load(row + c) - m.mean) * m.scale);
                store(gradient + c, load(a.d_local + at + c));
            }
            layer_norm_backward(row, m.scale, vectors.norm2, gradient, sums + kNorm2Weight * channels,
                                sums + kNorm2Bias * channels, channels);
            float* d_bias = sums + kDenseBias * channels;
            for (int c = 0; c < channels; c += kLanes) {
                const Floats d = load(gradient + c), d_sum = d * load(sum + c);
                store(a.d_dense + at + c, d_sum);
                store(d_bias + c, load(d_bias + c) + d_sum);
                store(sum + c, d);
            }
        }

        product(dense_back.product(), factors<T>(a.d_dense + offset, values, room), runs, back);
        for (int r = 0; r < rows; ++r) {
            if (segments[r] < 0) continue;
            const std::int64_t at = offset + std::int64_t{r} * channels;
            const std::int64_t in_unit = std::int64_t{r} * channels;
            float* gradient = back + in_unit;
            const float* beside = dense_sums + in_unit;
            for (int c = 0; c < channels; c += kLanes) {
                Floats d = load(beside + c) + load(gradient + c);
                if (a.d_hidden) d += load(a.d_hidden + at + c);
                store(gradient + c, d);
            }
            layer_norm_backward(normalised + in_unit, scales[r], vectors.norm1, gradient,
                                sums + kNorm1Weight * channels, sums + kNorm1Bias * channels, channels);
            float *narrow_bias = sums + kNarrowBias * channels, *wide_bias = sums + kWideBias * channels;
            for (int c = 0; c < channels; c += kLanes) {
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

    // Rows [first, last) of the gradients of x, a unit of `cut`; zeros in gap rows.
    void of_x(const LocalBlockBackward<T>& a, std::int64_t first, std::int64_t last) const {
        static thread_local Buffer<float> buffer;
        const int rows = static_cast<int>(last - first);
        const std::int64_t values = std::int64_t{rows} * channels, offset = first * channels;
        float* narrow_sums = buffer.room(2 * values);
        float* wide_sums = narrow_sums + values;
        const Runs runs = runs_of(a.segments + first, rows, (taps / 2 + kOutputs) * wide_dilation);
        (*narrow_back)(a.d_narrow + offset, runs, narrow_sums);
        (*wide_back)(a.d_wide + offset, runs, wide_sums);
        std::memset(a.d_x + offset, 0, sizeof(T) * values);
        for (const Run& run : runs)
            for (std::int64_t i = std::int64_t{run.first} * channels, n = i + std::int64_t{run.rows} * channels; i < n;
                 i += kLanes)
                store(a.d_x + offset + i, load(a.d_sum + offset + i) + load(narrow_sums + i) + load(wide_sums + i));
    }
};

// Adds the gradients of rows [first, last) to `out` (kTokens, 2 * taps + 1, channels) by token: for each tap of the narrow
// and the wide convolution the gradient of what it gave, by the token there, and last that of the row's own state.
template <class T>
void token_sums(const LocalBlockBackward<T>& a, int channels, int taps, int wide_dilation, std::int64_t first,
                std::int64_t last, float* out) {
    const std::int64_t width = (2 * std::int64_t{taps} + 1) * channels;
    std::fill(out, out + kTokens * width, 0.0f);
    const auto add = [&](std::int64_t token, int place, const T* row) {
        float* sum = out + token * width + std::int64_t{place} * channels;
        for (int c = 0; c < channels; c += kLanes) store(sum + c, load(sum + c) + load(row + c));
    };
    for (std::int64_t r = first; r < last; ++r) {
        if (a.segments[r] < 0) continue;
        const std::int64_t at = r * channels;
        for (int t = 0; t < taps; ++t) {
            const int away = t - taps / 2;
            add(a.tokens[r + away], t, a.d_narrow + at);
            add(a.tokens[r + std::int64_t{away} * wide_dilation], taps + t, a.d_wide + at);
        }
        add(a.tokens[r], 2 * taps, a.d_sum + at);
    }
}

template <class T>
std::unique_ptr<PackedWeights> pack_local_block_backward(const LocalBlockWeights<T>& w, int threads) {
    return std::make_unique<PackedLocalBlockBackward<T>>(w, threads);
}

template <class T>
void local_block_backward(const PackedWeights& packed, const LocalBlockBackward<T>& a, const Layout& layout, int threads) {
    const auto& block = static_cast<const PackedLocalBlockBackward<T>&>(packed);
    const int channels = block.channels;
    const std::int64_t rows = layout.rows, units = (rows + kUnit - 1) / kUnit, values = std::int64_t{kSums} * channels;
    parallel_for(units, threads, [&](std::int64_t i) {
        block.around_products(a, i * kUnit, std::min(rows, (i + 1) * kUnit), a.sums + i * values);
    });
    for (std::int64_t i = 1; i < units; ++i)
        for (std::int64_t c = 0; c < values; c += kLanes) store(a.sums + c, load(a.sums + c) + load(a.sums + i * values + c));
    if (a.d_tables) {
        const std::int64_t size = kTokens * (2 * std::int64_t{block.taps} + 1) * channels;
        parallel_for(kParts, threads, [&](std::int64_t i) {
            token_sums(a, channels, block.taps, block.wide_dilation, rows * i / kParts, rows * (i + 1) / kParts,
                       a.d_tables + i * size);
        });
        for (std::int64_t i = 1; i < kParts; ++i)
            for (std::int64_t c = 0; c < size; c += kLanes)
                store(a.d_tables + c, load(a.d_tables + c) + load(a.d_tables + i * size + c));
    }
    if (!a.d_x) return;
    const std::int64_t first = layout.gap, last = rows - layout.gap;
    std::memset(a.d_x, 0, sizeof(T) * std::min(first, rows) * channels);
    if (first >= last) return;
    std::memset(a.d_x + last * channels, 0, sizeof(T) * (rows - last) * channels);
    const auto cuts = cut(layout, rows_per_unit(last - first, threads), kOutputs * block.wide_dilation);
    parallel_for(static_cast<std::int64_t>(cuts.size()) - 1, threads, [&](std::int64_t i) { block.of_x(a, cuts[i], cuts[i + 1]); });
}
