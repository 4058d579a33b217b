// Relative attention on bfloat16 with dot products of pairs: levels avx512_bf16 and amx; see pair_rows.h.
// Keys are pairs along d, transposed; values are pairs of neighbouring keys. Keys' rows are padded to whole
// vectors, so that no pair belongs to two of them.
//
// Positions stay float32, as the operator promises: the products of queries with the tables, their gradients,
// and the biases that the products of pairs begin with.
#pragma once

#include "cpu/pair_rows.h"
#include "cpu/relative_keys.h"
#include "cpu/relative_softmax.h"

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Rows of the next block of queries when `left` remain. Tiles are 16 rows high, and a rest costs as much as
/// a whole one: 196 queries are 13 tiles in blocks of 64, 15 in four blocks of nearly equal height.
static inline int64_t pair_block_rows(int64_t left) {
#if defined(MAGNET_FAST_SIMD_AMX)
    return left < kBlock ? left : kBlock;
#else
    return block_rows(left);
#endif
}

/// The same of the backward pass, whose longest sums run along the queries: of 32, they fill a tile.
static inline int64_t pair_backward_rows(int64_t score_stride) {
#if defined(MAGNET_FAST_SIMD_AMX)
    return backward_rows(score_stride, 32);
#else
    return backward_rows(score_stride);
#endif
}

/// `count` queries from number `first` on, or what lies likewise elsewhere.
struct QueryRows {
    const BFloat16* tokens;
    int64_t row_stride, column_stride, columns;

    const BFloat16* row(int64_t query) const {
        return tokens + query / columns * row_stride + query % columns * column_stride;
    }
    /// to (count, words): pairs along d.
    void pack(int64_t first, int64_t count, int64_t d, Pair* to) const {
        for (int64_t n = first; n < first + count; ++n, to += (d + 1) / 2) pack_row(row(n), d, to);
    }
    /// to ((count + 1) / 2, round_up(d)): pairs of neighbours.
    void pack_neighbours(int64_t first, int64_t count, int64_t d, Pair* to) const {
        for (int64_t n = first; n < first + count; n += 2, to += round_up(d))
            pack_row_pair(row(n), n + 1 < first + count ? row(n + 1) : nullptr, d, to);
    }
};

/// to (keys / 2, round_up(d)): what lies `offset` channels after the tokens, pairs of neighbours; zeros
/// beyond the window.
static void pack_key_pairs(const RelativeWindow<BFloat16>& w, const KeyGrid& grid, int64_t offset, Pair* to) {
    const auto row = [&](int64_t y, int64_t x) { return x < w.window_w ? w.token(y, x) + offset : nullptr; };
    for (int64_t y = 0; y < grid.rows; ++y)
        for (int64_t x = 0; x < grid.columns; x += 2, to += round_up(w.head_dim))
            pack_row_pair(row(y, x), row(y, x + 1), w.head_dim, to);
}

static int64_t forward_pairs_bytes(const RelativeWindow<BFloat16>& w) {
    const KeyGrid grid(w.window_h, w.window_w);
    const int64_t wide = round_up(w.head_dim), words = (w.head_dim + 1) / 2,
                  half = spread(grid.block_rows * grid.columns / 2);
    const int64_t numbers = grid.blocks * words * grid.stride + grid.keys() / 2 * wide +
                            kBlock * (words + 2 * wide + grid.stride + half);
    return numbers * static_cast<int64_t>(sizeof(float)) + 7 * 64 +
           Positions::bytes(grid, w.window_w, kBlock);
}

