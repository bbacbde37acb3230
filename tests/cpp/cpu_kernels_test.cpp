// The CPU kernels of every instruction set that this processor has, without Python: against plain loops in double, and the
// same bits alone and in a batch, on one thread and on several.
//
//     cpu_kernels_test            every set
//     cpu_kernels_test avx2       that one, or an error where it is unavailable

#include <cstdio>
#include <limits>
#include <random>
#include <tuple>

#include "cpu/instruction_sets.h"
#include "plain.h"

namespace {

using namespace pbf;
using plain::Batch;
using plain::Values;

constexpr int kTaps = 9, kDilation = 5;
constexpr std::int64_t kGap = kTaps / 2 * kDilation;

int passed = 0, failed = 0;

void check(bool is_good, const std::string& what, double error = 0) {
    ++(is_good ? passed : failed);
    if (!is_good) std::printf("FAIL %s (error %.3g)\n", what.c_str(), error);
}

template <class T>
constexpr bool kIsBf16 = std::is_same_v<T, bf16>;

float number(float x) { return x; }
float number(bf16 x) { return baseline::widened(x); }

template <class T>
T rounded(double x) {
    const auto value = static_cast<float>(x);
    if constexpr (kIsBf16<T>) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return static_cast<bf16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    } else {
        return value;
    }
}

template <class T>
Values values_of(const std::vector<T>& x) {
    Values out;
    for (const T value : x) out.push_back(number(value));
    return out;
}

// Of variance `scale`^2, a type's own numbers, so that kernels and plain loops take the same.
template <class T>
std::vector<T> random(std::mt19937& generator, std::int64_t n, double scale = 1) {
    std::vector<T> out;
    for (std::int64_t i = 0; i < n; ++i)
        out.push_back(rounded<T>(scale * std::sqrt(12.0) * (static_cast<double>(generator()) / 4294967296.0 - 0.5)));
    return out;
}

// What no kernel may leave where it must write.
template <class T>
std::vector<T> poisoned(std::int64_t n) {
    return std::vector<T>(static_cast<std::size_t>(n), rounded<T>(std::numeric_limits<double>::quiet_NaN()));
}

template <class T>
void clear_gaps(const Batch& batch, std::vector<T>& rows, int channels) {
    for (std::int64_t r = 0; r < batch.rows; ++r)
        if (batch.segments[r] < 0) std::fill_n(rows.begin() + r * channels, channels, T{});
}

// A protein's own rows of `rows`, which is (batch.rows, channels).
template <class T>
std::vector<T> of_protein(const Batch& batch, const std::vector<T>& rows, int channels, std::int64_t protein) {
    const auto first = rows.begin() + batch.starts[protein] * channels;
    return {first, first + batch.lengths[protein] * channels};
}

// The largest error, by the size of the exact values: each one's own beyond 1. NaN where one is NaN.
template <class T>
double error_of(const std::vector<T>& found, const Values& exact, double size = 1) {
    double most = found.size() == exact.size() ? 0 : 1e9;
    for (std::size_t i = 0; i < std::min(found.size(), exact.size()); ++i) {
        const double error = std::abs(number(found[i]) - exact[i]) / (size + std::abs(exact[i]));
        if (!(error <= most)) most = error;
    }
    return most;
}

double largest(const Values& x) {
    double most = 0;
    for (const double value : x) most = std::max(most, std::abs(value));
    return most;
}

template <class T>
double relative_norm(const std::vector<T>& found, const Values& exact) {
    double error = found.size() == exact.size() ? 0 : 1e9, size = 0;
    for (std::size_t i = 0; i < std::min(found.size(), exact.size()); ++i) {
        error += (number(found[i]) - exact[i]) * (number(found[i]) - exact[i]);
        size += exact[i] * exact[i];
    }
    return std::sqrt(error / size);
}

