// The emulated device's part of the test module, called through ctypes: its settings, kernels with errors
// that it must find, and the index arithmetic, checked on the host. Texts that are returned live until the
// next call.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/window_index.h"
#include "cuda/primitives.cuh"

namespace magnet_fast {
namespace {

/// A map of numbers, moved about the slow way: each position holds its place in the source, -1 is padding.
struct Map {
    int64_t height, width;
    std::vector<int32_t> at;

    Map(int64_t h, int64_t w) : height(h), width(w), at(h * w, -1) {}
    int32_t& operator()(int64_t y, int64_t x) { return at[y * width + x]; }

    Map padded(int64_t h, int64_t w) {
        Map to(h, w);
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x) to(y, x) = (*this)(y, x);
        return to;
    }
    /// Every number moves up and left by `shift`, round the edge.
    Map rolled(int64_t shift_y, int64_t shift_x) {
        Map to(height, width);
        for (int64_t y = 0; y < height; ++y)
            for (int64_t x = 0; x < width; ++x)
                to(((y - shift_y) % height + height) % height, ((x - shift_x) % width + width) % width) =
                    (*this)(y, x);
        return to;
    }
};

/// Compares every token of a map with the arithmetic of window_index.h; "" or what is wrong.
template <typename Int>
std::string check_map(int64_t height, int64_t width, int64_t window_h, int64_t window_w, int64_t shift_h,
                      int64_t shift_w, bool pad_first) {
    const int64_t padded_h = (height / window_h + (height % window_h != 0)) * window_h;
    const int64_t padded_w = (width / window_w + (width % window_w != 0)) * window_w;
    if (padded_extent<Int>(height, window_h) != padded_h || padded_extent<Int>(width, window_w) != padded_w)
        return "padded_extent";
    Map source(height, width);
    for (size_t i = 0; i < source.at.size(); ++i) source.at[i] = static_cast<int32_t>(i);
    Map moved = pad_first ? source.padded(padded_h, padded_w).rolled(shift_h, shift_w)
                          : source.rolled(shift_h, shift_w).padded(padded_h, padded_w);
    // Regions as Swin paints them: by slices, one after the other.
    Map regions(padded_h, padded_w);
    const int64_t cuts_h[] = {0, padded_h - window_h, padded_h - shift_h, padded_h};
    const int64_t cuts_w[] = {0, padded_w - window_w, padded_w - shift_w, padded_w};
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j)
            for (int64_t y = cuts_h[i]; y < cuts_h[i + 1]; ++y)
                for (int64_t x = cuts_w[j]; x < cuts_w[j + 1]; ++x)
                    regions(y, x) = 3 * (shift_h ? i : 0) + (shift_w ? j : 0);
    for (int64_t y = 0; y < padded_h; ++y)
        for (int64_t x = 0; x < padded_w; ++x) {
            const Int source_y = source_coordinate<Int>(y, height, padded_h, shift_h, pad_first);
            const Int source_x = source_coordinate<Int>(x, width, padded_w, shift_w, pad_first);
            const int64_t found = source_y < 0 || source_x < 0 ? -1 : source_y * width + source_x;
            if (found != moved(y, x)) return "source_coordinate";
            const Int region = 3 * shift_region<Int>(y, padded_h, window_h, shift_h) +
                               shift_region<Int>(x, padded_w, window_w, shift_w);
            if (region != regions(y, x)) return "shift_region";
        }
    return "";
}

/// A kernel of one warp or two with an error, or with none (kNone), that the emulation must find.
enum class Error : int {
    kNone,
    kOutside,
    kUninitialised,
    kMisaligned,
    kRace,
    kWarpRace,
    kNoWait,
    kOverwritten,
    kDivergent,
    kLeft,
    kEndless,
    kCopiesLeft,
    kMisalignedGlobal
};

