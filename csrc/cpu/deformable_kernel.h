// The vectorised inner kernels of multi-scale deformable attention: one head of one image, a range of
// queries.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

/// Points are treated in blocks of whole queries, about this many points at a time.
constexpr int64_t kDeformableBlock = 128;

/// A row number of a packed slice: as wide as the numbers, so that both fill the same vectors.
template <typename Real>
struct DeformableIndex {
    using Type = int32_t;
};
template <>
struct DeformableIndex<double> {
    using Type = int64_t;
};

/// One map. In a packed slice, one head of one image of `value`, a position is a row of channels, and every
/// map has a border of zeros: two lines above it, one below, and one cell before each line, which also ends
/// the line before. The four corners around any point are then a row, the next one, and the two a line
/// further; a point outside the map reads the two lines above it.
struct DeformableLevel {
    int64_t height, width;
    int64_t position;  // the map's first one in `value`
    int64_t row;       // of the map's first position in a packed slice
    int64_t line;      // rows from one position to the one below it

    static int64_t line_of(int64_t width) { return width + 1; }
    static int64_t rows_of(int64_t height, int64_t width) { return (height + 3) * line_of(width) + 1; }
    int64_t first_row() const { return row - 2 * line - 1; }
    int64_t end_row() const { return first_row() + rows_of(height, width); }
};

/// The map that each point of a block reads, spread out so that point arithmetic runs in vectors: entry i
/// belongs to the i-th point of a block. Fifteen entries more follow them, so that whole vectors can be read.
/// Sides are at most 2^24, rows of a packed slice fewer than 2^31.
template <typename Real>
struct DeformableMaps {
    using Index = typename DeformableIndex<Real>::Type;
    const Real* width;
    const Real* height;
    const Index* row;   // DeformableLevel::row
    const Index* line;  // DeformableLevel::line
};

/// Points as the two Linears in front of the operator give them: softmax and locations are made here. `wide`:
/// offsets and logits are Real, else Element. Pointers are the first query's.
template <typename Element>
struct DeformableLogits {
    using Real = typename Computed<Element>::Real;
    const void* offsets;  // (points of this call, 2), in pixels
    const void* logits;   // (all_points)
    bool wide;
    int64_t offsets_row, logits_row;  // from one query to the next
    int64_t all_points, first_point;  // all levels' points of a query, and the first one of this call
    const Real* reference;            // (coordinates): (x, y) or (x, y, width, height)
    int64_t coordinates, reference_row, reference_level;
};

/// Some queries of one head of one image. `levels` and `points` count the maps of this call, all or some
/// consecutive ones, and the points that a query has on each. Distances are in elements.
template <typename Element>
struct DeformableForward {
    using Real = typename Computed<Element>::Real;
    int64_t queries, levels, points, head_dim;
    int64_t rows;           // of a packed slice
    int64_t block_queries;  // queries of a block; `maps` and `scratch` hold block_queries * levels * points
    const DeformableLevel* level;
    DeformableMaps<Real> maps;
    const Real* value;                        // packed
    const Real* locations;                    // (levels, points, 2) of the first query
    const Element* weights;                   // (levels, points) of the first query
    const DeformableLogits<Element>* logits;  // instead of locations and weights, or null
    int64_t
        query_points;  // from one query's points to the next one's, in points; gradients are laid out alike
    Element* out;      // (head_dim) of the first query, written
    int64_t out_row;   // from one query to the next; grad_out is laid out alike
    Real* scratch;     // scratch_reals(points of a block, points of a query on all levels)

    int64_t query_count() const { return levels * points; }
};

/// What is null is not wanted; with no gradient of points `value` is not used.
template <typename Element>
struct DeformableBackward : DeformableForward<Element> {
    using Real = typename Computed<Element>::Real;
    const Element* grad_out;  // (head_dim) of the first query; `out` is not used
    Real* grad_value;         // packed, added to
    Real* grad_locations;     // like locations, written
    Element* grad_weights;    // like weights, written
    // With `logits`; of the types that it says.
    void* grad_offsets;    // (levels, points, 2), written
    void* grad_logits;     // (levels, points), written; wants all levels in one call
    Real* grad_reference;  // (levels, coordinates) of the first query, this head's part, written
    int64_t grad_reference_row;

    bool wants_points() const {
        return grad_locations || grad_weights || grad_offsets || grad_logits || grad_reference;
    }
};

/// One SIMD level's implementation. How wide a row of a packed slice is, is this level's own business; every
/// access to it is one of these functions.
template <typename Element>
struct DeformableKernels {
    using Real = typename Computed<Element>::Real;
    int64_t (*scratch_reals)(int64_t block_points, int64_t all_points);
    int64_t (*packed_reals)(int64_t rows, int64_t head_dim);
    /// For forward and for backward, whose rows may differ. value_row: from one position to the next.
    using Pack = void (*)(const Element* value, int64_t value_row, const DeformableLevel* level,
                          int64_t levels, int64_t rows, int64_t head_dim, Real* packed);
    Pack pack_forward, pack_backward;
    /// Sets rows [begin, end) to zeros.
    void (*clear)(Real* packed, int64_t rows, int64_t head_dim, int64_t begin, int64_t end);
    void (*unpack)(const Real* packed, const DeformableLevel* level, int64_t levels, int64_t rows,
                   int64_t head_dim, Element* value, int64_t value_row);
    void (*forward)(const DeformableForward<Element>&);
    void (*backward)(const DeformableBackward<Element>&);
};

MAGNET_FAST_DECLARE_KERNELS(DeformableKernels, deformable_kernels)

}  // namespace magnet_fast
