// What the bindings share: addresses and strides as Python passes them.
#pragma once

#include <array>
#include <cstdint>

namespace magnet_fast {

using Address = uintptr_t;
using Strides = std::array<int64_t, 3>;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace magnet_fast
