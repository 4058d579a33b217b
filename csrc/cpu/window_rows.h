// From queries and keys to weights: the first product of the forward pass and the softmax's exponentials.
// Compiled once per SIMD level like simd.h.
#pragma once

#include "cpu/simd_matrix.h"
#include "cpu/window_softmax.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// A block of queries, and where its weights go. A word is a Real, or a pair of bfloat16 (see simd_matrix.h).
template <typename Word>
struct QueryBlock {
    int64_t rows, columns, depth;  // columns: whole vectors of keys; depth in words
    const Word* query;             // (rows, query_row)
    int64_t query_row;             // words
    const Word* key_transposed;    // (depth, columns)
    const Real* bias;              // (rows, columns), in units of the scale
    Real scale;
    Word* weight;        // (rows, weight_row) written: exp(scale * (score - the row's maximum))
    int64_t weight_row;  // words
    Vec* sum;            // (rows), written: the row's sum of weights, lane by lane
    Real* score;         // (rows, columns), room for scores that do not fit into registers; may be `weight`
};

/// Writes the weights of Vectors vectors of scores; returns their sum, lane by lane.
template <int Vectors>
static inline __attribute__((always_inline)) Vec write_weights(const Vec (&score)[Vectors], Vec highest,
                                                               Vec unit, Real* weight) {
    Vec total = broadcast(Real{0});
    for (int n = 0; n < Vectors; ++n) {
        const Vec value = power((score[n] - highest) * unit);
        store(weight + n * kLanes, value);
        total = total + value;
    }
    return total;
}

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)

/// Two vectors as bfloat16: `low` in lanes 0 .. 15, `high` in lanes 16 .. 31.
static inline __m512i narrowed(Vec low, Vec high) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

/// The sum is that of the rounded weights: divided by it, they still sum to 1.
template <int Vectors>
static inline __attribute__((always_inline)) Vec write_weights(const Vec (&score)[Vectors], Vec highest,
                                                               Vec unit, Pair* weight) {
    const __m512bh ones = broadcast(Pair{0x3F803F80u});
    const Vec base = highest * unit;
    Vec total = broadcast(0.0f);
    for (int n = 0; n < Vectors; n += 2, weight += kLanes) {
        const bool both = n + 1 < Vectors;
        const Vec low = rough_power(multiply_subtract(score[n], unit, base));
        const Vec high =
            both ? rough_power(multiply_subtract(score[both ? n + 1 : n], unit, base)) : broadcast(0.0f);
        const __m512i pairs = narrowed(low, high);
        if (both)
            _mm512_storeu_si512(weight, pairs);
        else
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(weight), _mm512_castsi512_si256(pairs));
        total = multiply_add(reinterpret_cast<__m512bh>(pairs), ones, total);
    }
    return total;
}

#endif

#if defined(MAGNET_FAST_SIMD_AVX512) && !defined(MAGNET_FAST_SIMD_AMX)

/// (By value: no store can change the block's pointers, so they stay in registers.)
/// Whole rows r, r + 1, ..., Vectors vectors wide: the scores never leave the registers.
template <int Rows, int Vectors, typename Word>
static inline __attribute__((always_inline)) void weigh_rows(QueryBlock<Word> block, int64_t r) {
    constexpr int64_t kColumns = Vectors * kLanes;
    Vec score[Rows][Vectors];
    for (int m = 0; m < Rows; ++m)
        for (int n = 0; n < Vectors; ++n) score[m][n] = load(block.bias + (r + m) * kColumns + n * kLanes);
    const Word *a = block.query + r * block.query_row, *b = block.key_transposed;
    for (int64_t k = 0; k < block.depth; ++k, ++a, b += kColumns) {
        decltype(load(b)) row[Vectors];
        for (int n = 0; n < Vectors; ++n) {
            row[n] = load(b + n * kLanes);
#if !defined(MAGNET_FAST_EMULATE_AVX512)
            asm("" : "+v"(row[n]));  // in a register: loaded once, not once per row of the tile
#endif
        }
        for (int m = 0; m < Rows; ++m) {
            const auto scalar = broadcast(a[m * block.query_row]);
            for (int n = 0; n < Vectors; ++n) score[m][n] = multiply_add(scalar, row[n], score[m][n]);
        }
    }
    const Vec unit = broadcast(block.scale * kPowerUnit);
    Vec highest[Rows];
    for (int m = 0; m < Rows; ++m) {
        Vec top = score[m][0];
        for (int n = 1; n < Vectors; ++n) top = maximum(top, score[m][n]);
        highest[m] = broadcast(reduce_max(top));
    }
    for (int m = 0; m < Rows; ++m)
        block.sum[r + m] =
            write_weights<Vectors>(score[m], highest[m], unit, block.weight + (r + m) * block.weight_row);
}

