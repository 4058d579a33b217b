// Relative attention between its products: the streamed softmax of the forward pass, and what becomes of the
// gradients of scores, keys and values. Compiled once per SIMD level like simd.h.
#pragma once

#include <limits>

#include "cpu/relative_keys.h"
#include "cpu/window_rows.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// One block of scores, whose maxima are `top`, becomes weights relative to the highest score so far, `Each`
/// of them a word; sums and results of the blocks before follow it. `weight` may be `score`.
template <int Each, typename Word>
static void weigh_block(int64_t rows, int64_t columns, Real scale, bool first, const Vec* top,
                        const Real* score, int64_t score_stride, Word* weight, int64_t weight_stride,
                        Real* highest, Vec* sum, Real* out, int64_t wide) {
    const Vec unit = broadcast(scale * kPowerUnit);
    constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
    for (int64_t r = 0; r < rows; ++r, score += score_stride, weight += weight_stride, out += wide) {
        const Real found = reduce_max(top[r]);
        if (first) {
            highest[r] = found;
            sum[r] = broadcast(Real{0});
        } else if (found > highest[r]) {
            const Vec factor = power(broadcast(highest[r] - found) * unit);
            sum[r] = sum[r] * factor;
            for (int64_t c = 0; c < wide; c += kLanes) store(out + c, load(out + c) * factor);
            highest[r] = found;
        }
        // Scores of -infinity alone weigh nothing; those of a block further on may be finite.
        const Vec base = broadcast(highest[r] > kNothing ? highest[r] : Real{0});
        int64_t j = 0;
        for (; j + 2 * kLanes <= columns; j += 2 * kLanes) {
            const Vec two[2] = {load(score + j), load(score + j + kLanes)};
            sum[r] = sum[r] + write_weights<2>(two, base, unit, weight + j / Each);
        }
        if (j < columns) {
            const Vec one[1] = {load(score + j)};
            sum[r] = sum[r] + write_weights<1>(one, base, unit, weight + j / Each);
        }
    }
}

/// Queries of a block of the backward pass, which holds their scores with all keys: few where there are many
/// keys, at least `fewest`.
static inline int64_t backward_rows(int64_t score_stride, int64_t fewest = 8) {
    constexpr int64_t kBytes = 256 << 10;
    const int64_t rows = kBytes / (score_stride * static_cast<int64_t>(sizeof(Real))) / 8 * 8;
    return rows < fewest ? fewest : rows > kBlock ? kBlock : rows;
}

/// What a query's bias gets from the scores' gradient (keys of one query): to by_row and by_column, both
/// zeroed before, at the places of its keys.
static void sum_positions(const KeyGrid& grid, int64_t window_w, const Real* grad_score, Real* by_row,
                          Real* by_column) {
    for (int64_t y = 0; y < grid.rows; ++y, grad_score += grid.columns) {
        Vec total = broadcast(Real{0});
        int64_t x = 0;
        for (; x + kLanes <= window_w; x += kLanes) {
            const Vec gradient = load(grad_score + x);
            total = total + gradient;
            store(by_column + x, load(by_column + x) + gradient);
        }
        if (x < window_w) {
            const Vec gradient = load_part(grad_score + x, window_w - x);
            total = total + gradient;
            store_part(by_column + x, load_part(by_column + x, window_w - x) + gradient, window_w - x);
        }
        by_row[y] = reduce_add(total);
    }
}

/// The gradients of k and v (keys, round_up(d)), those of k without the scale, to where they belong.
template <typename Element>
static void write_key_gradients(const RelativeBackward<Element>& a, const KeyGrid& grid, const Real* grad_key,
                                const Real* grad_value) {
    const RelativeWindow<Element>& w = a.window;
    const int64_t d = w.head_dim, wide = round_up(d);
    for (int64_t y = 0; y < w.window_h; ++y) {
        for (int64_t x = 0; x < w.window_w; ++x) {
            const Real *key = grad_key + (y * grid.columns + x) * wide,
                       *value = grad_value + (y * grid.columns + x) * wide;
            if (w.within(y, x)) {
                if (!a.grad_tokens) continue;
                Element* to = a.grad_tokens + y * a.grad_row_stride + x * a.grad_column_stride;
                write_row(to + w.channels, key, d, a.scale);
                write_row(to + 2 * w.channels, value, d, Real{1});
            } else if (a.grad_pad) {
                for (int64_t c = 0; c < d; ++c) a.grad_pad[c] += a.scale * key[c];
                for (int64_t c = 0; c < d; ++c) a.grad_pad[d + c] += value[c];
            }
        }
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
