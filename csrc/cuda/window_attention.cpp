// Window attention's launchers: checks, the plan of a call, and the start of its kernels.
#include "cuda/window_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "common/window_index.h"

namespace magnet_fast {
namespace cuda {
namespace {

// A program gathers its bias once: it should walk over a few windows before another one is started.
constexpr int kWindowsOfProgram = 4;

void check_sizes(const WindowParams& p) {
    const int64_t map = static_cast<int64_t>(p.height) * p.width;  // < 2^60
    require(p.channels % p.heads == 0, "heads", "a divisor of " + std::to_string(p.channels) + " channels",
            p.heads);
    require(p.channels / p.heads <= kMostHeadDim, "heads",
            "heads of at most " + std::to_string(kMostHeadDim) + " channels", p.channels / p.heads);
    require(p.window_h <= kMostTokens && p.window_w <= kMostTokens && p.window_h * p.window_w <= kMostTokens,
            "window_h", "windows of at most " + std::to_string(kMostTokens) + " tokens", p.window_h);
    require(p.shift_h >= 0 && p.shift_h < p.window_h, "shift_h", "0 .. window_h - 1", p.shift_h);
    require(p.shift_w >= 0 && p.shift_w < p.window_w, "shift_w", "0 .. window_w - 1", p.shift_w);
    if (!std::isfinite(p.scale) || p.scale <= 0)
        throw std::invalid_argument("scale: expected a finite number above 0");
    constexpr int64_t kBytes = std::numeric_limits<int64_t>::max() / 8;
    require(map <= kBytes / (3 * static_cast<int64_t>(p.channels)) / std::max<int64_t>(1, p.batch), "qkv",
            "batch * height * width * 3 * channels numbers to be addressable", p.batch);
}

MapStrides strides_of(const TensorView& map) {
    return {map.strides[0], map.strides[1], map.strides[2]};
}

/// The call's parameters, checked.
WindowParams params_of(const WindowInputs& a) {
    constexpr int64_t kMost = int64_t{1} << 30;  // kernels compute coordinates in 32 bits
    check_kernel_dtype(a.qkv, "qkv");
    check_tensor(a.qkv, "qkv", 4, a.qkv.dtype);
    const int64_t* size = a.qkv.sizes;
    require(size[3] % 3 == 0, "qkv", "q, k and v in the last dimension, a multiple of 3", size[3]);
    for (int i = 0; i < 4; ++i)
        require(size[i] >= (i > 0) && size[i] < kMost, "qkv", "sizes of 1 .. 2^30 - 1", size[i]);
    const WindowSettings& settings = a.settings;
    const std::pair<const char*, int64_t> small[] = {
        {"heads", settings.heads}, {"window_h", settings.window_h}, {"window_w", settings.window_w}};
    for (const auto& [name, value] : small) require(value > 0 && value < kMost, name, "1 .. 2^30 - 1", value);
    for (const auto& [name, value] :
         {std::pair("shift_h", settings.shift_h), std::pair("shift_w", settings.shift_w)})
        require(value >= 0 && value < kMost, name, "0 .. 2^30 - 1", value);
    WindowParams p{};
    p.batch = size[0];
    p.height = static_cast<int32_t>(size[1]);
    p.width = static_cast<int32_t>(size[2]);
    p.channels = static_cast<int32_t>(size[3] / 3);
    p.heads = static_cast<int32_t>(settings.heads);
    p.window_h = static_cast<int32_t>(settings.window_h);
    p.window_w = static_cast<int32_t>(settings.window_w);
    p.shift_h = static_cast<int32_t>(settings.shift_h);
    p.shift_w = static_cast<int32_t>(settings.shift_w);
    p.scale = static_cast<float>(settings.scale);
    p.pad_first = settings.pad_first;
    p.products = a.products;
    check_sizes(p);
    check_dense(a.qkv, "qkv", 3);
    const int64_t entries = (2 * settings.window_h - 1) * (2 * settings.window_w - 1);
    check_contiguous(a.bias, "bias", {entries, settings.heads}, Dtype::kFloat32);
    check_contiguous(a.pad_qkv, "pad_qkv", {size[3]}, a.qkv.dtype, /*may_be_missing=*/true);
    p.qkv = a.qkv.data;
    p.qkv_strides = strides_of(a.qkv);
    p.bias = static_cast<const float*>(a.bias.data);
    p.pad_qkv = a.pad_qkv.data;
    return p;
}

/// A map that is read may have any strides; one that is written must at least step over its channels.
void check_map(const WindowParams& p, const TensorView& map, const char* name, int64_t channels, Dtype dtype,
               bool written) {
    check_tensor(map, name, {p.batch, p.height, p.width, channels}, dtype);
    check_dense(map, name, 3);
    for (int i = 0; written && i < 3; ++i)
        if (map.sizes[i] > 1 && map.strides[i] < channels)
            refuse(name, "strides of at least " + std::to_string(channels), map.strides[i]);
}

/// With what the backward pass takes beside them.
WindowParams params_of(const WindowInputs& a, const WindowGradients& grads) {
    WindowParams p = params_of(a);
    const Dtype dtype = a.qkv.dtype;
    check_map(p, grads.grad_out, "grad_out", p.channels, dtype, /*written=*/false);
    if (grads.qkv.given()) check_map(p, grads.qkv, "grad_qkv", a.qkv.sizes[3], dtype, /*written=*/true);
    check_contiguous(grads.bias, "grad_bias", {a.bias.sizes[0], p.heads}, Dtype::kFloat32,
                     /*may_be_missing=*/true);
    check_contiguous(grads.pad_qkv, "grad_pad_qkv", {a.qkv.sizes[3]}, Dtype::kFloat32,
                     /*may_be_missing=*/true);
    p.grad_out = grads.grad_out.data;
    p.grad_out_strides = strides_of(grads.grad_out);
    p.grad_qkv = grads.qkv.data;
    p.grad_qkv_strides = strides_of(grads.qkv);
    p.grad_bias = static_cast<float*>(grads.bias.data);
    p.grad_pad_qkv = static_cast<float*>(grads.pad_qkv.data);
    return p;
}

/// Whether a tensor's heads begin at multiples of 16 bytes; null: it does not matter.
bool aligned(const void* pointer, const MapStrides& strides, int64_t bytes) {
    if (!pointer) return true;
    return (reinterpret_cast<uintptr_t>(pointer) | static_cast<uintptr_t>(strides.batch * bytes) |
            static_cast<uintptr_t>(strides.height * bytes) | static_cast<uintptr_t>(strides.width * bytes)) %
               16 ==
           0;
}

/// The kernels' width of a head: the next one that there is.
int width_of(const WindowParams& p) {
    const int head_dim = p.channels / p.heads;
    return head_dim <= 16 ? 16 : head_dim <= 32 ? 32 : 64;
}

/// As few warps as take no more turns than `most` would, each with 16 tokens a turn.
int warps_of(const WindowParams& p, int most) {
    const int blocks = (p.tokens + 15) / 16, turns = (blocks + most - 1) / most;
    return (blocks + turns - 1) / turns;
}

/// Fills in what both passes need.
void plan(WindowParams& p, int64_t bytes) {
    p.padded_h = padded_extent(p.height, p.window_h);
    p.padded_w = padded_extent(p.width, p.window_w);
    p.rows = p.padded_h / p.window_h;
    p.columns = p.padded_w / p.window_w;
    p.tokens = p.window_h * p.window_w;
    p.entries = (2 * p.window_h - 1) * (2 * p.window_w - 1);
    const int64_t each = static_cast<int64_t>(p.rows) * p.columns;
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    require(each <= kMost && p.batch * each <= kMost, "batch", "fewer than 2^31 windows", p.batch);
    p.windows = static_cast<int32_t>(p.batch * each);
    const bool heads_aligned = p.channels / p.heads * bytes % 16 == 0;
    p.aligned_in = heads_aligned && aligned(p.qkv, p.qkv_strides, bytes) && aligned(p.pad_qkv, {}, bytes) &&
                   aligned(p.grad_out, p.grad_out_strides, bytes);
    p.aligned_out = heads_aligned && aligned(p.out, p.out_strides, bytes) &&
                    aligned(p.grad_qkv, p.grad_qkv_strides, bytes);
}

/// Shares of the windows: enough to fill the device once, unless there are few windows.
void choose_groups(WindowParams& p, int programs_at_once) {
    const int64_t filling = (static_cast<int64_t>(programs_at_once) + p.heads - 1) / p.heads;
    const int64_t most = (static_cast<int64_t>(p.windows) + kWindowsOfProgram - 1) / kWindowsOfProgram;
    // Few windows: rather a program for each than idle multiprocessors.
    p.groups = static_cast<int32_t>(
        std::min<int64_t>(filling, std::max<int64_t>(most, std::min<int64_t>(p.windows, filling))));
}

WindowKernel forward_kernel(Dtype dtype, int width, int tiles) {
    switch (dtype) {
        case Dtype::kBFloat16:
            return WindowKernels<BFloat16>::forward(width, tiles);
        case Dtype::kFloat16:
            return WindowKernels<Float16>::forward(width, tiles);
        default:
            return WindowKernels<float>::forward(width, tiles);
    }
}

WindowKernel backward_kernel(Dtype dtype, int width) {
    switch (dtype) {
        case Dtype::kBFloat16:
            return WindowKernels<BFloat16>::backward(width);
        case Dtype::kFloat16:
            return WindowKernels<Float16>::backward(width);
        default:
            return WindowKernels<float>::backward(width);
    }
}

/// What the backward pass needs beside WindowParams.
struct BackwardPlan {
    WindowKernel kernel;
    int threads;
    int shared;
    int64_t sums, bias_parts, pad_parts;  // numbers in the workspace
    int64_t bytes() const { return (sums + bias_parts + pad_parts) * 4; }
};

BackwardPlan plan_backward(WindowParams& p, Dtype dtype, const Device& device) {
    const int bytes = static_cast<int>(bytes_of(dtype)), width = width_of(p);
    plan(p, bytes);
    BackwardPlan result{};
    result.kernel = backward_kernel(dtype, width);
    const int warps = warps_of(p, backward_warps(width, bytes));
    result.threads = warps * 32;
    const auto shared = [&](bool sums) {
        return window_backward_layout(p.tokens, p.entries, warps, width, bytes, sums).total;
    };
    p.sums_in_shared = p.grad_bias && shared(true) <= device.shared_bytes;
    result.shared = shared(p.sums_in_shared);
    require(result.shared <= device.shared_bytes, "window_h",
            "a window that fits in the device's shared memory", p.window_h);
    choose_groups(p, device.programs_at_once(result.kernel, result.threads, result.shared));
    const int64_t programs = static_cast<int64_t>(p.groups) * p.heads;
    result.sums = p.grad_bias && !p.sums_in_shared ? programs * window_sums(p.tokens) : 0;
    result.bias_parts = p.grad_bias ? programs * p.entries : 0;
    result.pad_parts = p.grad_pad_qkv ? programs * 2 * (p.channels / p.heads) : 0;
    return result;
}

}  // namespace

void window_attention_forward(const WindowInputs& inputs, const TensorView& out, const Place& place) {
    const Dtype dtype = inputs.qkv.dtype;
    WindowParams p = params_of(inputs);
    check_map(p, out, "out", p.channels, dtype, /*written=*/true);
    if (p.batch == 0) return;
    p.out = out.data;
    p.out_strides = strides_of(out);

    const int bytes = static_cast<int>(bytes_of(dtype));
    const Device device(place);
    plan(p, bytes);
    const int width = width_of(p), tiles = forward_tiles(p.tokens, bytes == 4);
    const WindowKernel kernel = forward_kernel(dtype, width, tiles);
    const int warps = warps_of(p, forward_warps(tiles));
    const int shared = window_forward_layout(p.tokens, p.entries, warps, width, bytes).total;
    require(shared <= device.shared_bytes, "window_h", "a window that fits in the device's shared memory",
            p.window_h);
    choose_groups(p, device.programs_at_once(kernel, warps * 32, shared));
    device.start(kernel, static_cast<int64_t>(p.groups) * p.heads, warps * 32, shared, p);
}

int64_t window_attention_workspace(const WindowInputs& inputs, const WindowGradients& gradients,
                                   const Place& place) {
    WindowParams p = params_of(inputs, gradients);
    if (p.batch == 0) return 0;
    return plan_backward(p, inputs.qkv.dtype, Device(place)).bytes();
}

void window_attention_backward(const WindowInputs& inputs, const WindowGradients& gradients,
                               const Place& place, const TensorView& workspace) {
    WindowParams p = params_of(inputs, gradients);
    require(p.batch > 0, "qkv", "a batch of 1 or more", p.batch);

    const Device device(place);
    const BackwardPlan plan = plan_backward(p, inputs.qkv.dtype, device);
    check_workspace(workspace, plan.bytes(), "window_attention_workspace");
    p.bias_sums = static_cast<float*>(workspace.data);
    p.bias_parts = p.bias_sums + plan.sums;
    p.pad_parts = p.bias_parts + plan.bias_parts;
    device.start(plan.kernel, static_cast<int64_t>(p.groups) * p.heads, plan.threads, plan.shared, p);
    if (!p.grad_bias && !p.grad_pad_qkv) return;
    const int64_t numbers = static_cast<int64_t>(p.entries) * p.heads + 3 * static_cast<int64_t>(p.channels);
    device.start(window_reduction(), (numbers + kReductionThreads - 1) / kReductionThreads, kReductionThreads,
                 0, p);
}

}  // namespace cuda
}  // namespace magnet_fast
