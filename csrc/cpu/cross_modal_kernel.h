// The vectorised inner kernels of cross-modal attention: one head, one run of consecutive pixels.
//
// Everything is laid out words x pixels. Pixels then fill the vectors whatever the number of words is, the
// softmax over words runs from row to row, and the same weights multiply image rows (sums over pixels) and,
// read transposed, word rows (sums over words). Only the image rows that enter a similarity are transposed,
// a small panel at a time.
//
// Words come *packed*: the words that the mask leaves, one after the other, in Real, packed_row(width) apart
// and with zeros from width to the next multiple of 16.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

// Functions are static: a level's own copy must not be linked into another level.

constexpr int64_t kTilePixels = 144, kPanelPixels = 48, kPanelDepth = 128;

/// Pixels treated at a time, at most, a multiple of the panels' 48: scores stay in the first-level cache,
/// image rows (`width` is the widest tensor's) in the second-level one until they are read again.
static inline int64_t tile_pixels(int64_t words, int64_t width) {
    const int64_t scores = 16384 / words, rows = 32768 / width;
    const int64_t fit = (scores < rows ? scores : rows) / kPanelPixels * kPanelPixels;
    return fit < kPanelPixels ? kPanelPixels : fit < kTilePixels ? fit : kTilePixels;
}

/// Distance of packed rows. The odd number of cache lines keeps rows of 4 KiB out of each other's way.
static inline int64_t packed_row(int64_t width) {
    return (width + 15) / 16 * 16 + 16;
}

/// Row r of one head starts at data + r * stride. data null: a tensor that is not there or not wanted.
template <typename Element>
struct Rows {
    Element* data = nullptr;
    int64_t stride = 0;

    Rows from(int64_t row) const { return {data ? data + row * stride : nullptr, stride}; }
    explicit operator bool() const { return data != nullptr; }
};

/// Widths of one head.
struct CrossModalWidths {
    int64_t similarity, text_value, image_value;

    int64_t widest() const {
        const int64_t value = text_value > image_value ? text_value : image_value;
        return similarity > value ? similarity : value;
    }
};

/// Sums of one run of pixels, for words x image_value: softmax's numerator, relative to the run's maximum.
template <typename Real>
struct PartialSoftmax {
    Real* highest = nullptr;  // (words)
    Real* sum = nullptr;      // (words) of exp(score - highest)
    Real* read = nullptr;     // (words, packed_row(image_value)) sum of exp(score - highest) * image_value
};

template <typename Element>
struct CrossModalForward {
    using Real = typename Computed<Element>::Real;
    int64_t pixels;  // of this run
    int64_t words;   // unmasked
    Real scale;
    CrossModalWidths widths;
    Rows<const Element> image_query, image_key, image_value;  // image_key null: shared similarity
    const Real* key;                                          // packed
    const Real* value;                                        // packed
    const Real* query;                                        // packed
    Rows<Element> image_out;                                  // null: not this direction
    PartialSoftmax<Real> text;                                // null: not this direction
    Real* scratch;
};

/// What the text direction's gradients need before any pixel's: scores and their gradients are kept.
template <typename Element>
struct CrossModalStatistics {
    using Real = typename Computed<Element>::Real;
    int64_t pixels, words;
    Real scale;
    CrossModalWidths widths;
    Rows<const Element> image_query, image_key, image_value;  // image_key: image_query when shared
    const Real* query;                                        // packed; the key when the similarity is shared
    const Real* grad_text_out;                                // packed, null: weight gradients are not wanted
    Real* score;                                              // (words, kept_row) written
    Real* grad_weight;  // (words, kept_row) written; null with grad_text_out
    int64_t kept_row;
    Real* highest;  // (words)
    Real* sum;      // (words) of exp(score - highest)
    Real* dot;      // (words) of exp(score - highest) * grad_weight
    Real* scratch;
};

template <typename Element>
struct CrossModalBackward {
    using Real = typename Computed<Element>::Real;
    int64_t pixels, words;
    Real scale;
    CrossModalWidths widths;
    Rows<const Element> image_query, image_key, image_value;
    Rows<const Element> grad_image_out;  // null: the image direction has no gradient
    const Real *key, *value, *query;     // packed
    const Real* grad_text_out;           // packed, null: the text direction has no gradient
    Real *score, *grad_weight;           // of CrossModalStatistics, overwritten
    int64_t kept_row;
    const Real *highest, *inverse_sum, *mean;  // (words) over all pixels; mean of the weights' gradients
    Rows<Element> grad_image_query, grad_image_key, grad_image_value;  // null: not wanted
    Real *grad_text_key, *grad_text_value, *grad_text_query;  // packed sums of this run; null: not wanted
    Real* scratch;
};

template <typename Element>
struct CrossModalKernels {
    using Real = typename Computed<Element>::Real;
    /// to (count, packed_row(width)) = rows words[0 .. count) of `from`.
    void (*pack)(Rows<const Element> from, const int32_t* words, int64_t count, int64_t width, Real* to);
    /// to (width) = sum of factors[i] * parts[i * stride ...], in this order; count 0: zeros.
    void (*combine)(const Real* parts, int64_t count, int64_t stride, const Real* factors, int64_t width,
                    Element* to);
    void (*forward)(const CrossModalForward<Element>&);
};

template <typename Element>
struct CrossModalBackwardKernels {
    void (*statistics)(const CrossModalStatistics<Element>&);
    void (*backward)(const CrossModalBackward<Element>&);
};

/// Forms of packed words besides their own that a kernel holds at most; of bfloat16 tensors alone.
constexpr int64_t kWordForms = 5;

/// Numbers of scratch that a kernel needs.
template <typename Element>
static inline int64_t cross_modal_scratch(int64_t words, const CrossModalWidths& widths) {
    const int64_t panel = kPanelDepth * kPanelPixels, rows = kTilePixels * kPanelPixels;
    const int64_t forms = sizeof(Element) == 2 ? kWordForms * words * packed_row(widths.widest()) : 0;
    return panel + rows + 3 * words * (tile_pixels(words, widths.widest()) + 16) + forms + 64;
}

MAGNET_FAST_DECLARE_KERNELS(CrossModalKernels, cross_modal_kernels)
MAGNET_FAST_DECLARE_KERNELS(CrossModalBackwardKernels, cross_modal_backward_kernels)

}  // namespace magnet_fast
