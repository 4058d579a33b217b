// Matrix products of pairs of bfloat16 on the tile registers of AMX; level amx alone.
//
// There are eight tile registers. A configuration gives each its rows (at most 16) and the bytes of a row (at
// most 64); one instruction then adds to a tile of 16 x 16 sums the product of a tile of A (16 rows of 16
// pairs) and one of B (16 rows, the depth in pairs, of 16 columns), which lie in memory as simd_matrix.h's
// operands do. Where rows or depth leave a rest, the tiles are configured anew, as small as the rest: nothing
// past the operands is read or written.
//
// A product configures the tiles of the calling thread itself and releases them at its end, so that the
// operating system has no tiles to save while other code runs.
#pragma once

#include "cpu/simd_pair.h"
#include "cpu/simd_transpose.h"

#if defined(MAGNET_FAST_SIMD_AMX)

#if defined(MAGNET_FAST_EMULATE_AMX)
#include "cpu/tile_emulation.h"
#define MAGNET_FAST_TILE(operation, ...) tile_emulation::operation(__VA_ARGS__)
#else
// Macros that write the number of a register into the instruction: it must be a literal.
#define MAGNET_FAST_TILE(operation, ...) _tile_##operation(__VA_ARGS__)
#endif

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

constexpr int64_t kTileHeight = 16, kTilePairs = 16, kTileBytes = 64;

/// What LDTILECFG reads.
struct alignas(64) TileConfiguration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfiguration) == 64);

/// The intrinsics do not tell the compiler that they read memory: what was written before must be in it.
static inline void finish_writes(const void* memory) {
    asm volatile("" : : "r"(memory) : "memory");
}

/// Tiles 0 to 3 for sums, two by two; 4 and 5 for A; 6 and 7 for B. `height` rows above, `below` in 2, 3
/// and 5.
static inline void configure_tiles(int64_t height, int64_t below, int64_t pairs) {
    TileConfiguration c = {};
    c.palette = 1;
    for (int t = 0; t < 8; ++t) {
        const bool lower = t == 2 || t == 3 || t == 5;
        c.rows[t] = static_cast<uint8_t>(t >= 6 ? pairs : lower ? below : height);
        c.row_bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * pairs : kTileBytes);
    }
    finish_writes(&c);
    MAGNET_FAST_TILE(loadconfig, &c);
}

/// A (height x pairs) where each row is contiguous: in place, or transposed into `room`.
struct TileRows {
    const Pair* first;
    int64_t bytes;  // from row to row

    TileRows(int64_t height, int64_t pairs, const Pair* a, int64_t a_row, int64_t a_depth, Pair* room) {
        if (a_depth == 1) {
            first = a;
            bytes = a_row * static_cast<int64_t>(sizeof(Pair));
            return;
        }
        // Neighbouring rows lie side by side (a_row is 1); moved as words of 32 bits, whatever they mean.
        Vec v[kLanes];
        for (int64_t k = 0; k < kLanes; ++k)
            v[k] = k < pairs ? load_part(reinterpret_cast<const float*>(a + k * a_depth), height)
                             : broadcast(0.0f);
        transpose(v);
        for (int64_t m = 0; m < kLanes; ++m) store(reinterpret_cast<float*>(room + m * kTilePairs), v[m]);
        finish_writes(room);
        first = room;
        bytes = kTilePairs * static_cast<int64_t>(sizeof(Pair));
    }
};

