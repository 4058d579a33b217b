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
void plan(DeformableParams& p, const MapSizes& maps) {
    const int64_t levels = static_cast<int64_t>(maps.size());
    require(levels > 0 && levels <= kMostLevels, "spatial_shapes",
            "1 .. " + std::to_string(kMostLevels) + " maps", levels);
    require(p.points <= kMostPoints / levels, "places",
            "at most " + std::to_string(kMostPoints) + " points on all maps", levels * p.points);
    p.levels = static_cast<int32_t>(levels);
    p.total = static_cast<int32_t>(levels * p.points);
    constexpr int64_t kPoints = std::numeric_limits<int32_t>::max();
    require(p.queries <= kPoints / p.total, "places", "fewer than 2^31 points of one head", p.queries);

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
    require(addressable({p.batch, p.heads, std::max<int64_t>(p.positions, bins + 1), p.head_dim}), "value",
            "it to be addressable", p.batch);
    require(addressable({p.batch, p.heads, p.queries, std::max<int64_t>(p.head_dim, 32 * p.total)}), "places",
            "the points and the result to be addressable", p.queries);
}

Strides3 strides_of(const TensorView& view) {
    return {view.strides[0], view.strides[1], view.strides[2]};
}

/// The call's parameters, checked.
DeformableParams params_of(const DeformableViews& a) {
    constexpr int64_t kMost = int64_t{1} << 30;  // kernels count positions, queries and channels in 32 bits
    check_kernel_dtype(a.value, "value");
    check_tensor(a.value, "value", 4, a.value.dtype);
    for (int i = 0; i < 4; ++i)
        require(a.value.sizes[i] > 0 && a.value.sizes[i] < kMost, "value", "sizes of 1 .. 2^30 - 1",
                a.value.sizes[i]);
    check_views(a);
    for (const int64_t size : {a.places.sizes[1], a.places.sizes[4]})
        require(size > 0 && size < kMost, "places", "queries and points of 1 .. 2^30 - 1", size);
    DeformableParams p{};
    p.batch = a.value.sizes[0];
    p.positions = static_cast<int32_t>(a.value.sizes[1]);
    p.heads = static_cast<int32_t>(a.value.sizes[2]);
    p.head_dim = static_cast<int32_t>(a.value.sizes[3]);
    p.queries = static_cast<int32_t>(a.places.sizes[1]);
    p.points = static_cast<int32_t>(a.places.sizes[4]);
    plan(p, a.maps);
    check_points_dense(a);
    const auto check_points = [&](const TensorView& view, const char* name) {
        require(view.dtype == Dtype::kFloat32 || view.dtype == a.value.dtype, name,
                "dtype 0 (float32) or that of value", static_cast<int64_t>(view.dtype));
    };
    check_points(a.places, "places");
    check_points(a.weights, "weights");
    p.value = a.value.data;
    p.value_strides = strides_of(a.value);
    p.places = a.places.data;
    p.places_strides = strides_of(a.places);
    p.places_dtype = a.places.dtype;
    p.weights = a.weights.data;
    p.weights_strides = strides_of(a.weights);
    p.weights_dtype = a.weights.dtype;
    p.coordinates = 2;
    p.reference_batch = p.reference_levels = 1;
    p.reference_dtype = a.value.dtype;
    if (!a.reference.given()) return p;
    check_points(a.reference, "reference");
    p.reference = a.reference.data;
    p.reference_strides = strides_of(a.reference);
    p.reference_dtype = a.reference.dtype;
    p.reference_batch = static_cast<int32_t>(a.reference.sizes[0]);
    p.reference_levels = static_cast<int32_t>(a.reference.sizes[2]);
    p.coordinates = static_cast<int32_t>(a.reference.sizes[3]);
    // What there is once serves all images or maps.
    if (p.reference_batch == 1) p.reference_strides.batch = 0;
    if (p.reference_levels == 1) p.reference_strides.head = 0;
    return p;
}

/// With what the backward pass takes beside them.
DeformableParams params_of(const DeformableViews& a, const TensorView& grad_out,
                           const DeformableGradients& grads) {
    DeformableParams p = params_of(a);
    const int64_t width = static_cast<int64_t>(p.heads) * p.head_dim;
    check_tensor(grad_out, "grad_out", {p.batch, p.queries, width}, a.value.dtype);
    check_dense(grad_out, "grad_out", 2);
    check_gradient(grads.value, "grad_value", a.value, a.value.dtype);
    check_gradient(grads.places, "grad_places", a.places, a.places.dtype);
    check_gradient(grads.weights, "grad_weights", a.weights, a.weights.dtype);
    require(a.reference.given() || !grads.reference.given(), "grad_reference",
            "None without reference points", 1);
    check_gradient(grads.reference, "grad_reference", a.reference, Dtype::kFloat32);
    p.grad_out = grad_out.data;
    p.grad_out_batch = grad_out.strides[0];
    p.grad_out_query = grad_out.strides[1];
    p.grad_value = grads.value.data;
    p.grad_places = grads.places.data;
    p.grad_weights = grads.weights.data;
    p.grad_reference = static_cast<float*>(grads.reference.data);
    return p;
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

void deformable_attention_forward(const DeformableViews& views, const TensorView& out, const Place& place) {
    DeformableParams p = params_of(views);
    const Dtype dtype = views.value.dtype;
    check_contiguous(out, "out", {p.batch, p.queries, static_cast<int64_t>(p.heads) * p.head_dim}, dtype);
    p.out = out.data;

    const Device device(place);
    const bool wide = aligned({p.value, p.out},
                              {p.value_strides.batch, p.value_strides.row, p.value_strides.head, p.head_dim},
                              bytes_of(dtype));
    const int64_t vector = wide ? 16 / bytes_of(dtype) : 1;
    start_rows(device, MAGNET_FAST_CHOSEN(forward), p, p.queries, whole(p.head_dim, vector));
}

int64_t deformable_attention_workspace(const DeformableViews& views, const TensorView& grad_out,
                                       const DeformableGradients& gradients) {
    return Workspace(params_of(views, grad_out, gradients)).bytes();
}

void deformable_attention_backward(const DeformableViews& views, const TensorView& grad_out,
                                   const DeformableGradients& gradients, const Place& place,
                                   const TensorView& workspace) {
    DeformableParams p = params_of(views, grad_out, gradients);
    const Dtype dtype = views.value.dtype;
    const Workspace sizes(p);
    check_workspace(workspace, sizes.bytes(), "deformable_attention_workspace");
    char* at = static_cast<char*>(workspace.data);
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
