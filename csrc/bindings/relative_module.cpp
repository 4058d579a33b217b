// Relative attention's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "bindings/arguments.h"
#include "cpu/relative_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

/// magnet_fast.ops._relative_attention.RelativeSettings as Python passes it.
using RelativeTuple = std::tuple<int64_t, int64_t, int64_t, double>;

RelativeAttentionInputs inputs_of(const TensorView& qkv, const TensorView& rel_height,
                                  const TensorView& rel_width, const TensorView& pad_qkv,
                                  const RelativeTuple& settings, int64_t threads) {
    const auto [heads, window_h, window_w, scale] = settings;
    return {qkv, rel_height, rel_width, pad_qkv, {heads, window_h, window_w, scale}, threads};
}

void forward(const TensorView& qkv, const TensorView& rel_height, const TensorView& rel_width,
             const TensorView& pad_qkv, const TensorView& out, const RelativeTuple& settings,
             int64_t threads) {
    relative_attention_forward(inputs_of(qkv, rel_height, rel_width, pad_qkv, settings, threads), out);
}

void backward(const TensorView& grad_out, const TensorView& qkv, const TensorView& rel_height,
              const TensorView& rel_width, const TensorView& pad_qkv, const TensorView& grad_qkv,
              const TensorView& grad_rel_height, const TensorView& grad_rel_width,
              const TensorView& grad_pad_qkv, const RelativeTuple& settings, int64_t threads) {
    relative_attention_backward(inputs_of(qkv, rel_height, rel_width, pad_qkv, settings, threads), grad_out,
                                {grad_qkv, grad_rel_height, grad_rel_width, grad_pad_qkv});
}

}  // namespace

void bind_relative_attention(py::module_& m) {
    m.def(
        "relative_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        "qkv"_a, "rel_height"_a, "rel_width"_a, "pad_qkv"_a, "out"_a, "settings"_a, "threads"_a,
        "Attention with decomposed relative positions. qkv (B, H, W, 3C), rel_height (2 window_h - 1, d) and "
        "rel_width (2 window_w - 1, d) contiguous, float64 beside float64, else float32; pad_qkv (3C) or "
        "None for "
        "zeros, out (B, H, W, C) written. settings: heads, window_h, window_w, scale.");
    m.def("relative_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out"_a, "qkv"_a, "rel_height"_a, "rel_width"_a, "pad_qkv"_a, "grad_qkv"_a,
          "grad_rel_height"_a, "grad_rel_width"_a, "grad_pad_qkv"_a, "settings"_a, "threads"_a,
          "Gradients of relative_attention_forward, shaped like their tensors and overwritten, those of the "
          "small ones "
          "in the dtype of the tables; None: that gradient is not wanted (of the tables: both or neither).");
}

}  // namespace magnet_fast
