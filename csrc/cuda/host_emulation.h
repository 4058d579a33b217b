// Runs the kernels' own source on the host, for tests on machines without a GPU. Included by primitives.cuh
// when MAGNET_FAST_EMULATE_CUDA is defined and the .cu files are compiled as plain C++.
//
// A block's threads are fibers of one operating-system thread, switched only where threads wait for each
// other, so a run is repeatable; with `reversed` they run in the opposite order, which turns a missing
// barrier into a different result. Beside that, every access to shared memory is checked: inside the block's
// allocation, aligned, initialised, not of bytes that an asynchronous copy is still on its way to, and not
// in a race (two threads, one of them writing, no barrier between). Barriers that threads reach at
// different places of the source, or not at all, are errors. Not emulated: timing, caches, the order in which
// other blocks and the host see global memory, and rounding inside the tensor cores (here: once, of a
// double).
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace magnet_fast {
namespace emulation {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr int kWarp = 32, kSlotBytes = 32, kGrain = 2, kAlignment = 128;
constexpr size_t kStackBytes = 128 * 1024;

/// What is known of kGrain bytes of shared memory. Epochs count barriers and never repeat, not even from one
/// block to the next, so that nothing has to be cleared between them.
struct Grain {
    uint64_t written = 0, written_warp = 0;  // block's and warp's epoch of the last write, 0: never
    uint64_t read = 0, read_warp = 0;        // and of the last reads
    uint32_t reader_warps = 0;               // that read in epoch `read`
    int writer = -1, reader = -1;            // reader: -2 when several threads of a warp did
    bool pending = false;                    // an asynchronous copy is on its way
};

struct Copy {
    char* to;
    const char* from;
    int bytes, given;  // zeros after `given`
};

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started = false, done = false, ready = true;
    int block_line = 0, warp_line = 0;  // where it waits, 0: it does not
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

struct Warp {
    int arrived = 0, line = 0, parity = 0;
    uint64_t epoch = 1;
    alignas(16) char slots[2][kWarp][kSlotBytes];
};

struct Free {
    void operator()(char* memory) const { std::free(memory); }
};

struct Machine {
    int64_t block = 0, blocks = 0;
    int threads = 0, thread = 0, arrived = 0, line = 0;
    bool reversed = false;
    uint64_t epoch = 1, first_epoch = 1;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<std::unique_ptr<char[]>> stacks;
    std::unique_ptr<char, Free> memory;
    std::vector<Grain> grains;
    size_t shared_bytes = 0;
    int shared_limit = 227 * 1024;  // what a block of compute capability 9.0 can have
    jmp_buf scheduler;
    std::exception_ptr error;
    const std::function<void()>* work = nullptr;
};

inline Machine& machine() {
    static Machine one;
    return one;
}

[[noreturn]] inline void fail(const std::string& what) {
    const Machine& m = machine();
    throw Error("block " + std::to_string(m.block) + ", thread " + std::to_string(m.thread) + ": " + what);
}

inline Fiber& fiber() {
    return machine().fibers[machine().thread];
}

inline Warp& warp() {
    return machine().warps[machine().thread / kWarp];
}

/// Back to the scheduler until this thread is ready again.
inline void wait() {
    if (_setjmp(fiber().at) == 0) _longjmp(machine().scheduler, 1);
}

inline void run_fiber() {
    Machine& m = machine();
    try {
        (*m.work)();
        if (!fiber().open.empty() || !fiber().groups.empty())
            fail("ends with asynchronous copies on their way");
    } catch (...) {
        m.error = std::current_exception();
    }
    fiber().done = true;
    fiber().ready = false;
    _longjmp(m.scheduler, 1);
}

/// Runs thread `index` until it waits or ends.
inline void resume(int index) {
    Machine& m = machine();
    m.thread = index;
    Fiber& next = m.fibers[index];
    if (_setjmp(m.scheduler) != 0) return;
    if (next.started) _longjmp(next.at, 1);
    next.started = true;
    getcontext(&next.start);
    next.start.uc_stack.ss_sp = m.stacks[index].get();
    next.start.uc_stack.ss_size = kStackBytes;
    next.start.uc_link = nullptr;
    makecontext(&next.start, run_fiber, 0);
    setcontext(&next.start);
}

inline std::string waiting() {
    std::string text;
    for (size_t i = 0; i < machine().fibers.size(); ++i) {
        const Fiber& f = machine().fibers[i];
        const std::string state = f.done ? "ended"
                                  : f.block_line
                                      ? "waits for its block in line " + std::to_string(f.block_line)
                                      : "waits for its warp in line " + std::to_string(f.warp_line);
        if (i == 0 || text.size() < 400) text += "; thread " + std::to_string(i) + " " + state;
    }
    return text;
}

inline void run_block() {
    Machine& m = machine();
    m.first_epoch = ++m.epoch;
    m.arrived = 0;
    m.fibers = std::vector<Fiber>(m.threads);
    m.warps.assign((m.threads + kWarp - 1) / kWarp, Warp{});
    for (Warp& each : m.warps) each.epoch = m.epoch;
    std::memset(m.memory.get(), 0xff, m.shared_bytes);  // not a number in every format
    for (int left = m.threads; left > 0;) {
        bool moved = false;
        for (int i = 0; i < m.threads; ++i) {
            const int index = m.reversed ? m.threads - 1 - i : i;
            if (!m.fibers[index].ready) continue;
            moved = true;
            resume(index);
            if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
            left -= m.fibers[index].done;
        }
        if (!moved)
            throw Error("block " + std::to_string(m.block) + ": its threads wait for ever" + waiting());
    }
}

/// Runs `work` once for every thread of every block.
inline void launch(int64_t blocks, int threads, size_t shared_bytes, const std::function<void()>& work) {
    Machine& m = machine();
    if (shared_bytes > static_cast<size_t>(m.shared_limit))
        throw Error("shared memory of a block: " + std::to_string(shared_bytes));
    if (threads < 1 || threads > 1024 || threads % kWarp)
        throw Error("threads of a block: " + std::to_string(threads));
    m.threads = threads;
    m.blocks = blocks;
    m.shared_bytes = shared_bytes;
    m.work = &work;
    while (m.stacks.size() < static_cast<size_t>(threads)) m.stacks.emplace_back(new char[kStackBytes]);
    const size_t whole = (shared_bytes / kAlignment + 1) * kAlignment;
    m.memory.reset(static_cast<char*>(std::aligned_alloc(kAlignment, whole)));
    m.grains.assign(shared_bytes / kGrain + 1, Grain{});
    for (int64_t i = 0; i < blocks; ++i) {
        m.block = m.reversed ? blocks - 1 - i : i;
        run_block();
    }
}

// ---- What primitives.cuh calls ----------------------------------------------------------------------------

inline void sync_block(int line) {
    Machine& m = machine();
    if (m.arrived > 0 && m.line != line)
        fail("barrier in line " + std::to_string(line) + ", others wait in line " + std::to_string(m.line));
    m.line = line;
    if (++m.arrived < m.threads) {
        fiber().block_line = line;
        fiber().ready = false;
        wait();
        return;
    }
    m.arrived = 0;
    ++m.epoch;
    for (Fiber& each : m.fibers) {
        each.block_line = 0;
        each.ready = true;
    }
}

/// All lanes of the warp bring `bytes` bytes; the result points to kWarp slots of kSlotBytes with them. Only
/// with `orders` do accesses to memory before it come before those after it.
inline const char (*exchange(const void* data, size_t bytes, int line, bool orders = false)) [kSlotBytes] {
    Machine& m = machine();
    Warp& w = warp();
    if (w.arrived > 0 && w.line != line)
        fail("warp operation in line " + std::to_string(line) + ", other lanes are in line " +
             std::to_string(w.line));
    w.line = line;
    const int parity = w.parity, first = m.thread / kWarp * kWarp;
    if (bytes) std::memcpy(w.slots[parity][m.thread % kWarp], data, bytes);
    if (++w.arrived < kWarp) {
        fiber().warp_line = line;
        fiber().ready = false;
        wait();
    } else {
        w.arrived = 0;
        w.parity ^= 1;
        w.epoch += orders;
        for (int i = first; i < first + kWarp; ++i) m.fibers[i].ready = true, m.fibers[i].warp_line = 0;
    }
    return w.slots[parity];
}

inline bool is_shared(const void* address) {
    const char* at = static_cast<const char*>(address);
    return at >= machine().memory.get() && at < machine().memory.get() + machine().shared_bytes;
}

/// Calls work(grain, offset) for every grain of an access, after checking where it lies.
template <typename Visit>
void visit(const void* address, size_t bytes, size_t alignment, const Visit& work) {
    Machine& m = machine();
    const size_t offset = static_cast<const char*>(address) - m.memory.get();
    if (!is_shared(address) || offset + bytes > m.shared_bytes)
        fail("shared memory: access of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
             " of " + std::to_string(m.shared_bytes));
    if (offset % alignment) fail("shared memory: address " + std::to_string(offset) + " is not aligned");
    for (size_t at = offset / kGrain; at < (offset + bytes + kGrain - 1) / kGrain; ++at)
        work(m.grains[at], at * kGrain);
}

[[noreturn]] inline void fail_at(const char* what, size_t offset, const Grain& grain) {
    fail(std::string("shared memory: ") + what + " at byte " + std::to_string(offset) +
         " (written by thread " + std::to_string(grain.writer) + ", read by " + std::to_string(grain.reader) +
         ")");
}

/// Whether an access of another thread, in the given epochs, is not separated from one now.
inline bool unordered(int other, uint64_t epoch, uint64_t warp_epoch) {
    const Machine& m = machine();
    if (other == m.thread || epoch != m.epoch) return false;
    return other / kWarp != m.thread / kWarp || warp_epoch == m.warps[m.thread / kWarp].epoch;
}

inline void note_read(const void* address, size_t bytes, size_t alignment) {
    const Machine& m = machine();
    visit(address, bytes, alignment, [&](Grain& g, size_t offset) {
        if (g.pending) fail_at("read of an asynchronous copy that was not waited for", offset, g);
        if (g.written < m.first_epoch) fail_at("read of uninitialised bytes", offset, g);
        if (unordered(g.writer, g.written, g.written_warp)) fail_at("race of a read with a write", offset, g);
        const uint64_t warp_epoch = m.warps[m.thread / kWarp].epoch;
        if (g.read != m.epoch) g.reader_warps = 0;
        const bool together = g.read == m.epoch && g.read_warp == warp_epoch && g.reader != m.thread &&
                              (g.reader == -2 || g.reader / kWarp == m.thread / kWarp);
        g.reader = together ? -2 : m.thread;
        g.reader_warps |= 1u << (m.thread / kWarp);
        g.read = m.epoch;
        g.read_warp = warp_epoch;
    });
}

inline void note_write(const void* address, size_t bytes, size_t alignment, bool pending = false,
                       bool copy = false) {
    const Machine& m = machine();
    visit(address, bytes, alignment, [&](Grain& g, size_t offset) {
        if (g.pending && !copy) fail_at("write over an asynchronous copy on its way", offset, g);
        if (g.written >= m.first_epoch && unordered(g.writer, g.written, g.written_warp))
            fail_at("race of two writes", offset, g);
        const uint32_t mine = 1u << (m.thread / kWarp);
        if (g.read == m.epoch &&
            ((g.reader_warps & ~mine) ||
             (g.reader_warps && g.reader != m.thread && g.read_warp == m.warps[m.thread / kWarp].epoch)))
            fail_at("race of a write with a read", offset, g);
        g.writer = m.thread;
        g.written = m.epoch;
        g.written_warp = m.warps[m.thread / kWarp].epoch;
        g.pending = pending;
    });
}

/// The bytes arrive when the copy is waited for, and not before.
inline void copy_async(void* to, const void* from, int bytes, int given) {
    note_write(to, bytes, bytes, /*pending=*/true);
    std::memset(to, 0xff, bytes);
    if (given && reinterpret_cast<uintptr_t>(from) % bytes)
        fail("asynchronous copy from an address not aligned");
    fiber().open.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, given});
}

inline void commit_copies() {
    fiber().groups.push_back(std::move(fiber().open));
    fiber().open.clear();
}

inline void wait_copies(size_t left) {
    for (; fiber().groups.size() > left; fiber().groups.pop_front()) {
        for (const Copy& copy : fiber().groups.front()) {
            note_write(copy.to, copy.bytes, copy.bytes, /*pending=*/false, /*copy=*/true);
            if (copy.given) std::memcpy(copy.to, copy.from, copy.given);
            std::memset(copy.to + copy.given, 0, copy.bytes - copy.given);
        }
    }
}

}  // namespace emulation
}  // namespace magnet_fast
