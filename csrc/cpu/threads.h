// The threads that kernels run on.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace pbf {

// Runs body(i) for i in [0, items) on the OpenMP threads that PyTorch already has. A pool of our own would fight with
// that one: its threads spin for a while after each of PyTorch's operations. Without PyTorch's pool, one thread.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline GompParallel gomp_parallel() {
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

template <class Body>
void parallel_for(std::int64_t items, int threads, const Body& body) {
    if (threads <= 1 || items <= 1 || !gomp_parallel()) {
        for (std::int64_t i = 0; i < items; ++i) body(i);
        return;
    }
    struct Shared {
        const Body& body;
        std::int64_t items;
        std::atomic<std::int64_t> next{0};
    } shared{body, items};
    gomp_parallel()(
        [](void* p) {
            auto& s = *static_cast<Shared*>(p);
            for (std::int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;) s.body(i);
        },
        &shared, static_cast<unsigned>(threads), 0);
}

// Rows whose sums and states a thread keeps in its second-level cache; fewer where there would be too few units for all
// threads, or the last would leave some idle.
inline std::int64_t rows_per_unit(std::int64_t rows, int threads) {
    const std::int64_t most = 240, share = (rows + threads - 1) / std::max(threads, 1);
    const std::int64_t units = std::max<std::int64_t>((share + most - 1) / most, 1);
    return std::clamp<std::int64_t>((share + units - 1) / units, 48, most);
}

}  // namespace pbf
