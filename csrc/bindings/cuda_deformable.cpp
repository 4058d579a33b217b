// Deformable attention's part of the Python module; see cuda_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "cuda/deformable_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

void forward(const TensorView& value, const TensorView& places, const TensorView& weights,
             const TensorView& reference, const TensorView& out, const MapSizes& spatial_shapes, int device,
             Address stream) {
    cuda::deformable_attention_forward({value, places, weights, reference, spatial_shapes}, out,
                                       {device, pointer<void>(stream)});
}

int64_t workspace_bytes(const TensorView& grad_out, const TensorView& value, const TensorView& places,
                        const TensorView& weights, const TensorView& reference, const TensorView& grad_value,
                        const TensorView& grad_places, const TensorView& grad_weights,
                        const TensorView& grad_reference, const MapSizes& spatial_shapes, int, Address) {
    return cuda::deformable_attention_workspace({value, places, weights, reference, spatial_shapes}, grad_out,
                                                {grad_value, grad_places, grad_weights, grad_reference});
}

void backward(const TensorView& grad_out, const TensorView& value, const TensorView& places,
              const TensorView& weights, const TensorView& reference, const TensorView& grad_value,
              const TensorView& grad_places, const TensorView& grad_weights, const TensorView& grad_reference,
              const MapSizes& spatial_shapes, int device, Address stream, const TensorView& workspace) {
    cuda::deformable_attention_backward({value, places, weights, reference, spatial_shapes}, grad_out,
                                        {grad_value, grad_places, grad_weights, grad_reference},
                                        {device, pointer<void>(stream)}, workspace);
}

}  // namespace

void bind_cuda_deformable_attention(py::module_& m) {
    m.def(
        "deformable_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        "value"_a, "places"_a, "weights"_a, "reference"_a, "out"_a, "spatial_shapes"_a, "device"_a,
        "stream"_a,
        "Multi-scale deformable attention. value (B, S, h, d), out (B, Q, h*d) contiguous, written. With "
        "reference None, places (B, Q, h, L, K, 2) are locations and weights (B, Q, h, L, K) weights; with "
        "reference points (1 or B, Q, 1 or L, 2 or 4), offsets and logits. (L, K) of places and weights and "
        "the last dimension of the others are contiguous; places, weights and reference are float32 or of "
        "value's dtype; spatial_shapes is the list of the L maps' (height, width).");
    m.def("deformable_attention_workspace", &workspace_bytes, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "grad_out"_a, "value"_a, "places"_a, "weights"_a, "reference"_a, "grad_value"_a,
          "grad_places"_a, "grad_weights"_a, "grad_reference"_a, "spatial_shapes"_a, "device"_a, "stream"_a,
          "Bytes of device memory that deformable_attention_backward with these arguments needs.");
    m.def(
        "deformable_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
        "grad_out"_a, "value"_a, "places"_a, "weights"_a, "reference"_a, "grad_value"_a, "grad_places"_a,
        "grad_weights"_a, "grad_reference"_a, "spatial_shapes"_a, "device"_a, "stream"_a, "workspace"_a,
        "Gradients of deformable_attention_forward. They are contiguous, shaped like their tensors, of their "
        "dtypes, and overwritten; grad_reference is in float32. None: that gradient is not wanted.");
}

}  // namespace magnet_fast
