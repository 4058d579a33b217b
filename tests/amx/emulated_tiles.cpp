// The operators at levels whose instructions the processor may lack, on software models of these, and the
// model of the tile registers itself, for tests: it stands in place of the intrinsics with
// MAGNET_FAST_EMULATE_AMX, else in place of the instructions. Which kernels are linked says conftest.py.
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "cpu/cross_modal_attention.h"
#include "cpu/cross_modal_kernel.h"
#include "cpu/deformable_attention.h"
#include "cpu/deformable_kernel.h"
#include "cpu/linear_chain.h"
#include "cpu/linear_chain_kernel.h"
#include "cpu/relative_attention.h"
#include "cpu/relative_kernel.h"
#include "cpu/simd_matrix.h"
#include "cpu/tile_emulation.h"
#include "cpu/window_attention.h"
#include "cpu/window_kernel.h"
#if !defined(MAGNET_FAST_EMULATE_AMX)
#include "trapped_instructions.h"
#endif

namespace magnet_fast {

static SimdLevel selected = SimdLevel::kAmx;

SimdLevel selected_simd_level() {
    return selected;
}

#define ABSENT_(level, Element, Table, function)             \
    template <>                                              \
    const Table<Element>& level::function<Element>() {       \
        throw std::logic_error(#level " is not built here"); \
    }
#define ABSENT(Table, function)                  \
    ABSENT_(portable, float, Table, function)    \
    ABSENT_(portable, BFloat16, Table, function) \
    ABSENT_(portable, Float16, Table, function)  \
    ABSENT_(float64, double, Table, function)    \
    ABSENT_(avx512_bf16, float, Table, function) \
    ABSENT_(avx512_bf16, Float16, Table, function)
#define ABSENT_AVX512(Table, function)         \
    ABSENT_(avx512, float, Table, function)    \
    ABSENT_(avx512, BFloat16, Table, function) \
    ABSENT_(avx512, Float16, Table, function)
ABSENT(RelativeKernels, relative_kernels)
ABSENT(WindowKernels, window_kernels)
ABSENT(CrossModalKernels, cross_modal_kernels)
ABSENT(CrossModalBackwardKernels, cross_modal_backward_kernels)
ABSENT(DeformableKernels, deformable_kernels)
ABSENT(ChainKernels, chain_kernels)
ABSENT_(amx, BFloat16, DeformableKernels, deformable_kernels)
ABSENT_AVX512(DeformableKernels, deformable_kernels)
ABSENT_AVX512(ChainKernels, chain_kernels)
ABSENT_AVX512(WindowKernels, window_kernels)
ABSENT_AVX512(CrossModalKernels, cross_modal_kernels)
ABSENT_AVX512(CrossModalBackwardKernels, cross_modal_backward_kernels)

namespace {

/// Takes numbers and addresses from an array, in order.
struct Reader {
    const int64_t* at;

    int64_t number() { return *at++; }
    template <typename T>
    T* pointer() {
        return reinterpret_cast<T*>(number());
    }
    TensorView view() {
        TensorView view;
        view.dimensions = static_cast<int>(number());
        if (!view.given()) return view;
        view.data = pointer<void>();
        view.dtype = static_cast<Dtype>(number());
        for (int i = 0; i < view.dimensions; ++i) view.sizes[i] = number();
        for (int i = 0; i < view.dimensions; ++i) view.strides[i] = number();
        return view;
    }
    WindowAttentionInputs window(double scale) {
        return {view(),
                view(),
                view(),
                {number(), number(), number(), number(), number(), scale, number() != 0},
                number()};
    }
    RelativeAttentionInputs relative(double scale) {
        return {view(), view(), view(), view(), {number(), number(), number(), scale}, number()};
    }
    DeformableViews deformable() {
        DeformableViews views{view(), view(), view(), view(), {}};
        for (int64_t maps = number(); maps > 0; --maps) {
            const int64_t height = number();
            views.maps.push_back({height, number()});
        }
        return views;
    }
    ChainNorm<BFloat16> norm() {
        const auto* weight = pointer<const BFloat16>();
        const auto* bias = pointer<const BFloat16>();
        const int64_t bits = number();
        double epsilon;
        std::memcpy(&epsilon, &bits, sizeof epsilon);
        return {weight, bias, epsilon};
    }
    ChainLayer<BFloat16> layer() {
        const int64_t in = number(), out = number();
        const void* weight = pointer<const void>();
        const auto* bias = pointer<const BFloat16>();
        const auto activation = static_cast<ChainActivation>(number());
        const int64_t residual = number();
        const ChainNorm<BFloat16> before = norm();
        return {in, out, weight, bias, activation, residual, before, norm()};
    }
    CrossModalTensors tensors() { return {view(), view(), view(), view(), view(), view()}; }
    CrossModalViews cross_modal(double scale) { return {tensors(), view(), number(), scale}; }
};

/// Null, or what went wrong.
template <typename Call>
const char* report(const Call& call) {
    static std::string message;
    try {
#if defined(MAGNET_FAST_EMULATE_AMX)
        call();
#else
        const trapped::Trap trap;
        call();
        trap.check();
#endif
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace
}  // namespace magnet_fast

using namespace magnet_fast;

#pragma GCC visibility push(default)
extern "C" {

/// By the number in SimdLevel.
void set_level(int level) {
    selected = static_cast<SimdLevel>(level);
}

const char* window_attention_forward_(const int64_t* numbers, double scale) {
    return report([&] {
        Reader r{numbers};
        const WindowAttentionInputs inputs = r.window(scale);
        window_attention_forward(inputs, r.view());
    });
}

const char* window_attention_backward_(const int64_t* numbers, double scale) {
    return report([&] {
        Reader r{numbers};
        const WindowAttentionInputs inputs = r.window(scale);
        const TensorView grad_out = r.view(), grad_qkv = r.view(), grad_bias = r.view();
        window_attention_backward(inputs, grad_out, grad_qkv, grad_bias, r.view());
    });
}

const char* relative_attention_forward_(const int64_t* numbers, double scale) {
    return report([&] {
        Reader r{numbers};
        const RelativeAttentionInputs inputs = r.relative(scale);
        relative_attention_forward(inputs, r.view());
    });
}

const char* relative_attention_backward_(const int64_t* numbers, double scale) {
    return report([&] {
        Reader r{numbers};
        const RelativeAttentionInputs inputs = r.relative(scale);
        const TensorView grad_out = r.view();
        relative_attention_backward(inputs, grad_out, {r.view(), r.view(), r.view(), r.view()});
    });
}

const char* deformable_attention_forward_(const int64_t* numbers, double) {
    return report([&] {
        Reader r{numbers};
        const DeformableViews views = r.deformable();
        const int64_t threads = r.number();
        deformable_attention_forward(views, r.view(), threads);
    });
}

const char* deformable_attention_backward_(const int64_t* numbers, double) {
    return report([&] {
        Reader r{numbers};
        const DeformableViews views = r.deformable();
        const int64_t threads = r.number();
        const TensorView grad_out = r.view();
        deformable_attention_backward(views, grad_out, {r.view(), r.view(), r.view(), r.view()}, threads);
    });
}

const char* cross_modal_attention_forward_(const int64_t* numbers, double scale) {
    return report([&] {
        Reader r{numbers};
        const CrossModalViews views = r.cross_modal(scale);
        const int64_t threads = r.number();
        const TensorView image_out = r.view();
        cross_modal_attention_forward(views, image_out, r.view(), threads);
    });
}

const char* cross_modal_attention_backward_(const int64_t* numbers, double scale) {
    return report([&] {
        Reader r{numbers};
        const CrossModalViews views = r.cross_modal(scale);
        const int64_t threads = r.number();
        const TensorView grad_image = r.view(), grad_text = r.view();
        cross_modal_attention_backward(views, grad_image, grad_text, r.tensors(), threads);
    });
}

int64_t linear_chain_packed_bytes_(int64_t in, int64_t out) {
    return chain_packed_bytes<BFloat16>(in, out);
}

void linear_chain_pack_(const void* weight, int64_t in, int64_t out, void* packed) {
    pack_chain_weight(static_cast<const BFloat16*>(weight), in, out, packed);
}

const char* linear_chain_forward_(const int64_t* numbers, double) {
    return report([&] {
        Reader r{numbers};
        const TensorView x = r.view(), residual = r.view(), y = r.view();
        const int64_t threads = r.number();
        LinearChain<BFloat16> chain{x.sizes[0],
                                    threads,
                                    static_cast<const BFloat16*>(x.data),
                                    x.strides[0],
                                    static_cast<const BFloat16*>(residual.data),
                                    residual.strides[0],
                                    static_cast<BFloat16*>(y.data),
                                    {}};
        for (int64_t layers = r.number(); layers > 0; --layers) chain.layers.push_back(r.layer());
        linear_chain(chain);
    });
}

/// multiply() of simd_matrix.h: rows, columns, depth, a, a_row, a_depth, b, b_depth, init, init_row, c,
/// c_row, top.
const char* multiply_pairs(const int64_t* numbers) {
    return report([&] {
        Reader r{numbers};
        const int64_t rows = r.number(), columns = r.number(), depth = r.number();
        const auto* a = r.pointer<const amx::Pair>();
        const int64_t a_row = r.number(), a_depth = r.number();
        const auto* b = r.pointer<const amx::Pair>();
        const int64_t b_depth = r.number();
        const auto* init = r.pointer<const float>();
        const int64_t init_row = r.number();
        auto* c = r.pointer<float>();
        const int64_t c_row = r.number();
        amx::Vec top[64];
        float* highest = r.pointer<float>();
        amx::multiply(rows, columns, depth, a, a_row, a_depth, b, b_depth, init, init_row, c, c_row,
                      highest ? top : nullptr);
        for (int64_t m = 0; highest && m < rows; ++m) highest[m] = amx::reduce_max(top[m]);
    });
}

const char* loadconfig(const void* memory) {
    return report([&] { tile_emulation::loadconfig(memory); });
}
const char* loadd(int tile, const void* memory, int64_t stride) {
    return report([&] { tile_emulation::loadd(tile, memory, stride); });
}
const char* stored(int tile, void* memory, int64_t stride) {
    return report([&] { tile_emulation::stored(tile, memory, stride); });
}
const char* zero(int tile) {
    return report([&] { tile_emulation::zero(tile); });
}
const char* dpbf16ps(int sums, int a, int b) {
    return report([&] { tile_emulation::dpbf16ps(sums, a, b); });
}
const char* release() {
    return report([] { tile_emulation::release(); });
}
int configured() {
    return tile_emulation::registers().configured;
}
/// Products of tiles since the last call.
int64_t products() {
    const int64_t count = tile_emulation::registers().products;
    tile_emulation::registers().products = 0;
    return count;
}
}
