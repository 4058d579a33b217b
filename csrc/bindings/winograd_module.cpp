// The 3 x 3 convolution's part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/winograd.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

/// Calls work(Element{}) with float or double; std::invalid_argument for others.
template <typename Work>
void with_full_element(const TensorView& view, const char* name, const Work& work) {
    if (view.dtype == Dtype::kFloat32) return work(float{});
    if (view.dtype == Dtype::kFloat64) return work(double{});
    refuse(name, "dtype 0 (float32) or 3 (float64)", static_cast<int>(view.dtype));
}

template <typename Element>
ChannelsLast<Element> map_of(const TensorView& view) {
    return {static_cast<Element*>(view.data), view.strides[0], view.strides[1], view.strides[2]};
}

int64_t step(const TensorView& weight) {
    int64_t found = 0;
    with_full_element(weight, "weight", [&](auto element) { found = winograd_step<decltype(element)>(); });
    return found;
}

void pack(const TensorView& weight, const TensorView& packed) {
    with_full_element(weight, "weight", [&](auto element) {
        using Element = decltype(element);
        check_tensor(weight, "weight", 4, weight.dtype);
        const int64_t out = weight.sizes[0], in = weight.sizes[1];
        check_contiguous(weight, "weight", {out, in, 3, 3}, weight.dtype);
        check_contiguous(packed, "packed", {kWinogradPositions, in, out}, weight.dtype);
        winograd_pack(static_cast<const Element*>(weight.data), in, out, static_cast<Element*>(packed.data));
    });
}

void forward(const TensorView& x, const TensorView& packed, const TensorView& bias,
             const TensorView& residual, bool rectify, const TensorView& y, int64_t threads) {
    with_full_element(x, "x", [&](auto element) {
        using Element = decltype(element);
        check_tensor(x, "x", 4, x.dtype);
        check_dense(x, "x", 3);
        const int64_t images = x.sizes[0], height = x.sizes[1], width = x.sizes[2], in = x.sizes[3];
        check_tensor(y, "y", 4, x.dtype);
        const int64_t out = y.sizes[3];
        check_contiguous(y, "y", {images, height, width, out}, x.dtype);
        check_contiguous(packed, "packed", {kWinogradPositions, in, out}, x.dtype);
        check_contiguous(bias, "bias", {out}, x.dtype, true);
        if (residual.given()) {
            check_tensor(residual, "residual", {images, height, width, out}, x.dtype);
            check_dense(residual, "residual", 3);
        }
        winograd_convolution<Element>(
            {images, height, width, in, out, map_of<const Element>(x),
             static_cast<const Element*>(packed.data), static_cast<const Element*>(bias.data),
             map_of<const Element>(residual), rectify, map_of<Element>(y)},
            threads);
    });
}

}  // namespace

void bind_winograd(py::module_& m) {
    m.def("winograd_step", &step, py::kw_only(), "weight"_a,
          "What input and output channels must be multiples of, at the SIMD level in use, for a weight's "
          "dtype.");
    m.def("winograd_pack", &pack, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "weight"_a,
          "packed"_a,
          "weight (outputs, inputs, 3, 3), contiguous, to packed (16, inputs, outputs), contiguous, aligned "
          "to 64 "
          "bytes, in the layout of the SIMD level in use.");
    m.def("winograd_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "x"_a,
          "packed"_a, "bias"_a, "residual"_a, "rectify"_a, "y"_a, "threads"_a,
          "A 3 x 3 convolution of stride, dilation and padding 1. x (B, H, W, inputs), channels side by "
          "side; bias "
          "(outputs) or None; residual (B, H, W, outputs), channels side by side, or None, is added; "
          "rectify: then "
          "ReLU; y (B, H, W, outputs), contiguous, is written.");
}

}  // namespace magnet_fast
