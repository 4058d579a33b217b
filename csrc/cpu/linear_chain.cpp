#include "cpu/linear_chain.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cpu/launch.h"

namespace magnet_fast {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;

template <typename Element>
void check_layer_sizes(int64_t in, int64_t out) {
    const int64_t step = chain_step<Element>();
    for (const auto& [name, value] : {std::pair{"in", in}, std::pair{"out", out}}) {
        require(value > 0 && value < kMost, name, "1 .. 2^31 - 1", value);
        require(value % step == 0, name, "a multiple of " + std::to_string(step), value);
    }
}

template <typename Element>
void check_norm(const ChainNorm<Element>& norm, const std::string& name) {
    if (std::isnan(norm.epsilon)) throw std::invalid_argument(name + ": expected a number, got nan");
    if (norm.weight) check_address(norm.weight, name + ".weight");
    if (norm.bias) check_address(norm.bias, name + ".bias");
}

template <typename Element>
void check(const LinearChain<Element>& a) {
    require(a.rows >= 0 && a.rows < kMost, "rows", "0 .. 2^31 - 1", a.rows);
    require(a.threads > 0 && a.threads <= 4096, "threads", "1 .. 4096", a.threads);
    require(!a.layers.empty(), "layers", "at least one", 0);
    const int64_t count = static_cast<int64_t>(a.layers.size());
    for (int64_t i = 0; i < count; ++i) {
        const ChainLayer<Element>& layer = a.layers[i];
        const std::string name = "layers[" + std::to_string(i) + "]";
        check_layer_sizes<Element>(layer.in, layer.out);
        if (i > 0)
            require(layer.in == a.layers[i - 1].out, name + ".in", "the outputs of the layer before it",
                    layer.in);
        check_address(static_cast<const Element*>(layer.weight), name + ".weight");
        const int64_t misaligned = reinterpret_cast<uintptr_t>(layer.weight) % 64;
        require(misaligned == 0, name + ".weight", "an address aligned to 64 bytes", misaligned);
        if (layer.bias) check_address(layer.bias, name + ".bias");
        const int activation = static_cast<int>(layer.activation);
        require(activation >= 0 && activation <= 2, name + ".activation", "0 (none), 1 (gelu) or 2 (relu)",
                activation);
        require(layer.residual >= kNoResidual && layer.residual < i, name + ".residual",
                "-2 (none), -1 (the given one) or an earlier layer", layer.residual);
        if (layer.residual >= 0)
            require(a.layers[layer.residual].out == layer.out, name + ".residual",
                    "a layer of as many outputs", layer.residual);
        if (layer.residual == kGivenResidual && a.rows > 0) {
            check_address(a.residual, "residual");
            require(a.residual_row >= 0 && a.residual_row < kMost, "residual_row", "0 .. 2^31 - 1",
                    a.residual_row);
        }
        require(layer.residual == kNoResidual || activation == 0, name + ".activation",
                "0 where there is a residual", activation);
        check_norm(layer.before, name + ".before");
        check_norm(layer.after, name + ".after");
    }
    if (a.rows == 0) return;
    require(a.x_row >= 0 && a.x_row < kMost, "x_row", "0 .. 2^31 - 1", a.x_row);
    check_address(a.x, "x");
    check_address(a.y, "y");
    if (sizeof(Element) == 2) {
        require(a.x_row % 2 == 0, "x_row", "an even number of 16-bit elements", a.x_row);
        const int64_t misaligned = reinterpret_cast<uintptr_t>(a.x) % 4;
        require(misaligned == 0, "x", "an address aligned to 4 bytes", misaligned);
    }
}

/// How the rows, and if there are few of them the outputs of a single layer, are shared out.
struct Shares {
    int64_t chunk, chunks;    // rows together, and how often
    int64_t panels, columns;  // of the layer together, and how often
};

template <typename Element>
Shares share_out(const LinearChain<Element>& a, const ChainKernels<Element>& kernels) {
    int64_t widest = 1;
    for (const auto& layer : a.layers) widest = std::max(widest, layer.in);
    const int64_t most = kernels.chunk(widest);
    int64_t chunks = (a.rows + most - 1) / most;
    if (chunks > 1) chunks = (chunks + a.threads - 1) / a.threads * a.threads;
    const int64_t chunk = (a.rows + chunks - 1) / chunks;
    chunks = (a.rows + chunk - 1) / chunk;
    const ChainLayer<Element>& layer = a.layers.front();
    const int64_t all = (layer.out + kernels.panel - 1) / kernels.panel;
    // A norm after a layer needs the whole row, and so does a layer after it.
    int64_t columns = 1;
    if (a.layers.size() == 1 && layer.after.epsilon < 0 && chunks < 2 * a.threads)
        columns = std::min<int64_t>(all, (2 * a.threads + chunks - 1) / chunks);
    const int64_t panels = (all + columns - 1) / columns;
    return {chunk, chunks, panels, (all + panels - 1) / panels};
}

/// A thread's memory for one chunk. Made before the threads start: an exception could not leave a parallel
/// region.
template <typename Element>
struct Worker {
    std::vector<AlignedFloats> outputs;  // of every layer but the last
    AlignedFloats normed, scratch;

