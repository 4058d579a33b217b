// Compiled once per SIMD level; see simd.h and pixel_contrastive_kernel.h.
//
// Nearly all of the work is the three products of a pair of blocks: similarities (rows x columns, depth
// channels), and H z and H^T z (depth columns and rows). Exponentials are taken in between, on a tile of
// similarities in the cache.
#include "cpu/pixel_contrastive_kernel.h"

#include "cpu/simd.h"
#include "cpu/simd_matrix.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

static_assert(kPixelBlock % kLanes == 0, "blocks are whole vectors wide");

static int64_t row_floats(int64_t channels) {
    // An odd number of vectors: rows at a distance of a power of two would fall on the same few cache lines.
    const int64_t wide = round_up(channels);
    return wide / kLanes % 2 ? wide : wide + kLanes;
}

static inline float square_root(float x) {
    return __builtin_sqrtf(x);
}
static inline double square_root(double x) {
    return __builtin_sqrt(x);
}

/// A block of columns from pixels whose channels are contiguous: four pixels at a time, transposed.
template <typename Element>
static void gather_rows(const PixelRows<Element>& a, Real* columns) {
    constexpr int64_t kWide = kLanes < 4 ? 4 : kLanes;
    for (int64_t p = 0; p < a.count; p += 4) {
        const Element* from[4];
        for (int64_t r = 0; r < 4; ++r)
            from[r] = a.features + a.order[p + r < a.count ? p + r : p] * a.pixel_stride;
        for (int64_t c = 0; c < a.channels; c += kWide) {
            const int64_t left = a.channels - c;
            Real lane[4][kWide];
            const Real* rows[4] = {lane[0], lane[1], lane[2], lane[3]};
            for (int64_t r = 0; r < 4; ++r)
                for (int64_t k = 0; k < kWide && k < left; k += kLanes)
                    store(lane[r] + k,
                          k + kLanes <= left ? load(from[r] + c + k) : load_part(from[r] + c + k, left - k));
            int64_t k = 0;
            for (; k + 4 <= kWide && k + 4 <= left; k += 4) {
                transpose4(rows, columns + (c + k) * kPixelBlock + p, kPixelBlock);
                for (const Real*& row : rows) row += 4;
            }
            for (int64_t e = k; e < kWide && e < left; ++e)
                for (int64_t r = 0; r < 4; ++r) columns[(c + e) * kPixelBlock + p + r] = lane[r][e];
        }
    }
}

/// The same from pixels that lie anyhow; fast where neighbours are contiguous, as in a map (C, H, W).
template <typename Element>
static void gather_columns(const PixelRows<Element>& a, Real* columns) {
    bool run[kPixelBlock / kLanes];  // whether a vector of pixels is contiguous
    for (int64_t p = 0; p < kPixelBlock; p += kLanes)
        run[p / kLanes] = a.pixel_stride == 1 && p + kLanes <= a.count &&
                          a.order[p + kLanes - 1] - a.order[p] == kLanes - 1;
    for (int64_t c = 0; c < a.channels; ++c, columns += kPixelBlock) {
        const Element* from = a.features + c * a.channel_stride;
        for (int64_t p = 0; p < a.count; p += kLanes) {
            if (run[p / kLanes]) {
                store(columns + p, load(from + a.order[p]));
                continue;
            }
            const int64_t end = p + kLanes < a.count ? p + kLanes : a.count;
            for (int64_t i = p; i < end; ++i) columns[i] = widen(from[a.order[i] * a.pixel_stride]);
        }
    }
}

template <typename Element>
static void pack(const PixelRows<Element>& a, Real eps, Real* columns, Real* norm, Real* square) {
    if (a.channel_stride == 1)
        gather_rows(a, columns);
    else
        gather_columns(a, columns);
    for (int64_t c = 0; c < a.channels; ++c)
        for (int64_t p = a.count; p < kPixelBlock; ++p) columns[c * kPixelBlock + p] = 0;
    for (int64_t p = 0; p < kPixelBlock; p += kLanes) {
        Vec sum = broadcast(0);
        for (int64_t c = 0; c < a.channels; ++c) {
            const Vec x = load(columns + c * kPixelBlock + p);
            sum = multiply_add(x, x, sum);
        }
        store(square + p, sum);
    }
    for (int64_t p = 0; p < kPixelBlock; ++p) norm[p] = square_root(square[p]);
    if (!a.normalize) return;
    for (int64_t p = 0; p < kPixelBlock; p += kLanes) {
        Real divisor[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) divisor[i] = norm[p + i] < eps ? eps : norm[p + i];
        Vec sum = broadcast(0);
        for (int64_t c = 0; c < a.channels; ++c) {
            const Vec unit = load(columns + c * kPixelBlock + p) / load(divisor);
            store(columns + c * kPixelBlock + p, unit);
            sum = multiply_add(unit, unit, sum);
        }
        store(square + p, sum);
    }
}

