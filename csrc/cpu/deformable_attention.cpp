#include "cpu/deformable_attention.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "cpu/deformable_kernel.h"
#include "cpu/launch.h"

namespace magnet_fast {

namespace {

/// Whether the product of sizes below 2^31 is a number of floats that can be addressed.
bool addressable(std::initializer_list<int64_t> sizes) {
    int64_t room = std::numeric_limits<int64_t>::max() / 8;
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
    int64_t positions = 0;
    for (const auto& [height, width] : s.maps) {
        // Sides of at most 2^24 are exact in float32.
        require(height > 0 && height <= kSide, "spatial_shapes", "heights of 1 .. 2^24", height);
        require(width > 0 && width <= kSide, "spatial_shapes", "widths of 1 .. 2^24", width);
        positions += height * width;
        require(positions <= kPositions, "spatial_shapes", "at most 2^30 positions together", positions);
    }
    require(positions == s.positions, "spatial_shapes",
            "maps of " + std::to_string(s.positions) + " positions together, as value has", positions);
    constexpr int64_t kPoints = int64_t{1} << 20;
    require(s.points <= kPoints / std::min(levels, kPoints), "points",
            "at most 2^20 points a query on all levels", s.points);
    require(addressable({s.batch, s.positions, s.heads, s.head_dim}), "batch", "value to be addressable",
            s.batch);
    require(addressable({s.batch, s.queries, s.heads, std::max(s.head_dim, 2 * levels * s.points)}),
            "queries", "the points and the result to be addressable", s.queries);
}

/// Strides of a tensor that is read may be anything that is not negative (0: broadcast).
void check_strides(const DeformableAttentionSizes& s, const ValueStrides& strides) {
    const std::pair<int64_t, int64_t> axes[] = {
        {strides.batch, s.batch}, {strides.position, s.positions}, {strides.head, s.heads}};
    for (const auto& [stride, extent] : axes)
        require(extent <= 1 || stride >= 0, "value_strides", "strides of at least 0", stride);
}

/// The points of some consecutive levels of a query, and the maps that they read.
class LevelRange {
  public:
    LevelRange(const DeformableAttentionSizes& s, int64_t begin, int64_t end)
        : first_point(begin * s.points),
          points((end - begin) * s.points),
          block_queries(std::max<int64_t>(1, kDeformableBlock / points)) {
        const int64_t room = block_queries * points + 15;
        for (std::vector<float>* numbers : {&width_, &height_}) numbers->reserve(room);
        for (std::vector<int32_t>* numbers : {&columns_, &rows_, &start_}) numbers->reserve(room);
        for (int64_t query = 0; query < block_queries; ++query) {
            int64_t start = 0;
            for (int64_t level = 0; level < end; ++level) {
                const auto [height, width] = s.maps[level];
                for (int64_t point = 0; level >= begin && point < s.points; ++point) {
                    width_.push_back(static_cast<float>(width));
                    height_.push_back(static_cast<float>(height));
                    columns_.push_back(static_cast<int32_t>(width));
                    rows_.push_back(static_cast<int32_t>(height));
                    start_.push_back(static_cast<int32_t>(start));
                }
                start += height * width;
            }
        }
        // The kernels read whole vectors.
        for (std::vector<float>* numbers : {&width_, &height_}) numbers->resize(room, 1.0f);
        for (std::vector<int32_t>* numbers : {&columns_, &rows_, &start_}) numbers->resize(room, 0);
    }

    DeformableMaps maps() const {
        return {width_.data(), height_.data(), columns_.data(), rows_.data(), start_.data()};
    }

    const int64_t first_point, points, block_queries;

  private:
    std::vector<float> width_, height_;
    std::vector<int32_t> columns_, rows_, start_;
};

/// What one thread works with. Made before the threads start: an exception could not leave a parallel region.
struct Worker {
    AlignedFloats scratch, value, grad_value;
    int64_t packed_slice = -1;  // the one that `value` holds
};

/// Cuts (image, head) slices, and the queries or levels of each, into tasks and runs them on all threads.
struct Launch {
    const DeformableAttentionSizes& sizes;
    const float* value;
    const ValueStrides& strides;
    const float* locations;
    const float* weights;
    const DeformableKernels<float>& kernels = deformable_kernels<float>();
    const int64_t levels = static_cast<int64_t>(sizes.maps.size());
    const int64_t slices = sizes.batch * sizes.heads;

