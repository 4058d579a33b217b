// Small matrix products on packed numbers, in registers; compiled once per SIMD level like simd.h.
#pragma once

#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// A register tile of C = init + A * B: Rows x (Vectors * kLanes), depth steps of one broadcast of A and one
/// row of B. A is addressed as a[row * a_row + k * a_depth], so that A and its transpose are both read in
/// place. init null: zeros.
template <int Rows, int Vectors>
static void tile(int64_t depth, const Real* a, int64_t a_row, int64_t a_depth, const Real* b, int64_t b_depth,
                 const Real* init, int64_t init_row, Real* c, int64_t c_row) {
    Vec sum[Rows][Vectors];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Vectors; ++n)
            sum[m][n] = init ? load(init + m * init_row + n * kLanes) : broadcast(0);
    // One pointer per three rows: base, base + a_row and base + 2 * a_row are all one x86 address.
    const Real* base[(Rows + 2) / 3];
    for (int g = 0; g < (Rows + 2) / 3; ++g) base[g] = a + 3 * g * a_row;
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[Vectors];
        for (int n = 0; n < Vectors; ++n) row[n] = load(b + n * kLanes);
        b += b_depth;
        for (int m = 0; m < Rows; ++m) {
            const Vec scalar = broadcast(base[m / 3][(m % 3) * a_row]);
            for (int n = 0; n < Vectors; ++n) sum[m][n] = multiply_add(scalar, row[n], sum[m][n]);
        }
        for (int g = 0; g < (Rows + 2) / 3; ++g) base[g] += a_depth;
    }
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Vectors; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
}

template <int Vectors>
static void panel(int64_t rows, int64_t depth, const Real* a, int64_t a_row, int64_t a_depth, const Real* b,
                  int64_t b_depth, const Real* init, int64_t init_row, Real* c, int64_t c_row) {
    // Tiles of nearly equal height: 49 rows are better cut into seven tiles of 7 than into six of 8 and one
    // of 1.
    int64_t tiles = (rows + kTileRows[Vectors] - 1) / kTileRows[Vectors];
    for (int64_t m = 0; m < rows; --tiles) {
        const int64_t height = (rows - m + tiles - 1) / tiles;
        const Real* at = a + m * a_row;
        const Real* init_at = init ? init + m * init_row : nullptr;
        Real* ct = c + m * c_row;
        switch (height) {
#define MAGNET_FAST_TILE(R)                                                                        \
    case R:                                                                                        \
        if constexpr (R <= kTileRows[Vectors])                                                     \
            tile<R, Vectors>(depth, at, a_row, a_depth, b, b_depth, init_at, init_row, ct, c_row); \
        break;
            MAGNET_FAST_TILE(1)
            MAGNET_FAST_TILE(2)
            MAGNET_FAST_TILE(3)
            MAGNET_FAST_TILE(4)
            MAGNET_FAST_TILE(5)
            MAGNET_FAST_TILE(6)
            MAGNET_FAST_TILE(7)
            MAGNET_FAST_TILE(8)
            MAGNET_FAST_TILE(9)
            MAGNET_FAST_TILE(10)
            MAGNET_FAST_TILE(11)
            MAGNET_FAST_TILE(12)
#undef MAGNET_FAST_TILE
        }
        m += height;
    }
}

/// C (rows x columns) = init + A (rows x depth) * B (depth x columns); columns is a multiple of kLanes, B and
/// C have contiguous rows. init null: zeros; init == c: accumulate.
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const Real* a, int64_t a_row,
                            int64_t a_depth, const Real* b, int64_t b_depth, const Real* init,
                            int64_t init_row, Real* c, int64_t c_row) {
    for (int64_t n = 0, left = columns / kLanes; left > 0;) {
        // 3 + 3 + ... with a remainder of 1 taken as 2 + 2: a tile one vector wide waits on its own
        // additions.
        const int64_t wide = left == 1 ? 1 : (left == 2 || left == 4) ? 2 : 3;
        const Real* init_at = init ? init + n : nullptr;
        if (wide == 3)
            panel<3>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row);
        else if (wide == 2)
            panel<2>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row);
        else
            panel<1>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row);
        n += wide * kLanes;
        left -= wide;
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
