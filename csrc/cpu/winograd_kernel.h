// The vectorised inner kernels of a 3 x 3 convolution by Winograd's algorithm F(2 x 2, 3 x 3): some tiles of
// it.
//
// A tile is 2 x 2 outputs, made of the 4 x 4 inputs around them: those become 16 numbers a channel, which are
// multiplied by 16 matrices in place of nine, and the products become the tile again: 16 multiplications for
// four outputs, where the sum over a 3 x 3 window takes 36 (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", CVPR 2016). Larger tiles would save more and lose more digits than the
// error rule allows.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

constexpr int64_t kWinogradSide = 4, kWinogradPositions = kWinogradSide * kWinogradSide, kWinogradTile = 2;

/// A map (images, height, width, channels) whose channels stand side by side; strides in elements.
template <typename Element>
struct ChannelsLast {
    Element* data;
    int64_t image, row, pixel;
};

/// What all tiles of a convolution have in common; stride, dilation and padding are 1.
template <typename Element>
struct WinogradConvolution {
    using Real = typename Computed<Element>::Real;
    int64_t images, height, width, in, out;  // in and out: multiples of WinogradKernels::step
    ChannelsLast<const Element> x;
    const Real* weight;                    // packed by WinogradKernels::pack
    const Element* bias;                   // (out); null: zeros
    ChannelsLast<const Element> residual;  // of y's size; data null: none
    bool rectify;                          // y = max(0, x W + bias + residual)
    ChannelsLast<Element> y;               // written
};

/// One SIMD level's implementation.
template <typename Element>
struct WinogradKernels {
    using Real = typename Computed<Element>::Real;
    int64_t step;  // what channels must be multiples of
    /// weight (out, in, 3, 3), contiguous, to `packed`: 16 * in * out numbers, 64-byte aligned.
    void (*pack)(const Element* weight, int64_t in, int64_t out, Real* packed);
    int64_t panel;  // outputs that are multiplied together; the last ones may be fewer
    /// From one position to the next, of `tiles` tiles of that many channels; in numbers.
    int64_t (*stride)(int64_t tiles, int64_t channels);
    /// Tiles first .. first + tiles - 1, counted row by row, image by image, to numbers [position][tile][in].
    void (*read)(const WinogradConvolution<Element>&, int64_t first, int64_t tiles, Real* numbers,
                 int64_t stride);
    /// products (tiles, out) = numbers (tiles, in) * one position's weights, of some of the panels.
    void (*multiply)(const WinogradConvolution<Element>&, int64_t tiles, int64_t position,
                     int64_t first_panel, int64_t last_panel, const Real* numbers, Real* products);
    /// Products [position][tile][out] to the tiles' outputs.
    void (*write)(const WinogradConvolution<Element>&, int64_t first, int64_t tiles, const Real* products,
                  int64_t stride);
};

MAGNET_FAST_DECLARE_KERNELS(WinogradKernels, winograd_kernels)

}  // namespace magnet_fast
