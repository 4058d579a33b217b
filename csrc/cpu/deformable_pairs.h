// Heads of at most half a vector: rows of half a vector, so that one load reads a corner and the one to its
// right. Part of deformable_kernel.cpp, compiled once per SIMD level; only for AVX2 and AVX-512.
#pragma once

#include "cpu/deformable_kernel.h"
#include "cpu/deformable_points.h"
#include "cpu/deformable_rows.h"
#include "cpu/simd.h"

#if defined(MAGNET_FAST_SIMD_AVX512) || defined(MAGNET_FAST_SIMD_AVX2)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if defined(MAGNET_FAST_SIMD_AVX512)
using HalfVec = __m256;
static inline HalfVec load_half(const float* p) {
    return _mm256_loadu_ps(p);
}
static inline void store_half(float* p, HalfVec v) {
    _mm256_storeu_ps(p, v);
}
static inline HalfVec broadcast_half(float x) {
    return _mm256_set1_ps(x);
}
static inline HalfVec lower_half(Vec v) {
    return _mm512_castps512_ps256(v);
}
/// The first number in all lanes of the lower half, the second in those of the upper half.
static inline Vec two(float lower, float upper) {
    return _mm512_mask_blend_ps(0xFF00, _mm512_set1_ps(lower), _mm512_set1_ps(upper));
}
/// The lower half twice.
static inline Vec twice(Vec v) {
    return _mm512_shuffle_f32x4(v, v, 0x44);
}
/// Both halves added.
static inline Vec fold(Vec v) {
    return v + _mm512_shuffle_f32x4(v, v, 0x4E);
}
/// to[corner * 4 ...]: four partial sums of each half.
static inline void store_half_quarters(float* to, Vec upper, Vec lower) {
    store(to, _mm512_shuffle_f32x4(upper, lower, 0x88) + _mm512_shuffle_f32x4(upper, lower, 0xDD));
}
#else
using HalfVec = __m128;
static inline HalfVec load_half(const float* p) {
    return _mm_loadu_ps(p);
}
static inline void store_half(float* p, HalfVec v) {
    _mm_storeu_ps(p, v);
}
static inline HalfVec broadcast_half(float x) {
    return _mm_set1_ps(x);
}
static inline HalfVec lower_half(Vec v) {
    return _mm256_castps256_ps128(v);
}
static inline Vec two(float lower, float upper) {
    return _mm256_blend_ps(_mm256_set1_ps(lower), _mm256_set1_ps(upper), 0xF0);
}
static inline Vec twice(Vec v) {
    return _mm256_permute2f128_ps(v, v, 0x00);
}
static inline Vec fold(Vec v) {
    return v + _mm256_permute2f128_ps(v, v, 0x01);
}
static inline void store_half_quarters(float* to, Vec upper, Vec lower) {
    store(to, upper);
    store(to + 8, lower);
}
#endif

/// As `sample`.
template <typename Element>
static void sample_pairs(const DeformableForward<Element>& a, int64_t query, int64_t queries, const Strip&,
                         const Points& p) {
    constexpr int64_t kRow = kLanes / 2;
    Element* out = a.out + query * a.out_row;
    for (int64_t q = 0, i = 0; q < queries; ++q, out += a.out_row) {
        Vec sum[2] = {broadcast(0.0f), broadcast(0.0f)};
        for (int64_t l = 0; l < a.levels; ++l) {
            const int64_t line = a.level[l].line * kRow;
            for (const int64_t end = i + a.points; i < end; ++i) {
                const float* upper = a.value + p.row[i] * kRow;
                const float* c = p.coefficient + Points::corner_at(i);
                sum[0] = multiply_add(two(c[0], c[kLanes]), load(upper), sum[0]);
                sum[1] = multiply_add(two(c[2 * kLanes], c[3 * kLanes]), load(upper + line), sum[1]);
            }
        }
        store_some(out, fold(sum[0] + sum[1]), a.head_dim);
    }
}

/// As `differentiate`. The scatter adds corner by corner: a store of two corners and a load that overlaps
/// half of them, at the next point, would wait for each other.
template <bool Dots, bool Scatter, typename Element>
static void differentiate_pairs(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                                const Points& p) {
    constexpr int64_t kRow = kLanes / 2;
    const Element* grad_out = a.grad_out + query * a.out_row;
    float* quarters = p.quarters;
    for (int64_t q = 0, i = 0; q < queries; ++q, grad_out += a.out_row) {
        const Vec grad = twice(load_some(grad_out, a.head_dim));
        for (int64_t l = 0; l < a.levels; ++l) {
            const int64_t line = a.level[l].line * kRow;
            const int64_t corner[4] = {0, kRow, line, line + kRow};
            for (const int64_t end = i + a.points; i < end; ++i, quarters += 16) {
                const int64_t at = p.row[i] * kRow;
                if constexpr (Dots)
                    store_half_quarters(quarters, grad * load(a.value + at),
                                        grad * load(a.value + at + line));
                if constexpr (Scatter) {
                    const float* coefficient = p.coefficient + Points::corner_at(i);
                    for (int c = 0; c < 4; ++c) {
                        float* to = a.grad_value + at + corner[c];
                        const HalfVec part = broadcast_half(coefficient[c * kLanes]) * lower_half(grad);
                        store_half(to, part + load_half(to));
                    }
                }
            }
        }
    }
}

template <typename Element>
static void differentiate_pairs_wanted(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                                       const Strip&, const Points& p) {
    if (a.wants_points() && a.grad_value)
        differentiate_pairs<true, true>(a, query, queries, p);
    else if (a.wants_points())
        differentiate_pairs<true, false>(a, query, queries, p);
    else
        differentiate_pairs<false, true>(a, query, queries, p);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
