// One vector type per instruction set: `Vec`, kLanes floats wide, with the operations that the kernels need.
//
// The file is compiled once per SIMD level, into a namespace of that level's name, so that the linker can
// never put one level's code into another. For the same reason nothing here uses the C++ standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(MAGNET_FAST_SIMD_AVX2) || defined(MAGNET_FAST_SIMD_AVX512)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if defined(MAGNET_FAST_SIMD_AVX512)

using Vec = __m512;
constexpr int64_t kLanes = 16;
// Rows of a register tile 1, 2 or 3 vectors wide: sums, one row of B and one broadcast fill the registers.
constexpr int kTileRows[4] = {0, 12, 12, 8};

static inline Vec load(const float* p) {
    return _mm512_loadu_ps(p);
}
static inline void store(float* p, Vec v) {
    _mm512_storeu_ps(p, v);
}
static inline Vec broadcast(float x) {
    return _mm512_set1_ps(x);
}
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
static inline Vec maximum(Vec a, Vec b) {
    return _mm512_max_ps(a, b);
}
static inline float reduce_max(Vec v) {
    return _mm512_reduce_max_ps(v);
}
static inline float reduce_add(Vec v) {
    return _mm512_reduce_add_ps(v);
}

#elif defined(MAGNET_FAST_SIMD_AVX2)

using Vec = __m256;
constexpr int64_t kLanes = 8;
constexpr int kTileRows[4] = {0, 8, 6, 4};  // 16 registers

static inline Vec load(const float* p) {
    return _mm256_loadu_ps(p);
}
static inline void store(float* p, Vec v) {
    _mm256_storeu_ps(p, v);
}
static inline Vec broadcast(float x) {
    return _mm256_set1_ps(x);
}
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
static inline Vec maximum(Vec a, Vec b) {
    return _mm256_max_ps(a, b);
}

#else

typedef float Vec __attribute__((vector_size(16)));
constexpr int64_t kLanes = 4;
constexpr int kTileRows[4] = {0, 8, 6, 4};

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(float* p, Vec v) {
    std::memcpy(p, &v, sizeof v);
}
static inline Vec broadcast(float x) {
    return Vec{x, x, x, x};
}
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return a * b + c;
}
static inline Vec maximum(Vec a, Vec b) {
    return a > b ? a : b;
}

#endif

#if !defined(MAGNET_FAST_SIMD_AVX512)
static inline float reduce_max(Vec v) {
    float lane[kLanes];
    store(lane, v);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}
static inline float reduce_add(Vec v) {
    float lane[kLanes];
    store(lane, v);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}
#endif

