// What the kernels compute, as plain loops in double: the definition is that of proteinbert_fast/ops/reference.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/types.h"

namespace plain {

using Values = std::vector<double>;

inline double phi(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
inline double gelu(double x) { return x * phi(x); }
inline double gelu_slope(double x) { return phi(x) + x * std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::acos(-1.0)); }

// Proteins of a batch, `gap` rows apart.
struct Batch {
    std::vector<std::int64_t> starts, lengths, slots{0};  // slots: tiles of attention before each protein, and of all
    std::vector<std::int32_t> segments;
    std::int64_t gap, rows;

    Batch(const std::vector<std::int64_t>& lengths_of, std::int64_t gap_of) : lengths(lengths_of), gap(gap_of), rows(gap_of) {
        segments.assign(static_cast<std::size_t>(gap), -1);
        for (const std::int64_t n : lengths) {
            starts.push_back(rows);
            slots.push_back(slots.back() + (n + pbf::kTile - 1) / pbf::kTile);
            segments.insert(segments.end(), static_cast<std::size_t>(n), static_cast<std::int32_t>(starts.size()) - 1);
            segments.insert(segments.end(), static_cast<std::size_t>(gap), -1);
            rows += n + gap;
        }
    }

    pbf::Layout layout() const { return {starts.data(), lengths.data(), proteins(), gap, rows}; }
    std::int64_t proteins() const { return static_cast<std::int64_t>(lengths.size()); }

    std::vector<pbf::Tile> tiles() const {
        std::vector<pbf::Tile> found;
        for (std::int64_t p = 0; p < proteins(); ++p)
            for (std::int64_t row = 0; row < lengths[p]; row += pbf::kTile)
                found.push_back({starts[p] + row, slots[p] + row / pbf::kTile, static_cast<std::int32_t>(p),
                                 static_cast<int>(std::min(pbf::kTile, lengths[p] - row))});
        return found;
    }
};

// A local block's weights; see LocalBlockWeights.
struct Block {
    Values narrow, narrow_bias, wide, wide_bias, norm1, norm1_bias, dense, dense_bias, norm2, norm2_bias;
    int channels, taps, wide_dilation;
};

struct Normalized {
    Values rows, scales;
};

inline Normalized normalized(const Values& x, std::int64_t rows, int channels) {
    Normalized found{x, Values(rows)};
    for (std::int64_t r = 0; r < rows; ++r) {
        double* row = found.rows.data() + r * channels;
        double mean = 0, square = 0;
        for (int c = 0; c < channels; ++c) mean += row[c] / channels;
        for (int c = 0; c < channels; ++c) square += (row[c] - mean) * (row[c] - mean) / channels;
        found.scales[r] = 1 / std::sqrt(square + double{pbf::kLayerNormEpsilon});
        for (int c = 0; c < channels; ++c) row[c] = (row[c] - mean) * found.scales[r];
    }
    return found;
}

inline Values scaled(const Normalized& x, const Values& gamma, const Values& beta) {
    Values out(x.rows.size());
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = x.rows[i] * gamma[i % gamma.size()] + beta[i % beta.size()];
    return out;
}

// The gradient of what was normalized, from that of what `scaled` gave.
inline Values back(const Normalized& x, const Values& gamma, const Values& gradient) {
    const std::size_t channels = gamma.size();
    Values out(gradient.size());
    for (std::size_t r = 0; r < x.scales.size(); ++r) {
        double mean = 0, along = 0;
        for (std::size_t c = 0; c < channels; ++c) {
            const double g = gradient[r * channels + c] * gamma[c];
            mean += g / channels;
            along += g * x.rows[r * channels + c] / channels;
        }
        for (std::size_t c = 0; c < channels; ++c) {
            const std::size_t i = r * channels + c;
            out[i] = x.scales[r] * (gradient[i] * gamma[c] - mean - x.rows[i] * along);
        }
    }
    return out;
}

// Rows of proteins times a convolution's weights (out, in, taps); `is_back`: of gradients, to those of what it took.
inline Values convolved(const Batch& batch, const Values& x, const Values& w, const Values& bias, int channels, int taps,
                        int dilation, bool is_back = false) {
    Values out(x.size(), 0.0);
    for (std::int64_t r = 0; r < batch.rows; ++r) {
        if (batch.segments[r] < 0) continue;
        for (int t = 0; t < taps; ++t) {
            const std::int64_t from = r + (is_back ? -1 : 1) * std::int64_t{t - taps / 2} * dilation;
            for (int o = 0; o < channels; ++o) {
                double sum = t == 0 && !bias.empty() ? bias[o] : 0;
                for (int i = 0; i < channels; ++i)
                    sum += x[from * channels + i] * w[std::int64_t{is_back ? i * channels + o : o * channels + i} * taps + t];
                out[r * channels + o] += sum;
            }
        }
    }
    return out;
}

inline void clear_gaps(const Batch& batch, Values& x, int channels) {
    for (std::int64_t r = 0; r < batch.rows; ++r)
        if (batch.segments[r] < 0) std::fill_n(x.begin() + r * channels, channels, 0.0);
}

// A local block, forward and, from the gradients of its results, backward.
struct LocalBlock {
    Values narrow, wide, hidden, local;
    Values d_sum, d_narrow, d_wide, d_dense, d_x;
    Values sums;  // (kSums, channels)

