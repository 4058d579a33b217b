// Deformable attention's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "cpu/deformable_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

using Maps = std::vector<std::pair<int64_t, int64_t>>;
using Pointer = const void;

DeformableAttentionPoints located(Address locations, Address weights) {
    DeformableAttentionPoints points;
    points.locations = pointer<Pointer>(locations);
    points.weights = pointer<Pointer>(weights);
    return points;
}

DeformableAttentionPoints from_logits(Address reference, int64_t reference_batch, int64_t reference_levels,
                                      int64_t coordinates, Address offsets, const Strides& offsets_strides,
                                      Address logits, const Strides& logits_strides, bool wide) {
    DeformableAttentionPoints points;
    points.offsets = pointer<Pointer>(offsets);
    points.logits = pointer<Pointer>(logits);
    points.offsets_strides = {offsets_strides[0], offsets_strides[1], offsets_strides[2]};
    points.logits_strides = {logits_strides[0], logits_strides[1], logits_strides[2]};
    points.wide = wide;
    points.reference = pointer<Pointer>(reference);
    points.reference_batch = reference_batch;
    points.reference_levels = reference_levels;
    points.coordinates = coordinates;
    return points;
}

void forward(Address value, const Strides& strides, Address locations, Address weights, Address out,
             int64_t batch, int64_t positions, int64_t heads, int64_t head_dim, int64_t queries,
             int64_t points, const Maps& spatial_shapes, int64_t threads, int dtype) {
    deformable_attention_forward({
        {batch, positions, heads, head_dim, queries, points, spatial_shapes, threads, dtype},
        pointer<Pointer>(value),
        {strides[0], strides[1], strides[2]},
        located(locations, weights),
        pointer<void>(out),
    });
}

void backward(Address grad_out, Address value, const Strides& strides, Address locations, Address weights,
              Address grad_value, Address grad_locations, Address grad_weights, int64_t batch,
              int64_t positions, int64_t heads, int64_t head_dim, int64_t queries, int64_t points,
              const Maps& spatial_shapes, int64_t threads, int dtype) {
    DeformableAttentionBackward arguments{
        {batch, positions, heads, head_dim, queries, points, spatial_shapes, threads, dtype},
        pointer<Pointer>(grad_out),
        pointer<Pointer>(value),
        {strides[0], strides[1], strides[2]},
        located(locations, weights),
        pointer<void>(grad_value),
    };
    arguments.grad_locations = pointer<void>(grad_locations);
    arguments.grad_weights = pointer<void>(grad_weights);
    deformable_attention_backward(arguments);
}

void fused_forward(Address value, const Strides& strides, Address reference, int64_t reference_batch,
                   int64_t reference_levels, int64_t coordinates, Address offsets,
                   const Strides& offsets_strides, Address logits, const Strides& logits_strides, bool wide,
                   Address out, int64_t batch, int64_t positions, int64_t heads, int64_t head_dim,
                   int64_t queries, int64_t points, const Maps& spatial_shapes, int64_t threads, int dtype) {
    deformable_attention_forward({
        {batch, positions, heads, head_dim, queries, points, spatial_shapes, threads, dtype},
        pointer<Pointer>(value),
        {strides[0], strides[1], strides[2]},
        from_logits(reference, reference_batch, reference_levels, coordinates, offsets, offsets_strides,
                    logits, logits_strides, wide),
        pointer<void>(out),
    });
}

