#include "cpu/deformable_attention.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "common/elements.h"
#include "cpu/deformable_kernel.h"
#include "cpu/deformable_launch.h"
#include "cpu/launch.h"

namespace magnet_fast {

namespace {

/// Whether the product of sizes below 2^31 is a number of elements that can be addressed.
bool addressable(std::initializer_list<int64_t> sizes) {
    int64_t room = std::numeric_limits<int64_t>::max() / 16;
    for (int64_t size : sizes) room /= std::max<int64_t>(1, size);
    return room > 0;
}

void check_sizes(const DeformableAttentionSizes& s) {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1, kSide = int64_t{1} << 24, kPositions = int64_t{1} << 30;
    const std::pair<const char*, int64_t> positive[] = {
        {"positions", s.positions}, {"heads", s.heads}, {"head_dim", s.head_dim}, {"points", s.points}};
    for (const auto& [name, value] : positive)
        require(value > 0 && value <= kMost, name, "1 .. 2^31 - 1", value);
    require(s.batch >= 0 && s.batch <= kMost, "batch", "0 .. 2^31 - 1", s.batch);
    require(s.queries >= 0 && s.queries <= kMost, "queries", "0 .. 2^31 - 1", s.queries);
    require(s.threads > 0 && s.threads <= 4096, "threads", "1 .. 4096", s.threads);
    const int64_t levels = static_cast<int64_t>(s.maps.size());
    require(levels > 0, "spatial_shapes", "at least one (height, width)", levels);
    int64_t positions = 0, rows = 0;
    for (const auto& [height, width] : s.maps) {
        // Sides of at most 2^24 are exact in float32.
        require(height > 0 && height <= kSide, "spatial_shapes", "heights of 1 .. 2^24", height);
        require(width > 0 && width <= kSide, "spatial_shapes", "widths of 1 .. 2^24", width);
        positions += height * width;
        require(positions <= kPositions, "spatial_shapes", "at most 2^30 positions together", positions);
        rows += DeformableLevel::rows_of(height, width);
        require(rows <= kMost, "spatial_shapes", "fewer than 2^31 positions with the maps' borders", rows);
    }
    require(positions == s.positions, "spatial_shapes",
            "maps of " + std::to_string(s.positions) + " positions together, as value has", positions);
    constexpr int64_t kPoints = int64_t{1} << 20;
    require(s.points <= kPoints / std::min(levels, kPoints), "points",
            "at most 2^20 points a query on all levels", s.points);
    require(addressable({s.batch, s.positions, s.heads, s.head_dim}), "batch", "value to be addressable",
            s.batch);
    require(addressable({s.batch, s.queries, s.heads, std::max(s.head_dim, 4 * levels * s.points)}),
            "queries", "the points and the result to be addressable", s.queries);
}

/// Strides of a tensor that is read may be anything that is not negative (0: broadcast).
void check_strides(const std::string& name, std::initializer_list<std::pair<int64_t, int64_t>> axes) {
    for (const auto& [stride, extent] : axes)
        require(extent <= 1 || stride >= 0, name, "strides of at least 0", stride);
}

template <typename Number>
void check_tensor(const void* pointer, const std::string& name) {
    check_address(static_cast<const Number*>(pointer), name);
}

template <typename Number>
void check_if_wanted(const void* pointer, const std::string& name) {
    if (pointer) check_tensor<Number>(pointer, name);
}

/// Checks of both passes. Pointers are looked at only if there is something behind them.
template <typename Element>
void check_inputs(const DeformableAttentionSizes& s, const void* value, const ValueStrides& strides,
                  const DeformableAttentionPoints& points) {
    using Real = typename Computed<Element>::Real;
    check_sizes(s);
    check_strides("value_strides",
                  {{strides.batch, s.batch}, {strides.position, s.positions}, {strides.head, s.heads}});
    const auto check_point_strides = [&](const char* name, const PointStrides& p) {
        check_strides(name, {{p.batch, s.batch}, {p.query, s.queries}, {p.head, s.heads}});
    };
    const bool empty = s.batch == 0 || s.queries == 0;
    if (!empty) check_tensor<Element>(value, "value_ptr");
    if (!points.logits && !points.offsets && !points.reference) {
        if (empty) return;
        check_tensor<Real>(points.locations, "locations_ptr");
        check_tensor<Element>(points.weights, "weights_ptr");
        return;
    }
    check_point_strides("offsets_strides", points.offsets_strides);
    check_point_strides("logits_strides", points.logits_strides);
    const int64_t levels = static_cast<int64_t>(s.maps.size());
    require(points.reference_batch == 1 || points.reference_batch == s.batch, "reference_batch",
            "1 or the batch " + std::to_string(s.batch), points.reference_batch);
    require(points.reference_levels == 1 || points.reference_levels == levels, "reference_levels",
            "1 or the number of maps " + std::to_string(levels), points.reference_levels);
    require(points.coordinates == 2 || points.coordinates == 4, "coordinates", "2 or 4", points.coordinates);
    if (empty) return;
    check_tensor<Real>(points.reference, "reference_ptr");
    for (const auto& [pointer, name] :
         {std::pair(points.offsets, "offsets_ptr"), {points.logits, "logits_ptr"}})
        points.wide ? check_tensor<Real>(pointer, name) : check_tensor<Element>(pointer, name);
}

template <typename Element>
void run_forward(const DeformableAttentionForward& a) {
    using Launch = DeformableLaunch<Element>;
    const DeformableAttentionSizes& s = a.sizes;
    check_inputs<Element>(s, a.value, a.value_strides, a.points);
    if (s.batch == 0 || s.queries == 0) return;
    check_tensor<Element>(a.out, "out_ptr");

    const Launch launch{s, static_cast<const Element*>(a.value), a.value_strides, a.points, false};
    const typename Launch::Range all(launch.layout, s.points, 0, launch.levels);
    const int64_t parts = launch.query_parts();
    launch.run(
        parts, all, true, false, [&](int64_t slice, int64_t part, const typename Launch::Worker& worker) {
            const int64_t begin = launch.first_query(part, parts), end = launch.first_query(part + 1, parts);
            DeformableForward<Element> arguments;
            DeformableLogits<Element> logits;
            launch.prepare(slice, begin, end, all, worker, logits, arguments);
            arguments.out = static_cast<Element*>(a.out) + launch.place(slice, begin) * s.head_dim;
            launch.kernels.forward(arguments);
        });
}

/// The gradients wanted of one call.
template <typename Element>
struct Backward {
    using Launch = DeformableLaunch<Element>;
    using Real = typename Launch::Real;
    using Range = typename Launch::Range;
    using Worker = typename Launch::Worker;

