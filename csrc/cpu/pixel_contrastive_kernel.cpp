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

/// Copies pixels to rows, as numbers of type Real.
template <typename Element>
static void gather(const PixelRows<Element>& a, int64_t wide, Real* z) {
    if (a.channel_stride == 1) {
        for (int64_t i = 0; i < a.count; ++i) {
            const Element* from = a.features + a.order[i] * a.pixel_stride;
            int64_t c = 0;
            for (; c + kLanes <= a.channels; c += kLanes) store(z + i * wide + c, load(from + c));
            if (c < a.channels) store(z + i * wide + c, load_part(from + c, a.channels - c));
        }
        return;
    }
    // Channels lie apart, as in a map (C, H, W): some pixels of four channels at a time, transposed.
    constexpr int64_t kPixels = 16;
    for (int64_t i = 0; i < a.count; i += kPixels) {
        const int64_t left = a.count - i, count = left < kPixels ? left : kPixels;
        const int64_t* order = a.order + i;
        const bool run =
            count == kPixels && a.pixel_stride == 1 && order[kPixels - 1] - order[0] == kPixels - 1;
        for (int64_t c = 0; c < a.channels; c += 4) {
            Real lane[4][kPixels] = {};
            for (int64_t k = 0; k < 4 && c + k < a.channels; ++k) {
                const Element* from = a.features + (c + k) * a.channel_stride;
                if (run)
                    for (int64_t p = 0; p < kPixels; p += kLanes)
                        store(lane[k] + p, load(from + order[0] + p));
                else
                    for (int64_t p = 0; p < count; ++p) lane[k][p] = widen(from[order[p] * a.pixel_stride]);
            }
            Real* to = z + i * wide + c;
            if (count == kPixels && c + 4 <= wide) {
                for (int64_t p = 0; p < kPixels; p += 4) {
                    // A block of the transpose: pixel p + r gets channels c .. c + 3.
                    const Real* const rows[4] = {lane[0] + p, lane[1] + p, lane[2] + p, lane[3] + p};
                    transpose4(rows, to + p * wide, wide);
                }
            } else {
                for (int64_t p = 0; p < count; ++p)
                    for (int64_t k = 0; k < 4 && c + k < a.channels; ++k) to[p * wide + k] = lane[k][p];
            }
        }
    }
}

template <typename Element>
static void pack(const PixelRows<Element>& a, Real eps, Real* z, Real* norm, Real* square) {
    const int64_t wide = row_floats(a.channels), used = round_up(a.channels);
    for (int64_t i = 0; i < a.count; ++i) store(z + i * wide + used - kLanes, broadcast(0));
    gather(a, wide, z);
    for (int64_t i = 0; i < a.count; ++i) {
        Real* row = z + i * wide;
        for (int64_t c = used; c < wide; c += kLanes) store(row + c, broadcast(0));
        Vec sum = broadcast(0);
        for (int64_t c = 0; c < used; c += kLanes) sum = multiply_add(load(row + c), load(row + c), sum);
        norm[i] = square_root(reduce_add(sum));
        if (a.normalize) {
            const Vec divisor = broadcast(norm[i] < eps ? eps : norm[i]);
            sum = broadcast(0);
            for (int64_t c = 0; c < used; c += kLanes) {
                const Vec unit = load(row + c) / divisor;
                store(row + c, unit);
                sum = multiply_add(unit, unit, sum);
            }
        }
        square[i] = reduce_add(sum);
    }
}

static void transpose(const Real* z, int64_t channels, Real* to) {
    const int64_t wide = row_floats(channels);
    for (int64_t p = 0; p < kPixelBlock; p += 4) {
        const Real* rows[4] = {z + p * wide, z + (p + 1) * wide, z + (p + 2) * wide, z + (p + 3) * wide};
        int64_t c = 0;
        for (; c + 4 <= channels; c += 4) {
            transpose4(rows, to + c * kPixelBlock + p, kPixelBlock);
            for (const Real*& row : rows) row += 4;
        }
        for (int64_t k = 0; c < channels; ++c, ++k)
            for (int64_t r = 0; r < 4; ++r) to[c * kPixelBlock + p + r] = rows[r][k];
    }
}

