// The kernels for CPUs, for Python: see cpu/, and ops/cpu.py, which checks every shape.
//
// Each has a plain twin in proteinbert_fast/ops/reference.py, which defines it. The products are our own because a row's bits
// must not depend on the shape of the batch, as they do in the matrix libraries, and because the rows between proteins need not
// be computed.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/instruction_sets.h"
#include "cpu/peak_rates.h"

namespace py = pybind11;

namespace {

using namespace pbf;

// Addresses come as integers from Tensor.data_ptr(): bfloat16 has no buffer format.
template <class T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check_channels(const char* name, int channels) {
    if (channels < 16 || channels > kMaxChannels || channels % 16)
        throw std::invalid_argument(std::string(name) + " must be a multiple of 16 up to " +
                                    std::to_string(kMaxChannels) + ", got " + std::to_string(channels));
}

template <class Function>
void by_dtype(bool is_bf16, const Function& function) {
    py::gil_scoped_release unlocked;
    if (is_bf16)
        function(bf16{});
    else
        function(float{});
}

enum class Kind { local_block, local_block_backward, attention, attention_backward, global_block, conditioning };

// Packed weights, with what they were packed for: kernels of another instruction set would read something else.
struct Packed {
    std::unique_ptr<PackedWeights> weights;
    Kind kind;
    Isa isa;
    bool is_bf16;
    int channels, heads, d_key, d_value;
    bool takes_tokens = false;  // a local block

    const PackedWeights& as(Kind wanted) const {
        if (kind != wanted) throw std::invalid_argument("these weights are packed for another kernel");
        return *weights;
    }
};

Packed pack_local_block(const std::vector<std::uintptr_t>& weights, std::uintptr_t embedding, int channels, int taps,
                        int wide_dilation, bool backward, bool is_bf16, int threads) {
    check_channels("channels", channels);
    if (weights.size() != 10) throw std::invalid_argument("a local block has 10 weights");
    if (taps < 1 || taps % 2 == 0 || wide_dilation < 1) throw std::invalid_argument("taps must be odd, and the dilation at least 1");
    const Isa which = isa_in_use();
    Packed packed{nullptr, backward ? Kind::local_block_backward : Kind::local_block, which, is_bf16, channels, 0, 0, 0,
                  embedding != 0};
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const auto& w = weights;
        const LocalBlockWeights<T> from{
            at<const T>(w[0]),     at<const float>(w[1]), at<const T>(w[2]),     at<const float>(w[3]),
            at<const float>(w[4]), at<const float>(w[5]), at<const T>(w[6]),     at<const float>(w[7]),
            at<const float>(w[8]), at<const float>(w[9]), at<const T>(embedding), channels, taps, wide_dilation};
        if (backward) {
            PBF_CALL(which, packed.weights = , pack_local_block_backward(from, threads));
        } else {
            PBF_CALL(which, packed.weights = , pack_local_block(from, threads));
        }
    });
    return packed;
}

Packed pack_attention(std::uintptr_t key_weight, std::uintptr_t value_weight, int channels, int heads, int d_key, int d_value,
                      bool backward, bool is_bf16, int threads) {
    check_channels("channels", channels);
    check_channels("d_key", d_key);
    check_channels("d_value", d_value);
    const Isa which = isa_in_use();
    Packed packed{nullptr, backward ? Kind::attention_backward : Kind::attention, which, is_bf16, channels, heads, d_key, d_value};
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const AttentionWeights<T> from{at<const T>(key_weight), at<const T>(value_weight), channels, heads, d_key, d_value};
        if (backward) {
            PBF_CALL(which, packed.weights = , pack_attention_backward(from, threads));
        } else {
            PBF_CALL(which, packed.weights = , pack_attention(from, threads));
        }
    });
    return packed;
}

Packed pack_global_block(const std::vector<std::uintptr_t>& weights, int width, bool is_bf16, int threads) {
    check_channels("width", width);
    if (weights.size() != 8) throw std::invalid_argument("a global block has 8 weights");
    const Isa which = isa_in_use();
    Packed packed{nullptr, Kind::global_block, which, is_bf16, width, 0, 0, 0};
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const auto& w = weights;
        const GlobalBlockWeights<T> from{at<const T>(w[0]),     at<const float>(w[1]), at<const float>(w[2]),
                                         at<const float>(w[3]), at<const T>(w[4]),     at<const float>(w[5]),
                                         at<const float>(w[6]), at<const float>(w[7]), width};
        PBF_CALL(which, packed.weights =, pack_global_block(from, threads));
    });
    return packed;
}

