// Cross-modal attention on a GPU: pixels attend to words and words to pixels.
//
// Both passes are made of three products and a few steps on matrices of one number for each pixel and word,
// (batch, heads, pixels, padded words) in float32 in the workspace, which is small beside the image tensors:
//   scores  pixels x words = image rows . text rows      similarities, and gradients of weights
//   spread  image rows = weights times text rows         what a pixel reads from the words
//   gather  text rows = weights times image rows         what a word reads from the pixels, split over pixels
// Similarities are in powers of two. Every sum has a fixed order.
#pragma once

#include <cstdint>

#include "common/cross_modal_views.h"
#include "cuda/launch.h"

namespace magnet_fast {
namespace cuda {

struct CrossModalSizes : CrossModalShape {
    double scale;
    Float32Products products;
};

/// (batch, rows, width) with a contiguous last dimension; strides in elements. data null: not given.
struct RowTensor {
    const void* data;
    int64_t batch, row;
};

/// What both passes read; see magnet_fast.ops.cross_modal_attention for the forms.
struct CrossModalInputs {
    CrossModalSizes sizes;
    RowTensor image_query, text_key, text_value, text_query, image_key, image_value;
    const uint8_t* text_mask;  // (batch, words), 0 for a masked word; null: all are words
};

/// Contiguous, shaped like their tensors, overwritten; null: not wanted.
struct CrossModalGradients {
    void *image_query, *text_key, *text_value, *text_query, *image_key, *image_value;
};

constexpr int kMostWords = 64, kMostCrossModalHeadDim = 1024;

/// Bytes of device memory that either pass of these tensors needs as `workspace`.
int64_t cross_modal_attention_workspace(const CrossModalViews& views, const Place& place);

/// image_out (batch, pixels, Cv) and text_out (batch, words, Cw), contiguous, are written; each is there
/// exactly when its values are. std::invalid_argument names an argument that is wrong, std::runtime_error
/// says what CUDA reports.
void cross_modal_attention_forward(const CrossModalViews& views, Float32Products products, const Place& place,
                                   const TensorView& image_out, const TensorView& text_out,
                                   const TensorView& workspace);

/// grad_image_out (batch, pixels, Cv) and grad_text_out (batch, words, Cw); not there: that direction has no
/// gradient, and those of the tensors that only it reads cannot be wanted.
void cross_modal_attention_backward(const CrossModalViews& views, Float32Products products,
                                    const Place& place, const TensorView& grad_image_out,
                                    const TensorView& grad_text_out, const CrossModalTensors& gradients,
                                    const TensorView& workspace);

// ---- Between the launchers and the kernels ----------------------------------------------------------------

/// How a weight is made from a number x of the matrix.
enum class Weights : int {
    kImage,  // 2^(x - row_log of the pixel): a pixel's attention over the words
    kText,   // 2^(x - column_log of the word): a word's attention over the pixels
    kPlain,  // x
};

struct CrossModalParams {
    int64_t rows;          // batch * heads
    int32_t heads, width;  // channels of a head of the tensors below
    int32_t pixels, words;
    int32_t padded_words;   // in whole blocks of 16
    int32_t tiles, splits;  // blocks of kTilePixels pixels; shares of them in gather
    bool aligned_in, aligned_out;
    Float32Products products;
    const uint8_t* mask;    // (batch, words) or null
    RowTensor image, text;  // what a product reads
    float factor;           // of the product
    Weights weights;
    bool add;             // text gradients: to what is there
    float* scores;        // (rows, pixels, padded words), -infinity for masked words
    float* row_log;       // (rows, pixels), log2 of the words' exponentials; null: not wanted
    float* column_parts;  // (rows, tiles, padded words, 2), a tile's maximum and sum; null: not wanted
    float* column_log;    // (rows, padded words), log2 of the pixels' exponentials
    float* slopes;        // like scores: gradients of weights; then of similarities
    float* column_sums;   // (rows, padded words)
    float* parts;         // (splits, rows, padded words, width)
    void* out;            // (batch, pixels or words, heads * width), contiguous
};

constexpr int kTilePixels = 64, kChunk = 64;  // of a block: pixels, and channels at a time
constexpr int kCrossModalThreads = 128;

using CrossModalKernel = void (*)(CrossModalParams);

/// Kernels of one element; one file compiled for each element.
template <typename Element>
struct CrossModalKernels {
    static CrossModalKernel scores();
    static CrossModalKernel spread();
    static CrossModalKernel gather();
    static CrossModalKernel merge();  // gather's splits
};
CrossModalKernel cross_modal_columns();         // column_log from column_parts
CrossModalKernel cross_modal_image_gradient();  // slopes, in place, of the image's attention
CrossModalKernel cross_modal_text_parts();      // column_parts: weights times slopes of a tile
CrossModalKernel cross_modal_text_sums();       // column_sums from them
CrossModalKernel cross_modal_text_gradient();   // scores, in place, or added to `out` (float)

/// Bytes of shared memory for tiles of kTilePixels pixels' and of all words' rows.
constexpr int cross_modal_shared(int image_tiles, int text_tiles, int padded_words, int bytes) {
    return (image_tiles * kTilePixels + text_tiles * padded_words) * (kChunk + 8) * bytes;
}

}  // namespace cuda
}  // namespace magnet_fast
