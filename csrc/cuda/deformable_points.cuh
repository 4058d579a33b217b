// What the kernels of deformable attention share: numbers of any dtype, the query that some lanes work on,
// and where its points lie, with what weights.
#pragma once

#include "cuda/deformable_attention.h"
#include "cuda/fragments.cuh"

namespace magnet_fast {
namespace cuda {

/// Number `index` of a tensor whose dtype is known at run time only: points are few beside channels.
MAGNET_FAST_DEVICE float load_number(const void* from, int64_t index, Dtype dtype) {
    if (dtype == Dtype::kFloat32) return static_cast<const float*>(from)[index];
    const uint16_t bits = static_cast<const uint16_t*>(from)[index];
    return dtype == Dtype::kBFloat16 ? bits_to_float(static_cast<uint32_t>(bits) << 16)
                                     : float16_to_float(bits);
}
MAGNET_FAST_DEVICE void store_number(void* to, int64_t index, Dtype dtype, float x) {
    if (dtype == Dtype::kFloat32) {
        static_cast<float*>(to)[index] = x;
    } else {
        static_cast<uint16_t*>(to)[index] =
            static_cast<uint16_t>(dtype == Dtype::kBFloat16 ? pack_bfloat16(x, 0.0f) : pack_float16(x, 0.0f));
    }
}

MAGNET_FAST_DEVICE float widen(float x) {
    return x;
}
MAGNET_FAST_DEVICE float widen(BFloat16 x) {
    return bits_to_float(static_cast<uint32_t>(x.bits) << 16);
}
MAGNET_FAST_DEVICE float widen(Float16 x) {
    return float16_to_float(x.bits);
}

/// The channels that a lane takes at once: Width of them, 16 bytes, or one.
template <typename Element, int Width>
struct Channels {
    static_assert(Width == 1 || Width * sizeof(Element) == 16, "one channel or 16 bytes of them");
    alignas(Width * sizeof(Element)) Element channel[Width];

    MAGNET_FAST_DEVICE Channels load(const Element* from) {
        return load_global(reinterpret_cast<const Channels*>(from));
    }
    MAGNET_FAST_METHOD void store(Element* to) const { store_global(reinterpret_cast<Channels*>(to), *this); }

    MAGNET_FAST_DEVICE Channels narrow(const float (&from)[Width]) {
        Channels to;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < Width; ++i) to.channel[i] = Fragments<Element>::narrow(from[i]);
        return to;
    }
    /// sums += factor * channels.
    MAGNET_FAST_METHOD void add_to(float (&sums)[Width], float factor) const {
        MAGNET_FAST_UNROLL
        for (int i = 0; i < Width; ++i) sums[i] += factor * widen(channel[i]);
    }
    MAGNET_FAST_METHOD float dot(const Channels& other) const {
        float sum = 0.0f;
        MAGNET_FAST_UNROLL
        for (int i = 0; i < Width; ++i) sum += widen(channel[i]) * widen(other.channel[i]);
        return sum;
    }
};

/// A lane's share of the work: `row` is a query or a position, and p.lanes neighbouring lanes have the same
/// one.
struct Share {
    int64_t image;
    int32_t head, row, lane;
    bool exists;  // the last block of an image and head may have more lanes than there are rows

    MAGNET_FAST_DEVICE Share of(const DeformableParams& p, int64_t block, int32_t rows) {
        const int64_t slot = block_index() / p.heads / p.blocks;
        const int64_t row = block * (thread_count() / p.lanes) + thread_index() / p.lanes;
        return {slot, static_cast<int32_t>(block_index() % p.heads), static_cast<int32_t>(row),
                thread_index() % p.lanes, row < rows};
    }
    /// Neighbouring blocks have the heads of the same queries.
    MAGNET_FAST_DEVICE Share of_queries(const DeformableParams& p) {
        return of(p, block_index() / p.heads % p.blocks, p.queries);
    }
    MAGNET_FAST_METHOD int64_t slot(const DeformableParams& p) const { return image * p.heads + head; }
    /// Of a query and head in tensors (B, Q, h).
    MAGNET_FAST_METHOD int64_t index(const DeformableParams& p) const {
        return (image * p.queries + row) * p.heads + head;
    }
};

/// The sum over the lanes that have the same row; every lane of the warp takes part.
MAGNET_FAST_DEVICE float sum_of_lanes(const DeformableParams& p, float x) {
    for (int mask = 1; mask < p.lanes; mask *= 2) x += shuffle_xor(x, mask);
    return x;
}

/// Weights of a query's points: given, or the softmax of their logits.
struct PointWeights {
    static constexpr float kLog2E = 1.44269504088896340736f;
    const void* from;
    int64_t first;
    float most, factor;

