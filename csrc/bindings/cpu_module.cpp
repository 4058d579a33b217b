// Python module magnet_fast._cpu: declarations and exports only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/simd_level.h"

namespace py = pybind11;
using namespace magnet_fast;
using py::literals::operator""_a;

namespace magnet_fast {
// Each in the file of its operator, *_module.cpp.
void bind_cross_modal_attention(py::module_& m);
void bind_deformable_attention(py::module_& m);
void bind_linear_chain(py::module_& m);
void bind_pixel_contrastive_loss(py::module_& m);
void bind_relative_attention(py::module_& m);
void bind_row_quantisation(py::module_& m);
void bind_window_attention(py::module_& m);
void bind_winograd(py::module_& m);
}  // namespace magnet_fast

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "C++ operators for the CPU. A tensor is (address, sizes, strides in elements, dtype), where dtype is "
        "0 "
        "(float32), 1 (bfloat16), 2 (float16), 3 (float64), 4 (bool) or 5 (uint8); None is a tensor that is "
        "not there. Sizes, strides and dtypes are checked here: ValueError names the argument. The caller "
        "keeps the tensors alive during a call.";

    bind_cross_modal_attention(m);
    bind_deformable_attention(m);
    bind_linear_chain(m);
    bind_pixel_contrastive_loss(m);
    bind_relative_attention(m);
    bind_row_quantisation(m);
    bind_window_attention(m);
    bind_winograd(m);
    m.def("simd_level", &simd_level,
          "Instruction set in use: 'amx', 'avx512_bf16', 'avx512', 'avx2' or 'portable'.");
    m.def("supported_simd_levels", &supported_simd_levels, "Levels that this processor can run, best first.");
    m.def("set_simd_level", &set_simd_level, "name"_a,
          "Forces a level for this process; ValueError if not supported.");
}
