// Shifted-window attention on a GPU: what the launchers take, and what they hand to the kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/window_index.h"
#include "common/window_settings.h"
#include "cuda/launch.h"

namespace magnet_fast {
namespace cuda {

/// Elements between neighbours along batch, height and width; the last dimension is contiguous.
struct MapStrides {
    int64_t batch, height, width;
};

/// What both passes take. Tensors are on the device, the last dimension of maps is contiguous.
struct WindowInputs {
    TensorView qkv;      // (B, H, W, 3C), channels [q | k | v], each (h, d); float32, bfloat16 or float16
    TensorView bias;     // ((2 * window_h - 1) * (2 * window_w - 1), h), float32, contiguous
    TensorView pad_qkv;  // (3C), contiguous, the padded tokens' q, k and v; not there: zeros
    WindowSettings settings;
    Float32Products products;
};

/// What the backward pass takes beside them. Gradients are overwritten; not there: not wanted.
struct WindowGradients {
    TensorView grad_out;            // (B, H, W, C)
    TensorView qkv, bias, pad_qkv;  // like their tensors; the last two, contiguous, in float32
};

/// What the kernels get. C = channels, h = heads, d = C / h, N = window_h * window_w.
/// Pointers are on the device. The launchers fill in what stands below the line.
struct WindowParams {
    const void* qkv;      // (B, H, W, 3C), channels [q | k | v], each (h, d)
    const void* pad_qkv;  // (3C), the padded tokens' q, k and v; null: zeros
    const float* bias;    // ((2 * window_h - 1) * (2 * window_w - 1), h), contiguous
    MapStrides qkv_strides;
    int64_t batch;
    int32_t height, width, channels, heads;
    int32_t window_h, window_w, shift_h, shift_w;  // 0 <= shift < window
    float scale;                                   // above 0; multiplies q k^T before the bias is added
    bool pad_first;                                // see common/window_index.h
    Float32Products products;                      // of float32 tensors

    // Forward.
    void* out;  // (B, H, W, C), written
    MapStrides out_strides;

    // Backward.
    const void* grad_out;  // (B, H, W, C)
    MapStrides grad_out_strides;
    void* grad_qkv;  // (B, H, W, 3C), written; null: not wanted
    MapStrides grad_qkv_strides;
    float* grad_bias;     // like bias, written; null: not wanted
    float* grad_pad_qkv;  // (3C), written, its first third (padded queries) with zeros; null: not wanted

