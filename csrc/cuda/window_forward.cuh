// Window attention, forward: a program walks over windows of one head, a warp takes 16 queries of a window.
#pragma once

#include "cuda/window_tile.cuh"

namespace magnet_fast {
namespace cuda {

/// The 16 queries from `row` on. Keys come 8 * Tiles at a time, whose similarities stay in registers; a
/// window that has no more keys than that takes one turn.
template <typename Element, int Width, int Tiles>
MAGNET_FAST_DEVICE void window_forward_rows(const WindowWalk<Element, Width, 3>& walk,
                                            const typename WindowWalk<Element, Width, 3>::Window& window,
                                            int stage, int row) {
    using F = Fragments<Element>;
    constexpr int kPitch = Width + kRowPadding;
    const WindowParams& p = walk.p;
    const int lane = thread_index() % kWarpSize, g = lane / 4, t = lane % 4;
    const int* keys = walk.keys(stage);
    const float* table = walk.table() + bias_origin(p.window_h, p.window_w);
    const float scale = p.scale * kLog2E;
    const int query0 = load_shared(keys + row + g), query1 = load_shared(keys + row + g + 8);
    const float *table0 = table + (query0 & 0xffff), *table1 = table + (query1 & 0xffff);

    typename F::Rows query[Width / 16];
    MAGNET_FAST_UNROLL
    for (int k = 0; k < Width / 16; ++k)
        query[k] = F::load_rows(walk.tile(stage, 0) + row * kPitch + k * 16, kPitch);

    float most0 = kMinusInfinity, most1 = kMinusInfinity, total0 = 0.0f, total1 = 0.0f;
    float out[Width / 8][4] = {};
    MAGNET_FAST_ROLLED
    for (int first = 0; first < p.tokens; first += 8 * Tiles) {
        // In powers of two: exp(x) = 2^(x log2(e)).
        float logits[Tiles][4];
        MAGNET_FAST_UNROLL
        for (int n = 0; n < Tiles; n += 2) {
            MAGNET_FAST_UNROLL
            for (int i = 0; i < 4; ++i) logits[n][i] = logits[n + 1][i] = kMinusInfinity;
            if (first + 8 * n >= p.tokens) continue;
            float sums[2][4];
            multiply_rows<Element, Width>(sums, query, walk.tile(stage, 1) + (first + 8 * n) * kPitch,
                                          p.products);
            MAGNET_FAST_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int j = first + 8 * (n + half) + 2 * t;
                const KeyPair key = load_shared(reinterpret_cast<const KeyPair*>(keys + j));
                float (&to)[4] = logits[n + half];
                if (j < p.tokens) {
                    to[0] = sums[half][0] * scale + load_shared(table0 - (key.first & 0xffff));
                    to[2] = sums[half][2] * scale + load_shared(table1 - (key.first & 0xffff));
                }
                if (j + 1 < p.tokens) {
                    to[1] = sums[half][1] * scale + load_shared(table0 - (key.second & 0xffff));
                    to[3] = sums[half][3] * scale + load_shared(table1 - (key.second & 0xffff));
                }
                if (window.cut) {
                    if ((key.first ^ query0) >> 16) to[0] = kMinusInfinity;
                    if ((key.second ^ query0) >> 16) to[1] = kMinusInfinity;
                    if ((key.first ^ query1) >> 16) to[2] = kMinusInfinity;
                    if ((key.second ^ query1) >> 16) to[3] = kMinusInfinity;
                }
            }
        }

        const float before0 = most0, before1 = most1;
        MAGNET_FAST_UNROLL
        for (int n = 0; n < Tiles; ++n) {
            most0 = fmaxf(most0, fmaxf(logits[n][0], logits[n][1]));
            most1 = fmaxf(most1, fmaxf(logits[n][2], logits[n][3]));
        }
        most0 = quad_max(most0);
        most1 = quad_max(most1);
        // Nothing seen yet: 2^(-infinity - 0) is 0, where -infinity - -infinity is no number.
        const float base0 = most0 == kMinusInfinity ? 0.0f : most0;
        const float base1 = most1 == kMinusInfinity ? 0.0f : most1;
        const float shrink0 = exp2_fast(before0 - base0), shrink1 = exp2_fast(before1 - base1);
        total0 *= shrink0;
        total1 *= shrink1;
        MAGNET_FAST_UNROLL
        for (int n = 0; n < Tiles; ++n) {
            logits[n][0] = exp2_fast(logits[n][0] - base0);
            logits[n][1] = exp2_fast(logits[n][1] - base0);
            logits[n][2] = exp2_fast(logits[n][2] - base1);
            logits[n][3] = exp2_fast(logits[n][3] - base1);
            total0 += logits[n][0] + logits[n][1];
            total1 += logits[n][2] + logits[n][3];
        }
        if (first > 0) {
            MAGNET_FAST_UNROLL
            for (int n = 0; n < Width / 8; ++n) {
                out[n][0] *= shrink0;
                out[n][1] *= shrink0;
                out[n][2] *= shrink1;
                out[n][3] *= shrink1;
            }
        }
        MAGNET_FAST_UNROLL
        for (int n = 0; n < Tiles; n += 2) {
            if (first + 8 * n >= p.tokens) continue;
            add_weighted<Element, Width>(out, as_rows<Element>(logits[n], logits[n + 1]),
                                         walk.tile(stage, 2) + (first + 8 * n) * kPitch, p.products);
        }
    }
    walk.write(out, 1.0f / quad_sum(total0), 1.0f / quad_sum(total1), row, stage, window, p.out,
               p.out_strides, 0);
}

template <typename Element, int Width, int Tiles>
MAGNET_FAST_KERNEL(kWarpSize* forward_warps(Tiles), Width == 64                          ? 1
                                                    : Tiles == 8 && sizeof(Element) == 2 ? 3
                                                                                         : 2)
window_forward_kernel(WindowParams p) {
    const int warps = thread_count() / kWarpSize;
    const int head = static_cast<int>(block_index() % p.heads),
              group = static_cast<int>(block_index() / p.heads);
    const WindowWalk<Element, Width, 3> walk{
        p, window_forward_layout(p.tokens, p.entries, warps, Width, static_cast<int>(sizeof(Element))), head,
        whole_rows(p.tokens), p.channels / p.heads};
    const int first = static_cast<int>(static_cast<int64_t>(p.windows) * group / p.groups);
    const int last = static_cast<int>(static_cast<int64_t>(p.windows) * (group + 1) / p.groups);
    walk.run(first, last, [&](const auto& window, int stage) {
        MAGNET_FAST_ROLLED
        for (int row = thread_index() / kWarpSize * 16; row < p.tokens; row += warps * 16)
            window_forward_rows<Element, Width, Tiles>(walk, window, stage, row);
    });
}

}  // namespace cuda
}  // namespace magnet_fast
