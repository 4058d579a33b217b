// What the kernels use of the machine, as thin device functions with two bodies: inline PTX for nvcc, and the
// same operation on the host for tests (host_emulation.h). Fragment layouts are those of the PTX ISA,
// "Matrix multiply-accumulate operation using mma instruction"; lane = 4 * g + t.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(MAGNET_FAST_EMULATE_CUDA)
#include "cuda/host_emulation.h"
#define MAGNET_FAST_KERNEL(threads, blocks) static void
#define MAGNET_FAST_DEVICE static inline
#define MAGNET_FAST_UNROLL
#define MAGNET_FAST_ROLLED
#define MAGNET_FAST_METHOD inline
#else
// A kernel for blocks of at most `threads`, of which a multiprocessor is to hold `blocks` or more.
#define MAGNET_FAST_KERNEL(threads, blocks) static __global__ void __launch_bounds__(threads, blocks)
#define MAGNET_FAST_DEVICE static __device__ __forceinline__
#define MAGNET_FAST_METHOD __device__ __forceinline__
#define MAGNET_FAST_UNROLL _Pragma("unroll")
#define MAGNET_FAST_ROLLED _Pragma("unroll 1")
#endif

namespace magnet_fast {

constexpr int kWarpSize = 32;

/// Moved by one instruction; the address is aligned to the size.
struct alignas(16) Words4 {
    uint32_t word[4];
};
struct alignas(8) Floats2 {
    float x, y;
};

#if !defined(MAGNET_FAST_EMULATE_CUDA)

MAGNET_FAST_DEVICE int thread_index() {
    return threadIdx.x;
}
MAGNET_FAST_DEVICE int thread_count() {
    return blockDim.x;
}
MAGNET_FAST_DEVICE int64_t block_index() {
    return blockIdx.x;
}
MAGNET_FAST_DEVICE int64_t block_count() {
    return gridDim.x;
}
MAGNET_FAST_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}
MAGNET_FAST_DEVICE void sync_block() {
    __syncthreads();
}
MAGNET_FAST_DEVICE void sync_warp() {
    __syncwarp();
}
MAGNET_FAST_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
/// Whether any lane of the warp has it.
MAGNET_FAST_DEVICE bool any_lane(bool has) {
    return __any_sync(0xffffffffu, has);
}

/// Shared memory is read and written by these two alone: the emulation checks every access.
template <typename T>
MAGNET_FAST_DEVICE T load_shared(const T* from) {
    return *from;
}
template <typename T>
MAGNET_FAST_DEVICE void store_shared(T* to, T value) {
    *to = value;
}
/// Shared or global memory.
template <typename T>
MAGNET_FAST_DEVICE T load_any(const T* from) {
    return *from;
}
template <typename T>
MAGNET_FAST_DEVICE void store_any(T* to, T value) {
    *to = value;
}

/// Global memory, by one instruction: the emulation checks that the address is aligned to T.
template <typename T>
MAGNET_FAST_DEVICE T load_global(const T* from) {
    return *from;
}
template <typename T>
MAGNET_FAST_DEVICE void store_global(T* to, const T& value) {
    *to = value;
}
/// Adds to a number in global memory and returns what it was. Whole numbers only: their sums do not depend on
/// the order in which threads come.
MAGNET_FAST_DEVICE int32_t atomic_add(int32_t* to, int32_t count) {
    return atomicAdd(to, count);
}

/// Begins to copy 16 bytes to shared memory: `given` (0 or 16) from `from`, then zeros.
MAGNET_FAST_DEVICE void copy_async(void* to, const void* from, int given) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(at), "l"(from), "r"(given)
                 : "memory");
}
MAGNET_FAST_DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/// Waits until at most `Left` of this thread's committed groups are on their way.
template <int Left>
MAGNET_FAST_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(Left) : "memory");
}

/// Four 8 x 8 matrices of 16-bit elements; lane 8 * m + r gives the address of row r of matrix m. Register m
/// receives elements (g, 2t) and (g, 2t + 1) of matrix m.
MAGNET_FAST_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}
/// The same, transposed: elements (2t, g) and (2t + 1, g).
MAGNET_FAST_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(at)
                 : "memory");
}

/// c += a b for a 16 x 16, b 16 x 8, c 16 x 8.
MAGNET_FAST_DEVICE void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MAGNET_FAST_DEVICE void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
/// The same for a 16 x 8, b 8 x 8; the numbers are rounded to TF32 already.
MAGNET_FAST_DEVICE void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

