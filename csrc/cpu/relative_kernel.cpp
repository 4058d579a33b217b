// Compiled once per SIMD level; see simd.h and relative_kernel.h.
#include "cpu/relative_kernel.h"

#include "cpu/relative_keys.h"
#include "cpu/relative_pairs.h"
#include "cpu/relative_softmax.h"
#include "cpu/simd_matrix.h"
#include "cpu/window_softmax.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

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
            weigh_block<1>(count, columns, a.scale, block == 0, top, score, grid.stride, score, grid.stride,
                           highest, sum, out, wide);
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

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <>
const RelativeKernels<BFloat16>& relative_kernels<BFloat16>() {
    static const RelativeKernels<BFloat16> kernels = {kLanes, forward_pairs_bytes, backward_pairs_bytes,
                                                      forward_pairs, backward_pairs};
    return kernels;
}
#endif

MAGNET_FAST_INSTANTIATE_KERNELS(RelativeKernels, relative_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