    // ---- Filled in by the launchers ----
    int32_t padded_h, padded_w, rows, columns;  // of the padded map; windows along each axis
    int32_t windows, groups;                    // of the batch; a program's share is one of the groups
    int32_t tokens, entries;                    // N, and rows of the bias table
    bool aligned_in, aligned_out;               // tensors can be read and written 16 bytes at a time
    bool sums_in_shared;                        // the backward pass's sums of the bias's gradients
    float* bias_sums;                           // (groups, h, window_sums(N)); unless sums_in_shared
    float* bias_parts;                          // (groups, h, entries)
    float* pad_parts;                           // (groups, h, 2, d)
};

/// Windows of at most this many tokens, heads of at most this width.
constexpr int kMostTokens = 256, kMostHeadDim = 64;

/// out = attention. std::invalid_argument names an argument that is wrong, std::runtime_error says what CUDA
/// reports; nothing has been started then.
void window_attention_forward(const WindowInputs& inputs, const TensorView& out, const Place& place);

/// Bytes of device memory that the backward pass of these sizes needs as `workspace`.
int64_t window_attention_workspace(const WindowInputs& inputs, const WindowGradients& gradients,
                                   const Place& place);

/// The gradients that are wanted.
void window_attention_backward(const WindowInputs& inputs, const WindowGradients& gradients,
                               const Place& place, const TensorView& workspace);

// ---- Between the launchers and the kernels ----------------------------------------------------------------

/// The forward kernels take 8 * tiles keys at a time: 64 (all keys of a 7 x 7 or 8 x 8 window at once), or 48
/// (those of a 12 x 12 window in three turns; 16-bit elements only).
MAGNET_FAST_HOST_DEVICE constexpr int forward_tiles(int tokens, bool wide_element) {
    const int of_8 = (tokens + 63) / 64 * 64, of_6 = (tokens + 47) / 48 * 48;
    return !wide_element && of_6 < of_8 ? 6 : 8;
}

/// Warps of a block, at most: 16 queries each of 64, 32 of 144.
MAGNET_FAST_HOST_DEVICE constexpr int forward_warps(int tiles) {
    return tiles == 8 ? 4 : 5;
}

/// And of the backward kernels: 16 queries, then 16 keys each, of 144; or 32, where registers are short.
MAGNET_FAST_HOST_DEVICE constexpr int backward_warps(int width, int element_bytes) {
    return width * element_bytes <= 64 ? 9 : 5;
}

using WindowKernel = void (*)(WindowParams);

/// Kernels of one element, by the width of heads (16, 32 or 64); one file compiled for each element.
template <typename Element>
struct WindowKernels {
    static WindowKernel forward(int width, int tiles);
    static WindowKernel backward(int width);
};

/// Sums the groups' parts in their order; grid-stride over entries * heads + 3C.
WindowKernel window_reduction();

constexpr int kReductionThreads = 128;

/// Where the pieces of a program's shared memory begin, in bytes.
struct WindowLayout {
    int table, places, keys, rows, staging, sums, pads, tiles, total;
};

constexpr int kStages = 2;  // windows in shared memory: one is computed while the next arrives

/// Elements that shared memory's rows are longer than their contents: rows that are read together then lie
/// in different banks, for every element and every width that is a multiple of 16.
constexpr int kRowPadding = 8;

/// Tokens in whole blocks of 16.
MAGNET_FAST_HOST_DEVICE constexpr int whole_rows(int tokens) {
    return (tokens + 15) / 16 * 16;
}

/// Of the sums of the bias's gradients: numbers of a row (pairs of a half-warp lie in different banks), and
/// of all rows.
MAGNET_FAST_HOST_DEVICE constexpr int sums_pitch(int tokens) {
    return whole_rows(tokens) + 8;
}
MAGNET_FAST_HOST_DEVICE constexpr int window_sums(int tokens) {
    return whole_rows(tokens) * sums_pitch(tokens);
}

/// `tensors` of width `width`, of elements of `bytes` bytes, for every stage; row_numbers and pad_numbers
/// floats for every token and every warp, and the sums of the bias's gradients, in the backward pass.
MAGNET_FAST_HOST_DEVICE constexpr WindowLayout window_layout(int tokens, int entries, int warps, int width,
                                                             int bytes, int tensors, int row_numbers,
                                                             int pad_numbers, bool sums) {
    const int rows = whole_rows(tokens), pitch = (width + kRowPadding) * bytes;
    WindowLayout at{};
    at.places = (entries * 4 + 15) / 16 * 16;
    at.keys = at.places + kStages * rows * 8;
    at.rows = at.keys + kStages * rows * 4;
    at.staging = at.rows + row_numbers * rows * 4;
    at.sums = at.staging + warps * 16 * pitch;
    at.pads = at.sums + (sums ? window_sums(tokens) * 4 : 0);
    at.tiles = at.pads + warps * pad_numbers * 4;
    at.total = at.tiles + kStages * tensors * rows * pitch;
    return at;
}

MAGNET_FAST_HOST_DEVICE constexpr WindowLayout window_forward_layout(int tokens, int entries, int warps,
                                                                     int width, int bytes) {
    return window_layout(tokens, entries, warps, width, bytes, /*tensors=*/3, 0, 0, false);
}
MAGNET_FAST_HOST_DEVICE constexpr WindowLayout window_backward_layout(int tokens, int entries, int warps,
                                                                      int width, int bytes, bool sums) {
    return window_layout(tokens, entries, warps, width, bytes, /*tensors=*/4, /*row_numbers=*/2, 2 * width,
                         sums);
}

}  // namespace cuda
}  // namespace magnet_fast
