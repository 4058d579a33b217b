// Compiled once per SIMD level; see simd.h and cross_modal_kernel.h.
#include "cpu/cross_modal_tiles.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

template <typename Element>
static void statistics(const CrossModalStatistics<Element>& a) {
    if (a.words == 0) return;
    const Tiles tiles(a.scratch, a.words, a.widths);
    const int64_t d = a.widths.similarity, dw = a.widths.image_value;
    const void* query = words_for_scores<Element>(a.words, d, a.query, tiles.form(0));
    const void* grad_out =
        a.grad_weight ? words_for_scores<Element>(a.words, dw, a.grad_text_out, tiles.form(1)) : nullptr;
    for (int64_t p = 0; p < a.pixels;) {
        const Tile at(p, a.pixels, tiles.pixels);
        const Ahead next_tile(a.image_key.from(at.next), at.next_count, d),
            image_value(a.image_value.from(p), at.count, dw);
        score_pixels(a.words, d, query, a.image_key.from(p), at.count, a.scale, tiles, a.score + p,
                     a.kept_row, a.grad_weight ? image_value : next_tile);
        if (a.grad_weight)
            score_pixels(a.words, dw, grad_out, a.image_value.from(p), at.count, Real(1), tiles,
                         a.grad_weight + p, a.kept_row, next_tile);
        p = at.next;
    }
    hide_padding(a.words, a.pixels, a.score, a.kept_row);
    const int64_t columns = round_up(a.pixels);
    for (int64_t t = 0; t < a.words; ++t) {
        const Real* score = a.score + t * a.kept_row;
        a.highest[t] = highest_of(score, columns);
        const Vec offset = broadcast(offset_of(a.highest[t]));
        Vec sum = broadcast(0), dot = broadcast(0);
        for (int64_t p = 0; p < columns; p += kLanes) {
            const Vec e = exponential(load(score + p) - offset);
            sum = sum + e;
            if (a.grad_weight) dot = multiply_add(e, load(a.grad_weight + t * a.kept_row + p), dot);
        }
        a.sum[t] = reduce_add(sum);
        a.dot[t] = reduce_add(dot);
    }
}

/// grads (words x pixels): from the gradient of weights to scale times that of scores; the softmax runs over
/// words.
static inline void softmax_over_words_backward(int64_t words, int64_t pixels, const Real* weights,
                                               Real* grads, int64_t row, Real scale) {
    for (int64_t p = 0; p < pixels; p += kLanes) {
        Vec dot = broadcast(0);
        for (int64_t t = 0; t < words; ++t)
            dot = multiply_add(load(weights + t * row + p), load(grads + t * row + p), dot);
        for (int64_t t = 0; t < words; ++t) {
            Real* at = grads + t * row + p;
            store(at, load(weights + t * row + p) * (load(at) - dot) * broadcast(scale));
        }
    }
}

/// The softmax over pixels from its statistics: scores become weights, and the gradients of weights, if any,
/// scale times those of scores.
template <typename Element>
static void softmax_over_pixels_backward(const CrossModalBackward<Element>& a, int64_t first, int64_t count) {
    for (int64_t t = 0; t < a.words; ++t) {
        const Vec highest = broadcast(a.highest[t]), factor = broadcast(a.inverse_sum[t]),
                  mean = broadcast(a.mean[t]);
        Real* score = a.score + t * a.kept_row + first;
        Real* grad = a.grad_weight ? a.grad_weight + t * a.kept_row + first : nullptr;
        for (int64_t p = 0; p < count; p += kLanes) {
            const Vec weight = exponential(load(score + p) - highest) * factor;
            store(score + p, weight);
            if (grad) store(grad + p, weight * (load(grad + p) - mean) * broadcast(a.scale));
        }
    }
}

/// Packed words in the forms that the products want.
template <typename Element>
struct Words {
    using Word = ProductWord<Element>;
    const void *key = nullptr, *value = nullptr;
    const Word *grad_image_query = nullptr, *grad_image_key = nullptr, *grad_image_value = nullptr;

    Words(const CrossModalBackward<Element>& a, const Tiles& tiles) {
        const int64_t d = a.widths.similarity, dv = a.widths.text_value, dw = a.widths.image_value;
        if (a.grad_image_out) {
            key = words_for_scores<Element>(a.words, d, a.key, tiles.form(0));
            value = words_for_scores<Element>(a.words, dv, a.value, tiles.form(1));
        }
        if (a.grad_image_query)
            grad_image_query = words_for_pixels<Element>(a.words, d, a.key, tiles.form(2));
        if (a.grad_image_key) grad_image_key = words_for_pixels<Element>(a.words, d, a.query, tiles.form(3));
        if (a.grad_image_value)
            grad_image_value = words_for_pixels<Element>(a.words, dw, a.grad_text_out, tiles.form(4));
    }
};

