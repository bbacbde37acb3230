// Layer norms of rows, and their gradients.

// The lanes' sum, always in the same order.
inline float sum(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

struct Moments {
    float mean, scale;  // scale is 1 / standard deviation
};

// Of `channels` values in `row`.
inline Moments moments(const float* row, int channels) {
    Floats total{};
    for (int c = 0; c < channels; c += kLanes) total += load(row + c);
    const float mean = sum(total) / static_cast<float>(channels);
    Floats squares{};
    for (int c = 0; c < channels; c += kLanes) {
        const Floats d = load(row + c) - mean;
        squares += d * d;
    }
    return {mean, 1.0f / std::sqrt(sum(squares) / static_cast<float>(channels) + kLayerNormEpsilon)};
}

// out = LayerNorm(row) * gamma + beta over `channels` float32 values already in `row`.
template <class T>
inline void layer_norm(const float* row, const float* gamma, const float* beta, T* out, int channels) {
    const Moments m = moments(row, channels);
    for (int c = 0; c < channels; c += kLanes)
        store(out + c, (load(row + c) - m.mean) * m.scale * load(gamma + c) + load(beta + c));
}

// The gradient of what a norm normalised, in place of `gradient`, that of its result; those of gamma and beta are
// added to.
inline void layer_norm_backward(const float* normalised, float scale, const float* gamma, float* gradient,
                                float* d_gamma, float* d_beta, int channels) {
    Floats total{}, along{};
    for (int c = 0; c < channels; c += kLanes) {
        const Floats d = load(gradient + c), n = load(normalised + c), g = d * load(gamma + c);
        store(d_gamma + c, load(d_gamma + c) + d * n);
        store(d_beta + c, load(d_beta + c) + d);
        total += g;
        along += g * n;
    }
    const float mean = sum(total) / static_cast<float>(channels);
    const float slope = sum(along) / static_cast<float>(channels);
    for (int c = 0; c < channels; c += kLanes)
        store(gradient + c, scale * (load(gradient + c) * load(gamma + c) - mean - load(normalised + c) * slope));
}