    const DeformableAttentionBackward& a;
    const Launch& launch;
    Real*
        reference_parts;  // (B, h, Q, L, coordinates): every head's gradient of the reference points, or null

    bool wants_points() const {
        return a.grad_locations || a.grad_weights || a.grad_offsets || a.grad_logits || reference_parts;
    }

    int64_t reference_row() const { return launch.levels * a.points.coordinates; }

    /// Element `index` of a gradient of offsets or logits.
    void* wide_or_not(void* gradient, int64_t index) const {
        const int64_t size = a.points.wide ? sizeof(Real) : sizeof(Element);
        return gradient ? static_cast<char*>(gradient) + index * size : nullptr;
    }

    void run(int64_t slice, int64_t begin, int64_t end, const Range& range, bool points, bool value,
             const Worker& worker) const {
        DeformableBackward<Element> arguments;
        DeformableLogits<Element> logits;
        launch.prepare(slice, begin, end, range, worker, logits, arguments);
        const int64_t point = launch.first_point(slice, begin, range);
        const bool all[] = {points && a.grad_locations, points && a.grad_weights, points && reference_parts};
        arguments.out = nullptr;
        arguments.grad_out =
            static_cast<const Element*>(a.grad_out) + launch.place(slice, begin) * a.sizes.head_dim;
        arguments.grad_value = value ? worker.grad_value.get() : nullptr;
        arguments.grad_locations = all[0] ? static_cast<Real*>(a.grad_locations) + 2 * point : nullptr;
        arguments.grad_weights = all[1] ? static_cast<Element*>(a.grad_weights) + point : nullptr;
        arguments.grad_offsets = points ? wide_or_not(a.grad_offsets, 2 * point) : nullptr;
        arguments.grad_logits = points ? wide_or_not(a.grad_logits, point) : nullptr;
        arguments.grad_reference_row = reference_row();
        arguments.grad_reference =
            all[2] ? reference_parts + (slice * a.sizes.queries + begin) * reference_row() : nullptr;
        launch.kernels.backward(arguments);
    }

    /// Scatters a slice's gradient into the positions of the range's levels.
    void scatter(int64_t slice, const Range& range, bool points, const Worker& worker) const {
        const DeformableAttentionSizes& s = a.sizes;
        Real* packed = worker.grad_value.get();
        launch.kernels.clear(packed, launch.layout.rows, s.head_dim, range.level[0].first_row(),
                             range.level[range.count - 1].end_row());
        run(slice, 0, s.queries, range, points, true, worker);
        const int64_t first = (slice / s.heads * s.positions * s.heads + slice % s.heads) * s.head_dim;
        launch.kernels.unpack(packed, range.level, range.count, launch.layout.rows, s.head_dim,
                              static_cast<Element*>(a.grad_value) + first, s.heads * s.head_dim);
    }

