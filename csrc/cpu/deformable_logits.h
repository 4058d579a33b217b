// Points that come as the two Linears' outputs: softmax of the logits, locations from offsets around
// reference points, and the way back. Part of deformable_kernel.cpp, compiled once per SIMD level.
#pragma once

#include "cpu/deformable_kernel.h"
#include "cpu/deformable_points.h"
#include "cpu/simd.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Softmax of one query's logits over all its points. Whole vectors are written, zeros past the last.
template <typename Number>
static inline void softmax(const Number* logits, int64_t count, Real* to) {
    const Real nothing = -__builtin_inff();
    Vec most = broadcast(nothing);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vec logit = load(logits + i);
        store(to + i, logit);
        most = maximum(most, logit);
    }
    if (i < count) {
        store(to + i, load_part(logits + i, count - i));
        for (int64_t j = count; j < i + kLanes; ++j) to[j] = nothing;
        most = maximum(most, load(to + i));
    }
    const Vec greatest = broadcast(reduce_max(most));
    Vec sum = broadcast(0.0f);
    for (i = 0; i < count; i += kLanes) {
        const Vec power = exponential(load(to + i) - greatest);
        store(to + i, power);
        sum = sum + power;
    }
    const Vec total = broadcast(reduce_add(sum));
    for (i = 0; i < count; i += kLanes) store(to + i, load(to + i) / total);
}

/// Spreads the reference points of one query over its points. Whole vectors are written.
template <typename Element>
static inline void read_reference(const DeformableForward<Element>& a, int64_t query, int64_t at,
                                  const Points& p) {
    const DeformableLogits<Element>& logits = *a.logits;
    const Real* from = logits.reference + query * logits.reference_row;
    for (int64_t c = 0; c < logits.coordinates; ++c) {
        Real* to = p.reference[c] + at;
        if (logits.reference_level == 0) {
            const Vec same = broadcast(from[c]);
            for (int64_t i = 0; i < a.query_count(); i += kLanes) store(to + i, same);
            continue;
        }
        for (int64_t l = 0; l < a.levels; ++l)
            for (int64_t k = 0; k < a.points; ++k)
                to[l * a.points + k] = from[l * logits.reference_level + c];
    }
}

template <typename Number, typename Element>
static void read_logits_of(const DeformableForward<Element>& a, int64_t query, int64_t queries,
                           const Points& p) {
    const DeformableLogits<Element>& logits = *a.logits;
    const Number* offset = static_cast<const Number*>(logits.offsets) + query * logits.offsets_row;
    const Number* logit = static_cast<const Number*>(logits.logits) + query * logits.logits_row;
    const int64_t points = a.query_count();
    for (int64_t q = 0, at = 0; q < queries; ++q, at += points) {
        read_pairs(offset, points, p.offset_x + at, p.offset_y + at);
        softmax(logit, logits.all_points, p.softmax);
        for (int64_t i = 0; i < points; i += kLanes)
            store(p.weight + at + i, load(p.softmax + logits.first_point + i));
        read_reference(a, query + q, at, p);
        offset += logits.offsets_row;
        logit += logits.logits_row;
    }
}

/// Reads a block's offsets, logits and reference points.
template <typename Element>
static void read_logits(const DeformableForward<Element>& a, int64_t query, int64_t queries,
                        const Points& p) {
    if (a.logits->wide)
        read_logits_of<Real>(a, query, queries, p);
    else
        read_logits_of<Element>(a, query, queries, p);
}

/// A box's offset of one is this much of its side, on either side of its centre.
template <typename Element>
static inline Vec box_unit(const DeformableForward<Element>& a) {
    return broadcast(Real(0.5) / static_cast<Real>(a.points));
}

