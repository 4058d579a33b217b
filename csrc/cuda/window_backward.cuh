// Window attention, backward. Nothing is read from the forward pass but its inputs: a warp finds the softmax
// of its 16 queries again, then the gradient of q, and after a barrier that of k and v for 16 keys, with
// queries and keys exchanged. Every sum is one thread's own and made in a fixed order.
#pragma once

#include "cuda/window_tile.cuh"

namespace magnet_fast {
namespace cuda {

template <typename Element, int Width>
struct WindowBackward {
    using F = Fragments<Element>;
    using Walk = WindowWalk<Element, Width, 4>;
    using Window = typename Walk::Window;
    using Rows = typename F::Rows;
    static constexpr int kPitch = Width + kRowPadding;

    const WindowParams& p;
    const Walk& walk;
    float* bias_sums;  // (rows, sums_pitch), of this program; in shared or in global memory; null: not wanted

    /// log2 of the sum of every query's exponentials, and the sum of its weights times their gradients.
    MAGNET_FAST_METHOD float* logarithms() const {
        return reinterpret_cast<float*>(shared_memory() + walk.at.rows);
    }
    MAGNET_FAST_METHOD float* deltas() const { return logarithms() + walk.rows; }
    /// Sums over padded keys of this warp's gradients: k's, then v's.
    MAGNET_FAST_METHOD float* pads() const {
        return reinterpret_cast<float*>(shared_memory() + walk.at.pads) +
               thread_index() / kWarpSize * 2 * Width;
    }

    /// Logits, in powers of two, of products of 16 rows with 8 columns, of which one side are queries.
    template <bool kRowsAreQueries>
    MAGNET_FAST_METHOD void to_logits(float (&x)[4], int row_key0, int row_key1, const int* keys, int column,
                                      bool cut) const {
        const int t = thread_index() % 4;
        const KeyPair other = load_shared(reinterpret_cast<const KeyPair*>(keys + column + 2 * t));
        const float* origin = walk.table() + bias_origin(p.window_h, p.window_w);
        const float scale = p.scale * kLog2E;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int row_key = i < 2 ? row_key0 : row_key1, column_key = i % 2 ? other.second : other.first;
            const int apart = (row_key & 0xffff) - (column_key & 0xffff);
            const bool hidden = column + 2 * t + i % 2 >= p.tokens || (cut && (row_key ^ column_key) >> 16);
            x[i] = hidden ? kMinusInfinity
                          : x[i] * scale + load_shared(origin + (kRowsAreQueries ? apart : -apart));
        }
    }

    /// The 16 queries from `row` on: their softmax's numbers, and the gradient of q.
    MAGNET_FAST_METHOD void queries(const Window& window, int stage, int row) const {
        const int lane = thread_index() % kWarpSize, g = lane / 4, t = lane % 4;
        const int* keys = walk.keys(stage);
        const int key0 = load_shared(keys + row + g), key1 = load_shared(keys + row + g + 8);
        Rows query[Width / 16], grad_out[Width / 16];
        load(query, stage, 0, row);
        load(grad_out, stage, 3, row);

        // A thread's own columns; the four threads of a row meet at the end.
        float most[2] = {kMinusInfinity, kMinusInfinity}, total[2] = {}, delta[2] = {};
        MAGNET_FAST_ROLLED
        for (int column = 0; column < p.tokens; column += 16) {
            float logits[2][4], slopes[2][4];
            multiply_rows<Element, Width>(logits, query, walk.tile(stage, 1) + column * kPitch, p.products);
            multiply_rows<Element, Width>(slopes, grad_out, walk.tile(stage, 2) + column * kPitch,
                                          p.products);
            MAGNET_FAST_UNROLL
            for (int n = 0; n < 2; ++n)
                to_logits<true>(logits[n], key0, key1, keys, column + 8 * n, window.cut);
            MAGNET_FAST_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float largest = fmaxf(fmaxf(logits[0][2 * half], logits[0][2 * half + 1]),
                                            fmaxf(logits[1][2 * half], logits[1][2 * half + 1]));
                const float now = fmaxf(most[half], largest), base = now == kMinusInfinity ? 0.0f : now;
                const float shrink = exp2_fast(most[half] - base);
                total[half] *= shrink;
                delta[half] *= shrink;
                most[half] = now;
                MAGNET_FAST_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float weight = exp2_fast(logits[i / 2][2 * half + i % 2] - base);
                    total[half] += weight;
                    delta[half] += weight * slopes[i / 2][2 * half + i % 2];
                }
            }
        }
        float logarithm[2];
        MAGNET_FAST_UNROLL
        for (int half = 0; half < 2; ++half) {
            const float now = quad_max(most[half]), base = now == kMinusInfinity ? 0.0f : now;
            const float shrink = exp2_fast(most[half] - base);
            const float sum = quad_sum(total[half] * shrink);
            delta[half] = quad_sum(delta[half] * shrink) / sum;
            logarithm[half] = base + log2_fast(sum);
            if (t == 0) {
                // Rows past the last token may see no key at all.
                const int query = row + g + 8 * half;
                store_shared(logarithms() + query, query < p.tokens ? logarithm[half] : 0.0f);
                store_shared(deltas() + query, query < p.tokens ? delta[half] : 0.0f);
            }
        }
        if (!p.grad_qkv && !bias_sums) return;

