// Index arithmetic of shifted-window attention, shared by every C++ implementation (CPU and CUDA).
//
// Three coordinate systems, per axis (rows and columns are treated alike):
//   source   0 .. extent-1   the feature map as the caller holds it
//   shifted  0 .. padded-1   the map after padding and cyclic shift, cut into windows of `window`
//   token    0 .. window-1   place inside one window
// Nothing here touches memory: roll, padding, partition, mask, reverse and crop are these functions. Int is
// int64_t on the CPU, and int32_t in CUDA kernels, whose launchers check that coordinates fit.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MAGNET_FAST_HOST_DEVICE static __host__ __device__ __forceinline__
#else
// `static` matters: translation units compiled for different instruction sets must never share an inline
// function.
#define MAGNET_FAST_HOST_DEVICE static inline __attribute__((unused))
#endif

namespace magnet_fast {

/// Extent rounded up to whole windows.
template <typename Int>
MAGNET_FAST_HOST_DEVICE Int padded_extent(Int extent, Int window) {
    return (extent + window - 1) / window * window;
}

/// Source coordinate of a shifted coordinate, or -1 for padding. pad_first: the map is padded at its end,
/// then rolled by -shift over the padded extent (MagNet, LAVT, transformers, torchvision). Otherwise it is
/// rolled over its own extent, then padded at its end (timm).
template <typename Int>
MAGNET_FAST_HOST_DEVICE Int source_coordinate(Int shifted, Int extent, Int padded, Int shift,
                                              bool pad_first) {
    if (pad_first) {
        const Int source = (shifted + shift) % padded;
        return source < extent ? source : -1;
    }
    return shifted < extent ? (shifted + shift) % extent : -1;
}

/// Region (0, 1 or 2) of a shifted coordinate: the map is cut at padded-window and at padded-shift. A query
/// sees only the keys whose regions along both axes equal its own. Without a shift there is one region.
template <typename Int>
MAGNET_FAST_HOST_DEVICE Int shift_region(Int shifted, Int padded, Int window, Int shift) {
    if (shift == 0) return 0;
    return (shifted >= padded - window) + (shifted >= padded - shift);
}

/// Number of a token's place in its window along the bias table: the table's row for a query and a key is
/// place(query) - place(key) + bias_origin, see bias_row.
template <typename Int>
MAGNET_FAST_HOST_DEVICE Int bias_place(Int y, Int x, Int window_w) {
    return y * (2 * window_w - 1) + x;
}

/// Row of the table for a query and a key at the same place.
template <typename Int>
MAGNET_FAST_HOST_DEVICE Int bias_origin(Int window_h, Int window_w) {
    return (window_h - 1) * (2 * window_w - 1) + window_w - 1;
}

/// Row of the relative-position-bias table, which has (2*window_h-1)*(2*window_w-1) rows, for a query at
/// (query_y, query_x) and a key at (key_y, key_x) of the same window.
template <typename Int>
MAGNET_FAST_HOST_DEVICE Int bias_row(Int query_y, Int query_x, Int key_y, Int key_x, Int window_h,
                                     Int window_w) {
    return bias_place(query_y, query_x, window_w) - bias_place(key_y, key_x, window_w) +
           bias_origin(window_h, window_w);
}

}  // namespace magnet_fast
