// Cross-modal attention on the CPU: pixels attend to words and words to pixels, one head at a time.
#pragma once

#include <cstdint>

namespace magnet_fast {

struct CrossModalSizes {
    int64_t batch, pixels, words, heads;
    int64_t width, text_value_width, image_value_width;  // C, Cv, Cw: over all heads
    double scale;
    int dtype;  // of all tensors: enum Dtype
    int64_t threads;
};

/// (batch, rows, width) with a contiguous last dimension; strides in elements. data null: not given.
struct CrossModalTensor {
    const void* data;
    int64_t batch_stride, row_stride;
};

/// What both passes read; see magnet_fast.ops.cross_modal_attention for the forms.
struct CrossModalInputs {
    CrossModalSizes sizes;
    CrossModalTensor image_query, text_key, text_value, text_query, image_key, image_value;
    const uint8_t* text_mask;  // (batch, words), 0 for a masked word; null: all are words
};

/// image_out (batch, pixels, Cv) and text_out (batch, words, Cw), contiguous, are written; each is given
/// exactly when its values are. std::invalid_argument names an argument that is wrong; nothing is written
/// then.
void cross_modal_attention_forward(const CrossModalInputs& inputs, void* image_out, void* text_out);

/// Contiguous, shaped like their tensors, overwritten; null: not wanted.
struct CrossModalGradients {
    void *image_query, *text_key, *text_value, *text_query, *image_key, *image_value;
};

/// grad_image_out (batch, pixels, Cv) and grad_text_out (batch, words, Cw), null: that direction has no
/// gradient, and those of the tensors that only it reads cannot be wanted.
void cross_modal_attention_backward(const CrossModalInputs& inputs, const CrossModalTensor& grad_image_out,
                                    const CrossModalTensor& grad_text_out,
                                    const CrossModalGradients& gradients);

}  // namespace magnet_fast
