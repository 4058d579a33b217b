// A software model of the AVX-512 instructions that the kernels use, for tests on processors with AVX2 alone:
// included by simd.h when MAGNET_FAST_EMULATE_AVX512 is defined. One function for every intrinsic, of its
// name, in the level's own namespace, where it is found before the intrinsic; vectors keep their types, which
// GCC and Clang split into two of 32 bytes. To be compiled with -mavx2 -mfma -mf16c.
//
// Written from the instructions' descriptions in Intel's Software Developer's Manual, volume 2, and the
// sequences' in the intrinsics guide. What a mask leaves out is neither read nor written. Modelled are the
// immediates that kernels use; not modelled: exceptions, which NaN of two comes out.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Macros with some compilers, those that take an immediate above all.
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extractf32x4_ps
#undef _mm512_extracti64x4_epi64
#undef _mm512_reduce_ps
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

// ---- Bits -----------------------------------------------------------------------------------------------

typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Shorts32 __attribute__((vector_size(64)));
typedef uint16_t Shorts16 __attribute__((vector_size(32)));

/// The same bits in another type.
template <typename To, typename From>
static inline __attribute__((always_inline)) To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

static inline __m512 joined(__m256 low, __m256 high) {
    const __m256 both[2] = {low, high};
    return bits_as<__m512>(both);
}
/// Part 0, 1, ... of a vector.
template <typename Part, typename Whole>
static inline __attribute__((always_inline)) Part part_of(const Whole& v, int number) {
    Part to;
    std::memcpy(&to, reinterpret_cast<const char*>(&v) + number * sizeof to, sizeof to);
    return to;
}
/// f(half of a, ...) of both halves.
template <typename F, typename... Vectors>
static inline __attribute__((always_inline)) __m512 by_halves(const F& f, const Vectors&... v) {
    return joined(f(part_of<__m256>(v, 0)...), f(part_of<__m256>(v, 1)...));
}

// ---- Memory ---------------------------------------------------------------------------------------------

static inline __m512 _mm512_loadu_ps(const void* p) {
    __m512 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void _mm512_storeu_ps(void* p, __m512 v) {
    std::memcpy(p, &v, sizeof v);
}
static inline __m512i _mm512_loadu_si512(const void* p) {
    __m512i v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static inline void _mm512_storeu_si512(void* p, __m512i v) {
    std::memcpy(p, &v, sizeof v);
}

/// `Vector` of those lanes of `Number` that the mask names, zeros elsewhere.
template <typename Vector, typename Number>
static inline Vector load_masked(uint32_t mask, const void* p) {
    Number lane[sizeof(Vector) / sizeof(Number)] = {};
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Number); ++i)
        if (mask >> i & 1) std::memcpy(lane + i, static_cast<const Number*>(p) + i, sizeof(Number));
    return bits_as<Vector>(lane);
}
template <typename Number, typename Vector>
static inline void store_masked(void* p, uint32_t mask, const Vector& v) {
    for (unsigned i = 0; i < sizeof(Vector) / sizeof(Number); ++i)
        if (mask >> i & 1)
            std::memcpy(static_cast<Number*>(p) + i, reinterpret_cast<const Number*>(&v) + i, sizeof(Number));
}
static inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
    return load_masked<__m512, float>(mask, p);
}
static inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
    return load_masked<__m512i, uint16_t>(mask, p);
}
static inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
    return load_masked<__m256i, uint16_t>(mask, p);
}
static inline void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
    store_masked<float>(p, mask, v);
}
static inline void _mm512_mask_storeu_epi32(void* p, __mmask16 mask, __m512i v) {
    store_masked<uint32_t>(p, mask, v);
}

// ---- Constants and types --------------------------------------------------------------------------------

