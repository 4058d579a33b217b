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
    for (const int64_t size : {s.positions, s.heads, s.head_dim})
        require(size > 0 && size <= kMost, "value", "positions, heads and channels of 1 .. 2^31 - 1", size);
    require(s.points > 0 && s.points <= kMost, "places", "1 .. 2^31 - 1 points", s.points);
    require(s.batch >= 0 && s.batch <= kMost, "value", "a batch of 0 .. 2^31 - 1", s.batch);
    require(s.queries >= 0 && s.queries <= kMost, "places", "0 .. 2^31 - 1 queries", s.queries);
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
    require(s.points <= kPoints / std::min(levels, kPoints), "places",
            "at most 2^20 points a query on all levels", s.points);
    require(addressable({s.batch, s.positions, s.heads, s.head_dim}), "value", "it to be addressable",
            s.batch);
    require(addressable({s.batch, s.queries, s.heads, std::max(s.head_dim, 4 * levels * s.points)}), "places",
            "the points and the result to be addressable", s.queries);
}

/// Sizes of a call, checked together with its inputs.
DeformableAttentionSizes checked_sizes(const DeformableViews& a, int64_t threads) {
    require(!a.maps.empty(), "spatial_shapes", "at least one (height, width)", 0);
    check_views(a);
    const DeformableAttentionSizes s{a.value.sizes[0],  a.value.sizes[1],  a.value.sizes[2], a.value.sizes[3],
                                     a.places.sizes[1], a.places.sizes[4], a.maps,           threads};
    check_sizes(s);
    check_points_dense(a);
    const Dtype real = computed(a.value.dtype);
    const auto require_dtype = [](const TensorView& view, const char* name, Dtype dtype) {
        require(view.dtype == dtype, name, "dtype " + std::to_string(static_cast<int>(dtype)),
                static_cast<int>(view.dtype));
    };
    if (a.reference.given()) {
        require_dtype(a.reference, "reference", real);
        check_dense(a.reference, "reference", 0);
        if (a.places.dtype != a.value.dtype) require_dtype(a.places, "places", real);
        require_dtype(a.weights, "weights", a.places.dtype);
    } else {
        require_dtype(a.places, "places", real);
        require_dtype(a.weights, "weights", a.value.dtype);
        check_dense(a.places, "places", 0);
        check_dense(a.weights, "weights", 0);
    }
    return s;
}

PointStrides strides_of(const TensorView& points) {
    return {points.strides[0], points.strides[1], points.strides[2]};
}

DeformableAttentionPoints points_of(const DeformableViews& a) {
    DeformableAttentionPoints points;
    if (!a.reference.given()) {
        points.locations = a.places.data;
        points.weights = a.weights.data;
        return points;
    }
    points.offsets = a.places.data;
    points.logits = a.weights.data;
    points.offsets_strides = strides_of(a.places);
    points.logits_strides = strides_of(a.weights);
    points.wide = a.places.dtype != a.value.dtype;
    points.reference = a.reference.data;
    points.reference_batch = a.reference.sizes[0];
    points.reference_levels = a.reference.sizes[2];
    points.coordinates = a.reference.sizes[3];
    return points;
}

ValueStrides value_strides(const DeformableViews& a) {
    return {a.value.strides[0], a.value.strides[1], a.value.strides[2]};
}

template <typename Element>
void run_forward(const DeformableAttentionForward& a) {
    using Launch = DeformableLaunch<Element>;
    const DeformableAttentionSizes& s = a.sizes;

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

void deformable_attention_forward(const DeformableViews& a, const TensorView& out, int64_t threads) {
    const DeformableAttentionSizes s = checked_sizes(a, threads);
    check_contiguous(out, "out", {s.batch, s.queries, s.heads * s.head_dim}, a.value.dtype);
    if (s.batch == 0 || s.queries == 0) return;
    const DeformableAttentionForward arguments{s, a.value.data, value_strides(a), points_of(a), out.data};
    with_element(a.value.dtype, [&](auto element) { run_forward<decltype(element)>(arguments); });
}

void deformable_attention_backward(const DeformableViews& a, const TensorView& grad_out,
                                   const DeformableGradients& gradients, int64_t threads) {
    const DeformableAttentionSizes s = checked_sizes(a, threads);
    check_contiguous(grad_out, "grad_out", {s.batch, s.queries, s.heads * s.head_dim}, a.value.dtype);
    check_gradient(gradients.value, "grad_value", a.value, a.value.dtype);
    check_gradient(gradients.places, "grad_places", a.places, a.places.dtype);
    check_gradient(gradients.weights, "grad_weights", a.weights, a.weights.dtype);
    require(a.reference.given() || !gradients.reference.given(), "grad_reference",
            "None without reference points", 1);
    check_gradient(gradients.reference, "grad_reference", a.reference, a.reference.dtype);
    if (s.batch == 0) return;
    DeformableAttentionBackward arguments{
        s, grad_out.data, a.value.data, value_strides(a), points_of(a), gradients.value.data};
    const bool fused = a.reference.given();
    (fused ? arguments.grad_offsets : arguments.grad_locations) = gradients.places.data;
    (fused ? arguments.grad_logits : arguments.grad_weights) = gradients.weights.data;
    arguments.grad_reference = gradients.reference.data;
    with_element(a.value.dtype, [&](auto element) { run_backward<decltype(element)>(arguments); });
}

}  // namespace magnet_fast
