// Cross-modal attention's tensors, and the checks that are the same on every device.
#pragma once

#include <cmath>
#include <string>
#include <utility>

#include "common/tensor_view.h"

namespace magnet_fast {

/// What both passes read; see magnet_fast.ops.cross_modal_attention for the forms. image_* (batch, pixels,
/// width), text_* (batch, words, width), each with a contiguous last dimension, and as gradients contiguous.
struct CrossModalTensors {
    TensorView image_query, text_key, text_value, text_query, image_key, image_value;
};

struct CrossModalViews {
    CrossModalTensors tensors;
    TensorView
        text_mask;  // (batch, words) bool, contiguous, false for a masked word; not there: all are words
    int64_t heads;
    double scale;
};

struct CrossModalShape {
    int64_t batch, pixels, words, heads;
    int64_t width, text_value_width, image_value_width;  // C, Cv, Cw: over all heads; 0 without the values
    Dtype dtype;                                         // of all tensors
};

inline void check_rows(const TensorView& view, const char* name, int64_t batch, int64_t rows, int64_t width,
                       Dtype dtype) {
    check_tensor(view, name, {batch, rows, width}, dtype);
    check_dense(view, name, 2);
}

/// The shape of a call whose tensors are those of a form and fit together; std::invalid_argument names one
/// that does not.
inline CrossModalShape checked_shape(const CrossModalViews& views) {
    const CrossModalTensors& t = views.tensors;
    const bool scored = t.image_query.given(), separate = t.image_key.given();
    const bool image = t.text_value.given(), text = t.image_value.given();
    require(scored == t.text_key.given(), "image_query", "text_key beside it and only then", scored);
    require(separate == t.text_query.given(), "image_key", "text_query beside it and only then", separate);
    require(scored || separate, "image_query", "a tensor, or image_key and text_query", 0);
    require(image || text, "text_value", "it or image_value, or both", 0);
    require(scored || !image, "image_query", "it beside text_value", 0);
    require(text || !separate, "image_value", "it beside image_key", 0);
    require(image || !separate || !scored, "text_value", "it beside image_query when image_key is given", 0);

    const TensorView &pixels = scored ? t.image_query : t.image_key,
                     &words = scored ? t.text_key : t.text_query;
    const char* first = scored ? "image_query" : "image_key";
    check_dtype(pixels, first);
    check_tensor(pixels, first, 3, pixels.dtype);
    check_tensor(words, scored ? "text_key" : "text_query", 3, pixels.dtype);
    const CrossModalShape s{pixels.sizes[0],
                            pixels.sizes[1],
                            words.sizes[1],
                            views.heads,
                            pixels.sizes[2],
                            image ? t.text_value.sizes[2] : 0,
                            text ? t.image_value.sizes[2] : 0,
                            pixels.dtype};
    const std::pair<const char*, std::pair<const TensorView*, bool>> all[] = {
        {"image_query", {&t.image_query, true}}, {"text_key", {&t.text_key, false}},
        {"text_value", {&t.text_value, false}},  {"text_query", {&t.text_query, false}},
        {"image_key", {&t.image_key, true}},     {"image_value", {&t.image_value, true}}};
    for (const auto& [name, tensor] : all) {
        const TensorView& view = *tensor.first;
        if (!view.given()) continue;
        const bool value = &view == &t.text_value || &view == &t.image_value;
        check_rows(view, name, s.batch, tensor.second ? s.pixels : s.words, value ? view.sizes[2] : s.width,
                   s.dtype);
        require(!view.empty(), name, "sizes of at least 1", 0);
        require(views.heads > 0 && view.sizes[2] % views.heads == 0, "heads",
                "a divisor of the " + std::to_string(view.sizes[2]) + " channels of " + name, views.heads);
    }
    check_contiguous(views.text_mask, "text_mask", {s.batch, s.words}, Dtype::kBool, /*may_be_missing=*/true);
    if (!std::isfinite(views.scale) || views.scale <= 0)
        throw std::invalid_argument("scale: expected a finite number above 0, got " +
                                    std::to_string(views.scale));
    return s;
}

/// A result belongs to its values.
inline void check_result(const TensorView& out, const char* name, const TensorView& values, int64_t batch,
                         int64_t rows) {
    require(out.given() == values.given(), name, values.given() ? "a tensor" : "None, for lack of values",
            out.given());
    if (out.given()) check_contiguous(out, name, {batch, rows, values.sizes[2]}, values.dtype);
}

/// Gradients of the results, and those that are wanted: only of tensors that a direction with a gradient
/// reads.
inline void check_gradients(const CrossModalTensors& t, const CrossModalShape& s, const TensorView& image_out,
                            const TensorView& text_out, const CrossModalTensors& grads) {
    const bool image = image_out.given(), text = text_out.given(), separate = t.text_query.given();
    require(!image || t.text_value.given(), "grad_image_out", "text_value beside it", 0);
    require(!text || t.image_value.given(), "grad_text_out", "image_value beside it", 0);
    if (image) check_rows(image_out, "grad_image_out", s.batch, s.pixels, s.text_value_width, s.dtype);
    if (text) check_rows(text_out, "grad_text_out", s.batch, s.words, s.image_value_width, s.dtype);
    const bool scored = t.image_query.given() && (image || (text && !separate));
    const auto check = [&](const TensorView& grad, const char* name, bool reached, const TensorView& of) {
        if (!grad.given()) return;
        require(reached, name, "None: nothing flows into this gradient", 1);
        check_contiguous(grad, name, {of.sizes[0], of.sizes[1], of.sizes[2]}, s.dtype);
    };
    check(grads.image_query, "grad_image_query", scored, t.image_query);
    check(grads.text_key, "grad_text_key", scored, t.text_key);
    check(grads.text_value, "grad_text_value", image, t.text_value);
    check(grads.text_query, "grad_text_query", separate && text, t.text_query);
    check(grads.image_key, "grad_image_key", separate && text, t.image_key);
    check(grads.image_value, "grad_image_value", text, t.image_value);
}

}  // namespace magnet_fast
