// The vectorised inner kernels of relative attention: one head of one window.
//
// Keys lie on a grid of window_h rows, each of them padded to whole vectors: a query's bias is then one
// number a row of keys plus a run of numbers over the columns, and neither is ever looked up by an index.
// Keys stream by in blocks of such rows; of the similarity, one block of queries by one block of keys is
// held.
//
// Biases are in units of the scale: the logits are scale * (q k + bias), so that q is taken as it is.
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

/// One head of one window: where its tokens lie. A token is its q; k and v lie `channels` and 2 * channels
/// on.
template <typename Element>
struct RelativeWindow {
    const Element* tokens;              // the first token's q channels of the head
    int64_t row_stride, column_stride;  // elements between neighbours
    int64_t rows, columns;              // tokens of the map: the queries
    int64_t window_h, window_w;         // keys: beyond rows and columns stand padded tokens
    const Element* pad;                 // a padded token
    int64_t channels;
    int64_t head_dim;  // d

    bool padded() const { return rows < window_h || columns < window_w; }
    bool within(int64_t y, int64_t x) const { return y < rows && x < columns; }
    const Element* token(int64_t y, int64_t x) const {
        return within(y, x) ? tokens + y * row_stride + x * column_stride : pad;
    }
};

/// A table of positions along one axis of S, as the kernels read it: its rows in reversed order, row t for a
/// key that lies t - (S - 1) after the query, divided by the scale. Zeros fill up whole vectors.
template <typename Real>
struct RelativeTable {
    const Real* rows;        // (2S - 1, round_up(d))
    const Real* transposed;  // (d, round_up(2S - 1))
};

template <typename Element>
struct RelativeForward {
    using Real = typename Computed<Element>::Real;
    RelativeWindow<Element> window;
    RelativeTable<Real> height, width;
    Real scale;           // above 0
    int64_t first, last;  // queries, row by row of the tokens
    Element* out;         // the first token's output channels of the head
    int64_t out_row_stride, out_column_stride;
    void* scratch;  // forward_bytes(...) bytes, 64-byte aligned
};

template <typename Element>
struct RelativeBackward {
    using Real = typename Computed<Element>::Real;
    RelativeWindow<Element> window;
    RelativeTable<Real> height, width;
    Real scale;
    const Element* grad_out;
    int64_t grad_out_row_stride, grad_out_column_stride;
    Element* grad_tokens;  // like window.tokens, written; null: not wanted
    int64_t grad_row_stride, grad_column_stride;
    Real* grad_height;  // (2S - 1, round_up(d)), rows reversed, of the undivided table; added to; null: not
                        // wanted
    Real* grad_width;   // null with grad_height
    Real* grad_pad;     // (2, d) of the padded tokens' k and v, added to; null: not wanted
    void* scratch;      // backward_bytes(...) bytes
};

/// One SIMD level's implementation.
template <typename Element>
struct RelativeKernels {
    int64_t lanes;
    int64_t (*forward_bytes)(const RelativeWindow<Element>&);
    int64_t (*backward_bytes)(const RelativeWindow<Element>&);
    void (*forward)(const RelativeForward<Element>&);
    void (*backward)(const RelativeBackward<Element>&);
};

MAGNET_FAST_DECLARE_KERNELS(RelativeKernels, relative_kernels)

}  // namespace magnet_fast
