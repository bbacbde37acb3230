// Global attention's gradients.

// Keys and values as above, and back from their gradients. It keeps no pointer to the weights.
template <class T>
struct PackedAttentionBackward : PackedWeights {
    using E = Factor<T>;
    const PackedAttention<T> forward;
    const int keys, both;  // columns of d_keys_values: of the keys, in all
    Buffer<E> weights;
    Product<E> keys_values_back;

    PackedAttentionBackward(const AttentionWeights<T>& w, int threads)
        : forward(w, threads), keys(w.heads * w.d_key), both(keys + w.heads * w.d_value) {
        E* room = weights.room(std::int64_t{both} * w.channels);
        keys_values_back = {room, nullptr, both, w.channels, 1, 1, w.channels};
        parallel_for(w.channels / 16, threads, [&](std::int64_t sixteen) {
            std::vector<T> column(both);
            for (int c = static_cast<int>(sixteen) * 16; c < (sixteen + 1) * 16; ++c) {
                for (int i = 0; i < both; ++i)
                    column[i] = i < keys ? w.key[std::int64_t{i} * w.channels + c]
                                         : w.value[std::int64_t{i - keys} * w.channels + c];
                pack_column(column.data(), 1, 0, keys_values_back, c, room);
            }
        });
    }

    // What the gradients of the weights sum up, in `block_room`; nothing where that is null.
    Block<E> operator()(const AttentionBackward<T>& a, const Tile& tile, E* block_room) const {
        static thread_local Buffer<float> buffer;
        static thread_local Buffer<E> widened_rows;
        static thread_local Buffer<T> gradients;
        const PackedAttention<T>& f = forward;
        const int width = forward.width;
        const std::int64_t values = std::int64_t{tile.rows} * f.channels;
        float* sums = buffer.room(std::int64_t{tile.rows} * std::max(width, f.channels));
        E* room = kWidens<T> ? widened_rows.room(std::int64_t{tile.rows} * std::max(both, f.channels)) : nullptr;
        const T* local = a.local + tile.row * f.channels;
        const E* rows = factors(local, values, room);
        T* d_rows = gradients.room(std::int64_t{tile.rows} * both);
        const Runs runs{{0, tile.rows, tile.rows}};
        for (int head = 0; head < f.heads; ++head) {
            product(forward.of(head), rows, runs, sums);
            of_head(a, tile, head, sums, d_rows + head * f.d_key, d_rows + keys + head * f.d_value);
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
    void of_head(const AttentionBackward<T>& a, const Tile& tile, int head, float* products, T* d_keys, T* d_values) const {
        const PackedAttention<T>& f = forward;
        const std::int64_t at = std::int64_t{tile.protein} * f.heads + head;
        const float* query = a.query + at * f.d_key;
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
std::unique_ptr<PackedWeights> pack_attention_backward(const AttentionWeights<T>& w, int threads) {
    return std::make_unique<PackedAttentionBackward<T>>(w, threads);
}

template <class T>
void attention_backward(const PackedWeights& packed, const AttentionBackward<T>& a, const std::vector<Tile>& tiles,
                        int threads) {
    static_assert(kTile <= kBlock);
    static thread_local Buffer<Factor<T>> buffer;
    const auto& attend = static_cast<const PackedAttentionBackward<T>&>(packed);
    const WeightGradient<T> of_weights{nullptr, nullptr, a.d_weights, attend.forward.channels, attend.both, 1, 1};
    const auto n_tiles = static_cast<std::int64_t>(tiles.size());
    const std::int64_t at_once = std::min<std::int64_t>(n_tiles, std::max(8, threads));
    const std::int64_t size = block_size<T, Factor<T>>(of_weights, attend.both);
    Factor<T>* room = a.d_weights ? buffer.room(at_once * size) : nullptr;
    for (std::int64_t done = 0; done < n_tiles; done += at_once) {
        std::vector<Block<Factor<T>>> blocks(std::min(at_once, n_tiles - done));
        parallel_for(blocks.size(), threads,
                     [&](std::int64_t i) { blocks[i] = attend(a, tiles[done + i], room ? room + i * size : nullptr); });
        if (!room) continue;
        parallel_for((attend.both + kColumns - 1) / kColumns, threads, [&](std::int64_t panel) {
            for (const auto& block : blocks)
                add_row_sums(of_weights, block, 0, static_cast<int>(panel) * kColumns, 0, tiles_of_inputs(of_weights));
        });
    }
}
