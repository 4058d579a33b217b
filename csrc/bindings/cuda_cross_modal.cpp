// Cross-modal attention's part of the Python module; see cuda_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "bindings/arguments.h"
#include "cuda/cross_modal_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

using Argument = std::tuple<Address, int64_t, int64_t>;  // address or 0, batch stride, row stride

cuda::RowTensor tensor(const Argument& argument) {
    const auto [address, batch_stride, row_stride] = argument;
    return {pointer<const void>(address), batch_stride, row_stride};
}

int64_t workspace(int device, int64_t batch, int64_t pixels, int64_t words, int64_t heads, int64_t width,
                  int64_t text_value_width, int64_t image_value_width) {
    return cuda::cross_modal_attention_workspace({batch, pixels, words, heads, width, text_value_width,
                                                  image_value_width, 1.0, Float32Products::kExact},
                                                 {device, nullptr});
}

/// A function of Python's arguments that both passes have, followed by More.
template <typename Call, typename... More>
auto with_inputs(Call call) {
    return
        [call](int device, Address stream, bool tf32, const Argument& image_query, const Argument& text_key,
               const Argument& text_value, const Argument& text_query, const Argument& image_key,
               const Argument& image_value, Address text_mask, int64_t batch, int64_t pixels, int64_t words,
               int64_t heads, int64_t width, int64_t text_value_width, int64_t image_value_width,
               double scale, int dtype, Address workspace, int64_t workspace_bytes, More... more) {
            call({{batch, pixels, words, heads, width, text_value_width, image_value_width, scale,
                   tf32 ? Float32Products::kTf32 : Float32Products::kExact},
                  tensor(image_query),
                  tensor(text_key),
                  tensor(text_value),
                  tensor(text_query),
                  tensor(image_key),
                  tensor(image_value),
                  pointer<const uint8_t>(text_mask)},
                 cuda::checked_dtype(dtype), {device, pointer<void>(stream)}, pointer<void>(workspace),
                 workspace_bytes, more...);
        };
}

void forward(const cuda::CrossModalInputs& inputs, Dtype dtype, const cuda::Place& place, void* workspace,
             int64_t workspace_bytes, Address image_out, Address text_out) {
    cuda::cross_modal_attention_forward(inputs, dtype, place, pointer<void>(image_out),
                                        pointer<void>(text_out), workspace, workspace_bytes);
}

void backward(const cuda::CrossModalInputs& inputs, Dtype dtype, const cuda::Place& place, void* workspace,
              int64_t workspace_bytes, const Argument& grad_image_out, const Argument& grad_text_out,
              Address grad_image_query, Address grad_text_key, Address grad_text_value,
              Address grad_text_query, Address grad_image_key, Address grad_image_value) {
    cuda::cross_modal_attention_backward(
        inputs, dtype, place, tensor(grad_image_out), tensor(grad_text_out),
        {pointer<void>(grad_image_query), pointer<void>(grad_text_key), pointer<void>(grad_text_value),
         pointer<void>(grad_text_query), pointer<void>(grad_image_key), pointer<void>(grad_image_value)},
        workspace, workspace_bytes);
}

/// Defines a pass with the names of the common arguments and more.
template <typename Call, typename... Names>
void define(py::module_& m, const char* name, const Call& call, const char* text, const Names&... names) {
    m.def(name, call, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "device"_a, "stream"_a,
          "tf32"_a, "image_query"_a, "text_key"_a, "text_value"_a, "text_query"_a, "image_key"_a,
          "image_value"_a, "text_mask_ptr"_a, "batch"_a, "pixels"_a, "words"_a, "heads"_a, "width"_a,
          "text_value_width"_a, "image_value_width"_a, "scale"_a, "dtype"_a, "workspace_ptr"_a,
          "workspace_bytes"_a, names..., text);
}

}  // namespace

void bind_cuda_cross_modal_attention(py::module_& m) {
    m.def("cross_modal_attention_workspace", &workspace, py::kw_only(), "device"_a, "batch"_a, "pixels"_a,
          "words"_a, "heads"_a, "width"_a, "text_value_width"_a, "image_value_width"_a,
          "Bytes of device memory that either pass of these sizes needs.");
    define(
        m, "cross_modal_attention_forward", with_inputs<decltype(&forward), Address, Address>(&forward),
        "Attention between pixels and words. A tensor is (address, batch stride, row stride), address 0 when "
        "it is not given; text_mask (batch, words) bool, or 0. image_out (batch, pixels, text_value_width) "
        "and text_out (batch, words, image_value_width) are contiguous and written; 0 without the values.",
        "image_out_ptr"_a, "text_out_ptr"_a);
    define(m, "cross_modal_attention_backward",
           with_inputs<decltype(&backward), const Argument&, const Argument&, Address, Address, Address,
                       Address, Address, Address>(&backward),
           "Gradients of cross_modal_attention_forward; those of the results have address 0 when there are "
           "none. The others are contiguous, shaped like their tensors and overwritten; address 0: that "
           "gradient is not wanted.",
           "grad_image_out"_a, "grad_text_out"_a, "grad_image_query_ptr"_a, "grad_text_key_ptr"_a,
           "grad_text_value_ptr"_a, "grad_text_query_ptr"_a, "grad_image_key_ptr"_a,
           "grad_image_value_ptr"_a);
}

}  // namespace magnet_fast
