// A software model of AMX's tile registers, for tests on processors without them: included by simd_tiles.h
// when MAGNET_FAST_EMULATE_AMX is defined, in place of the intrinsics. One function for every instruction,
// named like its intrinsic.
//
// Written from the instructions' descriptions in Intel's Software Developer's Manual, volume 2, and the
// palette in volume 1, chapter "Programming with Intel AMX". What faults there (a wrong configuration, tiles
// that are not configured or do not fit together) throws here, and so does what would be lost silently: a
// tile that is stored or multiplied without having been loaded. Not modelled: start_row after an interrupted
// load, timing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace magnet_fast {
namespace tile_emulation {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;  // palette 1

struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Tile {
    int rows = 0, row_bytes = 0;  // 0: not configured
    bool loaded = false;
    alignas(64) unsigned char data[kMostRows][kMostBytes] = {};

    float number(int row, int column) const {
        float value;
        std::memcpy(&value, data[row] + 4 * column, sizeof value);
        return value;
    }
    /// bfloat16 number `index` of a row; subnormal ones count as zero.
    float low_number(int row, int index) const {
        uint16_t bits;
        std::memcpy(&bits, data[row] + 2 * index, sizeof bits);
        const uint32_t wide = static_cast<uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
    }
};

struct Registers {
    bool configured = false;
    Tile tiles[kTiles];
    int64_t products = 0;  // TDPBF16PS executed, for tests
};

/// Those of the calling thread.
inline Registers& registers() {
    static thread_local Registers all;
    return all;
}

/// #UD unless the tile is configured.
inline Tile& tile(int index) {
    if (index < 0 || index >= kTiles) throw Fault("tile " + std::to_string(index) + " does not exist");
    Tile& found = registers().tiles[index];
    if (!registers().configured || found.rows == 0)
        throw Fault("tile " + std::to_string(index) + " is not configured");
    return found;
}

inline void release() {
    registers().configured = false;
    for (Tile& each : registers().tiles) each = Tile();
}

/// LDTILECFG; #GP for a configuration that it refuses.
inline void loadconfig(const void* memory) {
    unsigned char bytes[64];
    std::memcpy(bytes, memory, sizeof bytes);
    if (bytes[0] > 1) throw Fault("palette " + std::to_string(bytes[0]) + " does not exist");
    release();
    if (bytes[0] == 0) return;
    if (bytes[1] != 0) throw Fault("start_row is " + std::to_string(bytes[1]));
    for (int at = 2; at < 64; ++at) {
        const bool used = (at >= 16 && at < 16 + 2 * kTiles) || (at >= 48 && at < 48 + kTiles);
        if (!used && bytes[at] != 0) throw Fault("reserved byte " + std::to_string(at) + " is not zero");
    }
    for (int t = 0; t < kTiles; ++t) {
        Tile& each = registers().tiles[t];
        each.row_bytes = bytes[16 + 2 * t] | bytes[17 + 2 * t] << 8;
        each.rows = bytes[48 + t];
        if (each.rows > kMostRows || each.row_bytes > kMostBytes || !each.rows != !each.row_bytes)
            throw Fault("tile " + std::to_string(t) + ": " + std::to_string(each.rows) + " rows of " +
                        std::to_string(each.row_bytes) + " bytes");
    }
    registers().configured = true;
}

inline void zero(int index) {
    Tile& to = tile(index);
    std::memset(to.data, 0, sizeof to.data);
    to.loaded = true;
}

/// TILELOADD: rows `stride` bytes apart; what lies past the tile's rows and bytes becomes zero.
inline void loadd(int index, const void* memory, int64_t stride) {
    zero(index);
    Tile& to = tile(index);
    for (int row = 0; row < to.rows; ++row)
        std::memcpy(to.data[row], static_cast<const char*>(memory) + row * stride, to.row_bytes);
}

/// TILESTORED.
inline void stored(int index, void* memory, int64_t stride) {
    const Tile& from = tile(index);
    if (!from.loaded) throw Fault("tile " + std::to_string(index) + " is stored before it is written");
    for (int row = 0; row < from.rows; ++row)
        std::memcpy(static_cast<char*>(memory) + row * stride, from.data[row], from.row_bytes);
}

/// Subnormal results are zeros of their sign.
inline float flushed(float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

/// TDPBF16PS: sums += a * b. The even and the odd numbers of the pairs are summed apart along the depth, from
/// zero, each product and addition rounded once to nearest even; then both sums are added, and that to the
/// tile.
inline void dpbf16ps(int sums, int a, int b) {
    Tile& c = tile(sums);
    const Tile &left = tile(a), &right = tile(b);
    if (sums == a || sums == b || a == b) throw Fault("the tiles of a product must be three");
    if (left.row_bytes % 4 || right.row_bytes % 4 || c.row_bytes % 4 || left.rows != c.rows ||
        left.row_bytes / 4 != right.rows || right.row_bytes != c.row_bytes)
        throw Fault("tiles " + std::to_string(sums) + ", " + std::to_string(a) + " and " + std::to_string(b) +
                    " do not fit together");
    if (!c.loaded || !left.loaded || !right.loaded) throw Fault("a product of tiles that are not loaded");
    for (int m = 0; m < c.rows; ++m) {
        for (int n = 0; n < c.row_bytes / 4; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < left.row_bytes / 4; ++k) {
                even = flushed(std::fma(left.low_number(m, 2 * k), right.low_number(k, 2 * n), even));
                odd = flushed(std::fma(left.low_number(m, 2 * k + 1), right.low_number(k, 2 * n + 1), odd));
            }
            const float sum = flushed(flushed(c.number(m, n)) + flushed(even + odd));
            std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
        }
    }
    ++registers().products;
}

}  // namespace tile_emulation
}  // namespace magnet_fast
