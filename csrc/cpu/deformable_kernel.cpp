// Compiled once per SIMD level; see simd.h and deformable_kernel.h.
//
// A block of queries is treated in two or three sweeps. The first turns its points into coefficients and row
// numbers of the four corners, vectorised over points. The second reads (and scatters) the corners' rows,
// vectorised over channels. Backward has a third, which makes gradients from the dot products of the second,
// over points again.
#include "cpu/deformable_kernel.h"

#include "cpu/simd.h"

#if !defined(MAGNET_FAST_SIMD_FLOAT64)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

// Channels are treated in strips of at most this many vectors, so that sums stay in registers.
constexpr int64_t kStrip = 4;

/// Channels [first, first + width) of a head, and their packed rows of Vectors * kLanes floats, zeros past
/// `width`.
struct Strip {
    int64_t first, width;
    int64_t rows;  // of the packed strip, with row -1
    int64_t vectors() const { return (width + kLanes - 1) / kLanes; }
    int64_t last() const { return width - (vectors() - 1) * kLanes; }  // channels in the last vector
    int64_t row() const { return vectors() * kLanes; }
    /// Row 0 of the strip; all strips before it are full.
    template <typename Float>
    Float* find(Float* packed) const {
        return packed + first * rows + row();
    }
};

/// The strip that begins at channel `first`; its width is 0 past the last channel.
static Strip strip_at(int64_t first, int64_t head_dim, int64_t positions) {
    const int64_t left = head_dim - first;
    return {first, left < kStrip * kLanes ? left : kStrip * kLanes, positions + 1};
}

#define MAGNET_FAST_FOR_STRIPS(strip, head_dim, positions)                \
    for (Strip strip = strip_at(0, head_dim, positions); strip.width > 0; \
         strip = strip_at(strip.first + strip.width, head_dim, positions))

static int64_t packed_floats(int64_t positions, int64_t head_dim) {
    return (positions + 1) * round_up(head_dim);
}

static void clear(float* packed, int64_t positions, int64_t head_dim, int64_t begin, int64_t end) {
    MAGNET_FAST_FOR_STRIPS(strip, head_dim, positions) {
        float* rows = strip.find(packed);
        const int64_t wide = strip.row();
        for (int64_t c = -wide; c < 0; c += kLanes) store(rows + c, broadcast(0.0f));
        for (int64_t c = begin * wide; c < end * wide; c += kLanes) store(rows + c, broadcast(0.0f));
    }
}

static void pack(const float* value, int64_t value_row, int64_t positions, int64_t head_dim, float* packed) {
    clear(packed, positions, head_dim, 0, 0);
    MAGNET_FAST_FOR_STRIPS(strip, head_dim, positions) {
        const float* from = value + strip.first;
        float* to = strip.find(packed);
        const int64_t vectors = strip.vectors(), last = strip.last();
        for (int64_t i = 0; i < positions; ++i, from += value_row, to += vectors * kLanes) {
            for (int64_t v = 0; v < vectors - 1; ++v) store(to + v * kLanes, load(from + v * kLanes));
            store(to + (vectors - 1) * kLanes, load_part(from + (vectors - 1) * kLanes, last));
        }
    }
}

static void unpack(const float* packed, int64_t positions, int64_t head_dim, int64_t begin, int64_t end,
                   float* value, int64_t value_row) {
    MAGNET_FAST_FOR_STRIPS(strip, head_dim, positions) {
        const int64_t vectors = strip.vectors(), last = strip.last();
        const float* from = strip.find(packed) + begin * strip.row();
        float* to = value + begin * value_row + strip.first;
        for (int64_t i = begin; i < end; ++i, from += vectors * kLanes, to += value_row) {
            for (int64_t v = 0; v < vectors - 1; ++v) store(to + v * kLanes, load(from + v * kLanes));
            store_part(to + (vectors - 1) * kLanes, load(from + (vectors - 1) * kLanes), last);
        }
    }
}

/// to[corner * 4 ...]: four partial sums of each of four vectors.
static inline void store_quarters(float* to, const Vec dot[4]) {
#if defined(MAGNET_FAST_SIMD_AVX512)
    const Vec a = _mm512_shuffle_f32x4(dot[0], dot[1], 0x44) + _mm512_shuffle_f32x4(dot[0], dot[1], 0xEE);
    const Vec b = _mm512_shuffle_f32x4(dot[2], dot[3], 0x44) + _mm512_shuffle_f32x4(dot[2], dot[3], 0xEE);
    store(to, _mm512_shuffle_f32x4(a, b, 0x88) + _mm512_shuffle_f32x4(a, b, 0xDD));
#elif defined(MAGNET_FAST_SIMD_AVX2)
    for (int pair = 0; pair < 4; pair += 2)
        store(to + 4 * pair, _mm256_permute2f128_ps(dot[pair], dot[pair + 1], 0x20) +
                                 _mm256_permute2f128_ps(dot[pair], dot[pair + 1], 0x31));
#else
    for (int corner = 0; corner < 4; ++corner) store(to + 4 * corner, dot[corner]);
#endif
}

