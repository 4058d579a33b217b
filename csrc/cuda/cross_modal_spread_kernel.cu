// spread: weights times text rows, for 64 pixels a block; the weights stay in registers. Compiled once for
// each element.
#include "cuda/cross_modal_tile.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

constexpr int kMostBlocks = kMostWords / 16;  // of 16 words

template <typename Element>
MAGNET_FAST_KERNEL(kCrossModalThreads, 2)
spread_kernel(CrossModalParams p) {
    using F = Fragments<Element>;
    constexpr int kVector = 16 / static_cast<int>(sizeof(Element)), kVectors = kChunk / kVector;
    const HeadPlace at = HeadPlace::of(p, block_index() / p.tiles);
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize, g = lane / 4,
              t = lane % 4;
    const int first = static_cast<int>(block_index() % p.tiles) * kTilePixels + warp * 16;  // of this warp
    Element* staging = reinterpret_cast<Element*>(shared_memory()) + warp * 16 * kChunkPitch;
    Element* tiles = reinterpret_cast<Element*>(shared_memory()) + kTilePixels * kChunkPitch;
    const int tile_size = p.padded_words * kChunkPitch;

    fetch_rows<Element, true>(p, at, p.text, tiles, p.padded_words, 0, p.words, 0);
    commit_copies();
    typename F::Rows weights[kMostBlocks];
    MAGNET_FAST_UNROLL
    for (int k = 0; k < kMostBlocks; ++k) {
        if (16 * k >= p.padded_words) continue;
        float blocks[2][4] = {};
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int pixel = first + g + i / 2 * 8, word = 16 * k + i % 2 * 8 + 2 * t;
            if (pixel >= p.pixels) continue;
            const Floats2 x = *reinterpret_cast<const Floats2*>(matrix_row(p, p.scores, at, pixel) + word);
            blocks[i % 2][i / 2 * 2] = weight(p, at, pixel, word, x.x);
            blocks[i % 2][i / 2 * 2 + 1] = weight(p, at, pixel, word + 1, x.y);
        }
        weights[k] = as_rows<Element>(blocks[0], blocks[1]);
    }

    int stage = 0;
    MAGNET_FAST_ROLLED
    for (int channel = 0; channel < p.width; channel += kChunk, stage ^= 1) {
        if (channel + kChunk < p.width)
            fetch_rows<Element, true>(p, at, p.text, tiles + (stage ^ 1) * tile_size, p.padded_words, 0,
                                      p.words, channel + kChunk);
        commit_copies();
        wait_copies<1>();
        sync_block();
        const Element* text = tiles + stage * tile_size;
        MAGNET_FAST_UNROLL
        for (int n = 0; n < kChunk; n += 16) {
            float sums[2][4] = {};
            MAGNET_FAST_UNROLL
            for (int k = 0; k < kMostBlocks; ++k) {
                if (16 * k >= p.padded_words) continue;
                typename F::Columns columns[2];
                F::load_columns_transposed(columns, text + 16 * k * kChunkPitch + n, kChunkPitch);
                F::multiply(sums[0], weights[k], columns[0], p.products);
                F::multiply(sums[1], weights[k], columns[1], p.products);
            }
            MAGNET_FAST_UNROLL
            for (int i = 0; i < 4; ++i) {
                Element* to = staging + (g + i / 2 * 8) * kChunkPitch + n + i % 2 * 8 + 2 * t;
                store_shared(
                    reinterpret_cast<typename F::Pair*>(to),
                    F::pack(sums[i % 2][i / 2 * 2] * p.factor, sums[i % 2][i / 2 * 2 + 1] * p.factor));
            }
        }
        sync_warp();
        Element* origin = static_cast<Element*>(p.out) + (at.batch * p.pixels + first) * p.heads * p.width +
                          static_cast<int64_t>(at.head) * p.width + channel;
        const int rows = p.pixels - first < 16 ? p.pixels - first : 16;
        if (p.aligned_out) {
            MAGNET_FAST_ROLLED
            for (int i = lane; i < rows * kVectors; i += kWarpSize) {
                const int c = i % kVectors * kVector, row = i / kVectors;
                if (channel + c < p.width)
                    *reinterpret_cast<Words4*>(origin + static_cast<int64_t>(row) * p.heads * p.width + c) =
                        load_shared(reinterpret_cast<const Words4*>(staging + row * kChunkPitch + c));
            }
        } else {
            MAGNET_FAST_ROLLED
            for (int i = lane; i < rows * kChunk; i += kWarpSize) {
                const int c = i % kChunk, row = i / kChunk;
                if (channel + c < p.width)
                    origin[static_cast<int64_t>(row) * p.heads * p.width + c] =
                        load_shared(staging + row * kChunkPitch + c);
            }
        }
        sync_block();  // the next turn overwrites what this one has read
    }
    wait_copies<0>();
}

}  // namespace

template <>
CrossModalKernel CrossModalKernels<MAGNET_FAST_ELEMENT>::spread() {
    return spread_kernel<MAGNET_FAST_ELEMENT>;
}

}  // namespace cuda
}  // namespace magnet_fast
