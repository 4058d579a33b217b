// Multi-scale deformable attention on a GPU, plain and fused: what the launchers take, and what they hand to
// the kernels.
//
// Two to thirty-two lanes of a warp take a query of one head: each finds places and weights of some of its
// points, then all read the points' corners together, 16 bytes of channels a lane. Outputs, and gradients of
// points, belong to one query. The gradient of `value` is a sum over the points that touch a position; it is
// made without adding to memory in the order in which threads come, which would differ from run to run:
//   count  of every bin, a square of four neighbouring positions, its points; each gets a number in its bin
//          as it comes (whole numbers: any order gives the same counts)
//   scan   the counts become the bins' places in one list
//   list   every point's index goes to its bin's part of the list
//   sort   a point's rank among its bin's indices is its place; query, shares and weight go there
//   value  every position adds up the points of the four bins around it, in the order of their indices
#pragma once

#include <cstdint>

#include "common/deformable_views.h"
#include "cuda/launch.h"

namespace magnet_fast {
namespace cuda {

/// Elements between neighbours along three dimensions.
struct Strides3 {
    int64_t batch, row, head;  // row: a position or a query; head: of reference points, a level
};

constexpr int kMostLevels = 16, kMostPoints = 256;  // maps; points of a query and head on all of them

/// One map.
struct DeformableMap {
    int32_t height, width;
    int32_t first;  // its first position in `value`
    // A map's bins: (height + 1) (width + 1) squares, row by row, each as often as there are groups of
    // queries.
    int32_t groups, first_bin;
};

/// What both passes take, and the kernels get. B images, S positions of all L maps, h heads of d channels, Q
/// queries, K points on each map. Pointers are on the device. The launchers fill in what stands below the
/// line.
struct DeformableParams {
    const void* value;  // (B, S, h, d), the last dimension contiguous
    Strides3 value_strides;
    // (B, Q, h, L, K, 2), (L, K, 2) contiguous: locations as (x, y) in 0 .. 1; beside reference points,
    // offsets in positions of the map or in parts of the box.
    const void* places;
    Strides3 places_strides;
    const void* weights;  // (B, Q, h, L, K), (L, K) contiguous; beside reference points, logits
    Strides3 weights_strides;
    const void* reference;  // (B, Q, L, coordinates), the last dimension contiguous; null: the plain form
    Strides3 reference_strides;                          // 0 along what is broadcast
    Dtype places_dtype, weights_dtype, reference_dtype;  // float32, or value's
    int32_t coordinates;                                 // 2: (x, y), or 4: (x, y, width, height)
    int64_t batch;
    int32_t positions, heads, head_dim, queries, points;

    // Forward.
    void* out;  // (B, Q, h * d), contiguous, written

    // Backward: gradients are contiguous, of their tensors' shapes and dtypes, and written; null: not wanted.
    const void* grad_out;  // (B, Q, h * d), the last dimension contiguous
    int64_t grad_out_batch, grad_out_query;
    void* grad_value;
    void* grad_places;
    void* grad_weights;
    float* grad_reference;  // (reference_batch, Q, reference_levels, coordinates), float32
    int32_t reference_batch, reference_levels;  // 1 or B, 1 or L: what is broadcast gets the sum

    // ---- Filled in by the launchers ----
    int32_t levels, total;  // L, and L * K
    int32_t lanes;          // that take one query or position: a power of two, 2 .. 32
    int64_t blocks;         // of each image and head
    int32_t bins;           // of an image and head
    DeformableMap maps[kMostLevels];
    float* reference_parts;  // (B, Q, h, L, K, coordinates): every point's gradient of its reference point
    int32_t* starts;         // (B, h, bins + 1): counts, then where a bin begins in the list
    int32_t* bin_of;         // (B, h, Q, L, K), -1: touches no position
    int32_t* numbers;        // (B, h, Q, L, K)
    int32_t* list;           // (B, h, Q * L * K)
    void* sorted;            // (B, h, Q * L * K) SortedPoint
};

/// out = attention. std::invalid_argument names an argument that is wrong, std::runtime_error says what CUDA
/// reports; nothing has been started then.
void deformable_attention_forward(const DeformableViews& views, const TensorView& out, const Place& place);

/// Bytes of device memory that the backward pass with these sizes and gradients needs as `workspace`.
int64_t deformable_attention_workspace(const DeformableViews& views, const TensorView& grad_out,
                                       const DeformableGradients& gradients);

/// The gradients that are wanted, in the dtypes of their tensors; that of the reference points in float32.
void deformable_attention_backward(const DeformableViews& views, const TensorView& grad_out,
                                   const DeformableGradients& gradients, const Place& place,
                                   const TensorView& workspace);

// ---- Between the launchers and the kernels ----------------------------------------------------------------

/// A point in its bin's order: what it adds to the gradient of `value` is grad_out of its query, times the
/// weight, times (1 - right or right) (1 - low or low).
struct alignas(16) SortedPoint {
    int32_t query;
    float right, low, weight;
};

using DeformableKernel = void (*)(DeformableParams);

/// Kernels of one element, by the channels that a lane reads at once: 16 bytes of them (`wide`) or one. One
/// file compiled for each element.
template <typename Element>
struct DeformableKernels {
    static DeformableKernel forward(bool wide);
    static DeformableKernel points(bool wide);
    static DeformableKernel value(bool wide);
};
DeformableKernel deformable_clear();      // starts
DeformableKernel deformable_count();      // starts, bin_of, numbers
DeformableKernel deformable_scan();       // starts
DeformableKernel deformable_list();       // list
DeformableKernel deformable_sort();       // sorted
DeformableKernel deformable_reference();  // grad_reference from its parts

constexpr int kDeformableThreads = 128, kScanThreads = 512;

/// Bytes of shared memory: for every lane a point of this turn and one of the last.
constexpr int kRecordBytes = 2 * 2 * 16 * kDeformableThreads;

/// And in the backward pass a number for each point.
constexpr int deformable_points_shared(int total, int lanes) {
    return kRecordBytes + (total + lanes - 1) / lanes * kDeformableThreads * 4;
}

}  // namespace cuda
}  // namespace magnet_fast
