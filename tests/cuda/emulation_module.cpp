// The emulated device's part of the test module: its settings, and the index arithmetic, checked on the host.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/window_index.h"
#include "cuda/host_emulation.h"

namespace py = pybind11;
using py::literals::operator""_a;

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
                        count % 2 ? check_map<int32_t>(height, width, window, window, shift, other, pad_first)
                                  : check_map<int64_t>(height, width, window, window, shift, other, pad_first);
                    if (!wrong.empty())
                        throw std::runtime_error(wrong + ": map " + std::to_string(height) + " x " +
                                                 std::to_string(width) + ", window " + std::to_string(window) +
                                                 ", shifts " + std::to_string(shift) + " and " +
                                                 std::to_string(other) + ", pad_first " + std::to_string(pad_first));
                }
    return count;
}

}  // namespace

void bind_emulation(py::module_& m) {
    m.def("set_reversed", &emulation::set_reversed, "reversed"_a);
    m.def("set_shared_limit", &emulation::set_shared_limit, "bytes"_a);
    m.def("check_maps", &check_maps, "most"_a, "window"_a);
    m.def("source_coordinate", &source_coordinate<int64_t>);
    m.def("shift_region", &shift_region<int64_t>);
    m.def("bias_row", &bias_row<int64_t>);
}

}  // namespace magnet_fast
