// Deformable attention's launchers: checks, the workspace, and the order of the kernels.
#include "cuda/deformable_attention.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

namespace magnet_fast {
namespace cuda {
namespace {

// Sorting a point takes as many comparisons as its bin has points: bins are split by query to have about this
// many, if points are spread evenly.
constexpr int64_t kPointsOfBin = 32;

int64_t whole(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

/// Whether the product of sizes is a number of elements that can be addressed.
bool addressable(std::initializer_list<int64_t> sizes) {
    int64_t room = std::numeric_limits<int64_t>::max() / 16;
    for (int64_t size : sizes) room /= size;
    return room > 0;
}

/// Checks the sizes and fills in what follows from them.
void plan(DeformableParams& p, const Maps& maps) {
    constexpr int64_t kMost = int64_t{1} << 30;  // kernels count positions, queries and channels in 32 bits
    const std::pair<const char*, int64_t> positive[] = {
        {"batch", p.batch},       {"positions", p.positions}, {"heads", p.heads},
        {"head_dim", p.head_dim}, {"queries", p.queries},     {"points", p.points},
    };
    for (const auto& [name, value] : positive)
        require(value > 0 && value < kMost, name, "1 .. 2^30 - 1", value);
    const int64_t levels = static_cast<int64_t>(maps.size());
    require(levels > 0 && levels <= kMostLevels, "spatial_shapes",
            "1 .. " + std::to_string(kMostLevels) + " maps", levels);
    require(levels * p.points <= kMostPoints, "points",
            "at most " + std::to_string(kMostPoints) + " points on all maps", levels * p.points);
    p.levels = static_cast<int32_t>(levels);
    p.total = static_cast<int32_t>(levels * p.points);
    constexpr int64_t kPoints = std::numeric_limits<int32_t>::max();
    require(p.queries <= kPoints / p.total, "queries", "fewer than 2^31 points of one head", p.queries);

    int64_t positions = 0, bins = 0;
    for (int64_t level = 0; level < levels; ++level) {
        constexpr int64_t kSide = int64_t{1} << 24;  // exact in float32
        const auto [height, width] = maps[level];
        require(height > 0 && height <= kSide, "spatial_shapes", "heights of 1 .. 2^24", height);
        require(width > 0 && width <= kSide, "spatial_shapes", "widths of 1 .. 2^24", width);
        const int64_t squares = (height + 1) * (width + 1);
        const int64_t groups = whole(static_cast<int64_t>(p.queries) * p.points, squares * kPointsOfBin);
        p.maps[level] = {static_cast<int32_t>(height), static_cast<int32_t>(width),
                         static_cast<int32_t>(positions), static_cast<int32_t>(groups),
                         static_cast<int32_t>(bins)};
        positions += height * width;
        require(positions <= p.positions, "spatial_shapes",
                "maps of " + std::to_string(p.positions) + " positions together", positions);
        bins += squares * groups;
        require(bins < kPoints, "spatial_shapes", "maps of fewer than 2^31 squares", bins);
    }
    require(positions == p.positions, "spatial_shapes",
            "maps of " + std::to_string(p.positions) + " positions together", positions);
    p.bins = static_cast<int32_t>(bins);
    require(addressable({p.batch, p.heads, std::max<int64_t>(p.positions, bins + 1), p.head_dim}), "batch",
            "value to be addressable", p.batch);
    require(addressable({p.batch, p.heads, p.queries, std::max<int64_t>(p.head_dim, 32 * p.total)}),
            "queries", "the points and the result to be addressable", p.queries);
}

void check_strides(const Strides3& strides, const std::string& name) {
    const int64_t least = std::min({strides.batch, strides.row, strides.head});
    require(least >= 0, name, "strides of at least 0", least);
}

/// Of the tensors that both passes read.
void check_inputs(const DeformableParams& p, Dtype dtype) {
    check_address(p.value, bytes_of(dtype), "value_ptr");
    check_strides(p.value_strides, "value_strides");
    const auto check_points = [&](const void* data, const Strides3& strides, Dtype of,
                                  const std::string& name) {
        require(of == Dtype::kFloat32 || of == dtype, name + "_dtype", "0 (float32) or that of value",
                static_cast<int64_t>(of));
        check_address(data, bytes_of(of), name + "_ptr");
        check_strides(strides, name + "_strides");
    };
    check_points(p.places, p.places_strides, p.places_dtype, "places");
    check_points(p.weights, p.weights_strides, p.weights_dtype, "weights");
    if (!p.reference) return;
    check_points(p.reference, p.reference_strides, p.reference_dtype, "reference");
    require(p.coordinates == 2 || p.coordinates == 4, "coordinates", "2 or 4", p.coordinates);
}

/// Whether all of them are multiples of 16 bytes.
bool aligned(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> elements,
             int64_t bytes) {
    uintptr_t all = 0;
    for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
    for (const int64_t count : elements) all |= static_cast<uintptr_t>(count * bytes);
    return all % 16 == 0;
}

/// A power of two, at least 2: as many lanes as there are pieces of work, or the whole warp.
int32_t lanes_for(int64_t pieces) {
    int32_t lanes = 2;
    while (lanes < 32 && lanes < pieces) lanes *= 2;
    return lanes;
}

/// Starts a kernel in which some lanes share a row, a query or position of an image and head, by `pieces` of
/// work.
void start_rows(const Device& device, DeformableKernel kernel, DeformableParams p, int64_t rows,
                int64_t pieces, bool slopes = false) {
    p.lanes = lanes_for(pieces);
    p.blocks = whole(rows, kDeformableThreads / p.lanes);
    const int shared = slopes ? deformable_points_shared(p.total, p.lanes) : kRecordBytes;
    require(shared <= device.shared_bytes, "points", "points that fit in the device's shared memory",
            p.total);
    device.start(kernel, p.batch * p.heads * p.blocks, kDeformableThreads, shared, p);
}

DeformableKernel chosen(Dtype dtype, bool wide, DeformableKernel (*bfloat16)(bool),
                        DeformableKernel (*float16)(bool), DeformableKernel (*float32)(bool)) {
    return dtype == Dtype::kBFloat16  ? bfloat16(wide)
           : dtype == Dtype::kFloat16 ? float16(wide)
                                      : float32(wide);
}
#define MAGNET_FAST_CHOSEN(name)                                                               \
    chosen(dtype, wide, &DeformableKernels<BFloat16>::name, &DeformableKernels<Float16>::name, \
           &DeformableKernels<float>::name)

/// Pieces of the workspace, in bytes, each a multiple of 16.
struct Workspace {
    int64_t reference_parts = 0, starts = 0, of_points = 0, sorted = 0;
    explicit Workspace(const DeformableParams& p) {
        const int64_t slots = p.batch * p.heads, points = slots * p.queries * p.total;
        if (p.grad_reference) reference_parts = whole(points * p.coordinates * 4, 16) * 16;
        if (!p.grad_value) return;
        starts = whole(slots * (static_cast<int64_t>(p.bins) + 1) * 4, 16) * 16;
        of_points = whole(points * 4, 16) * 16;
        sorted = points * static_cast<int64_t>(sizeof(SortedPoint));
    }
    /// Bins, numbers and lists of the points.
    int64_t bytes() const { return reference_parts + starts + 3 * of_points + sorted; }
};

/// The bins' points, in order; see deformable_attention.h.
void sort_points(const Device& device, DeformableParams p) {
    const int64_t slots = p.batch * p.heads, points = static_cast<int64_t>(p.queries) * p.total;
    device.start(deformable_clear(),
                 whole(slots * (static_cast<int64_t>(p.bins) + 1), 4 * kDeformableThreads),
                 kDeformableThreads, 0, p);
    p.blocks = whole(points, kDeformableThreads);
    device.start(deformable_count(), slots * p.blocks, kDeformableThreads, 0, p);
    device.start(deformable_scan(), slots, kScanThreads, kScanThreads * 4, p);
    device.start(deformable_list(), slots * p.blocks, kDeformableThreads, 0, p);
    start_rows(device, deformable_sort(), p, p.queries, p.total);
}

}  // namespace

void deformable_attention_forward(DeformableParams p, const Maps& maps, Dtype dtype, const Place& place) {
    plan(p, maps);
    check_inputs(p, dtype);
    check_address(p.out, bytes_of(dtype), "out_ptr");

    const Device device(place);
    const bool wide = aligned({p.value, p.out},
                              {p.value_strides.batch, p.value_strides.row, p.value_strides.head, p.head_dim},
                              bytes_of(dtype));
    const int64_t vector = wide ? 16 / bytes_of(dtype) : 1;
    start_rows(device, MAGNET_FAST_CHOSEN(forward), p, p.queries, whole(p.head_dim, vector));
}

int64_t deformable_attention_workspace(DeformableParams p, const Maps& maps) {
    plan(p, maps);
    return Workspace(p).bytes();
}

void deformable_attention_backward(DeformableParams p, const Maps& maps, Dtype dtype, const Place& place,
                                   void* workspace, int64_t workspace_bytes) {
    plan(p, maps);
    check_inputs(p, dtype);
    check_address(p.grad_out, bytes_of(dtype), "grad_out_ptr");
    require(p.grad_out_batch >= 0 && p.grad_out_query >= 0, "grad_out_strides", "strides of at least 0",
            std::min(p.grad_out_batch, p.grad_out_query));
    if (p.grad_value) check_address(p.grad_value, bytes_of(dtype), "grad_value_ptr");
    if (p.grad_places) check_address(p.grad_places, bytes_of(p.places_dtype), "grad_places_ptr");
    if (p.grad_weights) check_address(p.grad_weights, bytes_of(p.weights_dtype), "grad_weights_ptr");
    if (p.grad_reference) {
        require(p.reference != nullptr, "grad_reference_ptr", "no gradient without reference points", 1);
        check_address(p.grad_reference, 4, "grad_reference_ptr");
        require(p.reference_batch == 1 || p.reference_batch == p.batch, "reference_batch",
                "1 or the batch " + std::to_string(p.batch), p.reference_batch);
        require(p.reference_levels == 1 || p.reference_levels == p.levels, "reference_levels",
                "1 or the number of maps " + std::to_string(p.levels), p.reference_levels);
    }
    const Workspace sizes(p);
    require(workspace_bytes >= sizes.bytes(), "workspace_bytes",
            "at least " + std::to_string(sizes.bytes()) + ", see deformable_attention_workspace",
            workspace_bytes);
    if (sizes.bytes() > 0) check_address(workspace, 16, "workspace_ptr");
    char* at = static_cast<char*>(workspace);
    const auto take = [&](int64_t bytes) { return std::exchange(at, at + bytes); };
    p.reference_parts = reinterpret_cast<float*>(p.grad_reference ? take(sizes.reference_parts) : nullptr);
    p.starts = reinterpret_cast<int32_t*>(take(sizes.starts));
    for (int32_t** each : {&p.bin_of, &p.numbers, &p.list})
        *each = reinterpret_cast<int32_t*>(take(sizes.of_points));
    p.sorted = take(sizes.sorted);

    const Device device(place);
    const int64_t bytes = bytes_of(dtype);
    const std::initializer_list<int64_t> read = {p.grad_out_batch, p.grad_out_query, p.head_dim};
    const bool wide_grad = aligned({p.grad_out}, read, bytes);
    if (p.grad_value) {
        const bool wide = wide_grad && aligned({p.grad_value}, {}, bytes);
        sort_points(device, p);
        start_rows(device, MAGNET_FAST_CHOSEN(value), p, p.positions,
                   whole(p.head_dim, wide ? 16 / bytes : 1));
    }
    if (!p.grad_places && !p.grad_weights && !p.grad_reference) return;
    const bool wide =
        wide_grad &&
        aligned({p.value}, {p.value_strides.batch, p.value_strides.row, p.value_strides.head}, bytes);
    start_rows(device, MAGNET_FAST_CHOSEN(points), p, p.queries, whole(p.head_dim, wide ? 16 / bytes : 1),
               /*slopes=*/true);
    if (!p.grad_reference) return;
    const int64_t numbers =
        static_cast<int64_t>(p.reference_batch) * p.queries * p.reference_levels * p.coordinates;
    device.start(deformable_reference(), whole(numbers, kDeformableThreads), kDeformableThreads, 0, p);
}

}  // namespace cuda
}  // namespace magnet_fast