/// 2^x; 2^-infinity is 0.
MAGNET_FAST_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
MAGNET_FAST_DEVICE float log2_fast(float x) {
    return __log2f(x);
}
MAGNET_FAST_DEVICE float round_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return __uint_as_float(y);
}
MAGNET_FAST_DEVICE float bits_to_float(uint32_t bits) {
    return __uint_as_float(bits);
}
MAGNET_FAST_DEVICE float float16_to_float(uint16_t bits) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
    return y;
}
/// Two numbers rounded to 16 bits each, `low` in the lower half.
MAGNET_FAST_DEVICE uint32_t pack_bfloat16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
MAGNET_FAST_DEVICE uint32_t pack_float16(float low, float high) {
    uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

#else

MAGNET_FAST_DEVICE int thread_index() {
    return emulation::machine().thread;
}
MAGNET_FAST_DEVICE int thread_count() {
    return emulation::machine().threads;
}
MAGNET_FAST_DEVICE int64_t block_index() {
    return emulation::machine().block;
}
MAGNET_FAST_DEVICE int64_t block_count() {
    return emulation::machine().blocks;
}
MAGNET_FAST_DEVICE char* shared_memory() {
    return emulation::machine().memory.get();
}
MAGNET_FAST_DEVICE void sync_block(int line = __builtin_LINE()) {
    emulation::sync_block(line);
}
MAGNET_FAST_DEVICE void sync_warp(int line = __builtin_LINE()) {
    emulation::exchange(nullptr, 0, line, /*orders=*/true);
}
MAGNET_FAST_DEVICE float shuffle_xor(float value, int mask, int line = __builtin_LINE()) {
    const auto* lanes = emulation::exchange(&value, sizeof(value), line);
    float other;
    std::memcpy(&other, lanes[(thread_index() % kWarpSize) ^ mask], sizeof(other));
    return other;
}

MAGNET_FAST_DEVICE bool any_lane(bool has, int line = __builtin_LINE()) {
    const auto* lanes = emulation::exchange(&has, sizeof(has), line);
    for (int i = 0; i < kWarpSize; ++i)
        if (lanes[i][0]) return true;
    return false;
}

template <typename T>
MAGNET_FAST_DEVICE T load_shared(const T* from) {
    emulation::note_read(from, sizeof(T), alignof(T));
    return *from;
}
template <typename T>
MAGNET_FAST_DEVICE void store_shared(T* to, T value) {
    emulation::note_write(to, sizeof(T), alignof(T));
    *to = value;
}
template <typename T>
MAGNET_FAST_DEVICE T load_any(const T* from) {
    return emulation::is_shared(from) ? load_shared(from) : *from;
}
template <typename T>
MAGNET_FAST_DEVICE void store_any(T* to, T value) {
    emulation::is_shared(to) ? store_shared(to, value) : void(*to = value);
}

MAGNET_FAST_DEVICE void check_global(const void* address, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(address) % alignment)
        emulation::fail("global memory: an address is not aligned to " + std::to_string(alignment));
}
template <typename T>
MAGNET_FAST_DEVICE T load_global(const T* from) {
    check_global(from, alignof(T));
    return *from;
}
template <typename T>
MAGNET_FAST_DEVICE void store_global(T* to, const T& value) {
    check_global(to, alignof(T));
    *to = value;
}
MAGNET_FAST_DEVICE int32_t atomic_add(int32_t* to, int32_t count) {
    const int32_t before = *to;
    *to += count;
    return before;
}

MAGNET_FAST_DEVICE void copy_async(void* to, const void* from, int given) {
    emulation::copy_async(to, from, 16, given);
}
MAGNET_FAST_DEVICE void commit_copies() {
    emulation::commit_copies();
}
template <int Left>
MAGNET_FAST_DEVICE void wait_copies() {
    emulation::wait_copies(Left);
}

MAGNET_FAST_DEVICE uint16_t matrix_element(const char (*rows)[emulation::kSlotBytes], int matrix, int row,
                                           int column) {
    const uint16_t* at;
    std::memcpy(&at, rows[8 * matrix + row], sizeof(at));
    if (reinterpret_cast<uintptr_t>(at) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes");
    return load_shared(at + column);
}
MAGNET_FAST_DEVICE void load_matrices(uint32_t (&to)[4], const void* row, int line = __builtin_LINE()) {
    const auto* rows = emulation::exchange(&row, sizeof(row), line);
    const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
    for (int m = 0; m < 4; ++m)
        to[m] = matrix_element(rows, m, g, 2 * t) |
                static_cast<uint32_t>(matrix_element(rows, m, g, 2 * t + 1)) << 16;
}
MAGNET_FAST_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const void* row,
                                                 int line = __builtin_LINE()) {
    const auto* rows = emulation::exchange(&row, sizeof(row), line);
    const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
    for (int m = 0; m < 4; ++m)
        to[m] = matrix_element(rows, m, 2 * t, g) |
                static_cast<uint32_t>(matrix_element(rows, m, 2 * t + 1, g)) << 16;
}

