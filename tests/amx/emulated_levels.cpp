// Python module _cpu_emulated, for tests: the operators of magnet_fast._cpu at levels avx512, avx512_bf16 and
// amx alone, whatever the processor. What the list of units in conftest.py leaves out says so when it is
// called.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cpu/cross_modal_kernel.h"
#include "cpu/deformable_kernel.h"
#include "cpu/relative_kernel.h"
#include "cpu/window_kernel.h"

namespace magnet_fast {

#define ABSENT_(level, Element, Table, function)             \
    template <>                                              \
    const Table<Element>& level::function<Element>() {       \
        throw std::logic_error(#level " is not built here"); \
    }
#define ABSENT_LEVEL(level, Table, function)  \
    ABSENT_(level, float, Table, function)    \
    ABSENT_(level, BFloat16, Table, function) \
    ABSENT_(level, Float16, Table, function)
#define ABSENT(Table, function)             \
    ABSENT_LEVEL(portable, Table, function) \
    ABSENT_(float64, double, Table, function)
ABSENT(RelativeKernels, relative_kernels)
ABSENT(WindowKernels, window_kernels)
ABSENT(CrossModalKernels, cross_modal_kernels)
ABSENT(CrossModalBackwardKernels, cross_modal_backward_kernels)
ABSENT(DeformableKernels, deformable_kernels)
ABSENT_LEVEL(avx512, WindowKernels, window_kernels)
ABSENT_LEVEL(avx512, CrossModalKernels, cross_modal_kernels)
ABSENT_LEVEL(avx512, CrossModalBackwardKernels, cross_modal_backward_kernels)
ABSENT_LEVEL(avx512, DeformableKernels, deformable_kernels)
ABSENT_(amx, BFloat16, DeformableKernels, deformable_kernels)

namespace {

SimdLevel selected = SimdLevel::kAvx512;

void set_simd_level(const std::string& name) {
    selected = name == "amx"           ? SimdLevel::kAmx
               : name == "avx512_bf16" ? SimdLevel::kAvx512Bf16
               : name == "avx512"      ? SimdLevel::kAvx512
                                       : throw std::invalid_argument(name + " is not built here");
}

}  // namespace

SimdLevel selected_simd_level() {
    return selected;
}

void bind_cross_modal_attention(pybind11::module_& m);
void bind_deformable_attention(pybind11::module_& m);
void bind_relative_attention(pybind11::module_& m);
void bind_window_attention(pybind11::module_& m);

}  // namespace magnet_fast

PYBIND11_MODULE(_cpu_emulated, m) {
    magnet_fast::bind_cross_modal_attention(m);
    magnet_fast::bind_deformable_attention(m);
    magnet_fast::bind_relative_attention(m);
    magnet_fast::bind_window_attention(m);
    m.def("set_simd_level", &magnet_fast::set_simd_level);
}
