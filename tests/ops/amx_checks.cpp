// Products on the emulated tile unit and the checks of amx.h, without Python: compiled by test_cpu_amx.py, under
// AddressSanitizer. Prints what is wrong, one a line, or "right". With PBF_EMULATED_ALONE, products with mistakes planted are
// checked instead, and nothing that has none of them is compiled: PBF_MISTAKES(use) of mistakes.h, which test_cpu_amx.py makes,
// names a namespace for each.

#ifndef PBF_EMULATED_ALONE
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "cpu/amx.h"
#include "cpu/threads.h"
#include "cpu/tile_emulator.h"
#include "cpu/types.h"

namespace pbf {
#define PBF_BYTES 32
#define PBF_ROWS 2
#define PBF_VECTORS 4
#define PBF_BF16_DOT 1
#define PBF_EMULATED 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,amx-tile,amx-bf16")
#define PBF_TILES EmulatedTiles
namespace emulated {
#include "cpu/vector.h"

#include "cpu/product.h"
#include "cpu/tile_product.h"
#include "cpu/weight_gradient.h"

#include "cpu/tile_weight_gradient.h"
}  // namespace emulated
#ifdef PBF_EMULATED_ALONE
#include "mistakes.h"
#else
#undef PBF_TILES
#define PBF_TILES HardwareTiles
namespace hardware {
#include "cpu/vector.h"

#include "cpu/product.h"
#include "cpu/tile_product.h"
#include "cpu/weight_gradient.h"

#include "cpu/tile_weight_gradient.h"
}  // namespace hardware
#pragma GCC pop_options
#undef PBF_TILES
#undef PBF_BYTES
#undef PBF_ROWS
#undef PBF_VECTORS
#undef PBF_EMULATED

// As amx_bf16 is compiled, but for the tile unit.
#define PBF_BYTES 64
#define PBF_ROWS 12
#define PBF_VECTORS 2
#define PBF_TILES EmulatedTiles
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace emulated_512 {
#include "cpu/vector.h"

#include "cpu/product.h"
#include "cpu/tile_product.h"
#include "cpu/weight_gradient.h"

#include "cpu/tile_weight_gradient.h"
}  // namespace emulated_512
#endif
#pragma GCC pop_options
}  // namespace pbf

using namespace pbf;

// New memory is NaN.
void* operator new(std::size_t size, std::align_val_t alignment) {
    void* room = std::aligned_alloc(static_cast<std::size_t>(alignment), (size + 63) / 64 * 64);
    if (!room) throw std::bad_alloc();
    return std::memset(room, 0xff, size);
}

void operator delete(void* room, std::align_val_t) noexcept { std::free(room); }

namespace {

const AmxPack pack = emulated::pack_column<bf16, bf16>;
using WeightGradientOf = void (*)(const WeightGradient<bf16>&, std::int64_t, std::int64_t, int);

void say(const std::string& what, const std::string& found) {
    std::printf("%s: %s\n", what.c_str(), found.empty() ? "right" : found.c_str());
}

bf16 as_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<bf16>(bits >> 16);
}

// Every height of tiles, with all that a product may read in memory that ends there: anything beyond is found by the
// sanitizer.
void check_products(AmxProduct product, AmxPack pack) {
    std::string found = check_amx<EmulatedTiles>(product, pack);
    for (int rows = 1; rows <= 70 && found.empty(); ++rows)
        for (const bool bias : {false, true})
            for (const auto& [inputs, columns] : {std::pair{32, 32}, {48, 16}, {16, 80}})
                if (found.empty()) found = check_amx_case({rows, inputs, columns, 3, 2, true, bias}, product, pack);
    if (found.empty() && emulated_unit.configured) found = "the unit stays configured";
    say("products", found);
}

