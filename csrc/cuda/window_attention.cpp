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
    constexpr int64_t kMost = int64_t{1} << 30;  // kernels compute coordinates in 32 bits
    const std::pair<const char*, int64_t> positive[] = {
        {"height", p.height}, {"width", p.width},       {"channels", p.channels},
        {"heads", p.heads},   {"window_h", p.window_h}, {"window_w", p.window_w},
    };
    for (const auto& [name, value] : positive)
        require(value > 0 && value < kMost, name, "1 .. 2^30 - 1", value);
    require(p.batch >= 0 && p.batch < kMost, "batch", "0 .. 2^30 - 1", p.batch);
    require(p.channels % p.heads == 0, "channels", "a multiple of heads (" + std::to_string(p.heads) + ")",
            p.channels);
    require(p.channels / p.heads <= kMostHeadDim, "channels",
            "heads of at most " + std::to_string(kMostHeadDim) + " channels", p.channels);
    require(p.window_h <= kMostTokens && p.window_w <= kMostTokens && p.window_h * p.window_w <= kMostTokens,
            "window_h", "windows of at most " + std::to_string(kMostTokens) + " tokens", p.window_h);
    require(p.shift_h >= 0 && p.shift_h < p.window_h, "shift_h", "0 .. window_h - 1", p.shift_h);
    require(p.shift_w >= 0 && p.shift_w < p.window_w, "shift_w", "0 .. window_w - 1", p.shift_w);
    if (!std::isfinite(p.scale) || p.scale <= 0)
        throw std::invalid_argument("scale: expected a finite number above 0");
    const int64_t map = static_cast<int64_t>(p.height) * p.width;  // < 2^60
    constexpr int64_t kBytes = std::numeric_limits<int64_t>::max() / 8;
    require(map <= kBytes / (3 * static_cast<int64_t>(p.channels)) / std::max<int64_t>(1, p.batch), "batch",
            "batch * height * width * 3 * channels numbers to be addressable", p.batch);
}

void check_strides(const WindowParams& p, const MapStrides& strides, int64_t least, const std::string& name) {
    const std::pair<int64_t, int64_t> axes[] = {
        {strides.batch, p.batch}, {strides.height, p.height}, {strides.width, p.width}};
    for (const auto& [stride, extent] : axes)
        require(extent <= 1 || stride >= least, name, "strides of at least " + std::to_string(least), stride);
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

void window_attention_forward(WindowParams p, Dtype dtype, const Place& place) {
    const int bytes = static_cast<int>(bytes_of(dtype));
    check_sizes(p);
    check_strides(p, p.qkv_strides, 0, "qkv_strides");
    check_strides(p, p.out_strides, p.channels, "out_strides");
    if (p.batch == 0) return;
    check_address(p.qkv, bytes, "qkv_ptr");
    check_address(p.bias, 4, "bias_ptr");
    if (p.pad_qkv) check_address(p.pad_qkv, bytes, "pad_qkv_ptr");
    check_address(p.out, bytes, "out_ptr");

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

int64_t window_attention_workspace(WindowParams p, Dtype dtype, const Place& place) {
    check_sizes(p);
    if (p.batch == 0) return 0;
    return plan_backward(p, dtype, Device(place)).bytes();
}

void window_attention_backward(WindowParams p, Dtype dtype, const Place& place, void* workspace,
                               int64_t workspace_bytes) {
    const int bytes = static_cast<int>(bytes_of(dtype));
    check_sizes(p);
    check_strides(p, p.grad_out_strides, 0, "grad_out_strides");
    check_strides(p, p.qkv_strides, 0, "qkv_strides");
    if (p.grad_qkv)
        check_strides(p, p.grad_qkv_strides, 3 * static_cast<int64_t>(p.channels), "grad_qkv_strides");
    require(p.batch > 0, "batch", "1 or more", p.batch);
    check_address(p.grad_out, bytes, "grad_out_ptr");
    check_address(p.qkv, bytes, "qkv_ptr");
    check_address(p.bias, 4, "bias_ptr");
    if (p.pad_qkv) check_address(p.pad_qkv, bytes, "pad_qkv_ptr");
    if (p.grad_qkv) check_address(p.grad_qkv, bytes, "grad_qkv_ptr");
    if (p.grad_bias) check_address(p.grad_bias, 4, "grad_bias_ptr");
    if (p.grad_pad_qkv) check_address(p.grad_pad_qkv, 4, "grad_pad_ptr");

    const Device device(place);
    const BackwardPlan plan = plan_backward(p, dtype, device);
    require(workspace_bytes >= plan.bytes(), "workspace_bytes",
            "at least " + std::to_string(plan.bytes()) + ", see window_attention_workspace", workspace_bytes);
    if (plan.bytes() > 0) check_address(workspace, 16, "workspace_ptr");
    p.bias_sums = static_cast<float*>(workspace);
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
