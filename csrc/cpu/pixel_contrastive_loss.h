// Pixel contrastive loss on the CPU: arguments of the two launchers.
#pragma once

#include <cstdint>

#include "common/elements.h"

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

template <typename Element>
struct PixelContrastiveForward {
    PixelContrastiveSizes sizes;
    const Element* features;  // (B, P, C)
    FeatureStrides strides;
    const bool* inside;                            // (B, P), contiguous
    typename Computed<Element>::Real* loss;        // (B), written
    typename Computed<Element>::Real* statistics;  // (B, kPixelStatistics, P), contiguous, written
};

template <typename Element>
struct PixelContrastiveBackward {
    PixelContrastiveSizes sizes;
    const typename Computed<Element>::Real* grad_loss;  // (B), contiguous
    const Element* features;                            // (B, P, C)
    FeatureStrides strides;
    const bool* inside;                                  // (B, P), contiguous
    const typename Computed<Element>::Real* statistics;  // (B, kPixelStatistics, P) of the forward pass
    Element* grad_features;                              // (B, P, C), contiguous, written
};

/// Both throw std::invalid_argument, which names the argument, before anything is written. The working memory
/// of an image is about P * C numbers in the forward pass and twice that in the backward pass. As many images
/// as there are threads are treated at once when the batch has that many, else one.
template <typename Element>
void pixel_contrastive_forward(const PixelContrastiveForward<Element>& arguments);
template <typename Element>
void pixel_contrastive_backward(const PixelContrastiveBackward<Element>& arguments);

}  // namespace magnet_fast
