// The software models of instructions, and the products made of them, for tests: called with ctypes. The
// model of the tiles stands in place of the intrinsics with MAGNET_FAST_EMULATE_AMX, else in place of the
// instructions.
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/simd_matrix.h"
#include "cpu/tile_emulation.h"
#if !defined(MAGNET_FAST_EMULATE_AMX)
#include "trapped_instructions.h"
#endif

namespace magnet_fast {
namespace {

/// Takes numbers and addresses from an array, in order.
struct Reader {
    const int64_t* at;

    int64_t number() { return *at++; }
    template <typename T>
    T* pointer() {
        return reinterpret_cast<T*>(number());
    }
};

/// Null, or what went wrong.
template <typename Call>
const char* report(const Call& call) {
    static std::string message;
    try {
#if defined(MAGNET_FAST_EMULATE_AMX)
        call();
#else
        const trapped::Trap trap;
        call();
        trap.check();
#endif
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace
}  // namespace magnet_fast

using namespace magnet_fast;

#pragma GCC visibility push(default)
extern "C" {

/// multiply() of simd_matrix.h: rows, columns, depth, a, a_row, a_depth, b, b_depth, init, init_row, c,
/// c_row, top.
const char* multiply_pairs(const int64_t* numbers) {
    return report([&] {
        Reader r{numbers};
        const int64_t rows = r.number(), columns = r.number(), depth = r.number();
        const auto* a = r.pointer<const amx::Pair>();
        const int64_t a_row = r.number(), a_depth = r.number();
        const auto* b = r.pointer<const amx::Pair>();
        const int64_t b_depth = r.number();
        const auto* init = r.pointer<const float>();
        const int64_t init_row = r.number();
        auto* c = r.pointer<float>();
        const int64_t c_row = r.number();
        amx::Vec top[64];
        float* highest = r.pointer<float>();
        amx::multiply(rows, columns, depth, a, a_row, a_depth, b, b_depth, init, init_row, c, c_row,
                      highest ? top : nullptr);
        for (int64_t m = 0; highest && m < rows; ++m) highest[m] = amx::reduce_max(top[m]);
    });
}

const char* loadconfig(const void* memory) {
    return report([&] { tile_emulation::loadconfig(memory); });
}
const char* loadd(int tile, const void* memory, int64_t stride) {
    return report([&] { tile_emulation::loadd(tile, memory, stride); });
}
const char* stored(int tile, void* memory, int64_t stride) {
    return report([&] { tile_emulation::stored(tile, memory, stride); });
}
const char* zero(int tile) {
    return report([&] { tile_emulation::zero(tile); });
}
const char* dpbf16ps(int sums, int a, int b) {
    return report([&] { tile_emulation::dpbf16ps(sums, a, b); });
}
const char* release() {
    return report([] { tile_emulation::release(); });
}
int configured() {
    return tile_emulation::registers().configured;
}
/// Products of tiles since the last call.
int64_t products() {
    const int64_t count = tile_emulation::registers().products;
    tile_emulation::registers().products = 0;
    return count;
}

#if !defined(MAGNET_FAST_EMULATE_AMX)
std::unique_ptr<trapped::Trap> handler;

/// For calls of the module, which know nothing of the trap.
void start_trap() {
    handler = std::make_unique<trapped::Trap>();
}
const char* end_trap() {
    handler.reset();
    return trapped::fault().empty() ? nullptr : trapped::fault().c_str();
}
#endif
}
