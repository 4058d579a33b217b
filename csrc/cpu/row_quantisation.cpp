#include "cpu/row_quantisation.h"

#include "cpu/launch.h"

namespace magnet_fast {
namespace {

constexpr int64_t kMost = int64_t{1} << 31;
constexpr int64_t kFewestNumbers = 1 << 15;  // a thread's; with fewer, waiting for it takes longer

template <typename Arguments>
int64_t checked_threads(const Arguments& a) {
    require(a.rows >= 0 && a.rows < kMost, "rows", "0 .. 2^31 - 1", a.rows);
    require(a.width > 0 && a.width < kMost && a.width % 16 == 0, "width", "a multiple of 16", a.width);
    require(a.threads > 0 && a.threads <= 4096, "threads", "1 .. 4096", a.threads);
    const int64_t useful = a.rows * a.width / kFewestNumbers;
    return useful < 1 ? 1 : useful < a.threads ? useful : a.threads;
}

}  // namespace

template <typename Element>
void rows_to_bytes(const RowsToBytes<Element>& a) {
    const int64_t threads = checked_threads(a);
    require(a.most > 0 && a.most <= 255, "most", "1 .. 255", a.most);
    const RowKernels<Element>& kernels = row_kernels<Element>();
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t m = 0; m < a.rows; ++m)
        kernels.quantise(a.width, a.x + m * a.x_row, static_cast<float>(a.most), a.bytes + m * a.width,
                         a.scale + m, a.minimum + m);
}

template <typename Element>
void sums_to_rows(const SumsToRows<Element>& a) {
    const int64_t threads = checked_threads(a);
    const int activation = static_cast<int>(a.activation);
    require(activation >= 0 && activation <= 2, "activation", "0 (none), 1 (gelu) or 2 (relu)", activation);
    require(a.residual == nullptr || activation == 0, "activation", "0 where there is a residual",
            activation);
    const RowKernels<Element>& kernels = row_kernels<Element>();
#pragma omp parallel for schedule(static) num_threads(static_cast<int>(threads)) if (threads > 1)
    for (int64_t m = 0; m < a.rows; ++m)
        kernels.finish(a.width, a.sums + m * a.width, a.scale[m], a.minimum[m], a.totals, a.bias,
                       a.activation, a.residual ? a.residual + m * a.residual_row : nullptr,
                       a.y + m * a.width);
}

#define MAGNET_FAST_INSTANTIATE(Element)                      \
    template void rows_to_bytes(const RowsToBytes<Element>&); \
    template void sums_to_rows(const SumsToRows<Element>&);
MAGNET_FAST_INSTANTIATE(float)
MAGNET_FAST_INSTANTIATE(BFloat16)
#undef MAGNET_FAST_INSTANTIATE

}  // namespace magnet_fast
