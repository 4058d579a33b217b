// The vectorised inner kernels of multi-scale deformable attention: one head of one image, a range of
// queries.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"

namespace magnet_fast {

/// Points are treated in blocks of whole queries, about this many points at a time.
constexpr int64_t kDeformableBlock = 128;

/// The map that each point of a block reads, spread out so that point arithmetic runs in vectors: entry i
/// belongs to the i-th point of a block. Fifteen entries more follow them, so that whole vectors can be read.
/// Sides are at most 2^24, all positions together at most 2^30.
struct DeformableMaps {
    const float* width;
    const float* height;
    const int32_t* columns;  // width, as an integer
    const int32_t* rows;     // height, as an integer
    const int32_t* start;    // the map's first row in `value`
};

/// Some queries of one head of one image. `points` counts the sampling points of a query in this call: all
/// levels', or those of one level. Distances are in floats unless said otherwise.
struct DeformableForward {
    int64_t queries, points, head_dim, positions;
    int64_t block_queries;   // queries of a block; `maps` and `scratch` hold block_queries * points points
    const float* value;      // packed
    const float* locations;  // (points, 2) of the first query
    const float* weights;    // (points) of the first query
    int64_t query_points;    // from one query's points to the next one's, in points
    DeformableMaps maps;
    float* out;       // (head_dim) of the first query, written
    int64_t out_row;  // from one query to the next; grad_out is laid out alike
    float* scratch;   // scratch_floats(block points) floats
};

struct DeformableBackward : DeformableForward {
    const float* grad_out;  // (head_dim) of the first query; `out` is not used
    float* grad_value;      // packed, added to; null: not wanted
    float* grad_locations;  // like locations, written; null: not wanted
    float* grad_weights;    // like weights, written; null: not wanted, and with both null `value` is not used
};

/// One SIMD level's implementation. The packed form of a slice of `value`, one head of one image, is this
/// level's own business; every access to it is one of these functions. `begin` and `end` bound the positions
/// concerned.
template <typename Element>
struct DeformableKernels {
    int64_t (*scratch_floats)(int64_t block_points);
    int64_t (*packed_floats)(int64_t positions, int64_t head_dim);
    /// value_row: from one position to the next.
    void (*pack)(const float* value, int64_t value_row, int64_t positions, int64_t head_dim, float* packed);
    /// Sets a packed slice to zeros.
    void (*clear)(float* packed, int64_t positions, int64_t head_dim, int64_t begin, int64_t end);
    void (*unpack)(const float* packed, int64_t positions, int64_t head_dim, int64_t begin, int64_t end,
                   float* value, int64_t value_row);
    void (*forward)(const DeformableForward&);
    void (*backward)(const DeformableBackward&);
};

MAGNET_FAST_DECLARE_KERNELS(DeformableKernels, deformable_kernels)

}  // namespace magnet_fast