void fused_backward(Address grad_out, Address value, const Strides& strides, Address reference,
                    int64_t reference_batch, int64_t reference_levels, int64_t coordinates, Address offsets,
                    const Strides& offsets_strides, Address logits, const Strides& logits_strides, bool wide,
                    Address grad_value, Address grad_reference, Address grad_offsets, Address grad_logits,
                    int64_t batch, int64_t positions, int64_t heads, int64_t head_dim, int64_t queries,
                    int64_t points, const Maps& spatial_shapes, int64_t threads, int dtype) {
    DeformableAttentionBackward arguments{
        {batch, positions, heads, head_dim, queries, points, spatial_shapes, threads, dtype},
        pointer<Pointer>(grad_out),
        pointer<Pointer>(value),
        {strides[0], strides[1], strides[2]},
        from_logits(reference, reference_batch, reference_levels, coordinates, offsets, offsets_strides,
                    logits, logits_strides, wide),
        pointer<void>(grad_value),
    };
    arguments.grad_reference = pointer<void>(grad_reference);
    arguments.grad_offsets = pointer<void>(grad_offsets);
    arguments.grad_logits = pointer<void>(grad_logits);
    deformable_attention_backward(arguments);
}

}  // namespace

void bind_deformable_attention(py::module_& m) {
    m.def("deformable_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "value_ptr"_a, "value_strides"_a, "locations_ptr"_a, "weights_ptr"_a, "out_ptr"_a, "batch"_a,
          "positions"_a, "heads"_a, "head_dim"_a, "queries"_a, "points"_a, "spatial_shapes"_a, "threads"_a,
          "dtype"_a,
          "Multi-scale deformable attention. value (B, S, h, d) with strides (batch, position, head), "
          "locations (B, Q, h, L, K, 2) in float32 (float64 beside float64) and weights (B, Q, h, L, K) "
          "contiguous, out (B, Q, h*d) contiguous, written; spatial_shapes is the list of the L maps' "
          "(height, width).");
    m.def("deformable_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out_ptr"_a, "value_ptr"_a, "value_strides"_a, "locations_ptr"_a, "weights_ptr"_a,
          "grad_value_ptr"_a, "grad_locations_ptr"_a, "grad_weights_ptr"_a, "batch"_a, "positions"_a,
          "heads"_a, "head_dim"_a, "queries"_a, "points"_a, "spatial_shapes"_a, "threads"_a, "dtype"_a,
          "Gradients of deformable_attention_forward. All are contiguous, shaped like their tensors and "
          "overwritten; address 0: that gradient is not wanted.");
    m.def("fused_deformable_attention_forward", &fused_forward, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "value_ptr"_a, "value_strides"_a, "reference_ptr"_a, "reference_batch"_a,
          "reference_levels"_a, "coordinates"_a, "offsets_ptr"_a, "offsets_strides"_a, "logits_ptr"_a,
          "logits_strides"_a, "wide"_a, "out_ptr"_a, "batch"_a, "positions"_a, "heads"_a, "head_dim"_a,
          "queries"_a, "points"_a, "spatial_shapes"_a, "threads"_a, "dtype"_a,
          "deformable_attention_forward from reference points (1 or B, Q, 1 or L, 2 or 4), contiguous, in "
          "float32 (float64 beside float64), offsets (B, Q, h, L, K, 2) and logits (B, Q, h, L, K) with "
          "strides (batch, query, head); wide: these two are float32 whatever the dtype.");
    m.def("fused_deformable_attention_backward", &fused_backward, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "grad_out_ptr"_a, "value_ptr"_a, "value_strides"_a, "reference_ptr"_a,
          "reference_batch"_a, "reference_levels"_a, "coordinates"_a, "offsets_ptr"_a, "offsets_strides"_a,
          "logits_ptr"_a, "logits_strides"_a, "wide"_a, "grad_value_ptr"_a, "grad_reference_ptr"_a,
          "grad_offsets_ptr"_a, "grad_logits_ptr"_a, "batch"_a, "positions"_a, "heads"_a, "head_dim"_a,
          "queries"_a, "points"_a, "spatial_shapes"_a, "threads"_a, "dtype"_a,
          "Gradients of fused_deformable_attention_forward. All are contiguous, shaped like their tensors "
          "and overwritten; address 0: that gradient is not wanted.");
}

}  // namespace magnet_fast
