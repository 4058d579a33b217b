// What the products of cross-modal attention share: rows of a tensor in shared memory, and weights.
#pragma once

#include "cuda/cross_modal_attention.h"
#include "cuda/fragments.cuh"

namespace magnet_fast {
namespace cuda {

constexpr int kChunkPitch = kChunk + 8;  // rows that are read together lie in different banks

/// One head of one image.
struct HeadPlace {
    int64_t row, batch;
    int head;
    MAGNET_FAST_DEVICE HeadPlace of(const CrossModalParams& p, int64_t row) {
        return {row, row / p.heads, static_cast<int>(row % p.heads)};
    }
};

/// Whether a word, or what stands past the last one, is masked.
MAGNET_FAST_DEVICE bool masked(const CrossModalParams& p, int64_t batch, int word) {
    return word >= p.words || (p.mask && !p.mask[batch * p.words + word]);
}

/// Begins to copy kChunk channels of `rows` rows from `first` on to tile (rows, kChunkPitch). Past `limit`
/// rows, past the head's channels, and where a word is masked (kWords): zeros.
template <typename Element, bool kWords>
MAGNET_FAST_DEVICE void fetch_rows(const CrossModalParams& p, const HeadPlace& at, const RowTensor& tensor,
                                   Element* tile, int rows, int first, int limit, int channel) {
    constexpr int kVector = 16 / static_cast<int>(sizeof(Element)), kVectors = kChunk / kVector;
    const Element* origin = static_cast<const Element*>(tensor.data) + at.batch * tensor.batch +
                            static_cast<int64_t>(at.head) * p.width + channel;
    const auto given = [&](int row, int c) {
        return row < limit && channel + c < p.width && !(kWords && masked(p, at.batch, row));
    };
    if (p.aligned_in) {
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < rows * kVectors; i += thread_count()) {
            const int c = i % kVectors * kVector, row = first + i / kVectors;
            const bool has = given(row, c);
            // A copy of no bytes still takes an address.
            copy_async(tile + i / kVectors * kChunkPitch + c,
                       has ? origin + row * tensor.row + c : static_cast<const Element*>(tensor.data),
                       has ? 16 : 0);
        }
    } else {
        MAGNET_FAST_ROLLED
        for (int i = thread_index(); i < rows * kChunk; i += thread_count()) {
            const int c = i % kChunk, row = first + i / kChunk;
            store_shared(tile + i / kChunk * kChunkPitch + c,
                         given(row, c) ? origin[row * tensor.row + c] : Fragments<Element>::narrow(0.0f));
        }
    }
}

/// The weight of a pixel and a word that is in the matrix as x.
MAGNET_FAST_DEVICE float weight(const CrossModalParams& p, const HeadPlace& at, int pixel, int word,
                                float x) {
    if (p.weights == Weights::kImage) return exp2_fast(x - p.row_log[at.row * p.pixels + pixel]);
    if (p.weights == Weights::kText) return exp2_fast(x - p.column_log[at.row * p.padded_words + word]);
    return x;
}

MAGNET_FAST_DEVICE const float* matrix_row(const CrossModalParams& p, const float* matrix,
                                           const HeadPlace& at, int pixel) {
    return matrix + (at.row * p.pixels + pixel) * p.padded_words;
}

}  // namespace cuda
}  // namespace magnet_fast
