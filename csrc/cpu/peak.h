// What the set's arithmetic can reach, and what its products do: see peak_rates.h.

// Hides a vector's value: the compiler would make one sum of equal ones, or take all turns of a sum before those of the next.
inline void hide(Floats& v) {
#if defined(__aarch64__)
    asm volatile("" : "+w"(v));
#elif defined(__x86_64__) && PBF_BYTES == 64
    asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
    asm volatile("" : "+x"(v));
#else
    asm volatile("" : "+m"(v));
#endif
}

// Sums stay in memory where GCC keeps the loop over them.
#ifdef __clang__
#define PBF_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define PBF_UNROLLED _Pragma("GCC unroll 32")
#endif

// As many independent sums as the largest tile of a product has, which is more than the latency of a multiply-add asks for.
template <class E>
__attribute__((noinline)) double multiply_adds(double flops, float* out) {
    constexpr int sums = PBF_ROWS * PBF_VECTORS;
    constexpr double per_turn = 2.0 * sums * kLanes * kPerStep<E>;
    const auto turns = static_cast<std::int64_t>(flops / per_turn) + 1;
    Floats total[sums] = {};
    PBF_UNROLLED
    for (int s = 0; s < sums; ++s) hide(total[s]);
    Floats x = splat(0.5f), y = splat(1.0f);
    if constexpr (std::is_same_v<E, float>) {
        hide(y);
        for (std::int64_t i = turns; i; --i) {
            hide(x);
#ifdef __aarch64__
            // NEON's multiply-add overwrites the addend. Of x86's, SSE2 has none, and sums would share one product.
            PBF_UNROLLED
            for (int s = 0; s < sums; ++s) total[s] = total[s] + x * y;
#else
            PBF_UNROLLED
            for (int s = 0; s < sums; ++s) total[s] = total[s] * x + y;
#endif
        }
    } else {
        const E pairs[kLanes * kPerStep<E>] = {};
        for (std::int64_t i = turns; i; --i) {
            hide(x);
            PBF_UNROLLED
            for (int s = 0; s < sums; ++s) total[s] = multiply_add(total[s], Step<E>{}, pairs);
        }
    }
    PBF_UNROLLED
    for (int s = 0; s < sums; ++s) store(out, load(out) + total[s]);
    return per_turn * static_cast<double>(turns);
}
#undef PBF_UNROLLED

#ifdef PBF_TILES
// Four independent tiles of sums, of two tiles of rows and two of weights, as in tile_sums().
inline double tile_multiply_adds(double flops, float* out) {
    constexpr double per_turn = 4 * 2.0 * kTileRows * kTileColumns * kDepth;
    const auto turns = static_cast<std::int64_t>(flops / per_turn) + 1;
    PBF_TILES::configure(configuration_of({2 * kTileRows, kDepth}));
    PBF_TILES::zero<0>(), PBF_TILES::zero<1>(), PBF_TILES::zero<2>(), PBF_TILES::zero<3>();
    PBF_TILES::zero<4>(), PBF_TILES::zero<5>(), PBF_TILES::zero<6>(), PBF_TILES::zero<7>();
    for (std::int64_t i = turns; i; --i) {
        PBF_TILES::dot<0, 4, 6>();
        PBF_TILES::dot<1, 4, 7>();
        PBF_TILES::dot<2, 5, 6>();
        PBF_TILES::dot<3, 5, 7>();
    }
    PBF_TILES::store<0>(out, 4 * kTileColumns);
    PBF_TILES::store<1>(out, 4 * kTileColumns);
    PBF_TILES::store<2>(out, 4 * kTileColumns);
    PBF_TILES::store<3>(out, 4 * kTileColumns);
    PBF_TILES::release();
    return per_turn * static_cast<double>(turns);
}
#endif

// Of what products multiply for states of type T.
template <class T>
struct RegisterWork : Workload {
    alignas(64) float out[256] = {};

    double run() override {
        constexpr double flops = 4e6;  // microseconds with tiles, a fraction of a millisecond with SSE2
#ifdef PBF_TILES
        if constexpr (std::is_same_v<T, bf16>) return tile_multiply_adds(flops, out);
#endif
        return multiply_adds<Factor<T>>(flops, out);
    }
};

// The local block's dense layer of the published width, over as many rows as a thread takes at a time.
template <class T>
struct ProductWork : Workload {
    using E = Factor<T>;
    static constexpr int rows = 240, channels = 128;
    Buffer<E> x, weights;
    Buffer<float> out;

    ProductWork() {
        std::fill_n(x.room(rows * channels), rows * channels, E{});
        std::fill_n(weights.room(channels * channels), channels * channels, E{});
        out.room(rows * channels);
    }

    double run() override {
        const Product<E> p{weights.data(), nullptr, channels, channels, 1, 1, channels};
        product(p, x.data(), Runs{{0, rows, rows}}, out.room(rows * channels));
        return 2.0 * rows * channels * channels;
    }
};

template <class T>
std::unique_ptr<Workload> register_work() {
    return std::make_unique<RegisterWork<T>>();
}

template <class T>
std::unique_ptr<Workload> product_work() {
    return std::make_unique<ProductWork<T>>();
}
