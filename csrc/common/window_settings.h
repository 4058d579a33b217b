// What window attention is told beside its tensors.
#pragma once

#include <cstdint>

namespace magnet_fast {

/// magnet_fast.ops._window_settings.WindowSettings, in its order.
struct WindowSettings {
    int64_t heads;
    int64_t window_h, window_w;
    int64_t shift_h, shift_w;  // 0 <= shift < window
    double scale;              // above 0; multiplies q k^T before the bias is added
    bool pad_first;            // true: pad, then roll; false: roll, then pad (see common/window_index.h)
};

}  // namespace magnet_fast
