// The three products of cross-modal attention between packed words and rows of an image tensor, and the
// softmax over words; compiled once per SIMD level like simd.h. Weights and scores are words x pixels.
#pragma once

#include "cpu/cross_modal_pairs.h"
#include "cpu/simd_transpose.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Pieces of one thread's scratch.
struct Tiles {
    Real* panel;   // transposed image rows, kPanelDepth x kPanelPixels
    Real* rows;    // image rows in another form, or output rows before they are narrowed
    Real* first;   // two tiles of words x row
    Real* second;  //
    Real* pairs;   // weights in another form, words x row
    Real* words;   // kWordForms packed words in other forms
    int64_t row;
    int64_t pixels;  // of a tile at most

    Tiles(Real* scratch, int64_t count, const CrossModalWidths& widths)
        : form_(count * packed_row(widths.widest())) {
        pixels = tile_pixels(count, widths.widest());
        panel = scratch;
        rows = panel + kPanelDepth * kPanelPixels;
        first = rows + kTilePixels * kPanelPixels;
        row = pixels + 16;
        second = first + count * row;
        pairs = second + count * row;
        words = pairs + count * row;
    }

    Real* form(int64_t i) const { return words + i * form_; }

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
    Pair* weight_pairs() const { return reinterpret_cast<Pair*>(pairs); }
#endif

  private:
    int64_t form_;
};

static inline int64_t smaller(int64_t a, int64_t b) {
    return a < b ? a : b;
}

template <typename A, typename B>
struct Same {
    static constexpr bool value = false;
};
template <typename A>
struct Same<A, A> {
    static constexpr bool value = true;
};

/// Whether rows of this width can be read and written by whole vectors where they are.
template <typename Element>
static inline bool in_place(int64_t width) {
    return Same<Element, Real>::value && width % kLanes == 0;
}

/// Pixels of the next tile or panel when `left` remain: pieces of nearly equal size, multiples of 16.
static inline int64_t even_piece(int64_t left, int64_t most) {
    const int64_t pieces = (left + most - 1) / most;
    const int64_t piece = ((left + pieces - 1) / pieces + 15) / 16 * 16;
    return smaller(left, piece);
}

/// A tile of the run, and the one that follows.
struct Tile {
    int64_t first, count, next, next_count;

    Tile(int64_t p, int64_t pixels, int64_t most) : first(p), count(even_piece(pixels - p, most)) {
        next = p + count;
        next_count = next < pixels ? even_piece(pixels - next, most) : 0;
    }
};

/// to (width x to_row) = the first `pixels` rows transposed, with zeros up to a multiple of kLanes pixels.
template <typename Element>
static void transpose_rows(Rows<const Element> from, int64_t pixels, int64_t width, Real* to,
                           int64_t to_row) {
    for (int64_t p = 0; p < pixels; p += kLanes) {
        const int64_t here = smaller(kLanes, pixels - p);
        for (int64_t c = 0; c < width; c += kLanes) {
            const int64_t channels = smaller(kLanes, width - c);
            const Element* at = from.data + p * from.stride + c;
            Vec v[kLanes];
            if (here == kLanes && channels == kLanes) {
                for (int64_t i = 0; i < kLanes; ++i) v[i] = load(at + i * from.stride);
            } else if (channels == kLanes) {
                for (int64_t i = 0; i < kLanes; ++i)
                    v[i] = i < here ? load(at + i * from.stride) : broadcast(0);
            } else {
                for (int64_t i = 0; i < kLanes; ++i)
                    v[i] = i < here ? load_part(at + i * from.stride, channels) : broadcast(0);
            }
            transpose(v);
            if (channels == kLanes) {
                for (int64_t i = 0; i < kLanes; ++i) store(to + (c + i) * to_row + p, v[i]);
            } else {
                for (int64_t i = 0; i < channels; ++i) store(to + (c + i) * to_row + p, v[i]);
            }
        }
    }
}

