// The vectorised inner kernels of window attention: one head, one group of tokens that attend to each other.
//
// A *group* is the part of one window that lies in one shift region: `tokens` real tokens, which are queries
// and keys, and possibly padding. All padded tokens of a group have the same key and value, so together they
// are one key whose bias is the logarithm of the sum of their exponentiated biases: keys = tokens + 1. This
// is exact, and it makes a padded window cheaper than a full one.
#pragma once

#include <cstdint>

#include "cpu/simd_level.h"

namespace magnet_fast {

struct GroupForward {
    int64_t tokens;    // real tokens: queries, and the first keys
    int64_t keys;      // tokens, or tokens + 1 when the group has padding
    int64_t head_dim;  // d
    int64_t channels;  // C: the distance from a token's query to its key, and from its key to its value
    float scale;
    const float* const* query;  // (tokens) pointers to the head's d query channels
    const float* pad_key;       // (d)
    const float* pad_value;     // (d)
    const float* zeros;         // (d)
    const float* bias;          // (tokens, bias_row); lanes past `keys` hold -infinity
    int64_t bias_row;           // keys, rounded up to whole vectors
    float* const* out;          // (tokens) pointers to the head's d output channels
    const float* const* next;   // (tokens) query pointers of the group that follows, to prefetch; null: none
    float* scratch;             // scratch_floats(...) floats, 64-byte aligned
};

struct GroupBackward : GroupForward {
    const float* const* grad_out;  // (tokens) pointers to d channels
    float* const* grad_query;      // (tokens) pointers like `query`, written; null: not wanted
    float* grad_bias;              // (tokens, bias_row), added to; null: not wanted
    float* grad_pad_key;           // (d), added to; null: not wanted
    float* grad_pad_value;         // (d), added to; null with grad_pad_key
};

/// One SIMD level's implementation.
template <typename Element>
struct WindowKernels {
    int64_t lanes;
    /// Floats of scratch that either pass needs for groups of at most `tokens` tokens.
    int64_t (*scratch_floats)(int64_t tokens, int64_t head_dim);
    void (*forward)(const GroupForward&);
    void (*backward)(const GroupBackward&);
    /// result[r * result_stride] = log(sum(exp(values[r, :]))); columns is a multiple of `lanes`.
    void (*log_sum_exp_rows)(const float* values, int64_t rows, int64_t columns, float* result,
                             int64_t result_stride);
    /// values[r, c] = weight[r * stride] * exp(values[r, c] - log_sum[r * stride]).
    void (*softmax_rows)(float* values, int64_t rows, int64_t columns, const float* log_sum,
                         const float* weight, int64_t stride);
};

MAGNET_FAST_DECLARE_KERNELS(WindowKernels, window_kernels)

}  // namespace magnet_fast
