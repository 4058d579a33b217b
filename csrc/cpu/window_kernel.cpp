// Compiled once per SIMD level; see simd.h and window_kernel.h.
#include "cpu/window_kernel.h"

#include "cpu/simd_matrix.h"

#if !defined(MAGNET_FAST_SIMD_FLOAT64)
namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

// Query rows treated at a time, at most: a 7 x 7 window is one block of 49, a 12 x 12 window three blocks of
// 48. Larger blocks make fewer passes over the gradients of k and v; smaller ones keep the scores closer to
// the core.
constexpr int64_t kBlock = 64;

/// Rows of the next block when `left` remain: blocks of nearly equal height.
static inline int64_t block_rows(int64_t left) {
    const int64_t blocks = (left + kBlock - 1) / kBlock;
    return (left + blocks - 1) / blocks;
}

/// Hands out consecutive, 64-byte aligned pieces of the scratch buffer.
struct Arena {
    float* at;
    float* take(int64_t floats) {
        float* piece = at;
        at += (floats + 15) / 16 * 16;
        return piece;
    }
};

static int64_t scratch_floats(int64_t tokens, int64_t head_dim) {
    const int64_t keys = round_up(tokens + 1), wide = round_up(head_dim) + 16;
    // q, dO, k, dk, dv (keys x d); k and v transposed (d x keys); scores and their gradients; dq; row
    // pointers.
    return 5 * keys * wide + 2 * wide * (keys + 16) + 2 * kBlock * keys + kBlock * wide + 4 * keys + 256;
}

/// to (count x round_up(d)) = scale * rows, zeros past d.
static void gather_rows(const float* const* rows, int64_t count, int64_t d, float scale, float* to) {
    const int64_t wide = round_up(d), whole = d / kLanes * kLanes;
    const Vec factor = broadcast(scale);
    for (int64_t i = 0; i < count; ++i, to += wide) {
        int64_t c = 0;
        for (; c < whole; c += kLanes) store(to + c, load(rows[i] + c) * factor);
        for (; c < d; ++c) to[c] = rows[i][c] * scale;
        for (; c < wide; ++c) to[c] = 0.0f;
    }
}

/// to (d x count) = rows transposed; count is a multiple of kLanes, and so of 4.
static void gather_transposed(const float* const* rows, int64_t count, int64_t d, float* to) {
    for (int64_t i = 0; i < count; i += 4) {
        int64_t c = 0;
        for (; c + 4 <= d; c += 4) {
            const float* block[4] = {rows[i] + c, rows[i + 1] + c, rows[i + 2] + c, rows[i + 3] + c};
            transpose4(block, to + c * count + i, count);
        }
        for (; c < d; ++c)
            for (int64_t r = 0; r < 4; ++r) to[c * count + i + r] = rows[i + r][c];
    }
}

/// Pointers to every key's row, `offset` channels after the query: the real tokens', the padding's, then
/// zeros.
static void key_rows(const GroupForward& g, int64_t offset, const float* pad, const float** rows) {
    int64_t j = 0;
    for (; j < g.tokens; ++j) rows[j] = g.query[j] + offset;
    for (; j < g.keys; ++j) rows[j] = pad;
    for (; j < g.bias_row; ++j) rows[j] = g.zeros;
}

/// row = exp(row - max(row)); returns the sum. An infinite or NaN maximum gives NaN throughout, as torch's
/// softmax does.
static inline float exponentiate(float* row, int64_t columns) {
    Vec top = load(row);
    for (int64_t j = kLanes; j < columns; j += kLanes) top = maximum(top, load(row + j));
    const Vec highest = broadcast(reduce_max(top));
    Vec total = broadcast(0.0f);
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec weight = exponential(load(row + j) - highest);
        store(row + j, weight);
        total = total + weight;
    }
    return reduce_add(total);
}

/// to[0 .. d) = factor * from.
static inline void write_row(float* to, const float* from, int64_t d, float factor) {
    const Vec wide = broadcast(factor);
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) store(to + c, load(from + c) * wide);
    for (; c < d; ++c) to[c] = from[c] * factor;
}