// Runs of proteins with rows between them that are NaN; results of those rows stay as they were.
void check_runs(AmxProduct product, AmxPack pack) {
    constexpr int inputs = 48, columns = 48, rows = 90;
    std::vector<bf16> x(rows * inputs, as_bf16(__builtin_nanf(""))), w(inputs * columns), packed(w.size());
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = as_bf16(static_cast<float>(i % 7) - 3);
    const Runs runs{{1, 17, 18}, {20, 1, 21}, {23, 32, 55}, {57, 32, 89}};
    for (const Run& run : runs)
        for (int i = run.first * inputs; i < (run.first + run.rows) * inputs; ++i)
            x[i] = as_bf16(static_cast<float>(i % 5) - 2);
    std::vector<float> out(rows * columns, -1);
    const Product<bf16> p{packed.data(), nullptr, inputs, columns, 1, 1, columns};
    for (int c = 0; c < columns; ++c) pack(w.data() + c, columns, 0, p, c, packed.data());
    product(p, x.data(), runs, out.data());
    std::string found;
    for (int r = 0; r < rows; ++r) {
        const auto has_row = [&](const Run& run) { return r >= run.first && r < run.first + run.rows; };
        const bool inside = std::any_of(runs.begin(), runs.end(), has_row);
        for (int c = 0; c < columns; ++c) {
            float sum = inside ? 0 : -1;
            for (int k = 0; inside && k < inputs; ++k)
                sum += static_cast<float>((r * inputs + k) % 5 - 2) * static_cast<float>((k * columns + c) % 7 - 3);
            if (out[r * columns + c] != sum) found = "row " + std::to_string(r) + " is wrong";
        }
    }
    say("runs", found);
}

// Sums of small integers over rows, in memory that ends where it may be read, onto what is there already.
void check_weight_gradients(WeightGradientOf weight_gradient) {
    struct Case {
        int inputs, columns, taps, dilation;
    };
    std::string found;
    for (const int rows : {1, 2, 31, 33, 64, 255, 256, 257, 300, 513})
        for (const Case& c : {Case{16, 16, 1, 1}, {48, 80, 3, 2}, {80, 48, 9, 5}, {32, 32, 3, 1}}) {
            const int reach = c.taps / 2 * c.dilation;
            const std::int64_t all = rows + 2 * reach;
            std::vector<bf16> x(all * c.inputs), gradient(all * c.columns);
            std::vector<float> out(std::int64_t{c.taps} * c.inputs * c.columns, 3), expected(out);
            for (std::int64_t r = reach; r < rows + reach; ++r) {
                for (int i = 0; i < c.inputs; ++i) x[r * c.inputs + i] = as_bf16(static_cast<float>((r * 7 + i * 3) % 11 - 5));
                for (int o = 0; o < c.columns; ++o)
                    gradient[r * c.columns + o] = as_bf16(static_cast<float>((r * 5 + o) % 13 - 6));
            }
            for (int t = 0; t < c.taps; ++t)
                for (std::int64_t r = reach; r < rows + reach; ++r) {
                    const std::int64_t from = r + (t - c.taps / 2) * c.dilation;
                    for (int i = 0; i < c.inputs; ++i)
                        for (int o = 0; o < c.columns; ++o)
                            if (from >= reach && from < rows + reach)
                                expected[(std::int64_t{t} * c.inputs + i) * c.columns + o] +=
                                    static_cast<float>(((from * 7 + i * 3) % 11 - 5) * ((r * 5 + o) % 13 - 6));
                }
            const WeightGradient<bf16> a{x.data(), gradient.data(), out.data(), c.inputs, c.columns, c.taps, c.dilation};
            weight_gradient(a, reach, rows + reach, 2);
            if (out != expected) found = "wrong for " + std::to_string(rows) + " rows of " + std::to_string(c.inputs);
        }
    if (found.empty() && emulated_unit.configured) found = "the unit stays configured";
    say("weight gradients", found);
}

