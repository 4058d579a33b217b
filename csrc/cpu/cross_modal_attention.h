// Cross-modal attention on the CPU: pixels attend to words and words to pixels, one head at a time.
#pragma once

#include <cstdint>

#include "common/cross_modal_views.h"

namespace magnet_fast {

/// image_out (batch, pixels, Cv) and text_out (batch, words, Cw), contiguous, are written; each is there
/// exactly when its values are. std::invalid_argument names an argument that is wrong; nothing is written
/// then.
void cross_modal_attention_forward(const CrossModalViews& views, const TensorView& image_out,
                                   const TensorView& text_out, int64_t threads);

/// grad_image_out (batch, pixels, Cv) and grad_text_out (batch, words, Cw); not there: that direction has no
/// gradient, and those of the tensors that only it reads cannot be wanted. Gradients are overwritten; those
/// that are not there are not wanted.
void cross_modal_attention_backward(const CrossModalViews& views, const TensorView& grad_image_out,
                                    const TensorView& grad_text_out, const CrossModalTensors& gradients,
                                    int64_t threads);

}  // namespace magnet_fast
