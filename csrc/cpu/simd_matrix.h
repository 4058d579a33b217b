// Small matrix products on packed numbers, in registers; compiled once per SIMD level like simd.h.
//
// The operands are words of one of two kinds: Real, or (levels avx512_bf16 and amx) pairs of bfloat16 that
// are neighbours along the depth, whose products are added to the sum by one instruction. The sums are Real.
//
// Level amx multiplies pairs in simd_tiles.h instead. A product can fetch what the next one will read: its
// inner loop calls ahead.step() at every step.
#pragma once

#include "cpu/simd_pair.h"
#include "cpu/simd_tiles.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Words of a panel's depth that are multiplied at a time.
constexpr int64_t kDepthAtATime = 128;

/// For a product that fetches nothing.
struct Nothing {
    static inline void step() {}
};

/// A register tile of C = init + A * B: Rows x (Vectors * kLanes), depth steps of one broadcast of A and one
/// row of B. A is addressed as a[row * a_row + k * a_depth], so that A and its transpose are both read in
/// place. init null: zeros. top, unless null, takes the maximum of every row of C and of what it holds.
///
/// Always inlined: a call would end with vzeroupper, which waits for every product in flight.
template <int Rows, int Vectors, typename Word, typename Ahead>
static inline __attribute__((always_inline)) void tile(int64_t depth, const Word* a, int64_t a_row,
                                                       int64_t a_depth, const Word* b, int64_t b_depth,
                                                       const Real* init, int64_t init_row, Real* c,
                                                       int64_t c_row, Vec* top, Ahead& outer) {
    Ahead ahead = outer;  // in registers
    Vec sum[Rows][Vectors];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Vectors; ++n)
            sum[m][n] = init ? load(init + m * init_row + n * kLanes) : broadcast(Real{0});
    // One pointer per three rows: base, base + a_row and base + 2 * a_row are all one x86 address.
    const Word* base[(Rows + 2) / 3];
    for (int g = 0; g < (Rows + 2) / 3; ++g) base[g] = a + 3 * g * a_row;
    for (int64_t k = 0; k < depth; ++k) {
        ahead.step();
        decltype(load(b)) row[Vectors];
        for (int n = 0; n < Vectors; ++n) row[n] = load(b + n * kLanes);
        b += b_depth;
        for (int m = 0; m < Rows; ++m) {
            const auto scalar = broadcast(base[m / 3][(m % 3) * a_row]);
            for (int n = 0; n < Vectors; ++n) sum[m][n] = multiply_add(scalar, row[n], sum[m][n]);
        }
        for (int g = 0; g < (Rows + 2) / 3; ++g) base[g] += a_depth;
    }
    for (int m = 0; m < Rows; ++m) {
        for (int n = 0; n < Vectors; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
        if (top) {
            for (int n = 1; n < Vectors; ++n) sum[m][0] = maximum(sum[m][0], sum[m][n]);
            top[m] = maximum(top[m], sum[m][0]);
        }
    }
    outer = ahead;
}

/// `tiles` tiles of one height, one below the other.
template <int Rows, int Vectors, typename Word, typename Ahead>
static void column(int64_t tiles, int64_t depth, const Word* a, int64_t a_row, int64_t a_depth, const Word* b,
                   int64_t b_depth, const Real* init, int64_t init_row, Real* c, int64_t c_row, Vec* top,
                   Ahead& ahead) {
    for (int64_t t = 0; t < tiles; ++t) {
        tile<Rows, Vectors>(depth, a, a_row, a_depth, b, b_depth, init, init_row, c, c_row, top, ahead);
        a += Rows * a_row;
        c += Rows * c_row;
        if (init) init += Rows * init_row;
        if (top) top += Rows;
    }
}

