#include "cpu/window_plan.h"

#include <algorithm>
#include <utility>

#include "common/window_index.h"

namespace magnet_fast {
namespace {

// Enough tasks to keep many cores busy, few enough that a task's own cost (its bias gradient) stays small.
constexpr int64_t kTasksWanted = 128;
// The biases of a task's heads stay in the second cache together, beside their tokens.
constexpr int64_t kBiasBytes = 384 * 1024, kMostHeads = 8;

/// One axis of the padded, shifted map.
struct Axis {
    std::vector<int64_t> source, region;        // per shifted coordinate
    std::vector<std::vector<int64_t>> classes;  // window indices that look alike

    Axis(int64_t extent, int64_t window, int64_t shift, bool pad_first) {
        const int64_t padded = padded_extent(extent, window);
        for (int64_t at = 0; at < padded; ++at) {
            source.push_back(source_coordinate(at, extent, padded, shift, pad_first));
            region.push_back(shift_region(at, padded, window, shift));
        }
        for (int64_t index = 0; index < padded / window; ++index) {
            auto alike = [&](const std::vector<int64_t>& known) { return same(known[0], index, window); };
            auto found = std::find_if(classes.begin(), classes.end(), alike);
            if (found == classes.end()) found = classes.insert(classes.end(), std::vector<int64_t>());
            found->push_back(index);
        }
    }