        float grad_query[Width / 8][4] = {};
        MAGNET_FAST_ROLLED
        for (int column = 0; column < p.tokens; column += 16) {
            float grads[2][4], slopes[2][4];
            multiply_rows<Element, Width>(grads, query, walk.tile(stage, 1) + column * kPitch, p.products);
            multiply_rows<Element, Width>(slopes, grad_out, walk.tile(stage, 2) + column * kPitch,
                                          p.products);
            MAGNET_FAST_UNROLL
            for (int n = 0; n < 2; ++n) {
                to_logits<true>(grads[n], key0, key1, keys, column + 8 * n, window.cut);
                MAGNET_FAST_UNROLL
                for (int i = 0; i < 4; ++i)
                    grads[n][i] = exp2_fast(grads[n][i] - logarithm[i / 2]) * (slopes[n][i] - delta[i / 2]);
                if (bias_sums) {
                    float* at = bias_sums + (row + g) * sums_pitch(p.tokens) + column + 8 * n + 2 * t;
                    add(at, grads[n][0], grads[n][1]);
                    add(at + 8 * sums_pitch(p.tokens), grads[n][2], grads[n][3]);
                }
            }
            if (p.grad_qkv)
                add_weighted<Element, Width>(grad_query, as_rows<Element>(grads[0], grads[1]),
                                             walk.tile(stage, 1) + column * kPitch, p.products);
        }
        if (p.grad_qkv)
            walk.write(grad_query, p.scale, p.scale, row, stage, window, p.grad_qkv, p.grad_qkv_strides, 0);
    }

    /// The 16 keys from `row` on: the gradients of k and v.
    MAGNET_FAST_METHOD void keys(const Window& window, int stage, int row) const {
        const int lane = thread_index() % kWarpSize, g = lane / 4, t = lane % 4;
        const int* keys = walk.keys(stage);
        const int key0 = load_shared(keys + row + g), key1 = load_shared(keys + row + g + 8);
        Rows key[Width / 16], value[Width / 16];
        load(key, stage, 1, row);
        load(value, stage, 2, row);
        float grad_key[Width / 8][4] = {}, grad_value[Width / 8][4] = {};
        MAGNET_FAST_ROLLED
        for (int column = 0; column < p.tokens; column += 16) {
            float weights[2][4], grads[2][4];
            multiply_rows<Element, Width>(weights, key, walk.tile(stage, 0) + column * kPitch, p.products);
            multiply_rows<Element, Width>(grads, value, walk.tile(stage, 3) + column * kPitch, p.products);
            MAGNET_FAST_UNROLL
            for (int n = 0; n < 2; ++n) {
                to_logits<false>(weights[n], key0, key1, keys, column + 8 * n, window.cut);
                const int at = column + 8 * n + 2 * t;
                const Floats2 logarithm = load_shared(reinterpret_cast<const Floats2*>(logarithms() + at));
                const Floats2 delta = load_shared(reinterpret_cast<const Floats2*>(deltas() + at));
                MAGNET_FAST_UNROLL
                for (int i = 0; i < 4; ++i) {
                    weights[n][i] = exp2_fast(weights[n][i] - (i % 2 ? logarithm.y : logarithm.x));
                    grads[n][i] = weights[n][i] * (grads[n][i] - (i % 2 ? delta.y : delta.x));
                }
            }
            add_weighted<Element, Width>(grad_value, as_rows<Element>(weights[0], weights[1]),
                                         walk.tile(stage, 3) + column * kPitch, p.products);
            add_weighted<Element, Width>(grad_key, as_rows<Element>(grads[0], grads[1]),
                                         walk.tile(stage, 0) + column * kPitch, p.products);
        }
        if (p.grad_pad_qkv) {
            const bool pad0 = row + g < p.tokens && load_shared(walk.places(stage) + row + g).y < 0;
            const bool pad1 = row + g + 8 < p.tokens && load_shared(walk.places(stage) + row + g + 8).y < 0;
            if (any_lane(pad0 || pad1)) {
                add_pads(grad_key, p.scale, pad0, pad1, pads());
                add_pads(grad_value, 1.0f, pad0, pad1, pads() + Width);
            }
        }
        if (p.grad_qkv) {
            walk.write(grad_key, p.scale, p.scale, row, stage, window, p.grad_qkv, p.grad_qkv_strides,
                       p.channels);
            walk.write(grad_value, 1.0f, 1.0f, row, stage, window, p.grad_qkv, p.grad_qkv_strides,
                       2 * p.channels);
        }
    }

    /// pads (Width) += factor times the padded rows.
    MAGNET_FAST_DEVICE void add_pads(const float (&sums)[Width / 8][4], float factor, bool pad0, bool pad1,
                                     float* pads) {
        const int lane = thread_index() % kWarpSize;
        MAGNET_FAST_UNROLL
        for (int n = 0; n < Width / 8; ++n) {
            MAGNET_FAST_UNROLL
            for (int i = 0; i < 2; ++i) {
                float sum = (pad0 ? sums[n][i] : 0.0f) + (pad1 ? sums[n][i + 2] : 0.0f);
                MAGNET_FAST_UNROLL
                for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
                float* at = pads + 8 * n + 2 * lane + i;
                if (lane < 4) store_shared(at, load_shared(at) + factor * sum);
            }
        }
    }

    MAGNET_FAST_DEVICE void add(float* at, float x, float y) {
        Floats2* to = reinterpret_cast<Floats2*>(at);
        const Floats2 before = load_any(to);
        store_any(to, Floats2{before.x + x, before.y + y});
    }

    MAGNET_FAST_METHOD void load(Rows (&rows)[Width / 16], int stage, int tensor, int row) const {
        MAGNET_FAST_UNROLL
        for (int k = 0; k < Width / 16; ++k)
            rows[k] = F::load_rows(walk.tile(stage, tensor) + row * kPitch + k * 16, kPitch);
    }

    /// Zeros, before the first window.
    MAGNET_FAST_METHOD void begin() const {
        if (bias_sums) MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < walk.rows * sums_pitch(p.tokens); i += thread_count())
            store_any(bias_sums + i, 0.0f);
        for (int i = thread_index() % kWarpSize; i < 2 * Width; i += kWarpSize)
            store_shared(pads() + i, 0.0f);
        sync_block();
    }

    /// What the program's windows add to the gradients of the bias table and of the padding token.
    MAGNET_FAST_METHOD void finish(int part) const {
        sync_block();
        const int columns = 2 * p.window_w - 1;
        MAGNET_FAST_ROLLED
        for (int entry = thread_index(); bias_sums && entry < p.entries; entry += thread_count()) {
            // Query minus key.
            const int y = entry / columns - (p.window_h - 1), x = entry % columns - (p.window_w - 1);
            float sum = 0.0f;
            for (int key_y = y < 0 ? -y : 0; key_y < p.window_h - (y > 0 ? y : 0); ++key_y) MAGNET_FAST_ROLLED
            for (int key_x = x < 0 ? -x : 0; key_x < p.window_w - (x > 0 ? x : 0); ++key_x)
                sum += load_any(bias_sums + ((key_y + y) * p.window_w + key_x + x) * sums_pitch(p.tokens) +
                                key_y * p.window_w + key_x);
            p.bias_parts[static_cast<int64_t>(part) * p.entries + entry] = sum;
        }
        const float* all = reinterpret_cast<const float*>(shared_memory() + walk.at.pads);
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); p.grad_pad_qkv && i < 2 * walk.head_dim; i += thread_count()) {
            const int c = i / walk.head_dim * Width + i % walk.head_dim;
            float sum = 0.0f;
            MAGNET_FAST_ROLLED
            for (int warp = 0; warp < thread_count() / kWarpSize; ++warp)
                sum += load_shared(all + warp * 2 * Width + c);
            p.pad_parts[static_cast<int64_t>(part) * 2 * walk.head_dim + i] = sum;
        }
    }
};

