// The vectorised inner kernels of window attention: one head, one group of tokens that attend to each other.
//
// A *group* is the part of one window that lies in one shift region: `tokens` real tokens, which are queries
// and keys, and possibly padding. All padded tokens of a group have the same key and value, so together they
// are one key whose bias is the logarithm of the sum of their exponentiated biases: keys = tokens + 1. This
// is exact, and it makes a padded window cheaper than a full one.
//
// The bias is in units of the scale: the logits are scale * (q k + bias), so that q is taken as it is.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

template <typename Element>
struct GroupForward {
    using Real = typename Computed<Element>::Real;
    int64_t tokens;    // real tokens: queries, and the first keys
    int64_t keys;      // tokens, or tokens + 1 when the group has padding
    int64_t head_dim;  // d
    int64_t channels;  // C: the distance from a token's query to its key, and from its key to its value
    Real scale;        // above 0
    const Element* const* query;  // (tokens) pointers to the head's d query channels
    const Element* pad_key;       // (d)
    const Element* pad_value;     // (d)
    const Element* zeros;         // (d)
    const Real* bias;             // (tokens, bias_row); lanes past `keys` hold -infinity
    int64_t bias_row;             // keys, rounded up to whole vectors
    Element* const* out;          // (tokens) pointers to the head's d output channels
    // What the call that follows will read, to fetch it ahead: (next_tokens) query pointers, of which the
    // query lies next_offset channels further on.
    const Element* const* next;
    int64_t next_tokens;  // 0: nothing
    int64_t next_offset;
    void* scratch;  // scratch_bytes(...) bytes, 64-byte aligned
};

template <typename Element>
struct GroupBackward : GroupForward<Element> {
    using Real = typename Computed<Element>::Real;
    const Element* const* grad_out;       // (tokens) pointers to d channels
    const Element* const* next_grad_out;  // (next_tokens), like `next`
    Element* const* grad_query;           // (tokens) pointers like `query`, written; null: not wanted
    Real* grad_bias;       // (tokens, bias_row), of the unscaled bias, added to; null: not wanted
    Real* grad_pad_key;    // (d), added to; null: not wanted
    Real* grad_pad_value;  // (d), added to; null with grad_pad_key
};

/// Neighbouring numbers of a bias table, from `offset` after a query's own place in it (see Group::places).
struct BiasRun {
    int64_t offset, length;
};

/// How the biases of a group come from the table, and what joins its padded keys into one.
template <typename Real>
struct WindowBiasKernels {
    int64_t lanes;
    /// to (rows, columns): in row r every run, from table + places[r] + its offset on, then -infinity;
    /// columns is that, rounded up to whole vectors. Reads and writes up to `lanes` numbers beyond what it
    /// should.
    void (*gather_rows)(const Real* table, const int64_t* places, int64_t rows, const BiasRun* runs,
                        int64_t count, int64_t columns, Real* to);
    /// result[r * result_stride] = log(sum(exp(scale * values[r, :]))) / scale; columns is a multiple of
    /// `lanes`.
    void (*log_sum_exp_rows)(const Real* values, int64_t rows, int64_t columns, Real scale, Real* result,
                             int64_t result_stride);
    /// values[r, c] = weight[r * stride] * exp(scale * (values[r, c] - log_sum[r * stride])).
    void (*softmax_rows)(Real* values, int64_t rows, int64_t columns, Real scale, const Real* log_sum,
                         const Real* weight, int64_t stride);
};

/// One SIMD level's implementation.
template <typename Element>
struct WindowKernels {
    WindowBiasKernels<typename Computed<Element>::Real> bias;
    /// Bytes of scratch that either pass needs for groups of at most `tokens` tokens.
    int64_t (*scratch_bytes)(int64_t tokens, int64_t head_dim);
    void (*forward)(const GroupForward<Element>&);
    void (*backward)(const GroupBackward<Element>&);
};

MAGNET_FAST_DECLARE_KERNELS(WindowKernels, window_kernels)

}  // namespace magnet_fast