// float32: rounding in sums of 1,152 terms near 1, then a norm. bfloat16: 2^-8 for each of four rounded intermediates that
// meet in a norm's output of size up to 5.
template <class T, class Found>
void check_states(const std::vector<Found>& found, const Values& exact, const std::string& what) {
    const double error = error_of(found, exact);
    check(error < (kIsBf16<T> ? 0.06 : 2e-5), what, error);
}

// float32: by the largest. bfloat16: states, gradients and what convolutions gave are rounded by 2^-9 a few times in a row.
template <class T, class Found>
void check_gradients(const std::vector<Found>& found, const Values& exact, const std::string& what) {
    const double error = kIsBf16<T> ? relative_norm(found, exact) : error_of(found, exact, largest(exact));
    check(error < (kIsBf16<T> ? 0.04 : 2e-5), what, error);
}

template <class T>
void check_same_bits(const std::vector<T>& a, const std::vector<T>& b, const std::string& what) {
    check(a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0, what);
}

// Inputs of a local block, from states or from tokens.
template <class T>
struct BlockInputs {
    int channels;
    std::vector<T> narrow, wide, dense, embedding, x, d_local, d_hidden;
    std::vector<float> vectors[7], broadcast;
    std::vector<std::uint8_t> tokens;

    BlockInputs(const Batch& batch, int channels_of) : channels(channels_of) {
        std::mt19937 generator(static_cast<unsigned>(channels));
        const std::int64_t square = std::int64_t{channels} * channels, rows = batch.rows * channels;
        narrow = random<T>(generator, square * kTaps, 1 / std::sqrt(kTaps * channels));
        wide = random<T>(generator, square * kTaps, 1 / std::sqrt(kTaps * channels));
        dense = random<T>(generator, square, 1 / std::sqrt(channels));
        for (int i = 0; i < 7; ++i) vectors[i] = random<float>(generator, channels, i == 2 || i == 5 ? 1 : 0.3);
        embedding = random<T>(generator, std::int64_t{kTokens} * channels);
        std::fill_n(embedding.end() - channels, channels, T{});
        broadcast = random<float>(generator, batch.proteins() * channels);
        for (const std::int32_t segment : batch.segments)
            tokens.push_back(static_cast<std::uint8_t>(segment < 0 ? kTokens - 1 : generator() % (kTokens - 1)));
        for (auto* rows_of : {&x, &d_local, &d_hidden}) {
            *rows_of = random<T>(generator, rows);
            clear_gaps(batch, *rows_of, channels);
        }
    }

    // In the order of vectors: biases of both convolutions, the first norm, the dense layer, the second norm.
    LocalBlockWeights<T> weights(bool takes_tokens) const {
        const auto& v = vectors;
        return {narrow.data(), v[0].data(), wide.data(), v[1].data(), v[2].data(), v[3].data(), dense.data(), v[4].data(),
                v[5].data(), v[6].data(), takes_tokens ? embedding.data() : nullptr, channels, kTaps, kDilation};
    }

    plain::Block block() const {
        const auto& v = vectors;
        return {values_of(narrow), values_of(v[0]), values_of(wide), values_of(v[1]), values_of(v[2]), values_of(v[3]),
                values_of(dense), values_of(v[4]), values_of(v[5]), values_of(v[6]), channels, kTaps, kDilation};
    }

    Values states(bool takes_tokens) const {
        if (!takes_tokens) return values_of(x);
        Values found;
        for (const std::uint8_t token : tokens)
            for (int c = 0; c < channels; ++c) found.push_back(number(embedding[std::int64_t{token} * channels + c]));
        return found;
    }

