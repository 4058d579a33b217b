// All bindings of the emulated extension in one: to parse pybind11 takes most of the time of each. Their
// files name functions alike, which they may when each is compiled alone.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings/arguments.h"
#include "cuda/cross_modal_attention.h"
#include "cuda/deformable_attention.h"
#include "cuda/window_attention.h"

#define backward cross_modal_backward
#define workspace_bytes cross_modal_workspace_bytes
#include "bindings/cuda_cross_modal.cpp"
#undef backward
#undef workspace_bytes

#define forward deformable_forward
#define backward deformable_backward
#define workspace_bytes deformable_workspace_bytes
#include "bindings/cuda_deformable.cpp"
#undef forward
#undef backward
#undef workspace_bytes

#include "bindings/cuda_module.cpp"
#include "bindings/cuda_window.cpp"
