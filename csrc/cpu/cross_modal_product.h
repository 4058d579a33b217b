// Matrix products that fetch what the next one will read: simd_matrix.h's register tiles, with prefetches
// spread over the steps of the inner loop. Rows of an image tensor lie far apart, so that the processor's own
// prefetching does not find them, and issued all at once they would only be waited for.
#pragma once

#if defined(MAGNET_FAST_SIMD_AVX512) && defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors inside of its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cpu/cross_modal_kernel.h"
#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Cache lines to fetch: `rows` rows of `lines` lines each, `burst` lines at every step.
class Ahead {
  public:
    Ahead() = default;

    template <typename Element>
    Ahead(Rows<Element> image, int64_t rows, int64_t width)
        : row_(reinterpret_cast<const char*>(image.data)),
          stride_(image.stride * static_cast<int64_t>(sizeof(Element))),
          lines_((width * static_cast<int64_t>(sizeof(Element)) + 63) / 64),
          left_(image.data ? rows * lines_ : 0) {}

    /// Spreads the lines over about this many steps.
    void spread(int64_t steps) { burst_ = left_ > 0 ? (left_ + steps - 1) / steps : 0; }

    void step() {
        for (int64_t i = 0; i < burst_ && left_ > 0; ++i, --left_) {
            __builtin_prefetch(row_ + 64 * line_, 0, 2);
            if (++line_ == lines_) {
                line_ = 0;
                row_ += stride_;
            }
        }
    }

  private:
    const char* row_ = nullptr;
    int64_t stride_ = 0, lines_ = 1, left_ = 0, line_ = 0, burst_ = 0;
};

/// What a product adds up: single numbers ...
struct Singles {
    static inline Vec add(Vec sum, Vec a, Vec b) { return multiply_add(a, b, sum); }
};

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
/// ... or pairs of bfloat16 that stand in for one number of Real each: two products a lane.
struct Pairs {
    static inline Vec add(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

/// A register tile as in simd_matrix.h: C = init + A * B; init null: zeros.
template <typename Terms, int Height, int Vectors>
static void fetching_tile(int64_t depth, const Real* a, int64_t a_row, int64_t a_depth, const Real* b,
                          int64_t b_depth, const Real* init, int64_t init_row, Real* c, int64_t c_row,
                          Ahead& outer) {
    Ahead ahead = outer;  // in registers
    Vec sum[Height][Vectors];
    for (int m = 0; m < Height; ++m)
        for (int n = 0; n < Vectors; ++n)
            sum[m][n] = init ? load(init + m * init_row + n * kLanes) : broadcast(0);
    const Real* base[(Height + 2) / 3];
    for (int g = 0; g < (Height + 2) / 3; ++g) base[g] = a + 3 * g * a_row;
    for (int64_t k = 0; k < depth; ++k) {
        ahead.step();
        Vec row[Vectors];
        for (int n = 0; n < Vectors; ++n) row[n] = load(b + n * kLanes);
        b += b_depth;
        for (int m = 0; m < Height; ++m) {
            const Vec scalar = broadcast(base[m / 3][(m % 3) * a_row]);
            for (int n = 0; n < Vectors; ++n) sum[m][n] = Terms::add(sum[m][n], scalar, row[n]);
        }
        for (int g = 0; g < (Height + 2) / 3; ++g) base[g] += a_depth;
    }
    for (int m = 0; m < Height; ++m)
        for (int n = 0; n < Vectors; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
    outer = ahead;
}

/// Steps of all tiles of one panel of columns.
static inline int64_t product_steps(int64_t rows, int64_t vectors, int64_t depth) {
    return (rows + kTileRows[vectors] - 1) / kTileRows[vectors] * depth;
}

template <typename Terms, int Vectors>
static void fetching_panel(int64_t rows, int64_t depth, const Real* a, int64_t a_row, int64_t a_depth,
                           const Real* b, int64_t b_depth, const Real* init, int64_t init_row, Real* c,
                           int64_t c_row, Ahead& ahead) {
    int64_t tiles = (rows + kTileRows[Vectors] - 1) / kTileRows[Vectors];
    for (int64_t m = 0; m < rows; --tiles) {
        const int64_t height = (rows - m + tiles - 1) / tiles;
        const Real* at = a + m * a_row;
        const Real* init_at = init ? init + m * init_row : nullptr;
        Real* ct = c + m * c_row;
        switch (height) {
#define MAGNET_FAST_TILE(R)                                                                                \
    case R:                                                                                                \
        if constexpr (R <= kTileRows[Vectors])                                                             \
            fetching_tile<Terms, R, Vectors>(depth, at, a_row, a_depth, b, b_depth, init_at, init_row, ct, \
                                             c_row, ahead);                                                \
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

/// Vectors of the next panel when `left` remain: 3 + 3 + ..., a remainder of 1 taken as 2 + 2.
static inline int64_t panel_vectors(int64_t left) {
    return left == 1 ? 1 : (left == 2 || left == 4) ? 2 : 3;
}

/// multiply() of simd_matrix.h that fetches `ahead` on the way.
template <typename Terms>
static void fetching_multiply(int64_t rows, int64_t columns, int64_t depth, const Real* a, int64_t a_row,
                              int64_t a_depth, const Real* b, int64_t b_depth, const Real* init,
                              int64_t init_row, Real* c, int64_t c_row, Ahead& ahead) {
    for (int64_t n = 0, left = columns / kLanes; left > 0;) {
        const int64_t wide = panel_vectors(left);
        const Real* init_at = init ? init + n : nullptr;
        if (wide == 3)
            fetching_panel<Terms, 3>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n,
                                     c_row, ahead);
        else if (wide == 2)
            fetching_panel<Terms, 2>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n,
                                     c_row, ahead);
        else
            fetching_panel<Terms, 1>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n,
                                     c_row, ahead);
        n += wide * kLanes;
        left -= wide;
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