Packed pack_conditioning(std::uintptr_t query, std::uintptr_t broadcast, std::uintptr_t broadcast_bias, int width, int keys,
                         int channels, bool is_bf16, int threads) {
    check_channels("width", width);
    check_channels("keys", keys);
    check_channels("channels", channels);
    const Isa which = isa_in_use();
    Packed packed{nullptr, Kind::conditioning, which, is_bf16, width, keys, 0, channels};
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const ConditioningWeights<T> from{at<const T>(query), at<const T>(broadcast), at<const float>(broadcast_bias), width, keys,
                                          channels};
        PBF_CALL(which, packed.weights =, pack_conditioning(from, threads));
    });
    return packed;
}

void global_block(const Packed& packed, std::uintptr_t state, std::uintptr_t pooled, std::uintptr_t hidden, std::uintptr_t out,
                  int proteins, int threads) {
    const PackedWeights& weights = packed.as(Kind::global_block);
    by_dtype(packed.is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const GlobalBlock<T> a{at<const T>(state), at<const T>(pooled), at<T>(hidden), at<T>(out)};
        PBF_CALL(packed.isa, , global_block(weights, a, proteins, threads));
    });
}

void conditioning(const Packed& packed, std::uintptr_t state, std::uintptr_t query, std::uintptr_t broadcast, int proteins,
                  int threads) {
    const PackedWeights& weights = packed.as(Kind::conditioning);
    by_dtype(packed.is_bf16, [&](auto zero) {
        using T = decltype(zero);
        PBF_CALL(packed.isa, , conditioning(weights, at<const T>(state), at<T>(query), at<T>(broadcast), proteins, threads));
    });
}

// The first gap and the last: units of work end before the last, because what they widen reaches into it.
template <class T>
void clear_gaps(T* state, const Layout& layout, int channels) {
    const std::int64_t gap = std::min(layout.gap, layout.rows), last = std::max(layout.rows - layout.gap, gap);
    std::fill(state, state + gap * channels, T{});
    std::fill(state + last * channels, state + layout.rows * channels, T{});
}

// From states `x`, or from tokens where that is 0; `hidden`, and `narrow` with `wide`, may be 0.
void local_block(const Packed& packed, std::uintptr_t x, std::uintptr_t tokens, std::uintptr_t broadcast, std::uintptr_t segments,
                 std::uintptr_t hidden, std::uintptr_t local, std::uintptr_t narrow, std::uintptr_t wide,
                 std::uintptr_t starts, std::uintptr_t lengths, std::int64_t proteins, std::int64_t gap, std::int64_t rows,
                 int threads) {
    const PackedWeights& weights = packed.as(Kind::local_block);
    if (packed.takes_tokens != (tokens != 0)) throw std::invalid_argument("tokens where these weights take states, or states where tokens");
    by_dtype(packed.is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const LocalBlock<T> a{at<const T>(x),
                              at<const std::uint8_t>(tokens),
                              at<const float>(broadcast),
                              at<const std::int32_t>(segments),
                              at<T>(hidden),
                              at<T>(local),
                              at<T>(narrow),
                              at<T>(wide)};
        const Layout layout{at<const std::int64_t>(starts), at<const std::int64_t>(lengths), proteins, gap, rows};
        if (a.hidden) clear_gaps(a.hidden, layout, packed.channels);
        clear_gaps(a.local, layout, packed.channels);
        PBF_CALL(packed.isa, , local_block(weights, a, layout, threads));
    });
}

// Of the weights' gradients, those of norms and biases, in the order of Sums, and what weight_gradient makes the others of.
// `d_hidden` may be 0; where `x` is, `d_tables` are made and not `d_x`, and either may be 0.
void local_block_backward(const Packed& packed, std::uintptr_t x, std::uintptr_t tokens, std::uintptr_t broadcast,
                          std::uintptr_t segments, std::uintptr_t narrow, std::uintptr_t wide, std::uintptr_t d_local,
                          std::uintptr_t d_hidden, const std::vector<std::uintptr_t>& results, std::uintptr_t d_x,
                          std::uintptr_t d_tables, std::uintptr_t sums, std::uintptr_t starts, std::uintptr_t lengths,
                          std::int64_t proteins, std::int64_t gap, std::int64_t rows, int threads) {
    const PackedWeights& weights = packed.as(Kind::local_block_backward);
    if (results.size() != 5) throw std::invalid_argument("a local block's backward pass has 5 results");
    by_dtype(packed.is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const auto& r = results;
        const LocalBlockBackward<T> a{at<const T>(x),
                                      at<const std::uint8_t>(tokens),
                                      at<const float>(broadcast),
                                      at<const std::int32_t>(segments),
                                      at<const T>(narrow),
                                      at<const T>(wide),
                                      at<const T>(d_local),
                                      at<const T>(d_hidden),
                                      at<T>(r[0]),
                                      at<T>(r[1]),
                                      at<T>(r[2]),
                                      at<T>(r[3]),
                                      at<T>(r[4]),
                                      at<T>(d_x),
                                      at<float>(d_tables),
                                      at<float>(sums)};
        const Layout layout{at<const std::int64_t>(starts), at<const std::int64_t>(lengths), proteins, gap, rows};
        PBF_CALL(packed.isa, , local_block_backward(weights, a, layout, threads));
    });
}

