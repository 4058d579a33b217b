// Compiled once per SIMD level; see simd.h and window_kernel.h.
#include "cpu/window_kernel.h"

#include <type_traits>

#include "cpu/simd_matrix.h"
#include "cpu/window_gather.h"
#include "cpu/window_pairs.h"
#include "cpu/window_rows.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// plain (keys x round_up(d)), unless null, and transposed (d x bias_row): the keys or values that lie
/// `offset` channels after the queries. Elements that must be converted are, once, in `buffer`.
template <typename Element>
static void gather_keys(const GroupForward<Element>& g, int64_t offset, const Element* pad,
                        const Element** rows, Real* plain, Real* transposed, Real* buffer) {
    key_rows(g, offset, pad, g.bias_row, rows);
    if constexpr (std::is_same_v<Element, Real>) {
        if (plain) gather_rows(rows, g.keys, g.head_dim, plain);
        transpose_rows(rows, g.bias_row, g.head_dim, transposed);
    } else {
        Real* converted = plain ? plain : buffer;
        gather_rows(rows, g.bias_row, g.head_dim, converted);
        const Real** converted_rows = reinterpret_cast<const Real**>(rows);
        for (int64_t j = 0; j < g.bias_row; ++j) converted_rows[j] = converted + j * round_up(g.head_dim);
        transpose_rows(converted_rows, g.bias_row, g.head_dim, transposed);
    }
}

template <typename Element>
static void forward(const GroupForward<Element>& g) {
    const int64_t d = g.head_dim, wide = round_up(d), columns = g.bias_row;
    Arena arena(g.scratch);
    Real* query = arena.take<Real>(g.tokens * wide);
    Real* key_transposed = arena.take<Real>(d * columns);
    Real* value = arena.take<Real>(columns * wide);
    Real* score = arena.take<Real>(kBlock * columns);
    Real* out = arena.take<Real>(kBlock * wide);
    const Element** rows = arena.take<const Element*>(columns);

    gather_rows(g.query, g.tokens, d, query);
    gather_keys(g, g.channels, g.pad_key, rows, static_cast<Real*>(nullptr), key_transposed, value);
    key_rows(g, 2 * g.channels, g.pad_value, g.keys, rows);
    gather_rows(rows, g.keys, d, value);

    Vec sum[kBlock];
    for (int64_t i = 0, count = 0; i < g.tokens; i += count) {
        count = block_rows(g.tokens - i);
        weigh(QueryBlock<Real>{count, columns, d, query + i * wide, wide, key_transposed,
                               g.bias + i * columns, g.scale, score, columns, sum, score},
              [&](int64_t r) { prefetch_token(g, i + r); });
        multiply(count, wide, g.keys, score, columns, 1, value, wide, nullptr, 0, out, wide);
        for (int64_t r = 0; r < count; ++r)
            write_row(g.out[i + r], out + r * wide, d, 1 / reduce_add(sum[r]));
    }
}

template <typename Element>
static void backward(const GroupBackward<Element>& g) {
    const int64_t d = g.head_dim, wide = round_up(d), columns = g.bias_row;
    const bool want_tokens = g.grad_query != nullptr,
               want_pad = g.grad_pad_key != nullptr && g.keys > g.tokens;
    // Keys whose gradients are wanted: all, the padding only, or none.
    const int64_t first_key = want_tokens ? 0 : g.tokens;
    const int64_t key_count = (want_pad || want_tokens ? g.keys : first_key) - first_key;

    Arena arena(g.scratch);
    Real* query = arena.take<Real>(g.tokens * wide);
    Real* grad_out = arena.take<Real>(g.tokens * wide);
    Real* key = arena.take<Real>(columns * wide);
    Real* key_transposed = arena.take<Real>(d * columns);
    Real* value_transposed = arena.take<Real>(d * columns);
    Real* grad_key = arena.take<Real>(columns * wide);
    Real* grad_value = arena.take<Real>(columns * wide);
    Real* probability = arena.take<Real>(kBlock * columns);
    Real* grad_score = arena.take<Real>(kBlock * columns);
    Real* grad_query = arena.take<Real>(kBlock * wide);
    const Element** rows = arena.take<const Element*>(columns);

    gather_rows(g.query, g.tokens, d, query);
    gather_rows(g.grad_out, g.tokens, d, grad_out);
    gather_keys(g, g.channels, g.pad_key, rows, key, key_transposed, grad_value);
    gather_keys(g, 2 * g.channels, g.pad_value, rows, static_cast<Real*>(nullptr), value_transposed,
                grad_value);

    Vec top[kBlock];
    for (int64_t i = 0, count = 0; i < g.tokens; i += count) {
        count = block_rows(g.tokens - i);
        multiply(count, columns, d, query + i * wide, wide, 1, key_transposed, columns, g.bias + i * columns,
                 columns, probability, columns, top);
        multiply(count, columns, d, grad_out + i * wide, wide, 1, value_transposed, columns, nullptr, 0,
                 grad_score, columns);
        for (int64_t r = 0; r < count; ++r) {
            softmax_backward(probability + r * columns, grad_score + r * columns, columns, g.scale, top[r],
                             g.grad_bias ? g.grad_bias + (i + r) * columns : nullptr);
            prefetch_token(g, i + r);
        }
        if (want_tokens) {
            multiply(count, wide, g.keys, grad_score, columns, 1, key, wide, nullptr, 0, grad_query, wide);
            for (int64_t r = 0; r < count; ++r)
                write_row(g.grad_query[i + r], grad_query + r * wide, d, g.scale);
        }
        if (key_count > 0) {
            // dk = scale * dS^T q and dv = P^T dO, summed over the blocks of queries.
            multiply(key_count, wide, count, grad_score + first_key, 1, columns, query + i * wide, wide,
                     i ? grad_key : nullptr, wide, grad_key, wide);
            multiply(key_count, wide, count, probability + first_key, 1, columns, grad_out + i * wide, wide,
                     i ? grad_value : nullptr, wide, grad_value, wide);
        }
    }
    write_key_gradients(g, grad_key, grad_value);
}

template <typename Element>
const WindowKernels<Element>& window_kernels() {
    static const WindowKernels<Element> kernels = {{kLanes, gather_bias, log_sum_exp_rows, softmax_rows},
                                                   scratch_bytes,
                                                   forward<Element>,
                                                   backward<Element>};
    return kernels;
}

#if defined(MAGNET_FAST_SIMD_AVX512_BF16)
template <>
const WindowKernels<BFloat16>& window_kernels<BFloat16>() {
    static const WindowKernels<BFloat16> kernels = {
        {kLanes, gather_bias, log_sum_exp_rows, softmax_rows}, scratch_bytes, forward_pairs, backward_pairs};
    return kernels;
}
#endif

MAGNET_FAST_INSTANTIATE_KERNELS(WindowKernels, window_kernels)

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
