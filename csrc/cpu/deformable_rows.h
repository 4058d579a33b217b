// Rows of channels of a packed slice: laying them out, reading them and adding to them. Part of
// deformable_kernel.cpp, compiled once per SIMD level.
#pragma once

#include "cpu/deformable_kernel.h"
#include "cpu/deformable_points.h"
#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

// Channels are treated in strips of at most this many vectors, so that sums stay in registers.
constexpr int64_t kStrip = 4;

// Whether heads of at most half a vector have rows of half a vector: deformable_pairs.h.
#if defined(MAGNET_FAST_SIMD_AVX512) || defined(MAGNET_FAST_SIMD_AVX2)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

/// Channels [first, first + width) of a head, and their packed rows of row() numbers, zeros past `width`.
struct Strip {
    int64_t first, width;
    int64_t rows;  // of the packed slice
    int64_t vectors() const { return (width + kLanes - 1) / kLanes; }
    int64_t last() const { return width - (vectors() - 1) * kLanes; }  // channels in the last vector
    bool half() const { return kPairs && first == 0 && width <= kLanes / 2; }
    int64_t row() const { return half() ? kLanes / 2 : vectors() * kLanes; }
    /// Row 0 of the strip; all strips before it are full.
    template <typename Number>
    Number* find(Number* packed) const {
        return packed + first * rows;
    }
};

/// The strip that begins at channel `first`; its width is 0 past the last channel.
static Strip strip_at(int64_t first, int64_t head_dim, int64_t rows) {
    const int64_t left = head_dim - first;
    return {first, left < kStrip * kLanes ? left : kStrip * kLanes, rows};
}

#define MAGNET_FAST_FOR_STRIPS(strip, head_dim, rows)                \
    for (Strip strip = strip_at(0, head_dim, rows); strip.width > 0; \
         strip = strip_at(strip.first + strip.width, head_dim, rows))

static int64_t packed_reals(int64_t rows, int64_t head_dim) {
    // A row of half a vector is read and cleared in whole ones: room for one more.
    return rows * round_up(head_dim) + kLanes;
}

/// The first `count` numbers, zeros after them; most often half a vector.
template <typename Element>
static inline Vec load_some(const Element* p, int64_t count) {
    if constexpr (sizeof(Element) < sizeof(Real)) {
        Element lane[kLanes] = {};
        if (2 * count == kLanes)
            std::memcpy(lane, p, sizeof lane / 2);
        else
            for (int64_t i = 0; i < count; ++i) lane[i] = p[i];
        return load(lane);
    } else {
        return load_part(p, count);
    }
}

/// Writes the first `count` lanes and nothing past them.
template <typename Element>
static inline void store_some(Element* p, Vec v, int64_t count) {
    if constexpr (sizeof(Element) < sizeof(Real)) {
        Element lane[kLanes];
        store(lane, v);
        if (2 * count == kLanes)
            std::memcpy(p, lane, sizeof lane / 2);
        else
            for (int64_t i = 0; i < count; ++i) p[i] = lane[i];
    } else {
        store_part(p, v, count);
    }
}

/// Whole vectors are written.
static void zeros(Real* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(to + i, broadcast(0.0f));
}

static void clear(Real* packed, int64_t rows, int64_t head_dim, int64_t begin, int64_t end) {
    MAGNET_FAST_FOR_STRIPS(strip, head_dim, rows)
    zeros(strip.find(packed) + begin * strip.row(), (end - begin) * strip.row());
}

template <typename Element>
static void pack(const Element* value, int64_t value_row, const DeformableLevel* level, int64_t levels,
                 int64_t rows, int64_t head_dim, Real* packed) {
    MAGNET_FAST_FOR_STRIPS(strip, head_dim, rows) {
        const int64_t vectors = strip.vectors(), last = strip.last(), wide = strip.row();
        for (int64_t l = 0; l < levels; ++l) {
            const DeformableLevel& map = level[l];
            const Element* from = value + map.position * value_row + strip.first;
            Real* to = strip.find(packed) + map.first_row() * wide;
            zeros(to, 2 * map.line * wide);
            to += 2 * map.line * wide;
            for (int64_t y = 0; y < map.height; ++y) {
                zeros(to, wide);
                to += wide;
                for (int64_t x = 0; x < map.width; ++x, from += value_row, to += wide) {
                    for (int64_t v = 0; v < vectors - 1; ++v) store(to + v * kLanes, load(from + v * kLanes));
                    // Half a row too much is overwritten by the next position, or is the border's.
                    const Element* end = from + (vectors - 1) * kLanes;
                    store(to + (vectors - 1) * kLanes, last == kLanes ? load(end) : load_some(end, last));
                }
            }
            zeros(to, (map.line + 1) * wide);
        }
    }
}

template <typename Element>
static void unpack(const Real* packed, const DeformableLevel* level, int64_t levels, int64_t rows,
                   int64_t head_dim, Element* value, int64_t value_row) {
    MAGNET_FAST_FOR_STRIPS(strip, head_dim, rows) {
        const int64_t vectors = strip.vectors(), last = strip.last(), wide = strip.row();
        for (int64_t l = 0; l < levels; ++l) {
            const DeformableLevel& map = level[l];
            Element* to = value + map.position * value_row + strip.first;
            for (int64_t y = 0; y < map.height; ++y) {
                const Real* from = strip.find(packed) + (map.row + y * map.line) * wide;
                for (int64_t x = 0; x < map.width; ++x, from += wide, to += value_row) {
                    for (int64_t v = 0; v < vectors - 1; ++v) store(to + v * kLanes, load(from + v * kLanes));
                    store_some(to + (vectors - 1) * kLanes, load(from + (vectors - 1) * kLanes), last);
                }
            }
        }
    }
}

