// What relative attention is told beside its tensors.
#pragma once

#include <cstdint>

namespace magnet_fast {

/// magnet_fast.ops._relative_attention.RelativeSettings, in its order.
struct RelativeSettings {
    int64_t heads;
    int64_t window_h, window_w;  // the map's sides where the whole map is one window
    double scale;                // above 0; multiplies q k^T alone
};

}  // namespace magnet_fast
