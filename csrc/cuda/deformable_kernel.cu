// Deformable attention's kernels over channels; compiled once for each element (MAGNET_FAST_ELEMENT).
#include "cuda/deformable_points.cuh"

namespace magnet_fast {
namespace cuda {
namespace {

/// Blocks that a multiprocessor should hold: while one warp waits for what it reads, others work.
constexpr int kForwardBlocks = 6, kPointsBlocks = 5, kValueBlocks = 8;

template <typename Element, int Width>
MAGNET_FAST_KERNEL(kDeformableThreads, kForwardBlocks)
deformable_forward_kernel(DeformableParams p) {
    using Vector = Channels<Element, Width>;
    const Share at = Share::of_queries(p);
    const int group = thread_index() - at.lane;
    const PointWeights weights = PointWeights::of(p, at);
    const Element* value = static_cast<const Element*>(p.value) + at.image * p.value_strides.batch +
                           at.head * p.value_strides.head;
    int turn = 0;
    MAGNET_FAST_ROLLED
    for (int first_channel = 0; first_channel < p.head_dim; first_channel += p.lanes * Width) {
        const int channel = first_channel + at.lane * Width;
        const bool reads = channel < p.head_dim;
        float sums[Width] = {};
        MAGNET_FAST_ROLLED
        for (int first = 0; first < p.total; first += p.lanes, ++turn) {
            const Records records = Records::of_turn(turn);
            const int point = first + at.lane;
            Corners corners{{-1, -1, -1, -1}};
            Floats4 shares{};
            if (at.exists && point < p.total) {
                const Location location = Location::of(p, at, point);
                const float weight = weights(p, point);
                MAGNET_FAST_UNROLL
                for (int i = 0; i < 4; ++i) {
                    corners.position[i] = location.corner(p, i);
                    // Not on the map: nothing, whatever the weight.
                    shares.x[i] = corners.position[i] < 0 ? 0.0f : location.share(i) * weight;
                }
            }
            records.store(corners, shares);
            // The turn after the next one overwrites these records, and cannot before all have come here
            // again.
            sync_warp();
            const int count = p.total - first < p.lanes ? p.total - first : p.lanes;
            MAGNET_FAST_ROLLED
            for (int other = 0; other < count; other += 2) {
                // Two points, so that eight reads are on their way; lanes are even.
                Vector read[2][4];
                MAGNET_FAST_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const Corners from = load_shared(records.corners + group + other + i);
                    MAGNET_FAST_UNROLL
                    for (int j = 0; j < 4; ++j)
                        read[i][j] =
                            reads && from.position[j] >= 0
                                ? Vector::load(value + channel + from.position[j] * p.value_strides.row)
                                : Vector{};
                }
                MAGNET_FAST_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const Floats4 factors = load_shared(records.numbers + group + other + i);
                    MAGNET_FAST_UNROLL
                    for (int j = 0; j < 4; ++j) read[i][j].add_to(sums, factors.x[j]);
                }
            }
        }
        if (at.exists && reads)
            Vector::narrow(sums).store(static_cast<Element*>(p.out) + at.index(p) * p.head_dim + channel);
    }
}

/// A point's product of grad_out with each corner's channels, of this lane's channels only.
template <typename Element, int Width>
MAGNET_FAST_DEVICE void add_products(const DeformableParams& p, const Element* value, const Corners& corners,
                                     const Channels<Element, Width>& grad_out, float (&products)[4]) {
    using Vector = Channels<Element, Width>;
    Vector read[4];
    MAGNET_FAST_UNROLL
    for (int i = 0; i < 4; ++i)
        read[i] = corners.position[i] >= 0 ? Vector::load(value + corners.position[i] * p.value_strides.row)
                                           : Vector{};
    MAGNET_FAST_UNROLL
    for (int i = 0; i < 4; ++i) products[i] += corners.position[i] >= 0 ? read[i].dot(grad_out) : 0.0f;
}

/// Gradients of places, weights and reference points.
template <typename Element, int Width>
MAGNET_FAST_KERNEL(kDeformableThreads, kPointsBlocks)
deformable_points_kernel(DeformableParams p) {
    using Vector = Channels<Element, Width>;
    const Share at = Share::of_queries(p);
    const int group = thread_index() - at.lane, channel = at.lane * Width;
    const PointWeights weights = PointWeights::of(p, at);
    const Element* value = static_cast<const Element*>(p.value) + at.image * p.value_strides.batch +
                           at.head * p.value_strides.head;
    const Element* grad_out = static_cast<const Element*>(p.grad_out) + at.image * p.grad_out_batch +
                              at.row * p.grad_out_query + static_cast<int64_t>(at.head) * p.head_dim;
    const bool reads = at.exists && channel < p.head_dim;
    const Vector first_grad = reads ? Vector::load(grad_out + channel) : Vector{};
    float* slopes = reinterpret_cast<float*>(shared_memory() + kRecordBytes);  // (turns, threads)
    const int64_t first_point = at.index(p) * p.total;                         // in tensors (B, Q, h, L, K)
    float mean = 0.0f;
    int turn = 0;
    MAGNET_FAST_ROLLED
    for (int first = 0; first < p.total; first += p.lanes, ++turn) {
        const Records records = Records::of_turn(turn);
        const int point = first + at.lane;
        const bool exists = at.exists && point < p.total;
        Corners corners{{-1, -1, -1, -1}};
        Location location{};
        float weight = 0.0f;
        if (exists) {
            location = Location::of(p, at, point);
            weight = weights(p, point);
            MAGNET_FAST_UNROLL
            for (int i = 0; i < 4; ++i) corners.position[i] = location.corner(p, i);
        }
        records.store(corners, {{location.right, location.low, 0.0f, 0.0f}});
        sync_warp();
        float slope = 0.0f, slope_x = 0.0f, slope_y = 0.0f;  // of this lane's own point
        const int count = p.total - first < p.lanes ? p.total - first : p.lanes;
        MAGNET_FAST_ROLLED
        for (int other = 0; other < count; ++other) {
            const Corners from = load_shared(records.corners + group + other);
            const Floats4 numbers = load_shared(records.numbers + group + other);
            const float right = numbers.x[0], low = numbers.x[1];
            float products[4] = {};
            if (reads) add_products<Element, Width>(p, value + channel, from, first_grad, products);
            MAGNET_FAST_ROLLED
            for (int next = channel + p.lanes * Width; at.exists && next < p.head_dim;
                 next += p.lanes * Width)
                add_products<Element, Width>(p, value + next, from, Vector::load(grad_out + next), products);
            const float upper = (1.0f - right) * products[0] + right * products[1];
            const float lower = (1.0f - right) * products[2] + right * products[3];
            float both = (1.0f - low) * upper + low * lower, down = lower - upper;
            float across = (1.0f - low) * (products[1] - products[0]) + low * (products[3] - products[2]);
            for (int mask = 1; mask < p.lanes; mask *= 2) {
                both += shuffle_xor(both, mask);
                across += shuffle_xor(across, mask);
                down += shuffle_xor(down, mask);
            }
            if (other == at.lane) {
                slope = both;
                slope_x = across;
                slope_y = down;
            }
        }
        mean += weight * slope;
        if (p.reference) store_shared(slopes + turn * kDeformableThreads + thread_index(), slope);
        if (!exists) continue;
        slope_x *= weight;
        slope_y *= weight;
        if (p.grad_places) {
            store_number(p.grad_places, 2 * (first_point + point), p.places_dtype, slope_x * location.unit_x);
            store_number(p.grad_places, 2 * (first_point + point) + 1, p.places_dtype,
                         slope_y * location.unit_y);
        }
        if (p.grad_weights && !p.reference)
            store_number(p.grad_weights, first_point + point, p.weights_dtype, slope);
        if (!p.reference_parts) continue;
        slope_x *= static_cast<float>(p.maps[location.level].width);
        slope_y *= static_cast<float>(p.maps[location.level].height);
        float* part = p.reference_parts + (first_point + point) * p.coordinates;
        part[0] = slope_x;
        part[1] = slope_y;
        if (p.coordinates == 4) {
            part[2] = slope_x * location.given_x * (0.5f / p.points);
            part[3] = slope_y * location.given_y * (0.5f / p.points);
        }
    }
    if (!p.grad_weights || !p.reference) return;
    mean = sum_of_lanes(p, mean);
    turn = 0;
    if (!at.exists) return;
    for (int point = at.lane; point < p.total; point += p.lanes, ++turn) {
        const float slope = load_shared(slopes + turn * kDeformableThreads + thread_index());
        store_number(p.grad_weights, first_point + point, p.weights_dtype,
                     weights(p, point) * (slope - mean));
    }
}

/// The gradient of `value`: every position adds up the points that touch it.
template <typename Element, int Width>
MAGNET_FAST_KERNEL(kDeformableThreads, kValueBlocks)
deformable_value_kernel(DeformableParams p) {
    using Vector = Channels<Element, Width>;
    // The last maps are the smallest and have the most points a position: they start first.
    const Share at = Share::of(p, p.blocks - 1 - block_index() / p.heads % p.blocks, p.positions);
    if (!at.exists) return;
    int level = 0;
    while (level + 1 < p.levels && at.row >= p.maps[level + 1].first) ++level;
    const DeformableMap& map = p.maps[level];
    const int line = (at.row - map.first) / map.width, column = (at.row - map.first) % map.width;
    const int32_t* starts = p.starts + at.slot(p) * (p.bins + 1) + map.first_bin;
    const SortedPoint* sorted = static_cast<const SortedPoint*>(p.sorted) + at.slot(p) * p.queries * p.total;
    const Element* grad_out = static_cast<const Element*>(p.grad_out) + at.image * p.grad_out_batch +
                              static_cast<int64_t>(at.head) * p.head_dim;
    MAGNET_FAST_ROLLED
    for (int channel = at.lane * Width; channel < p.head_dim; channel += p.lanes * Width) {
        float sums[Width] = {};
        MAGNET_FAST_ROLLED
        for (int corner = 0; corner < 4; ++corner) {
            // The square whose corner this position is.
            const int square = (line + 1 - corner / 2) * (map.width + 1) + column + 1 - corner % 2;
            const int begin = starts[square * map.groups], end = starts[(square + 1) * map.groups];
            const auto share = [&](const SortedPoint& point) {
                return (corner % 2 ? point.right : 1.0f - point.right) *
                       (corner / 2 ? point.low : 1.0f - point.low) * point.weight;
            };
            int i = begin;
            constexpr int kTogether = 4;  // reads on their way
            MAGNET_FAST_ROLLED
            for (; i + kTogether <= end; i += kTogether) {
                SortedPoint point[kTogether];
                Vector read[kTogether];
                MAGNET_FAST_UNROLL
                for (int j = 0; j < kTogether; ++j) point[j] = load_global(sorted + i + j);
                MAGNET_FAST_UNROLL
                for (int j = 0; j < kTogether; ++j)
                    read[j] = Vector::load(grad_out + point[j].query * p.grad_out_query + channel);
                MAGNET_FAST_UNROLL
                for (int j = 0; j < kTogether; ++j) read[j].add_to(sums, share(point[j]));
            }
            MAGNET_FAST_ROLLED
            for (; i < end; ++i) {
                const SortedPoint point = load_global(sorted + i);
                Vector::load(grad_out + point.query * p.grad_out_query + channel).add_to(sums, share(point));
            }
        }
        Vector::narrow(sums).store(static_cast<Element*>(p.grad_value) +
                                   ((at.image * p.positions + at.row) * p.heads + at.head) * p.head_dim +
                                   channel);
    }
}

}  // namespace

template <>
DeformableKernel DeformableKernels<MAGNET_FAST_ELEMENT>::forward(bool wide) {
    using Element = MAGNET_FAST_ELEMENT;
    return wide ? deformable_forward_kernel<Element, 16 / sizeof(Element)>
                : deformable_forward_kernel<Element, 1>;
}

template <>
DeformableKernel DeformableKernels<MAGNET_FAST_ELEMENT>::points(bool wide) {
    using Element = MAGNET_FAST_ELEMENT;
    return wide ? deformable_points_kernel<Element, 16 / sizeof(Element)>
                : deformable_points_kernel<Element, 1>;
}

template <>
DeformableKernel DeformableKernels<MAGNET_FAST_ELEMENT>::value(bool wide) {
    using Element = MAGNET_FAST_ELEMENT;
    return wide ? deformable_value_kernel<Element, 16 / sizeof(Element)>
                : deformable_value_kernel<Element, 1>;
}

}  // namespace cuda
}  // namespace magnet_fast