static void to_columns(const Real* z, int64_t channels, Real* columns) {
    const int64_t wide = row_floats(channels);
    for (int64_t p = 0; p < kPixelBlock; p += 4, z += 4 * wide) {
        const Real* rows[4] = {z, z + wide, z + 2 * wide, z + 3 * wide};
        int64_t c = 0;
        for (; c + 4 <= channels; c += 4) {
            if (c % 16 == 0)  // the rows of the next four pixels
                for (const Real* row : rows) __builtin_prefetch(row + 4 * wide);
            transpose4(rows, columns + c * kPixelBlock + p, kPixelBlock);
            for (const Real*& row : rows) row += 4;
        }
        for (; c < channels; ++c)
            for (int64_t r = 0; r < 4; ++r) columns[c * kPixelBlock + p + r] = z[r * wide + c];
    }
}

static void to_rows(const Real* columns, int64_t channels, Real* z) {
    const int64_t wide = row_floats(channels);
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4) {
        const Real* rows[4];
        for (int64_t k = 0; k < 4; ++k) rows[k] = columns + (c + k) * kPixelBlock;
        for (int64_t p = 0; p < kPixelBlock; p += 4) {
            transpose4(rows, z + p * wide + c, wide);
            for (const Real*& row : rows) row += 4;
        }
    }
    for (int64_t p = 0; p < kPixelBlock; ++p)
        for (int64_t k = c; k < wide; ++k) z[p * wide + k] = k < channels ? columns[k * kPixelBlock + p] : 0;
}

/// z_i . z_j of a pair of blocks, to its scratch; returns the number of columns computed. Channel c of row i
/// is rows[i * row + c * channel].
static int64_t similarities(const PixelPair<Real>& a, const Real* rows, int64_t row, int64_t channel) {
    const int64_t columns = round_up(a.columns);
    multiply(a.rows, columns, a.channels, rows, row, channel, a.column_block, kPixelBlock, nullptr, 0,
             a.scratch, kPixelBlock);
    return columns;
}

/// Sums against one shift: the exponentials of rows and columns are the same numbers.
static void sums_shared(const PixelSums<Real>& a) {
    const int64_t columns = similarities(a, a.row_block, 1, kPixelBlock);
    Real* valid = a.scratch + kPixelBlock * kPixelBlock;  // 1, and 0 past the last column
    Real* column_sum = valid + kPixelBlock;
    for (int64_t j = 0; j < columns; ++j) valid[j] = j < a.columns ? 1 : 0;
    for (int64_t j = 0; j < columns; j += kLanes) store(column_sum + j, broadcast(0));
    const Vec scale = broadcast(a.scale), shift = broadcast(-a.shift);
    for (int64_t i = 0; i < a.rows; ++i) {
        const Real* s = a.scratch + i * kPixelBlock;
        Vec sum = broadcast(0);
        for (int64_t j = 0; j < columns; j += kLanes) {
            const Vec e = exponential(multiply_add(load(s + j), scale, shift));
            sum = multiply_add(e, load(valid + j), sum);
            store(column_sum + j, load(column_sum + j) + e);
        }
        a.row_sum[i] += reduce_add(sum);
    }
    if (a.diagonal) return;
    for (int64_t j = 0; j < columns; j += kLanes)
        store(a.column_sum + j, load(a.column_sum + j) + load(column_sum + j));
}

