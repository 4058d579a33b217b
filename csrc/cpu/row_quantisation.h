// What stands around the int8 product of a Linear: x W^T with x = minimum + scale * bytes for each row, so
// that x W^T = scale * (bytes W^T) + minimum * totals, where totals are the sums of W's rows.
#pragma once

#include <cstdint>

#include "cpu/row_quantisation_kernel.h"

namespace magnet_fast {

template <typename Element>
struct RowsToBytes {
    int64_t rows, width, threads;
    const Element* x;  // (rows, width)
    int64_t x_row;     // elements from a row to the next
    int64_t most;      // bytes are 0 .. most, at most 255
    uint8_t* bytes;    // (rows, width), written
    float* scale;      // (rows), written; NaN where a row holds NaN or an infinity
    float* minimum;    // (rows), written
};

template <typename Element>
struct SumsToRows {
    int64_t rows, width, threads;
    const float* sums;     // (rows, width): bytes W^T
    const float* scale;    // (rows)
    const float* minimum;  // (rows)
    const float* totals;   // (width)
    const Element* bias;   // (width); null: zeros
    ChainActivation activation;
    const Element* residual;  // (rows, width), in place of an activation; null: none
    int64_t residual_row;
    Element* y;  // (rows, width), written; sums themselves where they are of y's type
};

/// Both: std::invalid_argument, naming the argument, before anything is written. The result does not depend
/// on the threads.
template <typename Element>
void rows_to_bytes(const RowsToBytes<Element>& arguments);
template <typename Element>
void sums_to_rows(const SumsToRows<Element>& arguments);

}  // namespace magnet_fast
