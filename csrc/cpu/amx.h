// Whether this process can use the tile unit: what the CPU and Linux say, and whether its products are right.
#pragma once

#include "tile_unit.h"

#ifdef PBF_AMX
#include <asm/unistd.h>
#include <cpuid.h>
#include <csetjmp>
#include <csignal>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "types.h"

namespace pbf {

// What CPUID, XGETBV and Linux answer; apart from asking them, so that tests can answer instead.
struct AmxFacts {
    bool avx512_bf16;         // the set of all other operations
    std::uint32_t leaf7_edx;  // CPUID leaf 7
    bool osxsave;
    std::uint64_t xcr0;  // 0 without osxsave
};

inline AmxFacts amx_facts(bool avx512_bf16) {
    AmxFacts facts{avx512_bf16, 0, false, 0};
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid(1, &a, &b, &c, &d)) facts.osxsave = c >> 27 & 1;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) facts.leaf7_edx = d;
    if (facts.osxsave) {
        std::uint32_t low, high;
        asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        facts.xcr0 = std::uint64_t{high} << 32 | low;
    }
    return facts;
}

// Why the CPU or Linux's set-up for it rule the tile unit out; empty where they do not.
inline std::string amx_unsupported(const AmxFacts& facts) {
    if (!(facts.leaf7_edx >> 24 & 1)) return "this CPU has no AMX tiles";
    if (!(facts.leaf7_edx >> 22 & 1)) return "this CPU's AMX has no bfloat16";
    if (!facts.avx512_bf16) return "this CPU has AMX, but not AVX-512 with bfloat16";
    if (!facts.osxsave || (facts.xcr0 >> 17 & 3) != 3) return "the operating system or hypervisor does not save AMX tiles";
    return "";
}

// Asks Linux to let this process, with all its threads, use tiles: 0 or an errno.
inline int request_amx() {
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(__NR_arch_prctl, request, tile_data) ? errno : 0;
}

inline std::string amx_refused(int error) {
    switch (error) {
        case 0: return "";
        case EINVAL: return "Linux is older than 5.16, which introduced AMX";
        case ENOSPC: return "Linux refuses AMX: a thread's alternate signal stack is too small for its registers";
        default: return std::string("Linux refuses AMX: ") + std::strerror(error);
    }
}

// Runs `body`, and says which signal ended it: an instruction that a hypervisor or an emulator does not know must not end
// the user's process. Not in a child: fork() copies the page tables of a large process, runs the handlers that libraries have
// registered for it, breaks what some (MPI, CUDA) have open, and its SIGCHLD reaches handlers and waits of the user's. The
// price: for these milliseconds, SIGILL and SIGSEGV of other threads pass through our handler, which hands them on. `body` must
// own nothing that a jump out of it would leak. One call at a time.
class Guard {
public:
    template <class Body>
    static std::string run(const Body& body) {
        struct sigaction ours {};
        ours.sa_sigaction = handle;
        ours.sa_flags = SA_SIGINFO;
        sigemptyset(&ours.sa_mask);
        thread_ = pthread_self();
        const int signal = sigsetjmp(back_, 1);
        if (!signal) {
            for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &ours, &before_[i]);
            body();
        }
        for (int i = 0; i < 2; ++i) sigaction(kSignals[i], &before_[i], nullptr);
        return signal == 0 ? "" : signal == SIGILL ? "an illegal instruction" : "a general protection fault";
    }

private:
    static void handle(int signal, siginfo_t* info, void*) {
        const bool of_instruction = info->si_code > 0;
        if (of_instruction && pthread_equal(thread_, pthread_self())) siglongjmp(back_, signal);
        // The instruction runs again, or the signal is sent again, to what was there before.
        sigaction(signal, &before_[signal == kSignals[1]], nullptr);
        if (!of_instruction) raise(signal);
    }

    static constexpr int kSignals[2] = {SIGILL, SIGSEGV};
    static inline sigjmp_buf back_;
    static inline pthread_t thread_;
    static inline struct sigaction before_[2];
};

using AmxProduct = void (*)(const Product<bf16>&, const bf16*, const Runs&, float*);

// What packs weights for these products: pack_column() of their set.
using AmxPack = void (*)(const bf16*, int, int, const Product<bf16>&, int, bf16*);

struct AmxCase {
    int rows, inputs, columns, taps, dilation;
    bool integers, bias;
};

