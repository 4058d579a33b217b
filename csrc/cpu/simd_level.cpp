#include "cpu/simd_level.h"

#include <atomic>
#include <stdexcept>

#include "cpu/window_kernel.h"

namespace magnet_fast {

namespace portable {
extern const WindowKernels kWindowKernels;
}
#if defined(MAGNET_FAST_HAS_AVX2)
namespace avx2 {
extern const WindowKernels kWindowKernels;
}
#endif
#if defined(MAGNET_FAST_HAS_AVX512)
namespace avx512 {
extern const WindowKernels kWindowKernels;
}
#endif

namespace {

std::vector<const WindowKernels*> available() {
    std::vector<const WindowKernels*> levels;
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
#if defined(MAGNET_FAST_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma"))
        levels.push_back(&avx512::kWindowKernels);
#endif
#if defined(MAGNET_FAST_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        levels.push_back(&avx2::kWindowKernels);
#endif
    levels.push_back(&portable::kWindowKernels);
    return levels;
}

std::atomic<const WindowKernels*>& selected() {
    static std::atomic<const WindowKernels*> level{available().front()};
    return level;
}

}  // namespace

const WindowKernels& window_kernels() {
    return *selected().load();
}

std::string simd_level() {
    return window_kernels().name;
}

std::vector<std::string> supported_simd_levels() {
    std::vector<std::string> names;
    for (const WindowKernels* level : available()) names.emplace_back(level->name);
    return names;
}

void set_simd_level(const std::string& name) {
    std::string known;
    for (const WindowKernels* level : available()) {
        if (name == level->name) {
            selected().store(level);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(level->name);
    }
    throw std::invalid_argument("name: '" + name +
                                "' is not a SIMD level of this processor; expected one of: " + known);
}

}  // namespace magnet_fast