/// scores (words x pixels, score_row apart) = scale * words * image rows transposed; pixels from `pixels` to
/// the next multiple of kLanes get 0. `words` are as words_for_scores made them. This and the two below fetch
/// what is read or written after them.
template <typename Element>
static void score_pixels(int64_t count, int64_t width, const void* words, Rows<const Element> image,
                         int64_t pixels, Real scale, const Tiles& tiles, Real* scores, int64_t score_row,
                         Ahead ahead) {
#if defined(MAGNET_FAST_SIMD_AVX512)
    if (prefers_dots(width)) {
        const auto* packed = static_cast<const typename ChannelDot<Element>::Word*>(words);
        int64_t row = packed_row(width);
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
        if (kPairs<Element>) row = dot_row(width);
#endif
        dot_scores(count, width, packed, row, image, pixels, scale, scores, score_row, ahead);
        return;
    }
#endif
    const Real* packed = static_cast<const Real*>(words);
    ahead.spread((pixels + kPanelPixels - 1) / kPanelPixels * product_steps(count, 3, width));
    for (int64_t p = 0, here = 0; p < pixels; p += here) {
        here = even_piece(pixels - p, kPanelPixels);
        const int64_t columns = round_up(here);
        for (int64_t c = 0; c < width; c += kPanelDepth) {
            const int64_t depth = smaller(kPanelDepth, width - c);
            const Rows<const Element> part{image.data + p * image.stride + c, image.stride};
            transpose_rows(part, here, depth, tiles.panel, columns);
            multiply(ahead, count, columns, depth, packed + c, packed_row(width), 1, tiles.panel, columns,
                     c ? scores + p : nullptr, score_row, scores + p, score_row);
        }
        for (int64_t t = 0; t < count; ++t)
            for (int64_t i = 0; i < columns; i += kLanes) {
                Real* at = scores + t * score_row + p + i;
                store(at, load(at) * broadcast(scale));
            }
    }
}

/// to (words x packed_row(width)) = or, with `add`, += weights (words x pixels) * image rows.
template <typename Element>
static void sum_pixels(int64_t words, int64_t pixels, const Real* weights, int64_t weight_row,
                       Rows<const Element> image, int64_t width, const Tiles& tiles, bool add, Real* to,
                       Ahead ahead) {
    const int64_t to_row = packed_row(width);
    ahead.spread((width + kPanelPixels - 1) / kPanelPixels * product_steps(words, 3, pixels));
    if constexpr (Same<Element, Real>::value) {
        if (in_place<Element>(width)) {
            multiply(ahead, words, width, pixels, weights, weight_row, 1, image.data, image.stride,
                     add ? to : nullptr, to_row, to, to_row);
            return;
        }
    }
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
    if constexpr (kPairs<Element>)
        pair_columns(words, pixels, weights, weight_row, tiles.weight_pairs(), tiles.row / 2);
#endif
    for (int64_t c = 0; c < width; c += kPanelPixels) {
        const int64_t channels = smaller(kPanelPixels, width - c), columns = round_up(channels);
        const Rows<const Element> part{image.data + c, image.stride};
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
        if constexpr (kPairs<Element>) {
            Pair* rows = reinterpret_cast<Pair*>(tiles.rows);
            pair_image_rows(part, pixels, channels, rows, columns);
            multiply(ahead, words, columns, (pixels + 1) / 2, tiles.weight_pairs(), tiles.row / 2, 1, rows,
                     columns, add ? to + c : nullptr, to_row, to + c, to_row);
            continue;
        }
#endif
        for (int64_t p = 0; p < pixels; ++p) {
            const Element* at = part.from(p).data;
            Real* wide = tiles.rows + p * columns;
            int64_t i = 0;
            for (; i + kLanes <= channels; i += kLanes) store(wide + i, load(at + i));
            if (i < channels) store(wide + i, load_part(at + i, channels - i));
        }
        multiply(ahead, words, columns, pixels, weights, weight_row, 1, tiles.rows, columns,
                 add ? to + c : nullptr, to_row, to + c, to_row);
    }
}