    LocalBlock(const Batch& batch, const Block& w, const Values& x, const Values& broadcast)
        : narrow(convolved(batch, x, w.narrow, w.narrow_bias, w.channels, w.taps, 1)),
          wide(convolved(batch, x, w.wide, w.wide_bias, w.channels, w.taps, w.wide_dilation)) {
        merge(batch, w, x, broadcast);
    }

    void merge(const Batch& batch, const Block& w, const Values& x, const Values& broadcast) {
        const int channels = w.channels;
        Values sum(x.size());
        for (std::size_t i = 0; i < x.size(); ++i) {
            const std::int32_t p = batch.segments[i / channels];
            const double word = p < 0 ? 0 : broadcast[std::int64_t{p} * channels + i % channels];
            sum[i] = x[i] + word + gelu(narrow[i]) + gelu(wide[i]);
        }
        first = normalized(sum, batch.rows, channels);
        hidden = scaled(first, w.norm1, w.norm1_bias);
        clear_gaps(batch, hidden, channels);
        dense = convolved(batch, hidden, w.dense, w.dense_bias, channels, 1, 1);
        sum = hidden;
        for (std::size_t i = 0; i < x.size(); ++i) sum[i] += gelu(dense[i]);
        second = normalized(sum, batch.rows, channels);
        local = scaled(second, w.norm2, w.norm2_bias);
        clear_gaps(batch, local, channels);
    }

    // Gradients are zeros in gaps.
    void backward(const Batch& batch, const Block& w, const Values& d_local, const Values& d_hidden) {
        const int channels = w.channels;
        const Values back_of_norm = back(second, w.norm2, d_local);
        d_dense = back_of_norm;
        for (std::size_t i = 0; i < d_dense.size(); ++i) d_dense[i] *= gelu_slope(dense[i]);
        Values d = convolved(batch, d_dense, w.dense, {}, channels, 1, 1, true);
        for (std::size_t i = 0; i < d.size(); ++i) d[i] += back_of_norm[i] + d_hidden[i];
        d_sum = back(first, w.norm1, d);
        d_narrow = d_wide = d_sum;
        for (std::size_t i = 0; i < d.size(); ++i) {
            d_narrow[i] *= gelu_slope(narrow[i]);
            d_wide[i] *= gelu_slope(wide[i]);
        }
        d_x = d_sum;
        const Values by_narrow = convolved(batch, d_narrow, w.narrow, {}, channels, w.taps, 1, true);
        const Values by_wide = convolved(batch, d_wide, w.wide, {}, channels, w.taps, w.wide_dilation, true);
        sums.assign(std::size_t{pbf::kSums} * channels, 0.0);
        for (std::size_t i = 0; i < d.size(); ++i) {
            d_x[i] += by_narrow[i] + by_wide[i];
            const auto add = [&](pbf::Sums which, double value) { sums[which * channels + i % channels] += value; };
            add(pbf::kNarrowBias, d_narrow[i]);
            add(pbf::kWideBias, d_wide[i]);
            add(pbf::kNorm1Weight, d[i] * first.rows[i]);
            add(pbf::kNorm1Bias, d[i]);
            add(pbf::kDenseBias, d_dense[i]);
            add(pbf::kNorm2Weight, d_local[i] * second.rows[i]);
            add(pbf::kNorm2Bias, d_local[i]);
        }
    }

private:
    Normalized first, second;
    Values dense;
};

// Global attention, forward and backward; weights are (heads * d_key or d_value, channels).
struct Attention {
    Values numerators;  // (rows, heads): of the softmax
    Values pooled;      // (proteins, heads, d_value)
    Values d_local, d_query;
    Values d_weights;  // (channels, heads * d_key + heads * d_value)

