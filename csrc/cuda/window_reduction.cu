// The last step of window attention's backward pass: the sums over all programs, in their order.
#include "cuda/primitives.cuh"
#include "cuda/window_attention.h"

namespace magnet_fast {
namespace cuda {
namespace {

MAGNET_FAST_DEVICE float sum_of_groups(const float* parts, int groups, int64_t stride) {
    double sum = 0.0;
    for (int group = 0; group < groups; ++group) sum += parts[group * stride];
    return static_cast<float>(sum);
}

MAGNET_FAST_KERNEL(kReductionThreads, 1)
window_reduction_kernel(WindowParams p) {
    const int64_t biases = p.grad_bias ? static_cast<int64_t>(p.entries) * p.heads : 0;
    const int64_t pads = p.grad_pad_qkv ? static_cast<int64_t>(3) * p.channels : 0;
    const int head_dim = p.channels / p.heads;
    for (int64_t i = block_index() * thread_count() + thread_index(); i < biases + pads;
         i += block_count() * thread_count()) {
        if (i < biases) {
            const int64_t head = i % p.heads, entry = i / p.heads;
            p.grad_bias[i] = sum_of_groups(p.bias_parts + head * p.entries + entry, p.groups,
                                           static_cast<int64_t>(p.heads) * p.entries);
        } else {
            const int64_t channel = i - biases, part = channel / p.channels - 1;
            const int64_t head = channel % p.channels / head_dim, c = channel % head_dim;
            // Padded queries are never computed.
            p.grad_pad_qkv[channel] =
                part < 0 ? 0.0f
                         : sum_of_groups(p.pad_parts + (head * 2 + part) * head_dim + c, p.groups,
                                         static_cast<int64_t>(p.heads) * 2 * head_dim);
        }
    }
}

}  // namespace

WindowKernel window_reduction() {
    return window_reduction_kernel;
}

}  // namespace cuda
}  // namespace magnet_fast
