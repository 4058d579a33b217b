// The number formats that tensors come in, and the one that each is computed in.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace magnet_fast {

/// Bit patterns only: arithmetic happens in float, see load and store in cpu/simd.h.
struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

/// Computed<Element>::Real: double for double, float for everything else.
template <typename Element>
struct Computed {
    using Real = float;
};
template <>
struct Computed<double> {
    using Real = double;
};

/// What Python passes for a tensor's dtype: magnet_fast.ops._view.DTYPE_CODES. The last two are for masks and
/// for working memory.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3, kBool = 4, kByte = 5 };

/// Calls work(Element{}) with the floating type that belongs to `dtype`; std::invalid_argument for others.
template <typename Work>
void with_element(Dtype dtype, const Work& work) {
    switch (dtype) {
        case Dtype::kFloat32:
            return work(float{});
        case Dtype::kBFloat16:
            return work(BFloat16{});
        case Dtype::kFloat16:
            return work(Float16{});
        case Dtype::kFloat64:
            return work(double{});
        default:
            break;
    }
    throw std::invalid_argument(
        "dtype: expected 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64), got " +
        std::to_string(static_cast<int>(dtype)));
}

template <typename Work>
void with_element(int code, const Work& work) {
    with_element(static_cast<Dtype>(code), work);
}

}  // namespace magnet_fast