static void forward_pairs(const RelativeForward<BFloat16>& a) {
    const RelativeWindow<BFloat16>& w = a.window;
    const KeyGrid grid(w.window_h, w.window_w);
    const QueryRows queries{w.tokens, w.row_stride, w.column_stride, w.columns};
    const int64_t d = w.head_dim, wide = round_up(d), words = (d + 1) / 2,
                  half = spread(grid.block_rows * grid.columns / 2);
    Arena arena(a.scratch);
    Pair* key_transposed = arena.take<Pair>(grid.blocks * words * grid.stride);
    Pair* value = arena.take<Pair>(grid.keys() / 2 * wide);
    Pair* query = arena.take<Pair>(kBlock * words);
    Pair* weight = arena.take<Pair>(kBlock * half);
    float* wide_query = arena.take<float>(kBlock * wide);
    float* score = arena.take<float>(kBlock * grid.stride);
    float* out = arena.take<float>(kBlock * wide);
    Positions positions(arena, grid, w.window_w, kBlock);

    pack_transposed(w, grid, w.channels, key_transposed);
    pack_key_pairs(w, grid, 2 * w.channels, value);
    Vec top[kBlock], sum[kBlock];
    float highest[kBlock];
    for (int64_t i = a.first, count = 0; i < a.last; i += count) {
        count = pair_block_rows(a.last - i);
        queries.pack(i, count, d, query);
        pack_queries(w, w.tokens, w.row_stride, w.column_stride, i, count, wide_query);
        positions.find(w, grid, a.height, a.width, wide_query, i, count);
        for (int64_t block = 0; block < grid.blocks; ++block) {
            const int64_t columns = grid.rows_of(block) * grid.columns,
                          first = grid.first_row(block) * grid.columns;
            positions.spread_out(w, grid, i, count, block, score, grid.stride);
            multiply(count, columns, words, query, words, 1, key_transposed + block * words * grid.stride,
                     grid.stride, score, grid.stride, score, grid.stride, top);
            // The sum is that of the rounded weights, whatever the maximum that they are relative to.
            weigh_block<2>(count, columns, a.scale, block == 0, top, score, grid.stride, weight, half,
                           highest, sum, out, wide);
            multiply(count, wide, columns / 2, weight, half, 1, value + first / 2 * wide, wide,
                     block ? out : nullptr, wide, out, wide);
        }
        for (int64_t r = 0; r < count; ++r)
            write_pairs(
                a.out + (i + r) / w.columns * a.out_row_stride + (i + r) % w.columns * a.out_column_stride,
                out + r * wide, d, 1 / reduce_add(sum[r]));
    }
}

static int64_t backward_pairs_bytes(const RelativeWindow<BFloat16>& w) {
    const KeyGrid grid(w.window_h, w.window_w);
    const int64_t wide = round_up(w.head_dim), words = (w.head_dim + 1) / 2, keys = grid.keys(),
                  stride = spread(keys), half = spread(keys / 2), rows = pair_backward_rows(stride);
    const int64_t positions = round_up(2 * w.window_h - 1) + round_up(2 * w.window_w - 1);
    const int64_t numbers = 2 * grid.blocks * words * grid.stride + keys / 2 * wide + 2 * keys * wide +
                            rows * (2 * words + 3 * wide + 3 * stride + half + positions);
    return numbers * static_cast<int64_t>(sizeof(float)) + 17 * 64 + Positions::bytes(grid, w.window_w, rows);
}

