// The processor's peak: multiply-adds on registers alone, nothing loaded. Compiled by peak.py for this
// machine.
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
using Vec = __m512;
static inline Vec step(Vec sum, Vec a, Vec b) {
    return _mm512_fmadd_ps(a, b, sum);
}
static inline Vec of(float x) {
    return _mm512_set1_ps(x);
}
static inline float first(Vec v) {
    return _mm512_cvtss_f32(v);
}
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
using Vec = __m256;
static inline Vec step(Vec sum, Vec a, Vec b) {
    return _mm256_fmadd_ps(a, b, sum);
}
static inline Vec of(float x) {
    return _mm256_set1_ps(x);
}
static inline float first(Vec v) {
    return _mm256_cvtss_f32(v);
}
#else
using Vec = float;
static inline Vec step(Vec sum, Vec a, Vec b) {
    return sum + a * b;
}
static inline Vec of(float x) {
    return x;
}
static inline float first(Vec v) {
    return v;
}
#endif

// Twelve independent sums: more than two units times their latency of four. As written: no two rounds become
// one.
#define ALL(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define BEGIN(i) Vec sum##i = of(i);
#define STEP(i)                  \
    sum##i = step(sum##i, a, b); \
    asm volatile("" : "+x"(sum##i));
#define TOTAL(i) total += first(sum##i);

extern "C" {

/// Operations, a multiply-add being two, of `rounds` rounds in float32.
int64_t fma_float32(int64_t rounds, float* result) {
    const Vec a = of(*result), b = of(1e-9f);
    ALL(BEGIN)
    for (int64_t round = 0; round < rounds; ++round) {
        ALL(STEP)
    }
    float total = 0;
    ALL(TOTAL)
    *result = total;
    return rounds * 12 * 2 * static_cast<int64_t>(sizeof(Vec) / sizeof(float));
}
}
