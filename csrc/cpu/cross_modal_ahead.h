// Fetching ahead: rows of an image tensor lie far apart, so that the processor's own prefetching does not
// find them. A product fetches what is read after it, spread over the steps of its inner loop; issued all at
// once the fetches would only be waited for.
#pragma once

#include "cpu/cross_modal_kernel.h"
#include "cpu/simd_matrix.h"

namespace magnet_fast {
namespace MAGNET_FAST_SIMD_LEVEL {

/// Cache lines to fetch: `rows` rows of `lines` lines each, `burst` lines at every step.
class Ahead {
  public:
    Ahead() = default;

    template <typename Element>
    Ahead(Rows<Element> image, int64_t rows, int64_t width)
        : row_(reinterpret_cast<const char*>(image.data)),
          stride_(image.stride * static_cast<int64_t>(sizeof(Element))),
          lines_((width * static_cast<int64_t>(sizeof(Element)) + 63) / 64),
          left_(image.data ? rows * lines_ : 0) {}

    /// Spreads the lines over about this many steps.
    void spread(int64_t steps) { burst_ = left_ > 0 ? (left_ + steps - 1) / steps : 0; }

    void step() {
        for (int64_t i = 0; i < burst_ && left_ > 0; ++i, --left_) {
            __builtin_prefetch(row_ + 64 * line_, 0, 2);
            if (++line_ == lines_) {
                line_ = 0;
                row_ += stride_;
            }
        }
    }

  private:
    const char* row_ = nullptr;
    int64_t stride_ = 0, lines_ = 1, left_ = 0, line_ = 0, burst_ = 0;
};

/// Steps of all tiles of one panel of columns.
static inline int64_t product_steps(int64_t rows, int64_t vectors, int64_t depth) {
    return (rows + kTileRows[vectors] - 1) / kTileRows[vectors] * depth;
}

}  // namespace MAGNET_FAST_SIMD_LEVEL
}  // namespace magnet_fast