// What the pseudocode fixes and other orders or roundings would not give.
void check_arithmetic() {
    std::string found;
    const auto dot = [&](float start, const std::vector<float>& row, const std::vector<float>& column) {
        bf16 a[kDepth] = {}, b[kDepth / 2][2 * kTileColumns] = {};
        for (std::size_t k = 0; k < row.size(); ++k) a[k] = as_bf16(row[k]), b[k / 2][k % 2] = as_bf16(column[k]);
        float starts[kTileColumns] = {start}, out[kTileColumns];
        EmulatedTiles::configure(configuration_of({1, kDepth}));
        EmulatedTiles::load<0>(starts, 0);
        EmulatedTiles::load<4>(a, 0);
        EmulatedTiles::load<6>(b, sizeof b[0]);
        EmulatedTiles::dot<0, 4, 6>();
        EmulatedTiles::store<0>(out, 0);
        EmulatedTiles::release();
        return out[0];
    };
    const auto expect = [&](const char* what, float got, float wanted) {
        if (std::memcmp(&got, &wanted, sizeof got)) found += std::string(found.empty() ? "" : ", ") + what;
    };
    const float infinity = __builtin_inff(), tiny = 0x1p-126f;
    // Odd and even values apart: 1 is lost beside 2^24 only in its own sum.
    expect("even and odd", dot(0, {0x1p24f, 1, 1, 0}, {1, 1, 1, 0}), 0x1p24f);
    expect("odd sums", dot(0, {0x1p24f, 1, 0, 1}, {1, 1, 0, 1}), 0x1p24f + 2);
    // The sum is added last.
    expect("the sum last", dot(0x1p24f, {1, 0, 1, 0}, {1, 0, 1, 0}), 0x1p24f + 2);
    // Ties go to even.
    expect("ties to even", dot(0x1p24f, {3}, {1}), 0x1p24f + 4);
    expect("ties to even, below", dot(0x1p24f + 2, {3}, {1}), 0x1p24f + 4);
    // Products are not rounded before they are added.
    expect("fused", dot(0, {1, 0, 0x1.02p0f}, {-1, 0, 0x1.02p0f}), 0x1.02p0f * 0x1.02p0f - 1);
    expect("overflow", dot(0, {0x1p64f}, {0x1p64f}), infinity);
    expect("overflow that cancels", dot(0, {-0x1.8p127f, 0, 0x1p64f}, {1, 0, 0x1p64f}), 0x1p126f);
    // Denormals are zeros, in and out.
    expect("denormal factor", dot(0, {tiny / 2}, {0x1p10f}), 0);
    expect("denormal product", dot(0, {tiny}, {0.5f}), 0);
    expect("denormal sum", dot(-tiny, {tiny}, {0x1.8p0f}), 0);
    expect("denormal start", dot(tiny / 2, {0}, {0}), 0);
    expect("a number near them", dot(0, {tiny}, {1}), tiny);
    if (dot(0, {infinity}, {0}) == 0) found += " infinity times zero";
    expect("infinity", dot(0, {infinity}, {1}), infinity);
    say("arithmetic", found);
}

// What a product, and its weights' gradient, ask of the unit: dots, loads, stores, configurations.
void count(int rows, int inputs, int columns, int taps) {
    const std::int64_t reach = taps / 2;
    std::vector<bf16> x((rows + 2 * reach) * inputs), w(std::int64_t{taps} * inputs * columns);
    std::vector<float> bias(columns), out(std::int64_t{rows} * columns);
    const Product<bf16> p{w.data(), bias.data(), inputs, columns, taps, 1, columns};
    emulated::product(p, x.data() + reach * inputs, Runs{{0, rows, rows}}, out.data());
    EmulatedUnit& u = emulated_unit;
    std::printf("%ld %ld %ld %ld\n", u.dots, u.loads, u.stores, u.configurations);
    u = EmulatedUnit{};
    std::vector<bf16> gradient((rows + 2 * reach) * columns);
    std::vector<float> sums(w.size());
    emulated::direct_weight_gradient(WeightGradient<bf16>{x.data(), gradient.data(), sums.data(), inputs, columns, taps, 1}, reach,
                              rows + reach, 1);
    std::printf("%ld %ld %ld %ld\n", u.dots, u.loads, u.stores, u.configurations);
}

#ifndef PBF_EMULATED_ALONE
// The emulator's bits, where there is hardware: denormals, infinities and numbers of every size.
void check_hardware() {
    std::string why = amx_unsupported(amx_facts(true));
    if (why.empty()) why = amx_refused(request_amx());
    if (!why.empty()) {
        say("hardware", "unavailable: " + why);
        return;
    }
    std::string found = check_amx<HardwareTiles>(hardware::product, pack);
    constexpr int inputs = 96, columns = 80, rows = 45;
    std::uint32_t state = 7;
    for (const int spread : {4, 60, 255}) {
        std::vector<bf16> x(rows * inputs), w(inputs * columns), packed(w.size());
        for (auto* values : {&x, &w})
            for (bf16& value : *values) {
                state = state * 1664525u + 1013904223u;
                const std::uint32_t exponent = 127 - spread / 2 + (state >> 20) % (spread + 1);
                value = static_cast<bf16>((state >> 16 & 0x8000u) | std::min(exponent, 254u) << 7 | (state >> 9 & 0x7fu));
            }
        std::vector<float> theirs(rows * columns), ours(theirs.size());
        const Product<bf16> p{packed.data(), nullptr, inputs, columns, 1, 1, columns};
        for (int c = 0; c < columns; ++c) pack(w.data() + c, columns, 0, p, c, packed.data());
        hardware::product(p, x.data(), Runs{{0, rows, rows}}, theirs.data());
        emulated::product(p, x.data(), Runs{{0, rows, rows}}, ours.data());
        for (std::size_t i = 0; i < ours.size(); ++i) {
            const bool nan = ours[i] != ours[i] && theirs[i] != theirs[i];
            if (!nan && std::memcmp(&ours[i], &theirs[i], sizeof(float))) found = "other bits than the emulator's";
        }
    }
    say("hardware", found);
}

