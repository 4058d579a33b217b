// Cross-modal attention's part of the Python module; see cuda_module.cpp.
#include <pybind11/pybind11.h>

#include "bindings/arguments.h"
#include "cuda/cross_modal_attention.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

/// A function of Python's arguments that every call has, followed by More.
template <typename Result, typename... More>
auto with_inputs(Result (*call)(const CrossModalViews&, Float32Products, const cuda::Place&,
                                const More&...)) {
    return [call](const TensorView& image_query, const TensorView& text_key, const TensorView& text_value,
                  const TensorView& text_query, const TensorView& image_key, const TensorView& image_value,
                  const TensorView& text_mask, int64_t heads, double scale, bool tf32, int device,
                  Address stream, const More&... more) {
        return call({{image_query, text_key, text_value, text_query, image_key, image_value},
                     text_mask,
                     heads,
                     scale},
                    tf32 ? Float32Products::kTf32 : Float32Products::kExact, {device, pointer<void>(stream)},
                    more...);
    };
}

int64_t workspace_bytes(const CrossModalViews& views, Float32Products, const cuda::Place& place) {
    return cuda::cross_modal_attention_workspace(views, place);
}

void backward(const CrossModalViews& views, Float32Products products, const cuda::Place& place,
              const TensorView& grad_image_out, const TensorView& grad_text_out,
              const TensorView& grad_image_query, const TensorView& grad_text_key,
              const TensorView& grad_text_value, const TensorView& grad_text_query,
              const TensorView& grad_image_key, const TensorView& grad_image_value,
              const TensorView& workspace) {
    cuda::cross_modal_attention_backward(
        views, products, place, grad_image_out, grad_text_out,
        {grad_image_query, grad_text_key, grad_text_value, grad_text_query, grad_image_key, grad_image_value},
        workspace);
}

/// Defines a function with the names of the common arguments and more.
template <typename Call, typename... Names>
void define(py::module_& m, const char* name, const Call& call, const char* text, const Names&... names) {
    m.def(name, with_inputs(call), py::call_guard<py::gil_scoped_release>(), py::kw_only(), "image_query"_a,
          "text_key"_a, "text_value"_a, "text_query"_a, "image_key"_a, "image_value"_a, "text_mask"_a,
          "heads"_a, "scale"_a, "tf32"_a, "device"_a, "stream"_a, names..., text);
}

}  // namespace

void bind_cuda_cross_modal_attention(py::module_& m) {
    define(m, "cross_modal_attention_workspace", &workspace_bytes,
           "Bytes of device memory that either pass of these tensors needs.");
    define(
        m, "cross_modal_attention_forward", &cuda::cross_modal_attention_forward,
        "Attention between pixels and words. image_* (batch, pixels, width), text_* (batch, words, width), "
        "None for those that the form does not have; text_mask (batch, words) bool, or None. image_out and "
        "text_out are contiguous and written; None without the values.",
        "image_out"_a, "text_out"_a, "workspace"_a);
    define(m, "cross_modal_attention_backward", &backward,
           "Gradients of cross_modal_attention_forward; those of the results are None when there are none. "
           "The others are contiguous, shaped like their tensors and overwritten; None: that gradient is not "
           "wanted.",
           "grad_image_out"_a, "grad_text_out"_a, "grad_image_query"_a, "grad_text_key"_a,
           "grad_text_value"_a, "grad_text_query"_a, "grad_image_key"_a, "grad_image_value"_a, "workspace"_a);
}

}  // namespace magnet_fast
