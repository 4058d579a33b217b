// Pixel contrastive loss on the CPU: the two launchers.
#pragma once

#include <cstdint>

#include "common/tensor_view.h"

namespace magnet_fast {

/// Sizes and settings shared by both passes: B, P and C.
struct PixelContrastiveSizes {
    int64_t batch, pixels, channels;
    double temperature;
    bool normalize;
    int64_t threads;  // OpenMP threads; the result does not depend on it, not in a single bit
};

/// Distances, in elements, between neighbours along batch, pixel and channel.
struct FeatureStrides {
    int64_t batch, pixel, channel;
};

/// What the forward pass keeps of every pixel for the backward pass: over the pixel's own side and over the
/// other, the sum of exponentials, and the greatest similarity if the sum is relative to it, else -infinity.
constexpr int64_t kPixelStatistics = 4;

/// What both passes read.
struct PixelContrastiveInputs {
    TensorView features;  // (B, P, C), any strides
    TensorView inside;    // (B, P) bool, contiguous
    double temperature;
    bool normalize;
    int64_t threads;
};

/// Writes loss (B) and statistics (B, kPixelStatistics, P), contiguous, in computed(dtype of features).
///
/// Both throw std::invalid_argument, which names the argument, before anything is written. The working memory
/// of an image is about P * C numbers in the forward pass and twice that in the backward pass. As many images
/// as there are threads are treated at once when the batch has that many, else one.
void pixel_contrastive_forward(const PixelContrastiveInputs& inputs, const TensorView& loss,
                               const TensorView& statistics);

/// From grad_loss (B), contiguous, and the forward pass's statistics; writes grad_features (B, P, C),
/// contiguous.
void pixel_contrastive_backward(const PixelContrastiveInputs& inputs, const TensorView& grad_loss,
                                const TensorView& statistics, const TensorView& grad_features);

}  // namespace magnet_fast
