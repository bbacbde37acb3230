// The global track of a block, and the query and broadcast that the next block starts from: dense layers of a row per protein.
// What the first block's global states are, too.

// GELU of `n` values one by one.
template <class T>
void gelu_of(const T* x, T* out, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, gelu(load(x + i)));
    T last[kLanes] = {};
    std::copy(x + i, x + n, last);
    store(last, gelu(load(last)));
    std::copy_n(last, n - i, out + i);
}

// A multiple of 16 values in another type, or the same.
template <class From, class To>
void converted(const From* from, std::int64_t values, To* to) {
    for (std::int64_t i = 0; i < values; i += kLanes) store(to + i, load(from + i));
}

// Rows [0, rows) of a product, shared out among threads by rows and, where those are few, by columns.
template <class E>
void shared_product(const Product<E>& p, const E* x, int rows, float* out, int threads) {
    const int chunks = (rows + 4 * PBF_ROWS - 1) / (4 * PBF_ROWS), panels = (p.columns + kColumns - 1) / kColumns;
    const int shares = std::clamp((threads + chunks - 1) / std::max(chunks, 1), 1, panels);
    parallel_for(std::int64_t{chunks} * shares, threads, [&](std::int64_t i) {
        const int chunk = static_cast<int>(i) / shares, share = static_cast<int>(i) % shares;
        const int first = chunk * rows / chunks, n = (chunk + 1) * rows / chunks - first;
        const int column = share * panels / shares * kColumns;
        const int end = std::min((share + 1) * panels / shares * kColumns, p.columns);
        Product<E> part = p;
        part.weights += std::int64_t{column} * p.inputs;
        part.bias = p.bias ? p.bias + column : nullptr;
        part.columns = end - column;
        product(part, x + std::int64_t{first} * p.inputs, Runs{{0, n, n}}, out + std::int64_t{first} * p.out_stride + column);
    });
}

// It keeps no pointer to the weights.
template <class T>
struct PackedGlobalBlock : PackedWeights {
    const int width;
    Buffer<float> vectors;
    const float *dense1_bias, *norm1, *norm1_bias, *dense2_bias, *norm2, *norm2_bias;
    std::unique_ptr<const Dense<T>> dense1, dense2;

    PackedGlobalBlock(const GlobalBlockWeights<T>& w, int threads) : width(w.width) {
        float* room = vectors.room(6 * std::int64_t{width});
        const auto kept = [&](const float* values) {
            std::copy(values, values + width, room);
            room += width;
            return room - width;
        };
        dense1_bias = kept(w.dense1_bias), norm1 = kept(w.norm1), norm1_bias = kept(w.norm1_bias);
        dense2_bias = kept(w.dense2_bias), norm2 = kept(w.norm2), norm2_bias = kept(w.norm2_bias);
        dense1 = std::make_unique<Dense<T>>(w.dense1, width, 1, dense1_bias, width, width, threads);
        dense2 = std::make_unique<Dense<T>>(w.dense2, width, 1, dense2_bias, width, width, threads);
    }
};

template <class T>
std::unique_ptr<PackedWeights> pack_global_block(const GlobalBlockWeights<T>& w, int threads) {
    return std::make_unique<PackedGlobalBlock<T>>(w, threads);
}

// out = LN(x + gelu(sums) + pooled), `pooled` or nothing, of a row; over `sums`.
template <class T>
void merge_global(const T* x, float* sums, const T* pooled, const float* gamma, const float* beta, int width, T* out) {
    for (int c = 0; c < width; c += kLanes) {
        Floats total = load(x + c) + gelu(load(sums + c));
        if (pooled) total += load(pooled + c);
        store(sums + c, total);
    }
    layer_norm(sums, gamma, beta, out, width);
}

template <class T>
void global_block(const PackedWeights& packed, const GlobalBlock<T>& a, int proteins, int threads) {
    const auto& block = static_cast<const PackedGlobalBlock<T>&>(packed);
    static thread_local Buffer<float> buffer;
    static thread_local Buffer<Factor<T>> widened_rows;
    const int width = block.width;
    const std::int64_t values = std::int64_t{proteins} * width;
    float* sums = buffer.room(values);
    Factor<T>* room = kWidens<T> ? widened_rows.room(values) : nullptr;
    shared_product(block.dense1->product(), factors(a.state, values, room), proteins, sums, threads);
    for (int p = 0; p < proteins; ++p)
        merge_global(a.state + std::int64_t{p} * width, sums + std::int64_t{p} * width, a.pooled + std::int64_t{p} * width,
                     block.norm1, block.norm1_bias, width, a.hidden + std::int64_t{p} * width);
    shared_product(block.dense2->product(), factors<T>(a.hidden, values, room), proteins, sums, threads);
    for (int p = 0; p < proteins; ++p)
        merge_global<T>(a.hidden + std::int64_t{p} * width, sums + std::int64_t{p} * width, nullptr, block.norm2,
                        block.norm2_bias, width, a.out + std::int64_t{p} * width);
}

// It keeps no pointer to the weights.
template <class T>
struct PackedConditioning : PackedWeights {
    const int width, keys, channels;
    Buffer<float> bias;
    std::unique_ptr<const Dense<T>> query, broadcast;

    PackedConditioning(const ConditioningWeights<T>& w, int threads) : width(w.width), keys(w.keys), channels(w.channels) {
        std::copy_n(w.broadcast_bias, channels, bias.room(channels));
        query = std::make_unique<Dense<T>>(w.query, width, 1, nullptr, width, keys, threads);
        broadcast = std::make_unique<Dense<T>>(w.broadcast, width, 1, bias.data(), width, channels, threads);
    }
};

template <class T>
std::unique_ptr<PackedWeights> pack_conditioning(const ConditioningWeights<T>& w, int threads) {
    return std::make_unique<PackedConditioning<T>>(w, threads);
}

// query = tanh(state @ Wq), broadcast = gelu(state @ W + b).
template <class T>
void conditioning(const PackedWeights& packed, const T* state, T* query, T* broadcast, int proteins, int threads) {
    const auto& of = static_cast<const PackedConditioning<T>&>(packed);
    static thread_local Buffer<float> buffer;
    static thread_local Buffer<Factor<T>> widened_rows;
    const std::int64_t values = std::int64_t{proteins} * of.width;
    const Factor<T>* rows = factors(state, values, kWidens<T> ? widened_rows.room(values) : nullptr);
    float* sums = buffer.room(std::int64_t{proteins} * std::max(of.keys, of.channels));
    shared_product(of.query->product(), rows, proteins, sums, threads);
    for (std::int64_t i = 0, n = std::int64_t{proteins} * of.keys; i < n; i += kLanes) store(query + i, tanh_(load(sums + i)));
    shared_product(of.broadcast->product(), rows, proteins, sums, threads);
    for (std::int64_t i = 0, n = std::int64_t{proteins} * of.channels; i < n; i += kLanes)
        store(broadcast + i, gelu(load(sums + i)));
}
