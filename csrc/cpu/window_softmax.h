// Softmax over rows of scores in units of the scale, forwards and backwards; compiled once per SIMD level.
#pragma once

#include "cpu/simd_power.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

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

static inline void log_sum_exp_rows(const Real* values, int64_t rows, int64_t columns, Real scale,
                                    Real* result, int64_t result_stride) {
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

static inline void softmax_rows(Real* values, int64_t rows, int64_t columns, Real scale, const Real* log_sum,
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
