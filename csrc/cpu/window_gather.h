// How the window kernels collect a group's scattered rows; compiled once per SIMD level like simd.h.
#pragma once

#include <limits>

#include "cpu/simd_rows.h"
#include "cpu/window_kernel.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Enough for either form of the kernels: q, dO, k, v, dk and dv; k and v transposed; scores and their
/// gradients; dq; row pointers. No piece is larger than in Real.
static int64_t scratch_bytes(int64_t tokens, int64_t head_dim) {
    const int64_t keys = round_up(tokens + 1) + 1, wide = round_up(head_dim) + 1;
    const int64_t numbers = 10 * keys * wide + 4 * kBlock * keys + kBlock * wide;
    return numbers * static_cast<int64_t>(sizeof(Real)) +
           2 * keys * static_cast<int64_t>(sizeof(const void*)) + 16 * 64;
}

/// Rows of bfloat16 pairs begin where a bfloat16 may, which need not be where a Real may.
static inline void move_word(Real* to, const Real* from) {
    std::memcpy(to, from, sizeof(Real));
}

/// to (d x count) = rows transposed; count is a multiple of kLanes. Words of 32 bits (one lane of level
/// float64) are moved as they are.
static void transpose_rows(const Real* const* rows, int64_t count, int64_t d, Real* to) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        int64_t c = 0;
        for (; c + 4 <= d; c += 4) {
            const Real* block[4] = {rows[i] + c, rows[i + 1] + c, rows[i + 2] + c, rows[i + 3] + c};
            transpose4(block, to + c * count + i, count);
        }
        for (; c < d; ++c)
            for (int64_t r = 0; r < 4; ++r) move_word(to + c * count + i + r, rows[i + r] + c);
    }
    for (; i < count; ++i)
        for (int64_t c = 0; c < d; ++c) move_word(to + c * count + i, rows[i] + c);
}

/// WindowBiasKernels::gather_rows. Whole vectors: what is written past a run is overwritten by what follows.
static void gather_bias(const Real* table, const int64_t* places, int64_t rows, const BiasRun* runs,
                        int64_t count, int64_t columns, Real* to) {
    const Vec nothing = broadcast(-std::numeric_limits<Real>::infinity());
    for (int64_t r = 0; r < rows; ++r, to += columns) {
        Real* at = to;
        for (const BiasRun* run = runs; run < runs + count; at += run++->length) {
            const Real* from = table + (places[r] + run->offset);
            for (int64_t t = 0; t < run->length; t += kLanes) store(at + t, load(from + t));
        }
        store(at, nothing);
    }
}

/// Pointers to every key's row, `offset` channels after the query: the real tokens', the padding's, then
/// zeros up to `count`.
template <typename Element>
static void key_rows(const GroupForward<Element>& g, int64_t offset, const Element* pad, int64_t count,
                     const Element** rows) {
    int64_t j = 0;
    for (; j < g.tokens; ++j) rows[j] = g.query[j] + offset;
    for (; j < g.keys; ++j) rows[j] = pad;
    for (; j < count; ++j) rows[j] = g.zeros;
}

/// The gradients of keys and values (rows of round_up(d), from the first wanted key on; those of the keys
/// without the scale), to where they belong.
template <typename Element>
static inline void write_key_gradients(const GroupBackward<Element>& g, const Real* grad_key,
                                       const Real* grad_value) {
    const int64_t d = g.head_dim, wide = round_up(d);
    int64_t row = 0;
    if (g.grad_query) {
        for (int64_t j = 0; j < g.tokens; ++j, row += wide) {
            write_row(g.grad_query[j] + g.channels, grad_key + row, d, g.scale);
            write_row(g.grad_query[j] + 2 * g.channels, grad_value + row, d, Real{1});
        }
    }
    if (g.grad_pad_key && g.keys > g.tokens) {
        for (int64_t c = 0; c < d; ++c) g.grad_pad_key[c] += g.scale * grad_key[row + c];
        for (int64_t c = 0; c < d; ++c) g.grad_pad_value[c] += grad_value[row + c];
    }
}

template <typename Element>
static inline void prefetch_row(const Element* row, int64_t d) {
    for (int64_t c = 0; c < d; c += 64 / static_cast<int64_t>(sizeof(Element))) {
        __builtin_prefetch(row + c, 0, 3);
        // GCC takes a function that only prefetches for one without effect, and drops its calls.
        asm volatile("");
    }
}

/// Begins to fetch what the call that follows reads of token i: q, k and v. Called once with every token of
/// this call; tokens that the next one has beyond these are spread over them.
template <typename Element>
static inline void prefetch_token(const GroupForward<Element>& g, int64_t i) {
    for (; i < g.next_tokens; i += g.tokens)
        for (int64_t part = 0; part < 3; ++part)
            prefetch_row(g.next[i] + g.next_offset + part * g.channels, g.head_dim);
}

/// And its output's gradient.
template <typename Element>
static inline void prefetch_token(const GroupBackward<Element>& g, int64_t i) {
    prefetch_token(static_cast<const GroupForward<Element>&>(g), i);
    for (; i < g.next_tokens; i += g.tokens) prefetch_row(g.next_grad_out[i] + g.next_offset, g.head_dim);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
