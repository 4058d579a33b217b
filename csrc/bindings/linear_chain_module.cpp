// The chain of Linear layers' part of the Python module; see cpu_module.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "common/elements.h"
#include "cpu/linear_chain.h"

namespace py = pybind11;
using py::literals::operator""_a;

namespace magnet_fast {
namespace {

using Norm = std::tuple<Address, Address, double>;
using Layer = std::tuple<int64_t, int64_t, Address, Address, int, int64_t, Norm, Norm>;

template <typename Element>
ChainNorm<Element> norm_of(const Norm& norm) {
    const auto& [weight, bias, epsilon] = norm;
    return {pointer<const Element>(weight), pointer<const Element>(bias), epsilon};
}

int64_t step(int dtype) {
    int64_t result = 0;
    with_element(dtype, [&](auto element) { result = chain_step<decltype(element)>(); });
    return result;
}

int64_t packed_bytes(int dtype, int64_t in, int64_t out) {
    int64_t result = 0;
    with_element(dtype, [&](auto element) { result = chain_packed_bytes<decltype(element)>(in, out); });
    return result;
}

void pack(Address weight, int dtype, int64_t in, int64_t out, Address packed) {
    with_element(dtype, [&](auto element) {
        pack_chain_weight(pointer<const decltype(element)>(weight), in, out, pointer<void>(packed));
    });
}

/// (rows, width), each row contiguous.
void check_rows(const TensorView& view, const char* name, int64_t rows, int64_t width, Dtype dtype) {
    check_tensor(view, name, {rows, width}, dtype);
    check_dense(view, name, 1);
}

void forward(const TensorView& x, const TensorView& residual, const TensorView& y,
             const std::vector<Layer>& layers, int64_t threads) {
    check_dtype(x, "x");
    check_tensor(x, "x", 2, x.dtype);
    require(!layers.empty(), "layers", "at least one", 0);
    const int64_t rows = x.sizes[0];
    check_rows(x, "x", rows, std::get<0>(layers.front()), x.dtype);
    check_contiguous(y, "y", {rows, std::get<1>(layers.back())}, x.dtype);
    for (const Layer& layer : layers)
        if (std::get<5>(layer) == kGivenResidual)
            check_rows(residual, "residual", rows, std::get<1>(layer), x.dtype);
    with_element(x.dtype, [&](auto element) {
        using Element = decltype(element);
        LinearChain<Element> chain{rows,
                                   threads,
                                   static_cast<const Element*>(x.data),
                                   x.strides[0],
                                   static_cast<const Element*>(residual.data),
                                   residual.strides[0],
                                   static_cast<Element*>(y.data),
                                   {}};
        for (const auto& [in, out, weight, bias, activation, from, before, after] : layers)
            chain.layers.push_back({in, out, pointer<const void>(weight), pointer<const Element>(bias),
                                    static_cast<ChainActivation>(activation), from, norm_of<Element>(before),
                                    norm_of<Element>(after)});
        linear_chain(chain);
    });
}

}  // namespace

void bind_linear_chain(py::module_& m) {
    m.def("linear_chain_step", &step, py::kw_only(), "dtype"_a,
          "What all layers' inputs and outputs must be multiples of, at the SIMD level in use.");
    m.def("linear_chain_packed_bytes", &packed_bytes, py::kw_only(), "dtype"_a, "inputs"_a, "outputs"_a,
          "Bytes of a packed weight.");
    m.def("linear_chain_pack", &pack, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "weight_ptr"_a,
          "dtype"_a, "inputs"_a, "outputs"_a, "packed_ptr"_a,
          "weight (outputs, inputs), contiguous, to the layout of the SIMD level in use; packed is aligned "
          "to 64 bytes.");
    m.def("linear_chain_forward", &forward, py::call_guard<py::gil_scoped_release>(), py::kw_only(), "x"_a,
          "residual"_a, "y"_a, "layers"_a, "threads"_a,
          "Linear layers one after the other. x (rows, inputs of the first), residual (rows, outputs of the "
          "layer that wants it) or None, y (rows, outputs of the last) contiguous and written. A layer is "
          "(inputs, outputs, packed weight, bias or 0, activation 0 none 1 gelu 2 relu, residual -2 none -1 "
          "the given one or an earlier layer's index, norm before, norm after); a norm is (weight or 0, bias "
          "or 0, epsilon, negative for none). Weights, biases and norms are given by their addresses.");
}

}  // namespace magnet_fast
