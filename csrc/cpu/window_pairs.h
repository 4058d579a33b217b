// Window attention on bfloat16 with dot products of pairs: levels avx512_bf16, where they do twice the work
// of float32's multiply-add, and amx, where tiles multiply them; see pair_rows.h.
//
// In the forward pass weights are rounded after the exponential, before their sum is taken.
#pragma once

#include "cpu/pair_rows.h"
#include "cpu/simd_matrix.h"
#include "cpu/window_gather.h"
#include "cpu/window_rows.h"

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// to (count x words): rows of d numbers, pairs along d; a zero completes an odd d.
static void pack_rows(const BFloat16* const* rows, int64_t count, int64_t d, Pair* to) {
    for (int64_t i = 0; i < count; ++i) pack_row(rows[i], d, to + i * ((d + 1) / 2));
}

/// to (words x count) = rows of d numbers, pairs along d, transposed; count is a multiple of kLanes.
static void pack_transposed(const BFloat16* const* rows, int64_t count, int64_t d, Pair* to) {
    // Moved as words of 32 bits, whatever they mean.
    transpose_rows(reinterpret_cast<const float* const*>(rows), count, d / 2, reinterpret_cast<float*>(to));
    if (d % 2)
        for (int64_t j = 0; j < count; ++j) to[d / 2 * count + j].bits = rows[j][d - 1].bits;
}

/// to ((count + 1) / 2 x round_up(d)): pairs of neighbouring rows; zeros complete an odd count.
static void pack_row_pairs(const BFloat16* const* rows, int64_t count, int64_t d, Pair* to) {
    for (int64_t i = 0; i < count; i += 2, to += round_up(d))
        pack_row_pair(rows[i], i + 1 < count ? rows[i + 1] : nullptr, d, to);
}

static void forward_pairs(const GroupForward<BFloat16>& g) {
    const int64_t d = g.head_dim, wide = round_up(d), words = (d + 1) / 2, columns = g.bias_row;
    Arena arena(g.scratch);
    Pair* query = arena.take<Pair>(g.tokens * words);
    Pair* key_transposed = arena.take<Pair>(words * columns);
    Pair* value = arena.take<Pair>(columns / 2 * wide);
    float* score = arena.take<float>(kBlock * columns);
    Pair* weight = arena.take<Pair>(kBlock * columns / 2);
    float* out = arena.take<float>(kBlock * wide);
    const BFloat16** rows = arena.take<const BFloat16*>(columns);

    pack_rows(g.query, g.tokens, d, query);
    key_rows(g, g.channels, g.pad_key, columns, rows);
    pack_transposed(rows, columns, d, key_transposed);
    key_rows(g, 2 * g.channels, g.pad_value, g.keys, rows);
    pack_row_pairs(rows, g.keys, d, value);

    Vec sum[kBlock];
    for (int64_t i = 0, count = 0; i < g.tokens; i += count) {
        count = block_rows(g.tokens - i);
        weigh(QueryBlock<Pair>{count, columns, words, query + i * words, words, key_transposed,
                               g.bias + i * columns, g.scale, weight, columns / 2, sum, score},
              [&](int64_t r) { prefetch_token(g, i + r); });
        multiply(count, wide, (g.keys + 1) / 2, weight, columns / 2, 1, value, wide, nullptr, 0, out, wide);
        for (int64_t r = 0; r < count; ++r)
            write_pairs(g.out[i + r], out + r * wide, d, 1 / reduce_add(sum[r]));
    }
}