void wrong_row(const Product<bf16>& p, const bf16* x, const Runs& runs, float* out) {
    emulated::product(p, x, runs, out);
    out[std::int64_t{runs[0].first + runs[0].rows - 1} * p.out_stride + p.columns - 1] += 1;
}

void slightly_wrong(const Product<bf16>& p, const bf16* x, const Runs& runs, float* out) {
    emulated::product(p, x, runs, out);
    for (int i = 0; i < p.columns; ++i) out[std::int64_t{runs[0].first} * p.out_stride + i] *= 1.001f;
}

void writes_beyond(const Product<bf16>& p, const bf16* x, const Runs& runs, float* out) {
    emulated::product(p, x, runs, out);
    if (runs[0].first) out[std::int64_t{runs[0].first + runs[0].rows} * p.out_stride] = 0;
}

void by_neighbors(const Product<bf16>& p, const bf16* x, const Runs& runs, float* out) {
    emulated::product(p, x, runs, out);
    if (runs[0].rows > 16) out[std::int64_t{runs[0].first + 16} * p.out_stride] += 0x1p-20f;
}

void illegal(const Product<bf16>&, const bf16*, const Runs&, float*) { asm volatile("ud2"); }

void of_hardware(const Product<bf16>&, const bf16*, const Runs&, float*) { HardwareTiles::zero<0>(); }

void faults(const Product<bf16>&, const bf16*, const Runs&, float*) {
    asm volatile("movb $0, (%0)" ::"r"(std::uintptr_t{1} << 63) : "memory");  // no such address: as a bad configuration, #GP
}

struct ForgetfulTiles : EmulatedTiles {
    template <int TILE>
    static void store(void* to, std::int64_t stride) {
        zero<TILE>();
        EmulatedTiles::store<TILE>(to, stride);
    }
};

volatile std::sig_atomic_t of_others = 0;
sigjmp_buf other_back;

void others(int) {
    of_others = of_others + 1;
    siglongjmp(other_back, 1);
}

// Handlers of the user's are as before, and get what other threads do in the meantime.
void check_guard() {
    std::string found;
    struct sigaction before {}, after {};
    std::signal(SIGILL, others);
    sigaction(SIGSEGV, nullptr, &before);
    const std::string none = Guard::run([] {
        std::thread([] {
            if (!sigsetjmp(other_back, 1)) asm volatile("ud2");
        }).join();
    });
    if (!none.empty() || of_others != 1) found = "another thread's signal is lost";
    for (int i = 0; i < 3; ++i)
        if (Guard::run([] { asm volatile("ud2"); }) != "an illegal instruction") found = "not caught";
    if (!Guard::run([] {}).empty()) found = "caught nothing";
    if (std::signal(SIGILL, SIG_DFL) != others) found = "the handler is not as before";
    sigaction(SIGSEGV, nullptr, &after);
    if (after.sa_sigaction != before.sa_sigaction) found = "the handler of SIGSEGV is not as before";
    say("guard", found);
}