/// A block's points, one array for each quantity. Corners are numbered 0 (upper left), 1 (upper right), 2, 3.
/// Arrays have room for whole vectors; what the last one holds past the block's points is computed and not
/// used.
struct Points {
    float *x, *y;        // location; then the position between the corners, 0 .. 1; then its gradient
    float* weight;       // then its gradient
    float* coefficient;  // weight times a corner's bilinear coefficient, at corner_at(i) + corner * kLanes
    int32_t* row;        // likewise: a corner's row of the packed value, -1 outside the map
    float* quarters;     // (n, 4 corners, 4 partial sums) of grad_out times the corner's row
    float* dot[4];       // of each corner: their sum

    Points(float* scratch, int64_t points) {
        const int64_t n = (points + 15) / 16 * 16;
        const auto take = [&](int64_t floats) {
            float* piece = scratch;
            for (int64_t i = 0; i < floats; ++i) piece[i] = 0.0f;
            scratch += floats;
            return piece;
        };
        x = take(n);
        y = take(n);
        weight = take(n);
        coefficient = take(4 * n);
        row = reinterpret_cast<int32_t*>(take(4 * n));
        for (float*& piece : dot) piece = take(n);
        quarters = take(16 * n);
    }

    /// Vectors of the four corners take turns: one address reaches all of them.
    static int64_t corner_at(int64_t i) { return i + 3 * (i & -kLanes); }
};

static int64_t scratch_floats(int64_t block_points) {
    return 31 * ((block_points + 15) / 16 * 16);
}

/// Reads the block's points.
static void gather(const DeformableForward& a, int64_t query, int64_t queries, const Points& p) {
    const float* locations = a.locations + query * a.query_points * 2;
    const float* weights = a.weights + query * a.query_points;
    float* __restrict x = p.x;
    float* __restrict y = p.y;
    float* __restrict weight = p.weight;
    for (int64_t q = 0; q < queries; ++q) {
        for (int64_t i = 0; i < a.points; ++i) {
            x[i] = locations[2 * i];
            y[i] = locations[2 * i + 1];
            weight[i] = weights[i];
        }
        x += a.points;
        y += a.points;
        weight += a.points;
        locations += a.query_points * 2;
        weights += a.query_points;
    }
}

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

