// What both passes of window attention share: how a window's tokens get into shared memory and out of it.
#pragma once

#include "common/window_index.h"
#include "cuda/fragments.cuh"
#include "cuda/window_attention.h"

namespace magnet_fast {
namespace cuda {

/// Source coordinates of a token; y is -1 for padding.
struct alignas(8) TokenPlace {
    int32_t y, x;
};
/// Place along the bias table (lower 16 bits) and region of two neighbouring tokens.
struct alignas(8) KeyPair {
    int32_t first, second;
};

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kMinusInfinity = -INFINITY;
/// A program's windows of one head, one after the other, in shared memory.
template <typename Element, int Width, int Tensors>
struct WindowWalk {
    using F = Fragments<Element>;
    static constexpr int kPitch = Width + kRowPadding;
    static constexpr int kVector = 16 / static_cast<int>(sizeof(Element));
    static constexpr int kChunks = Width / kVector;

    const WindowParams& p;
    const WindowLayout at;
    const int head, rows, head_dim;

    /// A window's number, split into where it lies.
    struct Window {
        int64_t image;
        int row, column;
        bool cut;  // into regions that do not see each other
    };

    MAGNET_FAST_DEVICE Window window_at(const WindowParams& p, int number) {
        const int place = number % (p.rows * p.columns);
        const int row = place / p.columns, column = place % p.columns;
        return {number / (p.rows * p.columns), row, column,
                (p.shift_h > 0 && row == p.rows - 1) || (p.shift_w > 0 && column == p.columns - 1)};
    }

    MAGNET_FAST_METHOD float* table() const { return reinterpret_cast<float*>(shared_memory() + at.table); }
    MAGNET_FAST_METHOD TokenPlace* places(int stage) const {
        return reinterpret_cast<TokenPlace*>(shared_memory() + at.places) + stage * rows;
    }
    MAGNET_FAST_METHOD int* keys(int stage) const {
        return reinterpret_cast<int*>(shared_memory() + at.keys) + stage * rows;
    }
    /// Tensor 0 .. Tensors - 1: q, k, v, and in the backward pass the output's gradient; (rows, kPitch).
    MAGNET_FAST_METHOD Element* tile(int stage, int tensor) const {
        return reinterpret_cast<Element*>(shared_memory() + at.tiles) +
               (stage * Tensors + tensor) * rows * kPitch;
    }
    /// 16 rows of this warp's own.
    MAGNET_FAST_METHOD Element* staging() const {
        return reinterpret_cast<Element*>(shared_memory() + at.staging) +
               thread_index() / kWarpSize * 16 * kPitch;
    }