static inline __m512 _mm512_set1_ps(float x) {
    return joined(_mm256_set1_ps(x), _mm256_set1_ps(x));
}
static inline __m512i _mm512_set1_epi32(int x) {
    return bits_as<__m512i>(Words16{} + static_cast<uint32_t>(x));
}
static inline __m512 _mm512_setzero_ps() {
    return __m512{};
}
static inline __m512i _mm512_setzero_si512() {
    return __m512i{};
}
template <typename... Numbers>
static inline __m512i _mm512_setr_epi32(Numbers... lowest_first) {
    static_assert(sizeof...(Numbers) == 16);
    const int32_t lane[] = {static_cast<int32_t>(lowest_first)...};
    return bits_as<__m512i>(lane);
}
/// The highest lane is the first argument.
template <typename Lane, int Count, typename... Numbers>
static inline __m512i set_reversed(Numbers... highest_first) {
    static_assert(sizeof...(Numbers) == Count);
    const Lane given[] = {static_cast<Lane>(highest_first)...};
    Lane lane[Count];
    for (int i = 0; i < Count; ++i) lane[i] = given[Count - 1 - i];
    return bits_as<__m512i>(lane);
}
template <typename... Numbers>
static inline __m512i _mm512_set_epi32(Numbers... highest_first) {
    return set_reversed<int32_t, 16>(highest_first...);
}
template <typename... Numbers>
static inline __m512i _mm512_set_epi16(Numbers... highest_first) {
    return set_reversed<int16_t, 32>(highest_first...);
}
static inline __m512 _mm512_castsi512_ps(__m512i v) {
    return bits_as<__m512>(v);
}
static inline __m512i _mm512_castps_si512(__m512 v) {
    return bits_as<__m512i>(v);
}
static inline __m256i _mm512_castsi512_si256(__m512i v) {
    return part_of<__m256i>(v, 0);
}
static inline __m256 _mm512_castps512_ps256(__m512 v) {
    return part_of<__m256>(v, 0);
}
static inline __m128 _mm512_castps512_ps128(__m512 v) {
    return part_of<__m128>(v, 0);
}

// ---- Integers -------------------------------------------------------------------------------------------

static inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return bits_as<__m512i>(bits_as<Words16>(a) & bits_as<Words16>(b));
}
static inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return bits_as<__m512i>(bits_as<Words16>(a) | bits_as<Words16>(b));
}
static inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return bits_as<__m512i>(bits_as<Words16>(a) + bits_as<Words16>(b));
}
/// Shifts of 0 to 31.
static inline __m512i _mm512_slli_epi32(__m512i v, int count) {
    return bits_as<__m512i>(bits_as<Words16>(v) << count);
}
static inline __m512i _mm512_srli_epi32(__m512i v, int count) {
    return bits_as<__m512i>(bits_as<Words16>(v) >> count);
}
static inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
    return bits_as<__m512i>(__builtin_convertvector(bits_as<Shorts16>(v), Words16));
}
static inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
    return bits_as<__m256i>(__builtin_convertvector(bits_as<Words16>(v), Shorts16));
}

// ---- Lanes that move ------------------------------------------------------------------------------------

