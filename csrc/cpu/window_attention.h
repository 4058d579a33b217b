// Shifted-window attention on the CPU, float32: arguments of the two launchers.
#pragma once

#include <cstdint>

namespace magnet_fast {

/// Sizes shared by both passes. C = channels, h = heads, d = C / h, N = window_h * window_w.
struct WindowAttentionSizes {
    int64_t batch, height, width, channels, heads;
    int64_t window_h, window_w;
    int64_t shift_h, shift_w;  // 0 <= shift < window
    double scale;              // multiplies q k^T before the bias is added
    bool pad_first;            // true: pad, then roll; false: roll, then pad (see common/window_index.h)
    int64_t threads;           // OpenMP threads; the result does not depend on it, not in a single bit
};

/// Elements between neighbours along batch, height and width; the last dimension is contiguous.
struct MapStrides {
    int64_t batch, height, width;
};

struct WindowAttentionForward {
    WindowAttentionSizes sizes;
    const float* qkv;  // (B, H, W, 3C), channels [q | k | v], each (h, d)
    MapStrides qkv_strides;
    const float* bias;     // ((2 * window_h - 1) * (2 * window_w - 1), h), contiguous
    const float* pad_qkv;  // (3C), the padded tokens' q, k and v; null: zeros
    float* out;            // (B, H, W, C), written
    MapStrides out_strides;
};

struct WindowAttentionBackward {
    WindowAttentionSizes sizes;
    const float* grad_out;  // (B, H, W, C)
    MapStrides grad_out_strides;
    const float* qkv;
    MapStrides qkv_strides;
    const float* bias;
    const float* pad_qkv;
    float* grad_qkv;  // (B, H, W, 3C), written; null: not wanted
    MapStrides grad_qkv_strides;
    float* grad_bias;     // like bias, written; null: not wanted
    float* grad_pad_qkv;  // (3C), written, its first third (padded queries) with zeros; null: not wanted
};

/// Both throw std::invalid_argument, naming the argument, before anything is written.
void window_attention_forward(const WindowAttentionForward& arguments);
void window_attention_backward(const WindowAttentionBackward& arguments);

}  // namespace magnet_fast
