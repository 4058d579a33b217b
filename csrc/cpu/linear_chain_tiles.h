// A layer of a chain on the tile registers; level amx alone.
//
// A thread has 2 MiB of second-level cache. A group of panels of the weight lies there while all rows of the
// chunk pass: two tiles of rows, whose inputs stay near, by one panel after the other, so that a row's
// outputs are written side by side.
//
// A block of sums is finished (bias, activation, residual) only after the next one's products have been
// started: that work fills the time in which they are waited for.
#pragma once

#include "cpu/linear_chain_gelu.h"
#include "cpu/linear_chain_kernel.h"
#include "cpu/simd_matrix.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

constexpr int64_t kPanelTiles = 2;  // of 16 outputs
constexpr int64_t kGroupBytes = int64_t{1} << 19;
constexpr int64_t kBlock = 2 * kTileHeight * kPanelTiles * kLanes;  // sums of two by two tiles
constexpr int64_t kTileScratchBytes = 2 * kBlock * static_cast<int64_t>(sizeof(Real));

/// Two vectors, rounded to nearest even, side by side.
static inline void store_pair(BFloat16* p, Vec first, Vec second) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
}
static inline void store_one(BFloat16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}

/// A block of sums that waits to be finished.
struct SumBlock {
    const Real* sums = nullptr;
    int64_t row = 0, rows = 0, first = 0, wide = 0;
};

/// y = finish(sums + bias, row, output).
template <typename Finish>
static inline void write_block(const ChainProduct<BFloat16>& p, const SumBlock& block, const Finish& finish) {
    const Real* from = block.sums;
    const int64_t n = block.first, second = n + kLanes;
    BFloat16* to = p.y + block.row * p.y_row + n;
    const Vec bias = p.bias ? load(p.bias + n) : broadcast(Real{0});
    if (block.wide == kLanes) {
        for (int64_t m = block.row; m < block.row + block.rows; ++m, from += kLanes, to += p.y_row)
            store_one(to, finish(load(from) + bias, m, n));
        return;
    }
    const Vec bias2 = p.bias ? load(p.bias + second) : broadcast(Real{0});
    for (int64_t m = block.row; m < block.row + block.rows; ++m, from += 2 * kLanes, to += p.y_row)
        store_pair(to, finish(load(from) + bias, m, n), finish(load(from + kLanes) + bias2, m, second));
}

static inline void finish_block(const ChainProduct<BFloat16>& p, const SumBlock& block) {
    if (p.residual)
        write_block(p, block, [&](Vec y, int64_t m, int64_t n) {
            return y + load(p.residual + m * p.residual_row + n);
        });
    else if (p.activation == ChainActivation::kGelu)
        write_block(p, block, [](Vec y, int64_t, int64_t) { return gelu<BFloat16>(y); });
    else if (p.activation == ChainActivation::kRelu)
        // maximum(a, b) is b where a is NaN: a NaN stays one.
        write_block(p, block, [](Vec y, int64_t, int64_t) { return maximum(broadcast(Real{0}), y); });
    else
        write_block(p, block, [](Vec y, int64_t, int64_t) { return y; });
}

static inline void multiply_layer(const ChainProduct<BFloat16>& p) {
    const Pair *x = reinterpret_cast<const Pair*>(p.x), *weight = static_cast<const Pair*>(p.weight);
    const int64_t x_row = p.x_row / 2, depth = p.in / 2, panel = kPanelTiles * kLanes;
    // Inputs are a multiple of 16, so that half a tile always divides the depth.
    const int64_t pairs = depth % kTilePairs ? kTilePairs / 2 : kTilePairs;
    const int64_t fitting = kGroupBytes / (depth * kPanelTiles * kTileBytes),
                  together = fitting ? fitting : 1;
    Nothing nothing;
    SumBlock complete;
    int64_t turn = 0, configured = 0;
    for (int64_t group = p.first_panel; group < p.last_panel; group += together) {
        const int64_t end = p.last_panel - group < together ? p.last_panel : group + together;
        for (int64_t row = 0, rows = 0; row < p.rows; row += rows) {
            rows = p.rows - row < 2 * kTileHeight ? p.rows - row : 2 * kTileHeight;
            const int64_t height = rows < kTileHeight ? rows : kTileHeight;
            const bool two_down = rows > height;
            if (rows != configured) configure_tiles(height, two_down ? rows - height : height, pairs);
            configured = rows;
            for (int64_t at = group; at < end; ++at) {
                const int64_t first = at * panel, wide = p.out - first < panel ? p.out - first : panel;
                Real* sums = static_cast<Real*>(p.scratch) + turn++ % 2 * kBlock;
                const auto product = two_down ? (wide == panel ? tile_block<true, true, true, Nothing>
                                                               : tile_block<true, false, true, Nothing>)
                                              : (wide == panel ? tile_block<false, true, true, Nothing>
                                                               : tile_block<false, false, true, Nothing>);
                product(nothing, height, depth, pairs, x + row * x_row, x_row, 1, weight + first * depth,
                        wide, nullptr, 0, sums, wide);
                if (complete.sums) finish_block(p, complete);
                complete = {sums, row, rows, first, wide};
            }
        }
    }
    MAGNET_FAST_TILE(release, );
    if (complete.sums) finish_block(p, complete);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
