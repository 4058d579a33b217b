// The vectorised inner kernels of the pixel contrastive loss: rows of one image's features, and pairs of
// blocks of rows.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

/// Pixels of a block. The pixels inside the mask and those outside fill blocks of their own, so that all
/// pairs of two blocks are on one side or all are not. Only a side's last block may hold fewer; its rows past
/// them are zeros.
constexpr int64_t kPixelBlock = 96;

/// Pixels order[0 .. count) of an image as they stand in the caller's tensor.
template <typename Element>
struct PixelRows {
    const Element* features;
    int64_t pixel_stride, channel_stride;
    const int64_t* order;
    int64_t count, channels;
    bool normalize;
};

/// A pair of blocks: `rows` pixels of the first, `columns` of the second. With s = scale * z_i . z_j, the
/// sums over j of exp(s - c) are added to row i, and those over i to column j. When `shared`, c is `shift`,
/// which no s of the image passes; otherwise c is the greatest s so far of that row or column, which the pair
/// updates. Per-pixel arrays begin at the block's first pixel and hold kPixelBlock numbers.
template <typename Real>
struct PixelPair {
    int64_t rows, columns, channels;
    const Real* z_rows;      // (rows, row_floats)
    const Real* z_columns;   // (columns, row_floats)
    const Real* transposed;  // of z_columns
    bool diagonal;           // both blocks are the same one: nothing is added to columns
    bool shared;
    Real scale, shift;
    Real* scratch;  // (kPixelBlock, kPixelBlock) and three rows more
};

template <typename Real>
struct PixelSums : PixelPair<Real> {
    Real *row_sum, *column_sum;
    Real *row_most, *column_most;  // used unless `shared`
};

/// Adds sum_j h_ij z_j to row i, and sum_i h_ij z_i to column j, where
/// h_ij = exp(s - shift) (f_i + f_j) when `shared`, else f_i exp(s - l_i) + f_j exp(s - l_j).
template <typename Real>
struct PixelGradients : PixelPair<Real> {
    /// Leave h_ii out: its part is along z_i, and when z_i has length 1 whatever its features are, changes
    /// nothing but rounding.
    bool without_itself;
    const Real *row_factor, *column_factor;  // f
    const Real *row_log, *column_log;        // l; used unless `shared`
    Real *grad_rows, *grad_columns;          // (kPixelBlock, row_floats), added to
};

/// One SIMD level's implementation.
template <typename Element>
struct PixelContrastiveKernels {
    using Real = typename Computed<Element>::Real;
    /// From one packed row of `channels` numbers to the next.
    int64_t (*row_floats)(int64_t channels);
    /// Writes rows z, of length 1 when normalised, and of each the features' norm and z . z.
    void (*pack)(const PixelRows<Element>&, Real eps, Real* z, Real* norm, Real* square);
    /// A block's columns: to (channels, kPixelBlock).
    void (*transpose)(const Real* z, int64_t channels, Real* to);
    void (*sums)(const PixelSums<Real>&);
    void (*gradients)(const PixelGradients<Real>&);
    /// Takes scale * grad_z back through the normalisation and writes it, a row of `channels` for each pixel,
    /// at pixel order[i] of `grad`, which is contiguous.
    void (*unpack)(const PixelRows<Element>&, Real eps, Real scale, const Real* z, const Real* norm,
                   const Real* grad_z, Element* grad);
};

MAGNET_FAST_DECLARE_KERNELS(PixelContrastiveKernels, pixel_contrastive_kernels)

}  // namespace magnet_fast
