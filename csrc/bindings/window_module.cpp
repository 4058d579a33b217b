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

void forward(const TensorView& qkv, const TensorView& bias, const TensorView& pad_qkv, const TensorView& out,
             const WindowTuple& settings, int64_t threads) {
    window_attention_forward({qkv, bias, pad_qkv, settings_of(settings), threads}, out);
}

void backward(const TensorView& grad_out, const TensorView& qkv, const TensorView& bias,
              const TensorView& pad_qkv, const TensorView& grad_qkv, const TensorView& grad_bias,
              const TensorView& grad_pad_qkv, const WindowTuple& settings, int64_t threads) {
    window_attention_backward({qkv, bias, pad_qkv, settings_of(settings), threads}, grad_out, grad_qkv,
                              grad_bias, grad_pad_qkv);
}

}  // namespace

void bind_window_attention(py::module_& m) {
    m.def("window_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "qkv"_a, "bias"_a, "pad_qkv"_a, "out"_a, "settings"_a, "threads"_a,
          "Shifted-window attention. qkv (B, H, W, 3C), bias ((2wh-1)(2ww-1), heads) contiguous, pad_qkv "
          "(3C) or None for zeros, out (B, H, W, C) written. bias is float64 beside float64, else float32. "
          "settings: heads, window_h, window_w, shift_h, shift_w, scale, pad_first.");
    m.def("window_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out"_a, "qkv"_a, "bias"_a, "pad_qkv"_a, "grad_qkv"_a, "grad_bias"_a, "grad_pad_qkv"_a,
          "settings"_a, "threads"_a,
          "Gradients of window_attention_forward. grad_qkv, grad_bias and grad_pad_qkv are shaped like their "
          "tensors and overwritten; None: that gradient is not wanted.");
}

}  // namespace magnet_fast
