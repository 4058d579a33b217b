// Squares of numbers transposed in registers; compiled once per SIMD level like simd.h.
#pragma once

#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Transposes kLanes vectors.
static inline void transpose(Vec (&v)[kLanes]) {
#if defined(MAGNET_FAST_SIMD_AVX512)
    Vec t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    // After this, 128-bit part p of v[4 * g + j] holds column 4 * p + j of rows 4 * g to 4 * g + 3.
    for (int i = 0; i < 16; i += 4) {
        v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
        v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int j = 0; j < 4; ++j) {
        const Vec a = _mm512_shuffle_f32x4(v[j], v[4 + j], 0x88),
                  b = _mm512_shuffle_f32x4(v[j], v[4 + j], 0xDD),
                  c = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0x88),
                  d = _mm512_shuffle_f32x4(v[8 + j], v[12 + j], 0xDD);
        v[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        v[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
        v[8 + j] = _mm512_shuffle_f32x4(a, c, 0xDD);
        v[12 + j] = _mm512_shuffle_f32x4(b, d, 0xDD);
    }
#elif defined(MAGNET_FAST_SIMD_AVX2)
    Vec t[8];
    for (int i = 0; i < 8; i += 4) {
        const Vec a = _mm256_unpacklo_ps(v[i], v[i + 1]), b = _mm256_unpackhi_ps(v[i], v[i + 1]),
                  c = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), d = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
        t[i] = _mm256_shuffle_ps(a, c, 0x44);
        t[i + 1] = _mm256_shuffle_ps(a, c, 0xEE);
        t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        t[i + 3] = _mm256_shuffle_ps(b, d, 0xEE);
    }
    for (int j = 0; j < 4; ++j) {
        v[j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x20);
        v[4 + j] = _mm256_permute2f128_ps(t[j], t[4 + j], 0x31);
    }
#else
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < i; ++j) {
            const Real x = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = x;
        }
#endif
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