template <int Vectors, typename Word, typename Ahead>
static void panel(int64_t rows, int64_t depth, const Word* a, int64_t a_row, int64_t a_depth, const Word* b,
                  int64_t b_depth, const Real* init, int64_t init_row, Real* c, int64_t c_row, Vec* top,
                  Ahead& ahead) {
    // Tiles of nearly equal height: 49 rows are better cut into seven tiles of 7 than into six of 8 and one
    // of 1. The first ones are `height` rows high, the others one row less.
    int64_t tiles = (rows + kTileRows[Vectors] - 1) / kTileRows[Vectors];
    for (int64_t m = 0; m < rows;) {
        const int64_t left = rows - m, height = (left + tiles - 1) / tiles;
        const int64_t alike = left % tiles ? left % tiles : tiles;
        const Word* at = a + m * a_row;
        const Real* init_at = init ? init + m * init_row : nullptr;
        Real* ct = c + m * c_row;
        Vec* top_at = top ? top + m : nullptr;
        switch (height) {
#define MAGNET_FAST_TILES(R)                                                                               \
    case R:                                                                                                \
        if constexpr (R <= kTileRows[Vectors])                                                             \
            column<R, Vectors>(alike, depth, at, a_row, a_depth, b, b_depth, init_at, init_row, ct, c_row, \
                               top_at, ahead);                                                             \
        break;
            MAGNET_FAST_TILES(1)
            MAGNET_FAST_TILES(2)
            MAGNET_FAST_TILES(3)
            MAGNET_FAST_TILES(4)
            MAGNET_FAST_TILES(5)
            MAGNET_FAST_TILES(6)
            MAGNET_FAST_TILES(7)
            MAGNET_FAST_TILES(8)
            MAGNET_FAST_TILES(9)
            MAGNET_FAST_TILES(10)
            MAGNET_FAST_TILES(11)
            MAGNET_FAST_TILES(12)
#undef MAGNET_FAST_TILES
        }
        m += alike * height;
        tiles -= alike;
    }
}

/// C (rows x columns, rows c_row numbers apart) = A (rows x depth, rows a_row words apart) * B (depth x
/// columns, contiguous), for columns of `vectors`, at most kPanelVectors, vectors.
///
/// Some of the depth at a time: that much of B stays in the first-level cache while all rows pass, and as
/// much of a few rows beside it.
template <typename Word>
static inline void multiply_panel(int64_t vectors, int64_t rows, int64_t depth, const Word* a, int64_t a_row,
                                  const Word* b, Real* c, int64_t c_row) {
    const int64_t columns = vectors * kLanes;
    Nothing nothing;
    for (int64_t k = 0; k < depth; k += kDepthAtATime) {
        const int64_t deep = depth - k < kDepthAtATime ? depth - k : kDepthAtATime;
        const Real* init = k ? c : nullptr;
        switch (vectors) {
#define MAGNET_FAST_PANEL(V)                                                                                \
    case V:                                                                                                 \
        if constexpr (V <= kPanelVectors)                                                                   \
            panel<V>(rows, deep, a + k, a_row, 1, b + k * columns, columns, init, c_row, c, c_row, nullptr, \
                     nothing);                                                                              \
        break;
            MAGNET_FAST_PANEL(1)
            MAGNET_FAST_PANEL(2)
            MAGNET_FAST_PANEL(3)
            MAGNET_FAST_PANEL(4)
#undef MAGNET_FAST_PANEL
        }
    }
}

/// Vectors of the next panel when `left` remain: 3 + 3 + ... with a remainder of 1 taken as 2 + 2. A tile one
/// vector wide waits on its own additions.
static inline int64_t panel_vectors(int64_t left) {
    return left == 1 ? 1 : (left == 2 || left == 4) ? 2 : 3;
}

/// C (rows x columns) = init + A (rows x depth) * B (depth x columns); columns is a multiple of kLanes, B and
/// C have contiguous rows; depth and A's and B's strides count words. init null: zeros; init == c:
/// accumulate. top (rows), unless null, is written: lane by lane the maximum of every row of C.
template <typename Ahead, typename Word>
static inline void multiply(Ahead& ahead, int64_t rows, int64_t columns, int64_t depth, const Word* a,
                            int64_t a_row, int64_t a_depth, const Word* b, int64_t b_depth, const Real* init,
                            int64_t init_row, Real* c, int64_t c_row, Vec* top = nullptr) {
    if (top)
        for (int64_t m = 0; m < rows; ++m) top[m] = broadcast(-static_cast<Real>(__builtin_inff()));
    for (int64_t n = 0, left = columns / kLanes; left > 0;) {
        const int64_t wide = panel_vectors(left);
        const Real* init_at = init ? init + n : nullptr;
        if (wide == 3)
            panel<3>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row, top,
                     ahead);
        else if (wide == 2)
            panel<2>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row, top,
                     ahead);
        else
            panel<1>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row, top,
                     ahead);
        n += wide * kLanes;
        left -= wide;
    }
}

/// The same, fetching nothing.
template <typename Word>
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const Word* a, int64_t a_row,
                            int64_t a_depth, const Word* b, int64_t b_depth, const Real* init,
                            int64_t init_row, Real* c, int64_t c_row, Vec* top = nullptr) {
    Nothing nothing;
    multiply(nothing, rows, columns, depth, a, a_row, a_depth, b, b_depth, init, init_row, c, c_row, top);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
