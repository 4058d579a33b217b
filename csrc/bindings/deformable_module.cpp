// Deformable attention's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/deformable_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

void forward(const TensorView& value, const TensorView& places, const TensorView& weights,
             const TensorView& reference, const TensorView& out, const MapSizes& spatial_shapes,
             int64_t threads) {
    deformable_attention_forward({value, places, weights, reference, spatial_shapes}, out, threads);
}

void backward(const TensorView& grad_out, const TensorView& value, const TensorView& places,
              const TensorView& weights, const TensorView& reference, const TensorView& grad_value,
              const TensorView& grad_places, const TensorView& grad_weights, const TensorView& grad_reference,
              const MapSizes& spatial_shapes, int64_t threads) {
    deformable_attention_backward({value, places, weights, reference, spatial_shapes}, grad_out,
                                  {grad_value, grad_places, grad_weights, grad_reference}, threads);
}

}  // namespace

void bind_deformable_attention(py::module_& m) {
    m.def("deformable_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "value"_a, "places"_a, "weights"_a, "reference"_a, "out"_a, "spatial_shapes"_a, "threads"_a,
          "Multi-scale deformable attention. value (B, S, h, d), out (B, Q, h*d) contiguous, written. With "
          "reference None, places (B, Q, h, L, K, 2) are locations, in float32 (float64 beside float64), and "
          "weights (B, Q, h, L, K) weights, both contiguous; with reference points (1 or B, Q, 1 or L, 2 or "
          "4), contiguous in float32 (float64 beside float64), offsets and logits, of value's dtype or of "
          "reference's; spatial_shapes is the list of the L maps' (height, width).");
    m.def("deformable_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out"_a, "value"_a, "places"_a, "weights"_a, "reference"_a, "grad_value"_a, "grad_places"_a,
          "grad_weights"_a, "grad_reference"_a, "spatial_shapes"_a, "threads"_a,
          "Gradients of deformable_attention_forward. All are contiguous, shaped like their tensors and "
          "overwritten; None: that gradient is not wanted.");
}

}  // namespace magnet_fast
