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

void forward(Address value, const Strides& strides, Address locations, Address weights, Address out,
             int64_t batch, int64_t positions, int64_t heads, int64_t head_dim, int64_t queries,
             int64_t points, const Maps& spatial_shapes, int64_t threads) {
    deformable_attention_forward({
        {batch, positions, heads, head_dim, queries, points, spatial_shapes, threads},
        pointer<const float>(value),
        {strides[0], strides[1], strides[2]},
        pointer<const float>(locations),
        pointer<const float>(weights),
        pointer<float>(out),
    });
}

void backward(Address grad_out, Address value, const Strides& strides, Address locations, Address weights,
              Address grad_value, Address grad_locations, Address grad_weights, int64_t batch,
              int64_t positions, int64_t heads, int64_t head_dim, int64_t queries, int64_t points,
              const Maps& spatial_shapes, int64_t threads) {
    deformable_attention_backward({
        {batch, positions, heads, head_dim, queries, points, spatial_shapes, threads},
        pointer<const float>(grad_out),
        pointer<const float>(value),
        {strides[0], strides[1], strides[2]},
        pointer<const float>(locations),
        pointer<const float>(weights),
        pointer<float>(grad_value),
        pointer<float>(grad_locations),
        pointer<float>(grad_weights),
    });
}

}  // namespace

void bind_deformable_attention(py::module_& m) {
    m.def("deformable_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "value_ptr"_a, "value_strides"_a, "locations_ptr"_a, "weights_ptr"_a, "out_ptr"_a, "batch"_a,
          "positions"_a, "heads"_a, "head_dim"_a, "queries"_a, "points"_a, "spatial_shapes"_a, "threads"_a,
          "Multi-scale deformable attention. value (B, S, h, d) with strides (batch, position, head), "
          "locations "
          "(B, Q, h, L, K, 2) and weights (B, Q, h, L, K) contiguous, out (B, Q, h*d) contiguous, written; "
          "spatial_shapes is the list of the L maps' (height, width).");
    m.def("deformable_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "grad_out_ptr"_a, "value_ptr"_a, "value_strides"_a, "locations_ptr"_a, "weights_ptr"_a,
          "grad_value_ptr"_a, "grad_locations_ptr"_a, "grad_weights_ptr"_a, "batch"_a, "positions"_a,
          "heads"_a, "head_dim"_a, "queries"_a, "points"_a, "spatial_shapes"_a, "threads"_a,
          "Gradients of deformable_attention_forward. All are contiguous, shaped like their tensors and "
          "overwritten; "
          "address 0: that gradient is not wanted.");
}

}  // namespace magnet_fast
