// Runs AMX's instructions themselves on a processor without them: each is illegal there, and the handler of
// the signal decodes it, lets the software model do what it says, and goes on behind it. What is tested so is
// the level as it is shipped: the compiler's own code, optimised, with the instructions' bytes in it.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "cpu/tile_emulation.h"

namespace trapped {

/// The first fault of a call; empty: none.
inline std::string& fault() {
    static std::string message;
    return message;
}

inline int64_t value(const greg_t* registers, int number) {
    constexpr int kPlace[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[kPlace[number]];
}

/// ModRM, SIB and displacement of a VEX-encoded instruction.
struct Operand {
    int mode, reg, rm, bytes = 1;
    int64_t address = 0, stride = 0;  // of memory

    Operand(const unsigned char* at, bool index_high, bool base_high, const greg_t* registers)
        : mode(at[0] >> 6), reg(at[0] >> 3 & 7), rm(at[0] & 7) {
        if (mode == 3) return;
        if (rm != 4) throw std::logic_error("an operand without SIB byte is not decoded");
        const int scale = at[1] >> 6, index = (at[1] >> 3 & 7) | index_high << 3, base = at[1] & 7;
        bytes = 2;
        if (index != 4) stride = value(registers, index) << scale;
        if (mode == 0 && base == 5) throw std::logic_error("an operand without base is not decoded");
        address = value(registers, base | base_high << 3);
        if (mode == 1) address += static_cast<signed char>(at[bytes++]);
        if (mode == 2) {
            int32_t displacement;
            std::memcpy(&displacement, at + bytes, sizeof displacement);
            address += displacement;
            bytes += 4;
        }
    }
};

/// LDTILECFG's operand: a base register or the instruction pointer, with a displacement.
struct Configuration {
    int bytes = 1;  // ModRM and displacement
    int64_t address;

    Configuration(const unsigned char* at, bool base_high, const greg_t* registers) {
        const int mode = at[0] >> 6, base = at[0] & 7;
        if (base == 4) throw std::logic_error("a configuration at an address with SIB byte is not decoded");
        const bool relative = mode == 0 && base == 5;
        int32_t displacement = 0;
        if (mode == 1) displacement = static_cast<signed char>(at[bytes++]);
        if (mode == 2 || relative) {
            std::memcpy(&displacement, at + bytes, sizeof displacement);
            bytes += 4;
        }
        address =
            (relative ? reinterpret_cast<int64_t>(at) + bytes : value(registers, base | base_high << 3)) +
            displacement;
    }
};

/// Does the instruction at `at`. `length` is set before that; to 0 when it is not one that is decoded.
inline void step(const unsigned char* at, const greg_t* registers, int& length) {
    namespace model = magnet_fast::tile_emulation;
    length = 0;
    // Three bytes of VEX: inverted R, X, B and the map 0F38; W 0, the inverted third operand, L 0, the
    // prefix.
    if (at[0] != 0xC4 || (at[1] & 0x1F) != 2 || (at[2] & 0x84) != 0) return;
    const bool index_high = !(at[1] & 0x40), base_high = !(at[1] & 0x20);
    const int third = ~(at[2] >> 3) & 15;
    constexpr int kNone = 0, kF3 = 2, kF2 = 3;
    const int instruction = at[3] << 8 | (at[2] & 3);
    if (instruction == (0x49 << 8 | kNone) && at[4] >> 6 != 3) {
        const Configuration from(at + 4, base_high, registers);
        length = 4 + from.bytes;
        return model::loadconfig(reinterpret_cast<const void*>(from.address));
    }
    const Operand operand(at + 4, index_high, base_high, registers);
    void* memory = reinterpret_cast<void*>(operand.address);
    length = 4 + operand.bytes;
    switch (instruction) {
        case 0x49 << 8 | kNone:
            return model::release();
        case 0x49 << 8 | kF2:
            return model::zero(operand.reg);
        case 0x4B << 8 | kF2:
            return model::loadd(operand.reg, memory, operand.stride);
        case 0x4B << 8 | kF3:
            return model::stored(operand.reg, memory, operand.stride);
        case 0x5C << 8 | kF3:
            return model::dpbf16ps(operand.reg, operand.rm, third);
    }
    length = 0;
}

inline void handle(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    int length = 0;
    try {
        step(reinterpret_cast<const unsigned char*>(registers[REG_RIP]), registers, length);
    } catch (const std::exception& error) {
        if (fault().empty()) fault() = error.what();
    }
    if (length == 0) signal(SIGILL, SIG_DFL);  // the same instruction again, and the end of the process
    registers[REG_RIP] += length;
}

/// The handler while it lives.
class Trap {
  public:
    Trap() {
        fault().clear();
        struct sigaction action = {};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        sigaction(SIGILL, &action, &before_);
    }
    ~Trap() { sigaction(SIGILL, &before_, nullptr); }
    Trap(const Trap&) = delete;

    void check() const {
        if (!fault().empty()) throw std::runtime_error(fault());
    }

  private:
    struct sigaction before_;
};

}  // namespace trapped
