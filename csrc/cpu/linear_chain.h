// Linear layers one after the other, with the norms, activations and sums around them, a few rows at a time:
// what lies between two layers never leaves the processor's caches. For inference; the weights are packed
// beforehand.
#pragma once

#include <cstdint>
#include <vector>

#include "common/elements.h"
#include "cpu/linear_chain_kernel.h"

namespace magnet_fast {

template <typename Element>
struct ChainNorm {
    const Element* weight;  // as wide as what is normalised; null: ones
    const Element* bias;    // null: zeros
    double epsilon;         // at least 0; negative: no norm here
};

/// Where a layer's residual comes from: the output of an earlier layer has that layer's index.
constexpr int64_t kNoResidual = -2, kGivenResidual = -1;

/// after(activation(before(x) W^T + bias)), or after(before(x) W^T + bias + residual)
template <typename Element>
struct ChainLayer {
    int64_t in, out;             // multiples of ChainKernels::step
    const void* weight;          // packed by pack_chain_weight
    const Element* bias;         // (out); null: zeros
    ChainActivation activation;  // kNone where there is a residual
    int64_t residual;            // kNoResidual, kGivenResidual, or an earlier layer that has `out` outputs
    ChainNorm<Element> before, after;
};

template <typename Element>
struct LinearChain {
    int64_t rows, threads;    // the result does not depend on the threads, not in a single bit
    const Element* x;         // (rows, in of the first layer); 16-bit elements: at a multiple of 4 bytes
    int64_t x_row;            // elements from a row to the next; even for 16-bit elements
    const Element* residual;  // (rows, out of the layer that wants it); null: none
    int64_t residual_row;
    Element* y;  // (rows, out of the last layer), contiguous, written; not x and not residual
    std::vector<ChainLayer<Element>> layers;
};

/// What all layers' inputs and outputs must be multiples of, at the SIMD level in use.
template <typename Element>
int64_t chain_step();

/// Bytes of a packed weight; std::invalid_argument for sizes that no layer can have.
template <typename Element>
int64_t chain_packed_bytes(int64_t in, int64_t out);

/// weight (out, in), contiguous, to `packed`, 64-byte aligned. It holds for the SIMD level in use only.
template <typename Element>
void pack_chain_weight(const Element* weight, int64_t in, int64_t out, void* packed);

/// std::invalid_argument, naming the argument, before anything is written.
template <typename Element>
void linear_chain(const LinearChain<Element>& arguments);

}  // namespace magnet_fast
