// What the bindings share: how tensors and addresses come from Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "common/tensor_view.h"
#include "common/window_settings.h"

namespace magnet_fast {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

/// magnet_fast.ops._window_settings.WindowSettings as Python passes it.
using WindowTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, double, bool>;

inline WindowSettings settings_of(const WindowTuple& tuple) {
    const auto [heads, window_h, window_w, shift_h, shift_w, scale, pad_first] = tuple;
    return {heads, window_h, window_w, shift_h, shift_w, scale, pad_first};
}

}  // namespace magnet_fast

namespace pybind11 {
namespace detail {

/// What magnet_fast.ops._view.view returns: None, or (address, sizes, strides, dtype).
template <>
struct type_caster<magnet_fast::TensorView> {
    PYBIND11_TYPE_CASTER(magnet_fast::TensorView, const_name("tuple[int, tuple, tuple, int] | None"));

    bool load(handle source, bool) {
        value = {};
        if (source.is_none()) return true;
        PyObject* tuple = source.ptr();
        if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 4) return false;
        PyObject *sizes = PyTuple_GET_ITEM(tuple, 1), *strides = PyTuple_GET_ITEM(tuple, 2);
        if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
        const Py_ssize_t count = PyTuple_GET_SIZE(sizes);
        if (count < 1 || count > magnet_fast::TensorView::kMostDimensions) return false;
        if (PyTuple_GET_SIZE(strides) != count) return false;
        value.dimensions = static_cast<int>(count);
        value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
        for (Py_ssize_t i = 0; i < count; ++i) {
            value.sizes[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
            value.strides[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        }
        const long dtype = PyLong_AsLong(PyTuple_GET_ITEM(tuple, 3));
        if (PyErr_Occurred()) {  // no number, or too large a one
            PyErr_Clear();
            return false;
        }
        value.dtype = static_cast<magnet_fast::Dtype>(dtype);
        return static_cast<int>(value.dtype) == dtype;
    }
};

}  // namespace detail
}  // namespace pybind11
