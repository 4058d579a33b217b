// Compiled once per SIMD level; see simd.h and row_quantisation_kernel.h.
#include "cpu/row_quantisation_kernel.h"

#include <cstring>

#include "cpu/linear_chain_gelu.h"
#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Bytes 0 .. 255 of numbers that have kByteUnit added: the sum is rounded to nearest even, and its last byte
/// is the number.
#if defined(MAGNET_FAST_SIMD_FLOAT64)
constexpr Real kByteUnit = 0x1p52;
using Bits = uint64_t;
#else
constexpr Real kByteUnit = 0x1p23f;
using Bits = uint32_t;
#endif

static inline void store_bytes(uint8_t* to, Vec sums) {
    Real lanes[kLanes];
    store(lanes, sums);
    for (int64_t i = 0; i < kLanes; ++i) {
        Bits bits;
        std::memcpy(&bits, lanes + i, sizeof bits);
        to[i] = static_cast<uint8_t>(bits);
    }
}

template <typename Element>
static void quantise(int64_t width, const Element* x, Real most, uint8_t* bytes, Real* scale, Real* minimum) {
    const Vec zero = broadcast(Real{0});
    Vec greatest = load(x), least = zero - greatest, finite = zero;  // of -x, so that maximum serves both
    for (int64_t k = 0; k < width; k += kLanes) {
        const Vec value = load(x + k);
        greatest = maximum(greatest, value);
        least = maximum(least, zero - value);
        finite = multiply_add(value, zero, finite);  // NaN where a value is not finite
    }
    const Real low = -reduce_max(least), span = reduce_max(greatest) - low;
    *scale = span / most + reduce_add(finite);
    *minimum = low;
    const Real inverse = span > 0 ? most / span : Real{0};
    // The inverse of a subnormal span overflows: such a row is as good as constant.
    const Vec factor = broadcast(inverse < Real(1e38) ? inverse : Real{0}), first = broadcast(low);
    const Vec unit = broadcast(kByteUnit);
    for (int64_t k = 0; k < width; k += kLanes)
        store_bytes(bytes + k, multiply_add(load(x + k) - first, factor, unit));
}

template <typename Element, typename After>
static inline void write(int64_t width, const Real* sums, Real scale, Real minimum, const Real* totals,
                         const Element* bias, Element* y, const After& after) {
    const Vec wide = broadcast(scale), low = broadcast(minimum);
    for (int64_t n = 0; n < width; n += kLanes) {
        Vec value = multiply_add(low, load(totals + n), wide * load(sums + n));
        if (bias) value = value + load(bias + n);
        store(y + n, after(value, n));
    }
}

template <typename Element>
static void finish(int64_t width, const Real* sums, Real scale, Real minimum, const Real* totals,
                   const Element* bias, ChainActivation activation, const Element* residual, Element* y) {
    if (residual)
        write(width, sums, scale, minimum, totals, bias, y,
              [&](Vec value, int64_t n) { return value + load(residual + n); });
    else if (activation == ChainActivation::kGelu)
        write(width, sums, scale, minimum, totals, bias, y,
              [](Vec value, int64_t) { return gelu<Element>(value); });
    else if (activation == ChainActivation::kRelu)
        // maximum(a, b) is b where a is NaN: a NaN stays one.
        write(width, sums, scale, minimum, totals, bias, y,
              [](Vec value, int64_t) { return maximum(broadcast(Real{0}), value); });
    else
        write(width, sums, scale, minimum, totals, bias, y, [](Vec value, int64_t) { return value; });
}

template <typename Element>
const RowKernels<Element>& row_kernels() {
    static const RowKernels<Element> kernels = {quantise<Element>, finish<Element>};
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(RowKernels, row_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
