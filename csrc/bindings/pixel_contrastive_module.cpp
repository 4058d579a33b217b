// The pixel contrastive loss's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/pixel_contrastive_loss.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

void forward(const TensorView& features, const TensorView& inside, const TensorView& loss,
             const TensorView& statistics, double temperature, bool normalize, int64_t threads) {
    pixel_contrastive_forward({features, inside, temperature, normalize, threads}, loss, statistics);
}

void backward(const TensorView& grad_loss, const TensorView& features, const TensorView& inside,
              const TensorView& statistics, const TensorView& grad_features, double temperature,
              bool normalize, int64_t threads) {
    pixel_contrastive_backward({features, inside, temperature, normalize, threads}, grad_loss, statistics,
                               grad_features);
}

}  // namespace

void bind_pixel_contrastive_loss(py::module_& m) {
    m.def("pixel_contrastive_loss_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(),
          "features"_a, "inside"_a, "loss"_a, "statistics"_a, "temperature"_a, "normalize"_a, "threads"_a,
          "Pixel contrastive loss. features (B, P, C), inside (B, P) bool contiguous, loss (B) written: "
          "float32, or float64 for float64 features; so are statistics (B, 4, P), for the backward pass.");
    m.def("pixel_contrastive_loss_backward", &backward, py::call_guard<py::gil_scoped_release>(),
          py::kw_only(), "grad_loss"_a, "features"_a, "inside"_a, "statistics"_a, "grad_features"_a,
          "temperature"_a, "normalize"_a, "threads"_a,
          "Gradient of pixel_contrastive_loss_forward, whose statistics are read. grad_loss (B) and "
          "grad_features (B, P, C) are contiguous, the second is overwritten.");
}

}  // namespace magnet_fast
