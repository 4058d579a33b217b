// Cross-modal attention's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/cross_modal_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

void forward(const TensorView& image_query, const TensorView& text_key, const TensorView& text_value,
             const TensorView& text_query, const TensorView& image_key, const TensorView& image_value,
             const TensorView& text_mask, const TensorView& image_out, const TensorView& text_out,
             int64_t heads, double scale, int64_t threads) {
    cross_modal_attention_forward(
        {{image_query, text_key, text_value, text_query, image_key, image_value}, text_mask, heads, scale},
        image_out, text_out, threads);
}

void backward(const TensorView& grad_image_out, const TensorView& grad_text_out,
              const TensorView& image_query, const TensorView& text_key, const TensorView& text_value,
              const TensorView& text_query, const TensorView& image_key, const TensorView& image_value,
              const TensorView& text_mask, const TensorView& grad_image_query,
              const TensorView& grad_text_key, const TensorView& grad_text_value,
              const TensorView& grad_text_query, const TensorView& grad_image_key,
              const TensorView& grad_image_value, int64_t heads, double scale, int64_t threads) {
    cross_modal_attention_backward(
        {{image_query, text_key, text_value, text_query, image_key, image_value}, text_mask, heads, scale},
        grad_image_out, grad_text_out,
        {grad_image_query, grad_text_key, grad_text_value, grad_text_query, grad_image_key, grad_image_value},
        threads);
}

}  // namespace

void bind_cross_modal_attention(py::module_& m) {
    m.def("cross_modal_attention_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "image_query"_a, "text_key"_a, "text_value"_a, "text_query"_a, "image_key"_a, "image_value"_a,
          "text_mask"_a, "image_out"_a, "text_out"_a, "heads"_a, "scale"_a, "threads"_a,
          "Attention between pixels and words. image_* (batch, pixels, width), text_* (batch, words, width), "
          "None for those that the form does not have; text_mask (batch, words) bool, or None. image_out and "
          "text_out are contiguous and written; None without the values.");
    m.def("cross_modal_attention_backward", &backward, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "grad_image_out"_a, "grad_text_out"_a, "image_query"_a, "text_key"_a, "text_value"_a,
          "text_query"_a, "image_key"_a, "image_value"_a, "text_mask"_a, "grad_image_query"_a,
          "grad_text_key"_a, "grad_text_value"_a, "grad_text_query"_a, "grad_image_key"_a,
          "grad_image_value"_a, "heads"_a, "scale"_a, "threads"_a,
          "Gradients of cross_modal_attention_forward; those of the results are None when there are none. "
          "The others are contiguous, shaped like their tensors and overwritten; None: that gradient is not "
          "wanted.");
}

}  // namespace magnet_fast
