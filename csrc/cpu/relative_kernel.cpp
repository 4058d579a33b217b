// Compiled once per SIMD level; see simd.h and relative_kernel.h.
#include "cpu/relative_kernel.h"

#include "cpu/relative_keys.h"
#include "cpu/simd_matrix.h"
#include "cpu/window_rows.h"
#include "cpu/window_softmax.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// The q channels of `count` queries from number `first` on, to (count, round_up(d)); or what lies likewise
/// elsewhere.
template <typename Element>
static void pack_queries(const RelativeWindow<Element>& w, const Element* tokens, int64_t row_stride,
                         int64_t column_stride, int64_t first, int64_t count, Real* to) {
    for (int64_t n = first; n < first + count; ++n, to += round_up(w.head_dim))
        copy_row(tokens + n / w.columns * row_stride + n % w.columns * column_stride, w.head_dim, to);
}

/// One block of scores, whose maxima are `top`, becomes weights relative to the highest score so far; sums
/// and results of the blocks before follow it.
static void weigh_block(int64_t rows, int64_t columns, Real scale, bool first, const Vec* top, Real* score,
                        int64_t stride, Real* highest, Vec* sum, Real* out, int64_t wide) {
    const Vec unit = broadcast(scale * kPowerUnit);
    constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
    for (int64_t r = 0; r < rows; ++r, score += stride, out += wide) {
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
            sum[r] = sum[r] + write_weights<2>(two, base, unit, score + j);
        }
        if (j < columns) {
            const Vec one[1] = {load(score + j)};
            sum[r] = sum[r] + write_weights<1>(one, base, unit, score + j);
        }
    }
}

template <typename Element>
static int64_t forward_bytes(const RelativeWindow<Element>& w) {
    const KeyGrid grid(w.window_h, w.window_w);
    const int64_t d = w.head_dim, wide = round_up(d);
    const int64_t numbers =
        grid.blocks * d * grid.stride + grid.keys() * wide + kBlock * (2 * wide + grid.stride);
    return numbers * static_cast<int64_t>(sizeof(Real)) + 4 * 64 + Positions::bytes(grid, w.window_w, kBlock);
}

template <typename Element>
static void forward(const RelativeForward<Element>& a) {
    const RelativeWindow<Element>& w = a.window;
    const KeyGrid grid(w.window_h, w.window_w);
    const int64_t d = w.head_dim, wide = round_up(d);
    Arena arena(a.scratch);
    Real* key_transposed = arena.take<Real>(grid.blocks * d * grid.stride);
    Real* value = arena.take<Real>(grid.keys() * wide);
    Real* query = arena.take<Real>(kBlock * wide);
    Real* score = arena.take<Real>(kBlock * grid.stride);
    Real* out = arena.take<Real>(kBlock * wide);
    Positions positions(arena, grid, w.window_w, kBlock);

    pack_transposed(w, grid, w.channels, key_transposed);
    pack_rows(w, grid, 2 * w.channels, value);
    Vec top[kBlock], sum[kBlock];
    Real highest[kBlock];
    for (int64_t i = a.first, count = 0; i < a.last; i += count) {
        count = block_rows(a.last - i);
        pack_queries(w, w.tokens, w.row_stride, w.column_stride, i, count, query);
        positions.find(w, grid, a.height, a.width, query, i, count);
        for (int64_t block = 0; block < grid.blocks; ++block) {
            const int64_t columns = grid.rows_of(block) * grid.columns;
            positions.spread_out(w, grid, i, count, block, score, grid.stride);
            multiply(count, columns, d, query, wide, 1, key_transposed + block * d * grid.stride, grid.stride,
                     score, grid.stride, score, grid.stride, top);
            weigh_block(count, columns, a.scale, block == 0, top, score, grid.stride, highest, sum, out,
                        wide);
            multiply(count, wide, columns, score, grid.stride, 1,
                     value + grid.first_row(block) * grid.columns * wide, wide, block ? out : nullptr, wide,
                     out, wide);
        }
        for (int64_t r = 0; r < count; ++r) {
            Element* to =
                a.out + (i + r) / w.columns * a.out_row_stride + (i + r) % w.columns * a.out_column_stride;
            write_row(to, out + r * wide, d, 1 / reduce_add(sum[r]));
        }
    }
}

/// Queries of a block of the backward pass, which holds their scores with all keys: few where there are many
/// keys.
static inline int64_t backward_rows(int64_t score_stride) {
    constexpr int64_t kBytes = 256 << 10;
    const int64_t rows = kBytes / (score_stride * static_cast<int64_t>(sizeof(Real))) / 8 * 8;
    return rows < 8 ? 8 : rows > kBlock ? kBlock : rows;
}

