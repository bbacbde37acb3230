// The tile unit in plain C++, for tests on CPUs without AMX: the arithmetic of Intel's pseudocode to the bit, and an end of the
// process where the hardware would raise an exception or a product could depend on what a tile held before.
#pragma once

#include <xmmintrin.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tile_unit.h"

namespace pbf {

struct EmulatedTile {
    enum State { unknown, filled, stored };
    int rows = 0, row_bytes = 0;
    State state = unknown;
    alignas(64) unsigned char bytes[16][64];
};

struct EmulatedUnit {
    bool configured = false;
    long configurations = 0, loads = 0, dots = 0, stores = 0;
    EmulatedTile tiles[8];
};
inline thread_local EmulatedUnit emulated_unit;

class EmulatedTiles {
public:
    static void configure(const TileConfiguration& c) {
        if (c.palette != 1) fail("LDTILECFG: palette is %d, not 1", c.palette);
        if (c.start_row) fail("LDTILECFG: start row is %d, not 0", c.start_row);
        for (int i = 0; i < 14; ++i)
            if (c.reserved[i]) fail("LDTILECFG: reserved byte %d is not 0", 2 + i);
        for (int i = 0; i < 16; ++i) {
            if (i >= 8 && (c.rows[i] || c.row_bytes[i])) fail("LDTILECFG: there is no tile %d", i);
            if (c.rows[i] > 16 || c.row_bytes[i] > 64 || c.row_bytes[i] % 4 || !c.rows[i] != !c.row_bytes[i])
                fail("LDTILECFG: tile %d cannot have %d rows of %d bytes", i, c.rows[i], c.row_bytes[i]);
        }
        emulated_unit.configured = true;
        ++emulated_unit.configurations;
        for (int i = 0; i < 8; ++i) {
            EmulatedTile& tile = emulated_unit.tiles[i];
            tile.rows = c.rows[i], tile.row_bytes = c.row_bytes[i];
            // Zeros in hardware; here, a product that relies on that is found. All ones are NaN.
            tile.state = EmulatedTile::unknown;
            std::memset(tile.bytes, 0xff, sizeof tile.bytes);
        }
    }

    static void release() { emulated_unit.configured = false; }

    template <int TILE>
    static void zero() {
        EmulatedTile& tile = of("TILEZERO", TILE);
        std::memset(tile.bytes, 0, sizeof tile.bytes);
        tile.state = EmulatedTile::filled;
    }

    template <int TILE>
    static void load(const void* from, std::int64_t stride) {
        EmulatedTile& tile = of("TILELOADD", TILE);
        std::memset(tile.bytes, 0, sizeof tile.bytes);
        for (int r = 0; r < tile.rows; ++r)
            std::memcpy(tile.bytes[r], static_cast<const unsigned char*>(from) + r * stride, tile.row_bytes);
        tile.state = EmulatedTile::filled;
        ++emulated_unit.loads;
    }

    template <int SUMS, int ROWS, int WEIGHTS>
    static void dot() {
        static_assert(SUMS != ROWS && SUMS != WEIGHTS && ROWS != WEIGHTS);
        EmulatedTile &sums = of("TDPBF16PS", SUMS), &rows = of("TDPBF16PS", ROWS), &weights = of("TDPBF16PS", WEIGHTS);
        if (sums.rows != rows.rows || sums.row_bytes != weights.row_bytes || rows.row_bytes / 4 != weights.rows)
            fail("TDPBF16PS: tiles %d, %d, %d of %dx%d, %dx%d, %dx%d bytes do not fit", SUMS, ROWS, WEIGHTS, sums.rows,
                 sums.row_bytes, rows.rows, rows.row_bytes, weights.rows, weights.row_bytes);
        for (int tile : {SUMS, ROWS, WEIGHTS}) {
            if (emulated_unit.tiles[tile].state == EmulatedTile::unknown)
                fail("TDPBF16PS: tile %d was neither loaded nor set to zeros", tile);
            if (emulated_unit.tiles[tile].state == EmulatedTile::stored)
                fail("TDPBF16PS: tile %d was stored, and neither loaded nor set to zeros since", tile);
        }
        // Round to nearest even, denormals in and out are zeros, no exceptions, whatever the thread has set.
        const unsigned before = _mm_getcsr();
        _mm_setcsr(0x9fc0);
        multiply(sums, rows, weights);
        _mm_setcsr(before);
        ++emulated_unit.dots;
    }

    template <int TILE>
    static void store(void* to, std::int64_t stride) {
        EmulatedTile& tile = of("TILESTORED", TILE);
        if (tile.state != EmulatedTile::filled) fail("TILESTORED: tile %d holds nothing", TILE);
        for (int r = 0; r < tile.rows; ++r)
            std::memcpy(static_cast<unsigned char*>(to) + r * stride, tile.bytes[r], tile.row_bytes);
        tile.state = EmulatedTile::stored;
        ++emulated_unit.stores;
    }

private:
    [[noreturn]] __attribute__((format(printf, 1, 2))) static void fail(const char* format, ...) {
        std::va_list values;
        va_start(values, format);
        std::fputs("emulated tile unit: ", stderr);
        std::vfprintf(stderr, format, values);
        std::fputs("\n", stderr);
        std::abort();
    }

    static EmulatedTile& of(const char* instruction, int tile) {
        if (!emulated_unit.configured) fail("%s: no tiles are configured", instruction);
        if (!emulated_unit.tiles[tile].rows) fail("%s: tile %d has no rows", instruction, tile);
        return emulated_unit.tiles[tile];
    }

    // Even and odd values of a row are summed apart, by fused multiply-adds, then added to one another, then to the sum.
    __attribute__((noinline, target("avx2,fma"))) static void multiply(EmulatedTile& sums, const EmulatedTile& rows,
                                                                       const EmulatedTile& weights) {
        const int pairs = rows.row_bytes / 4;
        float w[2][16][16] = {};
        for (int k = 0; k < pairs; ++k)
            for (int n = 0; n < weights.row_bytes / 4; ++n)
                for (int i = 0; i < 2; ++i) w[i][k][n] = number(weights.bytes[k] + 4 * n + 2 * i);
        for (int m = 0; m < sums.rows; ++m) {
            float even[16] = {}, odd[16] = {}, total[16];
            for (int k = 0; k < pairs; ++k) {
                const float first = number(rows.bytes[m] + 4 * k), second = number(rows.bytes[m] + 4 * k + 2);
                for (int n = 0; n < 16; ++n) even[n] = __builtin_fmaf(first, w[0][k][n], even[n]);
                for (int n = 0; n < 16; ++n) odd[n] = __builtin_fmaf(second, w[1][k][n], odd[n]);
            }
            std::memcpy(total, sums.bytes[m], sizeof total);
            for (int n = 0; n < 16; ++n) total[n] += even[n] + odd[n];
            std::memcpy(sums.bytes[m], total, sums.row_bytes);
        }
    }

    static float number(const unsigned char* bf16_at) {
        std::uint16_t upper;
        std::memcpy(&upper, bf16_at, sizeof upper);
        const std::uint32_t bits = std::uint32_t{upper} << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

}  // namespace pbf
