// Functions of the software model of AVX-512 on memory, for tests: called with ctypes.
#include <cstdint>

#include "cpu/simd.h"

// In the model's own namespace, where its functions are found before the intrinsics.
namespace magnet_fast {
namespace avx512_bf16 {
namespace {

__m512bh pairs(const void* p) {
    return bits_as<__m512bh>(_mm512_loadu_si512(p));
}
__m512 floats(const void* p) {
    return _mm512_loadu_ps(p);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void vdpbf16ps(const void* sum, const void* a, const void* b, void* to) {
    _mm512_storeu_ps(to, _mm512_dpbf16_ps(floats(sum), pairs(a), pairs(b)));
}
void vcvtne2ps2bf16(const void* high, const void* low, void* to) {
    _mm512_storeu_si512(to, bits_as<__m512i>(_mm512_cvtne2ps_pbh(floats(high), floats(low))));
}
void vscalefps(const void* a, const void* b, void* to) {
    _mm512_storeu_ps(to, _mm512_scalef_ps(floats(a), floats(b)));
}
/// Down.
void vreduceps(const void* v, void* to) {
    _mm512_storeu_ps(to, _mm512_reduce_ps(floats(v), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
}
/// To nearest.
void vrndscaleps(const void* v, void* to) {
    _mm512_storeu_ps(to, _mm512_roundscale_ps(floats(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
void vpermw(const void* places, const void* v, void* to) {
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_loadu_si512(places), _mm512_loadu_si512(v)));
}
void load_words(const void* p, uint32_t mask, void* to) {
    _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
}
void load_halves(const void* p, uint32_t mask, void* to) {
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, p));
}
void store_words(const void* v, uint32_t mask, void* to) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), _mm512_loadu_si512(v));
}
}

}  // namespace avx512_bf16
}  // namespace magnet_fast
