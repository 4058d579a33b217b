// Window attention's part of the Python module; see cuda_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "cuda/window_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

cuda::WindowInputs inputs_of(const TensorView& qkv, const TensorView& bias, const TensorView& pad_qkv,
                             const WindowTuple& settings, bool tf32) {
    return {qkv, bias, pad_qkv, settings_of(settings),
            tf32 ? Float32Products::kTf32 : Float32Products::kExact};
}

void forward(const TensorView& qkv, const TensorView& bias, const TensorView& pad_qkv, const TensorView& out,
             const WindowTuple& settings, bool tf32, int device, Address stream) {
    cuda::window_attention_forward(inputs_of(qkv, bias, pad_qkv, settings, tf32), out,
                                   {device, pointer<void>(stream)});
}

int64_t workspace_bytes(const TensorView& grad_out, const TensorView& qkv, const TensorView& bias,
                        const TensorView& pad_qkv, const TensorView& grad_qkv, const TensorView& grad_bias,
                        const TensorView& grad_pad_qkv, const WindowTuple& settings, bool tf32, int device,
                        Address stream) {
    return cuda::window_attention_workspace(inputs_of(qkv, bias, pad_qkv, settings, tf32),
                                            {grad_out, grad_qkv, grad_bias, grad_pad_qkv},
                                            {device, pointer<void>(stream)});
}

void backward(const TensorView& grad_out, const TensorView& qkv, const TensorView& bias,
              const TensorView& pad_qkv, const TensorView& grad_qkv, const TensorView& grad_bias,
              const TensorView& grad_pad_qkv, const WindowTuple& settings, bool tf32, int device,
              Address stream, const TensorView& workspace) {
    cuda::window_attention_backward(inputs_of(qkv, bias, pad_qkv, settings, tf32),
                                    {grad_out, grad_qkv, grad_bias, grad_pad_qkv},
                                    {device, pointer<void>(stream)}, workspace);
}

}  // namespace

void bind_cuda_window_attention(py::module_& m) {
    m.def("window_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "qkv"_a, "bias"_a, "pad_qkv"_a, "out"_a, "settings"_a, "tf32"_a, "device"_a, "stream"_a,
          "Shifted-window attention. qkv (B, H, W, 3C), bias ((2wh-1)(2ww-1), heads) float32 contiguous, "
          "pad_qkv (3C) or None for zeros, out (B, H, W, C) written. settings: heads, window_h, window_w, "
          "shift_h, shift_w, scale, pad_first. tf32: float32 products may be made in TF32.");
    m.def("window_attention_workspace", &workspace_bytes, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "grad_out"_a, "qkv"_a, "bias"_a, "pad_qkv"_a, "grad_qkv"_a, "grad_bias"_a,
          "grad_pad_qkv"_a, "settings"_a, "tf32"_a, "device"_a, "stream"_a,
          "Bytes of device memory that window_attention_backward with these arguments needs.");
    m.def("window_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out"_a, "qkv"_a, "bias"_a, "pad_qkv"_a, "grad_qkv"_a, "grad_bias"_a, "grad_pad_qkv"_a,
          "settings"_a, "tf32"_a, "device"_a, "stream"_a, "workspace"_a,
          "Gradients of window_attention_forward. grad_qkv, and in float32 grad_bias and grad_pad_qkv, are "
          "shaped like their tensors and overwritten; None: that gradient is not wanted.");
}

}  // namespace magnet_fast
