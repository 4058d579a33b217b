// Multi-scale deformable attention on the CPU: arguments of the launchers.
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
    int dtype;        // Dtype of value, weights, the result and their gradients
};

/// Distances, in elements, between neighbours along batch, position and head; the last dimension is
/// contiguous.
struct ValueStrides {
    int64_t batch, position, head;
};

/// Distances, in elements, between neighbours along batch, query and head; (L, K) or (L, K, 2) within them is
/// contiguous.
struct PointStrides {
    int64_t batch, query, head;
};

/// Either `locations` and `weights`, or the other five: points as two Linears give them.
struct DeformableAttentionPoints {
    const void* locations =
        nullptr;  // (B, Q, h, L, K, 2) as (x, y), contiguous; float32, beside float64 float64
    const void* weights = nullptr;  // (B, Q, h, L, K), contiguous

    const void* offsets =
        nullptr;                   // (B, Q, h, L, K, 2) in pixels of the level, or parts of the reference box
    const void* logits = nullptr;  // (B, Q, h, L, K), softmax over (L, K)
    PointStrides offsets_strides{}, logits_strides{};
    bool wide = false;                // offsets and logits are float32 beside a bfloat16 or float16 value
    const void* reference = nullptr;  // (1 or B, Q, 1 or L, coordinates), contiguous; float32 or float64
    int64_t reference_batch = 1, reference_levels = 1;
    int64_t coordinates = 2;  // 2: (x, y), or 4: (x, y, width, height)
};

struct DeformableAttentionForward {
    DeformableAttentionSizes sizes;
    const void* value;  // (B, S, h, d)
    ValueStrides value_strides;
    DeformableAttentionPoints points;
    void* out;  // (B, Q, h * d), contiguous, written
};

/// Gradients are contiguous, of the shapes and types of their tensors, and written; null: not wanted.
struct DeformableAttentionBackward {
    DeformableAttentionSizes sizes;
    const void* grad_out;  // (B, Q, h * d), contiguous
    const void* value;
    ValueStrides value_strides;
    DeformableAttentionPoints points;
    void* grad_value;
    void* grad_locations = nullptr;
    void* grad_weights = nullptr;
    void* grad_reference = nullptr;
    void* grad_offsets = nullptr;
    void* grad_logits = nullptr;
};

/// Both throw std::invalid_argument, naming the argument, before anything is written.
void deformable_attention_forward(const DeformableAttentionForward& arguments);
void deformable_attention_backward(const DeformableAttentionBackward& arguments);

}  // namespace magnet_fast