    // Those of one protein, as a batch of its own.
    BlockInputs alone(const Batch& batch, std::int64_t protein) const {
        BlockInputs one = *this;
        const std::int64_t first = batch.starts[protein] - kGap, last = batch.starts[protein] + batch.lengths[protein] + kGap;
        for (auto rows_of : {&BlockInputs::x, &BlockInputs::d_local, &BlockInputs::d_hidden})
            one.*rows_of = {(this->*rows_of).begin() + first * channels, (this->*rows_of).begin() + last * channels};
        one.tokens = {tokens.begin() + first, tokens.begin() + last};
        one.broadcast = {broadcast.begin() + protein * channels, broadcast.begin() + (protein + 1) * channels};
        return one;
    }
};

template <class T>
struct Forward {
    std::vector<T> hidden, local, narrow, wide;
};

template <class T>
Forward<T> forward(Isa which, const Batch& batch, const BlockInputs<T>& in, bool takes_tokens, int threads) {
    const std::int64_t n = batch.rows * in.channels;
    Forward<T> out{poisoned<T>(n), poisoned<T>(n), poisoned<T>(n), poisoned<T>(n)};
    const LocalBlock<T> a{takes_tokens ? nullptr : in.x.data(), takes_tokens ? in.tokens.data() : nullptr, in.broadcast.data(),
                          batch.segments.data(), out.hidden.data(), out.local.data(), out.narrow.data(), out.wide.data()};
    std::unique_ptr<PackedWeights> packed;
    PBF_CALL(which, packed =, pack_local_block(in.weights(takes_tokens), threads));
    PBF_CALL(which, , local_block(*packed, a, batch.layout(), threads));
    for (auto* rows : {&out.hidden, &out.local}) {
        std::fill_n(rows->begin(), kGap * in.channels, T{});  // what the host clears
        std::fill_n(rows->end() - kGap * in.channels, kGap * in.channels, T{});
    }
    clear_gaps(batch, out.narrow, in.channels);
    clear_gaps(batch, out.wide, in.channels);
    return out;
}

template <class T>
struct Backward {
    std::vector<T> hidden, d_dense, d_narrow, d_wide, d_sum, d_x;
    std::vector<float> tables, sums;
};

template <class T>
Backward<T> backward(Isa which, const Batch& batch, const BlockInputs<T>& in, const Forward<T>& kept, bool takes_tokens,
                     int threads) {
    const std::int64_t n = batch.rows * in.channels, table = std::int64_t{kTokens} * (2 * kTaps + 1) * in.channels;
    const std::int64_t sums = std::int64_t{kSums} * in.channels;
    Backward<T> out{poisoned<T>(n), poisoned<T>(n), poisoned<T>(n), poisoned<T>(n), poisoned<T>(n),
                    poisoned<T>(takes_tokens ? 0 : n), poisoned<float>(takes_tokens ? kParts * table : 0),
                    poisoned<float>((batch.rows + kUnit - 1) / kUnit * sums)};
    const LocalBlockBackward<T> a{takes_tokens ? nullptr : in.x.data(), takes_tokens ? in.tokens.data() : nullptr,
                                  in.broadcast.data(), batch.segments.data(), kept.narrow.data(), kept.wide.data(),
                                  in.d_local.data(), in.d_hidden.data(), out.hidden.data(), out.d_dense.data(),
                                  out.d_narrow.data(), out.d_wide.data(), out.d_sum.data(),
                                  takes_tokens ? nullptr : out.d_x.data(), takes_tokens ? out.tables.data() : nullptr,
                                  out.sums.data()};
    std::unique_ptr<PackedWeights> packed;
    PBF_CALL(which, packed =, pack_local_block_backward(in.weights(takes_tokens), threads));
    PBF_CALL(which, , local_block_backward(*packed, a, batch.layout(), threads));
    out.sums.resize(sums);
    out.tables.resize(takes_tokens ? table : 0);
    return out;
}