/// One or two tiles of rows by one or two of columns: C = init + A * B, `pairs` of the depth at a step.
/// InPlace: A has contiguous rows.
template <bool TwoDown, bool TwoAcross, bool InPlace, typename Ahead>
static inline void tile_block(Ahead& ahead, int64_t height, int64_t depth, int64_t pairs, const Pair* a,
                              int64_t a_row, int64_t a_depth, const Pair* b, int64_t b_depth,
                              const Real* init, int64_t init_row, Real* c, int64_t c_row) {
    const int64_t init_bytes = init_row * static_cast<int64_t>(sizeof(Real)),
                  c_bytes = c_row * static_cast<int64_t>(sizeof(Real)),
                  b_bytes = b_depth * static_cast<int64_t>(sizeof(Pair));
    if (init) {
        const Real* below = init + height * init_row;
        MAGNET_FAST_TILE(loadd, 0, init, init_bytes);
        if constexpr (TwoAcross) MAGNET_FAST_TILE(loadd, 1, init + kLanes, init_bytes);
        if constexpr (TwoDown) MAGNET_FAST_TILE(loadd, 2, below, init_bytes);
        if constexpr (TwoDown && TwoAcross) MAGNET_FAST_TILE(loadd, 3, below + kLanes, init_bytes);
    } else {
        MAGNET_FAST_TILE(zero, 0);
        if constexpr (TwoAcross) MAGNET_FAST_TILE(zero, 1);
        if constexpr (TwoDown) MAGNET_FAST_TILE(zero, 2);
        if constexpr (TwoDown && TwoAcross) MAGNET_FAST_TILE(zero, 3);
    }
    alignas(64) Pair room[2][kTileHeight * kTilePairs];
    const int64_t a_bytes = a_row * static_cast<int64_t>(sizeof(Pair));
    for (int64_t k = 0; k < depth; k += pairs, a += pairs * a_depth, b += pairs * b_depth) {
        for (int64_t step = 0; step < pairs; ++step) ahead.step();
        if constexpr (InPlace) {
            MAGNET_FAST_TILE(loadd, 4, a, a_bytes);
        } else {
            const TileRows upper(height, pairs, a, a_row, a_depth, room[0]);
            MAGNET_FAST_TILE(loadd, 4, upper.first, upper.bytes);
        }
        MAGNET_FAST_TILE(loadd, 6, b, b_bytes);
        MAGNET_FAST_TILE(dpbf16ps, 0, 4, 6);
        if constexpr (TwoAcross) {
            MAGNET_FAST_TILE(loadd, 7, b + kLanes, b_bytes);
            MAGNET_FAST_TILE(dpbf16ps, 1, 4, 7);
        }
        if constexpr (TwoDown) {
            if constexpr (InPlace) {
                MAGNET_FAST_TILE(loadd, 5, a + height * a_row, a_bytes);
            } else {
                const TileRows lower(height, pairs, a + height * a_row, a_row, a_depth, room[1]);
                MAGNET_FAST_TILE(loadd, 5, lower.first, lower.bytes);
            }
            MAGNET_FAST_TILE(dpbf16ps, 2, 5, 6);
            if constexpr (TwoAcross) MAGNET_FAST_TILE(dpbf16ps, 3, 5, 7);
        }
    }
    Real* below = c + height * c_row;
    MAGNET_FAST_TILE(stored, 0, c, c_bytes);
    if constexpr (TwoAcross) MAGNET_FAST_TILE(stored, 1, c + kLanes, c_bytes);
    if constexpr (TwoDown) MAGNET_FAST_TILE(stored, 2, below, c_bytes);
    if constexpr (TwoDown && TwoAcross) MAGNET_FAST_TILE(stored, 3, below + kLanes, c_bytes);
}

/// multiply() for rows that are a multiple of `height` and a depth that is one of `pairs`, tiles of that
/// size.
template <typename Ahead>
static void multiply_tiles(Ahead& ahead, int64_t height, int64_t pairs, int64_t rows, int64_t columns,
                           int64_t depth, const Pair* a, int64_t a_row, int64_t a_depth, const Pair* b,
                           int64_t b_depth, const Real* init, int64_t init_row, Real* c, int64_t c_row) {
    configure_tiles(height, height, pairs);
    for (int64_t m = 0; m < rows;) {
        const bool two_down = m + height < rows;
        for (int64_t n = 0; n < columns;) {
            const bool two_across = n + kLanes < columns;
            const Real* from = init ? init + m * init_row + n : nullptr;
            const auto block = two_down ? (two_across ? tile_block<true, true, false, Ahead>
                                                      : tile_block<true, false, false, Ahead>)
                                        : (two_across ? tile_block<false, true, false, Ahead>
                                                      : tile_block<false, false, false, Ahead>);
            block(ahead, height, depth, pairs, a + m * a_row, a_row, a_depth, b + n, b_depth, from, init_row,
                  c + m * c_row + n, c_row);
            n += two_across ? 2 * kLanes : kLanes;
        }
        m += two_down ? 2 * height : height;
    }
}

/// multiply() of simd_matrix.h. A has contiguous rows or (a_row 1) contiguous columns.
template <typename Ahead>
static void multiply(Ahead& ahead, int64_t rows, int64_t columns, int64_t depth, const Pair* a, int64_t a_row,
                     int64_t a_depth, const Pair* b, int64_t b_depth, const Real* init, int64_t init_row,
                     Real* c, int64_t c_row, Vec* top = nullptr) {
    const int64_t whole_rows = rows / kTileHeight * kTileHeight,
                  whole_depth = depth / kTilePairs * kTilePairs;
    // Whole tiles and the rest, along the rows and along the depth.
    for (int64_t m = 0, count = 0; m < rows; m += count) {
        const int64_t height = m < whole_rows ? kTileHeight : rows - m;
        count = m < whole_rows ? whole_rows : height;
        for (int64_t k = 0, deep = 0; k < depth; k += deep) {
            const int64_t pairs = k < whole_depth ? kTilePairs : depth - k;
            deep = k < whole_depth ? whole_depth : pairs;
            const Real* from = k ? c : init;
            const int64_t from_row = k ? c_row : init_row;
            multiply_tiles(ahead, height, pairs, count, columns, deep, a + m * a_row + k * a_depth, a_row,
                           a_depth, b + k * b_depth, b_depth, from ? from + m * from_row : nullptr, from_row,
                           c + m * c_row, c_row);
        }
    }
    MAGNET_FAST_TILE(release, );
    for (int64_t m = 0; top && m < rows; ++m) {
        top[m] = load(c + m * c_row);
        for (int64_t n = kLanes; n < columns; n += kLanes) top[m] = maximum(top[m], load(c + m * c_row + n));
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
