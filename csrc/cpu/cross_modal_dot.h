// Scores of pixels as dot products of rows as they lie in memory, for 16 lanes: nothing is transposed but
// sums.
#pragma once

#include "cpu/cross_modal_ahead.h"

#if defined(MAGNET_FAST_SIMD_AVX512)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Below this width the sums over lanes cost more than transposing does.
static inline bool prefers_dots(int64_t width) {
    return width >= 64;
}

/// Vectors of channels, as multiply_add() takes them: of words in Real, zeros after the last, and of image
/// rows.
template <typename Element>
struct ChannelDot {
    using Word = Real;
    using Lanes = Vec;
    static constexpr int64_t kStep = 16;
    static inline Vec word(const Real* p) { return load(p); }
    static inline Vec image(const Element* p) { return load(p); }
    static inline Vec image_part(const Element* p, int64_t count) { return load_part(p, count); }
};

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <>
struct ChannelDot<BFloat16> {
    using Word = BFloat16;
    using Lanes = __m512bh;
    static constexpr int64_t kStep = 32;
    static inline Lanes word(const BFloat16* p) { return load(reinterpret_cast<const Pair*>(p)); }
    static inline Lanes image(const BFloat16* p) { return word(p); }
    static inline Lanes image_part(const BFloat16* p, int64_t count) {
        return (Lanes)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << count) - 1), p);
    }
};
#endif

/// Lane 4 * i + j of the result is the sum over the lanes of v[4 * i + j].
static inline Vec sums_of_16(const Vec (&v)[16]) {
    Vec four[4];
    for (int i = 0; i < 4; ++i) {
        const Vec *a = v + 4 * i, ab = _mm512_unpacklo_ps(a[0], a[1]) + _mm512_unpackhi_ps(a[0], a[1]),
                  cd = _mm512_unpacklo_ps(a[2], a[3]) + _mm512_unpackhi_ps(a[2], a[3]);
        // In each 128-bit part: that part's sum of a[0], a[1], a[2] and a[3].
        four[i] = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);
    }
    const Vec low =
        _mm512_shuffle_f32x4(four[0], four[1], 0x88) + _mm512_shuffle_f32x4(four[0], four[1], 0xDD);
    const Vec high =
        _mm512_shuffle_f32x4(four[2], four[3], 0x88) + _mm512_shuffle_f32x4(four[2], four[3], 0xDD);
    return _mm512_shuffle_f32x4(low, high, 0x88) + _mm512_shuffle_f32x4(low, high, 0xDD);
}

/// Scores of 1 to 4 words and 4 pixels.
template <typename Element, int Words>
static inline void dot_tile(int64_t width, const typename ChannelDot<Element>::Word* word, int64_t word_row,
                            const Element* const (&pixel)[4], Real scale, Real* to, int64_t to_row,
                            Ahead& ahead) {
    using Dot = ChannelDot<Element>;
    using Lanes = typename Dot::Lanes;
    Vec sum[16];
    for (int i = 0; i < 16; ++i) sum[i] = broadcast(0);
    const auto add = [&](int64_t c, const Lanes(&image)[4]) __attribute__((always_inline)) {
        for (int t = 0; t < Words; ++t) {
            const Lanes row = Dot::word(word + t * word_row + c);
            for (int i = 0; i < 4; ++i) sum[4 * t + i] = multiply_add(image[i], row, sum[4 * t + i]);
        }
    };
    int64_t c = 0;
    for (; c + Dot::kStep <= width; c += Dot::kStep) {
        ahead.step();
        Lanes image[4];
        for (int i = 0; i < 4; ++i) image[i] = Dot::image(pixel[i] + c);
        add(c, image);
    }
    if (c < width) {
        Lanes image[4];
        for (int i = 0; i < 4; ++i) image[i] = Dot::image_part(pixel[i] + c, width - c);
        add(c, image);
    }
    const Vec score = sums_of_16(sum) * broadcast(scale);
    _mm_storeu_ps(to, _mm512_castps512_ps128(score));
    if constexpr (Words > 1) _mm_storeu_ps(to + to_row, _mm512_extractf32x4_ps(score, 1));
    if constexpr (Words > 2) _mm_storeu_ps(to + 2 * to_row, _mm512_extractf32x4_ps(score, 2));
    if constexpr (Words > 3) _mm_storeu_ps(to + 3 * to_row, _mm512_extractf32x4_ps(score, 3));
}

template <typename Element>
static void dot_scores(int64_t words, int64_t width, const typename ChannelDot<Element>::Word* packed,
                       int64_t packed_row, Rows<const Element> image, int64_t pixels, Real scale,
                       Real* scores, int64_t score_row, Ahead ahead) {
    ahead.spread((pixels + 3) / 4 * ((words + 3) / 4) * (width / ChannelDot<Element>::kStep) + 1);
    for (int64_t p = 0; p < pixels; p += 4) {
        const Element* pixel[4];  // past the end the last one again
        for (int64_t i = 0; i < 4; ++i)
            pixel[i] = image.data + (p + i < pixels ? p + i : pixels - 1) * image.stride;
        for (int64_t t = 0; t < words; t += 4) {
            const auto* word = packed + t * packed_row;
            Real* to = scores + t * score_row + p;
            switch (words - t) {
                case 1:
                    dot_tile<Element, 1>(width, word, packed_row, pixel, scale, to, score_row, ahead);
                    break;
                case 2:
                    dot_tile<Element, 2>(width, word, packed_row, pixel, scale, to, score_row, ahead);
                    break;
                case 3:
                    dot_tile<Element, 3>(width, word, packed_row, pixel, scale, to, score_row, ahead);
                    break;
                default:
                    dot_tile<Element, 4>(width, word, packed_row, pixel, scale, to, score_row, ahead);
            }
        }
    }
    for (int64_t t = 0; t < words; ++t)
        for (int64_t p = pixels; p < round_up(pixels); ++p) scores[t * score_row + p] = 0;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