static void backward_pairs(const RelativeBackward<BFloat16>& a) {
    const RelativeWindow<BFloat16>& w = a.window;
    const KeyGrid grid(w.window_h, w.window_w);
    const QueryRows tokens{w.tokens, w.row_stride, w.column_stride, w.columns},
        output{a.grad_out, a.grad_out_row_stride, a.grad_out_column_stride, w.columns};
    const int64_t d = w.head_dim, wide = round_up(d), words = (d + 1) / 2, keys = grid.keys(),
                  stride = spread(keys), half = spread(keys / 2);
    const int64_t most = pair_backward_rows(stride), queries = w.rows * w.columns;
    const bool want_keys = a.grad_tokens || (a.grad_pad && w.padded());
    Arena arena(a.scratch);
    Pair* key_transposed = arena.take<Pair>(grid.blocks * words * grid.stride);
    Pair* value_transposed = arena.take<Pair>(grid.blocks * words * grid.stride);
    Pair* key = arena.take<Pair>(keys / 2 * wide);
    Pair* query = arena.take<Pair>(most * words);
    Pair* grad_out = arena.take<Pair>(most * words);
    Pair* query_pairs = arena.take<Pair>(most / 2 * wide);
    Pair* grad_out_pairs = arena.take<Pair>(most / 2 * wide);
    Pair* probability = arena.take<Pair>(most / 2 * stride);
    Pair* by_query = arena.take<Pair>(most / 2 * stride);
    Pair* by_key = arena.take<Pair>(most * half);
    float* grad_key = arena.take<float>(keys * wide);
    float* grad_value = arena.take<float>(keys * wide);
    float* wide_query = arena.take<float>(most * wide);
    float* grad_query = arena.take<float>(most * wide);
    float* score = arena.take<float>(most * stride);
    float* grad_score = arena.take<float>(most * stride);
    Positions positions(arena, grid, w.window_w, most);
    const int64_t row_stride = positions.row_stride, column_stride = positions.column_stride;
    float* grad_by_row = arena.take<float>(most * (row_stride + column_stride));
    float* grad_by_column = grad_by_row + most * row_stride;

    pack_transposed(w, grid, w.channels, key_transposed);
    pack_transposed(w, grid, 2 * w.channels, value_transposed);
    if (a.grad_tokens) pack_key_pairs(w, grid, w.channels, key);
    Vec top[kBlock], block_top[kBlock];
    for (int64_t i = 0, count = 0; i < queries; i += count) {
        count = queries - i < most ? queries - i : most;
        tokens.pack(i, count, d, query);
        output.pack(i, count, d, grad_out);
        pack_queries(w, w.tokens, w.row_stride, w.column_stride, i, count, wide_query);
        positions.find(w, grid, a.height, a.width, wide_query, i, count);
        for (int64_t block = 0; block < grid.blocks; ++block) {
            const int64_t columns = grid.rows_of(block) * grid.columns,
                          first = grid.first_row(block) * grid.columns, packed = block * words * grid.stride;
            positions.spread_out(w, grid, i, count, block, score + first, stride);
            multiply(count, columns, words, query, words, 1, key_transposed + packed, grid.stride,
                     score + first, stride, score + first, stride, block_top);
            multiply(count, columns, words, grad_out, words, 1, value_transposed + packed, grid.stride,
                     nullptr, 0, grad_score + first, stride);
            for (int64_t r = 0; r < count; ++r) top[r] = block ? maximum(top[r], block_top[r]) : block_top[r];
        }
        std::memset(grad_by_row, 0, most * (row_stride + column_stride) * sizeof(float));
        for (int64_t r = 0; r < count; r += 2) {
            const bool both = r + 1 < count;
            float* gradient = grad_score + r * stride;
            softmax_backward_pairs(
                score + r * stride, gradient, stride, keys, a.scale, top + r, both,
                {probability + r / 2 * stride, by_query + r / 2 * stride,
                 a.grad_tokens ? by_key + r * half : nullptr, by_key + (r + 1) * half},
                [&](int h, int64_t j, Vec kept) { store(gradient + h * stride + j, kept); });
            for (int64_t n = r; n < r + 1 + both; ++n)
                sum_positions(grid, w.window_w, grad_score + n * stride,
                              grad_by_row + n * row_stride + positions.row_shift(w, i + n),
                              grad_by_column + n * column_stride + positions.column_shift(w, i + n));
        }
        if (a.grad_tokens) {
            multiply(count, wide, keys / 2, by_key, half, 1, key, wide, nullptr, 0, grad_query, wide);
            multiply(count, wide, 2 * w.window_h - 1, grad_by_row, row_stride, 1, a.height.rows, wide,
                     grad_query, wide, grad_query, wide);
            multiply(count, wide, 2 * w.window_w - 1, grad_by_column, column_stride, 1, a.width.rows, wide,
                     grad_query, wide, grad_query, wide);
            for (int64_t r = 0; r < count; ++r)
                write_pairs(a.grad_tokens + (i + r) / w.columns * a.grad_row_stride +
                                (i + r) % w.columns * a.grad_column_stride,
                            grad_query + r * wide, d, a.scale);
        }
        if (a.grad_height) {
            multiply(2 * w.window_h - 1, wide, count, grad_by_row, 1, row_stride, wide_query, wide,
                     a.grad_height, wide, a.grad_height, wide);
            multiply(2 * w.window_w - 1, wide, count, grad_by_column, 1, column_stride, wide_query, wide,
                     a.grad_width, wide, a.grad_width, wide);
        }
        if (want_keys) {
            // dk = scale * dS^T q and dv = P^T dO, summed over the blocks of queries.
            tokens.pack_neighbours(i, count, d, query_pairs);
            output.pack_neighbours(i, count, d, grad_out_pairs);
            multiply(keys, wide, (count + 1) / 2, by_query, 1, stride, query_pairs, wide,
                     i ? grad_key : nullptr, wide, grad_key, wide);
            multiply(keys, wide, (count + 1) / 2, probability, 1, stride, grad_out_pairs, wide,
                     i ? grad_value : nullptr, wide, grad_value, wide);
        }
    }
    if (want_keys) write_key_gradients(a, grid, grad_key, grad_value);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
