// Compiled once per SIMD level; see simd.h and deformable_kernel.h.
//
// A block of queries is treated in two or three sweeps. The first turns its points into coefficients and row
// numbers of the four corners, vectorised over points. The second reads (and scatters) the corners' rows,
// vectorised over channels. Backward has a third, which makes gradients from the dot products of the second,
// over points again.
#include "cpu/deformable_kernel.h"

#include "cpu/deformable_dot.h"
#include "cpu/deformable_logits.h"
#include "cpu/deformable_pairs.h"
#include "cpu/deformable_points.h"
#include "cpu/deformable_rows.h"
#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

template <typename Element>
static Points points_of(const DeformableForward<Element>& a) {
    return Points(a.scratch, a.block_queries * a.query_count(), a.logits ? a.logits->all_points : 0);
}

template <typename Element>
static void read_and_locate(const DeformableForward<Element>& a, int64_t query, int64_t queries,
                            const Points& p) {
    if (a.logits) {
        read_logits(a, query, queries, p);
        locate_offsets(a, queries * a.query_count(), p);
    } else {
        read_points(a, query, queries, p);
        locate_points(a.maps, queries * a.query_count(), p);
    }
}

static_assert(kStrip == 4, "one function for each number of vectors");

/// The function for rows as wide as the strip's.
template <typename Element>
static auto sampler(const Strip& strip) {
    constexpr decltype(&sample<1, Element>) kSample[] = {sample<1, Element>, sample<2, Element>,
                                                         sample<3, Element>, sample<4, Element>};
#if defined(MAGNET_FAST_SIMD_AVX512) || defined(MAGNET_FAST_SIMD_AVX2)
    if (strip.half()) return &sample_pairs<Element>;
#endif
    return kSample[strip.vectors() - 1];
}

template <typename Element>
static auto differentiator(const Strip& strip) {
    constexpr decltype(&differentiate_wanted<1, Element>) kDifferentiate[] = {
        differentiate_wanted<1, Element>, differentiate_wanted<2, Element>, differentiate_wanted<3, Element>,
        differentiate_wanted<4, Element>};
#if defined(MAGNET_FAST_SIMD_AVX512) || defined(MAGNET_FAST_SIMD_AVX2)
    if (strip.half()) return &differentiate_pairs_wanted<Element>;
#endif
    return kDifferentiate[strip.vectors() - 1];
}

template <typename Element>
static void forward(const DeformableForward<Element>& a) {
    const Points p = points_of(a);
    for (int64_t query = 0; query < a.queries; query += a.block_queries) {
        const int64_t left = a.queries - query, queries = left < a.block_queries ? left : a.block_queries;
        read_and_locate(a, query, queries, p);
        MAGNET_FAST_FOR_STRIPS(strip, a.head_dim, a.rows)
        sampler<Element>(strip)(a, query, queries, strip, p);
    }
}

template <typename Element>
static void backward(const DeformableBackward<Element>& a) {
    const Points p = points_of(a);
    for (int64_t query = 0; query < a.queries; query += a.block_queries) {
        const int64_t left = a.queries - query, queries = left < a.block_queries ? left : a.block_queries;
        read_and_locate(a, query, queries, p);
        MAGNET_FAST_FOR_STRIPS(strip, a.head_dim, a.rows)
        differentiator<Element>(strip)(a, query, queries, strip, p);
        if (!a.wants_points()) continue;
        finish(queries * a.query_count(), p);
        if (a.logits)
            write_grad_logits(a, query, queries, p);
        else
            write_points(a, query, queries, p);
    }
}

template <typename Element>
const DeformableKernels<Element>& deformable_kernels() {
    static const DeformableKernels<Element> kernels = {
        scratch_reals, packed_reals,    pack<Element>,    pack<Element>,
        clear,         unpack<Element>, forward<Element>, backward<Element>,
    };
    return kernels;
}

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
static void forward_dots(const DeformableForward<BFloat16>& a) {
    if (!takes_dots(a.head_dim)) return forward(a);
    const Points p = points_of(a);
    for (int64_t query = 0; query < a.queries; query += a.block_queries) {
        const int64_t left = a.queries - query, queries = left < a.block_queries ? left : a.block_queries;
        read_and_locate(a, query, queries, p);
        pair_coefficients(queries * a.query_count(), p);
        for (int64_t first = 0; first < a.head_dim; first += kDotChannels)
            sample_dots(a, query, queries, first, p);
    }
}

template <>
const DeformableKernels<BFloat16>& deformable_kernels<BFloat16>() {
    static const DeformableKernels<BFloat16> kernels = {
        scratch_reals, packed_reals,     pack_dots,    pack<BFloat16>,
        clear,         unpack<BFloat16>, forward_dots, backward<BFloat16>,
    };
    return kernels;
}
#endif

MAGNET_FAST_INSTANTIATE_KERNELS(DeformableKernels, deformable_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
