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

/// 16 numbers of each in bfloat16, side by side in 32 bits.
static inline Vec side_by_side(Vec first, Vec second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first)),
                  high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

/// Rows t and t + 1 of `from` side by side in row t / 2 of `to`; an odd last row beside zeros.
static inline void pair_rows(int64_t rows, int64_t columns, const Real* from, int64_t from_row, Real* to,
                             int64_t to_row) {
    for (int64_t t = 0; t < rows; t += 2, to += to_row)
        for (int64_t c = 0; c < columns; c += 16)
            store(to + c, side_by_side(load(from + t * from_row + c),
                                       t + 1 < rows ? load(from + (t + 1) * from_row + c) : broadcast(0)));
}

/// The same for image rows, which are bfloat16 already.
static inline void pair_image_rows(Rows<const BFloat16> image, int64_t rows, int64_t columns, Real* to,
                                   int64_t to_row) {
    const auto half = [columns](const BFloat16* p, int64_t c) {
        const int64_t count = columns - c;
        const __mmask16 mask = static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xFFFFu);
        return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p + c));
    };
    for (int64_t p = 0; p < rows; p += 2, to += to_row) {
        const BFloat16 *first = image.data + p * image.stride, *second = first + image.stride;
        for (int64_t c = 0; c < columns; c += 16) {
            const __m512i low = half(first, c),
                          high = p + 1 < rows ? half(second, c) : _mm512_setzero_si512();
            store(to + c, _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16))));
        }
    }
}

/// Neighbouring columns side by side: to (rows x to_row / 2 pairs). Reads up to a multiple of 32 columns.
static inline void pair_columns(int64_t rows, int64_t columns, const Real* from, int64_t from_row,
                                BFloat16* to, int64_t to_row) {
    for (int64_t t = 0; t < rows; ++t, from += from_row, to += to_row) {
        for (int64_t c = 0; c < columns; c += 32)
            _mm512_storeu_si512(to + c, (__m512i)_mm512_cvtne2ps_pbh(load(from + c + 16), load(from + c)));
        if (columns % 2) to[columns] = BFloat16{};
    }
}
#else
template <typename Element>
constexpr bool kPairs = false;
#endif

template <typename Element>
struct TermsOf {
    using Type = Singles;
};
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <>
struct TermsOf<BFloat16> {
    using Type = Pairs;
};
#endif
template <typename Element>
using ProductTerms = typename TermsOf<Element>::Type;

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
static inline const Real* words_for_pixels(int64_t words, int64_t width, const Real* packed, Real* room) {
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
    if constexpr (kPairs<Element>) {
        pair_rows(words, round_up(width), packed, packed_row(width), room, packed_row(width));
        return room;
    }
#endif
    (void)words, (void)width, (void)room;
    return packed;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