MAGNET_FAST_DEVICE float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
MAGNET_FAST_DEVICE uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
MAGNET_FAST_DEVICE float float16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 31 ? (mantissa ? std::nanf("") : INFINITY)
                       : exponent     ? std::ldexp(1024.0f + mantissa, exponent - 25)
                                      : std::ldexp(static_cast<float>(mantissa), -24);
    return bits >> 15 ? -size : size;
}
MAGNET_FAST_DEVICE uint32_t bfloat16_bits(float x) {
    const uint32_t bits = float_to_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
MAGNET_FAST_DEVICE uint32_t float16_bits(float x) {
    const uint32_t sign = float_to_bits(x) >> 31 << 15;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);  // size < 2^exponent
    exponent = exponent < -13 || size == 0.0f ? -13 : exponent;
    // nearbyint rounds to even; a carry into the next exponent is the next number's pattern.
    const uint32_t mantissa = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    return sign | (static_cast<uint32_t>(exponent + 13) * 1024 + mantissa);
}
MAGNET_FAST_DEVICE uint32_t pack_bfloat16(float low, float high) {
    return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}
MAGNET_FAST_DEVICE uint32_t pack_float16(float low, float high) {
    return float16_bits(low) | float16_bits(high) << 16;
}
MAGNET_FAST_DEVICE float exp2_fast(float x) {
    return std::exp2(x);
}
MAGNET_FAST_DEVICE float log2_fast(float x) {
    return std::log2(x);
}
MAGNET_FAST_DEVICE float round_tf32(float x) {
    if (!std::isfinite(x)) return x;
    return bits_to_float((float_to_bits(x) + 0x1000) & 0xffffe000u);
}

/// One lane's part of all lanes' a (4 registers) and b (2).
struct LaneOperands {
    uint32_t a[4], b[2];
};

/// c += a b with what every lane holds; `a_at(lanes, row, k)` and `b_at(lanes, k, column)` find elements.
template <int K, typename A, typename B>
MAGNET_FAST_DEVICE void multiply_emulated(float (&c)[4], const LaneOperands& mine, const A& a_at,
                                          const B& b_at, int line) {
    static_assert(sizeof(LaneOperands) <= emulation::kSlotBytes, "a lane's operands fit in its slot");
    const auto* slots = emulation::exchange(&mine, sizeof(mine), line);
    LaneOperands lanes[kWarpSize];
    for (int i = 0; i < kWarpSize; ++i) std::memcpy(&lanes[i], slots[i], sizeof(LaneOperands));
    const int g = thread_index() % kWarpSize / 4, t = thread_index() % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        double sum = c[i];
        for (int k = 0; k < K; ++k)
            sum += static_cast<double>(a_at(lanes, row, k)) * static_cast<double>(b_at(lanes, k, column));
        c[i] = static_cast<float>(sum);
    }
}

/// m16n8k16: register 2 * (k / 8) + row / 8 of a, and k / 8 of b, at lane (row % 8, k % 8 / 2).
template <typename Widen>
MAGNET_FAST_DEVICE void multiply_16_bit(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                        const Widen& widen, int line) {
    const auto half = [&](uint32_t word, int k) {
        return widen(static_cast<uint16_t>(word >> 16 * (k % 2)));
    };
    multiply_emulated<16>(
        c, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}},
        [&](const LaneOperands* lanes, int row, int k) {
            return half(lanes[row % 8 * 4 + k % 8 / 2].a[k / 8 * 2 + row / 8], k);
        },
        [&](const LaneOperands* lanes, int k, int column) {
            return half(lanes[column * 4 + k % 8 / 2].b[k / 8], k);
        },
        line);
}
MAGNET_FAST_DEVICE void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                          int line = __builtin_LINE()) {
    multiply_16_bit(
        c, a, b, [](uint16_t bits) { return bits_to_float(static_cast<uint32_t>(bits) << 16); }, line);
}
MAGNET_FAST_DEVICE void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                         int line = __builtin_LINE()) {
    multiply_16_bit(c, a, b, float16_to_float, line);
}
/// m16n8k8: register 2 * (k / 4) + row / 8 of a, and k / 4 of b, at lane (row % 8, k % 4). The hardware
/// reads 19 bits of a number.
MAGNET_FAST_DEVICE void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2],
                                      int line = __builtin_LINE()) {
    LaneOperands mine;
    std::memcpy(mine.a, a, sizeof(a));
    std::memcpy(mine.b, b, sizeof(b));
    const auto read = [](uint32_t bits) { return bits_to_float(bits & 0xffffe000u); };
    multiply_emulated<8>(
        c, mine,
        [&](const LaneOperands* lanes, int row, int k) {
            return read(lanes[row % 8 * 4 + k % 4].a[k / 4 * 2 + row / 8]);
        },
        [&](const LaneOperands* lanes, int k, int column) {
            return read(lanes[column * 4 + k % 4].b[k / 4]);
        },
        line);
}

#endif

}  // namespace magnet_fast
