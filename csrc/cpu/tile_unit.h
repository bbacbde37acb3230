// AMX's tile unit: eight tiles of 16 rows of 64 bytes, and the instruction that multiplies bfloat16 (TDPBF16PS).
//
// The products of tile_product.h are written against the functions of HardwareTiles; EmulatedTiles of tile_emulator.h has the
// same ones. Tiles have fixed roles: sums 2 * i + j, rows 4 + i and weights 6 + j, for i and j in {0, 1}.
//
// Linux saves the tiles of a thread like its other registers. Its permission to use them is the process's: all threads have
// it, those that started before it was asked for too, and so have children of fork(). The configuration is each thread's own.
#pragma once

#include <cstdint>

namespace pbf {

// What LDTILECFG reads.
struct alignas(64) TileConfiguration {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

constexpr int kTileRows = 16, kTileColumns = 16;
constexpr int kDepth = 32;  // bfloat16 of a row that one instruction multiplies, at most

// What a product takes of the unit: two tiles of rows, or one that is lower, and two of columns, `depth` values deep.
struct TileShape {
    int rows;   // 1 to kTileRows, or 2 * kTileRows
    int depth;  // 16 or 32

    bool operator==(const TileShape& other) const { return rows == other.rows && depth == other.depth; }
};

inline TileConfiguration configuration_of(const TileShape& shape) {
    TileConfiguration c{};
    const auto set = [&](int tile, int rows, int row_bytes) {
        c.rows[tile] = static_cast<std::uint8_t>(rows);
        c.row_bytes[tile] = static_cast<std::uint16_t>(row_bytes);
    };
    c.palette = 1;
    for (int i = 0; i < 2; ++i) {
        set(6 + i, shape.depth / 2, 4 * kTileColumns);
        if (i * kTileRows >= shape.rows) continue;
        const int rows = shape.rows < kTileRows ? shape.rows : kTileRows;
        for (int j = 0; j < 2; ++j) set(2 * i + j, rows, 4 * kTileColumns);
        set(4 + i, rows, 2 * shape.depth);
    }
    return c;
}

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define PBF_AMX 1

// Not the compiler's intrinsics: GCC's do not say that LDTILECFG and TILELOADD read memory, so that it may drop or delay the
// stores that fill it.
struct HardwareTiles {
#define PBF_TILE_FUNCTION __attribute__((target("amx-tile,amx-bf16"))) static void
    PBF_TILE_FUNCTION configure(const TileConfiguration& c) { asm volatile("ldtilecfg %0" ::"m"(c)); }

    // Without it, every switch of threads and every signal would save 8 KB more.
    PBF_TILE_FUNCTION release() { asm volatile("tilerelease"); }

    template <int TILE>
    PBF_TILE_FUNCTION zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
    }

    // `stride` bytes from row to row.
    template <int TILE>
    PBF_TILE_FUNCTION load(const void* from, std::int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
    }

    // sums += rows * weights.
    template <int SUMS, int ROWS, int WEIGHTS>
    PBF_TILE_FUNCTION dot() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(ROWS), "i"(WEIGHTS));
    }

    template <int TILE>
    PBF_TILE_FUNCTION store(void* to, std::int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
    }
#undef PBF_TILE_FUNCTION
};
#endif

}  // namespace pbf
