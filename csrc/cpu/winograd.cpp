#include "cpu/winograd.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "cpu/launch.h"

namespace magnet_fast {
namespace {

constexpr int64_t kMostChannels = int64_t{1} << 20, kMostSide = int64_t{1} << 20;
// Tiles together: as many as leave their numbers and products in the second-level cache, but not so few that
// reading the weights, which do not, takes longer than multiplying.
constexpr int64_t kFewestTiles = 192, kMostTiles = 512, kCachedBytes = int64_t{1} << 21;

template <typename Element>
void check_channels(int64_t in, int64_t out) {
    const int64_t step = winograd_step<Element>();
    for (const auto& [name, value] : {std::pair{"in", in}, std::pair{"out", out}}) {
        require(value > 0 && value <= kMostChannels, name, "1 .. 2^20", value);
        require(value % step == 0, name, "a multiple of " + std::to_string(step), value);
    }
}

void check_aligned(const void* pointer, const char* name) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(pointer) % 64;
    require(pointer != nullptr && misaligned == 0, name, "an address aligned to 64 bytes", misaligned);
}

template <typename Element>
void check(const WinogradConvolution<Element>& c, int64_t threads) {
    require(threads > 0 && threads <= 4096, "threads", "1 .. 4096", threads);
    check_channels<Element>(c.in, c.out);
    require(c.images >= 0 && c.images <= kMostSide, "images", "0 .. 2^20", c.images);
    require(c.height > 0 && c.height <= kMostSide, "height", "1 .. 2^20", c.height);
    require(c.width > 0 && c.width <= kMostSide, "width", "1 .. 2^20", c.width);
    check_aligned(c.weight, "weight");
    if (c.bias) check_address(c.bias, "bias");
    if (c.images == 0) return;
    check_address(c.x.data, "x");
    check_address(c.y.data, "y");
    if (c.residual.data) check_address(c.residual.data, "residual");
}

/// Memory for that many tiles.
template <typename Element>
struct Scratch {
    using Real = typename Computed<Element>::Real;
    int64_t stride_in, stride_out;
    AlignedNumbers<Real> numbers, products;

    Scratch(const WinogradConvolution<Element>& c, const WinogradKernels<Element>& kernels, int64_t tiles)
        : stride_in(kernels.stride(tiles, c.in)),
          stride_out(kernels.stride(tiles, c.out)),
          numbers(aligned_numbers<Real>(kWinogradPositions * stride_in)),
          products(aligned_numbers<Real>(kWinogradPositions * stride_out)) {}
};

/// Few tiles: every weight is read by one thread alone.
template <typename Element>
void share_positions(const WinogradConvolution<Element>& c, const WinogradKernels<Element>& kernels,
                     int64_t tiles, int64_t threads) {
    const Scratch<Element> scratch(c, kernels, tiles);
    const int64_t all = (c.out + kernels.panel - 1) / kernels.panel;
    const int64_t parts = std::min(all, (2 * threads + kWinogradPositions - 1) / kWinogradPositions);
    const int64_t panels = (all + parts - 1) / parts;
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile)
            kernels.read(c, tile, 1, scratch.numbers.get() + tile * c.in, scratch.stride_in);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < kWinogradPositions * parts; ++task) {
            const int64_t position = task / parts, first = task % parts * panels;
            kernels.multiply(c, tiles, position, std::min(all, first), std::min(all, first + panels),
                             scratch.numbers.get() + position * scratch.stride_in,
                             scratch.products.get() + position * scratch.stride_out);
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; ++tile)
            kernels.write(c, tile, 1, scratch.products.get() + tile * c.out, scratch.stride_out);
    }
}

}  // namespace

template <typename Element>
int64_t winograd_step() {
    return winograd_kernels<Element>().step;
}

template <typename Element>
void winograd_pack(const Element* weight, int64_t in, int64_t out, typename Computed<Element>::Real* packed) {
    check_channels<Element>(in, out);
    check_address(weight, "weight");
    check_aligned(packed, "packed");
    winograd_kernels<Element>().pack(weight, in, out, packed);
}

template <typename Element>
void winograd_convolution(const WinogradConvolution<Element>& c, int64_t threads) {
    using Real = typename Computed<Element>::Real;
    check(c, threads);
    const WinogradKernels<Element>& kernels = winograd_kernels<Element>();
    const int64_t tiles = c.images * ((c.height + 1) / kWinogradTile) * ((c.width + 1) / kWinogradTile);
    if (tiles == 0) return;
    if (tiles < threads * kFewestTiles) return share_positions(c, kernels, tiles, threads);
    const int64_t bytes = kWinogradPositions * (c.in + c.out) * static_cast<int64_t>(sizeof(Real));
    const int64_t most = std::clamp(kCachedBytes / bytes, kFewestTiles, kMostTiles);
    int64_t chunks = (tiles + most - 1) / most;
    chunks = (chunks + threads - 1) / threads * threads;
    const int64_t chunk = (tiles + chunks - 1) / chunks;
    chunks = (tiles + chunk - 1) / chunk;
    threads = std::min(threads, chunks);
    // Made before the threads start: an exception could not leave a parallel region.
    std::vector<Scratch<Element>> scratch;
    for (int64_t i = 0; i < threads; ++i) scratch.emplace_back(c, kernels, chunk);
    const int64_t panels = (c.out + kernels.panel - 1) / kernels.panel;
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t i = 0; i < chunks; ++i) {
        Scratch<Element>& own = scratch[thread_index()];
        const int64_t first = i * chunk, count = std::min(chunk, tiles - first);
        kernels.read(c, first, count, own.numbers.get(), own.stride_in);
        for (int64_t position = 0; position < kWinogradPositions; ++position)
            kernels.multiply(c, count, position, 0, panels, own.numbers.get() + position * own.stride_in,
                             own.products.get() + position * own.stride_out);
        kernels.write(c, first, count, own.products.get(), own.stride_out);
    }
}

#define MAGNET_FAST_INSTANTIATE(Element)                                                              \
    template int64_t winograd_step<Element>();                                                        \
    template void winograd_pack(const Element*, int64_t, int64_t, typename Computed<Element>::Real*); \
    template void winograd_convolution(const WinogradConvolution<Element>&, int64_t);
MAGNET_FAST_INSTANTIATE(float)
MAGNET_FAST_INSTANTIATE(double)
#undef MAGNET_FAST_INSTANTIATE

}  // namespace magnet_fast