/// out = sum over a query's points and their corners.
template <int Vectors, typename Element>
static void sample(const DeformableForward<Element>& a, int64_t query, int64_t queries, const Strip& strip,
                   const Points& p) {
    // Independent sums, so that additions need not wait for each other.
    constexpr int kChains = Vectors == 1 ? 4 : 2;
    constexpr int64_t kRow = Vectors * kLanes;
    const Real* value = strip.find(a.value);
    const int64_t last = strip.last();
    Element* out = a.out + query * a.out_row + strip.first;
    for (int64_t q = 0, i = 0; q < queries; ++q, out += a.out_row) {
        Vec sum[kChains][Vectors];
        for (int chain = 0; chain < kChains; ++chain)
            for (int v = 0; v < Vectors; ++v) sum[chain][v] = broadcast(0.0f);
        for (int64_t l = 0; l < a.levels; ++l) {
            const int64_t line = a.level[l].line * kRow;
            for (const int64_t end = i + a.points; i < end; ++i) {
                const Real* upper = value + p.row[i] * kRow;
                const Real* corner[4] = {upper, upper + kRow, upper + line, upper + line + kRow};
                const Real* coefficient = p.coefficient + Points::corner_at(i);
                for (int c = 0; c < 4; ++c) {
                    const Vec factor = broadcast(coefficient[c * kLanes]);
                    for (int v = 0; v < Vectors; ++v)
                        sum[c % kChains][v] =
                            multiply_add(factor, load(corner[c] + v * kLanes), sum[c % kChains][v]);
                }
            }
        }
        for (int v = 0; v < Vectors; ++v) {
            Vec total = sum[0][v] + sum[1][v];
            if (kChains == 4) total = total + (sum[kChains - 2][v] + sum[kChains - 1][v]);
            if (v < Vectors - 1 || last == kLanes)
                store(out + v * kLanes, total);
            else
                store_some(out + v * kLanes, total, last);
        }
    }
}

/// to[corner * 4 ...]: four partial sums of each of four vectors.
static inline void store_quarters(Real* to, const Vec dot[4]) {
#if defined(MAGNET_FAST_SIMD_AVX512)
    const Vec a = _mm512_shuffle_f32x4(dot[0], dot[1], 0x44) + _mm512_shuffle_f32x4(dot[0], dot[1], 0xEE);
    const Vec b = _mm512_shuffle_f32x4(dot[2], dot[3], 0x44) + _mm512_shuffle_f32x4(dot[2], dot[3], 0xEE);
    store(to, _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD));
#elif defined(MAGNET_FAST_SIMD_AVX2)
    for (int pair = 0; pair < 4; pair += 2)
        store(to + 4 * pair, _mm256_permute2f128_ps(dot[pair], dot[pair + 1], 0x20) +
                                 _mm256_permute2f128_ps(dot[pair], dot[pair + 1], 0x31));
#else
    // With one lane the other three partial sums stay 0.
    for (int corner = 0; corner < 4; ++corner) store(to + 4 * corner, dot[corner]);
#endif
}

/// Dot products of grad_out with the corners' rows, and the scatter into grad_value.
template <int Vectors, bool Dots, bool Scatter, typename Element>
static void differentiate(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                          const Strip& strip, const Points& p) {
    constexpr int64_t kRow = Vectors * kLanes;
    const Real* value = Dots ? strip.find(a.value) : nullptr;
    Real* grad_value = Scatter ? strip.find(a.grad_value) : nullptr;
    const Element* grad_out = a.grad_out + query * a.out_row + strip.first;
    Real* quarters = p.quarters;
    for (int64_t q = 0, i = 0; q < queries; ++q, grad_out += a.out_row) {
        Vec grad[Vectors];
        for (int v = 0; v < Vectors - 1; ++v) grad[v] = load(grad_out + v * kLanes);
        grad[Vectors - 1] = load_some(grad_out + (Vectors - 1) * kLanes, strip.last());
        for (int64_t l = 0; l < a.levels; ++l) {
            const int64_t line = a.level[l].line * kRow;
            const int64_t corner[4] = {0, kRow, line, line + kRow};
            for (const int64_t end = i + a.points; i < end; ++i, quarters += 16) {
                const int64_t at = p.row[i] * kRow;
                if constexpr (Dots) {
                    Vec dot[4];
                    for (int c = 0; c < 4; ++c) {
                        const Real* from = value + at + corner[c];
                        dot[c] = grad[0] * load(from);
                        for (int v = 1; v < Vectors; ++v)
                            dot[c] = multiply_add(grad[v], load(from + v * kLanes), dot[c]);
                    }
                    if (strip.first == 0) {
                        store_quarters(quarters, dot);
                    } else {
                        Real more[16] = {};
                        store_quarters(more, dot);
                        for (int64_t j = 0; j < 16; j += kLanes)
                            store(quarters + j, load(quarters + j) + load(more + j));
                    }
                }
                if constexpr (Scatter) {
                    const Real* coefficient = p.coefficient + Points::corner_at(i);
                    for (int c = 0; c < 4; ++c) {
                        Real* to = grad_value + at + corner[c];
                        const Vec factor = broadcast(coefficient[c * kLanes]);
                        for (int v = 0; v < Vectors; ++v)
                            store(to + v * kLanes, multiply_add(factor, grad[v], load(to + v * kLanes)));
                    }
                }
            }
        }
    }
}

template <int Vectors, typename Element>
static void differentiate_wanted(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                                 const Strip& strip, const Points& p) {
    if (a.wants_points() && a.grad_value)
        differentiate<Vectors, true, true>(a, query, queries, strip, p);
    else if (a.wants_points())
        differentiate<Vectors, true, false>(a, query, queries, strip, p);
    else
        differentiate<Vectors, false, true>(a, query, queries, strip, p);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
