// GELU on vectors; compiled once per SIMD level like simd.h.
#pragma once

#include "cpu/simd_power.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if !defined(MAGNET_FAST_SIMD_FLOAT64)
/// Phi(-x) of the normal distribution for 0 <= x <= 16. Its logarithm is a polynomial, fitted on 0 .. 7 with
/// the error of x Phi(-x) as the weight; past that it falls on.
template <typename Element>
static inline Vec upper_tail(Vec x) {
    Vec exponent = broadcast(-1.17174397e-6f * kPowerUnit);
    exponent = multiply_add(exponent, x, broadcast(1.73869958e-5f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-7.93423096e-5f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-2.24116389e-4f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(5.08310413e-3f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-3.65386903e-2f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-3.18234563e-1f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-7.97897816e-1f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-6.93146408e-1f * kPowerUnit));
    return power(exponent);
}

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
/// The same for a result that is rounded to bfloat16, with a relative error of 2e-4 as far as 3.
template <>
inline Vec upper_tail<BFloat16>(Vec x) {
    Vec exponent = broadcast(-3.28073e-4f * kPowerUnit);
    exponent = multiply_add(exponent, x, broadcast(4.91064275e-3f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-3.592401e-2f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-3.18842471e-1f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-7.97665358e-1f * kPowerUnit));
    exponent = multiply_add(exponent, x, broadcast(-6.93173229e-1f * kPowerUnit));
    return rough_power(exponent);
}
#endif
#endif

/// x Phi(x), exact GELU, as max(x, 0) - |x| Phi(-|x|): within 5e-7, or 3e-5 for a result of bfloat16.
template <typename Element>
static inline Vec gelu(Vec x) {
#if defined(MAGNET_FAST_SIMD_FLOAT64)
    return Vec{x[0] * 0.5 * __builtin_erfc(x[0] * -0.70710678118654752)};
#else
    const Vec zero = broadcast(0.0f);
    const Vec minus_magnitude = maximum(zero - maximum(x, zero - x), broadcast(-16.0f));
    // maximum(a, b) is b where a is NaN: a NaN stays one.
    return multiply_add(minus_magnitude, upper_tail<Element>(zero - minus_magnitude), maximum(zero, x));
#endif
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
