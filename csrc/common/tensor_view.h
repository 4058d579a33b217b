// A tensor as Python passes it, and the checks that every launcher makes of one.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "common/elements.h"

namespace magnet_fast {

inline int64_t bytes_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::kFloat32:
            return 4;
        case Dtype::kBFloat16:
        case Dtype::kFloat16:
            return 2;
        case Dtype::kFloat64:
            return 8;
        default:
            return 1;
    }
}

/// What tensors of this dtype are computed in, and their small sums returned in.
inline Dtype computed(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

/// Where a tensor lies and how. Without dimensions: a tensor that is not there (None in Python).
struct TensorView {
    static constexpr int kMostDimensions = 6;

    void* data = nullptr;
    int64_t sizes[kMostDimensions] = {};
    int64_t strides[kMostDimensions] = {};  // in elements
    Dtype dtype = Dtype::kFloat32;
    int dimensions = 0;

    bool given() const { return dimensions > 0; }
    bool empty() const {
        for (int i = 0; i < dimensions; ++i)
            if (sizes[i] == 0) return true;
        return false;
    }
};

[[noreturn]] inline void refuse(const std::string& argument, const std::string& expected, int64_t got) {
    throw std::invalid_argument(argument + ": expected " + expected + ", got " + std::to_string(got));
}

/// Throws std::invalid_argument "argument: expected ..., got ..." unless the condition holds.
inline void require(bool condition, const std::string& argument, const std::string& expected, int64_t got) {
    if (!condition) refuse(argument, expected, got);
}

/// The dtype of the tensor that says what a call computes with.
inline void check_dtype(const TensorView& view, const char* name) {
    const int code = static_cast<int>(view.dtype);
    if (code < 0 || code > static_cast<int>(Dtype::kFloat64))
        refuse(name, "dtype 0 (float32), 1 (bfloat16), 2 (float16) or 3 (float64)", code);
}

/// Checks of a tensor with any strides that are not negative (0: broadcast): dimensions, dtype and address.
inline void check_tensor(const TensorView& view, const char* name, int dimensions, Dtype dtype) {
    if (view.dimensions != dimensions)
        refuse(name, "a tensor of " + std::to_string(dimensions) + " dimensions", view.dimensions);
    if (view.dtype != dtype)
        refuse(name, "dtype " + std::to_string(static_cast<int>(dtype)) + " (common/elements.h)",
               static_cast<int>(view.dtype));
    for (int i = 0; i < dimensions; ++i) {
        if (view.sizes[i] < 0) refuse(name, "sizes of at least 0", view.sizes[i]);
        if (view.sizes[i] > 1 && view.strides[i] < 0) refuse(name, "strides of at least 0", view.strides[i]);
    }
    if (view.empty()) return;
    if (view.data == nullptr) refuse(name, "the address of a tensor", 0);
    const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) % bytes_of(dtype));
    if (misaligned != 0) refuse(name, "an address aligned for its dtype", misaligned);
}

/// The same, of these sizes.
inline void check_tensor(const TensorView& view, const char* name, std::initializer_list<int64_t> sizes,
                         Dtype dtype) {
    check_tensor(view, name, static_cast<int>(sizes.size()), dtype);
    for (size_t i = 0; i < sizes.size(); ++i)
        if (view.sizes[i] != sizes.begin()[i])
            refuse(name, "size " + std::to_string(sizes.begin()[i]) + " in dimension " + std::to_string(i),
                   view.sizes[i]);
}

/// From dimension `first` on, neighbours stand side by side.
inline void check_dense(const TensorView& view, const char* name, int first) {
    if (view.empty()) return;
    int64_t expected = 1;
    for (int i = view.dimensions; i-- > first; expected *= view.sizes[i])
        if (view.sizes[i] > 1 && view.strides[i] != expected)
            refuse(name, "stride " + std::to_string(expected) + " in dimension " + std::to_string(i),
                   view.strides[i]);
}

/// A contiguous tensor of these sizes; one that is not there, too, if it may be missing.
inline void check_contiguous(const TensorView& view, const char* name, std::initializer_list<int64_t> sizes,
                             Dtype dtype, bool may_be_missing = false) {
    if (may_be_missing && !view.given()) return;
    check_tensor(view, name, sizes, dtype);
    check_dense(view, name, 0);
}

}  // namespace magnet_fast