// Gradients by token, of what each tap gave and of the row's own state.
template <class T>
Values tables_of(const Batch& batch, const BlockInputs<T>& in, const plain::LocalBlock& exact) {
    const std::int64_t channels = in.channels, width = 2 * kTaps + 1;
    Values found(kTokens * width * channels, 0.0);
    for (std::int64_t r = 0; r < batch.rows; ++r)
        for (std::int64_t place = 0; place < width && batch.segments[r] >= 0; ++place) {
            const bool is_own = place == 2 * kTaps, is_wide = place >= kTaps;
            const std::int64_t away = is_own ? 0 : (place % kTaps - kTaps / 2) * (is_wide ? kDilation : 1);
            const Values& rows = is_own ? exact.d_sum : is_wide ? exact.d_wide : exact.d_narrow;
            for (std::int64_t c = 0; c < channels; ++c)
                found[(in.tokens[r + away] * width + place) * channels + c] += rows[r * channels + c];
        }
    return found;
}

template <class T>
void test_local_block(Isa which, const Batch& batch, int channels, bool takes_tokens, const std::string& name) {
    const BlockInputs<T> in(batch, channels);
    plain::LocalBlock exact(batch, in.block(), in.states(takes_tokens), values_of(in.broadcast));
    const Forward<T> found = forward(which, batch, in, takes_tokens, 1);
    check_states<T>(found.hidden, exact.hidden, name + " hidden");
    check_states<T>(found.local, exact.local, name + " local");
    check_states<T>(found.narrow, exact.narrow, name + " narrow convolution");
    check_states<T>(found.wide, exact.wide, name + " wide convolution");

    exact.narrow = values_of(found.narrow);
    exact.wide = values_of(found.wide);
    exact.merge(batch, in.block(), in.states(takes_tokens), values_of(in.broadcast));
    exact.backward(batch, in.block(), values_of(in.d_local), values_of(in.d_hidden));
    const Backward<T> back = backward(which, batch, in, found, takes_tokens, 1);
    check_states<T>(back.hidden, exact.hidden, name + " hidden, again");
    check_gradients<T>(back.d_dense, exact.d_dense, name + " d_dense");
    check_gradients<T>(back.d_narrow, exact.d_narrow, name + " d_narrow");
    check_gradients<T>(back.d_wide, exact.d_wide, name + " d_wide");
    check_gradients<T>(back.d_sum, exact.d_sum, name + " d_sum");
    check_gradients<T>(back.sums, exact.sums, name + " gradients of biases and norms");
    if (takes_tokens)
        check_gradients<T>(back.tables, tables_of(batch, in, exact), name + " gradients by token");
    else
        check_gradients<T>(back.d_x, exact.d_x, name + " d_x");

    for (const int threads : {2, 5}) {
        const std::string on = name + " on " + std::to_string(threads) + " threads";
        const Forward<T> again = forward(which, batch, in, takes_tokens, threads);
        check_same_bits(again.hidden, found.hidden, on + ", hidden");
        check_same_bits(again.local, found.local, on + ", local");
        const Backward<T> back_again = backward(which, batch, in, found, takes_tokens, threads);
        check_same_bits(back_again.d_x, back.d_x, on + ", d_x");
        check_same_bits(back_again.tables, back.tables, on + ", gradients by token");
        check_same_bits(back_again.sums, back.sums, on + ", gradients of biases and norms");
    }
    for (std::int64_t p = 0; p < batch.proteins(); ++p) {
        const std::string of = name + " protein " + std::to_string(p) + " alone";
        const Batch one({batch.lengths[p]}, kGap);
        const BlockInputs<T> its = in.alone(batch, p);
        const Forward<T> alone = forward(which, one, its, takes_tokens, 1);
        check_same_bits(of_protein(one, alone.local, channels, 0), of_protein(batch, found.local, channels, p), of + ", local");
        const Backward<T> its_back = backward(which, one, its, alone, takes_tokens, 1);
        const auto rows = takes_tokens ? &Backward<T>::d_sum : &Backward<T>::d_x;
        check_same_bits(of_protein(one, its_back.*rows, channels, 0), of_protein(batch, back.*rows, channels, p), of + ", d_x");
    }
}

