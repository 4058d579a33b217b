// Index arithmetic of shifted-window attention, shared by every C++ implementation (CPU and, later, CUDA).
//
// Three coordinate systems, per axis (rows and columns are treated alike):
//   source   0 .. extent-1   the feature map as the caller holds it
//   shifted  0 .. padded-1   the map after padding and cyclic shift, cut into windows of `window`
//   token    0 .. window-1   place inside one window
// Nothing here touches memory: roll, padding, partition, mask, reverse and crop are these functions.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MAGNET_FAST_INLINE static __host__ __device__ __forceinline__
#else
// `static` matters: translation units compiled for different instruction sets must never share an inline
// function.
#define MAGNET_FAST_INLINE static inline __attribute__((unused))
#endif

namespace magnet_fast {

/// Extent rounded up to whole windows.
MAGNET_FAST_INLINE int64_t padded_extent(int64_t extent, int64_t window) {
    return (extent + window - 1) / window * window;
}

/// Source coordinate of a shifted coordinate, or -1 for padding. pad_first: the map is padded at its end,
/// then rolled by -shift over the padded extent (MagNet, LAVT, transformers, torchvision). Otherwise it is
/// rolled over its own extent, then padded at its end (timm).
MAGNET_FAST_INLINE int64_t source_coordinate(int64_t shifted, int64_t extent, int64_t padded, int64_t shift,
                                             bool pad_first) {
    if (pad_first) {
        const int64_t source = (shifted + shift) % padded;
        return source < extent ? source : -1;
    }
    return shifted < extent ? (shifted + shift) % extent : -1;
}

/// Region (0, 1 or 2) of a shifted coordinate: the map is cut at padded-window and at padded-shift. A query
/// sees only the keys whose regions along both axes equal its own. Without a shift there is one region.
MAGNET_FAST_INLINE int64_t shift_region(int64_t shifted, int64_t padded, int64_t window, int64_t shift) {
    if (shift == 0) return 0;
    return (shifted >= padded - window) + (shifted >= padded - shift);
}

/// Row of the relative-position-bias table, which has (2*window_h-1)*(2*window_w-1) rows, for a query at
/// (query_y, query_x) and a key at (key_y, key_x) of the same window.
MAGNET_FAST_INLINE int64_t bias_row(int64_t query_y, int64_t query_x, int64_t key_y, int64_t key_x,
                                    int64_t window_h, int64_t window_w) {
    return (query_y - key_y + window_h - 1) * (2 * window_w - 1) + (query_x - key_x + window_w - 1);
}

}  // namespace magnet_fast