static void backward_pairs(const GroupBackward<BFloat16>& g) {
    const int64_t d = g.head_dim, wide = round_up(d), words = (d + 1) / 2, columns = g.bias_row;
    const bool want_tokens = g.grad_query != nullptr,
               want_pad = g.grad_pad_key != nullptr && g.keys > g.tokens;
    const int64_t first_key = want_tokens ? 0 : g.tokens;
    const int64_t key_count = (want_pad || want_tokens ? g.keys : first_key) - first_key;

    Arena arena(g.scratch);
    Pair* query = arena.take<Pair>(g.tokens * words);
    Pair* grad_out = arena.take<Pair>(g.tokens * words);
    Pair* query_pairs = arena.take<Pair>((g.tokens + 1) / 2 * wide);
    Pair* grad_out_pairs = arena.take<Pair>((g.tokens + 1) / 2 * wide);
    Pair* key_pairs = arena.take<Pair>(columns / 2 * wide);
    Pair* key_transposed = arena.take<Pair>(words * columns);
    Pair* value_transposed = arena.take<Pair>(words * columns);
    float* grad_key = arena.take<float>(g.keys * wide);
    float* grad_value = arena.take<float>(g.keys * wide);
    float* score = arena.take<float>(kBlock * columns);
    float* grad_score = arena.take<float>(kBlock * columns);
    Pair* probability = arena.take<Pair>(kBlock / 2 * columns);
    Pair* by_query = arena.take<Pair>(kBlock / 2 * columns);
    Pair* by_key = want_tokens ? arena.take<Pair>(kBlock * columns / 2) : nullptr;
    float* grad_query = arena.take<float>(kBlock * wide);
    const BFloat16** rows = arena.take<const BFloat16*>(columns);

    pack_rows(g.query, g.tokens, d, query);
    pack_rows(g.grad_out, g.tokens, d, grad_out);
    if (key_count > 0) {
        pack_row_pairs(g.query, g.tokens, d, query_pairs);
        pack_row_pairs(g.grad_out, g.tokens, d, grad_out_pairs);
    }
    key_rows(g, g.channels, g.pad_key, columns, rows);
    pack_transposed(rows, columns, d, key_transposed);
    if (want_tokens) pack_row_pairs(rows, g.keys, d, key_pairs);
    key_rows(g, 2 * g.channels, g.pad_value, columns, rows);
    pack_transposed(rows, columns, d, value_transposed);

    Vec top[kBlock];
    for (int64_t i = 0, count = 0; i < g.tokens; i += count) {
        count = block_rows(g.tokens - i);  // even, or the last
        multiply(count, columns, words, query + i * words, words, 1, key_transposed, columns,
                 g.bias + i * columns, columns, score, columns, top);
        multiply(count, columns, words, grad_out + i * words, words, 1, value_transposed, columns, nullptr, 0,
                 grad_score, columns);
        float* grad_bias = g.grad_bias ? g.grad_bias + i * columns : nullptr;
        for (int64_t r = 0; r < count; r += 2) {
            const bool both = r + 1 < count;
            Pair* row = by_key ? by_key + r * columns / 2 : nullptr;
            softmax_backward_pairs(score + r * columns, grad_score + r * columns, columns, columns, g.scale,
                                   top + r, both,
                                   {probability + r / 2 * columns, by_query + r / 2 * columns, row,
                                    row ? row + columns / 2 : nullptr},
                                   [&](int h, int64_t j, Vec gradient) {
                                       if (!grad_bias) return;
                                       float* bias = grad_bias + (r + h) * columns + j;
                                       store(bias, load(bias) + gradient);
                                   });
            prefetch_token(g, i + r);
            if (both) prefetch_token(g, i + r + 1);
        }
        if (want_tokens) {
            multiply(count, wide, (g.keys + 1) / 2, by_key, columns / 2, 1, key_pairs, wide, nullptr, 0,
                     grad_query, wide);
            for (int64_t r = 0; r < count; ++r)
                write_pairs(g.grad_query[i + r], grad_query + r * wide, d, g.scale);
        }
        if (key_count > 0) {
            // dk = scale * dS^T q and dv = P^T dO, summed over the blocks of queries.
            multiply(key_count, wide, (count + 1) / 2, by_query + first_key, 1, columns,
                     query_pairs + i / 2 * wide, wide, i ? grad_key : nullptr, wide, grad_key, wide);
            multiply(key_count, wide, (count + 1) / 2, probability + first_key, 1, columns,
                     grad_out_pairs + i / 2 * wide, wide, i ? grad_value : nullptr, wide, grad_value, wide);
        }
    }
    write_key_gradients(g, grad_key, grad_value);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
