// Window attention's part of the Python module; see cuda_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cuda/window_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

cuda::MapStrides map_strides(const Strides& s) {
    return {s[0], s[1], s[2]};
}

/// A function of the arguments that every call has, followed by More.
template <typename Result, typename... More>
auto with_inputs(Result (*call)(cuda::WindowParams, Dtype, const cuda::Place&, More...)) {
    return [call](int dtype, int device, Address stream, bool tf32, Address qkv, Address bias,
                  Address pad_qkv, int64_t batch, int32_t height, int32_t width, int32_t channels,
                  int32_t heads, int32_t window_h, int32_t window_w, int32_t shift_h, int32_t shift_w,
                  const Strides& qkv_strides, double scale, bool pad_first, More... more) {
        cuda::WindowParams p{};
        p.qkv = pointer<const void>(qkv);
        p.pad_qkv = pointer<const void>(pad_qkv);
        p.bias = pointer<const float>(bias);
        p.qkv_strides = map_strides(qkv_strides);
        p.batch = batch;
        p.height = height;
        p.width = width;
        p.channels = channels;
        p.heads = heads;
        p.window_h = window_h;
        p.window_w = window_w;
        p.shift_h = shift_h;
        p.shift_w = shift_w;
        p.scale = static_cast<float>(scale);
        p.pad_first = pad_first;
        p.products = tf32 ? Float32Products::kTf32 : Float32Products::kExact;
        return call(p, cuda::checked_dtype(dtype), {device, pointer<void>(stream)}, more...);
    };
}

void forward(cuda::WindowParams p, Dtype dtype, const cuda::Place& place, Address out,
             const Strides& out_strides) {
    p.out = pointer<void>(out);
    p.out_strides = map_strides(out_strides);
    cuda::window_attention_forward(p, dtype, place);
}

/// The backward pass's own arguments.
cuda::WindowParams backward_params(cuda::WindowParams p, Address grad_out, const Strides& grad_out_strides,
                                   Address grad_qkv, const Strides& grad_qkv_strides, Address grad_bias,
                                   Address grad_pad) {
    p.grad_out = pointer<const void>(grad_out);
    p.grad_out_strides = map_strides(grad_out_strides);
    p.grad_qkv = pointer<void>(grad_qkv);
    p.grad_qkv_strides = map_strides(grad_qkv_strides);
    p.grad_bias = pointer<float>(grad_bias);
    p.grad_pad_qkv = pointer<float>(grad_pad);
    return p;
}

int64_t workspace(cuda::WindowParams p, Dtype dtype, const cuda::Place& place, Address grad_out,
                  const Strides& grad_out_strides, Address grad_qkv, const Strides& grad_qkv_strides,
                  Address grad_bias, Address grad_pad) {
    return cuda::window_attention_workspace(
        backward_params(p, grad_out, grad_out_strides, grad_qkv, grad_qkv_strides, grad_bias, grad_pad),
        dtype, place);
}

void backward(cuda::WindowParams p, Dtype dtype, const cuda::Place& place, Address grad_out,
              const Strides& grad_out_strides, Address grad_qkv, const Strides& grad_qkv_strides,
              Address grad_bias, Address grad_pad, Address workspace, int64_t workspace_bytes) {
    cuda::window_attention_backward(
        backward_params(p, grad_out, grad_out_strides, grad_qkv, grad_qkv_strides, grad_bias, grad_pad),
        dtype, place, pointer<void>(workspace), workspace_bytes);
}

/// Defines a function with the names of the common arguments and more.
template <typename Call, typename... Names>
void define(py::module_& m, const char* name, const Call& call, const char* text, const Names&... names) {
    m.def(name, with_inputs(call), py::call_guard<py::gil_scoped_release>(), py::kw_only(), "dtype"_a,
          "device"_a, "stream"_a, "tf32"_a, "qkv_ptr"_a, "bias_ptr"_a, "pad_qkv_ptr"_a, "batch"_a, "height"_a,
          "width"_a, "channels"_a, "heads"_a, "window_h"_a, "window_w"_a, "shift_h"_a, "shift_w"_a,
          "qkv_strides"_a, "scale"_a, "pad_first"_a, names..., text);
}

}  // namespace

void bind_cuda_window_attention(py::module_& m) {
    define(m, "window_attention_forward", &forward,
           "Shifted-window attention. qkv (B, H, W, 3C), bias ((2wh-1)(2ww-1), heads) float32 contiguous, "
           "pad_qkv "
           "(3C) or 0 for zeros, out (B, H, W, C) written; strides are (batch, height, width). tf32: float32 "
           "products may be made in TF32.",
           "out_ptr"_a, "out_strides"_a);
    define(m, "window_attention_workspace", &workspace,
           "Bytes of device memory that window_attention_backward with these arguments needs.",
           "grad_out_ptr"_a, "grad_out_strides"_a, "grad_qkv_ptr"_a, "grad_qkv_strides"_a, "grad_bias_ptr"_a,
           "grad_pad_ptr"_a);
    define(m, "window_attention_backward", &backward,
           "Gradients of window_attention_forward. grad_qkv, and in float32 grad_bias and grad_pad, are "
           "shaped like "
           "their tensors and overwritten; address 0: that gradient is not wanted.",
           "grad_out_ptr"_a, "grad_out_strides"_a, "grad_qkv_ptr"_a, "grad_qkv_strides"_a, "grad_bias_ptr"_a,
           "grad_pad_ptr"_a, "workspace_ptr"_a, "workspace_bytes"_a);
}

}  // namespace magnet_fast