static inline void prefetch_token(const GroupForward& g, int64_t i) {
    if (!g.next) return;
    for (int64_t part = 0; part < 3; ++part)
        for (int64_t c = 0; c < g.head_dim; c += 16)
            __builtin_prefetch(g.next[i] + part * g.channels + c, 0, 2);
}

static void forward(const GroupForward& g) {
    const int64_t d = g.head_dim, wide = round_up(d), columns = g.bias_row;
    Arena arena{g.scratch};
    float* query = arena.take(g.tokens * wide);
    float* key_transposed = arena.take(d * columns);
    float* value = arena.take(g.keys * wide);
    float* score = arena.take(kBlock * columns);
    float* out = arena.take(kBlock * wide);
    const float** rows = reinterpret_cast<const float**>(arena.take(2 * columns));

    gather_rows(g.query, g.tokens, d, g.scale, query);
    key_rows(g, g.channels, g.pad_key, rows);
    gather_transposed(rows, columns, d, key_transposed);
    key_rows(g, 2 * g.channels, g.pad_value, rows);
    gather_rows(rows, g.keys, d, 1.0f, value);

    for (int64_t i = 0, count = 0; i < g.tokens; i += count) {
        count = block_rows(g.tokens - i);
        float sum[kBlock];
        multiply(count, columns, d, query + i * wide, wide, 1, key_transposed, columns, g.bias + i * columns,
                 columns, score, columns);
        for (int64_t r = 0; r < count; ++r) {
            sum[r] = exponentiate(score + r * columns, columns);
            prefetch_token(g, i + r);
        }
        multiply(count, wide, g.keys, score, columns, 1, value, wide, nullptr, 0, out, wide);
        for (int64_t r = 0; r < count; ++r) write_row(g.out[i + r], out + r * wide, d, 1.0f / sum[r]);
    }
}

/// probability and grad (columns): from exponentials and dP to P and dS = P * (dP - sum(P * dP)); grad_bias
/// += dS.
static inline void softmax_backward(float* probability, float* grad, int64_t columns, float inverse_sum,
                                    float* grad_bias) {
    const Vec scale = broadcast(inverse_sum);
    Vec dot = broadcast(0.0f);
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec p = load(probability + j) * scale;
        store(probability + j, p);
        dot = multiply_add(p, load(grad + j), dot);
    }
    const Vec mean = broadcast(reduce_add(dot));
    for (int64_t j = 0; j < columns; j += kLanes) {
        const Vec ds = load(probability + j) * (load(grad + j) - mean);
        store(grad + j, ds);
        if (grad_bias) store(grad_bias + j, load(grad_bias + j) + ds);
    }
}

