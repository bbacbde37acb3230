// Global attention, forward.

// Global attention's keys and values, packed for this instruction set. It keeps no pointer to the weights.
template <class T>
struct PackedAttention : PackedWeights {
    using E = Factor<T>;
    const int channels, heads, d_key, d_value;
    const int width;         // of a head: its keys, then its values
    const float scale_log2;  // of logits, for powers of two
    Buffer<E> weights;

    PackedAttention(const AttentionWeights<T>& w, int threads)
        : channels(w.channels), heads(w.heads), d_key(w.d_key), d_value(w.d_value), width(w.d_key + w.d_value),
          scale_log2(1.4426950408889634f / std::sqrt(static_cast<float>(w.d_key))) {
        E* room = weights.room(std::int64_t{heads} * width * channels);
        parallel_for(heads, threads, [&](std::int64_t head) {
            for (int c = 0; c < width; ++c) {
                const T* from = c < d_key ? w.key + (head * d_key + c) * channels
                                          : w.value + (head * d_value + c - d_key) * channels;
                pack_column(from, 1, 0, of(static_cast<int>(head)), c, room + head * width * channels);
            }
        });
    }

    Product<E> of(int head) const {
        return {weights.data() + std::int64_t{head} * width * channels, nullptr, channels, width, 1, 1, width};
    }

    // One head of one tile: sums of e and of e * gelu(v) over its rows, in order, to the tile's slot.
    void operator()(const Attention<T>& a, const Tile& tile, int head) const {
        static thread_local Buffer<float> sums;
        static thread_local Buffer<E> widened_rows;
        const std::int64_t values = std::int64_t{tile.rows} * channels;
        float* keys = sums.room(std::int64_t{tile.rows} * width);
        E* room = kWidens<T> ? widened_rows.room(values) : nullptr;
        product(of(head), factors(a.local + tile.row * channels, values, room), Runs{{0, tile.rows, tile.rows}}, keys);

        const float* query = a.query + (std::int64_t{tile.protein} * heads + head) * d_key;
        float* slot = a.partials + (tile.slot * heads + head) * (1 + d_value);
        std::fill(slot, slot + 1 + d_value, 0.0f);
        float e[16];
        for (int done = 0; done < tile.rows; done += 16, keys += 16 * width) {
            const int rows = std::min(16, tile.rows - done);
            for (int r = 0; r < 16; ++r) {
                Floats products{};
                if (r < rows)
                    for (int c = 0; c < d_key; c += kLanes) products += load(query + c) * tanh_(load(keys + r * width + c));
                e[r] = sum(products);
            }
            // |logit| <= sqrt(d_key): no running maximum is needed, and partial sums simply add.
            for (int r = 0; r < 16; r += kLanes) store(e + r, exp2_(load(e + r) * scale_log2));
            for (int r = 0; r < rows; ++r) slot[0] += e[r];
            if (a.weights)
                for (int r = 0; r < rows; ++r) a.weights[(tile.row + done + r) * heads + head] = e[r];
            for (int c = 0; c < d_value; c += kLanes) {
                Floats total = load(slot + 1 + c);
                for (int r = 0; r < rows; ++r) total += e[r] * gelu(load(keys + r * width + d_key + c));
                store(slot + 1 + c, total);
            }
        }
    }
};

template <class T>
std::unique_ptr<PackedWeights> pack_attention(const AttentionWeights<T>& w, int threads) {
    return std::make_unique<PackedAttention<T>>(w, threads);
}

template <class T>
void attention(const PackedWeights& packed, const Attention<T>& a, const std::vector<Tile>& tiles, int threads) {
    const auto& attend = static_cast<const PackedAttention<T>&>(packed);
    parallel_for(static_cast<std::int64_t>(tiles.size()) * attend.heads, threads, [&](std::int64_t i) {
        attend(a, tiles[static_cast<std::size_t>(i / attend.heads)], static_cast<int>(i % attend.heads));
    });
}
