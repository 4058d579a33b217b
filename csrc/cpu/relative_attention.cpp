#include "cpu/relative_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/launch.h"
#include "cpu/relative_kernel.h"

namespace magnet_fast {
namespace {

struct Sizes : RelativeSettings {
    int64_t batch, height, width, channels, head_dim;

    int64_t window_rows() const { return (height + window_h - 1) / window_h; }
    int64_t window_columns() const { return (width + window_w - 1) / window_w; }
    int64_t units() const { return batch * window_rows() * window_columns() * heads; }
};

void check_sizes(const Sizes& s, int64_t threads) {
    // These bounds make every product below safe.
    constexpr int64_t kMost = int64_t{1} << 31;
    for (const int64_t size : {s.height, s.width, s.channels})
        require(size > 0 && size < kMost, "qkv", "height, width and 3 * channels of 1 .. 2^31 - 1", size);
    const std::pair<const char*, int64_t> positive[] = {
        {"heads", s.heads}, {"window_h", s.window_h}, {"window_w", s.window_w}, {"threads", threads}};
    for (const auto& [name, value] : positive)
        require(value > 0 && value < kMost, name, "1 .. 2^31 - 1", value);
    require(s.batch >= 0 && s.batch < kMost, "qkv", "a batch of 0 .. 2^31 - 1", s.batch);
    require(s.channels % s.heads == 0, "heads", "a divisor of " + std::to_string(s.channels) + " channels",
            s.heads);
    require(s.window_h <= 4096, "window_h", "at most 4096", s.window_h);
    require(s.window_w <= 4096, "window_w", "at most 4096", s.window_w);
    require(threads <= 4096, "threads", "at most 4096", threads);
    if (!std::isfinite(s.scale) || s.scale <= 0)
        throw std::invalid_argument("scale: expected a finite number above 0");
    constexpr int64_t kBytes = std::numeric_limits<int64_t>::max() / 8;
    require(s.height * s.width <= kBytes / (3 * s.channels) / std::max<int64_t>(1, s.batch), "qkv",
            "batch * height * width * 3 * channels numbers to be addressable", s.batch);
    // A kernel's working memory: several times the keys and the tables, in every channel.
    require(s.head_dim <= kMost / 4096, "qkv", "at most 2^19 channels a head", s.head_dim);
}

/// Sizes of a call, checked together with the inputs.
Sizes checked_sizes(const RelativeAttentionInputs& a) {
    check_dtype(a.qkv, "qkv");
    check_tensor(a.qkv, "qkv", 4, a.qkv.dtype);
    const int64_t* size = a.qkv.sizes;
    require(size[3] % 3 == 0, "qkv", "q, k and v in the last dimension, a multiple of 3", size[3]);
    const int64_t channels = size[3] / 3;
    require(a.settings.heads > 0, "heads", "at least 1", a.settings.heads);
    const Sizes s{a.settings, size[0], size[1], size[2], channels, channels / a.settings.heads};
    check_sizes(s, a.threads);
    check_dense(a.qkv, "qkv", 3);
    const Dtype tables = computed(a.qkv.dtype);
    check_contiguous(a.rel_height, "rel_height", {2 * s.window_h - 1, s.head_dim}, tables);
    check_contiguous(a.rel_width, "rel_width", {2 * s.window_w - 1, s.head_dim}, tables);
    check_contiguous(a.pad_qkv, "pad_qkv", {3 * s.channels}, a.qkv.dtype, /*may_be_missing=*/true);
    return s;
}

/// A map that is read may have any strides; one that is written must at least step over its channels.
void check_map(const Sizes& s, const TensorView& map, const char* name, int64_t channels, Dtype dtype,
               bool written) {
    check_tensor(map, name, {s.batch, s.height, s.width, channels}, dtype);
    check_dense(map, name, 3);
    for (int i = 0; written && i < 3; ++i)
        if (map.sizes[i] > 1 && map.strides[i] < channels)
            refuse(name, "strides of at least " + std::to_string(channels), map.strides[i]);
}

int64_t rounded(int64_t count, int64_t lanes) {
    return (count + lanes - 1) / lanes * lanes;
}

/// A table as the kernels read it, see RelativeTable.
template <typename Real>
struct PreparedTable {
    AlignedNumbers<Real> rows, transposed;

    PreparedTable(const Real* table, int64_t count, int64_t d, double scale, int64_t lanes)
        : rows(aligned_numbers<Real>(count * rounded(d, lanes))),
          transposed(aligned_numbers<Real>(d * rounded(count, lanes))) {
        const int64_t wide = rounded(d, lanes), long_ = rounded(count, lanes);
        std::fill_n(rows.get(), count * wide, Real{0});
        std::fill_n(transposed.get(), d * long_, Real{0});
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t c = 0; c < d; ++c) {
                const Real value = static_cast<Real>(table[(count - 1 - t) * d + c] / scale);
                rows[t * wide + c] = value;
                transposed[c * long_ + t] = value;
            }
        }
    }
    RelativeTable<Real> view() const { return {rows.get(), transposed.get()}; }
};