    Worker(const LinearChain<Element>& a, const ChainKernels<Element>& kernels, int64_t chunk) {
        int64_t widest = 0, bytes = 0;
        for (const auto& layer : a.layers) {
            if (layer.before.epsilon >= 0) widest = std::max(widest, layer.in);
            bytes = std::max(bytes, kernels.scratch_bytes(chunk, layer.in));
        }
        scratch = aligned_floats(bytes / 4 + 1);
        normed = memory(chunk * widest);
        for (size_t i = 0; i + 1 < a.layers.size(); ++i) outputs.push_back(memory(chunk * a.layers[i].out));
    }

    static AlignedFloats memory(int64_t elements) {
        return aligned_floats(elements * static_cast<int64_t>(sizeof(Element)) / 4 + 1);
    }

    Element* output(int64_t layer) { return reinterpret_cast<Element*>(outputs[layer].get()); }
};

template <typename Element>
void run_chunk(const LinearChain<Element>& a, const ChainKernels<Element>& kernels, const Shares& shares,
               int64_t task, Worker<Element>& worker) {
    using Real = typename Computed<Element>::Real;
    const int64_t first = task / shares.columns * shares.chunk, rows = std::min(shares.chunk, a.rows - first);
    const int64_t last_layer = static_cast<int64_t>(a.layers.size()) - 1;
    const Element* x = a.x + first * a.x_row;
    int64_t x_row = a.x_row;
    for (int64_t i = 0; i <= last_layer; ++i) {
        const ChainLayer<Element>& layer = a.layers[i];
        if (layer.before.epsilon >= 0) {
            Element* normed = reinterpret_cast<Element*>(worker.normed.get());
            kernels.norm(rows, layer.in, x, x_row, layer.before.weight, layer.before.bias,
                         static_cast<Real>(layer.before.epsilon), normed, layer.in);
            x = normed;
            x_row = layer.in;
        }
        Element* y = i == last_layer ? a.y + first * layer.out : worker.output(i);
        const int64_t all = (layer.out + kernels.panel - 1) / kernels.panel;
        const int64_t from = task % shares.columns * shares.panels;
        const bool given = layer.residual == kGivenResidual;
        const Element* residual = given                 ? a.residual + first * a.residual_row
                                  : layer.residual >= 0 ? worker.output(layer.residual)
                                                        : nullptr;
        kernels.product({rows, layer.in, layer.out, x, x_row, layer.weight, layer.bias, layer.activation,
                         residual, given ? a.residual_row : layer.out, y, layer.out, last_layer ? 0 : from,
                         last_layer ? all : std::min(all, from + shares.panels), worker.scratch.get()});
        if (layer.after.epsilon >= 0)
            kernels.norm(rows, layer.out, y, layer.out, layer.after.weight, layer.after.bias,
                         static_cast<Real>(layer.after.epsilon), y, layer.out);
        x = y;
        x_row = layer.out;
    }
}

}  // namespace

template <typename Element>
int64_t chain_step() {
    return chain_kernels<Element>().step;
}

template <typename Element>
int64_t chain_packed_bytes(int64_t in, int64_t out) {
    check_layer_sizes<Element>(in, out);
    return chain_kernels<Element>().packed_bytes(in, out);
}

template <typename Element>
void pack_chain_weight(const Element* weight, int64_t in, int64_t out, void* packed) {
    check_layer_sizes<Element>(in, out);
    check_address(weight, "weight");
    const int64_t misaligned = reinterpret_cast<uintptr_t>(packed) % 64;
    require(packed != nullptr && misaligned == 0, "packed", "an address aligned to 64 bytes", misaligned);
    chain_kernels<Element>().pack(weight, in, out, packed);
}

template <typename Element>
void linear_chain(const LinearChain<Element>& a) {
    check(a);
    if (a.rows == 0) return;
    const ChainKernels<Element>& kernels = chain_kernels<Element>();
    const Shares shares = share_out(a, kernels);
    const int64_t tasks = shares.chunks * shares.columns, threads = std::min(a.threads, tasks);
    std::vector<Worker<Element>> workers;
    for (int64_t i = 0; i < threads; ++i) workers.emplace_back(a, kernels, shares.chunk);
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) run_chunk(a, kernels, shares, task, workers[thread_index()]);
}

#define MAGNET_FAST_INSTANTIATE(Element)                                      \
    template int64_t chain_step<Element>();                                   \
    template int64_t chain_packed_bytes<Element>(int64_t, int64_t);           \
    template void pack_chain_weight(const Element*, int64_t, int64_t, void*); \
    template void linear_chain(const LinearChain<Element>&);
MAGNET_FAST_INSTANTIATE(float)
MAGNET_FAST_INSTANTIATE(BFloat16)
MAGNET_FAST_INSTANTIATE(Float16)
MAGNET_FAST_INSTANTIATE(double)
#undef MAGNET_FAST_INSTANTIATE

}  // namespace magnet_fast
