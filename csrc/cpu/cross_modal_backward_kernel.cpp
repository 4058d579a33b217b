// Compiled once per SIMD level; see simd.h and cross_modal_kernel.h.
#include "cpu/cross_modal_tiles.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

template <typename Element>
static void statistics(const CrossModalStatistics<Element>& a) {
    if (a.words == 0) return;
    const Tiles tiles(a.scratch, a.words);
    score_pixels(a.words, a.widths.similarity, a.query, a.image_key, a.pixels, tiles.panel, a.score,
                 a.kept_row);
    if (a.grad_weight)
        score_pixels(a.words, a.widths.image_value, a.grad_text_out, a.image_value, a.pixels, tiles.panel,
                     a.grad_weight, a.kept_row);
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

/// grads (words x pixels): from the gradient of weights to that of scores; the softmax runs over words.
static inline void softmax_over_words_backward(int64_t words, int64_t pixels, const Real* weights,
                                               Real* grads, int64_t row) {
    for (int64_t p = 0; p < pixels; p += kLanes) {
        Vec dot = broadcast(0);
        for (int64_t t = 0; t < words; ++t)
            dot = multiply_add(load(weights + t * row + p), load(grads + t * row + p), dot);
        for (int64_t t = 0; t < words; ++t) {
            Real* at = grads + t * row + p;
            store(at, load(weights + t * row + p) * (load(at) - dot));
        }
    }
}

/// The softmax over pixels from its statistics: scores become weights, and the gradients of weights, if any,
/// those of scores.
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
            if (grad) store(grad + p, weight * (load(grad + p) - mean));
        }
    }
}

/// The image direction's weights (words x row) into tiles.first and, if wanted, the gradient of its scores
/// into tiles.second.
template <typename Element>
static void image_direction(const CrossModalBackward<Element>& a, const Tiles& tiles, int64_t p,
                            int64_t count, bool grad_scores) {
    const Real* score = tiles.first;
    int64_t score_row = tiles.row;
    if (a.score && !a.image_key) {  // shared similarity: kept by the statistics
        score = a.score + p;
        score_row = a.kept_row;
    } else {
        score_pixels(a.words, a.widths.similarity, a.key, a.image_query.from(p), count, tiles.panel,
                     tiles.first, tiles.row);
    }
    softmax_over_words(a.words, count, score, score_row, tiles.first, tiles.row);
    if (!grad_scores) return;
    score_pixels(a.words, a.widths.text_value, a.value, a.grad_image_out.from(p), count, tiles.panel,
                 tiles.second, tiles.row);
    softmax_over_words_backward(a.words, count, tiles.first, tiles.second, tiles.row);
}

/// From the gradient of scores to those of the image rows and the words that were multiplied.
template <typename Element>
static void score_gradients(const CrossModalBackward<Element>& a, const Tiles& tiles, int64_t p,
                            int64_t count, const Real* grads, int64_t row, const Real* words,
                            Rows<const Element> image, Rows<Element> grad_image, Real* grad_words) {
    const int64_t width = a.widths.similarity;
    if (grad_image) write_pixels(a.words, count, grads, row, words, width, tiles.rows, grad_image.from(p));
    if (grad_words)
        sum_pixels(a.words, count, grads, row, image.from(p), width, tiles.rows, p > 0, grad_words);
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
    const Tiles tiles(a.scratch, a.words);
    const bool shared = !a.image_key, image = bool(a.grad_image_out), text = a.grad_text_out != nullptr;
    const bool grad_scores = a.grad_image_query || a.grad_text_key;
    for (int64_t p = 0, count = 0; p < a.pixels; p += count) {
        count = even_piece(a.pixels - p, tile_pixels(a.words));
        if (image) {
            image_direction(a, tiles, p, count, grad_scores);
            if (a.grad_text_value)
                sum_pixels(a.words, count, tiles.first, tiles.row, a.grad_image_out.from(p),
                           a.widths.text_value, tiles.rows, p > 0, a.grad_text_value);
        }
        if (text) {
            softmax_over_pixels_backward(a, p, count);
            if (a.grad_image_value)
                write_pixels(a.words, count, a.score + p, a.kept_row, a.grad_text_out, a.widths.image_value,
                             tiles.rows, a.grad_image_value.from(p));
            if (!shared)
                score_gradients(a, tiles, p, count, a.grad_weight + p, a.kept_row, a.query, a.image_key,
                                a.grad_image_key, a.grad_text_query);
        }
        if (!grad_scores) continue;
        if (shared && text) {
            for (int64_t t = 0; image && t < a.words; ++t)
                for (int64_t i = 0; i < count; i += kLanes) {
                    Real* at = a.grad_weight + t * a.kept_row + p + i;
                    store(at, load(at) + load(tiles.second + t * tiles.row + i));
                }
            score_gradients(a, tiles, p, count, a.grad_weight + p, a.kept_row, a.key, a.image_query,
                            a.grad_image_query, a.grad_text_key);
        } else {
            score_gradients(a, tiles, p, count, tiles.second, tiles.row, a.key, a.image_query,
                            a.grad_image_query, a.grad_text_key);
        }
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
