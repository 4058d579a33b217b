// Python module magnet_fast._cuda: declarations and exports only.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/launch.h"

namespace py = pybind11;
using namespace magnet_fast;
using py::literals::operator""_a;

namespace magnet_fast {
// Each in the file of its operator, cuda_*.cpp.
void bind_cuda_cross_modal_attention(py::module_& m);
void bind_cuda_deformable_attention(py::module_& m);
void bind_cuda_window_attention(py::module_& m);
}  // namespace magnet_fast

PYBIND11_MODULE(MAGNET_FAST_MODULE, m) {
    m.doc() =
        "CUDA operators. A tensor is (address on the GPU, sizes, strides in elements, dtype), where dtype is "
        "0 "
        "(float32), 1 (bfloat16), 2 (float16), 4 (bool) or 5 (uint8); None is a tensor that is not there. "
        "device is CUDA's number and stream a cudaStream_t as an integer. Sizes, strides and dtypes are "
        "checked here: ValueError names the argument; RuntimeError says what CUDA reports, such as a missing "
        "driver. Calls start kernels and return; the caller keeps the tensors alive until the stream has "
        "done "
        "them.";

    bind_cuda_cross_modal_attention(m);
    bind_cuda_deformable_attention(m);
    bind_cuda_window_attention(m);
#if !defined(MAGNET_FAST_EMULATE_CUDA)
    m.def("device_status", &cuda::device_status, "device"_a,
          "None when the kernels can run on this device, else the reason why not.");
#endif
}