std::vector<Tile> tiles_of(const std::int64_t* starts, const std::int64_t* lengths, const std::int64_t* slots,
                           std::int64_t proteins) {
    std::vector<Tile> tiles;
    for (std::int64_t p = 0; p < proteins; ++p)
        for (std::int64_t row = 0; row < lengths[p]; row += kTile)
            tiles.push_back({starts[p] + row, slots[p] + row / kTile, static_cast<std::int32_t>(p),
                             static_cast<int>(std::min(kTile, lengths[p] - row))});
    return tiles;
}

// How many tiles lie before each protein, and in all.
std::vector<std::int64_t> slots_of(const std::int64_t* lengths, std::int64_t proteins) {
    std::vector<std::int64_t> slots{0};
    for (std::int64_t p = 0; p < proteins; ++p) slots.push_back(slots.back() + (lengths[p] + kTile - 1) / kTile);
    return slots;
}

// pooled = (sum over tiles of sum(e * value)) / (sum over tiles of sum(e)), tiles in order; denominators on the side. Where
// `weights` (rows, heads) is not null, e of each row is left there.
template <class T>
void attend(const Packed& packed, const T* local, const float* query, const std::int64_t* starts, const std::int64_t* lengths,
            std::int64_t proteins, float* pooled, float* denominators, float* weights, int threads) {
    const PackedWeights& keys_values = packed.as(Kind::attention);
    const int heads = packed.heads, d_value = packed.d_value;
    const auto slots = slots_of(lengths, proteins);
    Buffer<float> partials;
    const Attention<T> a{local, query, partials.room(slots.back() * heads * (1 + d_value)), weights};
    const auto tiles = tiles_of(starts, lengths, slots.data(), proteins);
    PBF_CALL(packed.isa, , attention(keys_values, a, tiles, threads));
    for (std::int64_t p = 0; p < proteins; ++p)
        for (int h = 0; h < heads; ++h) {
            float* o = pooled + (p * heads + h) * d_value;
            float total = 0;
            std::fill(o, o + d_value, 0.0f);
            for (std::int64_t s = slots[p]; s < slots[p + 1]; ++s) {
                const float* tile = a.partials + (s * heads + h) * (1 + d_value);
                total += tile[0];
                for (int c = 0; c < d_value; ++c) o[c] += tile[1 + c];
            }
            denominators[p * heads + h] = total;
            for (int c = 0; c < d_value; ++c) o[c] /= total;
        }
}

void attention(const Packed& packed, std::uintptr_t local, std::uintptr_t query, std::uintptr_t starts, std::uintptr_t lengths,
               std::int64_t proteins, std::uintptr_t pooled, std::uintptr_t denominators, std::uintptr_t weights, int threads) {
    by_dtype(packed.is_bf16, [&](auto zero) {
        attend(packed, at<const decltype(zero)>(local), at<const float>(query), at<const std::int64_t>(starts),
               at<const std::int64_t>(lengths), proteins, at<float>(pooled), at<float>(denominators), at<float>(weights), threads);
    });
}

// What one block's kernels take; `next` is null in the last.
struct PackedBlock {
    const Packed &local, &keys_values, &global;
    const Packed* next;
};

