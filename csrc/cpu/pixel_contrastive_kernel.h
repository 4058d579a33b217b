// The vectorised inner kernels of the pixel contrastive loss: rows of one image's features, and pairs of
// blocks of rows.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

/// Pixels of a block. A block of features is packed as columns, (channels, kPixelBlock), or as rows,
/// (kPixelBlock, row_floats). The pixels inside the mask and those outside fill blocks of their own, so that
/// all pairs of two blocks are on one side or all are not. Only a side's last block may hold fewer, with
/// zeros after them.
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

/// A pair of blocks: `rows` pixels of the first, `columns` of the second. Exponentials are those of
/// scale * z_i . z_j - shift when `shared`, where `shift` is a number that no scale * z_i . z_j of the image
/// passes; otherwise of scale * (z_i . z_j - most), with the greatest z_i . z_j of the row or column that is
/// summed. Per-pixel arrays begin at the block's first pixel and hold kPixelBlock numbers.
template <typename Real>
struct PixelPair {
    int64_t rows, columns, channels;
    const Real* column_block;  // the second block, packed as columns
    bool diagonal;             // both blocks are the same one: nothing is added to columns
    bool shared;
    Real scale, shift;
    Real* scratch;  // (kPixelBlock, kPixelBlock) and three rows more
};

/// Adds the exponentials' sums over j to row i, and those over i to column j. Unless `shared`, `most` is the
/// greatest so far, which the pair updates.
template <typename Real>
struct PixelSums : PixelPair<Real> {
    const Real* row_block;  // the first block, packed as columns
    Real *row_sum, *column_sum;
    Real *row_most, *column_most;  // used unless `shared`
};

/// Adds sum_j h_ij z_j to row i, and sum_i h_ij z_i to column j, where h_ij = f_i e_i + f_j e_j and e are the
/// exponentials against the shift of row i and of column j.
template <typename Real>
struct PixelGradients : PixelPair<Real> {
    /// Leave h_ii out: its part is along z_i, and when z_i has length 1 whatever its features are, changes
    /// nothing but rounding.
    bool without_itself;
    const Real *row_z, *column_z;            // both blocks, packed as rows
    const Real *row_factor, *column_factor;  // f
    const Real *row_most, *column_most;      // used unless `shared`
    Real *grad_rows, *grad_columns;          // (kPixelBlock, row_floats), added to
};

/// One SIMD level's implementation.
template <typename Element>
struct PixelContrastiveKernels {
    using Real = typename Computed<Element>::Real;
    /// From one packed row of `channels` numbers to the next.
    int64_t (*row_floats)(int64_t channels);
    /// Writes columns, of length 1 when normalised, and of each pixel its features' norm and z . z.
    void (*pack)(const PixelRows<Element>&, Real eps, Real* columns, Real* norm, Real* square);
    void (*to_rows)(const Real* columns, int64_t channels, Real* rows);
    void (*to_columns)(const Real* rows, int64_t channels, Real* columns);
    void (*sums)(const PixelSums<Real>&);
    void (*gradients)(const PixelGradients<Real>&);
    /// Takes scale * grad_z back through the normalisation and writes it, a row of `channels` for each pixel,
    /// at pixel order[i] of `grad`, which is contiguous. z and grad_z are packed as rows.
    void (*unpack)(const PixelRows<Element>&, Real eps, Real scale, const Real* z, const Real* norm,
                   const Real* grad_z, Element* grad);
};

MAGNET_FAST_DECLARE_KERNELS(PixelContrastiveKernels, pixel_contrastive_kernels)

}  // namespace magnet_fast