template <typename Element, int Width>
MAGNET_FAST_KERNEL(kWarpSize* backward_warps(Width, sizeof(Element)), 1)
window_backward_kernel(WindowParams p) {
    const int warps = thread_count() / kWarpSize, part = static_cast<int>(block_index());
    const int head = part % p.heads, group = part / p.heads;
    const bool sums = p.grad_bias && p.sums_in_shared;
    const WindowWalk<Element, Width, 4> walk{
        p, window_backward_layout(p.tokens, p.entries, warps, Width, static_cast<int>(sizeof(Element)), sums),
        head, whole_rows(p.tokens), p.channels / p.heads};
    float* bias_sums = nullptr;
    if (p.grad_bias)
        bias_sums = sums ? reinterpret_cast<float*>(shared_memory() + walk.at.sums)
                         : p.bias_sums + static_cast<int64_t>(part) * walk.rows * sums_pitch(p.tokens);
    const WindowBackward<Element, Width> backward{p, walk, bias_sums};
    const int first = static_cast<int>(static_cast<int64_t>(p.windows) * group / p.groups);
    const int last = static_cast<int>(static_cast<int64_t>(p.windows) * (group + 1) / p.groups);
    backward.begin();
    walk.run(first, last, [&](const auto& window, int stage) {
        MAGNET_FAST_ROLLED
        for (int row = thread_index() / kWarpSize * 16; row < p.tokens; row += warps * 16)
            backward.queries(window, stage, row);
        if (!p.grad_qkv && !p.grad_pad_qkv) return;
        sync_block();
        MAGNET_FAST_ROLLED
        for (int row = thread_index() / kWarpSize * 16; row < p.tokens; row += warps * 16)
            backward.keys(window, stage, row);
    });
    backward.finish(part);
}

}  // namespace cuda
}  // namespace magnet_fast