template <class T>
struct Attended {
    std::vector<float> weights, pooled;
    std::vector<T> d_local;
    std::vector<float> d_query, d_weights;
};

template <class T>
Attended<T> attend(Isa which, const Batch& batch, const AttentionWeights<T>& w, const std::vector<T>& local,
                   const std::vector<float>& query, const std::vector<float>& d_pooled, int threads) {
    const std::int64_t n_slots = batch.slots.back(), groups = batch.proteins() * w.heads, width = 1 + w.d_value;
    Attended<T> out{std::vector<float>(batch.rows * w.heads), std::vector<float>(groups * w.d_value),
                    std::vector<T>(local.size()), poisoned<float>(groups * w.d_key),
                    std::vector<float>(std::int64_t{w.channels} * w.heads * (w.d_key + w.d_value))};
    std::vector<float> partials = poisoned<float>(n_slots * w.heads * width), totals(groups);
    auto parts = poisoned<float>(n_slots * w.heads * w.d_key);
    const Attention<T> a{local.data(), query.data(), partials.data(), out.weights.data()};
    std::unique_ptr<PackedWeights> packed;
    PBF_CALL(which, packed =, pack_attention(w, threads));
    PBF_CALL(which, , attention(*packed, a, batch.tiles(), threads));
    for (std::int64_t i = 0; i < groups; ++i) {
        float* result = out.pooled.data() + i * w.d_value;
        for (std::int64_t s = batch.slots[i / w.heads]; s < batch.slots[i / w.heads + 1]; ++s) {
            const float* part = partials.data() + (s * w.heads + i % w.heads) * width;
            totals[i] += part[0];
            for (int v = 0; v < w.d_value; ++v) result[v] += part[1 + v];
        }
        for (int v = 0; v < w.d_value; ++v) result[v] /= totals[i];
    }
    const AttentionBackward<T> b{local.data(), query.data(), totals.data(), out.pooled.data(), d_pooled.data(),
                                 out.d_local.data(), parts.data(), out.d_weights.data()};
    PBF_CALL(which, packed =, pack_attention_backward(w, threads));
    PBF_CALL(which, , attention_backward(*packed, b, batch.tiles(), threads));
    std::vector<std::int64_t> n_parts;
    for (std::int64_t p = 0; p < batch.proteins(); ++p) n_parts.push_back(batch.slots[p + 1] - batch.slots[p]);
    PBF_CALL(which, , protein_sums(static_cast<const float*>(parts.data()), batch.slots.data(), n_parts.data(),
                                   batch.proteins(), out.d_query.data(), w.heads * w.d_key, threads));
    return out;
}