    /// Sums the heads' gradients of the reference points, and over images and levels that shared them, always
    /// in the same order.
    void sum_reference() const {
        const DeformableAttentionSizes& s = a.sizes;
        const int64_t batch = a.points.reference_batch, levels = a.points.reference_levels;
        const int64_t coordinates = a.points.coordinates, row = reference_row();
        const int64_t images = s.batch / batch, maps = launch.levels / levels;
        Real* to = static_cast<Real*>(a.grad_reference);
        const int team = static_cast<int>(std::min(s.threads, s.queries));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
        for (int64_t n = 0; n < batch * s.queries; ++n) {
            const int64_t image = n / s.queries, query = n % s.queries;
            for (int64_t c = 0; c < levels * coordinates; ++c) {
                Real sum = 0;
                for (int64_t slice = image * s.heads; slice < (image + images) * s.heads; ++slice)
                    for (int64_t map = 0; map < maps; ++map)
                        sum += reference_parts[(slice * s.queries + query) * row + map * coordinates + c];
                to[n * levels * coordinates + c] = sum;
            }
        }
    }
};

template <typename Element>
void run_backward(const DeformableAttentionBackward& a) {
    using Launch = DeformableLaunch<Element>;
    using Real = typename Launch::Real;
    using Range = typename Launch::Range;
    using Worker = typename Launch::Worker;
    const DeformableAttentionSizes& s = a.sizes;
    check_inputs<Element>(s, a.value, a.value_strides, a.points);
    if (s.batch == 0) return;
    if (s.queries > 0) check_tensor<Element>(a.grad_out, "grad_out_ptr");
    check_if_wanted<Element>(a.grad_value, "grad_value_ptr");
    check_if_wanted<Real>(a.grad_locations, "grad_locations_ptr");
    check_if_wanted<Element>(a.grad_weights, "grad_weights_ptr");
    check_if_wanted<Real>(a.grad_reference, "grad_reference_ptr");
    for (const auto& [pointer, name] :
         {std::pair(a.grad_offsets, "grad_offsets_ptr"), {a.grad_logits, "grad_logits_ptr"}})
        a.points.wide ? check_if_wanted<Real>(pointer, name) : check_if_wanted<Element>(pointer, name);

    const Launch launch{s, static_cast<const Element*>(a.value), a.value_strides, a.points, true};
    AlignedReals<Real> parts_of_reference;
    if (a.grad_reference)
        parts_of_reference =
            AlignedReals<Real>(launch.slices * s.queries * launch.levels * a.points.coordinates);
    const Backward<Element> backward{a, launch, parts_of_reference.get()};
    const Range all(launch.layout, s.points, 0, launch.levels);
    const bool points = s.queries > 0 && backward.wants_points();
    // A position of grad_value is added to by one thread only, in the order of queries and points: no
    // atomics, and the same bits however the work is divided. With enough slices a task does everything for
    // one slice ...
    const bool together = a.grad_value && launch.slices >= 2 * s.threads;
    if (together)
        launch.run(1, all, points, true, [&](int64_t slice, int64_t, const Worker& worker) {
            backward.scatter(slice, all, points, worker);
        });
    // ... with few, points are divided by query, and positions by level.
    if (points && !together) {
        const int64_t parts = launch.query_parts();
        launch.run(parts, all, true, false, [&](int64_t slice, int64_t part, const Worker& worker) {
            const int64_t begin = launch.first_query(part, parts), end = launch.first_query(part + 1, parts);
            backward.run(slice, begin, end, all, true, false, worker);
        });
    }
    if (a.grad_value && !together) {
        std::vector<Range> ranges;
        ranges.reserve(launch.levels);
        for (int64_t level = 0; level < launch.levels; ++level)
            ranges.emplace_back(launch.layout, s.points, level, level + 1);
        launch.run(launch.levels, ranges.front(), false, true,
                   [&](int64_t slice, int64_t level, const Worker& worker) {
                       backward.scatter(slice, ranges[level], false, worker);
                   });
    }
    if (points && a.grad_reference) backward.sum_reference();
}

}  // namespace

void deformable_attention_forward(const DeformableAttentionForward& a) {
    with_element(a.sizes.dtype, [&](auto element) { run_forward<decltype(element)>(a); });
}

void deformable_attention_backward(const DeformableAttentionBackward& a) {
    with_element(a.sizes.dtype, [&](auto element) { run_backward<decltype(element)>(a); });
}

}  // namespace magnet_fast