/// Lane i of the result is lane from(i) of `v`, which may hold more lanes.
template <typename Lane, typename To, typename From, typename Place>
static inline __attribute__((always_inline)) To lanes_from(const From& v, const Place& from) {
    constexpr int kCount = sizeof(To) / sizeof(Lane);
    Lane given[sizeof(From) / sizeof(Lane)], lane[kCount];
    std::memcpy(given, &v, sizeof given);
    for (int i = 0; i < kCount; ++i) lane[i] = given[from(i)];
    return bits_as<To>(lane);
}
template <typename Vector>
struct Two {
    Vector first, second;
};
/// Within every 128 bits: the lower (0) or upper (1) half of the lanes of a and b, in turns.
template <typename Lane, typename Vector>
static inline Vector unpack(const Vector& a, const Vector& b, int upper) {
    constexpr int kPart = 16 / sizeof(Lane), kAll = sizeof(Vector) / sizeof(Lane);
    return lanes_from<Lane, Vector>(Two<Vector>{a, b}, [=](int i) {
        return i % 2 * kAll + i / kPart * kPart + upper * kPart / 2 + i % kPart / 2;
    });
}
static inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
    return by_halves([](__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); }, a, b);
}
static inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
    return by_halves([](__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); }, a, b);
}
static inline __m512i _mm512_unpacklo_epi16(__m512i a, __m512i b) {
    return unpack<uint16_t>(a, b, 0);
}
static inline __m512i _mm512_unpackhi_epi16(__m512i a, __m512i b) {
    return unpack<uint16_t>(a, b, 1);
}
/// Within every 128 bits: two lanes of a, then two of b.
static inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int places) {
    return lanes_from<float, __m512>(
        Two<__m512>{a, b}, [=](int i) { return i % 4 / 2 * 16 + i / 4 * 4 + (places >> 2 * (i % 4) & 3); });
}
/// Two parts of 128 bits of a, then two of b.
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int places) {
    return lanes_from<float, __m512>(
        Two<__m512>{a, b}, [=](int i) { return i / 8 * 16 + (places >> 2 * (i / 4) & 3) * 4 + i % 4; });
}
static inline __m512 _mm512_permutex2var_ps(__m512 a, __m512i places, __m512 b) {
    const Words16 place = bits_as<Words16>(places);
    return lanes_from<float, __m512>(Two<__m512>{a, b}, [&](int i) { return place[i] & 31; });
}
static inline __m512i _mm512_permutexvar_epi32(__m512i places, __m512i v) {
    const Words16 place = bits_as<Words16>(places);
    return lanes_from<uint32_t, __m512i>(v, [&](int i) { return place[i] & 15; });
}
static inline __m512i _mm512_permutexvar_epi16(__m512i places, __m512i v) {
    const Shorts32 place = bits_as<Shorts32>(places);
    return lanes_from<uint16_t, __m512i>(v, [&](int i) { return place[i] & 31; });
}
static inline __m128 _mm512_extractf32x4_ps(__m512 v, int part) {
    return part_of<__m128>(v, part);
}
static inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
    return part_of<__m256i>(v, half);
}
/// Lanes of `b` that the mask names, else of `a`.
template <typename Vector>
static inline Vector blended(uint32_t mask, const Vector& a, const Vector& b) {
    return lanes_from<uint32_t, Vector>(Two<Vector>{a, b}, [=](int i) { return i + (mask >> i & 1) * 16; });
}
static inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
    return blended(mask, a, b);
}
static inline __m512 _mm512_mask_mov_ps(__m512 otherwise, __mmask16 mask, __m512 v) {
    return blended(mask, otherwise, v);
}
static inline __m512i _mm512_mask_mov_epi32(__m512i otherwise, __mmask16 mask, __m512i v) {
    return blended(mask, otherwise, v);
}

// ---- Arithmetic -----------------------------------------------------------------------------------------

static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
static inline __m512 _mm512_fmsub_ps(__m512 a, __m512 b, __m512 c) {
    return by_halves([](__m256 x, __m256 y, __m256 z) { return _mm256_fmsub_ps(x, y, z); }, a, b, c);
}
static inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return by_halves([](__m256 x, __m256 y) { return _mm256_max_ps(x, y); }, a, b);
}
/// Folds halves onto each other, as the sequences that the guide names do.
template <typename F>
static inline float folded(__m512 v, const F& f) {
    float lane[16];
    std::memcpy(lane, &v, sizeof lane);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lane[i] = f(lane[i], lane[i + half]);
    return lane[0];
}
static inline float _mm512_reduce_max_ps(__m512 v) {
    return folded(v, [](float a, float b) { return a > b ? a : b; });
}
static inline float _mm512_reduce_add_ps(__m512 v) {
    return folded(v, [](float a, float b) { return a + b; });
}
/// _CMP_LT_OQ or _CMP_UNORD_Q.
static inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
    if (predicate != _CMP_LT_OQ && predicate != _CMP_UNORD_Q) __builtin_trap();
    uint32_t mask = 0;
    for (int i = 0; i < 16; ++i) {
        const bool unordered = a[i] != a[i] || b[i] != b[i];
        mask |= static_cast<uint32_t>(predicate == _CMP_UNORD_Q ? unordered : a[i] < b[i]) << i;
    }
    return static_cast<__mmask16>(mask);
}
/// To whole numbers: nearest even or down.
static inline __m512 _mm512_roundscale_ps(__m512 v, int how) {
    switch (how & ~_MM_FROUND_NO_EXC) {
        case _MM_FROUND_TO_NEAREST_INT:
            return by_halves(
                [](__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); },
                v);
        case _MM_FROUND_TO_NEG_INF:
            return by_halves(
                [](__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }, v);
    }
    __builtin_trap();
}
/// What rounding takes away; nothing of an infinity.
static inline __m512 _mm512_reduce_ps(__m512 v, int how) {
    __m512 rest = v - _mm512_roundscale_ps(v, how);
    for (int i = 0; i < 16; ++i)
        if (__builtin_isinf(v[i])) rest[i] = 0;
    return rest;
}
/// a * 2^floor(b), rounded once.
static inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
    const __m512 floors = _mm512_roundscale_ps(b, _MM_FROUND_TO_NEG_INF);
    __m512 result;
    for (int i = 0; i < 16; ++i) {
        const bool up = b[i] > 0;
        if (a[i] != a[i] || b[i] != b[i])
            result[i] = a[i] + b[i];
        else if (__builtin_isinf(b[i]) && (up ? a[i] == 0 : __builtin_isinf(a[i])))
            result[i] = __builtin_nanf("");
        else {
            // Beyond 400 every float is 0 or infinite; within, the product in double is exact.
            const float n = floors[i] < -400 ? -400.0f : floors[i] > 400 ? 400.0f : floors[i];
            const uint64_t power = static_cast<uint64_t>(1023 + static_cast<int>(n)) << 52;
            result[i] = static_cast<float>(a[i] * bits_as<double>(power));
        }
    }
    return result;
}