template <class T>
void test_attention(Isa which, const Batch& batch, int channels, int d_key, int d_value, const std::string& name) {
    constexpr int heads = 3;
    std::mt19937 generator(static_cast<unsigned>(channels));
    const auto key = random<T>(generator, std::int64_t{heads} * d_key * channels, 1 / std::sqrt(channels));
    const auto value = random<T>(generator, std::int64_t{heads} * d_value * channels, 1 / std::sqrt(channels));
    auto local = random<T>(generator, batch.rows * channels);
    clear_gaps(batch, local, channels);
    const auto query = random<float>(generator, batch.proteins() * heads * d_key, 0.5);
    const auto d_pooled = random<float>(generator, batch.proteins() * heads * d_value);
    const AttentionWeights<T> w{key.data(), value.data(), channels, heads, d_key, d_value};
    const Values key_64 = values_of(key), value_64 = values_of(value);
    const plain::Attention exact(batch, {key_64.data(), value_64.data(), channels, heads, d_key, d_value}, values_of(local),
                                 values_of(query), values_of(d_pooled));
    const Attended<T> found = attend(which, batch, w, local, query, d_pooled, 1);
    check_states<T>(found.weights, exact.numerators, name + " numerators");
    check_states<T>(found.pooled, exact.pooled, name + " pooled");
    check_gradients<T>(found.d_local, exact.d_local, name + " d_local");
    check_gradients<T>(found.d_query, exact.d_query, name + " d_query");
    check_gradients<T>(found.d_weights, exact.d_weights, name + " d_weights");
    for (const int threads : {2, 5}) {
        const std::string on = name + " on " + std::to_string(threads) + " threads";
        const Attended<T> again = attend(which, batch, w, local, query, d_pooled, threads);
        check_same_bits(again.pooled, found.pooled, on + ", pooled");
        check_same_bits(again.d_local, found.d_local, on + ", d_local");
        check_same_bits(again.d_query, found.d_query, on + ", d_query");
        check_same_bits(again.d_weights, found.d_weights, on + ", d_weights");
    }
    for (std::int64_t p = 0; p < batch.proteins(); ++p) {
        const auto of = [&](const std::vector<float>& x, int width) {
            return std::vector<float>(x.begin() + p * heads * width, x.begin() + (p + 1) * heads * width);
        };
        const Batch one({batch.lengths[p]}, kGap);
        std::vector<T> rows(one.rows * channels);
        std::copy_n(local.begin() + batch.starts[p] * channels, batch.lengths[p] * channels, rows.begin() + kGap * channels);
        const Attended<T> alone = attend(which, one, w, rows, of(query, d_key), of(d_pooled, d_value), 1);
        const std::string its = name + " protein " + std::to_string(p) + " alone";
        check_same_bits(alone.pooled, of(found.pooled, d_value), its + ", pooled");
        check_same_bits(alone.d_query, of(found.d_query, d_key), its + ", d_query");
        check_same_bits(of_protein(one, alone.d_local, channels, 0), of_protein(batch, found.d_local, channels, p),
                        its + ", d_local");
    }
}

template <class T>
void test_weight_gradient(Isa which, std::int64_t rows, int taps, int dilation, const std::string& name) {
    constexpr int inputs = 48, columns = 80;
    const std::int64_t gap = std::int64_t{taps / 2} * dilation, all = rows + 2 * gap;
    std::mt19937 generator(static_cast<unsigned>(rows));
    const auto x = random<T>(generator, all * inputs), gradient = random<T>(generator, all * columns);
    Values exact(std::int64_t{taps} * inputs * columns, 0.0);
    for (std::int64_t r = gap; r < rows + gap; ++r)
        for (int t = 0; t < taps; ++t)
            for (int i = 0; i < inputs; ++i) {
                const double value = number(x[(r + (t - taps / 2) * dilation) * inputs + i]);
                for (int c = 0; c < columns; ++c)
                    exact[(t * inputs + i) * columns + c] += value * number(gradient[r * columns + c]);
            }
    std::vector<float> first;
    for (const int threads : {1, 2, 64}) {
        std::vector<float> found(exact.size());
        const WeightGradient<T> a{x.data(), gradient.data(), found.data(), inputs, columns, taps, dilation};
        PBF_CALL(which, , weight_gradient(a, gap, gap + rows, threads));
        const double error = error_of(found, exact, largest(exact));
        check(error < 2e-6, name + " on " + std::to_string(threads) + " threads", error);
        if (first.empty()) first = found;
        check_same_bits(found, first, name + ", bits on " + std::to_string(threads) + " threads");
    }
}

// Rows of a dense layer: x (rows, inputs) times w (columns, inputs).
Values dense_rows(const Values& x, const Values& w, const Values& bias, int inputs) {
    const auto columns = static_cast<int>(static_cast<std::int64_t>(w.size()) / inputs);
    Values out;
    for (std::size_t r = 0; r < x.size() / inputs; ++r)
        for (int c = 0; c < columns; ++c) {
            double sum = bias.empty() ? 0 : bias[c];
            for (int k = 0; k < inputs; ++k) sum += x[r * inputs + k] * w[std::int64_t{c} * inputs + k];
            out.push_back(sum);
        }
    return out;
}

