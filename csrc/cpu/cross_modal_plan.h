// How cross-modal attention is cut into work: checks of sizes, words that count, runs of pixels.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/cross_modal_attention.h"
#include "cpu/cross_modal_kernel.h"
#include "cpu/launch.h"

namespace magnet_fast {

/// The shape of a call, and how many threads it may take.
struct CrossModalSizes : CrossModalShape {
    double scale;
    int64_t threads;
};

/// (batch, rows, width) with a contiguous last dimension; strides in elements. data null: not given.
struct CrossModalTensor {
    const void* data;
    int64_t batch_stride, row_stride;
};

/// What both passes read.
struct CrossModalInputs {
    CrossModalSizes sizes;
    CrossModalTensor image_query, text_key, text_value, text_query, image_key, image_value;
    const uint8_t* text_mask;  // (batch, words), 0 for a masked word; null: all are words
};

/// Throws std::invalid_argument unless the tensors are one of the operator's forms with sensible sizes.
CrossModalInputs checked_inputs(const CrossModalViews& views, int64_t threads);

/// Of a tensor with three dimensions, or one that is not there.
CrossModalTensor rows_of(const TensorView& view);

/// The unmasked words of every sentence.
struct WordLists {
    explicit WordLists(const CrossModalInputs& inputs);

    int64_t count(int64_t image) const { return first[image + 1] - first[image]; }
    const int32_t* of(int64_t image) const { return index.data() + first[image]; }

    std::vector<int32_t> index;  // words of all sentences, one after the other
    std::vector<int64_t> first;  // (batch + 1)
    int64_t most = 0;            // of any sentence
};

/// Work is divided by slice, which is a head of an image, and by run of consecutive pixels. Both follow from
/// the shapes alone, never from the number of threads, so that sums are always taken in the same order.
struct CrossModalPlan {
    explicit CrossModalPlan(const CrossModalSizes& sizes);

    /// First pixel of a run; runs begin at multiples of 16 and are of nearly equal length.
    int64_t begin(int64_t run) const {
        const int64_t pixel = units * run / runs * 16;
        return pixel < pixels ? pixel : pixels;
    }

    int64_t pixels, slices, units, runs;
    int64_t longest;  // pixels of a run at most, rounded up to whole vectors
    int64_t team;     // threads that are worth having
};

/// Uninitialised numbers at a 64-byte boundary; none when count is 0.
template <typename Real>
struct Numbers {
    Numbers() = default;
    explicit Numbers(int64_t count) {
        if (count > 0) memory = aligned_floats((count * sizeof(Real) + 63) / sizeof(float));
    }
    Real* get() const { return reinterpret_cast<Real*>(memory.get()); }

    AlignedFloats memory;
};

}  // namespace magnet_fast
