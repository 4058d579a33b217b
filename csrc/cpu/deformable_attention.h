// Multi-scale deformable attention on the CPU, plain and fused: the launchers.
#pragma once

#include <cstdint>

#include "common/deformable_views.h"

namespace magnet_fast {

/// Writes out (B, Q, h * d), contiguous. Of the plain form, locations are in computed(dtype of value) and
/// weights in value's dtype, contiguous; of the fused form, reference points are in computed(dtype of value),
/// contiguous, offsets and logits of one dtype, that or value's.
///
/// Both throw std::invalid_argument, naming the argument, before anything is written.
void deformable_attention_forward(const DeformableViews& views, const TensorView& out, int64_t threads);

/// From grad_out (B, Q, h * d), contiguous; gradients are in the dtypes of their tensors.
void deformable_attention_backward(const DeformableViews& views, const TensorView& grad_out,
                                   const DeformableGradients& gradients, int64_t threads);

}  // namespace magnet_fast
