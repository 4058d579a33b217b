// Deformable attention's tensors, and the checks that are the same on every device.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/tensor_view.h"

namespace magnet_fast {

using MapSizes = std::vector<std::pair<int64_t, int64_t>>;  // (height, width) of each of the L maps

/// What both passes of both forms read: B images, S positions of all maps, h heads of d channels, Q queries,
/// K points on each map.
struct DeformableViews {
    TensorView value;    // (B, S, h, d), the last dimension contiguous
    TensorView places;   // (B, Q, h, L, K, 2), (L, K, 2) contiguous: locations as (x, y) in 0 .. 1; beside
                         // reference points, offsets in positions of the map or in parts of the box
    TensorView weights;  // (B, Q, h, L, K), (L, K) contiguous; beside reference points, logits
    TensorView
        reference;  // (1 or B, Q, 1 or L, 2 or 4), the last dimension contiguous; not there: the plain form
    MapSizes maps;
};

/// Contiguous, shaped like their tensors, written; not there: not wanted.
struct DeformableGradients {
    TensorView value, places, weights, reference;
};

inline void check_views(const DeformableViews& a) {
    const auto check_dimensions = [](const TensorView& view, const char* name, int dimensions, int dense) {
        check_tensor(view, name, dimensions, view.dtype);
        check_dense(view, name, dense);
    };
    check_dtype(a.value, "value");
    check_dimensions(a.value, "value", 4, 3);
    check_dtype(a.places, "places");
    check_tensor(a.places, "places", 6, a.places.dtype);
    const int64_t batch = a.value.sizes[0], queries = a.places.sizes[1], heads = a.value.sizes[2];
    const int64_t levels = static_cast<int64_t>(a.maps.size()), points = a.places.sizes[4];
    check_tensor(a.places, "places", {batch, queries, heads, levels, points, 2}, a.places.dtype);
    check_tensor(a.weights, "weights", {batch, queries, heads, levels, points}, a.weights.dtype);
    if (!a.reference.given()) return;
    check_dimensions(a.reference, "reference", 4, 3);
    const int64_t* size = a.reference.sizes;
    require(size[0] == 1 || size[0] == batch, "reference", "a batch of 1 or " + std::to_string(batch),
            size[0]);
    require(size[1] == queries, "reference", std::to_string(queries) + " queries", size[1]);
    require(size[2] == 1 || size[2] == levels, "reference", "1 or " + std::to_string(levels) + " maps",
            size[2]);
    require(size[3] == 2 || size[3] == 4, "reference", "2 or 4 coordinates", size[3]);
}

/// The two whose points of one head stand together. After the sizes have been found to be addressable.
inline void check_points_dense(const DeformableViews& a) {
    check_dense(a.places, "places", 3);
    check_dense(a.weights, "weights", 3);
}

inline void check_gradient(const TensorView& grad, const char* name, const TensorView& of, Dtype dtype) {
    if (!grad.given()) return;
    check_tensor(grad, name, of.dimensions, dtype);
    for (int i = 0; i < of.dimensions; ++i)
        if (grad.sizes[i] != of.sizes[i]) refuse(name, "the sizes of its tensor", grad.sizes[i]);
    check_dense(grad, name, 0);
}

}  // namespace magnet_fast