void check_facts() {
    constexpr std::uint32_t both = 1u << 24 | 1u << 22;
    constexpr std::uint64_t saved = 3u << 17 | 0xe7;
    const auto told = [](const char* name, const AmxFacts& facts) { say(name, amx_unsupported(facts)); };
    told("all", {true, both, true, saved});
    told("no tiles", {true, both & ~(1u << 24), true, saved});
    told("no bfloat16", {true, both & ~(1u << 22), true, saved});
    told("no AVX-512", {false, both, true, saved});
    told("no osxsave", {true, both, false, 0});
    told("no configuration saved", {true, both, true, saved & ~(1u << 17)});
    told("no data saved", {true, both, true, saved & ~(1u << 18)});
    for (const int error : {0, EINVAL, ENOSPC, EPERM}) say("errno " + std::to_string(error), amx_refused(error));
    const AmxFacts here = amx_facts(true);
    const auto saved_here = static_cast<unsigned long long>(here.xcr0);
    std::printf("here: %d %d %llx\n", static_cast<int>(here.leaf7_edx >> 24 & 1), here.osxsave, saved_here);
}
#endif

}  // namespace

int main(int, char** arguments) {
    const std::string what = arguments[1];
    if (what == "products") {
        check_products(emulated::product, pack);
        check_runs(emulated::product, pack);
        check_weight_gradients(emulated::direct_weight_gradient<bf16>);
#ifdef PBF_EMULATED_ALONE
#define PBF_CHECK(mistake)                                     \
    } else if (what == #mistake) {                             \
        check_products(mistake::product, mistake::pack_column<bf16, bf16>); \
        check_runs(mistake::product, mistake::pack_column<bf16, bf16>);     \
        check_weight_gradients(mistake::direct_weight_gradient<bf16>);
        PBF_MISTAKES(PBF_CHECK)
#endif
    } else if (what == "arithmetic") {
        check_arithmetic();
    } else if (what == "count") {
        count(std::atoi(arguments[2]), std::atoi(arguments[3]), std::atoi(arguments[4]), std::atoi(arguments[5]));
#ifndef PBF_EMULATED_ALONE
    } else if (what == "products of 512 bits") {
        const AmxPack pack_512 = emulated_512::pack_column<bf16, bf16>;
        check_products(emulated_512::product, pack_512);
        check_runs(emulated_512::product, pack_512);
        check_weight_gradients(emulated_512::direct_weight_gradient<bf16>);
    } else if (what == "self-check") {
        say("wrong row", check_amx<EmulatedTiles>(wrong_row, pack));
        say("slightly wrong", check_amx<EmulatedTiles>(slightly_wrong, pack));
        say("writes beyond", check_amx<EmulatedTiles>(writes_beyond, pack));
        say("by neighbors", check_amx<EmulatedTiles>(by_neighbors, pack));
        say("illegal", check_amx<EmulatedTiles>(illegal, pack));
        say("faults", check_amx<EmulatedTiles>(faults, pack));
        say("forgetful", check_amx<ForgetfulTiles>(emulated::product, pack));
        say("hardware", check_amx<HardwareTiles>(emulated::product, pack));
        say("hardware's products", check_amx<EmulatedTiles>(of_hardware, pack));
        check_guard();
    } else if (what == "hardware") {
        check_hardware();
    } else if (what == "facts") {
        check_facts();
#endif
    } else {
        TileConfiguration c = configuration_of({32, 32});
        float numbers[16] = {};
        if (what == "palette") c.palette = 2;
        if (what == "start row") c.start_row = 1;
        if (what == "reserved") c.reserved[5] = 1;
        if (what == "too many rows") c.rows[4] = 17;
        if (what == "too wide") c.row_bytes[6] = 68;
        if (what == "rows without bytes") c.row_bytes[0] = 0;
        if (what == "ninth tile") c.rows[8] = 1;
        if (what == "sums too low") c.rows[0] = 4;
        if (what == "weights too low") c.rows[6] = 8;
        if (what != "unconfigured") EmulatedTiles::configure(c);
        if (what == "released") EmulatedTiles::release();
        if (what == "no such tile") EmulatedTiles::configure(configuration_of({16, 32}));
        if (what == "no such tile") EmulatedTiles::zero<2>();
        if (what != "not zeroed") EmulatedTiles::zero<0>();
        if (what != "not loaded") EmulatedTiles::load<4>(numbers, 0);
        EmulatedTiles::load<6>(numbers, 0);
        EmulatedTiles::dot<0, 4, 6>();
        if (what == "stored nothing") EmulatedTiles::store<1>(numbers, 0);
        EmulatedTiles::store<0>(numbers, 0);
        if (what == "stored before") EmulatedTiles::dot<0, 4, 6>();
        std::puts("not found");
    }
    return 0;
}
