// How the kernels of relative attention lay out keys, values and biases; compiled once per SIMD level like
// simd.h.
#pragma once

#include <limits>

#include "cpu/pair_rows.h"
#include "cpu/relative_kernel.h"
#include "cpu/simd_matrix.h"
#include "cpu/simd_rows.h"
#include "cpu/simd_transpose.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// A stride that puts neighbouring rows into different sets of a cache: an odd number of its lines.
static inline int64_t spread(int64_t columns) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Real));
    return ((columns + kLine - 1) / kLine | 1) * kLine;
}

/// The keys of a window: rows padded to whole vectors, cut into blocks of nearly equal height.
struct KeyGrid {
    // Keys of a block, about: their values and a block's scores stay close to the core.
    static constexpr int64_t kKeys = 256;

    int64_t rows, columns;       // S_h, and S_w rounded up
    int64_t block_rows, blocks;  // rows of a block, the last one's may be fewer
    int64_t stride;              // of a block's transposed keys and scores

    KeyGrid(int64_t window_h, int64_t window_w) : rows(window_h), columns(round_up(window_w)) {
        const int64_t most = columns < kKeys ? kKeys / columns : 1;
        blocks = (rows + most - 1) / most;
        block_rows = (rows + blocks - 1) / blocks;
        blocks = (rows + block_rows - 1) / block_rows;
        stride = spread(block_rows * columns);
    }

    int64_t keys() const { return rows * columns; }
    int64_t first_row(int64_t block) const { return block * block_rows; }
    int64_t rows_of(int64_t block) const {
        const int64_t left = rows - first_row(block);
        return left < block_rows ? left : block_rows;
    }
};

/// A row of d numbers as words of products, and kLanes of them from word c on; zeros past the row.
static inline int64_t words_in(int64_t d, const Real*) {
    return d;
}
template <typename Element>
static inline Vec words_from(const Element* row, int64_t c, int64_t d, const Real*) {
    return d - c < kLanes ? load_part(row + c, d - c) : load(row + c);
}
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
static inline int64_t words_in(int64_t d, const Pair*) {
    return (d + 1) / 2;
}
static inline Vec words_from(const BFloat16* row, int64_t c, int64_t d, const Pair*) {
    const int64_t left = d - 2 * c;
    return _mm512_castsi512_ps(left < 2 * kLanes ? _mm512_maskz_loadu_epi16((1u << left) - 1, row + 2 * c)
                                                 : _mm512_loadu_si512(row + 2 * c));
}
#endif

/// to (blocks, words, stride): what lies `offset` channels after the tokens, transposed; zeros beyond the
/// window.
template <typename Element, typename Word>
static void pack_transposed(const RelativeWindow<Element>& w, const KeyGrid& grid, int64_t offset, Word* to) {
    const int64_t d = w.head_dim, depth = words_in(d, to);
    for (int64_t block = 0; block < grid.blocks; ++block, to += depth * grid.stride) {
        for (int64_t row = 0; row < grid.rows_of(block); ++row) {
            for (int64_t x = 0; x < grid.columns; x += kLanes) {
                const int64_t count = w.window_w - x < kLanes ? w.window_w - x : kLanes;
                const Element* from[kLanes];
                for (int64_t i = 0; i < count; ++i)
                    from[i] = w.token(grid.first_row(block) + row, x + i) + offset;
                // Moved as Reals, whatever they mean.
                Real* column = reinterpret_cast<Real*>(to) + row * grid.columns + x;
                for (int64_t c = 0; c < depth; c += kLanes) {
                    Vec square[kLanes];
                    for (int64_t i = 0; i < kLanes; ++i)
                        square[i] = i < count ? words_from(from[i], c, d, to) : broadcast(Real{0});
                    transpose(square);
                    for (int64_t i = 0; i < kLanes && c + i < depth; ++i)
                        store(column + (c + i) * grid.stride, square[i]);
                }
            }
        }
    }
}

/// One row of a token's d numbers, zeros past them.
template <typename Element>
static inline void copy_row(const Element* from, int64_t d, Real* to) {
    gather_rows(&from, 1, d, to);
}

