// The vectorised inner kernels of a chain of Linear layers: one layer, or one LayerNorm, of a few rows.
//
// A weight is packed once, into panels of up to kPanelVectors vectors of outputs: [panel][depth][output], a
// depth being one input, or two that one instruction multiplies (bfloat16 from level avx512_bf16 on).
#pragma once

#include <cstdint>

#include "common/elements.h"
#include "cpu/simd_level.h"

namespace magnet_fast {

enum class ChainActivation : int { kNone = 0, kGelu = 1, kRelu = 2 };

/// y = activation(x W^T + bias), or x W^T + bias + residual, of some of the layer's panels.
template <typename Element>
struct ChainProduct {
    int64_t rows, in, out;
    const Element* x;  // (rows, in); bfloat16 at an address, and with x_row, of whole pairs
    int64_t x_row;
    const void* weight;          // packed
    const Element* bias;         // (out); null: zeros
    ChainActivation activation;  // kNone where there is a residual
    const Element* residual;     // (rows, out); null: none
    int64_t residual_row;
    Element* y;  // (rows, out)
    int64_t y_row;
    int64_t first_panel, last_panel;  // panels first_panel .. last_panel - 1
    void* scratch;                    // scratch_bytes(rows, in) bytes, 64-byte aligned
};

/// One SIMD level's implementation.
template <typename Element>
struct ChainKernels {
    using Real = typename Computed<Element>::Real;
    int64_t panel;  // outputs of a panel; the last one may have fewer
    int64_t step;   // what a layer's inputs and outputs must be multiples of
    /// Rows that go through the chain together, of layers of at most `widest` inputs.
    int64_t (*chunk)(int64_t widest);
    int64_t (*packed_bytes)(int64_t in, int64_t out);
    /// weight (out, in), contiguous; packed: packed_bytes(in, out) bytes, 64-byte aligned, written.
    void (*pack)(const Element* weight, int64_t in, int64_t out, void* packed);
    int64_t (*scratch_bytes)(int64_t rows, int64_t in);
    void (*product)(const ChainProduct<Element>&);
    /// LayerNorm of (rows, width), weight and bias (width) or null; y may be x.
    void (*norm)(int64_t rows, int64_t width, const Element* x, int64_t x_row, const Element* weight,
                 const Element* bias, Real epsilon, Element* y, int64_t y_row);
};

MAGNET_FAST_DECLARE_KERNELS(ChainKernels, chain_kernels)

}  // namespace magnet_fast