void faulty_kernel(Error error, const float* source) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    const int i = thread_index();
    if (error != Error::kUninitialised) store_shared(shared + i, 1.0f);
    sync_block();
    const bool race = error == Error::kRace || error == Error::kWarpRace;
    if (race) store_shared(shared + i, 2.0f);
    if (error == Error::kWarpRace) sync_warp();
    load_shared(shared + (i + (error == Error::kWarpRace ? 32 : 1)) % 64);
    if (error == Error::kOutside) load_shared(shared + 512 + i);
    if (error == Error::kMisaligned) load_shared(reinterpret_cast<const Floats2*>(shared + 1));
    if (error == Error::kMisalignedGlobal) load_global(reinterpret_cast<const Floats2*>(source + 1));
    sync_block();
    copy_async(shared + 4 * i, source, 16);
    if (error == Error::kOverwritten) store_shared(shared + 4 * i, 2.0f);
    if (error == Error::kCopiesLeft) return;
    commit_copies();
    copy_async(shared + 256 + 4 * i, source, 0);
    commit_copies();
    wait_copies<1>();
    load_shared(shared + 4 * i + (error == Error::kNoWait ? 256 : 0));
    wait_copies<0>();
    if (error == Error::kLeft && i == 3) return;
    if (error == Error::kEndless && i < 32) shuffle_xor(1.0f, i < 3 ? 1 : 2), sync_block();
    if (error == Error::kDivergent && i == 5)
        sync_block();
    else
        sync_block();
}

/// All maps up to `most` x `most` with windows of `window`, all shifts, both orders; how many.
int64_t check_maps(int64_t most, int64_t window) {
    int64_t count = 0;
    for (int64_t height = 1; height <= most; ++height)
        for (int64_t width = 1; width <= most; ++width)
            for (int64_t shift = 0; shift < window; ++shift)
                for (int pad_first = 0; pad_first < 2; ++pad_first, ++count) {
                    // Both axes take every shift: the other one runs the other way round.
                    const int64_t other = shift == 0 ? 0 : window - shift;
                    const std::string wrong =
                        count % 2
                            ? check_map<int32_t>(height, width, window, window, shift, other, pad_first)
                            : check_map<int64_t>(height, width, window, window, shift, other, pad_first);
                    if (!wrong.empty())
                        throw std::runtime_error(
                            wrong + ": map " + std::to_string(height) + " x " + std::to_string(width) +
                            ", window " + std::to_string(window) + ", shifts " + std::to_string(shift) +
                            " and " + std::to_string(other) + ", pad_first " + std::to_string(pad_first));
                }
    return count;
}

std::string text;

template <typename Work>
const char* caught(const Work& work) {
    text.clear();
    try {
        work();
    } catch (const std::exception& error) {
        text = error.what();
    }
    return text.c_str();
}

}  // namespace
}  // namespace magnet_fast

#define EXPORTED extern "C" __attribute__((visibility("default")))

/// Runs blocks and threads from the last to the first.
EXPORTED void set_reversed(int reversed) {
    magnet_fast::emulation::machine().reversed = reversed;
}

/// What the device offers a block, in bytes.
EXPORTED void set_shared_limit(int bytes) {
    magnet_fast::emulation::machine().shared_limit = bytes;
}

/// What the emulation says of a kernel with an error; "" when it finds none.
EXPORTED const char* run_faulty(int error) {
    alignas(16) const float source[4] = {};
    return magnet_fast::caught([&] {
        magnet_fast::emulation::launch(
            1, 64, 2048, [&] { magnet_fast::faulty_kernel(static_cast<magnet_fast::Error>(error), source); });
    });
}

/// The first difference in all maps up to `most` x `most` with windows of `window`, or "".
EXPORTED const char* check_maps(int64_t most, int64_t window, int64_t* count) {
    return magnet_fast::caught([&] { *count = magnet_fast::check_maps(most, window); });
}

EXPORTED int64_t source_coordinate(int64_t shifted, int64_t extent, int64_t padded, int64_t shift,
                                   int pad_first) {
    return magnet_fast::source_coordinate<int64_t>(shifted, extent, padded, shift, pad_first);
}

EXPORTED int64_t shift_region(int64_t shifted, int64_t padded, int64_t window, int64_t shift) {
    return magnet_fast::shift_region<int64_t>(shifted, padded, window, shift);
}

EXPORTED int64_t bias_row(int64_t query_y, int64_t query_x, int64_t key_y, int64_t key_x, int64_t window_h,
                          int64_t window_w) {
    return magnet_fast::bias_row<int64_t>(query_y, query_x, key_y, key_x, window_h, window_w);
}
