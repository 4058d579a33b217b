// The vectorised inner kernels of an int8 Linear: rows to bytes before the product, sums to results after it.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/linear_chain_kernel.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

/// One SIMD level's implementation. Widths are multiples of 16.
template <typename Element>
struct RowKernels {
    using Real = typename Computed<Element>::Real;
    /// x = minimum + scale * bytes, bytes 0 .. most rounded to nearest. A row that holds NaN or an infinity
    /// has the scale NaN.
    void (*quantise)(int64_t width, const Element* x, Real most, uint8_t* bytes, Real* scale, Real* minimum);
    /// y = activation(scale * sums + minimum * totals + bias) + residual; bias and residual may be null.
    void (*finish)(int64_t width, const Real* sums, Real scale, Real minimum, const Real* totals,
                   const Element* bias, ChainActivation activation, const Element* residual, Element* y);
};

MAGNET_FAST_DECLARE_KERNELS(RowKernels, row_kernels)

}  // namespace magnet_fast
