// The part of the Python module that stands around an int8 product; see cpu_module.cpp.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/arguments.h"
#include "cpu/row_quantisation.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

/// Calls work(Element{}) with float or BFloat16; std::invalid_argument for others.
template <typename Work>
void with_quantised_element(const TensorView& view, const char* name, const Work& work) {
    if (view.dtype == Dtype::kFloat32) return work(float{});
    if (view.dtype == Dtype::kBFloat16) return work(BFloat16{});
    refuse(name, "dtype 0 (float32) or 1 (bfloat16)", static_cast<int>(view.dtype));
}

void to_bytes(const TensorView& x, const TensorView& bytes, const TensorView& scale,
              const TensorView& minimum, int64_t most, int64_t threads) {
    with_quantised_element(x, "x", [&](auto element) {
        using Element = decltype(element);
        check_tensor(x, "x", 2, x.dtype);
        check_dense(x, "x", 1);
        const int64_t rows = x.sizes[0], width = x.sizes[1];
        check_contiguous(bytes, "bytes", {rows, width}, Dtype::kByte);
        check_contiguous(scale, "scale", {rows}, Dtype::kFloat32);
        check_contiguous(minimum, "minimum", {rows}, Dtype::kFloat32);
        rows_to_bytes<Element>({rows, width, threads, static_cast<const Element*>(x.data), x.strides[0], most,
                                static_cast<uint8_t*>(bytes.data), static_cast<float*>(scale.data),
                                static_cast<float*>(minimum.data)});
    });
}

void to_rows(const TensorView& sums, const TensorView& scale, const TensorView& minimum,
             const TensorView& totals, const TensorView& bias, int activation, const TensorView& residual,
             const TensorView& y, int64_t threads) {
    with_quantised_element(y, "y", [&](auto element) {
        using Element = decltype(element);
        check_tensor(y, "y", 2, y.dtype);
        const int64_t rows = y.sizes[0], width = y.sizes[1];
        check_contiguous(y, "y", {rows, width}, y.dtype);
        check_contiguous(sums, "sums", {rows, width}, Dtype::kFloat32);
        check_contiguous(scale, "scale", {rows}, Dtype::kFloat32);
        check_contiguous(minimum, "minimum", {rows}, Dtype::kFloat32);
        check_contiguous(totals, "totals", {width}, Dtype::kFloat32);
        check_contiguous(bias, "bias", {width}, y.dtype, true);
        if (residual.given()) {
            check_tensor(residual, "residual", {rows, width}, y.dtype);
            check_dense(residual, "residual", 1);
        }
        sums_to_rows<Element>({rows, width, threads, static_cast<const float*>(sums.data),
                               static_cast<const float*>(scale.data), static_cast<const float*>(minimum.data),
                               static_cast<const float*>(totals.data), static_cast<const Element*>(bias.data),
                               static_cast<ChainActivation>(activation),
                               static_cast<const Element*>(residual.data), residual.strides[0],
                               static_cast<Element*>(y.data)});
    });
}

}  // namespace

void bind_row_quantisation(py::module_& m) {
    m.def(
        "rows_to_bytes", &to_bytes, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "x"_a, "bytes"_a,
        "scale"_a, "minimum"_a, "most"_a, "threads"_a,
        "x (rows, width) as minimum + scale * bytes, row by row; bytes 0 .. most. The scale of a row that is "
        "not finite is NaN. The width is a multiple of 16.");
    m.def("sums_to_rows", &to_rows, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "sums"_a,
          "scale"_a, "minimum"_a, "totals"_a, "bias"_a, "activation"_a, "residual"_a, "y"_a, "threads"_a,
          "y = activation(scale * sums + minimum * totals + bias), or plus the residual in place of an "
          "activation; activation 0 none, 1 gelu, 2 relu; bias and residual may be None.");
}

}  // namespace magnet_fast
