// Compiled once per SIMD level; see simd.h and linear_chain_kernel.h.
#include "cpu/linear_chain_kernel.h"

#include <type_traits>

#include "cpu/linear_chain_gelu.h"
#include "cpu/simd_matrix.h"
#if defined(MAGNET_FAST_SIMD_AMX)
#include "cpu/linear_chain_tiles.h"
#endif

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

#if defined(MAGNET_FAST_SIMD_AMX)
constexpr int64_t kPanel = kPanelTiles * kLanes;
#else
constexpr int64_t kPanel = kPanelVectors * kLanes;
#endif

/// What rows and packed weights consist of: Real, or neighbouring bfloat16 inputs where one instruction
/// multiplies both.
template <typename Element>
struct Packed {
    using Word = Real;
    static constexpr int64_t kDepth = 1;
    static inline Word word(const Element* p) { return widen(*p); }
};

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <>
struct Packed<BFloat16> {
    using Word = Pair;
    static constexpr int64_t kDepth = 2;
    static inline Word word(const BFloat16* p) {
        return {static_cast<uint32_t>(p[1].bits) << 16 | p[0].bits};
    }
};
#endif

template <typename Element>
constexpr bool kConverts = !std::is_same_v<Element, Real> && Packed<Element>::kDepth == 1;

template <typename Element>
static int64_t packed_bytes(int64_t in, int64_t out) {
    return out * in / Packed<Element>::kDepth * static_cast<int64_t>(sizeof(typename Packed<Element>::Word));
}

template <typename Element>
static void pack(const Element* weight, int64_t in, int64_t out, void* packed) {
    auto* to = static_cast<typename Packed<Element>::Word*>(packed);
    for (int64_t first = 0; first < out; first += kPanel) {
        const int64_t wide = out - first < kPanel ? out - first : kPanel;
        for (int64_t k = 0; k < in; k += Packed<Element>::kDepth)
            for (int64_t n = 0; n < wide; ++n) *to++ = Packed<Element>::word(weight + (first + n) * in + k);
    }
}

/// Rounded to nearest even.
template <typename Element>
static inline void store_rounded(Element* p, Vec v) {
    store(p, v);
}
#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
static inline void store_rounded(BFloat16* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
}
#endif

#if defined(MAGNET_FAST_SIMD_AMX)
template <typename Element>
static int64_t scratch_bytes(int64_t, int64_t) {
    return kTileScratchBytes;
}

template <typename Element>
static void product(const ChainProduct<Element>& p) {
    multiply_layer(p);
}
#else
template <typename Element>
static int64_t scratch_bytes(int64_t rows, int64_t in) {
    return ((rows + 1) * kPanel + (kConverts<Element> ? rows * in : 0)) * static_cast<int64_t>(sizeof(Real));
}

/// y = finish(sums + bias, row, output), `wide` outputs of every row.
template <typename Element, typename Finish>
static inline void write(const ChainProduct<Element>& p, const Real* sums, const Real* bias, int64_t first,
                         int64_t wide, const Finish& finish) {
    for (int64_t m = 0; m < p.rows; ++m)
        for (int64_t n = 0; n < wide; n += kLanes)
            store_rounded(p.y + m * p.y_row + first + n,
                          finish(load(sums + m * wide + n) + load(bias + n), m, first + n));
}

template <typename Element>
static void product(const ChainProduct<Element>& p) {
    using Word = typename Packed<Element>::Word;
    constexpr int64_t kDepth = Packed<Element>::kDepth;
    Real* bias = static_cast<Real*>(p.scratch);
    Real* sums = bias + kPanel;
    const Word* x;
    int64_t x_row = p.x_row / kDepth;
    if constexpr (kConverts<Element>) {
        Real* converted = sums + p.rows * kPanel;
        for (int64_t m = 0; m < p.rows; ++m)
            for (int64_t k = 0; k < p.in; k += kLanes)
                store(converted + m * p.in + k, load(p.x + m * p.x_row + k));
        x = converted;
        x_row = p.in;
    } else {
        x = reinterpret_cast<const Word*>(p.x);
    }
    const int64_t depth = p.in / kDepth;
    for (int64_t index = p.first_panel; index < p.last_panel; ++index) {
        const int64_t first = index * kPanel, wide = p.out - first < kPanel ? p.out - first : kPanel;
        for (int64_t n = 0; n < wide; n += kLanes)
            store(bias + n, p.bias ? load(p.bias + first + n) : broadcast(Real{0}));
        const Word* panel = static_cast<const Word*>(p.weight) + first * depth;
        multiply_panel(wide / kLanes, p.rows, depth, x, x_row, panel, sums, wide);
        if (p.residual)
            write(p, sums, bias, first, wide,
                  [&](Vec y, int64_t m, int64_t n) { return y + load(p.residual + m * p.residual_row + n); });
        else if (p.activation == ChainActivation::kGelu)
            write(p, sums, bias, first, wide, [](Vec y, int64_t, int64_t) { return gelu<Element>(y); });
        else if (p.activation == ChainActivation::kRelu)
            // maximum(a, b) is b where a is NaN: a NaN stays one.
            write(p, sums, bias, first, wide,
                  [](Vec y, int64_t, int64_t) { return maximum(broadcast(Real{0}), y); });
        else
            write(p, sums, bias, first, wide, [](Vec y, int64_t, int64_t) { return y; });
    }
}

#endif

template <typename Element>
static void norm(int64_t rows, int64_t width, const Element* x, int64_t x_row, const Element* weight,
                 const Element* bias, Real epsilon, Element* y, int64_t y_row) {
    for (int64_t m = 0; m < rows; ++m, x += x_row, y += y_row) {
        // The row is in the first-level cache: reading it three times costs less than keeping it.
        Vec sum = broadcast(Real{0}), square = broadcast(Real{0});
        for (int64_t k = 0; k < width; k += kLanes) sum = sum + load(x + k);
        const Vec mean = broadcast(reduce_add(sum) / static_cast<Real>(width));
        for (int64_t k = 0; k < width; k += kLanes) {
            const Vec centred = load(x + k) - mean;
            square = multiply_add(centred, centred, square);
        }
        const Real variance = reduce_add(square) / static_cast<Real>(width);
        const Vec factor = broadcast(Real{1} / static_cast<Real>(__builtin_sqrt(variance + epsilon)));
        for (int64_t k = 0; k < width; k += kLanes) {
            Vec value = (load(x + k) - mean) * factor;
            if (weight) value = value * load(weight + k);
            if (bias) value = value + load(bias + k);
            store_rounded(y + k, value);
        }
    }
}

/// Fewer rows read the weights more often, more leave the second-level cache: 96 rows of 1024 bfloat16 take a
/// fifth of 1 MiB. Tiles multiply so fast that reading the weights counts more, and have 2 MiB: half for a
/// row.
static int64_t chunk(int64_t widest) {
#if defined(MAGNET_FAST_SIMD_AMX)
    const int64_t fitting = (int64_t{1} << 19) / widest / kTileHeight * kTileHeight;
    return fitting < 64 ? 64 : fitting > 512 ? 512 : fitting;
#else
    (void)widest;
    return 96;
#endif
}

template <typename Element>
const ChainKernels<Element>& chain_kernels() {
    static const ChainKernels<Element> kernels = {kPanel,
                                                  kLanes > 2 ? kLanes : 2,
                                                  chunk,
                                                  packed_bytes<Element>,
                                                  pack<Element>,
                                                  scratch_bytes<Element>,
                                                  product<Element>,
                                                  norm<Element>};
    return kernels;
}

MAGNET_FAST_INSTANTIATE_KERNELS(ChainKernels, chain_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
