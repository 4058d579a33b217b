// What the launchers of the CPU kernels share: argument checks, aligned scratch memory, the thread's index.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "common/tensor_view.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace magnet_fast {

/// Checks the address of a tensor's first number.
template <typename Number>
void check_address(const Number* pointer, const std::string& argument) {
    require(pointer != nullptr, argument, "the address of a tensor", 0);
    const int64_t misaligned = reinterpret_cast<uintptr_t>(pointer) % alignof(Number);
    require(misaligned == 0, argument, "an address aligned for its dtype", misaligned);
}

/// The calling thread within its parallel region, from 0.
inline int64_t thread_index() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

struct FreeAligned {
    void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
template <typename Number>
using AlignedNumbers = std::unique_ptr<Number[], FreeAligned>;
using AlignedFloats = AlignedNumbers<float>;

/// Uninitialised memory at a 64-byte boundary: whole vectors then lie in one cache line each.
template <typename Number>
AlignedNumbers<Number> aligned_numbers(int64_t count) {
    return AlignedNumbers<Number>(
        static_cast<Number*>(::operator new[](count * sizeof(Number), std::align_val_t(64))));
}
inline AlignedFloats aligned_floats(int64_t count) {
    return aligned_numbers<float>(count);
}

}  // namespace magnet_fast