static void backward(const GroupBackward& g) {
    const int64_t d = g.head_dim, wide = round_up(d), columns = g.bias_row;
    const bool want_tokens = g.grad_query != nullptr,
               want_pad = g.grad_pad_key != nullptr && g.keys > g.tokens;
    // Keys whose gradients are wanted: all, the padding only, or none.
    const int64_t first_key = want_tokens ? 0 : g.tokens;
    const int64_t key_count = (want_pad || want_tokens ? g.keys : first_key) - first_key;

    Arena arena{g.scratch};
    float* query = arena.take(g.tokens * wide);
    float* grad_out = arena.take(g.tokens * wide);
    float* key = arena.take(g.keys * wide);
    float* key_transposed = arena.take(d * columns);
    float* value_transposed = arena.take(d * columns);
    float* grad_key = arena.take(g.keys * wide);
    float* grad_value = arena.take(g.keys * wide);
    float* probability = arena.take(kBlock * columns);
    float* grad_score = arena.take(kBlock * columns);
    float* grad_query = arena.take(kBlock * wide);
    const float** rows = reinterpret_cast<const float**>(arena.take(2 * columns));

    gather_rows(g.query, g.tokens, d, g.scale, query);
    gather_rows(g.grad_out, g.tokens, d, 1.0f, grad_out);
    key_rows(g, g.channels, g.pad_key, rows);
    gather_transposed(rows, columns, d, key_transposed);
    if (want_tokens) gather_rows(rows, g.keys, d, 1.0f, key);
    key_rows(g, 2 * g.channels, g.pad_value, rows);
    gather_transposed(rows, columns, d, value_transposed);

    for (int64_t i = 0, count = 0; i < g.tokens; i += count) {
        count = block_rows(g.tokens - i);
        multiply(count, columns, d, query + i * wide, wide, 1, key_transposed, columns, g.bias + i * columns,
                 columns, probability, columns);
        multiply(count, columns, d, grad_out + i * wide, wide, 1, value_transposed, columns, nullptr, 0,
                 grad_score, columns);
        for (int64_t r = 0; r < count; ++r) {
            float* row = probability + r * columns;
            const float sum = exponentiate(row, columns);
            softmax_backward(row, grad_score + r * columns, columns, 1.0f / sum,
                             g.grad_bias ? g.grad_bias + (i + r) * columns : nullptr);
            prefetch_token(g, i + r);
        }
        if (want_tokens) {
            multiply(count, wide, g.keys, grad_score, columns, 1, key, wide, nullptr, 0, grad_query, wide);
            for (int64_t r = 0; r < count; ++r)
                write_row(g.grad_query[i + r], grad_query + r * wide, d, g.scale);
        }
        if (key_count > 0) {
            // dk = dS^T q (q carries the scale) and dv = P^T dO, summed over the blocks of queries.
            multiply(key_count, wide, count, grad_score + first_key, 1, columns, query + i * wide, wide,
                     i ? grad_key : nullptr, wide, grad_key, wide);
            multiply(key_count, wide, count, probability + first_key, 1, columns, grad_out + i * wide, wide,
                     i ? grad_value : nullptr, wide, grad_value, wide);
        }
    }
    if (want_tokens) {
        for (int64_t j = 0; j < g.tokens; ++j) {
            write_row(g.grad_query[j] + g.channels, grad_key + j * wide, d, 1.0f);
            write_row(g.grad_query[j] + 2 * g.channels, grad_value + j * wide, d, 1.0f);
        }
    }
    if (want_pad) {
        const int64_t row = (g.tokens - first_key) * wide;
        for (int64_t c = 0; c < d; ++c) g.grad_pad_key[c] += grad_key[row + c];
        for (int64_t c = 0; c < d; ++c) g.grad_pad_value[c] += grad_value[row + c];
    }
}

static void log_sum_exp_rows(const float* values, int64_t rows, int64_t columns, float* result,
                             int64_t result_stride) {
    for (int64_t r = 0; r < rows; ++r, values += columns) {
        Vec top = load(values);
        for (int64_t j = kLanes; j < columns; j += kLanes) top = maximum(top, load(values + j));
        const float highest = reduce_max(top);
        Vec total = broadcast(0.0f);
        // A row of -infinity alone: its sum is 0 and its logarithm -infinity, not NaN.
        const Vec offset = broadcast(highest > -__builtin_inff() ? highest : 0.0f);
        for (int64_t j = 0; j < columns; j += kLanes) total = total + exponential(load(values + j) - offset);
        result[r * result_stride] = highest + __builtin_logf(reduce_add(total));
    }
}

static void softmax_rows(float* values, int64_t rows, int64_t columns, const float* log_sum,
                         const float* weight, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r, values += columns) {
        const float total = log_sum[r * stride];
        const Vec offset = broadcast(total > -__builtin_inff() ? total : 0.0f),
                  factor = broadcast(weight[r * stride]);
        for (int64_t j = 0; j < columns; j += kLanes)
            store(values + j, exponential(load(values + j) - offset) * factor);
    }
}

template <>
const WindowKernels<float>& window_kernels<float>() {
    static const WindowKernels<float> kernels = {
        kLanes, scratch_floats, forward, backward, log_sum_exp_rows, softmax_rows,
    };
    return kernels;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
#endif