template <typename Element>
Element* data(const TensorView& view) {
    return static_cast<Element*>(view.data);
}

/// The first token of one window's head in a map with `channels` channels before that head's.
template <typename Element>
Element* corner(const TensorView& map, int64_t image, int64_t y, int64_t x, int64_t channel) {
    return data<Element>(map) + image * map.strides[0] + y * map.strides[1] + x * map.strides[2] + channel;
}

/// Everything both passes need.
template <typename Element>
struct Launch {
    using Real = typename Computed<Element>::Real;
    const Sizes& sizes;
    const TensorView& qkv;
    const RelativeKernels<Element>& kernels = relative_kernels<Element>();
    PreparedTable<Real> height, width;
    std::vector<Element> padding;  // (3C) q, k and v of padded tokens

    Launch(const Sizes& s, const RelativeAttentionInputs& a)
        : sizes(s),
          qkv(a.qkv),
          height(data<const Real>(a.rel_height), 2 * s.window_h - 1, s.head_dim, s.scale, kernels.lanes),
          width(data<const Real>(a.rel_width), 2 * s.window_w - 1, s.head_dim, s.scale, kernels.lanes),
          padding(3 * s.channels) {
        if (a.pad_qkv.given()) std::copy_n(data<const Element>(a.pad_qkv), padding.size(), padding.begin());
    }

    /// One head of one window, of which there are sizes.units(): the heads of a window lie side by side.
    struct Unit {
        RelativeWindow<Element> window;
        int64_t image, y, x, channel;
    };
    Unit unit(int64_t number) const {
        const int64_t head = number % sizes.heads, window = number / sizes.heads;
        const int64_t columns = sizes.window_columns(), rows = sizes.window_rows();
        const int64_t image = window / (rows * columns), place = window % (rows * columns);
        const int64_t y = place / columns * sizes.window_h, x = place % columns * sizes.window_w;
        const int64_t channel = head * sizes.head_dim;
        return {{corner<const Element>(qkv, image, y, x, channel), qkv.strides[1], qkv.strides[2],
                 std::min(sizes.window_h, sizes.height - y), std::min(sizes.window_w, sizes.width - x),
                 sizes.window_h, sizes.window_w, padding.data() + channel, sizes.channels, sizes.head_dim},
                image,
                y,
                x,
                channel};
    }

    /// Scratch memory for each thread.
    std::vector<AlignedNumbers<char>> scratch(int64_t threads, int64_t bytes) const {
        std::vector<AlignedNumbers<char>> each;
        for (int64_t i = 0; i < threads; ++i) each.push_back(aligned_numbers<char>(bytes));
        return each;
    }
};

template <typename Element>
void forward(const Sizes& s, const RelativeAttentionInputs& a, const TensorView& out) {
    const Launch<Element> launch(s, a);
    const auto& kernels = launch.kernels;
    // Threads share the queries of a window where there are too few windows: each then packs the keys for
    // itself.
    constexpr int64_t kFewest = 1024;
    const int64_t queries = std::min(s.window_h, s.height) * std::min(s.window_w, s.width);
    const int64_t wanted = (2 * a.threads + s.units() - 1) / s.units();
    const int64_t parts = std::max<int64_t>(1, std::min(wanted, queries / kFewest));
    const int64_t tasks = s.units() * parts, team = std::min(a.threads, tasks);
    const auto scratch = launch.scratch(team, kernels.forward_bytes(launch.unit(0).window));
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(dynamic, 1) if (team > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const auto unit = launch.unit(task / parts);
        const int64_t part = task % parts, count = unit.window.rows * unit.window.columns;
        kernels.forward({unit.window, launch.height.view(), launch.width.view(),
                         static_cast<typename Computed<Element>::Real>(s.scale), count * part / parts,
                         count * (part + 1) / parts,
                         corner<Element>(out, unit.image, unit.y, unit.x, unit.channel), out.strides[1],
                         out.strides[2], scratch[thread_index()].get()});
    }
}

