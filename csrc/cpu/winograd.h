// A 3 x 3 convolution of stride, dilation and padding 1 by Winograd's algorithm, with bias, residual and
// ReLU; for inference, the weight is packed beforehand.
#pragma once

#include "cpu/winograd_kernel.h"

namespace magnet_fast {

/// What input and output channels must be multiples of, at the SIMD level in use.
template <typename Element>
int64_t winograd_step();

/// weight (out, in, 3, 3), contiguous, to `packed`: 16 * in * out numbers of the type that is computed in,
/// 64-byte aligned. It holds for the SIMD level in use only. std::invalid_argument, naming the argument.
template <typename Element>
void winograd_pack(const Element* weight, int64_t in, int64_t out, typename Computed<Element>::Real* packed);

/// std::invalid_argument, naming the argument, before anything is written. The result does not depend on the
/// threads.
template <typename Element>
void winograd_convolution(const WinogradConvolution<Element>& arguments, int64_t threads);

}  // namespace magnet_fast