    Attention(const Batch& batch, const pbf::AttentionWeights<double>& w, const Values& local, const Values& query,
              const Values& d_pooled)
        : numerators(batch.rows * w.heads, 0.0), pooled(batch.proteins() * w.heads * w.d_value, 0.0),
          d_local(local.size(), 0.0), d_query(query.size(), 0.0),
          d_weights(std::int64_t{w.channels} * w.heads * (w.d_key + w.d_value), 0.0) {
        for (std::int64_t p = 0; p < batch.proteins(); ++p)
            for (int head = 0; head < w.heads; ++head) of_head(batch, w, local, query, d_pooled, p, head);
    }

private:
    void of_head(const Batch& batch, const pbf::AttentionWeights<double>& w, const Values& local, const Values& query,
                 const Values& d_pooled, std::int64_t p, int head) {
        const double scale = 1 / std::sqrt(static_cast<double>(w.d_key));
        const std::int64_t n = batch.lengths[p], first = batch.starts[p], at = p * w.heads + head;
        const double* q = query.data() + at * w.d_key;
        const double* d_result = d_pooled.data() + at * w.d_value;
        double* result = pooled.data() + at * w.d_value;
        Values keys(n * w.d_key), values(n * w.d_value), e(n);
        double total = 0;
        for (std::int64_t r = 0; r < n; ++r) {
            double logit = 0;
            for (int k = 0; k < w.d_key; ++k) {
                keys[r * w.d_key + k] = std::tanh(dot(w.key + (head * w.d_key + k) * w.channels, local, first + r, w.channels));
                logit += q[k] * keys[r * w.d_key + k];
            }
            for (int v = 0; v < w.d_value; ++v)
                values[r * w.d_value + v] = dot(w.value + (head * w.d_value + v) * w.channels, local, first + r, w.channels);
            e[r] = numerators[(first + r) * w.heads + head] = std::exp(logit * scale);
            total += e[r];
        }
        double mean = 0;
        for (int v = 0; v < w.d_value; ++v) {
            for (std::int64_t r = 0; r < n; ++r) result[v] += e[r] / total * gelu(values[r * w.d_value + v]);
            mean += d_result[v] * result[v];
        }
        for (std::int64_t r = 0; r < n; ++r) {
            double along = -mean;
            for (int v = 0; v < w.d_value; ++v) along += d_result[v] * gelu(values[r * w.d_value + v]);
            const double share = e[r] / total, d_logit = share * along * scale;
            for (int k = 0; k < w.d_key; ++k) {
                const double key = keys[r * w.d_key + k];
                d_query[at * w.d_key + k] += d_logit * key;
                add(w, w.key, local, first + r, head * w.d_key + k, 0, d_logit * q[k] * (1 - key * key));
            }
            for (int v = 0; v < w.d_value; ++v)
                add(w, w.value, local, first + r, head * w.d_value + v, w.heads * w.d_key,
                    share * d_result[v] * gelu_slope(values[r * w.d_value + v]));
        }
    }

    static double dot(const double* w, const Values& local, std::int64_t row, int channels) {
        double sum = 0;
        for (int c = 0; c < channels; ++c) sum += w[c] * local[row * channels + c];
        return sum;
    }

    // The gradient of one key or value of one row, to the row's and the weights'.
    void add(const pbf::AttentionWeights<double>& w, const double* weights, const Values& local, std::int64_t row, int column,
             int before, double gradient) {
        const std::int64_t columns = std::int64_t{w.heads} * (w.d_key + w.d_value);
        for (int c = 0; c < w.channels; ++c) {
            d_local[row * w.channels + c] += gradient * weights[std::int64_t{column} * w.channels + c];
            d_weights[c * columns + before + column] += gradient * local[row * w.channels + c];
        }
    }
};

}  // namespace plain
