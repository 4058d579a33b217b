// scores: image rows times text rows, for 64 pixels and all words a block. Compiled once for each element.
#include "cuda/cross_modal_tile.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

constexpr int kMostBlocks = kMostWords / 8;  // of 8 words

/// A tile's maximum of every word's similarities and the sum of their exponentials: each warp over its 16
/// pixels, then the warps in their order.
MAGNET_FAST_DEVICE void write_column_parts(const CrossModalParams& p, const float (&sums)[kMostBlocks][4],
                                           bool real0, bool real1, float* shared, int64_t tile) {
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize, t = lane % 4;
    MAGNET_FAST_UNROLL
    for (int n = 0; n < kMostBlocks; ++n) {
        if (8 * n >= p.padded_words) continue;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 2; ++i) {
            const float x = real0 ? sums[n][i] : -INFINITY, y = real1 ? sums[n][i + 2] : -INFINITY;
            float most = fmaxf(x, y);
            MAGNET_FAST_UNROLL
            for (int mask = 4; mask < kWarpSize; mask *= 2) most = fmaxf(most, shuffle_xor(most, mask));
            const float base = most == -INFINITY ? 0.0f : most;
            float sum = exp2_fast(x - base) + exp2_fast(y - base);
            MAGNET_FAST_UNROLL
            for (int mask = 4; mask < kWarpSize; mask *= 2) sum += shuffle_xor(sum, mask);
            if (lane < 4)
                store_shared(reinterpret_cast<Floats2*>(shared) + warp * kMostWords + 8 * n + 2 * t + i,
                             Floats2{most, sum});
        }
    }
    sync_block();
    if (thread_index() < p.padded_words) {
        Floats2 all{-INFINITY, 0.0f};
        for (int i = 0; i < thread_count() / kWarpSize; ++i) {
            const Floats2 part =
                load_shared(reinterpret_cast<const Floats2*>(shared) + i * kMostWords + thread_index());
            const float most = fmaxf(all.x, part.x), base = most == -INFINITY ? 0.0f : most;
            all = {most, all.y * exp2_fast(all.x - base) + part.y * exp2_fast(part.x - base)};
        }
        reinterpret_cast<Floats2*>(p.column_parts)[tile * p.padded_words + thread_index()] = all;
    }
}

template <typename Element>
MAGNET_FAST_KERNEL(kCrossModalThreads, 2)
scores_kernel(CrossModalParams p) {
    using F = Fragments<Element>;
    const HeadPlace at = HeadPlace::of(p, block_index() / p.tiles);
    const int first = static_cast<int>(block_index() % p.tiles) * kTilePixels;
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize, g = lane / 4,
              t = lane % 4;
    Element* tiles = reinterpret_cast<Element*>(shared_memory());
    const int tile_size = (kTilePixels + p.padded_words) * kChunkPitch;
    const auto fetch = [&](int channel, int stage) {
        Element* to = tiles + stage * tile_size;
        fetch_rows<Element, false>(p, at, p.image, to, kTilePixels, first, p.pixels, channel);
        fetch_rows<Element, true>(p, at, p.text, to + kTilePixels * kChunkPitch, p.padded_words, 0, p.words,
                                  channel);
    };

    float sums[kMostBlocks][4] = {};
    fetch(0, 0);
    commit_copies();
    int stage = 0;
    MAGNET_FAST_ROLLED
    for (int channel = 0; channel < p.width; channel += kChunk, stage ^= 1) {
        if (channel + kChunk < p.width) fetch(channel + kChunk, stage ^ 1);
        commit_copies();
        wait_copies<1>();
        sync_block();
        const Element* image = tiles + stage * tile_size + warp * 16 * kChunkPitch;
        const Element* text = tiles + stage * tile_size + kTilePixels * kChunkPitch;
        MAGNET_FAST_UNROLL
        for (int k = 0; k < kChunk; k += 16) {
            const typename F::Rows rows = F::load_rows(image + k, kChunkPitch);
            MAGNET_FAST_UNROLL
            for (int n = 0; n < kMostBlocks; n += 2) {
                if (8 * n >= p.padded_words) continue;
                typename F::Columns columns[2];
                F::load_columns(columns, text + 8 * n * kChunkPitch + k, kChunkPitch);
                F::multiply(sums[n], rows, columns[0], p.products);
                F::multiply(sums[n + 1], rows, columns[1], p.products);
            }
        }
        sync_block();  // the next turn overwrites what this one has read
    }
    wait_copies<0>();

    const int pixel0 = first + warp * 16 + g, pixel1 = pixel0 + 8;
    float most0 = -INFINITY, most1 = -INFINITY;
    MAGNET_FAST_UNROLL
    for (int n = 0; n < kMostBlocks; ++n) {
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i)
            sums[n][i] = masked(p, at.batch, 8 * n + 2 * t + i % 2) ? -INFINITY : sums[n][i] * p.factor;
        most0 = fmaxf(most0, fmaxf(sums[n][0], sums[n][1]));
        most1 = fmaxf(most1, fmaxf(sums[n][2], sums[n][3]));
        if (8 * n >= p.padded_words) continue;
        const int64_t word = 8 * n + 2 * t;
        const int64_t to = (at.row * p.pixels + pixel0) * p.padded_words + word;
        if (pixel0 < p.pixels) *reinterpret_cast<Floats2*>(p.scores + to) = {sums[n][0], sums[n][1]};
        if (pixel1 < p.pixels)
            *reinterpret_cast<Floats2*>(p.scores + to + 8 * p.padded_words) = {sums[n][2], sums[n][3]};
    }
    if (p.row_log) {
        const float all0 = quad_max(most0), all1 = quad_max(most1);
        const float base0 = all0 == -INFINITY ? 0.0f : all0, base1 = all1 == -INFINITY ? 0.0f : all1;
        float sum0 = 0.0f, sum1 = 0.0f;
        MAGNET_FAST_UNROLL
        for (int n = 0; n < kMostBlocks; ++n) {
            sum0 += exp2_fast(sums[n][0] - base0) + exp2_fast(sums[n][1] - base0);
            sum1 += exp2_fast(sums[n][2] - base1) + exp2_fast(sums[n][3] - base1);
        }
        sum0 = quad_sum(sum0);
        sum1 = quad_sum(sum1);
        // A sentence without a word: any finite number makes its weights 0.
        if (t == 0 && pixel0 < p.pixels)
            p.row_log[at.row * p.pixels + pixel0] = sum0 == 0.0f ? 0.0f : base0 + log2_fast(sum0);
        if (t == 0 && pixel1 < p.pixels)
            p.row_log[at.row * p.pixels + pixel1] = sum1 == 0.0f ? 0.0f : base1 + log2_fast(sum1);
    }
    // Over the tiles: all warps are past the last barrier, and have read what was there.
    if (p.column_parts)
        write_column_parts(p, sums, pixel0 < p.pixels, pixel1 < p.pixels,
                           reinterpret_cast<float*>(shared_memory()), block_index());
}

}  // namespace

template <>
CrossModalKernel CrossModalKernels<MAGNET_FAST_ELEMENT>::scores() {
    return scores_kernel<MAGNET_FAST_ELEMENT>;
}

}  // namespace cuda
}  // namespace magnet_fast
