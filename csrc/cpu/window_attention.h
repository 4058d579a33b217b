// Shifted-window attention on the CPU: arguments of the two launchers.
#pragma once

#include <cstdint>

#include "common/elements.h"

namespace magnet_fast {

/// Sizes shared by both passes. C = channels, h = heads, d = C / h, N = window_h * window_w.
struct WindowAttentionSizes {
    int64_t batch, height, width, channels, heads;
    int64_t window_h, window_w;
    int64_t shift_h, shift_w;  // 0 <= shift < window
    double scale;              // above 0; multiplies q k^T before the bias is added
    bool pad_first;            // true: pad, then roll; false: roll, then pad (see common/window_index.h)
    int64_t threads;           // OpenMP threads; the result does not depend on it, not in a single bit
};

/// Elements between neighbours along batch, height and width; the last dimension is contiguous.
struct MapStrides {
    int64_t batch, height, width;
};

template <typename Element>
struct WindowAttentionForward {
    using Real = typename Computed<Element>::Real;
    WindowAttentionSizes sizes;
    const Element* qkv;  // (B, H, W, 3C), channels [q | k | v], each (h, d)
    MapStrides qkv_strides;
    const Real* bias;        // ((2 * window_h - 1) * (2 * window_w - 1), h), contiguous
    const Element* pad_qkv;  // (3C), the padded tokens' q, k and v; null: zeros
    Element* out;            // (B, H, W, C), written
    MapStrides out_strides;
};

template <typename Element>
struct WindowAttentionBackward {
    using Real = typename Computed<Element>::Real;
    WindowAttentionSizes sizes;
    const Element* grad_out;  // (B, H, W, C)
    MapStrides grad_out_strides;
    const Element* qkv;
    MapStrides qkv_strides;
    const Real* bias;
    const Element* pad_qkv;
    Element* grad_qkv;  // (B, H, W, 3C), written; null: not wanted
    MapStrides grad_qkv_strides;
    Real* grad_bias;     // like bias, written; null: not wanted
    Real* grad_pad_qkv;  // (3C), written, its first third (padded queries) with zeros; null: not wanted
};

/// Both exist for every element of common/elements.h, and throw std::invalid_argument, naming the argument,
/// before anything is written.
template <typename Element>
void window_attention_forward(const WindowAttentionForward<Element>& arguments);
template <typename Element>
void window_attention_backward(const WindowAttentionBackward<Element>& arguments);

}  // namespace magnet_fast
