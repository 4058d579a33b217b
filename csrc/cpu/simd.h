// One vector type per instruction set: `Vec`, kLanes numbers wide, with the operations that the kernels need.
// The numbers are of type `Real`: float at every level but float64, which is scalar and there for gradient
// checks. Tensors of BFloat16 and Float16 are converted by load and store.
//
// The file is compiled once per SIMD level, into a namespace of that level's name, so that the linker can
// never put one level's code into another. For the same reason nothing here uses the C++ standard library.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/elements.h"

#if defined(MAGNET_FAST_SIMD_AVX2) || defined(MAGNET_FAST_SIMD_AVX512)
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined vectors inside of its own intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(MAGNET_FAST_EMULATE_AVX512)
#include "cpu/avx512_emulation.h"
#endif

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if defined(MAGNET_FAST_SIMD_FLOAT64)
using Real = double;
#else
using Real = float;
#endif

#if defined(MAGNET_FAST_SIMD_AVX512)

using Vec = __m512;
constexpr int64_t kLanes = 16;
// Rows of a register tile 1, 2, 3 or 4 vectors wide: sums, one row of B and one broadcast fill the registers.
constexpr int kTileRows[5] = {0, 12, 12, 8, 6};
// Width of the panels that weights are packed in.
constexpr int kPanelVectors = 4;

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
constexpr int kPanelVectors = 3;

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

#if defined(MAGNET_FAST_SIMD_FLOAT64)
constexpr int64_t kLanes = 1;
#else
constexpr int64_t kLanes = 4;
#endif
typedef Real Vec __attribute__((vector_size(sizeof(Real) * kLanes)));
constexpr int kTileRows[4] = {0, 8, 6, 4};
constexpr int kPanelVectors = 3;

static inline Vec load(const Real* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void store(Real* p, Vec v) {
    std::memcpy(p, &v, sizeof v);
}
static inline Vec broadcast(Real x) {
    return Vec{} + x;
}
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
    return a * b + c;
}
static inline Vec maximum(Vec a, Vec b) {
    return a > b ? a : b;
}

#endif

#if !defined(MAGNET_FAST_SIMD_AVX512)
static inline Real reduce_max(Vec v) {
    Real lane[kLanes];
    store(lane, v);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}
static inline Real reduce_add(Vec v) {
    Real lane[kLanes];
    store(lane, v);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
    return lane[0];
}
#endif

#if !defined(MAGNET_FAST_SIMD_FLOAT64)

/// One number from or to 16 bits, rounded to nearest even; NaN stays NaN.
static inline float widen(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
static inline void narrow(float value, BFloat16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    // Adding half of the last place carries into it; a NaN's payload could be lost in it, so NaN is set.
    to->bits = value == value ? static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16) : 0x7FC0u;
}
static inline float widen(Float16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
    uint32_t bits;
    float value;
    if (rest >= 0x7C00u) {  // infinity and NaN
        bits = sign | 0x7F800000u | (rest & 0x3FFu) << 13;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    // The exponents' offsets differ by 112; the product also makes subnormal numbers right.
    bits = sign | rest << 13;
    std::memcpy(&value, &bits, sizeof value);
    return value * 0x1p112f;
}
static inline void narrow(float value, Float16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) {
        to->bits = sign | 0x7E00u;
    } else if (bits >= 0x477FF000u) {  // from 65520 on, infinity
        to->bits = sign | 0x7C00u;
    } else if (bits < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to multiples of 2^-24
        float small;
        std::memcpy(&small, &bits, sizeof small);
        small += 0.5f;
        uint32_t sum;
        std::memcpy(&sum, &small, sizeof sum);
        to->bits = static_cast<uint16_t>(sign | (sum - 0x3F000000u));
    } else {
        to->bits = static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13));
    }
}

#if defined(MAGNET_FAST_SIMD_AVX512)
static inline Vec load(const BFloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
static inline void store(BFloat16* p, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
static inline Vec load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline void store(Float16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(MAGNET_FAST_SIMD_AVX2)
static inline Vec load(const BFloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline void store(BFloat16* p, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);  // within each half
    const __m128i low = _mm256_castsi256_si128(packed), high = _mm256_extracti128_si256(packed, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi64(low, high));
}
static inline Vec load(const Float16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline void store(Float16* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
template <typename Element>
static inline Vec load(const Element* p) {
    Vec v;
    for (int64_t i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
    return v;
}
template <typename Element>
static inline void store(Element* p, Vec v) {
    for (int64_t i = 0; i < kLanes; ++i) narrow(v[i], p + i);
}
#endif

#endif

static inline Real widen(Real x) {
    return x;
}
static inline void narrow(Real value, Real* to) {
    *to = value;
}

/// The first `count` numbers, 1 <= count <= kLanes, zeros after them. Nothing past them is read.
template <typename Element>
static inline Vec load_part(const Element* p, int64_t count) {
    Real lane[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lane[i] = widen(p[i]);
    return load(lane);
}

/// Writes the first `count` lanes and nothing past them.
template <typename Element>
static inline void store_part(Element* p, Vec v, int64_t count) {
    Real lane[kLanes];
    store(lane, v);
    for (int64_t i = 0; i < count; ++i) narrow(lane[i], p + i);
}

#if defined(MAGNET_FAST_SIMD_AVX512)
static inline Vec load_part(const float* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
static inline void store_part(float* p, Vec v, int64_t count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
#elif defined(MAGNET_FAST_SIMD_AVX2)
static inline __m256i first_lanes(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
static inline Vec load_part(const float* p, int64_t count) {
    return _mm256_maskload_ps(p, first_lanes(count));
}
static inline void store_part(float* p, Vec v, int64_t count) {
    _mm256_maskstore_ps(p, first_lanes(count), v);
}
#endif

/// e^x for x <= 0 (softmax subtracts the row's maximum), within 2 units in the last place; NaN stays NaN,
/// results below the smallest normal number become 0 (AVX-512: the subnormal number).
static inline Vec exponential(Vec x) {
#if defined(MAGNET_FAST_SIMD_FLOAT64)
    return Vec{__builtin_exp(x[0])};
#else
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
#endif
}

/// Transposes a 4 x 4 block: to[c * to_stride + r] = rows[r][c].
static inline void transpose4(const Real* const rows[4], Real* to, int64_t to_stride) {
#if defined(__SSE2__) && !defined(MAGNET_FAST_SIMD_FLOAT64)
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

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
