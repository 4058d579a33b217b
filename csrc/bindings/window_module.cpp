// Window attention's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/window_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

MapStrides map_strides(const Strides& s) {
    return {s[0], s[1], s[2]};
}

void forward(int dtype, Address qkv, Address bias, Address pad_qkv, Address out, int64_t batch,
             int64_t height, int64_t width, int64_t channels, int64_t heads, int64_t window_h,
             int64_t window_w, int64_t shift_h, int64_t shift_w, const Strides& qkv_strides,
             const Strides& out_strides, double scale, bool pad_first, int64_t threads) {
    with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = typename Computed<Element>::Real;
        window_attention_forward(WindowAttentionForward<Element>{
            {batch, height, width, channels, heads, window_h, window_w, shift_h, shift_w, scale, pad_first,
             threads},
            pointer<const Element>(qkv),
            map_strides(qkv_strides),
            pointer<const Real>(bias),
            pointer<const Element>(pad_qkv),
            pointer<Element>(out),
            map_strides(out_strides),
        });
    });
}

void backward(int dtype, Address grad_out, const Strides& grad_out_strides, Address qkv,
              const Strides& qkv_strides, Address bias, Address pad_qkv, Address grad_qkv,
              const Strides& grad_qkv_strides, Address grad_bias, Address grad_pad, int64_t batch,
              int64_t height, int64_t width, int64_t channels, int64_t heads, int64_t window_h,
              int64_t window_w, int64_t shift_h, int64_t shift_w, double scale, bool pad_first,
              int64_t threads) {
    with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = typename Computed<Element>::Real;
        window_attention_backward(WindowAttentionBackward<Element>{
            {batch, height, width, channels, heads, window_h, window_w, shift_h, shift_w, scale, pad_first,
             threads},
            pointer<const Element>(grad_out),
            map_strides(grad_out_strides),
            pointer<const Element>(qkv),
            map_strides(qkv_strides),
            pointer<const Real>(bias),
            pointer<const Element>(pad_qkv),
            pointer<Element>(grad_qkv),
            map_strides(grad_qkv_strides),
            pointer<Real>(grad_bias),
            pointer<Real>(grad_pad),
        });
    });
}

}  // namespace

void bind_window_attention(py::module_& m) {
    m.def("window_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "dtype"_a, "qkv_ptr"_a, "bias_ptr"_a, "pad_qkv_ptr"_a, "out_ptr"_a, "batch"_a, "height"_a,
          "width"_a, "channels"_a, "heads"_a, "window_h"_a, "window_w"_a, "shift_h"_a, "shift_w"_a,
          "qkv_strides"_a, "out_strides"_a, "scale"_a, "pad_first"_a, "threads"_a,
          "Shifted-window attention. qkv (B, H, W, 3C), bias ((2wh-1)(2ww-1), heads) contiguous, pad_qkv "
          "(3C) or 0 for zeros, out (B, H, W, C) "
          "written; strides are (batch, height, width). bias is float64 beside float64, else float32.");
    m.def("window_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "dtype"_a, "grad_out_ptr"_a, "grad_out_strides"_a, "qkv_ptr"_a, "qkv_strides"_a, "bias_ptr"_a,
          "pad_qkv_ptr"_a, "grad_qkv_ptr"_a, "grad_qkv_strides"_a, "grad_bias_ptr"_a, "grad_pad_ptr"_a,
          "batch"_a, "height"_a, "width"_a, "channels"_a, "heads"_a, "window_h"_a, "window_w"_a, "shift_h"_a,
          "shift_w"_a, "scale"_a, "pad_first"_a, "threads"_a,
          "Gradients of window_attention_forward. grad_qkv, grad_bias and grad_pad are shaped like their "
          "tensors and "
          "overwritten; address 0: that gradient is not wanted.");
}

}  // namespace magnet_fast