template <int Rows, int Vectors, typename Word, typename After>
static void weigh_in_registers(QueryBlock<Word> block, const After& after) {
    int64_t r = 0;
    for (; r + Rows <= block.rows; r += Rows) {
        weigh_rows<Rows, Vectors>(block, r);
        for (int m = 0; m < Rows; ++m) after(r + m);
    }
    for (; r < block.rows; ++r) {
        weigh_rows<1, Vectors>(block, r);
        after(r);
    }
}

#endif

/// Rows wider than the registers, and rows made by tiles: scores go through memory.
template <typename Word, typename After>
static void weigh_in_memory(QueryBlock<Word> block, const After& after) {
    multiply(block.rows, block.columns, block.depth, block.query, block.query_row, 1, block.key_transposed,
             block.columns, block.bias, block.columns, block.score, block.columns,
             block.sum);  // the rows' maxima first
    const Vec unit = broadcast(block.scale * kPowerUnit);
    for (int64_t r = 0; r < block.rows; ++r) {
        const Real* score = block.score + r * block.columns;
        Word* weight = block.weight + r * block.weight_row;
        const Vec highest = broadcast(reduce_max(block.sum[r]));
        Vec total = broadcast(Real{0});
        int64_t j = 0;
        for (; j + 2 * kLanes <= block.columns; j += 2 * kLanes) {
            const Vec two[2] = {load(score + j), load(score + j + kLanes)};
            total =
                total + write_weights<2>(two, highest, unit, weight + j * block.weight_row / block.columns);
        }
        if (j < block.columns) {
            const Vec one[1] = {load(score + j)};
            total =
                total + write_weights<1>(one, highest, unit, weight + j * block.weight_row / block.columns);
        }
        block.sum[r] = total;
        after(r);
    }
}

/// An infinite or NaN maximum gives NaN throughout the row, as torch's softmax does. Calls after(row)
/// with every row, once it is done.
template <typename Word, typename After>
static void weigh(QueryBlock<Word> block, const After& after) {
#if defined(MAGNET_FAST_SIMD_AVX512) && !defined(MAGNET_FAST_SIMD_AMX)
    // Two rows of 9 vectors are enough sums to keep the multiplier busy, and leave registers to the
    // exponential.
    switch (block.columns / kLanes) {
        case 1:
            return weigh_in_registers<12, 1>(block, after);
        case 2:
            return weigh_in_registers<8, 2>(block, after);
        case 3:
            return weigh_in_registers<6, 3>(block, after);
        case 4:
            return weigh_in_registers<4, 4>(block, after);
        case 5:
            return weigh_in_registers<4, 5>(block, after);
        case 6:
            return weigh_in_registers<3, 6>(block, after);
        case 7:
            return weigh_in_registers<3, 7>(block, after);
        case 8:
            return weigh_in_registers<2, 8>(block, after);
        case 9:
            return weigh_in_registers<2, 9>(block, after);
        case 10:
            return weigh_in_registers<2, 10>(block, after);
    }
#endif
    weigh_in_memory(block, after);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
