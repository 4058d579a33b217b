// The steps of cross-modal attention between its products, on matrices of one number for each pixel and word.
#include "cuda/cross_modal_tile.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

/// column_log from the tiles' maxima and sums; a thread for each word.
MAGNET_FAST_KERNEL(kCrossModalThreads, 1)
columns_kernel(CrossModalParams p) {
    const int64_t i = block_index() * thread_count() + thread_index();
    if (i >= p.rows * p.padded_words) return;
    const Floats2* part = reinterpret_cast<const Floats2*>(p.column_parts) +
                          i / p.padded_words * p.tiles * p.padded_words + i % p.padded_words;
    float most = -INFINITY, sum = 0.0f;
    for (int tile = 0; tile < p.tiles; ++tile)
        most = fmaxf(most, part[static_cast<int64_t>(tile) * p.padded_words].x);
    const float base = most == -INFINITY ? 0.0f : most;
    for (int tile = 0; tile < p.tiles; ++tile) {
        const Floats2 each = part[static_cast<int64_t>(tile) * p.padded_words];
        sum += each.y * exp2_fast(each.x - base);
    }
    // A masked word: any finite number makes its weights 0.
    p.column_log[i] = sum == 0.0f ? 0.0f : base + log2_fast(sum);
}

/// slopes = weights * (slopes - their weighted mean over the words); a warp for each pixel.
MAGNET_FAST_KERNEL(kCrossModalThreads, 1)
image_gradient_kernel(CrossModalParams p) {
    const int lane = thread_index() % kWarpSize;
    const int64_t row = (block_index() * thread_count() + thread_index()) / kWarpSize;  // of (rows, pixels)
    if (row >= p.rows * p.pixels) return;
    const float log = p.row_log[row];
    float weights[kMostWords / kWarpSize] = {}, slopes[kMostWords / kWarpSize] = {}, mean = 0.0f;
    MAGNET_FAST_UNROLL
    for (int i = 0; i < kMostWords / kWarpSize; ++i) {
        const int word = i * kWarpSize + lane;
        if (word >= p.padded_words) continue;
        weights[i] = exp2_fast(p.scores[row * p.padded_words + word] - log);
        slopes[i] = p.slopes[row * p.padded_words + word];
        mean += weights[i] == 0.0f ? 0.0f : weights[i] * slopes[i];  // a masked word's slope is -infinity
    }
    MAGNET_FAST_UNROLL
    for (int mask = 1; mask < kWarpSize; mask *= 2) mean += shuffle_xor(mean, mask);
    MAGNET_FAST_UNROLL
    for (int i = 0; i < kMostWords / kWarpSize; ++i) {
        const int word = i * kWarpSize + lane;
        if (word < p.padded_words)
            p.slopes[row * p.padded_words + word] =
                weights[i] == 0.0f ? 0.0f : weights[i] * (slopes[i] - mean);
    }
}

/// The number of `matrix` that a thread works on, of a tile's pixels from its first on.
struct TilePlace {
    HeadPlace at;
    int word, first, step, last;  // pixels first, first + step ... below last

    MAGNET_FAST_DEVICE TilePlace of(const CrossModalParams& p) {
        const int64_t row = block_index() / p.tiles;
        const int tile = static_cast<int>(block_index() % p.tiles) * kTilePixels;
        const int last = tile + kTilePixels < p.pixels ? tile + kTilePixels : p.pixels;
        return {HeadPlace::of(p, row), thread_index() % p.padded_words,
                tile + thread_index() / p.padded_words, thread_count() / p.padded_words, last};
    }
};

/// A tile's sums over its pixels of weights times slopes, for every word: threads in their order.
MAGNET_FAST_KERNEL(4 * kMostWords, 1)
text_parts_kernel(CrossModalParams p) {
    const TilePlace place = TilePlace::of(p);
    float* shared = reinterpret_cast<float*>(shared_memory());
    const float log = p.column_log[place.at.row * p.padded_words + place.word];
    float sum = 0.0f;
    for (int pixel = place.first; pixel < place.last; pixel += place.step) {
        const float weight = exp2_fast(matrix_row(p, p.scores, place.at, pixel)[place.word] - log);
        if (weight != 0.0f) sum += weight * matrix_row(p, p.slopes, place.at, pixel)[place.word];
    }
    store_shared(shared + thread_index(), sum);
    sync_block();
    if (thread_index() >= p.padded_words) return;
    sum = 0.0f;
    for (int i = thread_index(); i < thread_count(); i += p.padded_words) sum += load_shared(shared + i);
    p.column_parts[block_index() * p.padded_words + thread_index()] = sum;
}

MAGNET_FAST_KERNEL(kCrossModalThreads, 1)
text_sums_kernel(CrossModalParams p) {
    const int64_t i = block_index() * thread_count() + thread_index();
    if (i >= p.rows * p.padded_words) return;
    const float* part = p.column_parts + i / p.padded_words * p.tiles * p.padded_words + i % p.padded_words;
    float sum = 0.0f;
    for (int tile = 0; tile < p.tiles; ++tile) sum += part[static_cast<int64_t>(tile) * p.padded_words];
    p.column_sums[i] = sum;
}

/// slopes = weights * (slopes - their weighted mean over the pixels), or that added to `out`, which is such a
/// matrix.
MAGNET_FAST_KERNEL(4 * kMostWords, 1)
text_gradient_kernel(CrossModalParams p) {
    const TilePlace place = TilePlace::of(p);
    const int64_t column = place.at.row * p.padded_words + place.word;
    const float log = p.column_log[column], mean = p.column_sums[column];
    for (int pixel = place.first; pixel < place.last; pixel += place.step) {
        const int64_t i = (place.at.row * p.pixels + pixel) * p.padded_words + place.word;
        const float weight = exp2_fast(p.scores[i] - log);
        const float gradient = weight == 0.0f ? 0.0f : weight * (p.slopes[i] - mean);
        if (p.add) {
            static_cast<float*>(p.out)[i] += gradient;
        } else {
            p.slopes[i] = gradient;
        }
    }
}

}  // namespace

CrossModalKernel cross_modal_columns() {
    return columns_kernel;
}
CrossModalKernel cross_modal_image_gradient() {
    return image_gradient_kernel;
}
CrossModalKernel cross_modal_text_parts() {
    return text_parts_kernel;
}
CrossModalKernel cross_modal_text_sums() {
    return text_sums_kernel;
}
CrossModalKernel cross_modal_text_gradient() {
    return text_gradient_kernel;
}

}  // namespace cuda
}  // namespace magnet_fast