  private:
    bool same(int64_t a, int64_t b, int64_t window) const {
        for (int64_t t = 0; t < window; ++t) {
            const int64_t i = a * window + t, j = b * window + t;
            if ((source[i] < 0) != (source[j] < 0) ||
                region[i] - region[a * window] != region[j] - region[b * window])
                return false;
        }
        return true;
    }
};

void append(std::vector<BiasRun>& runs, int64_t offset) {
    if (!runs.empty() && runs.back().offset + runs.back().length == offset)
        ++runs.back().length;
    else
        runs.push_back({offset, 1});
}

/// The groups of the window at (row, column) that have a query.
std::vector<Group> groups_of(const Axis& y_axis, const Axis& x_axis, int64_t row, int64_t column,
                             int64_t window_h, int64_t window_w) {
    std::vector<std::pair<int64_t, Group>> regions;
    for (int64_t y = 0; y < window_h; ++y) {
        for (int64_t x = 0; x < window_w; ++x) {
            const int64_t at_y = row * window_h + y, at_x = column * window_w + x;
            const int64_t region = 3 * y_axis.region[at_y] + x_axis.region[at_x];
            auto found = std::find_if(regions.begin(), regions.end(),
                                      [&](auto& known) { return known.first == region; });
            if (found == regions.end()) found = regions.insert(regions.end(), {region, Group()});
            Group& group = found->second;
            // A query's place and a key's offset add up to the bias of the pair: bias_row() of the table,
            // reversed.
            const int64_t table_w = 2 * window_w - 1;
            const int64_t offset = (window_h - 1 - y) * table_w + window_w - 1 + x;
            if (y_axis.source[at_y] < 0 || x_axis.source[at_x] < 0) {
                append(group.pad_runs, offset);
                ++group.pads;
            } else {
                append(group.runs, offset);
                group.tokens.push_back({y, x});
                group.places.push_back(y * table_w - x);
            }
        }
    }
    std::vector<Group> groups;
    for (auto& known : regions)
        if (!known.second.tokens.empty()) groups.push_back(std::move(known.second));
    return groups;
}

int64_t whole_vectors(int64_t n, int64_t lanes) {
    return (n + lanes - 1) / lanes * lanes;
}

}  // namespace

WindowPlan::WindowPlan(const WindowAttentionSizes& sizes) {
    Axis y_axis(sizes.height, sizes.window_h, sizes.shift_h, sizes.pad_first);
    Axis x_axis(sizes.width, sizes.window_w, sizes.shift_w, sizes.pad_first);
    for (const auto& rows : y_axis.classes) {
        for (const auto& columns : x_axis.classes) {
            WindowClass part{rows, columns,
                             groups_of(y_axis, x_axis, rows[0], columns[0], sizes.window_h, sizes.window_w)};
            for (const Group& group : part.groups)
                max_tokens = std::max(max_tokens, static_cast<int64_t>(group.tokens.size()));
            if (!part.groups.empty()) classes.push_back(std::move(part));
        }
    }
    const int64_t bias_bytes = static_cast<int64_t>(sizeof(float)) * max_tokens * max_tokens;
    const int64_t most = std::clamp<int64_t>(kBiasBytes / std::max<int64_t>(1, bias_bytes), 1, kMostHeads);
    const int64_t blocks = (sizes.heads + most - 1) / most;
    max_heads = (sizes.heads + blocks - 1) / blocks;
    const int64_t per_class = std::max<int64_t>(1, kTasksWanted / blocks);
    for (int64_t head = 0; head < sizes.heads; head += max_heads) {
        const int64_t heads = std::min(max_heads, sizes.heads - head);
        for (size_t c = 0; c < classes.size(); ++c) {
            const int64_t windows = sizes.batch * classes[c].windows();
            const int64_t chunk = std::max<int64_t>(1, (windows + per_class - 1) / per_class);
            for (int64_t begin = 0; begin < windows; begin += chunk)
                tasks.push_back(
                    {head, heads, static_cast<int64_t>(c), begin, std::min(windows, begin + chunk)});
        }
    }
    source_y = std::move(y_axis.source);
    source_x = std::move(x_axis.source);
}

template <typename Real>
GroupBias<Real>::GroupBias(const WindowAttentionSizes& sizes, const WindowPlan& plan,
                           const WindowBiasKernels<Real>& kernels)
    : sizes_(sizes),
      plan_(plan),
      kernels_(kernels),
      table_h_(2 * sizes.window_h - 1),
      table_w_(2 * sizes.window_w - 1),
      table_(table_h_ * table_w_ + kernels.lanes) {
    size_t largest = 0, most_pads = 0, most_groups = 0;
    for (const WindowClass& part : plan.classes) {
        size_t total = 0;
        for (const Group& group : part.groups) {
            total += group.tokens.size() * whole_vectors(group.keys(), kernels.lanes);
            if (group.pads)
                most_pads = std::max<size_t>(most_pads,
                                             group.tokens.size() * whole_vectors(group.pads, kernels.lanes));
        }
        largest = std::max(largest, total);
        most_groups = std::max(most_groups, part.groups.size());
    }
    offsets_.reserve(most_groups +
                     1);  // load() runs where an exception could not be caught: it never allocates
    rows_.reserve(most_groups);
    capacity_ = (largest + kernels.lanes + 15) / 16 * 16;
    values_ = aligned_numbers<Real>(capacity_);
    pads_.resize(most_pads + kernels.lanes);
}

template <typename Real>
void GroupBias<Real>::gather(const Group& group, const std::vector<BiasRun>& runs, int64_t columns,
                             Real* to) const {
    kernels_.gather_rows(table_.data(), group.places.data(), static_cast<int64_t>(group.places.size()),
                         runs.data(), static_cast<int64_t>(runs.size()), columns, to);
}

template <typename Real>
void GroupBias<Real>::load(const Real* table, int64_t head, int64_t window_class) {
    if (head == head_ && window_class == window_class_) return;
    if (head != head_)
        for (int64_t y = 0; y < table_h_; ++y)
            for (int64_t x = 0; x < table_w_; ++x)
                table_[(y + 1) * table_w_ - 1 - x] =
                    static_cast<Real>(table[(y * table_w_ + x) * sizes_.heads + head] / sizes_.scale);
    head_ = head;
    window_class_ = window_class;

    offsets_.assign(1, 0);
    rows_.clear();
    for (const Group& group : plan_.classes[window_class].groups) {
        const int64_t tokens = static_cast<int64_t>(group.tokens.size());
        const int64_t row = whole_vectors(group.keys(), kernels_.lanes);
        gather(group, group.runs, row, values_.get() + offsets_.back());
        if (group.pads) {
            const int64_t pad_row = whole_vectors(group.pads, kernels_.lanes);
            gather(group, group.pad_runs, pad_row, pads_.data());
            kernels_.log_sum_exp_rows(pads_.data(), tokens, pad_row, static_cast<Real>(sizes_.scale),
                                      values_.get() + offsets_.back() + tokens, row);
        }
        rows_.push_back(row);
        offsets_.push_back(offsets_.back() + tokens * row);
    }
}

template <typename Real>
void GroupBias<Real>::scatter(const Real* gradients, Real* table_gradient) {
    const std::vector<Group>& groups = plan_.classes[window_class_].groups;
    for (size_t g = 0; g < groups.size(); ++g) {
        const Group& group = groups[g];
        const int64_t tokens = static_cast<int64_t>(group.tokens.size()), row = rows_[g];
        const int64_t pad_row = whole_vectors(group.pads, kernels_.lanes);
        const Real* rows = gradients + offsets_[g];
        if (group.pads) {
            // The one padded key's gradient goes to its members in proportion to their share of the
            // exponentials.
            gather(group, group.pad_runs, pad_row, pads_.data());
            kernels_.softmax_rows(pads_.data(), tokens, pad_row, static_cast<Real>(sizes_.scale),
                                  values(g) + tokens, rows + tokens, row);
        }
        for (int64_t i = 0; i < tokens; ++i) {
            const Real* from = rows + i * row;
            for (const std::vector<BiasRun>* runs : {&group.runs, &group.pad_runs}) {
                for (const BiasRun& run : *runs) {
                    Real* to = table_gradient + (group.places[i] + run.offset);
                    for (int64_t t = 0; t < run.length; ++t) to[t] += from[t];
                    from += run.length;
                }
                from = pads_.data() + i * pad_row;
            }
        }
    }
}

template class GroupBias<float>;
template class GroupBias<double>;

}  // namespace magnet_fast
