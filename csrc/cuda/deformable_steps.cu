// The steps of deformable attention that look at points, not at channels; see deformable_attention.h.
#include "cuda/deformable_points.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

MAGNET_FAST_KERNEL(kDeformableThreads, 1)
deformable_clear_kernel(DeformableParams p) {
    const int64_t i = 4 * (block_index() * thread_count() + thread_index());
    const int64_t count = p.batch * p.heads * (p.bins + 1);
    for (int64_t at = i; at < i + 4 && at < count; ++at) p.starts[at] = 0;
}

/// Of a point of an image and head, number 0 .. Q * L * K - 1.
struct PointPlace {
    int64_t slot;
    int32_t number;
    bool exists;
    MAGNET_FAST_DEVICE PointPlace of(const DeformableParams& p) {
        const int64_t number = block_index() % p.blocks * thread_count() + thread_index();
        return {block_index() / p.blocks, static_cast<int32_t>(number),
                number < static_cast<int64_t>(p.queries) * p.total};
    }
    MAGNET_FAST_METHOD int64_t index(const DeformableParams& p) const {
        return slot * p.queries * p.total + number;
    }
};

MAGNET_FAST_KERNEL(kDeformableThreads, 1)
deformable_count_kernel(DeformableParams p) {
    const PointPlace at = PointPlace::of(p);
    if (!at.exists) return;
    const int query = at.number / p.total;
    const Share share{at.slot / p.heads, static_cast<int32_t>(at.slot % p.heads), query, 0, true};
    const Location location = Location::of(p, share, at.number % p.total);
    int32_t bin = -1, number = 0;
    if (location.touches) {
        const DeformableMap& map = p.maps[location.level];
        const int square = (location.line + 1) * (map.width + 1) + location.column + 1;
        const int group = static_cast<int>(static_cast<int64_t>(query) * map.groups / p.queries);
        bin = map.first_bin + square * map.groups + group;
        number = atomic_add(p.starts + at.slot * (p.bins + 1) + bin, 1);
    }
    p.bin_of[at.index(p)] = bin;
    p.numbers[at.index(p)] = number;
}

/// A block for each image and head; a thread sums its share of the bins, then turns it into places.
MAGNET_FAST_KERNEL(kScanThreads, 1)
deformable_scan_kernel(DeformableParams p) {
    int32_t* starts = p.starts + block_index() * (p.bins + 1);
    const int64_t count = p.bins + 1;
    const int begin = static_cast<int>(count * thread_index() / thread_count());
    const int end = static_cast<int>(count * (thread_index() + 1) / thread_count());
    int32_t sum = 0;
    for (int i = begin; i < end; ++i) sum += starts[i];
    int32_t* sums = reinterpret_cast<int32_t*>(shared_memory());
    store_shared(sums + thread_index(), sum);
    sync_block();
    int32_t start = 0;
    for (int i = 0; i < thread_index(); ++i) start += load_shared(sums + i);
    for (int i = begin; i < end; ++i) {
        const int32_t points = starts[i];
        starts[i] = start;
        start += points;
    }
}

MAGNET_FAST_KERNEL(kDeformableThreads, 1)
deformable_list_kernel(DeformableParams p) {
    const PointPlace at = PointPlace::of(p);
    if (!at.exists) return;
    const int32_t bin = p.bin_of[at.index(p)];
    if (bin < 0) return;
    const int32_t place = p.starts[at.slot * (p.bins + 1) + bin] + p.numbers[at.index(p)];
    p.list[at.slot * p.queries * p.total + place] = at.number;
}

/// As many lanes a query as it has points: the softmax, if there is one, is found again.
MAGNET_FAST_KERNEL(kDeformableThreads, 1)
deformable_sort_kernel(DeformableParams p) {
    const Share at = Share::of_queries(p);
    const PointWeights weights = PointWeights::of(p, at);
    if (!at.exists) return;
    const int64_t slot = at.slot(p), origin = slot * p.queries * p.total;
    for (int point = at.lane; point < p.total; point += p.lanes) {
        const int32_t number = at.row * p.total + point, bin = p.bin_of[origin + number];
        if (bin < 0) continue;
        const int32_t* starts = p.starts + slot * (p.bins + 1) + bin;
        const int32_t begin = starts[0], end = starts[1];
        int32_t place = begin;
        for (int i = begin; i < end; ++i) place += p.list[origin + i] < number;
        const Location location = Location::of(p, at, point);
        store_global(static_cast<SortedPoint*>(p.sorted) + origin + place,
                     SortedPoint{at.row, location.right, location.low, weights(p, point)});
    }
}

/// Sums over heads and points, and over images and maps that share reference points, in their order.
MAGNET_FAST_KERNEL(kDeformableThreads, 1)
deformable_reference_kernel(DeformableParams p) {
    const int64_t i = block_index() * thread_count() + thread_index();
    const int64_t row = static_cast<int64_t>(p.reference_levels) * p.coordinates;
    if (i >= p.reference_batch * p.queries * row) return;
    const int64_t query = i / row % p.queries, image = i / row / p.queries;
    const int coordinate = static_cast<int>(i % p.coordinates);
    const int level = static_cast<int>(i % row / p.coordinates);
    const int first = level * p.points, last = p.reference_levels > 1 ? first + p.points : p.total;
    double sum = 0.0;
    for (int64_t batch = image; batch < p.batch; batch += p.reference_batch)
        for (int head = 0; head < p.heads; ++head) {
            const float* parts =
                p.reference_parts + ((batch * p.queries + query) * p.heads + head) * p.total * p.coordinates;
            for (int point = first; point < last; ++point) sum += parts[point * p.coordinates + coordinate];
        }
    p.grad_reference[i] = static_cast<float>(sum);
}

}  // namespace

DeformableKernel deformable_clear() {
    return deformable_clear_kernel;
}
DeformableKernel deformable_count() {
    return deformable_count_kernel;
}
DeformableKernel deformable_scan() {
    return deformable_scan_kernel;
}
DeformableKernel deformable_list() {
    return deformable_list_kernel;
}
DeformableKernel deformable_sort() {
    return deformable_sort_kernel;
}
DeformableKernel deformable_reference() {
    return deformable_reference_kernel;
}

}  // namespace cuda
}  // namespace magnet_fast