static inline Ints load_ints(const int32_t* p) {
    Ints v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

static inline void store_ints(int32_t* p, Ints v) {
    std::memcpy(p, &v, sizeof v);
}

/// The corner at or before `x` in a map of `size` cells, and the fraction after it. Anything that is not
/// strictly between -1 and size is outside: the corner is then -2 or size, and neither it nor the next one is
/// a cell that counts. Compared as floats before the conversion, so that no value is out of an integer's
/// range. The fraction of an infinity or a NaN is NaN, as in torch's grid_sample.
static inline Ints corner(Vec x, Vec size, Vec& fraction) {
    Vec inside = x >= broadcast(-1.0f) ? x : broadcast(-2.0f);
    inside = inside <= size ? inside : size;
    Ints at = __builtin_convertvector(inside, Ints);
    at += inside < __builtin_convertvector(at, Vec);  // truncation to floor: true is -1
    fraction = (inside - __builtin_convertvector(at, Vec)) + (x - x);
    return at;
}

/// The corners' rows and coefficients.
static void locate(const DeformableMaps& m, int64_t count, const Points& p) {
    const Vec half = broadcast(0.5f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Ints columns = load_ints(m.columns + i), lines = load_ints(m.rows + i);
        Vec x, y;
        const Ints x0 = corner(load(p.x + i) * load(m.width + i) - half, load(m.width + i), x);
        const Ints y0 = corner(load(p.y + i) * load(m.height + i) - half, load(m.height + i), y);
        const Ints left = (x0 >= 0) & (x0 < columns), right = (x0 >= -1) & (x0 < columns - 1);
        const Ints upper = (y0 >= 0) & (y0 < lines), lower = (y0 >= -1) & (y0 < lines - 1);
        const Ints row = load_ints(m.start + i) + y0 * columns + x0;
        // A condition is 0 or -1: outside, all bits of the row are set.
        store_ints(p.row + 4 * i, row | ~(upper & left));
        store_ints(p.row + 4 * i + 1 * kLanes, (row + 1) | ~(upper & right));
        store_ints(p.row + 4 * i + 2 * kLanes, (row + columns) | ~(lower & left));
        store_ints(p.row + 4 * i + 3 * kLanes, (row + columns + 1) | ~(lower & right));
        const Vec weight = load(p.weight + i), below = weight * y, above = weight - below;
        store(p.coefficient + 4 * i, above - above * x);
        store(p.coefficient + 4 * i + 1 * kLanes, above * x);
        store(p.coefficient + 4 * i + 2 * kLanes, below - below * x);
        store(p.coefficient + 4 * i + 3 * kLanes, below * x);
        store(p.x + i, x);
        store(p.y + i, y);
    }
}

/// out = sum over a query's points and their corners.
template <int Vectors>
static void sample(const DeformableForward& a, int64_t query, int64_t queries, const Strip& strip,
                   const Points& p) {
    // Independent sums, so that additions need not wait for each other.
    constexpr int kChains = Vectors == 1 ? 4 : 2;
    constexpr int64_t kRow = Vectors * kLanes;
    const float* value = strip.find(a.value);
    const int64_t last = strip.last();
    float* out = a.out + query * a.out_row + strip.first;
    for (int64_t q = 0, i = 0; q < queries; ++q, out += a.out_row) {
        Vec sum[kChains][Vectors];
        for (int chain = 0; chain < kChains; ++chain)
            for (int v = 0; v < Vectors; ++v) sum[chain][v] = broadcast(0.0f);
        for (const int64_t end = i + a.points; i < end; ++i) {
            const int32_t* row = p.row + Points::corner_at(i);
            const float* coefficient = p.coefficient + Points::corner_at(i);
            for (int c = 0; c < 4; ++c) {
                const float* from = value + row[c * kLanes] * kRow;
                const Vec factor = broadcast(coefficient[c * kLanes]);
                for (int v = 0; v < Vectors; ++v)
                    sum[c % kChains][v] = multiply_add(factor, load(from + v * kLanes), sum[c % kChains][v]);
            }
        }
        for (int v = 0; v < Vectors; ++v) {
            Vec total = sum[0][v] + sum[1][v];
            if (kChains == 4) total = total + (sum[kChains - 2][v] + sum[kChains - 1][v]);
            if (v < Vectors - 1)
                store(out + v * kLanes, total);
            else
                store_part(out + v * kLanes, total, last);
        }
    }
}

/// Dot products of grad_out with the corners' rows, and the scatter into grad_value.
template <int Vectors, bool Dots, bool Scatter>
static void differentiate(const DeformableBackward& a, int64_t query, int64_t queries, const Strip& strip,
                          const Points& p) {
    constexpr int64_t kRow = Vectors * kLanes;
    const float* value = Dots ? strip.find(a.value) : nullptr;
    float* grad_value = Scatter ? strip.find(a.grad_value) : nullptr;
    const float* grad_out = a.grad_out + query * a.out_row + strip.first;
    float* quarters = p.quarters;
    for (int64_t q = 0, i = 0; q < queries; ++q, grad_out += a.out_row) {
        Vec grad[Vectors];
        for (int v = 0; v < Vectors - 1; ++v) grad[v] = load(grad_out + v * kLanes);
        grad[Vectors - 1] = load_part(grad_out + (Vectors - 1) * kLanes, strip.last());
        for (const int64_t end = i + a.points; i < end; ++i, quarters += 16) {
            const int32_t* row = p.row + Points::corner_at(i);
            if constexpr (Dots) {
                Vec dot[4];
                for (int c = 0; c < 4; ++c) {
                    const float* from = value + row[c * kLanes] * kRow;
                    dot[c] = grad[0] * load(from);
                    for (int v = 1; v < Vectors; ++v)
                        dot[c] = multiply_add(grad[v], load(from + v * kLanes), dot[c]);
                }
                if (strip.first == 0) {
                    store_quarters(quarters, dot);
                } else {
                    float more[16];
                    store_quarters(more, dot);
                    for (int64_t j = 0; j < 16; j += kLanes)
                        store(quarters + j, load(quarters + j) + load(more + j));
                }
            }
            if constexpr (Scatter) {
                const float* coefficient = p.coefficient + Points::corner_at(i);
                for (int c = 0; c < 4; ++c) {
                    float* to = grad_value + row[c * kLanes] * kRow;
                    const Vec factor = broadcast(coefficient[c * kLanes]);
                    for (int v = 0; v < Vectors; ++v)
                        store(to + v * kLanes, multiply_add(factor, grad[v], load(to + v * kLanes)));
                }
            }
        }
    }
}

/// Sums the quarters of every dot product.
static void sum_quarters(int64_t count, const Points& p) {
    for (int64_t i = 0; i < count; i += 4) {
        for (int c = 0; c < 4; ++c) {
            const float* q = p.quarters + 16 * i + 4 * c;
            const float* four[4] = {q, q + 16, q + 32, q + 48};
            float part[16];
            transpose4(four, part, 4);
            for (int j = 0; j < 4; ++j)
                p.dot[c][i + j] = (part[j] + part[4 + j]) + (part[8 + j] + part[12 + j]);
        }
    }
}

/// Gradients of a block's locations and weights from the dot products.
static void finish(const DeformableMaps& m, int64_t count, const Points& p) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vec dot0 = load(p.dot[0] + i), dot1 = load(p.dot[1] + i);
        const Vec dot2 = load(p.dot[2] + i), dot3 = load(p.dot[3] + i);
        const Vec x = load(p.x + i), y = load(p.y + i), weight = load(p.weight + i);
        const Vec upper = dot1 - dot0, lower = dot3 - dot2, left = dot2 - dot0, right = dot3 - dot1;
        store(p.x + i, weight * load(m.width + i) * multiply_add(y, lower - upper, upper));
        store(p.y + i, weight * load(m.height + i) * multiply_add(x, right - left, left));
        const Vec above = multiply_add(x, upper, dot0), below = multiply_add(x, lower, dot2);
        store(p.weight + i, multiply_add(y, below - above, above));
    }
}

