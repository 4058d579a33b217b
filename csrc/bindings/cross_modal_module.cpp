// Cross-modal attention's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "bindings/arguments.h"
#include "cpu/cross_modal_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

using Argument = std::tuple<Address, int64_t, int64_t>;  // address or 0, batch stride, row stride

CrossModalTensor tensor(const Argument& argument) {
    const auto [address, batch_stride, row_stride] = argument;
    return {pointer<const void>(address), batch_stride, row_stride};
}

/// A function of Python's arguments that every call has, followed by More.
template <typename Call, typename... More>
auto with_inputs(Call call) {
    return [call](const Argument& image_query, const Argument& text_key, const Argument& text_value,
                  const Argument& text_query, const Argument& image_key, const Argument& image_value,
                  Address text_mask, int64_t batch, int64_t pixels, int64_t words, int64_t heads,
                  int64_t width, int64_t text_value_width, int64_t image_value_width, double scale, int dtype,
                  int64_t threads, More... more) {
        call(
            {{batch, pixels, words, heads, width, text_value_width, image_value_width, scale, dtype, threads},
             tensor(image_query),
             tensor(text_key),
             tensor(text_value),
             tensor(text_query),
             tensor(image_key),
             tensor(image_value),
             pointer<const uint8_t>(text_mask)},
            more...);
    };
}

void forward(const CrossModalInputs& inputs, Address image_out, Address text_out) {
    cross_modal_attention_forward(inputs, pointer<void>(image_out), pointer<void>(text_out));
}

void backward(const CrossModalInputs& inputs, const Argument& grad_image_out, const Argument& grad_text_out,
              Address grad_image_query, Address grad_text_key, Address grad_text_value,
              Address grad_text_query, Address grad_image_key, Address grad_image_value) {
    cross_modal_attention_backward(
        inputs, tensor(grad_image_out), tensor(grad_text_out),
        {pointer<void>(grad_image_query), pointer<void>(grad_text_key), pointer<void>(grad_text_value),
         pointer<void>(grad_text_query), pointer<void>(grad_image_key), pointer<void>(grad_image_value)});
}

}  // namespace

void bind_cross_modal_attention(py::module_& m) {
    m.def(
        "cross_modal_attention_forward", with_inputs<decltype(&forward), Address, Address>(&forward),
        py::call_guard<py::gil_scoped_release>(), py::kw_only(), "image_query"_a, "text_key"_a,
        "text_value"_a, "text_query"_a, "image_key"_a, "image_value"_a, "text_mask_ptr"_a, "batch"_a,
        "pixels"_a, "words"_a, "heads"_a, "width"_a, "text_value_width"_a, "image_value_width"_a, "scale"_a,
        "dtype"_a, "threads"_a, "image_out_ptr"_a, "text_out_ptr"_a,
        "Attention between pixels and words. A tensor is (address, batch stride, row stride), address 0 when "
        "it is not given; text_mask (batch, words) bool, or 0. image_out (batch, pixels, text_value_width) "
        "and text_out (batch, words, image_value_width) are contiguous and written; 0 without the values.");
    m.def("cross_modal_attention_backward",
          with_inputs<decltype(&backward), const Argument&, const Argument&, Address, Address, Address,
                      Address, Address, Address>(&backward),
          py::call_guard<py::gil_scoped_release>(), py::kw_only(), "image_query"_a, "text_key"_a,
          "text_value"_a, "text_query"_a, "image_key"_a, "image_value"_a, "text_mask_ptr"_a, "batch"_a,
          "pixels"_a, "words"_a, "heads"_a, "width"_a, "text_value_width"_a, "image_value_width"_a, "scale"_a,
          "dtype"_a, "threads"_a, "grad_image_out"_a, "grad_text_out"_a, "grad_image_query_ptr"_a,
          "grad_text_key_ptr"_a, "grad_text_value_ptr"_a, "grad_text_query_ptr"_a, "grad_image_key_ptr"_a,
          "grad_image_value_ptr"_a,
          "Gradients of cross_modal_attention_forward; those of the results have address 0 when there are "
          "none. The others are contiguous, shaped like their tensors and overwritten; address 0: that "
          "gradient is not wanted.");
}

}  // namespace magnet_fast