template <typename Element>
static int64_t backward_bytes(const RelativeWindow<Element>& w) {
    const KeyGrid grid(w.window_h, w.window_w);
    const int64_t d = w.head_dim, wide = round_up(d), stride = spread(grid.keys()),
                  rows = backward_rows(stride);
    const int64_t positions = round_up(2 * w.window_h - 1) + round_up(2 * w.window_w - 1);
    const int64_t numbers = 2 * grid.blocks * d * grid.stride + 3 * grid.keys() * wide +
                            rows * (3 * wide + 2 * stride + positions);
    return numbers * static_cast<int64_t>(sizeof(Real)) + 12 * 64 + Positions::bytes(grid, w.window_w, rows);
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

template <typename Element>
static void backward(const RelativeBackward<Element>& a) {
    const RelativeWindow<Element>& w = a.window;
    const KeyGrid grid(w.window_h, w.window_w);
    const int64_t d = w.head_dim, wide = round_up(d), keys = grid.keys(), stride = spread(keys);
    const int64_t most = backward_rows(stride), queries = w.rows * w.columns;
    const bool want_keys = a.grad_tokens || (a.grad_pad && w.padded());
    Arena arena(a.scratch);
    Real* key_transposed = arena.take<Real>(grid.blocks * d * grid.stride);
    Real* value_transposed = arena.take<Real>(grid.blocks * d * grid.stride);
    Real* key = arena.take<Real>(keys * wide);
    Real* grad_key = arena.take<Real>(keys * wide);
    Real* grad_value = arena.take<Real>(keys * wide);
    Real* query = arena.take<Real>(most * wide);
    Real* grad_out = arena.take<Real>(most * wide);
    Real* grad_query = arena.take<Real>(most * wide);
    Real* probability = arena.take<Real>(most * stride);
    Real* grad_score = arena.take<Real>(most * stride);
    Positions positions(arena, grid, w.window_w, most);
    const int64_t row_stride = positions.row_stride, column_stride = positions.column_stride;
    Real* grad_by_row = arena.take<Real>(most * row_stride);
    Real* grad_by_column = arena.take<Real>(most * column_stride);

    pack_transposed(w, grid, w.channels, key_transposed);
    pack_transposed(w, grid, 2 * w.channels, value_transposed);
    if (a.grad_tokens) pack_rows(w, grid, w.channels, key);
    Vec top[kBlock], block_top[kBlock];
    for (int64_t i = 0, count = 0; i < queries; i += count) {
        count = queries - i < most ? queries - i : most;
        pack_queries(w, w.tokens, w.row_stride, w.column_stride, i, count, query);
        pack_queries(w, a.grad_out, a.grad_out_row_stride, a.grad_out_column_stride, i, count, grad_out);
        positions.find(w, grid, a.height, a.width, query, i, count);
        for (int64_t block = 0; block < grid.blocks; ++block) {
            const int64_t columns = grid.rows_of(block) * grid.columns;
            const int64_t first = grid.first_row(block) * grid.columns;
            positions.spread_out(w, grid, i, count, block, probability + first, stride);
            multiply(count, columns, d, query, wide, 1, key_transposed + block * d * grid.stride, grid.stride,
                     probability + first, stride, probability + first, stride, block_top);
            multiply(count, columns, d, grad_out, wide, 1, value_transposed + block * d * grid.stride,
                     grid.stride, nullptr, 0, grad_score + first, stride);
            for (int64_t r = 0; r < count; ++r) top[r] = block ? maximum(top[r], block_top[r]) : block_top[r];
        }
        std::memset(grad_by_row, 0, count * row_stride * sizeof(Real));
        std::memset(grad_by_column, 0, count * column_stride * sizeof(Real));
        for (int64_t r = 0; r < count; ++r) {
            Real* gradient = grad_score + r * stride;
            softmax_backward(probability + r * stride, gradient, keys, a.scale, top[r], nullptr);
            sum_positions(grid, w.window_w, gradient,
                          grad_by_row + r * row_stride + positions.row_shift(w, i + r),
                          grad_by_column + r * column_stride + positions.column_shift(w, i + r));
        }
        if (a.grad_tokens) {
            multiply(count, wide, keys, grad_score, stride, 1, key, wide, nullptr, 0, grad_query, wide);
            multiply(count, wide, 2 * w.window_h - 1, grad_by_row, row_stride, 1, a.height.rows, wide,
                     grad_query, wide, grad_query, wide);
            multiply(count, wide, 2 * w.window_w - 1, grad_by_column, column_stride, 1, a.width.rows, wide,
                     grad_query, wide, grad_query, wide);
            for (int64_t r = 0; r < count; ++r) {
                const int64_t y = (i + r) / w.columns, x = (i + r) % w.columns;
                write_row(a.grad_tokens + y * a.grad_row_stride + x * a.grad_column_stride,
                          grad_query + r * wide, d, a.scale);
            }
        }
        if (a.grad_height) {
            multiply(2 * w.window_h - 1, wide, count, grad_by_row, 1, row_stride, query, wide, a.grad_height,
                     wide, a.grad_height, wide);
            multiply(2 * w.window_w - 1, wide, count, grad_by_column, 1, column_stride, query, wide,
                     a.grad_width, wide, a.grad_width, wide);
        }
        if (want_keys) {
            // dk = scale * dS^T q and dv = P^T dO, summed over the blocks of queries.
            multiply(keys, wide, count, grad_score, 1, stride, query, wide, i ? grad_key : nullptr, wide,
                     grad_key, wide);
            multiply(keys, wide, count, probability, 1, stride, grad_out, wide, i ? grad_value : nullptr,
                     wide, grad_value, wide);
        }
    }
    if (want_keys) write_key_gradients(a, grid, grad_key, grad_value);
}

template <typename Element>
const RelativeKernels<Element>& relative_kernels() {
    static const RelativeKernels<Element> kernels = {kLanes, forward_bytes<Element>, backward_bytes<Element>,
                                                     forward<Element>, backward<Element>};
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(RelativeKernels, relative_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
