// Multi-scale deformable attention on the CPU, float32: arguments of the two launchers.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace magnet_fast {

/// Sizes shared by both passes: B, S = the levels' positions together, h, d, Q and K; L is the number of
/// maps.
struct DeformableAttentionSizes {
    int64_t batch, positions, heads, head_dim, queries, points;
    std::vector<std::pair<int64_t, int64_t>> maps;  // (height, width) of each level
    int64_t threads;  // OpenMP threads; the result does not depend on it, not in a single bit
};

/// Distances, in elements, between neighbours along batch, position and head; the last dimension is
/// contiguous.
struct ValueStrides {
    int64_t batch, position, head;
};

struct DeformableAttentionForward {
    DeformableAttentionSizes sizes;
    const float* value;  // (B, S, h, d)
    ValueStrides value_strides;
    const float* locations;  // (B, Q, h, L, K, 2) as (x, y), contiguous
    const float* weights;    // (B, Q, h, L, K), contiguous
    float* out;              // (B, Q, h * d), contiguous, written
};

struct DeformableAttentionBackward {
    DeformableAttentionSizes sizes;
    const float* grad_out;  // (B, Q, h * d), contiguous
    const float* value;
    ValueStrides value_strides;
    const float* locations;
    const float* weights;
    float* grad_value;      // (B, S, h, d), contiguous, written; null: not wanted
    float* grad_locations;  // like locations, written; null: not wanted
    float* grad_weights;    // like weights, written; null: not wanted
};

/// Both throw std::invalid_argument, naming the argument, before anything is written.
void deformable_attention_forward(const DeformableAttentionForward& arguments);
void deformable_attention_backward(const DeformableAttentionBackward& arguments);

}  // namespace magnet_fast