/// image rows = weights (words x pixels) transposed * words, which are as words_for_pixels made them.
template <typename Element>
static void write_pixels(int64_t words, int64_t pixels, const Real* weights, int64_t weight_row,
                         const ProductWord<Element>* packed, int64_t width, const Tiles& tiles,
                         Rows<Element> image, Ahead ahead) {
    // Blocks of few rows: their results are written nearly in the order of memory.
    constexpr int64_t kBlock = 24;
    ahead.spread((width + kPanelPixels - 1) / kPanelPixels * product_steps(pixels, 3, words));
    const ProductWord<Element>* factors;
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
    if constexpr (kPairs<Element>) {
        pair_rows(words, pixels, weights, weight_row, tiles.weight_pairs(), tiles.row);
        factors = tiles.weight_pairs();
        weight_row = tiles.row;
        words = (words + 1) / 2;
    } else
#endif
        factors = weights;
    for (int64_t p = 0; p < pixels; p += kBlock) {
        const int64_t rows = smaller(kBlock, pixels - p);
        if constexpr (Same<Element, Real>::value) {
            if (in_place<Element>(width)) {
                multiply(ahead, rows, width, words, factors + p, 1, weight_row, packed, packed_row(width),
                         nullptr, 0, image.data + p * image.stride, image.stride);
                continue;
            }
        }
        constexpr int64_t kChannels = 4 * kPanelPixels;
        static_assert(kBlock * kChannels <= kTilePixels * kPanelPixels);
        for (int64_t c = 0; c < width; c += kChannels) {
            const int64_t channels = smaller(kChannels, width - c), columns = round_up(channels);
            multiply(ahead, rows, columns, words, factors + p, 1, weight_row, packed + c, packed_row(width),
                     nullptr, 0, tiles.rows, columns);
            for (int64_t r = 0; r < rows; ++r) {
                Element* at = image.data + (p + r) * image.stride + c;
                const Real* from = tiles.rows + r * columns;
                int64_t i = 0;
                for (; i + kLanes <= channels; i += kLanes) store(at + i, load(from + i));
                if (i < channels) store_part(at + i, load(from + i), channels - i);
            }
        }
    }
}

template <typename Element>
static void clear_pixels(int64_t pixels, int64_t width, Rows<Element> image) {
    for (int64_t p = 0; p < pixels; ++p)
        for (int64_t c = 0; c < width; ++c) image.data[p * image.stride + c] = Element{};
}

/// Softmax over words, pixel by pixel. An infinite maximum gives NaN throughout, as torch's softmax does.
static inline void softmax_over_words(int64_t words, int64_t pixels, const Real* scores, int64_t score_row,
                                      Real* weights, int64_t weight_row) {
    for (int64_t p = 0; p < pixels; p += kLanes) {
        Vec top = load(scores + p);
        for (int64_t t = 1; t < words; ++t) top = maximum(top, load(scores + t * score_row + p));
        Vec sum = broadcast(0);
        for (int64_t t = 0; t < words; ++t) {
            const Vec e = exponential(load(scores + t * score_row + p) - top);
            store(weights + t * weight_row + p, e);
            sum = sum + e;
        }
        const Vec inverse = broadcast(1) / sum;
        for (int64_t t = 0; t < words; ++t) {
            Real* at = weights + t * weight_row + p;
            store(at, load(at) * inverse);
        }
    }
}

/// Pixels that are not there get the score -infinity: up to a multiple of kLanes.
static inline void hide_padding(int64_t words, int64_t pixels, Real* scores, int64_t score_row) {
    for (int64_t t = 0; t < words; ++t)
        for (int64_t p = pixels; p < round_up(pixels); ++p)
            scores[t * score_row + p] = -static_cast<Real>(__builtin_inff());
}

static inline Real highest_of(const Real* scores, int64_t count) {
    Vec top = load(scores);
    for (int64_t p = kLanes; p < count; p += kLanes) top = maximum(top, load(scores + p));
    return reduce_max(top);
}

/// What scores are taken relative to: their maximum; 0 when all are -infinity, whose weights are then 0.
static inline Real offset_of(Real highest) {
    return highest == -static_cast<Real>(__builtin_inff()) ? 0 : highest;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