    /// Calls work(slice, part, worker) for every slice and part. `largest`: of the ranges that work uses.
    template <typename Work>
    void run(int64_t parts, const LevelRange& largest, bool reads_value, bool writes_value,
             const Work& work) const {
        const int64_t tasks = slices * parts, block = largest.block_queries * largest.points;
        const int team = static_cast<int>(std::min(sizes.threads, tasks));
        const int64_t packed = kernels.packed_floats(sizes.positions, sizes.head_dim);
        std::vector<Worker> workers(team);
        for (Worker& worker : workers) {
            worker.scratch = aligned_floats(kernels.scratch_floats(block));
            if (reads_value) worker.value = aligned_floats(packed);
            if (writes_value) worker.grad_value = aligned_floats(packed);
        }
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
        for (int64_t t = 0; t < tasks; ++t) {
            Worker& worker = workers[thread_index()];
            const int64_t slice = t / parts;
            if (reads_value && worker.packed_slice != slice) {
                const float* from =
                    value + slice / sizes.heads * strides.batch + slice % sizes.heads * strides.head;
                kernels.pack(from, strides.position, sizes.positions, sizes.head_dim, worker.value.get());
                worker.packed_slice = slice;
            }
            work(slice, t % parts, worker);
        }
    }

    /// Parts into which the queries of a slice are cut so that every thread gets work.
    int64_t query_parts() const {
        const int64_t wanted = slices >= 2 * sizes.threads ? 1 : (2 * sizes.threads + slices - 1) / slices;
        return std::max<int64_t>(1, std::min(wanted, sizes.queries / 64));
    }

    /// First query of a part.
    int64_t first_query(int64_t part, int64_t parts) const { return sizes.queries * part / parts; }

    /// Counts (image, query, head) triples before a query of a slice.
    int64_t place(int64_t slice, int64_t query) const {
        return (slice / sizes.heads * sizes.queries + query) * sizes.heads + slice % sizes.heads;
    }

    /// Index of the first point of a range's levels.
    int64_t first_point(int64_t slice, int64_t query, const LevelRange& range) const {
        return place(slice, query) * levels * sizes.points + range.first_point;
    }

    /// Fills what the two passes share.
    void prepare(int64_t slice, int64_t begin, int64_t end, const LevelRange& range, const Worker& worker,
                 DeformableForward& arguments) const {
        arguments.queries = end - begin;
        arguments.points = range.points;
        arguments.head_dim = sizes.head_dim;
        arguments.positions = sizes.positions;
        arguments.block_queries = range.block_queries;
        arguments.value = worker.value.get();
        arguments.locations = locations + 2 * first_point(slice, begin, range);
        arguments.weights = weights + first_point(slice, begin, range);
        arguments.query_points = sizes.heads * levels * sizes.points;
        arguments.maps = range.maps();
        arguments.out_row = sizes.heads * sizes.head_dim;
        arguments.scratch = worker.scratch.get();
    }
};

/// The gradients wanted of one call.
struct Backward {
    const DeformableAttentionBackward& a;
    const Launch& launch;

    void run(int64_t slice, int64_t begin, int64_t end, const LevelRange& range, bool points, bool value,
             Worker& worker) const {
        DeformableBackward arguments;
        launch.prepare(slice, begin, end, range, worker, arguments);
        const int64_t point = launch.first_point(slice, begin, range);
        arguments.out = nullptr;
        arguments.grad_out = a.grad_out + launch.place(slice, begin) * a.sizes.head_dim;
        arguments.grad_value = value ? worker.grad_value.get() : nullptr;
        arguments.grad_locations = points && a.grad_locations ? a.grad_locations + 2 * point : nullptr;
        arguments.grad_weights = points && a.grad_weights ? a.grad_weights + point : nullptr;
        launch.kernels.backward(arguments);
    }