// ---- 16 bits --------------------------------------------------------------------------------------------

static inline __m512 _mm512_cvtph_ps(__m256i v) {
    return joined(_mm256_cvtph_ps(part_of<__m128i>(v, 0)), _mm256_cvtph_ps(part_of<__m128i>(v, 1)));
}
static inline __m256i _mm512_cvtps_ph(__m512 v, int how) {
    if (how != _MM_FROUND_TO_NEAREST_INT) __builtin_trap();
    const __m128i both[2] = {_mm256_cvtps_ph(part_of<__m256>(v, 0), _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(part_of<__m256>(v, 1), _MM_FROUND_TO_NEAREST_INT)};
    return bits_as<__m256i>(both);
}

/// Subnormal numbers are zeros of their sign.
static inline __m256 flushed(__m256 v) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 small = _mm256_cmp_ps(_mm256_andnot_ps(sign, v), _mm256_set1_ps(0x1p-126f), _CMP_LT_OQ);
    return _mm256_blendv_ps(v, _mm256_and_ps(sign, v), small);
}
/// VCVTNEPS2BF16: to nearest even, whatever the processor's mode; subnormal numbers are zeros, NaN is quiet.
static inline __m256i narrowed_lanes(__m512 v) {
    const Words16 bits = bits_as<Words16>(by_halves([](__m256 x) { return flushed(x); }, v));
    const Words16 rounded = (bits + (0x7FFFu + (bits >> 16 & 1u))) >> 16, nan = bits >> 16 | 0x40u;
    const Words16 is_nan = bits_as<Words16>((bits & 0x7FFFFFFFu) > 0x7F800000u);  // all ones where so
    return bits_as<__m256i>(__builtin_convertvector((is_nan & nan) | (~is_nan & rounded), Shorts16));
}
static inline __m256bh _mm512_cvtneps_pbh(__m512 v) {
    return bits_as<__m256bh>(narrowed_lanes(v));
}
/// The second argument comes first.
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
    return bits_as<__m512bh>(Two<__m256i>{narrowed_lanes(low), narrowed_lanes(high)});
}
/// VDPBF16PS: to every sum the product of its two odd numbers, then that of its two even ones; each addition
/// rounded once to nearest even, subnormal numbers and results zeros.
static inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
    const auto number = [](const __m512bh& v, int half, bool odd) {
        const __m256i words = part_of<__m256i>(v, half);
        return flushed(_mm256_castsi256_ps(odd ? _mm256_and_si256(words, _mm256_set1_epi32(-65536))
                                               : _mm256_slli_epi32(words, 16)));
    };
    __m256 halves[2];
    for (int half = 0; half < 2; ++half) {
        const __m256 start = flushed(part_of<__m256>(sum, half));
        const __m256 odd = flushed(_mm256_fmadd_ps(number(a, half, true), number(b, half, true), start));
        halves[half] = flushed(_mm256_fmadd_ps(number(a, half, false), number(b, half, false), odd));
    }
    return joined(halves[0], halves[1]);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
