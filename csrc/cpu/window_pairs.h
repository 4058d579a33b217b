// Window attention on bfloat16 with dot products of pairs: levels avx512_bf16, where they do twice the work
// of float32's multiply-add, and amx, where tiles multiply them. Every operand of a product is bfloat16,
// packed so that two neighbours along the depth are one word; sums, scores and the softmax are float32.
//
// In the forward pass weights are rounded after the exponential, before their sum is taken.
#pragma once

#include "cpu/simd_matrix.h"
#include "cpu/window_gather.h"
#include "cpu/window_rows.h"

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// to (count x words): rows of d numbers, pairs along d; a zero completes an odd d.
static void pack_rows(const BFloat16* const* rows, int64_t count, int64_t d, Pair* to) {
    const int64_t words = (d + 1) / 2;
    for (int64_t i = 0; i < count; ++i, to += words) {
        int64_t c = 0;
        for (; c + 32 <= d; c += 32) _mm512_storeu_si512(to + c / 2, _mm512_loadu_si512(rows[i] + c));
        if (c < d) {
            const __m512i rest = _mm512_maskz_loadu_epi16((1u << (d - c)) - 1, rows[i] + c);
            _mm512_mask_storeu_epi32(to + c / 2, (1u << (words - c / 2)) - 1, rest);
        }
    }
}

/// to (words x count) = rows of d numbers, pairs along d, transposed; count is a multiple of kLanes.
static void pack_transposed(const BFloat16* const* rows, int64_t count, int64_t d, Pair* to) {
    // Moved as words of 32 bits, whatever they mean.
    transpose_rows(reinterpret_cast<const float* const*>(rows), count, d / 2, reinterpret_cast<float*>(to));
    if (d % 2)
        for (int64_t j = 0; j < count; ++j) to[d / 2 * count + j].bits = rows[j][d - 1].bits;
}

/// The first `count` numbers, at most kLanes, as words.
static inline __m512i words_of(const BFloat16* p, int64_t count) {
    const __mmask16 wanted = static_cast<__mmask16>(count < kLanes ? (1u << count) - 1 : 0xFFFFu);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, p));
}

/// to ((count + 1) / 2 x round_up(d)): pairs of neighbouring rows; zeros complete an odd count.
static void pack_row_pairs(const BFloat16* const* rows, int64_t count, int64_t d, Pair* to) {
    const int64_t wide = round_up(d);
    for (int64_t i = 0; i < count; i += 2, to += wide) {
        for (int64_t c = 0; c < wide; c += kLanes) {
            __m512i word = words_of(rows[i] + c, d - c);
            if (i + 1 < count)
                word = _mm512_or_si512(word, _mm512_slli_epi32(words_of(rows[i + 1] + c, d - c), 16));
            _mm512_storeu_si512(to + c, word);
        }
    }
}

/// to[0 .. d) = factor * from, 32 numbers at a time.
static inline void write_pairs(BFloat16* to, const float* from, int64_t d, float factor) {
    const Vec wide = broadcast(factor);
    int64_t c = 0;
    for (; c + 2 * kLanes <= d; c += 2 * kLanes)
        _mm512_storeu_si512(to + c, narrowed(load(from + c) * wide, load(from + c + kLanes) * wide));
    if (c < d) write_row(to + c, from + c, d - c, factor);
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

/// score = exp(scale * (score - highest)); returns the factor that makes P of it, and in `mean` sum(P * dP).
static inline Vec exponentiate(float* score, const float* grad, int64_t columns, float scale, Vec top,
                               Vec* mean) {
    const Vec unit = broadcast(scale * kPowerUnit), base = broadcast(reduce_max(top)) * unit;
    Vec total = broadcast(0.0f), dot = broadcast(0.0f);
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec weight = rough_power(multiply_subtract(load(score + j), unit, base));
        store(score + j, weight);
        total = total + weight;
        dot = multiply_add(weight, load(grad + j), dot);
    }
    const float inverse = 1 / reduce_add(total);
    *mean = broadcast(reduce_add(dot) * inverse);
    return broadcast(inverse);
}