    /// Once a program: this head's biases in powers of two, and what stands past the last token.
    MAGNET_FAST_METHOD void begin() const {
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < p.entries; i += thread_count())
            store_shared(table() + i, p.bias[static_cast<int64_t>(i) * p.heads + head] * kLog2E);
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < kStages * (rows - p.tokens); i += thread_count()) {
            const int stage = i % kStages, row = p.tokens + i / kStages;
            store_shared(places(stage) + row, TokenPlace{-1, -1});
            store_shared(keys(stage) + row, 0);
        }
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < kStages * Tensors * (rows - p.tokens) * Width; i += thread_count()) {
            const int c = i % Width, row = p.tokens + i / Width % (rows - p.tokens);
            const int tensor = i / Width / (rows - p.tokens);
            store_shared(tile(0, 0) + (tensor * rows + row) * kPitch + c, F::narrow(0.0f));
        }
    }

    /// Where the window's tokens lie.
    MAGNET_FAST_METHOD void describe(const Window& window, int stage) const {
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < p.tokens; i += thread_count()) {
            const int token_y = i / p.window_w, token_x = i % p.window_w;
            const int y = window.row * p.window_h + token_y, x = window.column * p.window_w + token_x;
            const int source_y = source_coordinate(y, p.height, p.padded_h, p.shift_h, p.pad_first);
            const int source_x = source_coordinate(x, p.width, p.padded_w, p.shift_w, p.pad_first);
            const int region = 3 * shift_region(y, p.padded_h, p.window_h, p.shift_h) +
                               shift_region(x, p.padded_w, p.window_w, p.shift_w);
            const bool real = source_y >= 0 && source_x >= 0;
            store_shared(places(stage) + i, real ? TokenPlace{source_y, source_x} : TokenPlace{-1, -1});
            store_shared(keys(stage) + i, bias_place(token_y, token_x, p.window_w) | region << 16);
        }
    }

    /// Begins to copy what describe() found; 16 bytes at a time, or element by element.
    MAGNET_FAST_METHOD void fetch(const Window& window, int stage) const {
        if (p.aligned_in) {
            MAGNET_FAST_ROLLED
            for (int i = thread_index(); i < p.tokens * Tensors * kChunks; i += thread_count()) {
                const int channel = i % kChunks * kVector, tensor = i / kChunks % Tensors;
                const int row = i / (kChunks * Tensors);
                const Element* from = source(window, load_shared(places(stage) + row), tensor);
                const bool given = from && channel < head_dim;
                // A copy of no bytes still takes an address.
                copy_async(tile(stage, tensor) + row * kPitch + channel,
                           given ? from + channel : static_cast<const Element*>(p.qkv), given ? 16 : 0);
            }
        } else {
            MAGNET_FAST_ROLLED
            for (int i = thread_index(); i < p.tokens * Tensors * Width; i += thread_count()) {
                const int channel = i % Width, tensor = i / Width % Tensors, row = i / (Width * Tensors);
                const Element* from = source(window, load_shared(places(stage) + row), tensor);
                store_shared(tile(stage, tensor) + row * kPitch + channel,
                             from && channel < head_dim ? from[channel] : F::narrow(0.0f));
            }
        }
    }

    /// This head's channels of a token of a tensor in global memory; null: zeros.
    MAGNET_FAST_METHOD const Element* source(const Window& window, TokenPlace place, int tensor) const {
        const int64_t channel = static_cast<int64_t>(head) * head_dim;
        if (Tensors == 4 && tensor == 3) {
            if (place.y < 0) return nullptr;
            return static_cast<const Element*>(p.grad_out) + offset(p.grad_out_strides, window.image, place) +
                   channel;
        }
        const int64_t part = static_cast<int64_t>(tensor) * p.channels + channel;
        if (place.y < 0) return p.pad_qkv ? static_cast<const Element*>(p.pad_qkv) + part : nullptr;
        return static_cast<const Element*>(p.qkv) + offset(p.qkv_strides, window.image, place) + part;
    }

    MAGNET_FAST_DEVICE int64_t offset(const MapStrides& strides, int64_t image, TokenPlace place) {
        return image * strides.batch + place.y * strides.height + place.x * strides.width;
    }

    /// Sums of 16 rows from `row` on, times their factors, to this head's channels of a map.
    MAGNET_FAST_METHOD void write(const float (&sums)[Width / 8][4], float factor0, float factor1, int row,
                                  int stage, const Window& window, void* map, const MapStrides& strides,
                                  int64_t channel) const {
        const int lane = thread_index() % kWarpSize, g = lane / 4, t = lane % 4;
        Element* rows16 = staging();
        using Pair = typename F::Pair;
        MAGNET_FAST_UNROLL
        for (int n = 0; n < Width / 8; ++n) {
            Element* to = rows16 + g * kPitch + n * 8 + 2 * t;
            store_shared(reinterpret_cast<Pair*>(to), F::pack(sums[n][0] * factor0, sums[n][1] * factor0));
            store_shared(reinterpret_cast<Pair*>(to + 8 * kPitch),
                         F::pack(sums[n][2] * factor1, sums[n][3] * factor1));
        }
        sync_warp();
        Element* origin = static_cast<Element*>(map) + channel + static_cast<int64_t>(head) * head_dim;
        if (p.aligned_out) {
            MAGNET_FAST_UNROLL
            for (int i = lane; i < 16 * kChunks; i += kWarpSize) {
                const int c = i % kChunks * kVector, r = i / kChunks;
                const TokenPlace place = load_shared(places(stage) + row + r);
                if (place.y >= 0 && c < head_dim)
                    *reinterpret_cast<Words4*>(origin + offset(strides, window.image, place) + c) =
                        load_shared(reinterpret_cast<const Words4*>(rows16 + r * kPitch + c));
            }
        } else {
            MAGNET_FAST_ROLLED
            for (int i = lane; i < 16 * Width; i += kWarpSize) {
                const int c = i % Width, r = i / Width;
                const TokenPlace place = load_shared(places(stage) + row + r);
                if (place.y >= 0 && c < head_dim)
                    origin[offset(strides, window.image, place) + c] = load_shared(rows16 + r * kPitch + c);
            }
        }
        sync_warp();
    }

    /// Calls compute(window, stage) for every window of this program.
    template <typename Compute>
    MAGNET_FAST_METHOD void run(int first, int last, const Compute& compute) const {
        begin();
        describe(window_at(p, first), 0);
        sync_block();
        fetch(window_at(p, first), 0);
        commit_copies();
        MAGNET_FAST_ROLLED
        for (int number = first; number < last; ++number) {
            const int stage = (number - first) % kStages;
            if (number + 1 < last) {
                const Window next = window_at(p, number + 1);
                describe(next, kStages - 1 - stage);
                sync_block();
                fetch(next, kStages - 1 - stage);
            }
            commit_copies();
            wait_copies<1>();
            sync_block();
            compute(window_at(p, number), stage);
            sync_block();  // the next turn overwrites what this one has read
        }
        wait_copies<0>();
    }
};

/// sums = products of 16 rows with 16 columns, tile[column][channel], over all channels.
template <typename Element, int Width>
MAGNET_FAST_DEVICE void multiply_rows(float (&sums)[2][4],
                                      const typename Fragments<Element>::Rows (&rows)[Width / 16],
                                      const Element* tile, Float32Products products) {
    using F = Fragments<Element>;
    MAGNET_FAST_UNROLL
    for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
    MAGNET_FAST_UNROLL
    for (int k = 0; k < Width / 16; ++k) {
        typename F::Columns columns[2];
        F::load_columns(columns, tile + k * 16, Width + kRowPadding);
        F::multiply(sums[0], rows[k], columns[0], products);
        F::multiply(sums[1], rows[k], columns[1], products);
    }
}

/// sums (16 x Width) += weights (16 x 16) times 16 rows of a tile.
template <typename Element, int Width>
MAGNET_FAST_DEVICE void add_weighted(float (&sums)[Width / 8][4],
                                     const typename Fragments<Element>::Rows& weights, const Element* tile,
                                     Float32Products products) {
    using F = Fragments<Element>;
    MAGNET_FAST_UNROLL
    for (int n = 0; n < Width / 16; ++n) {
        typename F::Columns columns[2];
        F::load_columns_transposed(columns, tile + n * 16, Width + kRowPadding);
        F::multiply(sums[2 * n], weights, columns[0], products);
        F::multiply(sums[2 * n + 1], weights, columns[1], products);
    }
}

}  // namespace cuda
}  // namespace magnet_fast
