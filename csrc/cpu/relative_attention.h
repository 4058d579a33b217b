// Attention with decomposed relative positions on the CPU: the two launchers.
#pragma once

#include <cstdint>

#include "common/relative_settings.h"
#include "common/tensor_view.h"

namespace magnet_fast {

/// What both passes read. C = channels, h = heads, d = C / h, S_h and S_w = window_h and window_w. The last
/// dimension of maps is contiguous, their other strides are free.
struct RelativeAttentionInputs {
    TensorView qkv;         // (B, H, W, 3C), channels [q | k | v], each (h, d)
    TensorView rel_height;  // (2 * S_h - 1, d), contiguous, in computed(dtype of qkv)
    TensorView rel_width;   // (2 * S_w - 1, d), likewise
    TensorView pad_qkv;     // (3C), contiguous, the padded tokens' q, k and v; or not there: zeros
    RelativeSettings settings;
    int64_t threads;  // OpenMP threads; the result does not depend on it, not in a single bit
};

/// Gradients that are written; one that is not there is not wanted.
struct RelativeAttentionGradients {
    TensorView qkv;                    // like qkv
    TensorView rel_height, rel_width;  // like their tables; both or neither
    TensorView pad_qkv;  // (3C), in the dtype of the tables, its first third (padded queries) zeros
};

/// Writes out (B, H, W, C), whose tokens do not overlap. Every dtype of common/elements.h;
/// std::invalid_argument names an argument that is wrong, before anything is written.
void relative_attention_forward(const RelativeAttentionInputs& inputs, const TensorView& out);

/// From grad_out (B, H, W, C).
void relative_attention_backward(const RelativeAttentionInputs& inputs, const TensorView& grad_out,
                                 const RelativeAttentionGradients& gradients);

}  // namespace magnet_fast
