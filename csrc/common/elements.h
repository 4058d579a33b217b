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

/// What Python passes for a tensor's dtype.
enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

/// Calls work(Element{}) with the type that belongs to `dtype`; std::invalid_argument for an unknown code.
template <typename Work>
void with_element(int dtype, const Work& work) {
    switch (static_cast<Dtype>(dtype)) {
        case Dtype::kFloat32:
            return work(float{});
        case Dtype::kBFloat16:
            return work(BFloat16{});
        case Dtype::kFloat16:
            return work(Float16{});
        case Dtype::kFloat64:
            return work(double{});
    }
    throw std::invalid_argument(
        "dtype: expected 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64), got " +
        std::to_string(dtype));
}

}  // namespace magnet_fast