/// Locates points that were given by offsets: in pixels around a reference point, in parts of a reference
/// box.
template <typename Element>
static void locate_offsets(const DeformableForward<Element>& a, int64_t count, const Points& p) {
    const Vec half = broadcast(0.5f), unit = box_unit(a);
    const DeformableMaps<Real>& m = a.maps;
    if (a.logits->coordinates == 4) {
        locate(m, count, p, [&](int64_t i, Vec& x, Vec& y) {
            const Vec right = load(p.offset_x + i) * unit * load(p.reference[2] + i);
            const Vec down = load(p.offset_y + i) * unit * load(p.reference[3] + i);
            x = (load(p.reference[0] + i) + right) * load(m.width + i) - half;
            y = (load(p.reference[1] + i) + down) * load(m.height + i) - half;
        });
    } else {
        locate(m, count, p, [&](int64_t i, Vec& x, Vec& y) {
            x = load(p.reference[0] + i) * load(m.width + i) + (load(p.offset_x + i) - half);
            y = load(p.reference[1] + i) * load(m.height + i) + (load(p.offset_y + i) - half);
        });
    }
}

/// Writes the gradient of one query's logits. sum over its points of weight * gradient is taken off: softmax.
template <typename Number>
static inline void write_logits(const Real* weight, const Real* grad_weight, int64_t points, Number* to) {
    Vec sum = broadcast(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= points; i += kLanes)
        sum = multiply_add(load(weight + i), load(grad_weight + i), sum);
    if (i < points)
        sum = multiply_add(load_part(weight + i, points - i), load_part(grad_weight + i, points - i), sum);
    const Vec mean = broadcast(reduce_add(sum));
    for (i = 0; i < points; i += kLanes) {
        const Vec grad = load(weight + i) * (load(grad_weight + i) - mean);
        if (i + kLanes <= points)
            store(to + i, grad);
        else
            store_part(to + i, grad, points - i);
    }
}

/// Writes this head's part of the gradient of one query's reference points. x and y: gradients of what adds
/// to a coordinate in [0, 1].
template <typename Element>
static inline void write_reference(const DeformableBackward<Element>& a, int64_t query, int64_t at,
                                   const Points& p) {
    const Real unit = Real(0.5) / static_cast<Real>(a.points);
    Real* to = a.grad_reference + query * a.grad_reference_row;
    for (int64_t l = 0; l < a.levels; ++l, to += a.logits->coordinates) {
        Real sum[4] = {};
        for (int64_t k = 0; k < a.points; ++k, ++at) {
            const Real x = p.x[at] * a.maps.width[at], y = p.y[at] * a.maps.height[at];
            sum[0] += x;
            sum[1] += y;
            if (a.logits->coordinates == 4) {
                sum[2] += x * p.offset_x[at] * unit;
                sum[3] += y * p.offset_y[at] * unit;
            }
        }
        for (int64_t c = 0; c < a.logits->coordinates; ++c) to[c] = sum[c];
    }
}

template <typename Number, typename Element>
static void write_grad_logits_of(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                                 const Points& p) {
    const int64_t points = a.query_count();
    Number* grad_offsets = static_cast<Number*>(a.grad_offsets);
    Number* grad_logits = static_cast<Number*>(a.grad_logits);
    // x and y hold the gradients in pixels, which are the offsets' own unless these count in boxes.
    for (int64_t q = 0; a.grad_reference && q < queries; ++q) write_reference(a, query + q, q * points, p);
    if (a.grad_offsets && a.logits->coordinates == 4) {
        const Vec unit = box_unit(a);
        for (int64_t i = 0; i < queries * points; i += kLanes) {
            store(p.x + i, load(p.x + i) * load(a.maps.width + i) * unit * load(p.reference[2] + i));
            store(p.y + i, load(p.y + i) * load(a.maps.height + i) * unit * load(p.reference[3] + i));
        }
    }
    for (int64_t q = 0; q < queries; ++q) {
        const int64_t from = q * points, to = (query + q) * a.query_points;
        if (grad_offsets) write_pairs(p.x + from, p.y + from, points, grad_offsets + 2 * to);
        if (grad_logits) write_logits(p.weight + from, p.grad_weight + from, points, grad_logits + to);
    }
}

/// Writes the gradients of a block's offsets, logits and reference points.
template <typename Element>
static void write_grad_logits(const DeformableBackward<Element>& a, int64_t query, int64_t queries,
                              const Points& p) {
    if (a.logits->wide)
        write_grad_logits_of<Real>(a, query, queries, p);
    else
        write_grad_logits_of<Element>(a, query, queries, p);
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
