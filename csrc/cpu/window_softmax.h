// Softmax over rows of scores in units of the scale, forwards and backwards; compiled once per SIMD level.
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

/// score and grad (columns): from scores and dP to P and dS = P * (dP - sum(P * dP)); grad_bias += dS. An
/// infinite or NaN maximum gives NaN throughout, as torch's softmax does.
static inline void softmax_backward(Real* score, Real* grad, int64_t columns, Real scale, Vec top,
                                    Real* grad_bias) {
    const Vec highest = broadcast(reduce_max(top)), unit = broadcast(scale * kPowerUnit);
    Vec total = broadcast(Real{0}), dot = broadcast(Real{0});
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec weight = power((load(score + j) - highest) * unit);
        store(score + j, weight);
        total = total + weight;
        dot = multiply_add(weight, load(grad + j), dot);
    }
    const Real inverse = 1 / reduce_add(total);
    const Vec factor = broadcast(inverse), mean = broadcast(reduce_add(dot) * inverse);
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec probability = load(score + j) * factor;
        const Vec gradient = probability * (load(grad + j) - mean);
        store(score + j, probability);
        store(grad + j, gradient);
        if (grad_bias) store(grad_bias + j, load(grad_bias + j) + gradient);
    }
}

/// The maximum of a row's vectors.
static inline Vec row_top(const Real* row, int64_t columns) {
    Vec top = load(row);
    for (int64_t j = kLanes; j < columns; j += kLanes) top = maximum(top, load(row + j));
    return top;
}

static inline Real logarithm(float x) {
    return __builtin_logf(x);
}
static inline double logarithm(double x) {
    return __builtin_log(x);
}

static void log_sum_exp_rows(const Real* values, int64_t rows, int64_t columns, Real scale, Real* result,
                             int64_t result_stride) {
    const Vec unit = broadcast(scale * kPowerUnit);
    for (int64_t r = 0; r < rows; ++r, values += columns) {
        const Real highest = reduce_max(row_top(values, columns));
        Vec total = broadcast(Real{0});
        // A row of -infinity alone: its sum is 0 and its logarithm -infinity, not NaN.
        const Vec offset = broadcast(highest > -__builtin_inff() ? highest : Real{0});
        for (int64_t j = 0; j < columns; j += kLanes)
            total = total + power((load(values + j) - offset) * unit);
        result[r * result_stride] = highest + logarithm(reduce_add(total)) / scale;
    }
}

static void softmax_rows(Real* values, int64_t rows, int64_t columns, Real scale, const Real* log_sum,
                         const Real* weight, int64_t stride) {
    const Vec unit = broadcast(scale * kPowerUnit);
    for (int64_t r = 0; r < rows; ++r, values += columns) {
        const Real total = log_sum[r * stride];
        const Vec offset = broadcast(total > -__builtin_inff() ? total : Real{0}),
                  factor = broadcast(weight[r * stride]);
        for (int64_t j = 0; j < columns; j += kLanes)
            store(values + j, power((load(values + j) - offset) * unit) * factor);
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
