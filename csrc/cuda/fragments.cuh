// Products of 16 x 16 blocks on tensor cores, alike for every element.
//
// A lane (4 * g + t) holds pairs of neighbours along the inner dimension k:
//   Rows (16 x 16, [row][k])     pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8)
//   Columns (16 x 8, [k][column]) pairs (2t, g), (2t + 8, g)
//   sums (16 x 8, float)         (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// so two neighbouring blocks of sums, rounded, are the Rows of a following product. For 16-bit elements these
// are the layouts of mma.m16n8k16. A float32 product takes two mma.m16n8k8 whose inner index is permuted: t
// and t + 4 stand for 2t and 2t + 1, in both operands.
#pragma once

#include "common/elements.h"
#include "cuda/launch.h"
#include "cuda/primitives.cuh"

namespace magnet_fast {

template <typename Element>
struct Tensor16 {
    using Pair = uint32_t;
    struct Rows {
        uint32_t pair[4];
    };
    struct Columns {
        uint32_t pair[2];
    };

    /// Rows of tile[row][k].
    MAGNET_FAST_DEVICE Rows load_rows(const Element* tile, int pitch) {
        const int lane = thread_index() % kWarpSize;
        Rows rows;
        load_matrices(rows.pair, tile + lane % 16 * pitch + lane / 16 * 8);
        return rows;
    }
    /// Rows of tile[k][row].
    MAGNET_FAST_DEVICE Rows load_rows_transposed(const Element* tile, int pitch) {
        const int lane = thread_index() % kWarpSize;
        Rows rows;
        load_matrices_transposed(rows.pair, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
        return rows;
    }
    /// Two blocks of Columns, 0 .. 7 and 8 .. 15, of tile[column][k].
    MAGNET_FAST_DEVICE void load_columns(Columns (&to)[2], const Element* tile, int pitch) {
        const int lane = thread_index() % kWarpSize;
        uint32_t found[4];
        load_matrices(found, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
        to[0] = {{found[0], found[1]}};
        to[1] = {{found[2], found[3]}};
    }
    /// The same of tile[k][column].
    MAGNET_FAST_DEVICE void load_columns_transposed(Columns (&to)[2], const Element* tile, int pitch) {
        const int lane = thread_index() % kWarpSize;
        uint32_t found[4];
        load_matrices_transposed(found, tile + lane % 16 * pitch + lane / 16 * 8);
        to[0] = {{found[0], found[1]}};
        to[1] = {{found[2], found[3]}};
    }
};

template <typename Element>
struct Fragments;

template <>
struct Fragments<BFloat16> : Tensor16<BFloat16> {
    MAGNET_FAST_DEVICE uint32_t pack(float low, float high) { return pack_bfloat16(low, high); }
    MAGNET_FAST_DEVICE void multiply(float (&sums)[4], const Rows& a, const Columns& b, Float32Products) {
        multiply_bfloat16(sums, a.pair, b.pair);
    }
    MAGNET_FAST_DEVICE BFloat16 narrow(float x) { return {static_cast<uint16_t>(pack_bfloat16(x, 0.0f))}; }
};

template <>
struct Fragments<Float16> : Tensor16<Float16> {
    MAGNET_FAST_DEVICE uint32_t pack(float low, float high) { return pack_float16(low, high); }
    MAGNET_FAST_DEVICE void multiply(float (&sums)[4], const Rows& a, const Columns& b, Float32Products) {
        multiply_float16(sums, a.pair, b.pair);
    }
    MAGNET_FAST_DEVICE Float16 narrow(float x) { return {static_cast<uint16_t>(pack_float16(x, 0.0f))}; }
};

template <>
struct Fragments<float> {
    using Pair = Floats2;
    struct Rows {
        Floats2 pair[4];
    };
    struct Columns {
        Floats2 pair[2];
    };

    MAGNET_FAST_DEVICE Rows load_rows(const float* tile, int pitch) {
        const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
        Rows rows;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i)
            rows.pair[i] = load_shared(
                reinterpret_cast<const Floats2*>(tile + (g + i % 2 * 8) * pitch + 2 * t + i / 2 * 8));
        return rows;
    }
    MAGNET_FAST_DEVICE Rows load_rows_transposed(const float* tile, int pitch) {
        const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
        Rows rows;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float* at = tile + (2 * t + i / 2 * 8) * pitch + g + i % 2 * 8;
            rows.pair[i] = {load_shared(at), load_shared(at + pitch)};
        }
        return rows;
    }
    MAGNET_FAST_DEVICE void load_columns(Columns (&to)[2], const float* tile, int pitch) {
        const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i)
            to[i / 2].pair[i % 2] = load_shared(
                reinterpret_cast<const Floats2*>(tile + (g + i / 2 * 8) * pitch + 2 * t + i % 2 * 8));
    }
    MAGNET_FAST_DEVICE void load_columns_transposed(Columns (&to)[2], const float* tile, int pitch) {
        const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float* at = tile + (2 * t + i % 2 * 8) * pitch + g + i / 2 * 8;
            to[i / 2].pair[i % 2] = {load_shared(at), load_shared(at + pitch)};
        }
    }

    MAGNET_FAST_DEVICE Floats2 pack(float low, float high) { return {low, high}; }
    MAGNET_FAST_DEVICE void multiply(float (&sums)[4], const Rows& a, const Columns& b,
                                     Float32Products products) {
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 2; ++i) {
            const float x[4] = {a.pair[2 * i].x, a.pair[2 * i + 1].x, a.pair[2 * i].y, a.pair[2 * i + 1].y};
            const float y[2] = {b.pair[i].x, b.pair[i].y};
            float x_high[4], x_low[4], y_high[2], y_low[2];
            MAGNET_FAST_UNROLL
            for (int j = 0; j < 4; ++j) split(x[j], x_high[j], x_low[j]);
            MAGNET_FAST_UNROLL
            for (int j = 0; j < 2; ++j) split(y[j], y_high[j], y_low[j]);
            if (products == Float32Products::kExact) {
                multiply_tf32(sums, x_low, y_high);
                multiply_tf32(sums, x_high, y_low);
            }
            multiply_tf32(sums, x_high, y_high);
        }
    }
    MAGNET_FAST_DEVICE float narrow(float x) { return x; }

  private:
    MAGNET_FAST_DEVICE void split(float x, float& high, float& low) {
        high = round_tf32(x);
        low = round_tf32(x - high);
    }
};

/// Sums of blocks 2k and 2k + 1 as Rows of the next product.
template <typename Element>
MAGNET_FAST_DEVICE typename Fragments<Element>::Rows as_rows(const float (&left)[4],
                                                             const float (&right)[4]) {
    using F = Fragments<Element>;
    return {{F::pack(left[0], left[1]), F::pack(left[2], left[3]), F::pack(right[0], right[1]),
             F::pack(right[2], right[3])}};
}

/// Of the four lanes that hold parts of the same rows.
MAGNET_FAST_DEVICE float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
MAGNET_FAST_DEVICE float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}

}  // namespace magnet_fast
