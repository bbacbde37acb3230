// Sums of (rows, channels) over each protein, in order.
template <class T>
void protein_sums(const T* rows, const std::int64_t* starts, const std::int64_t* lengths, std::int64_t proteins,
                  float* out, int channels, int threads) {
    parallel_for(proteins, threads, [&](std::int64_t p) {
        float* total = out + p * channels;
        std::fill(total, total + channels, 0.0f);
        const T* row = rows + starts[p] * channels;
        for (std::int64_t r = 0; r < lengths[p]; ++r, row += channels)
            for (int c = 0; c < channels; c += kLanes) store(total + c, load(total + c) + load(row + c));
    });
}
