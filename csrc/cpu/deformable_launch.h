// How deformable attention is cut into tasks: (image, head) slices, and the queries or levels of each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/deformable_attention.h"
#include "cpu/deformable_kernel.h"
#include "cpu/launch.h"

namespace magnet_fast {

/// Sizes shared by both passes: B, S = the levels' positions together, h, d, Q and K; L is the number of
/// maps.
struct DeformableAttentionSizes {
    int64_t batch, positions, heads, head_dim, queries, points;
    MapSizes maps;
    int64_t threads;  // OpenMP threads; the result does not depend on it, not in a single bit
};

/// Distances, in elements, between neighbours along batch, position and head; the last dimension is
/// contiguous.
struct ValueStrides {
    int64_t batch, position, head;
};

/// Distances, in elements, between neighbours along batch, query and head; (L, K) or (L, K, 2) within them is
/// contiguous.
struct PointStrides {
    int64_t batch, query, head;
};

/// Either `locations` and `weights`, or the other five: points as two Linears give them.
struct DeformableAttentionPoints {
    const void* locations =
        nullptr;  // (B, Q, h, L, K, 2) as (x, y), contiguous; float32, beside float64 float64
    const void* weights = nullptr;  // (B, Q, h, L, K), contiguous

    const void* offsets =
        nullptr;                   // (B, Q, h, L, K, 2) in pixels of the level, or parts of the reference box
    const void* logits = nullptr;  // (B, Q, h, L, K), softmax over (L, K)
    PointStrides offsets_strides{}, logits_strides{};
    bool wide = false;                // offsets and logits are float32 beside a bfloat16 or float16 value
    const void* reference = nullptr;  // (1 or B, Q, 1 or L, coordinates), contiguous; float32 or float64
    int64_t reference_batch = 1, reference_levels = 1;
    int64_t coordinates = 2;  // 2: (x, y), or 4: (x, y, width, height)
};

struct DeformableAttentionForward {
    DeformableAttentionSizes sizes;
    const void* value;  // (B, S, h, d)
    ValueStrides value_strides;
    DeformableAttentionPoints points;
    void* out;  // (B, Q, h * d), contiguous, written
};

/// Gradients are contiguous, of the shapes and types of their tensors, and written; null: not wanted.
struct DeformableAttentionBackward {
    DeformableAttentionSizes sizes;
    const void* grad_out;  // (B, Q, h * d), contiguous
    const void* value;
    ValueStrides value_strides;
    DeformableAttentionPoints points;
    void* grad_value;
    void* grad_locations = nullptr;
    void* grad_weights = nullptr;
    void* grad_reference = nullptr;
    void* grad_offsets = nullptr;
    void* grad_logits = nullptr;
};

/// Uninitialised numbers at a 64-byte boundary.
template <typename Real>
class AlignedReals {
  public:
    AlignedReals() = default;
    explicit AlignedReals(int64_t count)
        : memory_(aligned_floats(count * static_cast<int64_t>(sizeof(Real) / sizeof(float)))) {}
    Real* get() const { return reinterpret_cast<Real*>(memory_.get()); }

  private:
    AlignedFloats memory_;
};

/// The maps in `value` and in a packed slice.
struct DeformableLayout {
    explicit DeformableLayout(const DeformableAttentionSizes& sizes) {
        int64_t position = 0;
        for (const auto& [height, width] : sizes.maps) {
            const int64_t line = DeformableLevel::line_of(width);
            levels.push_back({height, width, position, rows + 2 * line + 1, line});
            position += height * width;
            rows = levels.back().end_row();
        }
    }
    std::vector<DeformableLevel> levels;
    int64_t rows = 0;
};

/// The points of some consecutive levels of a query, and the maps that they read.
template <typename Real>
class LevelRange {
  public:
    LevelRange(const DeformableLayout& layout, int64_t points_each, int64_t begin, int64_t end)
        : begin(begin),
          count(end - begin),
          first_point(begin * points_each),
          points(count * points_each),
          block_queries(std::max<int64_t>(1, kDeformableBlock / points)),
          level(layout.levels.data() + begin) {
        const int64_t room = block_queries * points + 15;
        for (auto* numbers : {&width_, &height_}) numbers->reserve(room);
        for (auto* numbers : {&row_, &line_}) numbers->reserve(room);
        for (int64_t query = 0; query < block_queries; ++query) {
            for (int64_t i = 0; i < points; ++i) {
                const DeformableLevel& map = level[i / points_each];
                width_.push_back(static_cast<Real>(map.width));
                height_.push_back(static_cast<Real>(map.height));
                row_.push_back(static_cast<Index>(map.row));
                line_.push_back(static_cast<Index>(map.line));
            }
        }
        // The kernels read whole vectors.
        for (auto* numbers : {&width_, &height_}) numbers->resize(room, 1);
        for (auto* numbers : {&row_, &line_}) numbers->resize(room, 0);
    }

    DeformableMaps<Real> maps() const { return {width_.data(), height_.data(), row_.data(), line_.data()}; }

    const int64_t begin, count;
    const int64_t first_point, points, block_queries;
    const DeformableLevel* const level;

