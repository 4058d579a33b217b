// Deformable attention's part of the Python module; see cuda_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

#include "bindings/arguments.h"
#include "cuda/deformable_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

cuda::Strides3 strides3(const Strides& s) {
    return {s[0], s[1], s[2]};
}

/// A function of the arguments that every call has, followed by More.
template <typename Result, typename... More>
auto with_inputs(Result (*call)(cuda::DeformableParams, const cuda::Maps&, Dtype, const cuda::Place&,
                                More...)) {
    return [call](int dtype, int device, Address stream, Address value, const Strides& value_strides,
                  Address places, const Strides& places_strides, int places_dtype, Address weights,
                  const Strides& weights_strides, int weights_dtype, Address reference,
                  const Strides& reference_strides, int reference_dtype, int32_t coordinates, int64_t batch,
                  int32_t positions, int32_t heads, int32_t head_dim, int32_t queries, int32_t points,
                  const cuda::Maps& spatial_shapes, More... more) {
        cuda::DeformableParams p{};
        p.value = pointer<const void>(value);
        p.value_strides = strides3(value_strides);
        p.places = pointer<const void>(places);
        p.places_strides = strides3(places_strides);
        p.places_dtype = cuda::checked_dtype(places_dtype);
        p.weights = pointer<const void>(weights);
        p.weights_strides = strides3(weights_strides);
        p.weights_dtype = cuda::checked_dtype(weights_dtype);
        p.reference = pointer<const void>(reference);
        p.reference_strides = strides3(reference_strides);
        p.reference_dtype = cuda::checked_dtype(reference_dtype);
        p.coordinates = coordinates;
        p.batch = batch;
        p.positions = positions;
        p.heads = heads;
        p.head_dim = head_dim;
        p.queries = queries;
        p.points = points;
        return call(p, spatial_shapes, cuda::checked_dtype(dtype), {device, pointer<void>(stream)}, more...);
    };
}

void forward(cuda::DeformableParams p, const cuda::Maps& maps, Dtype dtype, const cuda::Place& place,
             Address out) {
    p.out = pointer<void>(out);
    cuda::deformable_attention_forward(p, maps, dtype, place);
}

using GradOutStrides = std::array<int64_t, 2>;

/// The backward pass's own arguments.
cuda::DeformableParams backward_params(cuda::DeformableParams p, Address grad_out,
                                       const GradOutStrides& grad_out_strides, Address grad_value,
                                       Address grad_places, Address grad_weights, Address grad_reference,
                                       int32_t reference_batch, int32_t reference_levels) {
    p.grad_out = pointer<const void>(grad_out);
    p.grad_out_batch = grad_out_strides[0];
    p.grad_out_query = grad_out_strides[1];
    p.grad_value = pointer<void>(grad_value);
    p.grad_places = pointer<void>(grad_places);
    p.grad_weights = pointer<void>(grad_weights);
    p.grad_reference = pointer<float>(grad_reference);
    p.reference_batch = reference_batch;
    p.reference_levels = reference_levels;
    return p;
}

int64_t workspace(cuda::DeformableParams p, const cuda::Maps& maps, Dtype, const cuda::Place&,
                  Address grad_out, const GradOutStrides& grad_out_strides, Address grad_value,
                  Address grad_places, Address grad_weights, Address grad_reference, int32_t reference_batch,
                  int32_t reference_levels) {
    return cuda::deformable_attention_workspace(
        backward_params(p, grad_out, grad_out_strides, grad_value, grad_places, grad_weights, grad_reference,
                        reference_batch, reference_levels),
        maps);
}

void backward(cuda::DeformableParams p, const cuda::Maps& maps, Dtype dtype, const cuda::Place& place,
              Address grad_out, const GradOutStrides& grad_out_strides, Address grad_value,
              Address grad_places, Address grad_weights, Address grad_reference, int32_t reference_batch,
              int32_t reference_levels, Address workspace, int64_t workspace_bytes) {
    cuda::deformable_attention_backward(
        backward_params(p, grad_out, grad_out_strides, grad_value, grad_places, grad_weights, grad_reference,
                        reference_batch, reference_levels),
        maps, dtype, place, pointer<void>(workspace), workspace_bytes);
}

/// Defines a function with the names of the common arguments and more.
template <typename Call, typename... Names>
void define(py::module_& m, const char* name, const Call& call, const char* text, const Names&... names) {
    m.def(name, with_inputs(call), py::call_guard<py::gil_scoped_release>(), py::kw_only(), "dtype"_a,
          "device"_a, "stream"_a, "value_ptr"_a, "value_strides"_a, "places_ptr"_a, "places_strides"_a,
          "places_dtype"_a, "weights_ptr"_a, "weights_strides"_a, "weights_dtype"_a, "reference_ptr"_a,
          "reference_strides"_a, "reference_dtype"_a, "coordinates"_a, "batch"_a, "positions"_a, "heads"_a,
          "head_dim"_a, "queries"_a, "points"_a, "spatial_shapes"_a, names..., text);
}

}  // namespace

void bind_cuda_deformable_attention(py::module_& m) {
    define(
        m, "deformable_attention_forward", &forward,
        "Multi-scale deformable attention. value (B, S, h, d), out (B, Q, h*d) contiguous, written. With "
        "reference_ptr 0, places (B, Q, h, L, K, 2) are locations and weights (B, Q, h, L, K) weights; with "
        "reference points (B, Q, L, coordinates), offsets and logits. Strides are (batch, position or query, "
        "head or level), what follows is contiguous; places, weights and reference are float32 or of "
        "value's dtype; spatial_shapes is the list of the L maps' (height, width).",
        "out_ptr"_a);
    define(m, "deformable_attention_workspace", &workspace,
           "Bytes of device memory that deformable_attention_backward with these arguments needs.",
           "grad_out_ptr"_a, "grad_out_strides"_a, "grad_value_ptr"_a, "grad_places_ptr"_a,
           "grad_weights_ptr"_a, "grad_reference_ptr"_a, "reference_batch"_a, "reference_levels"_a);
    define(m, "deformable_attention_backward", &backward,
           "Gradients of deformable_attention_forward; grad_out's strides are (batch, query). The others are "
           "contiguous, shaped like their tensors, of their dtypes, and overwritten; grad_reference is "
           "(reference_batch, Q, reference_levels, coordinates) in float32, summed over what is 1 there. "
           "Address 0: that gradient is not wanted.",
           "grad_out_ptr"_a, "grad_out_strides"_a, "grad_value_ptr"_a, "grad_places_ptr"_a,
           "grad_weights_ptr"_a, "grad_reference_ptr"_a, "reference_batch"_a, "reference_levels"_a,
           "workspace_ptr"_a, "workspace_bytes"_a);
}

}  // namespace magnet_fast