    /// Scatters a slice's gradient into positions [first, last), those of the range's levels.
    void scatter(int64_t slice, int64_t first, int64_t last, const LevelRange& range, bool points,
                 Worker& worker) const {
        const DeformableAttentionSizes& s = a.sizes;
        float* packed = worker.grad_value.get();
        launch.kernels.clear(packed, s.positions, s.head_dim, first, last);
        run(slice, 0, s.queries, range, points, true, worker);
        float* to = a.grad_value + (slice / s.heads * s.positions * s.heads + slice % s.heads) * s.head_dim;
        launch.kernels.unpack(packed, s.positions, s.head_dim, first, last, to, s.heads * s.head_dim);
    }
};

}  // namespace

void deformable_attention_forward(const DeformableAttentionForward& a) {
    const DeformableAttentionSizes& s = a.sizes;
    check_sizes(s);
    check_strides(s, a.value_strides);
    if (s.batch == 0 || s.queries == 0) return;
    check_pointer(a.value, "value_ptr");
    check_pointer(a.locations, "locations_ptr");
    check_pointer(a.weights, "weights_ptr");
    check_pointer(a.out, "out_ptr");

    const Launch launch{s, a.value, a.value_strides, a.locations, a.weights};
    const LevelRange all(s, 0, launch.levels);
    const int64_t parts = launch.query_parts();
    launch.run(parts, all, true, false, [&](int64_t slice, int64_t part, Worker& worker) {
        const int64_t begin = launch.first_query(part, parts), end = launch.first_query(part + 1, parts);
        DeformableForward arguments;
        launch.prepare(slice, begin, end, all, worker, arguments);
        arguments.out = a.out + launch.place(slice, begin) * s.head_dim;
        launch.kernels.forward(arguments);
    });
}

void deformable_attention_backward(const DeformableAttentionBackward& a) {
    const DeformableAttentionSizes& s = a.sizes;
    check_sizes(s);
    check_strides(s, a.value_strides);
    if (s.batch == 0) return;
    if (s.queries > 0) {
        check_pointer(a.grad_out, "grad_out_ptr");
        check_pointer(a.value, "value_ptr");
        check_pointer(a.locations, "locations_ptr");
        check_pointer(a.weights, "weights_ptr");
    }
    if (a.grad_value) check_pointer(a.grad_value, "grad_value_ptr");
    if (a.grad_locations) check_pointer(a.grad_locations, "grad_locations_ptr");
    if (a.grad_weights) check_pointer(a.grad_weights, "grad_weights_ptr");

    const Launch launch{s, a.value, a.value_strides, a.locations, a.weights};
    const Backward backward{a, launch};
    const LevelRange all(s, 0, launch.levels);
    const bool points = s.queries > 0 && (a.grad_locations || a.grad_weights);
    // A position of grad_value is added to by one thread only, in the order of queries and points: no
    // atomics, and the same bits however the work is divided. With enough slices a task does everything for
    // one slice ...
    if (a.grad_value && launch.slices >= 2 * s.threads) {
        launch.run(1, all, points, true, [&](int64_t slice, int64_t, Worker& worker) {
            backward.scatter(slice, 0, s.positions, all, points, worker);
        });
        return;
    }
    // ... with few, points are divided by query, and positions by level.
    if (points) {
        const int64_t parts = launch.query_parts();
        launch.run(parts, all, true, false, [&](int64_t slice, int64_t part, Worker& worker) {
            const int64_t begin = launch.first_query(part, parts), end = launch.first_query(part + 1, parts);
            backward.run(slice, begin, end, all, true, false, worker);
        });
    }
    if (a.grad_value) {
        std::vector<LevelRange> ranges;
        std::vector<int64_t> starts{0};
        for (int64_t level = 0; level < launch.levels; ++level) {
            ranges.emplace_back(s, level, level + 1);
            starts.push_back(starts.back() + s.maps[level].first * s.maps[level].second);
        }
        launch.run(
            launch.levels, ranges.front(), false, true, [&](int64_t slice, int64_t level, Worker& worker) {
                backward.scatter(slice, starts[level], starts[level + 1], ranges[level], false, worker);
            });
    }
}

}  // namespace magnet_fast
