// Python module magnet_fast._cpu: declarations and exports only. Pointers are integers (tensor.data_ptr()).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/simd_level.h"
#include "cpu/window_attention.h"

namespace py = pybind11;
using namespace magnet_fast;
using py::literals::operator""_a;

namespace magnet_fast {
void bind_cross_modal_attention(py::module_& m);  // cross_modal_module.cpp
void bind_deformable_attention(py::module_& m);  // deformable_module.cpp
void bind_deformable_attention(py::module_& m);    // deformable_module.cpp
void bind_pixel_contrastive_loss(py::module_& m);  // pixel_contrastive_module.cpp
}

namespace {

MapStrides map_strides(const Strides& s) {
    return {s[0], s[1], s[2]};
}

void forward(Address qkv, Address bias, Address pad_qkv, Address out, int64_t batch, int64_t height,
             int64_t width, int64_t channels, int64_t heads, int64_t window_h, int64_t window_w,
             int64_t shift_h, int64_t shift_w, const Strides& qkv_strides, const Strides& out_strides,
             double scale, bool pad_first, int64_t threads) {
    window_attention_forward({
        {batch, height, width, channels, heads, window_h, window_w, shift_h, shift_w, scale, pad_first,
         threads},
        pointer<const float>(qkv),
        map_strides(qkv_strides),
        pointer<const float>(bias),
        pointer<const float>(pad_qkv),
        pointer<float>(out),
        map_strides(out_strides),
    });
}

void backward(Address grad_out, const Strides& grad_out_strides, Address qkv, const Strides& qkv_strides,
              Address bias, Address pad_qkv, Address grad_qkv, const Strides& grad_qkv_strides,
              Address grad_bias, Address grad_pad, int64_t batch, int64_t height, int64_t width,
              int64_t channels, int64_t heads, int64_t window_h, int64_t window_w, int64_t shift_h,
              int64_t shift_w, double scale, bool pad_first, int64_t threads) {
    window_attention_backward({
        {batch, height, width, channels, heads, window_h, window_w, shift_h, shift_w, scale, pad_first,
         threads},
        pointer<const float>(grad_out),
        map_strides(grad_out_strides),
        pointer<const float>(qkv),
        map_strides(qkv_strides),
        pointer<const float>(bias),
        pointer<const float>(pad_qkv),
        pointer<float>(grad_qkv),
        map_strides(grad_qkv_strides),
        pointer<float>(grad_bias),
        pointer<float>(grad_pad),
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() =
        "C++ operators for the CPU, float32. Addresses come from Tensor.data_ptr(), strides are counted in "
        "elements, and "
        "sizes are checked again here: ValueError names the argument. The caller keeps the tensors alive "
        "during a call.";

    m.def("window_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "qkv_ptr"_a, "bias_ptr"_a, "pad_qkv_ptr"_a, "out_ptr"_a, "batch"_a, "height"_a, "width"_a,
          "channels"_a, "heads"_a, "window_h"_a, "window_w"_a, "shift_h"_a, "shift_w"_a, "qkv_strides"_a,
          "out_strides"_a, "scale"_a, "pad_first"_a, "threads"_a,
          "Shifted-window attention. qkv (B, H, W, 3C), bias ((2wh-1)(2ww-1), heads) contiguous, pad_qkv "
          "(3C) or 0 for "
          "zeros, out (B, H, W, C) written; strides are (batch, height, width).");
    m.def("window_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out_ptr"_a, "grad_out_strides"_a, "qkv_ptr"_a, "qkv_strides"_a, "bias_ptr"_a, "pad_qkv_ptr"_a,
          "grad_qkv_ptr"_a, "grad_qkv_strides"_a, "grad_bias_ptr"_a, "grad_pad_ptr"_a, "batch"_a, "height"_a,
          "width"_a, "channels"_a, "heads"_a, "window_h"_a, "window_w"_a, "shift_h"_a, "shift_w"_a, "scale"_a,
          "pad_first"_a, "threads"_a,
          "Gradients of window_attention_forward. grad_qkv, grad_bias and grad_pad are shaped like their "
          "tensors and "
          "overwritten; address 0: that gradient is not wanted.");
    bind_cross_modal_attention(m);
    bind_deformable_attention(m);
    bind_pixel_contrastive_loss(m);
    m.def("simd_level", &simd_level,
          "Instruction set in use: 'avx512_bf16', 'avx512', 'avx2' or 'portable'.");
    m.def("supported_simd_levels", &supported_simd_levels, "Levels that this processor can run, best first.");
    m.def("set_simd_level", &set_simd_level, "name"_a,
          "Forces a level for this process; ValueError if not supported.");
}