/// z_i . z_j of a pair of blocks, to its scratch; returns the number of columns computed.
static int64_t similarities(const PixelPair<Real>& a) {
    const int64_t wide = row_floats(a.channels), columns = round_up(a.columns);
    multiply(a.rows, columns, a.channels, a.z_rows, wide, 1, a.transposed, kPixelBlock, nullptr, 0, a.scratch,
             kPixelBlock);
    return columns;
}

/// Sums against one shift: the exponentials of rows and columns are the same numbers.
static void sums_shared(const PixelSums<Real>& a) {
    const int64_t columns = similarities(a);
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

/// Sums against the greatest similarity so far of every row and every column.
static void sums_general(const PixelSums<Real>& a) {
    const int64_t columns = similarities(a);
    Real* hidden = a.scratch + kPixelBlock * kPixelBlock;  // 0, and -infinity past the last column
    Real *most = hidden + kPixelBlock, *total = most + kPixelBlock;
    for (int64_t j = 0; j < columns; ++j) hidden[j] = j < a.columns ? 0 : -__builtin_inff();
    for (int64_t j = 0; j < columns; j += kLanes) store(most + j, load(a.column_most + j));
    const Vec scale = broadcast(a.scale);
    for (int64_t i = 0; i < a.rows; ++i) {
        Real* s = a.scratch + i * kPixelBlock;
        Vec top = broadcast(a.row_most[i]), sum = broadcast(0);
        for (int64_t j = 0; j < columns; j += kLanes) {
            const Vec value = load(s + j) * scale;
            store(s + j, value);
            store(most + j, maximum(load(most + j), value));
            top = maximum(top, value + load(hidden + j));
        }
        const Real highest = reduce_max(top);
        for (int64_t j = 0; j < columns; j += kLanes)
            sum = sum + exponential(load(s + j) + load(hidden + j) - broadcast(highest));
        const Real before = reduce_max(exponential(broadcast(a.row_most[i] - highest)));
        a.row_sum[i] = a.row_sum[i] * before + reduce_add(sum);
        a.row_most[i] = highest;
    }
    if (a.diagonal) return;
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec before = exponential(load(a.column_most + j) - load(most + j));
        store(total + j, load(a.column_sum + j) * before);
        store(a.column_most + j, load(most + j));
    }
    for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = 0; j < columns; j += kLanes) {
            const Vec e = exponential(load(a.scratch + i * kPixelBlock + j) - load(most + j));
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
    const Vec scale = broadcast(a.scale);
    for (int64_t i = 0; i < a.rows; ++i) {
        Real* s = a.scratch + i * kPixelBlock;
        const Vec factor = broadcast(a.row_factor[i]), log = broadcast(Shared ? a.shift : a.row_log[i]);
        for (int64_t j = 0; j < columns; j += kLanes) {
            const Vec e = exponential(multiply_add(load(s + j), scale, -log));
            if constexpr (Shared) {
                store(s + j, e * (factor + load(a.column_factor + j)));
            } else {
                const Vec other = exponential(multiply_add(load(s + j), scale, -load(a.column_log + j)));
                store(s + j, multiply_add(e, factor, other * load(a.column_factor + j)));
            }
        }
    }
}

static void gradients(const PixelGradients<Real>& a) {
    const int64_t wide = row_floats(a.channels), used = round_up(a.channels);
    const int64_t columns = similarities(a);
    if (a.shared)
        weigh<true>(a, columns);
    else
        weigh<false>(a, columns);
    if (a.diagonal && a.without_itself)
        for (int64_t i = 0; i < a.rows; ++i) a.scratch[i * (kPixelBlock + 1)] = 0;
    multiply(a.rows, used, a.columns, a.scratch, kPixelBlock, 1, a.z_columns, wide, a.grad_rows, wide,
             a.grad_rows, wide);
    if (a.diagonal) return;
    multiply(a.columns, used, a.rows, a.scratch, 1, kPixelBlock, a.z_rows, wide, a.grad_columns, wide,
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
        row_floats, pack<Element>, transpose, sums, gradients, unpack<Element>,
    };
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(PixelContrastiveKernels, pixel_contrastive_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