/// Sums against the greatest similarity so far of every row and every column. It is subtracted before
/// scaling, so that the difference is exact where it matters, however great both are.
static void sums_general(const PixelSums<Real>& a) {
    const int64_t columns = similarities(a, a.row_block, 1, kPixelBlock);
    Real* hidden = a.scratch + kPixelBlock * kPixelBlock;  // 0, and -infinity past the last column
    Real *most = hidden + kPixelBlock, *total = most + kPixelBlock;
    for (int64_t j = 0; j < columns; ++j) hidden[j] = j < a.columns ? 0 : -__builtin_inff();
    for (int64_t j = 0; j < columns; j += kLanes) store(most + j, load(a.column_most + j));
    const Vec scale = broadcast(a.scale);
    for (int64_t i = 0; i < a.rows; ++i) {
        const Real* s = a.scratch + i * kPixelBlock;
        Vec top = broadcast(a.row_most[i]), sum = broadcast(0);
        for (int64_t j = 0; j < columns; j += kLanes) {
            store(most + j, maximum(load(most + j), load(s + j)));
            top = maximum(top, load(s + j) + load(hidden + j));
        }
        const Real highest = reduce_max(top);
        for (int64_t j = 0; j < columns; j += kLanes)
            sum = sum + exponential((load(s + j) + load(hidden + j) - broadcast(highest)) * scale);
        const Real before = reduce_max(exponential(broadcast((a.row_most[i] - highest) * a.scale)));
        a.row_sum[i] = a.row_sum[i] * before + reduce_add(sum);
        a.row_most[i] = highest;
    }
    if (a.diagonal) return;
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec before = exponential((load(a.column_most + j) - load(most + j)) * scale);
        store(total + j, load(a.column_sum + j) * before);
        store(a.column_most + j, load(most + j));
    }
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < columns; j += kLanes) {
            const Vec e = exponential((load(a.scratch + i * kPixelBlock + j) - load(most + j)) * scale);
            store(total + j, load(total + j) + e);
        }
    for (int64_t j = 0; j < columns; j += kLanes) store(a.column_sum + j, load(total + j));
}

static void sums(const PixelSums<Real>& a) {
    if (a.shared)
        sums_shared(a);
    else
        sums_general(a);
}

/// Similarities to h, in place. What stands past the last column is not read.
template <bool Shared>
static void weigh(const PixelGradients<Real>& a, int64_t columns) {
    const Vec scale = broadcast(a.scale), shift = broadcast(-a.shift);
    for (int64_t i = 0; i < a.rows; ++i) {
        Real* s = a.scratch + i * kPixelBlock;
        const Vec factor = broadcast(a.row_factor[i]), most = broadcast(Shared ? 0 : a.row_most[i]);
        for (int64_t j = 0; j < columns; j += kLanes) {
            if constexpr (Shared) {
                const Vec e = exponential(multiply_add(load(s + j), scale, shift));
                store(s + j, e * (factor + load(a.column_factor + j)));
            } else {
                const Vec own = exponential((load(s + j) - most) * scale);
                const Vec other = exponential((load(s + j) - load(a.column_most + j)) * scale);
                store(s + j, multiply_add(own, factor, other * load(a.column_factor + j)));
            }
        }
    }
}

static void gradients(const PixelGradients<Real>& a) {
    const int64_t wide = row_floats(a.channels), used = round_up(a.channels);
    const int64_t columns = similarities(a, a.row_z, wide, 1);
    if (a.shared)
        weigh<true>(a, columns);
    else
        weigh<false>(a, columns);
    if (a.diagonal && a.without_itself)
        for (int64_t i = 0; i < a.rows; ++i) a.scratch[i * (kPixelBlock + 1)] = 0;
    multiply(a.rows, used, a.columns, a.scratch, kPixelBlock, 1, a.column_z, wide, a.grad_rows, wide,
             a.grad_rows, wide);
    if (a.diagonal) return;
    multiply(a.columns, used, a.rows, a.scratch, 1, kPixelBlock, a.row_z, wide, a.grad_columns, wide,
             a.grad_columns, wide);
}

template <typename Element>
static void unpack(const PixelRows<Element>& a, Real eps, Real scale, const Real* z, const Real* norm,
                   const Real* grad_z, Element* grad) {
    const int64_t wide = row_floats(a.channels);
    for (int64_t i = 0; i < a.count; ++i, z += wide, grad_z += wide) {
        Element* to = grad + a.order[i] * a.channels;
        Vec along = broadcast(0);
        Real factor = scale;
        if (a.normalize) {
            // Below eps the divisor does not change with the features.
            const bool long_enough = norm[i] >= eps;
            for (int64_t c = 0; long_enough && c < a.channels; c += kLanes)
                along = multiply_add(load(z + c), load(grad_z + c), along);
            factor = scale / (long_enough ? norm[i] : eps);
        }
        const Vec radial = broadcast(-reduce_add(along)), times = broadcast(factor);
        int64_t c = 0;
        for (; c + kLanes <= a.channels; c += kLanes)
            store(to + c, multiply_add(radial, load(z + c), load(grad_z + c)) * times);
        if (c < a.channels)
            store_part(to + c, multiply_add(radial, load(z + c), load(grad_z + c)) * times, a.channels - c);
    }
}

template <typename Element>
const PixelContrastiveKernels<Element>& pixel_contrastive_kernels() {
    static const PixelContrastiveKernels<Element> kernels = {
        row_floats, pack<Element>, to_rows, to_columns, sums, gradients, unpack<Element>,
    };
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(PixelContrastiveKernels, pixel_contrastive_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