// The global track and what the next block takes of it, for one protein and for many, on one thread and on several.
template <class T>
void test_global_track(Isa which, int width, int keys, int channels, int proteins, const std::string& name) {
    std::mt19937 generator(7);
    const auto matrix = [&](int columns) { return random<T>(generator, std::int64_t{columns} * width, 1 / std::sqrt(width)); };
    const auto vector = [&](int columns, double scale) { return random<float>(generator, columns, scale); };
    const auto dense1 = matrix(width), dense2 = matrix(width), query = matrix(keys), broadcast = matrix(channels);
    const auto bias1 = vector(width, 0.3), norm1 = vector(width, 1), norm1_bias = vector(width, 0.3);
    const auto bias2 = vector(width, 0.3), norm2 = vector(width, 1), norm2_bias = vector(width, 0.3);
    const auto broadcast_bias = vector(channels, 0.3);
    const auto state = random<T>(generator, std::int64_t{proteins} * width), pooled = random<T>(generator, std::int64_t{proteins} * width);
    const GlobalBlockWeights<T> weights{dense1.data(), bias1.data(), norm1.data(), norm1_bias.data(), dense2.data(),
                                        bias2.data(),  norm2.data(), norm2_bias.data(), width};
    const ConditioningWeights<T> taken{query.data(), broadcast.data(), broadcast_bias.data(), width, keys, channels};

    struct Found {
        std::vector<T> hidden, out, query, broadcast;
    };
    const auto run = [&](int first, int n, int threads) {
        std::unique_ptr<PackedWeights> block, conditioning;
        PBF_CALL(which, block =, pack_global_block(weights, threads));
        PBF_CALL(which, conditioning =, pack_conditioning(taken, threads));
        Found found{std::vector<T>(std::int64_t{n} * width), std::vector<T>(std::int64_t{n} * width),
                    std::vector<T>(std::int64_t{n} * keys), std::vector<T>(std::int64_t{n} * channels)};
        const std::int64_t at = std::int64_t{first} * width;
        const GlobalBlock<T> a{state.data() + at, pooled.data() + at, found.hidden.data(), found.out.data()};
        PBF_CALL(which, , global_block(*block, a, n, threads));
        PBF_CALL(which, , conditioning(*conditioning, state.data() + at, found.query.data(), found.broadcast.data(), n, threads));
        return found;
    };
    const Found found = run(0, proteins, 1), shared = run(0, proteins, 5), alone = run(proteins - 1, 1, 3);

    const Values x = values_of(state), more = values_of(pooled);
    Values sum = dense_rows(x, values_of(dense1), values_of(bias1), width);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = x[i] + plain::gelu(sum[i]) + more[i];
    const Values hidden = plain::scaled(plain::normalized(sum, proteins, width), values_of(norm1), values_of(norm1_bias));
    Values after = dense_rows(hidden, values_of(dense2), values_of(bias2), width);
    for (std::size_t i = 0; i < after.size(); ++i) after[i] = hidden[i] + plain::gelu(after[i]);
    Values asked = dense_rows(x, values_of(query), {}, width);
    for (double& value : asked) value = std::tanh(value);
    Values broadcasts = dense_rows(x, values_of(broadcast), values_of(broadcast_bias), width);
    for (double& value : broadcasts) value = plain::gelu(value);
    check_states<T>(found.hidden, hidden, name + " hidden");
    check_states<T>(found.out, plain::scaled(plain::normalized(after, proteins, width), values_of(norm2), values_of(norm2_bias)),
                    name + " state");
    check_states<T>(found.query, asked, name + " query");
    check_states<T>(found.broadcast, broadcasts, name + " broadcast");
    check_same_bits(shared.out, found.out, name + " on several threads");
    check_same_bits(shared.broadcast, found.broadcast, name + " broadcast on several threads");
    check_same_bits(alone.out, std::vector<T>(found.out.end() - width, found.out.end()), name + " alone");
    check_same_bits(alone.query, std::vector<T>(found.query.end() - keys, found.query.end()), name + " query alone");
}