/// to (keys, round_up(d)): what lies `offset` channels after the tokens; zeros beyond the window.
template <typename Element>
static void pack_rows(const RelativeWindow<Element>& w, const KeyGrid& grid, int64_t offset, Real* to) {
    const int64_t wide = round_up(w.head_dim);
    for (int64_t y = 0; y < grid.rows; ++y) {
        for (int64_t x = 0; x < grid.columns; ++x, to += wide) {
            if (x < w.window_w)
                copy_row(w.token(y, x) + offset, w.head_dim, to);
            else
                for (int64_t c = 0; c < wide; c += kLanes) store(to + c, broadcast(Real{0}));
        }
    }
}

/// The q channels of `count` queries from number `first` on, to (count, round_up(d)); or what lies likewise
/// elsewhere.
template <typename Element>
static void pack_queries(const RelativeWindow<Element>& w, const Element* tokens, int64_t row_stride,
                         int64_t column_stride, int64_t first, int64_t count, Real* to) {
    for (int64_t n = first; n < first + count; ++n, to += round_up(w.head_dim))
        copy_row(tokens + n / w.columns * row_stride + n % w.columns * column_stride, w.head_dim, to);
}

/// The biases of a block of queries.
struct Positions {
    Real* by_row;     // (queries, row_stride): the products with the table of rows
    Real* by_column;  // (queries, column_stride)
    Real* columns;    // (queries, grid.columns): of each query, over the columns of keys; -infinity past the
                      // window
    int64_t row_stride, column_stride;

    Positions(Arena& arena, const KeyGrid& grid, int64_t window_w, int64_t queries)
        : row_stride(round_up(2 * grid.rows - 1)), column_stride(round_up(2 * window_w - 1)) {
        by_row = arena.take<Real>(queries * row_stride);
        by_column =
            arena.take<Real>(queries * column_stride + kLanes);  // a run's last vector may reach beyond
        columns = arena.take<Real>(queries * grid.columns);
    }
    static int64_t bytes(const KeyGrid& grid, int64_t window_w, int64_t queries) {
        const int64_t numbers =
            queries * (round_up(2 * grid.rows - 1) + round_up(2 * window_w - 1) + grid.columns);
        return (numbers + kLanes) * static_cast<int64_t>(sizeof(Real)) + 3 * 64;
    }

    /// From queries (count, round_up(d)), of which the first is number `first` of the window's.
    template <typename Element>
    void find(const RelativeWindow<Element>& w, const KeyGrid& grid, const RelativeTable<Real>& height,
              const RelativeTable<Real>& width, const Real* query, int64_t first, int64_t count) {
        const int64_t d = w.head_dim, wide = round_up(d);
        multiply(count, row_stride, d, query, wide, 1, height.transposed, row_stride, nullptr, 0, by_row,
                 row_stride);
        multiply(count, column_stride, d, query, wide, 1, width.transposed, column_stride, nullptr, 0,
                 by_column, column_stride);
        for (int64_t r = 0; r < count; ++r) {
            const Real* from = by_column + r * column_stride + column_shift(w, first + r);
            Real* to = columns + r * grid.columns;
            for (int64_t x = 0; x < grid.columns; x += kLanes) store(to + x, load(from + x));
            for (int64_t x = w.window_w; x < grid.columns; ++x)
                to[x] = -std::numeric_limits<Real>::infinity();
        }
    }

    /// Where a query's keys begin in its products: those in row 0, and those in column 0.
    template <typename Element>
    static int64_t row_shift(const RelativeWindow<Element>& w, int64_t query) {
        return w.window_h - 1 - query / w.columns;
    }
    template <typename Element>
    static int64_t column_shift(const RelativeWindow<Element>& w, int64_t query) {
        return w.window_w - 1 - query % w.columns;
    }

    /// score (count, score_stride) = the biases of one block of keys.
    template <typename Element>
    void spread_out(const RelativeWindow<Element>& w, const KeyGrid& grid, int64_t first, int64_t count,
                    int64_t block, Real* score, int64_t score_stride) const {
        for (int64_t r = 0; r < count; ++r) {
            const Real* row = by_row + r * row_stride + row_shift(w, first + r) + grid.first_row(block);
            const Real* across = columns + r * grid.columns;
            Real* to = score + r * score_stride;
            for (int64_t y = 0; y < grid.rows_of(block); ++y, to += grid.columns) {
                const Vec bias = broadcast(row[y]);
                for (int64_t x = 0; x < grid.columns; x += kLanes) store(to + x, bias + load(across + x));
            }
        }
    }
};

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
