// The pixel contrastive loss's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "common/elements.h"
#include "cpu/pixel_contrastive_loss.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

void forward(Address features, const Strides& strides, Address inside, Address loss, Address statistics,
             int dtype, int64_t batch, int64_t pixels, int64_t channels, double temperature, bool normalize,
             int64_t threads) {
    with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        pixel_contrastive_forward<Element>({
            {batch, pixels, channels, temperature, normalize, threads},
            pointer<const Element>(features),
            {strides[0], strides[1], strides[2]},
            pointer<const bool>(inside),
            pointer<typename Computed<Element>::Real>(loss),
            pointer<typename Computed<Element>::Real>(statistics),
        });
    });
}

void backward(Address grad_loss, Address features, const Strides& strides, Address inside, Address statistics,
              Address grad_features, int dtype, int64_t batch, int64_t pixels, int64_t channels,
              double temperature, bool normalize, int64_t threads) {
    with_element(dtype, [&](auto element) {
        using Element = decltype(element);
        pixel_contrastive_backward<Element>({
            {batch, pixels, channels, temperature, normalize, threads},
            pointer<const typename Computed<Element>::Real>(grad_loss),
            pointer<const Element>(features),
            {strides[0], strides[1], strides[2]},
            pointer<const bool>(inside),
            pointer<const typename Computed<Element>::Real>(statistics),
            pointer<Element>(grad_features),
        });
    });
}

}  // namespace

void bind_pixel_contrastive_loss(py::module_& m) {
    m.def("pixel_contrastive_loss_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "features_ptr"_a, "features_strides"_a, "inside_ptr"_a, "loss_ptr"_a, "statistics_ptr"_a, "dtype"_a,
          "batch"_a, "pixels"_a, "channels"_a, "temperature"_a, "normalize"_a, "threads"_a,
          "Pixel contrastive loss. features (B, P, C) with strides (batch, pixel, channel), inside (B, P) "
          "bool contiguous, loss (B) written: float32, or float64 for float64 features; so are statistics "
          "(B, 4, P), for "
          "the backward pass.");
    m.def("pixel_contrastive_loss_backward", &backward, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "grad_loss_ptr"_a, "features_ptr"_a, "features_strides"_a, "inside_ptr"_a,
          "statistics_ptr"_a, "grad_features_ptr"_a, "dtype"_a, "batch"_a, "pixels"_a, "channels"_a,
          "temperature"_a, "normalize"_a, "threads"_a,
          "Gradient of pixel_contrastive_loss_forward, whose statistics are read. grad_loss (B) and "
          "grad_features (B, P, C) are "
          "contiguous, the second is overwritten.");
}

}  // namespace magnet_fast