/// e^x for x <= 0 (softmax subtracts the row's maximum), within 2 units in the last place; NaN stays NaN,
/// results below the smallest normal number become 0 (AVX-512: the subnormal number).
static inline Vec exponential(Vec x) {
    const Vec log2e = broadcast(1.44269504088896341f);
    // ln 2 in two parts, so that n * ln2_high is exact.
    const Vec minus_ln2_high = broadcast(-0.693359375f), minus_ln2_low = broadcast(2.12194440e-4f);
#if defined(MAGNET_FAST_SIMD_AVX512)
    const Vec n = _mm512_roundscale_ps(x * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits of the sum.
    const Vec magic = broadcast(12582912.0f);
    const Vec shifted = multiply_add(x, log2e, magic);
    const Vec n = shifted - magic;
#endif
    Vec r = multiply_add(n, minus_ln2_high, x);
    r = multiply_add(n, minus_ln2_low, r);
    Vec poly = broadcast(1.9875691500e-4f);
    poly = multiply_add(poly, r, broadcast(1.3981999507e-3f));
    poly = multiply_add(poly, r, broadcast(8.3334519073e-3f));
    poly = multiply_add(poly, r, broadcast(4.1665795894e-2f));
    poly = multiply_add(poly, r, broadcast(1.6666665459e-1f));
    poly = multiply_add(poly, r, broadcast(5.0000001201e-1f));
    poly = multiply_add(poly, r * r, r) + broadcast(1.0f);
#if defined(MAGNET_FAST_SIMD_AVX512)
    // x = -inf makes r NaN (inf - inf): those lanes are 0. An ordered comparison, so that NaN lanes stay NaN.
    const __mmask16 vanishing = _mm512_cmp_ps_mask(x, broadcast(-104.0f), _CMP_LT_OQ);
    return _mm512_mask_mov_ps(_mm512_scalef_ps(poly, n), vanishing, _mm512_setzero_ps());
#elif defined(MAGNET_FAST_SIMD_AVX2)
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const Vec scale = _mm256_castsi256_ps(_mm256_add_epi32(power, _mm256_set1_epi32(0x3F800000)));
    const Vec vanishing = _mm256_cmp_ps(x, broadcast(-87.33654f), _CMP_LT_OQ);
    return _mm256_andnot_ps(vanishing, poly * scale);
#else
    typedef uint32_t Bits __attribute__((vector_size(16)));
    Bits power;
    std::memcpy(&power, &shifted, sizeof power);
    power = (power << 23) + 0x3F800000u;
    Vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return x < broadcast(-87.33654f) ? broadcast(0.0f) : poly * scale;
#endif
}

/// Transposes a 4 x 4 block: to[c * to_stride + r] = rows[r][c].
static inline void transpose4(const float* const rows[4], float* to, int64_t to_stride) {
#if defined(__SSE2__)
    __m128 a = _mm_loadu_ps(rows[0]), b = _mm_loadu_ps(rows[1]), c = _mm_loadu_ps(rows[2]),
           d = _mm_loadu_ps(rows[3]);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    _mm_storeu_ps(to, a);
    _mm_storeu_ps(to + to_stride, b);
    _mm_storeu_ps(to + 2 * to_stride, c);
    _mm_storeu_ps(to + 3 * to_stride, d);
#else
    for (int64_t c = 0; c < 4; ++c)
        for (int64_t r = 0; r < 4; ++r) to[c * to_stride + r] = rows[r][c];
#endif
}

static inline int64_t round_up(int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

/// A register tile of C = init + A * B: Rows x (Vectors * kLanes), depth steps of one broadcast of A and one
/// row of B. A is addressed as a[row * a_row + k * a_depth], so that A and its transpose are both read in
/// place. init null: zeros.
template <int Rows, int Vectors>
static void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                 int64_t b_depth, const float* init, int64_t init_row, float* c, int64_t c_row) {
    Vec sum[Rows][Vectors];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Vectors; ++n)
            sum[m][n] = init ? load(init + m * init_row + n * kLanes) : broadcast(0.0f);
    // One pointer per three rows: base, base + a_row and base + 2 * a_row are all one x86 address.
    const float* base[(Rows + 2) / 3];
    for (int g = 0; g < (Rows + 2) / 3; ++g) base[g] = a + 3 * g * a_row;
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[Vectors];
        for (int n = 0; n < Vectors; ++n) row[n] = load(b + n * kLanes);
        b += b_depth;
        for (int m = 0; m < Rows; ++m) {
            const Vec scalar = broadcast(base[m / 3][(m % 3) * a_row]);
            for (int n = 0; n < Vectors; ++n) sum[m][n] = multiply_add(scalar, row[n], sum[m][n]);
        }
        for (int g = 0; g < (Rows + 2) / 3; ++g) base[g] += a_depth;
    }
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Vectors; ++n) store(c + m * c_row + n * kLanes, sum[m][n]);
}

template <int Vectors>
static void panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                  int64_t b_depth, const float* init, int64_t init_row, float* c, int64_t c_row) {
    // Tiles of nearly equal height: 49 rows are better cut into seven tiles of 7 than into six of 8 and one
    // of 1.
    int64_t tiles = (rows + kTileRows[Vectors] - 1) / kTileRows[Vectors];
    for (int64_t m = 0; m < rows; --tiles) {
        const int64_t height = (rows - m + tiles - 1) / tiles;
        const float* at = a + m * a_row;
        const float* init_at = init ? init + m * init_row : nullptr;
        float* ct = c + m * c_row;
        switch (height) {
#define MAGNET_FAST_TILE(R)                                                                        \
    case R:                                                                                        \
        if constexpr (R <= kTileRows[Vectors])                                                     \
            tile<R, Vectors>(depth, at, a_row, a_depth, b, b_depth, init_at, init_row, ct, c_row); \
        break;
            MAGNET_FAST_TILE(1)
            MAGNET_FAST_TILE(2)
            MAGNET_FAST_TILE(3)
            MAGNET_FAST_TILE(4)
            MAGNET_FAST_TILE(5)
            MAGNET_FAST_TILE(6)
            MAGNET_FAST_TILE(7)
            MAGNET_FAST_TILE(8)
            MAGNET_FAST_TILE(9)
            MAGNET_FAST_TILE(10)
            MAGNET_FAST_TILE(11)
            MAGNET_FAST_TILE(12)
#undef MAGNET_FAST_TILE
        }
        m += height;
    }
}

/// C (rows x columns) = init + A (rows x depth) * B (depth x columns); columns is a multiple of kLanes, B and
/// C have contiguous rows. init null: zeros; init == c: accumulate.
static inline void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                            int64_t a_depth, const float* b, int64_t b_depth, const float* init,
                            int64_t init_row, float* c, int64_t c_row) {
    for (int64_t n = 0, left = columns / kLanes; left > 0;) {
        // 3 + 3 + ... with a remainder of 1 taken as 2 + 2: a tile one vector wide waits on its own
        // additions.
        const int64_t wide = left == 1 ? 1 : (left == 2 || left == 4) ? 2 : 3;
        const float* init_at = init ? init + n : nullptr;
        if (wide == 3)
            panel<3>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row);
        else if (wide == 2)
            panel<2>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row);
        else
            panel<1>(rows, depth, a, a_row, a_depth, b + n, b_depth, init_at, init_row, c + n, c_row);
        n += wide * kLanes;
        left -= wide;
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
