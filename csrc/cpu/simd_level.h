// Which instruction set the CPU kernels use, chosen at run time, and how a launcher finds its kernels.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

namespace magnet_fast {

enum class SimdLevel { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx };

/// The level in use: the best one that this build holds and this processor runs, unless one was forced.
SimdLevel selected_simd_level();

/// Its name: "amx", "avx512_bf16", "avx512", "avx2" or "portable".
std::string simd_level();

/// The levels that this build holds and this processor can run, best first.
std::vector<std::string> supported_simd_levels();

/// Forces a level for the whole process; std::invalid_argument when it is not a supported one, or when the
/// operating system refuses the process amx's registers.
void set_simd_level(const std::string& name);

#if defined(MAGNET_FAST_HAS_AVX2)
#define MAGNET_FAST_IF_AVX2(...) __VA_ARGS__
#else
#define MAGNET_FAST_IF_AVX2(...)
#endif
#if defined(MAGNET_FAST_HAS_AVX512)
#define MAGNET_FAST_IF_AVX512(...) __VA_ARGS__
#else
#define MAGNET_FAST_IF_AVX512(...)
#endif
#if defined(MAGNET_FAST_HAS_AVX512_BF16)
#define MAGNET_FAST_IF_AVX512_BF16(...) __VA_ARGS__
#else
#define MAGNET_FAST_IF_AVX512_BF16(...)
#endif
#if defined(MAGNET_FAST_HAS_AMX)
#define MAGNET_FAST_IF_AMX(...) __VA_ARGS__
#else
#define MAGNET_FAST_IF_AMX(...)
#endif

#define MAGNET_FAST_DECLARE_KERNELS_(level, Table, function) \
    namespace level {                                        \
    template <typename Element>                              \
    const Table<Element>& function();                        \
    }

/// Declares function<Element>(), the table of kernels of the level in use, and every level's own one, which
/// the kernel file, compiled once per level, defines and ends with MAGNET_FAST_INSTANTIATE_KERNELS. float64
/// exists in one scalar form: it is there for gradient checks. amx multiplies bfloat16 alone; everything else
/// is avx512_bf16's there.
#define MAGNET_FAST_DECLARE_KERNELS(Table, function)                                                   \
    MAGNET_FAST_DECLARE_KERNELS_(portable, Table, function)                                            \
    MAGNET_FAST_DECLARE_KERNELS_(float64, Table, function)                                             \
    MAGNET_FAST_IF_AVX2(MAGNET_FAST_DECLARE_KERNELS_(avx2, Table, function))                           \
    MAGNET_FAST_IF_AVX512(MAGNET_FAST_DECLARE_KERNELS_(avx512, Table, function))                       \
    MAGNET_FAST_IF_AVX512_BF16(MAGNET_FAST_DECLARE_KERNELS_(avx512_bf16, Table, function))             \
    MAGNET_FAST_IF_AMX(MAGNET_FAST_DECLARE_KERNELS_(amx, Table, function))                             \
    template <typename Element>                                                                        \
    const Table<Element>& function() {                                                                 \
        if constexpr (std::is_same_v<Element, double>) {                                               \
            return float64::function<Element>();                                                       \
        } else {                                                                                       \
            MAGNET_FAST_IF_AMX(if constexpr (std::is_same_v<Element, BFloat16>) {                      \
                if (selected_simd_level() == SimdLevel::kAmx) return amx::function<Element>();         \
            })                                                                                         \
            switch (selected_simd_level()) {                                                           \
                MAGNET_FAST_IF_AVX512_BF16(                                                            \
                    case SimdLevel::kAmx : case SimdLevel::kAvx512Bf16 : return avx512_bf16::function< \
                        Element>();)                                                                   \
                MAGNET_FAST_IF_AVX512(case SimdLevel::kAvx512 : return avx512::function<Element>();)   \
                MAGNET_FAST_IF_AVX2(case SimdLevel::kAvx2 : return avx2::function<Element>();)         \
                default:                                                                               \
                    return portable::function<Element>();                                              \
            }                                                                                          \
        }                                                                                              \
    }

/// Stands at the end of a kernel file, in its level's namespace. Tests that emulate a level compile bfloat16
/// alone where they need no more: it takes half the time.
#if defined(MAGNET_FAST_SIMD_FLOAT64)
#define MAGNET_FAST_INSTANTIATE_KERNELS(Table, function) template const Table<double>& function<double>();
#elif defined(MAGNET_FAST_SIMD_AMX) || defined(MAGNET_FAST_EMULATE_BFLOAT16_ALONE)
#define MAGNET_FAST_INSTANTIATE_KERNELS(Table, function) template const Table<BFloat16>& function<BFloat16>();
#else
#define MAGNET_FAST_INSTANTIATE_KERNELS(Table, function)  \
    template const Table<float>& function<float>();       \
    template const Table<BFloat16>& function<BFloat16>(); \
    template const Table<Float16>& function<Float16>();
#endif

}  // namespace magnet_fast