  private:
    using Index = typename DeformableIndex<Real>::Type;
    std::vector<Real> width_, height_;
    std::vector<Index> row_, line_;
};

/// What one thread works with. Made before the threads start: an exception could not leave a parallel region.
template <typename Real>
struct DeformableWorker {
    AlignedReals<Real> scratch, value, grad_value;
    int64_t packed_slice = -1;  // the one that `value` holds
};

/// The inputs of a call, and its tasks on all threads.
template <typename Element>
struct DeformableLaunch {
    using Real = typename Computed<Element>::Real;
    using Range = LevelRange<Real>;
    using Worker = DeformableWorker<Real>;

    const DeformableAttentionSizes& sizes;
    const Element* value;
    const ValueStrides& strides;
    const DeformableAttentionPoints& points;
    const bool backward;
    const DeformableKernels<Element>& kernels = deformable_kernels<Element>();
    const typename DeformableKernels<Element>::Pack pack =
        backward ? kernels.pack_backward : kernels.pack_forward;
    const DeformableLayout layout{sizes};
    const int64_t levels = static_cast<int64_t>(sizes.maps.size());
    const int64_t slices = sizes.batch * sizes.heads;

    /// Calls work(slice, part, worker) for every slice and part. `largest`: of the ranges that work uses.
    template <typename Work>
    void run(int64_t parts, const Range& largest, bool reads_value, bool writes_value,
             const Work& work) const {
        const int64_t tasks = slices * parts, block = largest.block_queries * largest.points;
        const int team = static_cast<int>(std::min(sizes.threads, tasks));
        const int64_t packed = kernels.packed_reals(layout.rows, sizes.head_dim);
        std::vector<Worker> workers(team);
        for (Worker& worker : workers) {
            worker.scratch = AlignedReals<Real>(kernels.scratch_reals(block, levels * sizes.points));
            if (reads_value) worker.value = AlignedReals<Real>(packed);
            if (writes_value) worker.grad_value = AlignedReals<Real>(packed);
        }
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
        for (int64_t t = 0; t < tasks; ++t) {
            Worker& worker = workers[thread_index()];
            const int64_t slice = t / parts;
            if (reads_value && worker.packed_slice != slice) {
                const Element* from =
                    value + slice / sizes.heads * strides.batch + slice % sizes.heads * strides.head;
                pack(from, strides.position, layout.levels.data(), levels, layout.rows, sizes.head_dim,
                     worker.value.get());
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
    int64_t first_point(int64_t slice, int64_t query, const Range& range) const {
        return place(slice, query) * levels * sizes.points + range.first_point;
    }

    /// Where a query's points are among the two Linears' outputs.
    DeformableLogits<Element> logits(int64_t slice, int64_t query, const Range& range) const {
        const int64_t image = slice / sizes.heads, head = slice % sizes.heads;
        const int64_t size = points.wide ? sizeof(Real) : sizeof(Element);
        const auto move = [&](const void* from, const PointStrides& s, int64_t further) -> const void* {
            const int64_t elements = image * s.batch + query * s.query + head * s.head + further;
            return static_cast<const char*>(from) + elements * size;
        };
        const int64_t map = points.coordinates, row = points.reference_levels * map;
        const int64_t before = points.reference_batch > 1 ? image * sizes.queries * row : 0;
        const int64_t first = before + query * row + (points.reference_levels > 1 ? range.begin * map : 0);
        DeformableLogits<Element> found;
        found.offsets = move(points.offsets, points.offsets_strides, 2 * range.first_point);
        found.logits = move(points.logits, points.logits_strides, 0);
        found.wide = points.wide;
        found.offsets_row = points.offsets_strides.query;
        found.logits_row = points.logits_strides.query;
        found.all_points = levels * sizes.points;
        found.first_point = range.first_point;
        found.reference = static_cast<const Real*>(points.reference) + first;
        found.coordinates = map;
        found.reference_row = row;
        found.reference_level = points.reference_levels > 1 ? map : 0;
        return found;
    }

    /// Fills what the two passes share. `logits` is filled where points come so, and must outlive the call.
    void prepare(int64_t slice, int64_t begin, int64_t end, const Range& range, const Worker& worker,
                 DeformableLogits<Element>& logits_room, DeformableForward<Element>& arguments) const {
        arguments.queries = end - begin;
        arguments.levels = range.count;
        arguments.points = sizes.points;
        arguments.head_dim = sizes.head_dim;
        arguments.rows = layout.rows;
        arguments.block_queries = range.block_queries;
        arguments.level = range.level;
        arguments.maps = range.maps();
        arguments.value = worker.value.get();
        arguments.locations = nullptr;
        arguments.weights = nullptr;
        arguments.logits = nullptr;
        if (points.logits) {
            logits_room = logits(slice, begin, range);
            arguments.logits = &logits_room;
        } else {
            const int64_t point = first_point(slice, begin, range);
            arguments.locations = static_cast<const Real*>(points.locations) + 2 * point;
            arguments.weights = static_cast<const Element*>(points.weights) + point;
        }
        arguments.query_points = sizes.heads * levels * sizes.points;
        arguments.out_row = sizes.heads * sizes.head_dim;
        arguments.scratch = worker.scratch.get();
    }
};

}  // namespace magnet_fast
