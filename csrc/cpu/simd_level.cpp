#include "cpu/simd_level.h"

#include <atomic>
#include <stdexcept>
#include <utility>

#include "cpu/amx_support.h"

namespace magnet_fast {
namespace {

using Level = std::pair<SimdLevel, const char*>;

std::vector<Level> find_available() {
    std::vector<Level> levels;
    // __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
#if defined(MAGNET_FAST_HAS_AVX512_BF16)
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
#if defined(MAGNET_FAST_HAS_AMX)
        if (has_amx()) levels.emplace_back(SimdLevel::kAmx, "amx");
#endif
        levels.emplace_back(SimdLevel::kAvx512Bf16, "avx512_bf16");
    }
#endif
#if defined(MAGNET_FAST_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("fma"))
        levels.emplace_back(SimdLevel::kAvx512, "avx512");
#endif
#if defined(MAGNET_FAST_HAS_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        levels.emplace_back(SimdLevel::kAvx2, "avx2");
#endif
    levels.emplace_back(SimdLevel::kPortable, "portable");
    return levels;
}

/// The best first. Found once: asking for the tiles is some instructions that a virtual machine answers
/// slowly.
const std::vector<Level>& available() {
    static const std::vector<Level> levels = find_available();
    return levels;
}

/// The best one that the operating system lets this process use.
SimdLevel best() {
    for (const auto& [level, name] : available())
        if (level != SimdLevel::kAmx || request_amx()) return level;
    return SimdLevel::kPortable;
}

std::atomic<SimdLevel>& selected() {
    static std::atomic<SimdLevel> level{best()};
    return level;
}

}  // namespace

SimdLevel selected_simd_level() {
    return selected().load();
}

std::string simd_level() {
    const SimdLevel now = selected_simd_level();
    for (const auto& [level, name] : available())
        if (level == now) return name;
    return "portable";
}

std::vector<std::string> supported_simd_levels() {
    std::vector<std::string> names;
    for (const auto& [level, name] : available()) names.emplace_back(name);
    return names;
}

void set_simd_level(const std::string& name) {
    std::string known;
    for (const auto& [level, level_name] : available()) {
        if (name == level_name) {
            if (level == SimdLevel::kAmx && !request_amx())
                throw std::invalid_argument(
                    "name: the operating system refuses this process the registers of 'amx'");
            selected().store(level);
            return;
        }
        known += (known.empty() ? "" : ", ") + std::string(level_name);
    }
    throw std::invalid_argument("name: '" + name +
                                "' is not a SIMD level of this processor; expected one of: " + known);
}

}  // namespace magnet_fast