template <class T>
void test_protein_sums(Isa which, const Batch& batch, const std::string& name) {
    constexpr int channels = 48;
    std::mt19937 generator(1);
    const auto rows = random<T>(generator, batch.rows * channels);
    Values exact(batch.proteins() * channels, 0.0);
    for (std::int64_t r = 0; r < batch.rows; ++r)
        for (int c = 0; c < channels && batch.segments[r] >= 0; ++c)
            exact[std::int64_t{batch.segments[r]} * channels + c] += number(rows[r * channels + c]);
    for (const int threads : {1, 3}) {
        auto found = poisoned<float>(batch.proteins() * channels);
        PBF_CALL(which, , protein_sums(rows.data(), batch.starts.data(), batch.lengths.data(), batch.proteins(), found.data(),
                                       channels, threads));
        const double error = error_of(found, exact, largest(exact));
        check(error < 1e-6, name + " on " + std::to_string(threads) + " threads", error);
    }
}

template <class T>
void test_dtype(Isa which, const std::string& set) {
    // One row; rows that fill no four of Winograd's and no tile; more than a unit of work and a tile of attention.
    const std::pair<int, std::vector<std::int64_t>> cases[] = {
        {16, {1, 2, 301, 45}}, {48, {37, 1, 70, 4}}, {128, {1, 29, 13}}};
    for (const auto& [channels, lengths] : cases) {
        const Batch batch(lengths, kGap);
        const std::string name = set + (kIsBf16<T> ? " bfloat16 d_local " : " float32 d_local ") + std::to_string(channels);
        for (const bool takes_tokens : {false, true})
            test_local_block<T>(which, batch, channels, takes_tokens, name + (takes_tokens ? " from tokens" : ""));
        test_attention<T>(which, batch, channels, channels == 16 ? 32 : 16, channels == 128 ? 64 : 16, name + " attention");
    }
    const std::string name = set + (kIsBf16<T> ? " bfloat16" : " float32");
    for (const std::int64_t rows : {1, 37, 300})
        for (const auto& [taps, dilation] : {std::pair{1, 1}, {3, 2}, {9, 5}})
            test_weight_gradient<T>(
                which, rows, taps, dilation,
                name + " weight gradient of " + std::to_string(rows) + " rows, " + std::to_string(taps) + " taps");
    test_protein_sums<T>(which, Batch({1, 40, 3}, kGap), name + " protein sums");
    for (const int proteins : {1, 2, 61})
        for (const auto& [width, keys, channels] : {std::tuple{48, 32, 16}, {128, 64, 48}})
            test_global_track<T>(which, width, keys, channels, proteins,
                                 name + " global track of " + std::to_string(proteins) + " proteins");
}

}  // namespace

int main(int n, char** arguments) {
    check(gomp_parallel() != nullptr, "the threads of libgomp were not found");
    if (n > 1) try {
            use_instruction_set(arguments[1]);
        } catch (const std::invalid_argument& error) {
            std::fprintf(stderr, "%s\n", error.what());
            return 2;
        }
    for (int last = static_cast<int>(isa_in_use()), i = n > 1 ? last : 0; i <= last; ++i) {
        const int before = passed, failed_before = failed;
        test_dtype<float>(static_cast<Isa>(i), kIsaNames[i]);
        test_dtype<bf16>(static_cast<Isa>(i), kIsaNames[i]);
        std::printf("%s: %d passed, %d failed\n", kIsaNames[i], passed - before, failed - failed_before);
        std::fflush(stdout);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed ? 1 : 0;
}
