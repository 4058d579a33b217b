// Forward on bfloat16 heads of a multiple of 32 channels with dot products of pairs: a point's left and right
// corner lie side by side, and one instruction weighs and adds both. Rows stay bfloat16, half as much memory
// to gather from; coefficients are rounded, sums are float32. Part of deformable_kernel.cpp, levels
// avx512_bf16 and amx.
#pragma once

#include "cpu/deformable_kernel.h"
#include "cpu/deformable_points.h"
#include "cpu/deformable_rows.h"
#include "cpu/simd_pair.h"

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

constexpr int64_t kDotChannels = 32;  // of a packed row, which is as long as kLanes Reals

static inline bool takes_dots(int64_t head_dim) {
    return head_dim % kDotChannels == 0;
}

/// As `pack`, for forward_dots.
static void pack_dots(const BFloat16* value, int64_t value_row, const DeformableLevel* level, int64_t levels,
                      int64_t rows, int64_t head_dim, Real* packed) {
    if (!takes_dots(head_dim)) return pack(value, value_row, level, levels, rows, head_dim, packed);
    for (int64_t first = 0; first < head_dim; first += kDotChannels, packed += rows * kLanes) {
        for (int64_t l = 0; l < levels; ++l) {
            const DeformableLevel& map = level[l];
            const BFloat16* from = value + map.position * value_row + first;
            Real* to = packed + map.first_row() * kLanes;
            zeros(to, 2 * map.line * kLanes);
            to += 2 * map.line * kLanes;
            for (int64_t y = 0; y < map.height; ++y) {
                zeros(to, kLanes);
                to += kLanes;
                for (int64_t x = 0; x < map.width; ++x, from += value_row, to += kLanes)
                    _mm512_storeu_si512(to, _mm512_loadu_si512(from));
            }
            zeros(to, (map.line + 1) * kLanes);
        }
    }
}

/// The coefficients of a point's two upper and of its two lower corners, as pairs, in the first two of the
/// four vectors where they stand.
static void pair_coefficients(int64_t count, const Points& p) {
    const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                                23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < count; i += kLanes) {
        Real* c = p.coefficient + 4 * i;
        const Vec upper[2] = {load(c), load(c + kLanes)},
                  lower[2] = {load(c + 2 * kLanes), load(c + 3 * kLanes)};
        const auto pairs = [&](const Vec* v) {
            return _mm512_permutexvar_epi16(interleave,
                                            reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0])));
        };
        _mm512_storeu_si512(c, pairs(upper));
        _mm512_storeu_si512(c + kLanes, pairs(lower));
    }
}

/// sum[0] and sum[1] += weights times the two neighbours at `left`: of each eight channels the first and the
/// second four.
static inline void add_neighbours(const Real* left, const Real* weights, Vec sum[2]) {
    const __m512i a = _mm512_loadu_si512(left), b = _mm512_loadu_si512(left + kLanes);
    Pair pair;
    std::memcpy(&pair, weights, sizeof pair);
    const __m512bh factor = broadcast(pair);
    sum[0] = multiply_add(factor, reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b)), sum[0]);
    sum[1] = multiply_add(factor, reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b)), sum[1]);
}

/// As `sample`, for channels first .. first + 31.
static void sample_dots(const DeformableForward<BFloat16>& a, int64_t query, int64_t queries, int64_t first,
                        const Points& p) {
    // Words of two channels: those of sum[0] stand in the lower half of what is rounded, sum[1]'s in the
    // upper.
    const __m512i in_order = _mm512_set_epi32(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0);
    const Real* value = a.value + first / kDotChannels * a.rows * kLanes;
    BFloat16* out = a.out + query * a.out_row + first;
    for (int64_t q = 0, i = 0; q < queries; ++q, out += a.out_row) {
        Vec upper[2] = {broadcast(0.0f), broadcast(0.0f)}, lower[2] = {upper[0], upper[0]};
        for (int64_t l = 0; l < a.levels; ++l) {
            const int64_t line = a.level[l].line * kLanes;
            for (const int64_t end = i + a.points; i < end; ++i) {
                const Real* corner = value + p.row[i] * kLanes;
                const Real* weights = p.coefficient + Points::corner_at(i);
                add_neighbours(corner, weights, upper);
                add_neighbours(corner + line, weights + kLanes, lower);
            }
        }
        const __m512bh rounded = _mm512_cvtne2ps_pbh(upper[1] + lower[1], upper[0] + lower[0]);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi32(in_order, reinterpret_cast<__m512i>(rounded)));
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
