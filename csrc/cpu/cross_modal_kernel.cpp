// Compiled once per SIMD level; see simd.h and cross_modal_kernel.h.
#include "cpu/cross_modal_kernel.h"

#include "cpu/cross_modal_tiles.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

template <typename Element>
static void pack(Rows<const Element> from, const int32_t* words, int64_t count, int64_t width, Real* to) {
    for (int64_t t = 0; t < count; ++t, to += packed_row(width)) {
        const Element* row = from.data + words[t] * from.stride;
        int64_t c = 0;
        for (; c + kLanes <= width; c += kLanes) store(to + c, load(row + c));
        if (c < width) {
            store(to + c, load_part(row + c, width - c));
            c += kLanes;
        }
        for (; c < packed_row(width); ++c) to[c] = 0;
    }
}

template <typename Element>
static void combine(const Real* parts, int64_t count, int64_t stride, const Real* factors, int64_t width,
                    Element* to) {
    for (int64_t c = 0; c < width; c += kLanes) {
        Vec sum = broadcast(0);
        for (int64_t i = 0; i < count; ++i)
            sum = multiply_add(load(parts + i * stride + c), broadcast(factors[i]), sum);
        if (c + kLanes <= width)
            store(to + c, sum);
        else
            store_part(to + c, sum, width - c);
    }
}

/// Takes a tile's scores into a word's running softmax: scores become weights relative to the new maximum.
/// Returns the factor by which earlier sums shrink.
static inline Real update_softmax(Real* scores, int64_t count, bool first, Real* highest, Real* sum) {
    const Real tile = highest_of(scores, count), before = first ? tile : *highest;
    *highest = before > tile ? before : tile;
    const Real offset = offset_of(*highest);
    const Vec offsets = broadcast(offset);
    Vec total = broadcast(0);
    for (int64_t p = 0; p < count; p += kLanes) {
        const Vec e = exponential(load(scores + p) - offsets);
        store(scores + p, e);
        total = total + e;
    }
    if (first) {
        *sum = reduce_add(total);
        return 0;
    }
    Real lanes[kLanes];
    store(lanes, exponential(broadcast(before - offset)));
    *sum = *sum * lanes[0] + reduce_add(total);
    return lanes[0];
}

template <typename Element>
static void forward(const CrossModalForward<Element>& a) {
    if (a.words == 0) {
        if (a.image_out) clear_pixels(a.pixels, a.widths.text_value, a.image_out);
        return;
    }
    const Tiles tiles(a.scratch, a.words, a.widths);
    const int64_t row = tiles.row, read_row = packed_row(a.widths.image_value);
    const int64_t d = a.widths.similarity, dv = a.widths.text_value, dw = a.widths.image_value;
    const bool shared = !a.image_key;
    const void* key = a.key ? words_for_scores<Element>(a.words, d, a.key, tiles.form(0)) : nullptr;
    const void* query = a.query ? words_for_scores<Element>(a.words, d, a.query, tiles.form(1)) : nullptr;
    const ProductWord<Element>* value =
        a.value ? words_for_pixels<Element>(a.words, dv, a.value, tiles.form(2)) : nullptr;
    for (int64_t p = 0, next = 0; p < a.pixels; p = next) {
        const Tile at(p, a.pixels, tiles.pixels);
        const int64_t count = at.count, next_count = at.next_count;
        next = at.next;
        const Ahead next_tile(a.image_query ? a.image_query.from(next) : a.image_key.from(next), next_count,
                              d),
            image_key(a.image_key.from(p), count, d), image_value(a.image_value.from(p), count, dw),
            image_out(a.image_out.from(p), count, dv);
        Real* score = tiles.first;
        if (a.image_query)
            score_pixels(a.words, d, key, a.image_query.from(p), count, a.scale, tiles, score, row,
                         a.image_out ? image_out : image_value);
        if (a.image_out) {
            softmax_over_words(a.words, count, score, row, tiles.second, row);
            write_pixels(a.words, count, tiles.second, row, value, dv, tiles, a.image_out.from(p),
                         !a.text.read ? next_tile
                         : shared     ? image_value
                                      : image_key);
        }
        if (!a.text.read) continue;
        if (!shared)
            score_pixels(a.words, d, query, a.image_key.from(p), count, a.scale, tiles, score, row,
                         image_value);
        hide_padding(a.words, count, score, row);
        for (int64_t t = 0; t < a.words; ++t) {
            const Real shrink =
                update_softmax(score + t * row, round_up(count), p == 0, a.text.highest + t, a.text.sum + t);
            if (p == 0 || shrink == 1) continue;
            Real* read = a.text.read + t * read_row;
            for (int64_t c = 0; c < dw; c += kLanes) store(read + c, load(read + c) * broadcast(shrink));
        }
        sum_pixels(a.words, count, score, row, a.image_value.from(p), dw, tiles, p > 0, a.text.read,
                   next_tile);
    }
}

template <typename Element>
const CrossModalKernels<Element>& cross_modal_kernels() {
    static const CrossModalKernels<Element> kernels = {pack<Element>, combine<Element>, forward<Element>};
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(CrossModalKernels, cross_modal_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
