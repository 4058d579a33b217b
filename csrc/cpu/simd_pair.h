// Pairs of bfloat16, the words that levels avx512_bf16 and amx multiply; compiled once per SIMD level like
// simd.h.
#pragma once

#include "cpu/simd.h"

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Two bfloat16 numbers, depth 2k in the low half and 2k + 1 in the high one; two neighbours of a row are
/// one.
struct __attribute__((may_alias)) Pair {
    uint32_t bits;
};

static inline __m512bh load(const Pair* p) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}
static inline __m512bh broadcast(Pair x) {
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(x.bits)));
}
static inline Vec multiply_add(__m512bh a, __m512bh b, Vec c) {
    return _mm512_dpbf16_ps(c, a, b);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