/// What a block of scores and dP becomes, ready for the products.
struct BlockGradients {
    Pair* probability;   // (rows / 2, columns) P, pairs along the rows
    Pair* by_row_pairs;  // (rows / 2, columns) dS, likewise
    Pair* by_row;        // (rows, columns / 2) dS, pairs along the columns; null: not wanted
    float* grad_bias;    // (rows, columns), dS is added; null: not wanted
};

/// One pair of rows, beginning at row r; `both` false: there is only the first.
static inline void softmax_backward_pairs(float* score, float* grad, int64_t columns, float scale,
                                          const Vec* top, bool both, int64_t r, const BlockGradients& to) {
    // Lane 2k of the interleaved word vector is lane k of the first row, lane 2k + 1 lane k of the second.
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    Vec mean[2], factor[2];
    for (int h = 0; h < 1 + both; ++h)
        factor[h] = exponentiate(score + h * columns, grad + h * columns, columns, scale, top[h], mean + h);
    for (int64_t j = 0; j < columns; j += kLanes) {
        Vec p[2], ds[2];
        p[1] = ds[1] = broadcast(0.0f);
        for (int h = 0; h < 1 + both; ++h) {
            p[h] = load(score + h * columns + j) * factor[h];
            ds[h] = p[h] * (load(grad + h * columns + j) - mean[h]);
            if (to.grad_bias) {
                float* bias = to.grad_bias + (r + h) * columns + j;
                store(bias, load(bias) + ds[h]);
            }
        }
        const __m512i gradients = narrowed(ds[0], ds[1]);
        _mm512_storeu_si512(to.probability + r / 2 * columns + j,
                            _mm512_permutexvar_epi16(interleave, narrowed(p[0], p[1])));
        _mm512_storeu_si512(to.by_row_pairs + r / 2 * columns + j,
                            _mm512_permutexvar_epi16(interleave, gradients));
        if (to.by_row) {
            Pair* row = to.by_row + (r * columns + j) / 2;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(gradients));
            if (both)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + columns / 2),
                                    _mm512_extracti64x4_epi64(gradients, 1));
        }
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
    BlockGradients made;
    made.probability = arena.take<Pair>(kBlock / 2 * columns);
    made.by_row_pairs = arena.take<Pair>(kBlock / 2 * columns);
    made.by_row = want_tokens ? arena.take<Pair>(kBlock * columns / 2) : nullptr;
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
        made.grad_bias = g.grad_bias ? g.grad_bias + i * columns : nullptr;
        for (int64_t r = 0; r < count; r += 2) {
            const bool both = r + 1 < count;
            softmax_backward_pairs(score + r * columns, grad_score + r * columns, columns, g.scale, top + r,
                                   both, r, made);
            prefetch_token(g, i + r);
            if (both) prefetch_token(g, i + r + 1);
        }
        if (want_tokens) {
            multiply(count, wide, (g.keys + 1) / 2, made.by_row, columns / 2, 1, key_pairs, wide, nullptr, 0,
                     grad_query, wide);
            for (int64_t r = 0; r < count; ++r)
                write_pairs(g.grad_query[i + r], grad_query + r * wide, d, g.scale);
        }
        if (key_count > 0) {
            // dk = scale * dS^T q and dv = P^T dO, summed over the blocks of queries.
            multiply(key_count, wide, (count + 1) / 2, made.by_row_pairs + first_key, 1, columns,
                     query_pairs + i / 2 * wide, wide, i ? grad_key : nullptr, wide, grad_key, wide);
            multiply(key_count, wide, (count + 1) / 2, made.probability + first_key, 1, columns,
                     grad_out_pairs + i / 2 * wide, wide, i ? grad_value : nullptr, wide, grad_value, wide);
        }
    }
    write_key_gradients(g, grad_key, grad_value);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