// One product against float64: small integers, whose sums are exact in any order, must be equal. Every row must have the bits
// it has alone, and nothing around the results may be written.
inline std::string check_amx_case(const AmxCase& c, AmxProduct product, AmxPack pack) {
    const std::int64_t reach = std::int64_t{c.taps / 2} * c.dilation, inputs = c.inputs, columns = c.columns;
    std::uint32_t state = 1;
    const auto number = [&] {
        state = state * 1664525u + 1013904223u;
        // -8 to 8, or numbers of 8 bits between -1 and 1.
        const float value = c.integers ? static_cast<float>(static_cast<int>(state >> 16) % 17 - 8)
                                       : static_cast<float>(static_cast<int>(state >> 23) - 256) / 256 * 0.75f;
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        return static_cast<bf16>(bits >> 16);
    };
    const auto wide = [](bf16 x) {
        const std::uint32_t bits = std::uint32_t{x} << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return static_cast<double>(value);
    };
    std::vector<bf16> x((c.rows + 2 * reach) * inputs), w(c.taps * inputs * columns), packed(w.size());
    for (auto& value : x) value = number();
    for (auto& value : w) value = number();
    std::vector<float> bias(columns), out((c.rows + 2) * columns, -1e30f), alone(columns);
    for (auto& value : bias) value = static_cast<float>(wide(number()));
    const Product<bf16> p{packed.data(), c.bias ? bias.data() : nullptr, c.inputs, c.columns, c.taps, c.dilation, c.columns};
    for (int column = 0; column < columns; ++column)
        pack(w.data() + column, c.columns, c.inputs * c.columns, p, column, packed.data());
    const Runs runs{{1, c.rows, 1 + c.rows}}, one{{0, 1, 1}};
    const bf16* first = x.data() + reach * inputs;
    const std::string signal = Guard::run([&] { product(p, first - inputs, runs, out.data()); });
    if (!signal.empty()) return signal;
    for (std::int64_t r = 0; r < c.rows + 2; ++r) {
        const float* row = out.data() + r * columns;
        if (r == 0 || r == c.rows + 1) {
            for (int o = 0; o < columns; ++o)
                if (row[o] != -1e30f) return "a product wrote beyond its rows";
            continue;
        }
        const bf16* at = first + (r - 1) * inputs;
        product(p, at, one, alone.data());
        if (std::memcmp(row, alone.data(), sizeof(float) * columns)) return "a row's bits depend on its neighbors";
        for (int o = 0; o < columns; ++o) {
            double sum = c.bias ? bias[o] : 0, size = std::fabs(sum);
            for (int t = 0; t < c.taps; ++t)
                for (int k = 0; k < inputs; ++k) {
                    const double value = wide(at[(t * c.dilation - reach) * inputs + k]);
                    const double term = value * wide(w[(t * inputs + k) * columns + o]);
                    sum += term, size += std::fabs(term);
                }
            // 2^-24 for each of the additions on a value's way, most of which see a part of the sum.
            const double allowed = c.integers ? 0 : size * 0x1p-24 * (16 + c.taps * inputs / 16);
            if (!(std::fabs(row[o] - sum) <= allowed)) return "a product is wrong";
        }
    }
    return "";
}

// Whether tiles outlive a switch to another thread: guests of some hypervisors lose them.
template <class Tiles>
std::string check_tiles_are_kept() {
    float numbers[kTileColumns], found[kTileRows][kTileColumns];
    for (int i = 0; i < kTileColumns; ++i) numbers[i] = static_cast<float>(i + 1);
    const TileConfiguration configuration = configuration_of({2 * kTileRows, kDepth});
    for (int i = 0; i < 20; ++i) {
        const std::string signal = Guard::run([&] {
            Tiles::configure(configuration);
            Tiles::template load<3>(numbers, 0);
            usleep(100);
            Tiles::template store<3>(found, sizeof found[0]);
            Tiles::release();
        });
        if (!signal.empty()) return signal;
        for (const auto& row : found)
            if (std::memcmp(row, numbers, sizeof row)) return "tiles do not outlive a switch of threads";
    }
    return "";
}

// What is wrong with a set's products, or nothing: both heights and widths of tiles and a low one, with and without bias, taps
// and a dilation, both depths. Some milliseconds.
template <class Tiles>
std::string check_amx(AmxProduct product, AmxPack pack) {
    std::string found = check_tiles_are_kept<Tiles>();
    for (const bool integers : {true, false})
        for (const AmxCase& c : {AmxCase{1, 32, 16, 1, 1, integers, false}, AmxCase{16, 16, 32, 1, 1, integers, true},
                                 AmxCase{17, 48, 48, 3, 2, integers, false}, AmxCase{32, 64, 64, 1, 1, integers, true},
                                 AmxCase{45, 128, 48, 9, 5, integers, true}})
            if (found.empty()) found = check_amx_case(c, product, pack);
    return found;
}

}  // namespace pbf
#endif
