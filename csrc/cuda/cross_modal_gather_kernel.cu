// gather: weights times image rows, for all words, 64 channels and a share of the pixels a block; then the
// shares' sums, in their order. Compiled once for each element.
#include "cuda/cross_modal_tile.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

constexpr int kMostBlocks = kMostWords / 16;  // of 16 words
constexpr int kWeightPitch = kMostWords + 8;  // of a pixel's weights in shared memory

template <typename Element>
MAGNET_FAST_KERNEL(kCrossModalThreads, 2)
gather_kernel(CrossModalParams p) {
    using F = Fragments<Element>;
    const int chunks = (p.width + kChunk - 1) / kChunk;
    const int split = static_cast<int>(block_index() % p.splits);
    const int channel = static_cast<int>(block_index() / p.splits % chunks) * kChunk;
    const HeadPlace at = HeadPlace::of(p, block_index() / p.splits / chunks);
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize, g = lane / 4,
              t = lane % 4;
    Element* tiles = reinterpret_cast<Element*>(shared_memory());
    constexpr int kTile = kTilePixels * kChunkPitch;
    Element* weights = tiles + 2 * kTile;
    const int begin = static_cast<int>(static_cast<int64_t>(p.tiles) * split / p.splits);
    const int end = static_cast<int>(static_cast<int64_t>(p.tiles) * (split + 1) / p.splits);

    // A warp's 16 channels, for all words.
    float sums[kMostBlocks][2][4] = {};
    fetch_rows<Element, false>(p, at, p.image, tiles, kTilePixels, begin * kTilePixels, p.pixels, channel);
    commit_copies();
    MAGNET_FAST_ROLLED
    for (int tile = begin; tile < end; ++tile) {
        const int stage = (tile - begin) % 2;
        if (tile + 1 < end)
            fetch_rows<Element, false>(p, at, p.image, tiles + (1 - stage) * kTile, kTilePixels,
                                       (tile + 1) * kTilePixels, p.pixels, channel);
        commit_copies();
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < kTilePixels * p.padded_words; i += thread_count()) {
            const int word = i % p.padded_words, row = i / p.padded_words, pixel = tile * kTilePixels + row;
            float x = 0.0f;
            if (pixel < p.pixels) x = weight(p, at, pixel, word, matrix_row(p, p.scores, at, pixel)[word]);
            store_shared(weights + row * kWeightPitch + word, F::narrow(x));
        }
        wait_copies<1>();
        sync_block();
        const Element* image = tiles + stage * kTile + warp * 16;
        MAGNET_FAST_UNROLL
        for (int k = 0; k < kTilePixels; k += 16) {
            typename F::Columns columns[2];
            F::load_columns_transposed(columns, image + k * kChunkPitch, kChunkPitch);
            MAGNET_FAST_UNROLL
            for (int m = 0; m < kMostBlocks; ++m) {
                if (16 * m >= p.padded_words) continue;
                const typename F::Rows rows =
                    F::load_rows_transposed(weights + k * kWeightPitch + 16 * m, kWeightPitch);
                F::multiply(sums[m][0], rows, columns[0], p.products);
                F::multiply(sums[m][1], rows, columns[1], p.products);
            }
        }
        sync_block();  // the next turn overwrites what this one has read
    }
    wait_copies<0>();

    float* to = p.parts + (split * p.rows + at.row) * p.padded_words * p.width;
    MAGNET_FAST_UNROLL
    for (int m = 0; m < kMostBlocks; ++m) {
        if (16 * m >= p.padded_words) continue;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int word = 16 * m + g + i / 2 % 2 * 8, c = channel + warp * 16 + i / 4 * 8 + 2 * t + i % 2;
            if (c < p.width) to[static_cast<int64_t>(word) * p.width + c] = sums[m][i / 4][i % 4];
        }
    }
}

template <typename Element>
MAGNET_FAST_KERNEL(kCrossModalThreads, 1)
merge_kernel(CrossModalParams p) {
    const int64_t count = p.rows / p.heads * p.words * p.heads * p.width;
    const int64_t stride = p.rows * p.padded_words * p.width;
    for (int64_t i = block_index() * thread_count() + thread_index(); i < count;
         i += block_count() * thread_count()) {
        const int64_t c = i % p.width, head = i / p.width % p.heads;
        const int word = static_cast<int>(i / p.width / p.heads % p.words);
        const int64_t batch = i / p.width / p.heads / p.words;
        const float* from = p.parts + ((batch * p.heads + head) * p.padded_words + word) * p.width + c;
        float sum = 0.0f;
        if (!masked(p, batch, word))
            for (int split = 0; split < p.splits; ++split) sum += from[split * stride];
        static_cast<Element*>(p.out)[i] = Fragments<Element>::narrow(sum * p.factor);
    }
}

}  // namespace

template <>
CrossModalKernel CrossModalKernels<MAGNET_FAST_ELEMENT>::gather() {
    return gather_kernel<MAGNET_FAST_ELEMENT>;
}

template <>
CrossModalKernel CrossModalKernels<MAGNET_FAST_ELEMENT>::merge() {
    return merge_kernel<MAGNET_FAST_ELEMENT>;
}

}  // namespace cuda
}  // namespace magnet_fast
