// Where the processor multiplies pairs of bfloat16, weights and words are brought into that form: two terms
// of a sum side by side in 32 bits. Elsewhere these functions hand back what they are given.
#pragma once

#include "cpu/cross_modal_dot.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <typename Element>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<BFloat16> = true;

static inline int64_t dot_row(int64_t width) {
    return (width + 31) / 32 * 32 + 32;
}

/// Words for dot_scores; packed words of bfloat16 tensors are exact in it. `room`: words x packed_row(width).
static inline void round_words(int64_t words, int64_t width, const Real* packed, BFloat16* to) {
    for (int64_t t = 0; t < words; ++t, packed += packed_row(width), to += dot_row(width)) {
        int64_t c = 0;
        for (; c < width; c += 16) store(to + c, load(packed + c));
        for (; c < dot_row(width); ++c) to[c] = BFloat16{};
    }
}

/// to = 16 numbers of each, the words' lower halves, side by side.
static inline void store_pairs(Pair* to, __m512i first, __m512i second) {
    _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}

/// 16 numbers in bfloat16, in the lower halves of words.
static inline __m512i rounded_words(Vec v) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v));
}

/// Rows t and t + 1 of `from` side by side in row t / 2 of `to`; an odd last row beside zeros.
static inline void pair_rows(int64_t rows, int64_t columns, const Real* from, int64_t from_row, Pair* to,
                             int64_t to_row) {
    for (int64_t t = 0; t < rows; t += 2, to += to_row)
        for (int64_t c = 0; c < columns; c += 16)
            store_pairs(to + c, rounded_words(load(from + t * from_row + c)),
                        rounded_words(t + 1 < rows ? load(from + (t + 1) * from_row + c) : broadcast(0)));
}

/// The same for image rows, which are bfloat16 already.
static inline void pair_image_rows(Rows<const BFloat16> image, int64_t rows, int64_t columns, Pair* to,
                                   int64_t to_row) {
    const auto half = [columns](const BFloat16* p, int64_t c) {
        const int64_t count = columns - c;
        const __mmask16 mask = static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xFFFFu);
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + c));
    };
    for (int64_t p = 0; p < rows; p += 2, to += to_row) {
        const BFloat16 *first = image.data + p * image.stride, *second = first + image.stride;
        for (int64_t c = 0; c < columns; c += 16)
            store_pairs(to + c, half(first, c), p + 1 < rows ? half(second, c) : _mm512_setzero_si512());
    }
}

/// Neighbouring columns side by side: to (rows x to_row). Reads up to a multiple of 32 columns.
static inline void pair_columns(int64_t rows, int64_t columns, const Real* from, int64_t from_row, Pair* to,
                                int64_t to_row) {
    for (int64_t t = 0; t < rows; ++t, from += from_row, to += to_row) {
        for (int64_t c = 0; c < columns; c += 32)
            _mm512_storeu_si512(to + c / 2,
                                (__m512i)_mm512_cvtne2ps_pbh(load(from + c + 16), load(from + c)));
        if (columns % 2) to[columns / 2].bits &= 0xFFFFu;
    }
}
#else
template <typename Element>
constexpr bool kPairs = false;
#endif

/// What write_pixels and sum_pixels multiply.
template <typename Element>
struct WordOf {
    using Type = Real;
};
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <>
struct WordOf<BFloat16> {
    using Type = Pair;
};
#endif
template <typename Element>
using ProductWord = typename WordOf<Element>::Type;

/// Packed words as score_pixels wants them, at most in `room` (words x packed_row(width)).
template <typename Element>
static inline const void* words_for_scores(int64_t words, int64_t width, const Real* packed, Real* room) {
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
    if (kPairs<Element> && prefers_dots(width)) {
        round_words(words, width, packed, reinterpret_cast<BFloat16*>(room));
        return room;
    }
#endif
    (void)words, (void)width, (void)room;
    return packed;
}

/// Packed words as write_pixels wants them, at most in `room`.
template <typename Element>
static inline const ProductWord<Element>* words_for_pixels(int64_t words, int64_t width, const Real* packed,
                                                           Real* room) {
    (void)words, (void)width, (void)room;
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
    if constexpr (kPairs<Element>) {
        Pair* pairs = reinterpret_cast<Pair*>(room);
        pair_rows(words, round_up(width), packed, packed_row(width), pairs, packed_row(width));
        return pairs;
    } else
#endif
        return packed;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
