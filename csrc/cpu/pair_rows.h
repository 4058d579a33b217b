// Rows of bfloat16 as pairs, and the softmax between their products: what window attention and relative
// attention share at levels avx512_bf16 and amx. Every operand of a product is bfloat16, packed so that two
// neighbours along the depth are one word; sums, scores and the softmax are float32.
#pragma once

#include "cpu/simd_matrix.h"
#include "cpu/simd_rows.h"
#include "cpu/window_rows.h"

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// to ((d + 1) / 2) = a row of d numbers, pairs along d; a zero completes an odd d.
static inline void pack_row(const BFloat16* row, int64_t d, Pair* to) {
    const int64_t words = (d + 1) / 2;
    int64_t c = 0;
    for (; c + 32 <= d; c += 32) _mm512_storeu_si512(to + c / 2, _mm512_loadu_si512(row + c));
    if (c < d) {
        const __m512i rest = _mm512_maskz_loadu_epi16((1u << (d - c)) - 1, row + c);
        _mm512_mask_storeu_epi32(to + c / 2, (1u << (words - c / 2)) - 1, rest);
    }
}

/// The first `count` numbers, at most kLanes, as words.
static inline __m512i words_of(const BFloat16* p, int64_t count) {
    const __mmask16 wanted = static_cast<__mmask16>(count < kLanes ? (1u << count) - 1 : 0xFFFFu);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(wanted, p));
}

/// to (round_up(d)) = two rows side by side; either may be null: zeros.
static inline void pack_row_pair(const BFloat16* first, const BFloat16* second, int64_t d, Pair* to) {
    const int64_t wide = round_up(d);
    for (int64_t c = 0; c < wide; c += kLanes) {
        __m512i word = first ? words_of(first + c, d - c) : _mm512_setzero_si512();
        if (second) word = _mm512_or_si512(word, _mm512_slli_epi32(words_of(second + c, d - c), 16));
        _mm512_storeu_si512(to + c, word);
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

/// What the scores and dP of two queries become, ready for the products.
struct RowPairGradients {
    Pair* probability;  // (columns) P, the queries side by side
    Pair* by_query;     // (columns) dS, likewise
    Pair* by_key;       // (columns / 2) dS of the first query, pairs along the columns; null: not wanted
    Pair* by_key_next;  // of the second
};

/// From the scores and dP of two queries, of which `both` says whether there is a second one, in rows
/// `stride` apart. `keep(h, j, dS)` gets the gradients of query h at 16 columns.
template <typename Keep>
static inline void softmax_backward_pairs(float* score, const float* grad, int64_t stride, int64_t columns,
                                          float scale, const Vec* top, bool both, const RowPairGradients& to,
                                          const Keep& keep) {
    // Lane 2k of the interleaved word vector is lane k of the first row, lane 2k + 1 lane k of the second.
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    Vec mean[2], factor[2];
    for (int h = 0; h < 1 + both; ++h)
        factor[h] = exponentiate(score + h * stride, grad + h * stride, columns, scale, top[h], mean + h);
    for (int64_t j = 0; j < columns; j += kLanes) {
        Vec p[2], ds[2];
        p[1] = ds[1] = broadcast(0.0f);
        for (int h = 0; h < 1 + both; ++h) {
            p[h] = load(score + h * stride + j) * factor[h];
            ds[h] = p[h] * (load(grad + h * stride + j) - mean[h]);
            keep(h, j, ds[h]);
        }
        const __m512i gradients = narrowed(ds[0], ds[1]);
        _mm512_storeu_si512(to.probability + j, _mm512_permutexvar_epi16(interleave, narrowed(p[0], p[1])));
        _mm512_storeu_si512(to.by_query + j, _mm512_permutexvar_epi16(interleave, gradients));
        if (to.by_key) {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.by_key + j / 2),
                                _mm512_castsi512_si256(gradients));
            if (both)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.by_key_next + j / 2),
                                    _mm512_extracti64x4_epi64(gradients, 1));
        }
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
