// A block's sampling points as arrays: where the four corners around each lie and how much they count, and
// the way back from dot products to gradients. Part of deformable_kernel.cpp, compiled once per SIMD level.
#pragma once

#include "cpu/deformable_kernel.h"
#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

using Index = DeformableIndex<Real>::Type;
typedef Index Ints __attribute__((vector_size(sizeof(Index) * kLanes)));

static inline Ints load_ints(const Index* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_ints(Index* p, Ints v) {
    std::memcpy(p, &v, sizeof v);
}

/// x = numbers 0, 2, 4 ... of a and b together, y = numbers 1, 3, 5 ...
static inline void deinterleave(Vec a, Vec b, Vec& x, Vec& y) {
#if defined(MAGNET_FAST_SIMD_AVX512)
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    x = _mm512_permutex2var_ps(a, even, b);
    y = _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
#else
    Real number[2 * kLanes], even[kLanes], odd[kLanes];
    store(number, a);
    store(number + kLanes, b);
    for (int64_t i = 0; i < kLanes; ++i) {
        even[i] = number[2 * i];
        odd[i] = number[2 * i + 1];
    }
    x = load(even);
    y = load(odd);
#endif
}

/// The reverse.
static inline void interleave(Vec x, Vec y, Vec& a, Vec& b) {
#if defined(MAGNET_FAST_SIMD_AVX512)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    a = _mm512_permutex2var_ps(x, low, y);
    b = _mm512_permutex2var_ps(x, _mm512_add_epi32(low, _mm512_set1_epi32(8)), y);
#else
    Real number[2 * kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
        number[2 * i] = x[i];
        number[2 * i + 1] = y[i];
    }
    a = load(number);
    b = load(number + kLanes);
#endif
}

/// Pairs (x, y) into two arrays; whole vectors are written.
template <typename Element>
static inline void read_pairs(const Element* pairs, int64_t count, Real* x, Real* y) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = 2 * (count - i);
        const Vec zero = broadcast(0.0f);
        const Vec a = left >= kLanes ? load(pairs + 2 * i) : load_part(pairs + 2 * i, left);
        const Vec b = left >= 2 * kLanes ? load(pairs + 2 * i + kLanes)
                      : left > kLanes    ? load_part(pairs + 2 * i + kLanes, left - kLanes)
                                         : zero;
        Vec even, odd;
        deinterleave(a, b, even, odd);
        store(x + i, even);
        store(y + i, odd);
    }
}

/// The reverse; nothing past the last pair is written.
template <typename Element>
static inline void write_pairs(const Real* x, const Real* y, int64_t count, Element* pairs) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t left = 2 * (count - i);
        Vec a, b;
        interleave(load(x + i), load(y + i), a, b);
        if (left >= 2 * kLanes) {
            store(pairs + 2 * i, a);
            store(pairs + 2 * i + kLanes, b);
            continue;
        }
        if (left >= kLanes)
            store(pairs + 2 * i, a);
        else
            store_part(pairs + 2 * i, a, left);
        if (left > kLanes) store_part(pairs + 2 * i + kLanes, b, left - kLanes);
    }
}

/// Numbers into an array; whole vectors are written.
template <typename Element>
static inline void read_row(const Element* from, int64_t count, Real* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load_part(from + i, count - i));
}

/// The reverse; nothing past the last number is written.
template <typename Element>
static inline void write_row(const Real* from, int64_t count, Element* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store_part(to + i, load(from + i), count - i);
}

/// A block's points, one array for each quantity. Corners are numbered 0 (upper left), 1 (upper right), 2, 3.
/// Arrays have room for whole vectors; what the last one holds past the block's points is computed and not
/// used.
struct Points {
    Real *x, *y;   // location; then the position between the corners, 0 .. 1; then its gradient, in pixels
    Real* weight;  // attention weight
    Real* grad_weight;  // its gradient
    Real* coefficient;  // weight times a corner's bilinear coefficient, at corner_at(i) + corner * kLanes
    Index* row;         // of the upper left corner in the packed value
    Real* quarters;     // (n, 4 corners, 4 partial sums) of grad_out times the corner's row
    Real* dot[4];       // of each corner: their sum
    Real *offset_x, *offset_y, *reference[4];  // of points that come as logits
    Real* softmax;                             // one query's points on all levels

    Points(Real* scratch, int64_t points, int64_t all_points) {
        const int64_t n = room(points);
        const auto take = [&](int64_t count) {
            Real* piece = scratch;
            for (int64_t i = 0; i < count; ++i) piece[i] = 0;
            scratch += count;
            return piece;
        };
        for (Real** piece : {&x, &y, &weight, &grad_weight, &offset_x, &offset_y}) *piece = take(n);
        coefficient = take(4 * n);
        row = reinterpret_cast<Index*>(take(n));
        for (Real*& piece : dot) piece = take(n);
        for (Real*& piece : reference) piece = take(n);
        quarters = take(16 * n);
        softmax = take(room(all_points));
    }

    /// Rows of a query may be read and written in whole vectors that begin anywhere.
    static int64_t room(int64_t points) { return (points + 31) / 16 * 16; }

    /// Vectors of the four corners take turns: one address reaches all of them.
    static int64_t corner_at(int64_t i) { return i + 3 * (i & -kLanes); }
};

