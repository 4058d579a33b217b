// Window attention's backward kernels; compiled once for each element (MAGNET_FAST_ELEMENT).
#include "cuda/window_backward.cuh"

namespace magnet_fast {
namespace cuda {

template <>
WindowKernel WindowKernels<MAGNET_FAST_ELEMENT>::backward(int width) {
    using Element = MAGNET_FAST_ELEMENT;
    if (width == 16) return window_backward_kernel<Element, 16>;
    if (width == 32) return window_backward_kernel<Element, 32>;
    return window_backward_kernel<Element, 64>;
}

}  // namespace cuda
}  // namespace magnet_fast