// All blocks, one after the other: local states from tokens to `local` by way of `other`, (rows, channels) both, the last block's
// in `local`; global states (proteins, width) from `state` to `out`. In one call, because a short protein waits for each, and
// between calls the caches forget the caller.
void run_blocks(const std::vector<std::tuple<const Packed*, const Packed*, const Packed*, const Packed*>>& blocks,
                std::uintptr_t tokens, std::uintptr_t segments, std::uintptr_t starts, std::uintptr_t lengths,
                std::int64_t proteins, std::int64_t gap, std::int64_t rows, std::uintptr_t state, std::uintptr_t query,
                std::uintptr_t broadcast, std::uintptr_t local, std::uintptr_t other, std::uintptr_t out, int threads) {
    std::vector<PackedBlock> all;
    for (const auto& [of_rows, keys_values, global, next] : blocks) {
        if (!of_rows || !keys_values || !global || (all.size() + 1 < blocks.size()) != (next != nullptr))
            throw std::invalid_argument("all blocks but the last have four packs of weights");
        of_rows->as(Kind::local_block), keys_values->as(Kind::attention), global->as(Kind::global_block);
        if (next) next->as(Kind::conditioning);
        if (of_rows->takes_tokens != all.empty()) throw std::invalid_argument("the first block takes tokens, and no other");
        all.push_back({*of_rows, *keys_values, *global, next});
    }
    if (all.empty()) return;
    const Isa which = all[0].local.isa;
    const int channels = all[0].local.channels, heads = all[0].keys_values.heads;
    const std::int64_t keys = std::int64_t{heads} * all[0].keys_values.d_key, width = all[0].global.channels;
    const bool is_bf16 = all[0].local.is_bf16;
    const auto fits = [&](const Packed& p) { return p.isa == which && p.is_bf16 == is_bf16; };
    for (const PackedBlock& b : all)
        if (!fits(b.local) || !fits(b.keys_values) || !fits(b.global) || (b.next && !fits(*b.next)) ||
            b.local.channels != channels || b.keys_values.channels != channels || b.keys_values.heads != heads ||
            std::int64_t{heads} * b.keys_values.d_key != keys || std::int64_t{heads} * b.keys_values.d_value != width ||
            b.global.channels != width || (b.next && (b.next->channels != width || b.next->heads != keys || b.next->d_value != channels)))
            throw std::invalid_argument("these blocks' weights are packed for different states");
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const auto* start = at<const std::int64_t>(starts);
        const auto* length = at<const std::int64_t>(lengths);
        const Layout layout{start, length, proteins, gap, rows};
        Buffer<float> query_buffer, broadcast_buffer, pooled_buffer, denominator_buffer;
        Buffer<T> next_query_buffer, next_broadcast_buffer, rounded_buffer, hidden_buffer, state_buffers[2];
        float* queries = query_buffer.room(proteins * keys);
        float* broadcasts = broadcast_buffer.room(proteins * channels);
        float* pooled = pooled_buffer.room(proteins * width);
        float* denominators = denominator_buffer.room(proteins * heads);
        T* next_query = next_query_buffer.room(proteins * keys);
        T* next_broadcast = next_broadcast_buffer.room(proteins * channels);
        T* rounded = rounded_buffer.room(proteins * width);
        T* hidden = hidden_buffer.room(proteins * width);
        const T *q = at<const T>(query), *b = at<const T>(broadcast), *s = at<const T>(state), *x = nullptr;
        for (std::size_t i = 0; i < all.size(); ++i) {
            const PackedBlock& block = all[i];
            T* const to = (all.size() - i) % 2 ? at<T>(local) : at<T>(other);
            T* const next_state = i + 1 == all.size() ? at<T>(out) : state_buffers[i % 2].room(proteins * width);
            PBF_CALL(which, , converted(q, proteins * keys, queries));
            PBF_CALL(which, , converted(b, proteins * channels, broadcasts));
            const LocalBlock<T> rows_of{x,  x ? nullptr : at<const std::uint8_t>(tokens), broadcasts, at<const std::int32_t>(segments), nullptr, to, nullptr, nullptr};
            clear_gaps(to, layout, channels);
            PBF_CALL(which, , local_block(*block.local.weights, rows_of, layout, threads));
            attend<T>(block.keys_values, to, queries, start, length, proteins, pooled, denominators, nullptr, threads);
            PBF_CALL(which, , converted(pooled, proteins * width, rounded));
            const GlobalBlock<T> global{s, rounded, hidden, next_state};
            PBF_CALL(which, , global_block(*block.global.weights, global, static_cast<int>(proteins), threads));
            if (block.next)
                PBF_CALL(which, , conditioning(*block.next->weights, static_cast<const T*>(next_state), next_query, next_broadcast, static_cast<int>(proteins), threads));
            x = to, s = next_state, q = next_query, b = next_broadcast;
        }
    });
}

