#include "cpu/amx_support.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace magnet_fast {
namespace {

// Of Linux's asm/prctl.h, which older headers lack, and the number of the tiles in the processor's list of
// state.
constexpr int kGetSupportedState = 0x1021, kRequestState = 0x1023, kTileConfiguration = 17, kTileData = 18;

/// Bits of XCR0: the state that the operating system has switched on.
uint64_t switched_on() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

}  // namespace

bool has_amx() {
    constexpr uint32_t kOsxsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr uint64_t kTiles = uint64_t{1} << kTileConfiguration | uint64_t{1} << kTileData;
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
    uint64_t offered = 0;
    return (switched_on() & kTiles) == kTiles && syscall(SYS_arch_prctl, kGetSupportedState, &offered) == 0 &&
           (offered & kTiles) == kTiles;
}

bool request_amx() {
    return syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
}

}  // namespace magnet_fast

#else

namespace magnet_fast {

bool has_amx() {
    return false;
}
bool request_amx() {
    return false;
}

}  // namespace magnet_fast

#endif
