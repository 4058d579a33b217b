// Which instruction set the CPU kernels use, chosen at run time.
#pragma once

#include <string>
#include <vector>

namespace magnet_fast {

/// Name of the level in use: "avx512", "avx2" or "portable".
std::string simd_level();

/// The levels that this build holds and this processor can run, best first.
std::vector<std::string> supported_simd_levels();

/// Forces a level for the whole process; std::invalid_argument when it is not a supported one.
void set_simd_level(const std::string& name);

}  // namespace magnet_fast