/// Writes the gradients of a block's points.
static void write_gradients(const DeformableBackward& a, int64_t query, int64_t queries, const Points& p) {
    for (int64_t q = 0; q < queries; ++q) {
        const float* x = p.x + q * a.points;
        const float* y = p.y + q * a.points;
        const float* weight = p.weight + q * a.points;
        const int64_t to = (query + q) * a.query_points;
        if (a.grad_locations) {
            float* __restrict locations = a.grad_locations + 2 * to;
            for (int64_t i = 0; i < a.points; ++i) {
                locations[2 * i] = x[i];
                locations[2 * i + 1] = y[i];
            }
        }
        if (a.grad_weights) {
            float* __restrict weights = a.grad_weights + to;
            for (int64_t i = 0; i < a.points; ++i) weights[i] = weight[i];
        }
    }
}

template <int Vectors>
static void differentiate_wanted(const DeformableBackward& a, int64_t query, int64_t queries,
                                 const Strip& strip, const Points& p) {
    const bool dots = a.grad_locations || a.grad_weights;
    if (dots && a.grad_value)
        differentiate<Vectors, true, true>(a, query, queries, strip, p);
    else if (dots)
        differentiate<Vectors, true, false>(a, query, queries, strip, p);
    else
        differentiate<Vectors, false, true>(a, query, queries, strip, p);
}

static void forward(const DeformableForward& a) {
    static_assert(kStrip == 4, "one function for each number of vectors");
    constexpr decltype(&sample<1>) kSample[] = {sample<1>, sample<2>, sample<3>, sample<4>};
    const Points p(a.scratch, a.block_queries * a.points);
    for (int64_t query = 0; query < a.queries; query += a.block_queries) {
        const int64_t left = a.queries - query, queries = left < a.block_queries ? left : a.block_queries;
        gather(a, query, queries, p);
        locate(a.maps, queries * a.points, p);
        MAGNET_FAST_FOR_STRIPS(strip, a.head_dim, a.positions)
        kSample[strip.vectors() - 1](a, query, queries, strip, p);
    }
}

static void backward(const DeformableBackward& a) {
    constexpr decltype(&differentiate_wanted<1>) kDifferentiate[] = {
        differentiate_wanted<1>, differentiate_wanted<2>, differentiate_wanted<3>, differentiate_wanted<4>};
    const Points p(a.scratch, a.block_queries * a.points);
    for (int64_t query = 0; query < a.queries; query += a.block_queries) {
        const int64_t left = a.queries - query, queries = left < a.block_queries ? left : a.block_queries;
        gather(a, query, queries, p);
        locate(a.maps, queries * a.points, p);
        MAGNET_FAST_FOR_STRIPS(strip, a.head_dim, a.positions)
        kDifferentiate[strip.vectors() - 1](a, query, queries, strip, p);
        if (!a.grad_locations && !a.grad_weights) continue;
        sum_quarters(queries * a.points, p);
        finish(a.maps, queries * a.points, p);
        write_gradients(a, query, queries, p);
    }
}

template <>
const DeformableKernels<float>& deformable_kernels<float>() {
    static const DeformableKernels<float> kernels = {
        scratch_floats, packed_floats, pack, clear, unpack, forward, backward,
    };
    return kernels;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