static int64_t scratch_reals(int64_t block_points, int64_t all_points) {
    return 35 * Points::room(block_points) + Points::room(all_points);
}

/// Reads a block's locations and weights.
template <typename Element>
static void read_points(const DeformableForward<Element>& a, int64_t query, int64_t queries,
                        const Points& p) {
    const int64_t points = a.query_count();
    for (int64_t q = 0; q < queries; ++q) {
        read_pairs(a.locations + 2 * (query + q) * a.query_points, points, p.x + q * points,
                   p.y + q * points);
        read_row(a.weights + (query + q) * a.query_points, points, p.weight + q * points);
    }
}

/// The corner at or before the pixel coordinate `x` in a map of `size` cells, and the fraction after it.
/// Anything that is not from -1 up to size has no corner in the map; `inside` says so. Compared before the
/// conversion, so that no value is out of an integer's range. The fraction of an infinity or a NaN is NaN, as
/// in torch's grid_sample.
static inline Ints corner(Vec x, Vec size, Vec& fraction, Ints& inside) {
    const Vec least = broadcast(-1.0f);
    inside = (x >= least) & (x < size);
    const Vec known = inside ? x : least;
    Ints at = __builtin_convertvector(known, Ints);
    at += known < __builtin_convertvector(at, Vec);  // truncation to floor: true is -1
    fraction = (known - __builtin_convertvector(at, Vec)) + (x - x);
    return at;
}

/// The corners' rows and coefficients. `pixel(i, x, y)` gives the points from i on in pixels: 0 is the centre
/// of the first one.
template <typename Pixel>
static inline void locate(const DeformableMaps<Real>& m, int64_t count, const Points& p, const Pixel& pixel) {
    for (int64_t i = 0; i < count; i += kLanes) {
        Vec x, y;
        pixel(i, x, y);
        Ints in_width, in_height;
        const Ints column = corner(x, load(m.width + i), x, in_width);
        const Ints down = corner(y, load(m.height + i), y, in_height);
        const Ints inside = in_width & in_height, line = load_ints(m.line + i), row = load_ints(m.row + i);
        const Ints nowhere = row - 2 * line - 1;  // the two lines of zeros
        store_ints(p.row + i, ((row + down * line + column) & inside) | (nowhere & ~inside));
        const Vec weight = load(p.weight + i), below = weight * y, above = weight - below;
        store(p.coefficient + 4 * i, above - above * x);
        store(p.coefficient + 4 * i + 1 * kLanes, above * x);
        store(p.coefficient + 4 * i + 2 * kLanes, below - below * x);
        store(p.coefficient + 4 * i + 3 * kLanes, below * x);
        store(p.x + i, x);
        store(p.y + i, y);
    }
}

/// Locates points that were given in [0, 1].
static void locate_points(const DeformableMaps<Real>& m, int64_t count, const Points& p) {
    const Vec half = broadcast(0.5f);
    locate(m, count, p, [&](int64_t i, Vec& x, Vec& y) {
        x = load(p.x + i) * load(m.width + i) - half;
        y = load(p.y + i) * load(m.height + i) - half;
    });
}

/// Sums the quarters of every dot product.
static void sum_quarters(int64_t count, const Points& p) {
    for (int64_t i = 0; i < count; i += 4) {
        for (int c = 0; c < 4; ++c) {
            const Real* q = p.quarters + 16 * i + 4 * c;
            const Real* four[4] = {q, q + 16, q + 32, q + 48};
            Real part[16];
            transpose4(four, part, 4);
            for (int j = 0; j < 4; ++j)
                p.dot[c][i + j] = (part[j] + part[4 + j]) + (part[8 + j] + part[12 + j]);
        }
    }
}

/// Gradients of a block's weights, and of its locations in pixels, from the dot products.
static void finish(int64_t count, const Points& p) {
    sum_quarters(count, p);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vec dot0 = load(p.dot[0] + i), dot1 = load(p.dot[1] + i);
        const Vec dot2 = load(p.dot[2] + i), dot3 = load(p.dot[3] + i);
        const Vec x = load(p.x + i), y = load(p.y + i), weight = load(p.weight + i);
        const Vec upper = dot1 - dot0, lower = dot3 - dot2, left = dot2 - dot0, right = dot3 - dot1;
        store(p.x + i, weight * multiply_add(y, lower - upper, upper));
        store(p.y + i, weight * multiply_add(x, right - left, left));
        const Vec above = multiply_add(x, upper, dot0), below = multiply_add(x, lower, dot2);
        store(p.grad_weight + i, multiply_add(y, below - above, above));
    }
}

/// Writes the gradients of a block's locations and weights.
template <typename Element>
static void write_points(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                         const Points& p) {
    const int64_t points = a.query_count();
    for (int64_t i = 0; a.grad_locations && i < queries * points; i += kLanes) {
        store(p.x + i, load(p.x + i) * load(a.maps.width + i));
        store(p.y + i, load(p.y + i) * load(a.maps.height + i));
    }
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t from = q * points, to = (query + q) * a.query_points;
        if (a.grad_locations) write_pairs(p.x + from, p.y + from, points, a.grad_locations + 2 * to);
        if (a.grad_weights) write_row(p.grad_weight + from, points, a.grad_weights + to);
    }
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
