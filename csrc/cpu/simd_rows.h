// Rows of a few numbers between tensors and working memory, and blocks of them; compiled once per SIMD level
// like simd.h.
#pragma once

#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

// Query rows treated at a time, at most: a 7 x 7 window is one block of 49, a 12 x 12 window three blocks of
// 48. Larger blocks make fewer passes over the gradients of k and v; smaller ones keep the scores closer to
// the core.
constexpr int64_t kBlock = 64;

/// Rows of the next block when `left` remain: blocks of nearly equal height, even but for the last one.
static inline int64_t block_rows(int64_t left) {
    const int64_t blocks = (left + kBlock - 1) / kBlock;
    return blocks == 1 ? left : ((left + blocks - 1) / blocks + 1) / 2 * 2;
}

/// Hands out consecutive, 64-byte aligned pieces of the scratch buffer.
struct Arena {
    char* at;
    explicit Arena(void* scratch) : at(static_cast<char*>(scratch)) {}
    template <typename T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(at);
        at += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return piece;
    }
};

/// to (count x round_up(d)) = rows, zeros past d.
template <typename Element>
static void gather_rows(const Element* const* rows, int64_t count, int64_t d, Real* to) {
    const int64_t wide = round_up(d), whole = d / kLanes * kLanes;
    for (int64_t i = 0; i < count; ++i, to += wide) {
        for (int64_t c = 0; c < whole; c += kLanes) store(to + c, load(rows[i] + c));
        if (whole < d) store(to + whole, load_part(rows[i] + whole, d - whole));
    }
}

/// to[0 .. d) = factor * from.
template <typename Element>
static inline void write_row(Element* to, const Real* from, int64_t d, Real factor) {
    const Vec wide = broadcast(factor);
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) store(to + c, load(from + c) * wide);
    if (c < d) store_part(to + c, load(from + c) * wide, d - c);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
