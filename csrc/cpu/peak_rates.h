// How fast an instruction set multiplies and adds on this machine, and how much of that its matrix products reach.
#pragma once

#include <chrono>

#include "instruction_sets.h"

namespace pbf {

struct Rates {
    double registers, products;  // FLOP/s
};

// Work for each thread, and the best that each has done so far. Other processes spoil some windows of time, and each thread's
// best one counts.
struct Timed {
    std::vector<std::unique_ptr<Workload>> work;
    std::vector<double> best;

    template <class Make>
    Timed(int threads, const Make& make) : work(threads), best(threads) {
        for (auto& one : work) one = make();
    }

    void measure(double seconds) {
        using Clock = std::chrono::steady_clock;
        static std::atomic<std::int64_t> windows{0};
        const std::int64_t window = ++windows;
        parallel_for(static_cast<std::int64_t>(work.size()), static_cast<int>(work.size()), [&](std::int64_t i) {
            // A thread that had its part must not do another one's too, which would add its rate twice.
            static thread_local std::int64_t last = 0;
            if (std::exchange(last, window) == window) return;
            const auto start = Clock::now();
            double flops = 0, passed;
            do {
                flops += work[i]->run();
                passed = std::chrono::duration<double>(Clock::now() - start).count();
            } while (passed < seconds);
            best[i] = std::max(best[i], flops / passed);
        });
    }

    double sum() const {
        double total = 0;
        for (const double rate : best) total += rate;
        return total;
    }
};

// Of products of T: multiply-adds and products in turns, for about so many seconds in all.
template <class T>
Rates rates_of(Isa which, double seconds, int threads) {
    using Clock = std::chrono::steady_clock;
    // Much less than a slice of time that another process takes: windows as long as those fell into step with them, and all of one
    // kind were spoiled.
    constexpr double window = 5e-4;
    const int used = gomp_parallel() ? std::max(threads, 1) : 1;
    std::unique_ptr<Workload> made;
    Timed registers(used, [&] {
        PBF_CALL(which, made =, register_work<T>());
        return std::move(made);
    });
    Timed products(used, [&] {
        PBF_CALL(which, made =, product_work<T>());
        return std::move(made);
    });
    const auto start = Clock::now();
    do {
        registers.measure(window);
        products.measure(window);
    } while (std::chrono::duration<double>(Clock::now() - start).count() + 2 * window <= seconds);
    return {registers.sum(), products.sum()};
}

}  // namespace pbf
