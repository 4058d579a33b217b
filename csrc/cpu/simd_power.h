// Powers of two for x <= 0, the exponentials of softmax and GELU; compiled once per SIMD level like simd.h.
#pragma once

#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if defined(MAGNET_FAST_SIMD_AVX512)

/// power(kPowerUnit * x) is e^x.
constexpr Real kPowerUnit = 1.44269504088896341f;

/// x less the largest integer below it, in [0, 1]. NaN stays NaN; -infinity gives what power() ignores.
static inline Vec fraction(Vec x) {
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)  // has AVX512DQ
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
    return x - _mm512_roundscale_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#endif
}

/// 2^x for x <= 0, 1 for 0 and 0 for -infinity; relative error 1.5e-7. scalef() does the integer part.
static inline Vec power(Vec x) {
#if !defined(MAGNET_FAST_SIMD_AVX512_BF16)
    x = _mm512_max_ps(broadcast(-200.0f), x);  // -infinity has no fraction; NaN, the second operand, stays
#endif
    const Vec r = fraction(x);
    Vec value = multiply_add(broadcast(1.867130279e-3f), r, broadcast(9.017029880e-3f));
    value = multiply_add(value, r, broadcast(5.579991342e-2f));
    value = multiply_add(value, r, broadcast(2.401644501e-1f));
    value = multiply_add(value, r, broadcast(6.931513118e-1f));
    value = multiply_add(value, r, broadcast(1.0f));
    return _mm512_scalef_ps(value, x);
}

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
/// a * b - c, rounded once: of a row's maximum and itself that need not be 0, only within rough_power()'s
/// error.
static inline Vec multiply_subtract(Vec a, Vec b, Vec c) {
    return _mm512_fmsub_ps(a, b, c);
}

/// As power(), with a relative error of 8.6e-5, a fortieth of bfloat16's.
static inline Vec rough_power(Vec x) {
    const Vec r = fraction(x);
    Vec value = multiply_add(broadcast(7.706705525e-2f), r, broadcast(2.276449767e-1f));
    value = multiply_add(value, r, broadcast(6.951167897e-1f));
    value = multiply_add(value, r, broadcast(1.0f));
    return _mm512_scalef_ps(value, x);
}
#endif

#else

constexpr Real kPowerUnit = 1;
static inline Vec power(Vec x) {
    return exponential(x);
}

#endif

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