template <typename Element>
void backward(const Sizes& s, const RelativeAttentionInputs& a, const TensorView& grad_out,
              const RelativeAttentionGradients& grads) {
    using Real = typename Computed<Element>::Real;
    const Launch<Element> launch(s, a);
    const auto& kernels = launch.kernels;
    const int64_t d = s.head_dim, wide = rounded(d, kernels.lanes);
    const int64_t tall = (2 * s.window_h - 1) * wide, broad = (2 * s.window_w - 1) * wide;
    // A group of units adds to its own partial sums only, whichever thread runs it; how many groups there are
    // does not depend on the number of threads.
    constexpr int64_t kMostGroups = 256;
    const int64_t units = s.units(), groups = std::min(units, kMostGroups);
    const bool tables = grads.rel_height.given();
    std::vector<Real> table_parts(tables ? groups * (tall + broad) : 0);
    std::vector<Real> pad_parts(grads.pad_qkv.given() ? groups * 2 * s.channels : 0);
    const int64_t team = std::min(a.threads, groups);
    const auto scratch = launch.scratch(team, groups ? kernels.backward_bytes(launch.unit(0).window) : 0);
#pragma omp parallel for num_threads(static_cast<int>(team)) schedule(dynamic, 1) if (team > 1)
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t number = units * group / groups; number < units * (group + 1) / groups; ++number) {
            const auto unit = launch.unit(number);
            RelativeBackward<Element> call{};
            call.window = unit.window;
            call.height = launch.height.view();
            call.width = launch.width.view();
            call.scale = static_cast<Real>(s.scale);
            call.grad_out = corner<const Element>(grad_out, unit.image, unit.y, unit.x, unit.channel);
            call.grad_out_row_stride = grad_out.strides[1];
            call.grad_out_column_stride = grad_out.strides[2];
            if (grads.qkv.given()) {
                call.grad_tokens = corner<Element>(grads.qkv, unit.image, unit.y, unit.x, unit.channel);
                call.grad_row_stride = grads.qkv.strides[1];
                call.grad_column_stride = grads.qkv.strides[2];
            }
            if (tables) {
                call.grad_height = table_parts.data() + group * (tall + broad);
                call.grad_width = call.grad_height + tall;
            }
            if (grads.pad_qkv.given())
                call.grad_pad = pad_parts.data() + group * 2 * s.channels + 2 * unit.channel;
            call.scratch = scratch[thread_index()].get();
            kernels.backward(call);
        }
    }

    // In the groups' order and in double, so that the bits do not depend on the number of threads.
    const auto sum = [&](const std::vector<Real>& parts, int64_t length, int64_t index) {
        double total = 0;
        for (int64_t group = 0; group < groups; ++group) total += parts[group * length + index];
        return static_cast<Real>(total);
    };
    const auto write_table = [&](const TensorView& to, int64_t count, int64_t first) {
        for (int64_t t = 0; t < count; ++t)
            for (int64_t c = 0; c < d; ++c)
                data<Real>(to)[(count - 1 - t) * d + c] =
                    sum(table_parts, tall + broad, first + t * wide + c);
    };
    if (tables) {
        write_table(grads.rel_height, 2 * s.window_h - 1, 0);
        write_table(grads.rel_width, 2 * s.window_w - 1, tall);
    }
    if (grads.pad_qkv.given()) {
        Real* to = data<Real>(grads.pad_qkv);
        std::fill_n(to, s.channels, Real{0});
        for (int64_t head = 0; head < s.heads; ++head)
            for (int64_t index = 0; index < 2 * d; ++index)  // k, then v, of each head
                to[(1 + index / d) * s.channels + head * d + index % d] =
                    sum(pad_parts, 2 * s.channels, 2 * head * d + index);
    }
}

}  // namespace

void relative_attention_forward(const RelativeAttentionInputs& a, const TensorView& out) {
    const Sizes s = checked_sizes(a);
    check_map(s, out, "out", s.channels, a.qkv.dtype, /*written=*/true);
    if (s.batch == 0) return;
    with_element(a.qkv.dtype, [&](auto element) { forward<decltype(element)>(s, a, out); });
}

void relative_attention_backward(const RelativeAttentionInputs& a, const TensorView& grad_out,
                                 const RelativeAttentionGradients& grads) {
    const Sizes s = checked_sizes(a);
    const Dtype sums = computed(a.qkv.dtype);
    check_map(s, grad_out, "grad_out", s.channels, a.qkv.dtype, /*written=*/false);
    if (grads.qkv.given()) check_map(s, grads.qkv, "grad_qkv", 3 * s.channels, a.qkv.dtype, /*written=*/true);
    const auto optional = [&](const TensorView& view, const char* name,
                              std::initializer_list<int64_t> sizes) {
        check_contiguous(view, name, sizes, sums, /*may_be_missing=*/true);
    };
    optional(grads.rel_height, "grad_rel_height", {2 * s.window_h - 1, s.head_dim});
    optional(grads.rel_width, "grad_rel_width", {2 * s.window_w - 1, s.head_dim});
    if (grads.rel_height.given() != grads.rel_width.given())
        throw std::invalid_argument("grad_rel_width: expected beside grad_rel_height, or neither");
    optional(grads.pad_qkv, "grad_pad_qkv", {3 * s.channels});
    with_element(a.qkv.dtype, [&](auto element) { backward<decltype(element)>(s, a, grad_out, grads); });
}

}  // namespace magnet_fast
