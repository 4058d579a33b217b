// Shifted-window attention on the CPU: the two launchers.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"
#include "common/window_settings.h"

namespace magnet_fast {

/// Sizes shared by both passes. C = channels, h = heads, d = C / h, N = window_h * window_w.
struct WindowAttentionSizes : WindowSettings {
    int64_t batch, height, width, channels;
    int64_t threads;  // OpenMP threads; the result does not depend on it, not in a single bit
};

/// What both passes read. The last dimension of maps is contiguous, their other strides are free.
struct WindowAttentionInputs {
    TensorView qkv;   // (B, H, W, 3C), channels [q | k | v], each (h, d)
    TensorView bias;  // ((2 * window_h - 1) * (2 * window_w - 1), h), contiguous, in computed(dtype of qkv)
    TensorView pad_qkv;  // (3C), contiguous, the padded tokens' q, k and v; or not there: zeros
    WindowSettings settings;
    int64_t threads;
};

/// Writes out (B, H, W, C), whose tokens do not overlap. Every dtype of common/elements.h;
/// std::invalid_argument names an argument that is wrong, before anything is written.
void window_attention_forward(const WindowAttentionInputs& inputs, const TensorView& out);

/// From grad_out (B, H, W, C). Gradients are written, and not wanted where they are not there: grad_qkv like
/// qkv, grad_bias like bias, grad_pad_qkv (3C), in the dtype of bias, its first third (padded queries) zeros.
void window_attention_backward(const WindowAttentionInputs& inputs, const TensorView& grad_out,
                               const TensorView& grad_qkv, const TensorView& grad_bias,
                               const TensorView& grad_pad_qkv);

}  // namespace magnet_fast