/// The image direction's weights (words x row) into tiles.first and, if wanted, the gradient of its scores
/// into tiles.second.
template <typename Element>
static void image_direction(const CrossModalBackward<Element>& a, const Tiles& tiles, const Tile& at,
                            const Words<Element>& words, bool grad_scores) {
    const int64_t d = a.widths.similarity, dv = a.widths.text_value;
    const Real* score = tiles.first;
    int64_t score_row = tiles.row;
    if (a.score && !a.image_key) {  // shared similarity: kept by the statistics
        score = a.score + at.first;
        score_row = a.kept_row;
    } else {
        score_pixels(a.words, d, words.key, a.image_query.from(at.first), at.count, a.scale, tiles,
                     tiles.first, tiles.row, Ahead(a.grad_image_out.from(at.first), at.count, dv));
    }
    softmax_over_words(a.words, at.count, score, score_row, tiles.first, tiles.row);
    if (!grad_scores) return;
    score_pixels(a.words, dv, words.value, a.grad_image_out.from(at.first), at.count, Real(1), tiles,
                 tiles.second, tiles.row, Ahead(a.grad_image_query.from(at.first), at.count, d));
    softmax_over_words_backward(a.words, at.count, tiles.first, tiles.second, tiles.row, a.scale);
}

/// From the gradient of scores to those of the image rows and the words that were multiplied.
template <typename Element>
static void score_gradients(const CrossModalBackward<Element>& a, const Tiles& tiles, const Tile& at,
                            const Real* grads, int64_t row, const ProductWord<Element>* words,
                            Rows<const Element> image, Rows<Element> grad_image, Real* grad_words) {
    const int64_t width = a.widths.similarity;
    const Ahead here(image.from(at.first), at.count, width), next(image.from(at.next), at.next_count, width);
    if (grad_image)
        write_pixels(a.words, at.count, grads, row, words, width, tiles, grad_image.from(at.first),
                     grad_words ? here : next);
    if (grad_words)
        sum_pixels(a.words, at.count, grads, row, image.from(at.first), width, tiles, at.first > 0,
                   grad_words, next);
}

template <typename Element>
static void clear(const CrossModalBackward<Element>& a) {
    if (a.grad_image_query) clear_pixels(a.pixels, a.widths.similarity, a.grad_image_query);
    if (a.grad_image_key) clear_pixels(a.pixels, a.widths.similarity, a.grad_image_key);
    if (a.grad_image_value) clear_pixels(a.pixels, a.widths.image_value, a.grad_image_value);
}

template <typename Element>
static void backward(const CrossModalBackward<Element>& a) {
    if (a.words == 0) return clear(a);
    const Tiles tiles(a.scratch, a.words, a.widths);
    const Words<Element> words(a, tiles);
    const bool shared = !a.image_key, image = bool(a.grad_image_out), text = a.grad_text_out != nullptr;
    const bool grad_scores = a.grad_image_query || a.grad_text_key;
    for (int64_t p = 0; p < a.pixels;) {
        const Tile at(p, a.pixels, tiles.pixels);
        if (image) {
            image_direction(a, tiles, at, words, grad_scores);
            if (a.grad_text_value)
                sum_pixels(a.words, at.count, tiles.first, tiles.row, a.grad_image_out.from(p),
                           a.widths.text_value, tiles, p > 0, a.grad_text_value, Ahead());
        }
        const Real* grads = tiles.second;
        int64_t row = tiles.row;
        if (text) {
            softmax_over_pixels_backward(a, p, at.count);
            if (a.grad_image_value)
                write_pixels(a.words, at.count, a.score + p, a.kept_row, words.grad_image_value,
                             a.widths.image_value, tiles, a.grad_image_value.from(p), Ahead());
            if (!shared) {
                score_gradients(a, tiles, at, a.grad_weight + p, a.kept_row, words.grad_image_key,
                                a.image_key, a.grad_image_key, a.grad_text_query);
            } else if (grad_scores) {
                for (int64_t t = 0; image && t < a.words; ++t)
                    for (int64_t i = 0; i < at.count; i += kLanes) {
                        Real* sum = a.grad_weight + t * a.kept_row + p + i;
                        store(sum, load(sum) + load(tiles.second + t * tiles.row + i));
                    }
                grads = a.grad_weight + p;
                row = a.kept_row;
            }
        }
        if (grad_scores)
            score_gradients(a, tiles, at, grads, row, words.grad_image_query, a.image_query,
                            a.grad_image_query, a.grad_text_key);
        p = at.next;
    }
}

template <typename Element>
const CrossModalBackwardKernels<Element>& cross_modal_backward_kernels() {
    static const CrossModalBackwardKernels<Element> kernels = {statistics<Element>, backward<Element>};
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(CrossModalBackwardKernels, cross_modal_backward_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
