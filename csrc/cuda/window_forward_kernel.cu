// Window attention's forward kernels; compiled once for each element (MAGNET_FAST_ELEMENT).
#include "cuda/window_forward.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

template <typename Element, int Width>
WindowKernel choose(int tiles) {
    if constexpr (sizeof(Element) == 2)
        if (tiles == 6) return window_forward_kernel<Element, Width, 6>;
    return window_forward_kernel<Element, Width, 8>;
}

}  // namespace

template <>
WindowKernel WindowKernels<MAGNET_FAST_ELEMENT>::forward(int width, int tiles) {
    using Element = MAGNET_FAST_ELEMENT;
    if (width == 16) return choose<Element, 16>(tiles);
    if (width == 32) return choose<Element, 32>(tiles);
    return choose<Element, 64>(tiles);
}

}  // namespace cuda
}  // namespace magnet_fast