    /// Every lane of the warp takes part.
    MAGNET_FAST_DEVICE PointWeights of(const DeformableParams& p, const Share& at) {
        PointWeights w{p.weights,
                       at.image * p.weights_strides.batch + at.row * p.weights_strides.row +
                           at.head * p.weights_strides.head,
                       0.0f, 1.0f};
        if (!p.reference) return w;
        float most = -INFINITY, sum = 0.0f;
        if (at.exists)
            for (int point = at.lane; point < p.total; point += p.lanes)
                most = fmaxf(most, load_number(w.from, w.first + point, p.weights_dtype));
        for (int mask = 1; mask < p.lanes; mask *= 2) most = fmaxf(most, shuffle_xor(most, mask));
        w.most = most;
        if (at.exists)
            for (int point = at.lane; point < p.total; point += p.lanes) sum += w(p, point);
        w.factor = 1.0f / sum_of_lanes(p, sum);
        return w;
    }
    MAGNET_FAST_METHOD float operator()(const DeformableParams& p, int point) const {
        const float x = load_number(from, first + point, p.weights_dtype);
        return p.reference ? exp2_fast((x - most) * kLog2E) * factor : x;
    }
};

/// Where a point lies between the centres of four neighbouring positions of its map. The products that are
/// added are spelled as fmaf, so that every kernel finds the same bits: one puts a point into the bin of its
/// upper left position, another finds its shares of the four.
struct Location {
    int32_t level;
    int32_t column, line;    // of the upper left one, both from -1
    float right, low;        // shares of the ones right of it and below it
    bool touches;            // any position of the map; NaN does not
    float unit_x, unit_y;    // what one unit of the given coordinate moves the point by, in positions
    float given_x, given_y;  // the coordinate

    MAGNET_FAST_DEVICE Location of(const DeformableParams& p, const Share& at, int point) {
        Location to;
        to.level = point / p.points;
        const float width = static_cast<float>(p.maps[to.level].width);
        const float height = static_cast<float>(p.maps[to.level].height);
        const int64_t place = at.image * p.places_strides.batch + at.row * p.places_strides.row +
                              at.head * p.places_strides.head + 2 * point;
        to.given_x = load_number(p.places, place, p.places_dtype);
        to.given_y = load_number(p.places, place + 1, p.places_dtype);
        to.unit_x = width;
        to.unit_y = height;
        float x = fmaf(to.given_x, width, -0.5f), y = fmaf(to.given_y, height, -0.5f);
        if (p.reference) {
            const int64_t first = at.image * p.reference_strides.batch + at.row * p.reference_strides.row +
                                  to.level * p.reference_strides.head;
            const auto reference = [&](int i) {
                return load_number(p.reference, first + i, p.reference_dtype);
            };
            to.unit_x = to.unit_y = 1.0f;
            if (p.coordinates == 4) {
                to.unit_x = reference(2) * (0.5f / p.points) * width;
                to.unit_y = reference(3) * (0.5f / p.points) * height;
            }
            x = fmaf(to.given_x, to.unit_x, fmaf(reference(0), width, -0.5f));
            y = fmaf(to.given_y, to.unit_y, fmaf(reference(1), height, -0.5f));
        }
        to.touches = x > -1.0f && y > -1.0f && x < width && y < height;
        // What is far outside would not be an integer.
        const float left = floorf(to.touches ? x : 0.0f), upper = floorf(to.touches ? y : 0.0f);
        to.right = to.touches ? x - left : 0.0f;
        to.low = to.touches ? y - upper : 0.0f;
        to.column = static_cast<int32_t>(left);
        to.line = static_cast<int32_t>(upper);
        return to;
    }

    /// Position in `value` of corner 0 (upper left), 1 (upper right), 2 or 3; -1: not on the map.
    MAGNET_FAST_METHOD int32_t corner(const DeformableParams& p, int which) const {
        const DeformableMap& map = p.maps[level];
        const int32_t x = column + which % 2, y = line + which / 2;
        const bool on_map = touches && x >= 0 && x < map.width && y >= 0 && y < map.height;
        return on_map ? map.first + y * map.width + x : -1;
    }
    MAGNET_FAST_METHOD float share(int which) const {
        return (which % 2 ? right : 1.0f - right) * (which / 2 ? low : 1.0f - low);
    }
};

struct alignas(16) Corners {
    int32_t position[4];  // -1: not on the map
};
struct alignas(16) Floats4 {
    float x[4];
};

/// One turn's points in shared memory, one of each lane: what the lanes of a query read together. A turn and
/// the next one have places of their own.
struct Records {
    Corners* corners;
    Floats4* numbers;

    MAGNET_FAST_DEVICE Records of_turn(int turn) {
        char* at = shared_memory() + turn % 2 * (kRecordBytes / 2);
        return {reinterpret_cast<Corners*>(at),
                reinterpret_cast<Floats4*>(at + kDeformableThreads * sizeof(Corners))};
    }
    /// Of this lane's point.
    MAGNET_FAST_METHOD void store(const Corners& of, const Floats4& with) const {
        store_shared(corners + thread_index(), of);
        store_shared(numbers + thread_index(), with);
    }
};

}  // namespace cuda
}  // namespace magnet_fast