// Gradients from those of the pooled values. The columns of `d_weights`, which are added to, are all heads' keys, then all
// heads' values; it may be 0. `d_query` has a part for each slot; protein_sums adds them up.
void attention_backward(const Packed& packed, std::uintptr_t local, std::uintptr_t query, std::uintptr_t starts,
                        std::uintptr_t lengths, std::uintptr_t slots, std::int64_t proteins, std::uintptr_t denominators,
                        std::uintptr_t pooled, std::uintptr_t d_pooled, std::uintptr_t d_local, std::uintptr_t d_query,
                        std::uintptr_t d_weights, int threads) {
    const PackedWeights& keys_values = packed.as(Kind::attention_backward);
    by_dtype(packed.is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const AttentionBackward<T> a{at<const T>(local),        at<const float>(query),    at<const float>(denominators),
                                     at<const float>(pooled),   at<const float>(d_pooled), at<T>(d_local),
                                     at<float>(d_query),        at<float>(d_weights)};
        const auto tiles = tiles_of(at<const std::int64_t>(starts), at<const std::int64_t>(lengths),
                                    at<const std::int64_t>(slots), proteins);
        PBF_CALL(packed.isa, , attention_backward(keys_values, a, tiles, threads));
    });
}

// See WeightGradient; rows [first, last), and as many around them as the taps reach.
void weight_gradient(std::uintptr_t x, std::uintptr_t gradient, std::uintptr_t out, std::int64_t first,
                     std::int64_t last, int inputs, int columns, int taps, int dilation, bool is_bf16, int threads) {
    check_channels("inputs", inputs);
    check_channels("columns", columns);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        const WeightGradient<T> a{at<const T>(x), at<const T>(gradient), at<float>(out), inputs, columns, taps, dilation};
        PBF_CALL(isa_in_use(), , weight_gradient(a, first, last, threads));
    });
}

// out = sums of (rows, channels) over each protein, in order.
void protein_sums(std::uintptr_t rows, std::uintptr_t starts, std::uintptr_t lengths, std::int64_t proteins,
                  std::uintptr_t out, int channels, bool is_bf16, int threads) {
    check_channels("channels", channels);
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        PBF_CALL(isa_in_use(), , protein_sums(at<const T>(rows), at<const std::int64_t>(starts), at<const std::int64_t>(lengths),
                                              proteins, at<float>(out), channels, threads));
    });
}

void gelu(std::uintptr_t x, std::uintptr_t out, std::int64_t n, bool is_bf16) {
    by_dtype(is_bf16, [&](auto zero) {
        using T = decltype(zero);
        PBF_CALL(isa_in_use(), , gelu_of(at<const T>(x), at<T>(out), n));
    });
}

std::pair<double, double> rates(bool is_bf16, double seconds, int threads) {
    Rates found{};
    by_dtype(is_bf16, [&](auto zero) { found = rates_of<decltype(zero)>(isa_in_use(), seconds, threads); });
    return {found.registers, found.products};
}

}  // namespace

PYBIND11_MODULE(_cpu_kernels, m) {
    m.doc() = "The local block and global attention of the CPU back end; see ops/cpu.py.";
    py::class_<Packed>(m, "Packed", "Weights as the kernels of an instruction set take them.");
    m.attr("TILE") = kTile;
    m.def("pack_local_block", &pack_local_block);
    m.def("pack_attention", &pack_attention);
    m.def("pack_global_block", &pack_global_block);
    m.def("pack_conditioning", &pack_conditioning);
    m.def("gelu", &gelu);
    m.def("global_block", &global_block);
    m.def("conditioning", &conditioning);
    m.def("local_block", &local_block);
    m.def("attention", &attention);
    m.def("run_blocks", &run_blocks);
    m.attr("UNIT") = kUnit;
    m.attr("PARTS") = kParts;
    m.attr("SUMS") = static_cast<int>(kSums);
    m.def("local_block_backward", &local_block_backward);
    m.def("attention_backward", &attention_backward);
    m.def("weight_gradient", &weight_gradient);
    m.def("protein_sums", &protein_sums);
    m.def("instruction_set", [] { return kIsaNames[static_cast<int>(isa_in_use())]; }, "The one in use.");
    m.def("instruction_sets", [] {
        return std::vector<std::string>(kIsaNames, kIsaNames + static_cast<int>(best_isa().isa) + 1);
    }, "Those that this CPU has, the best last.");
    m.def("amx_failure", [] { return best_isa().amx_failure; }, "Why amx_bf16 is not in use, or an empty string.");
    m.def("rates", &rates,
          "FLOP/s that the set in use reaches in these seconds: multiply-adds in registers, and matrix products.");
    m.def("use_instruction_set", &use_instruction_set, "Uses a lesser one than the best, to test it or to compare.");
    m.def("shares_threads", [] { return gomp_parallel() != nullptr; },
          "Whether PyTorch's OpenMP threads were found; if not, these kernels run on one thread.");
}
