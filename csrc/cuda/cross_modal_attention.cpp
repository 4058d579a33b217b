// Cross-modal attention's launchers: checks, the workspace, and the order of the kernels.
#include "cuda/cross_modal_attention.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace magnet_fast {
namespace cuda {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

int64_t whole(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

void check_sizes(const CrossModalSizes& s) {
    constexpr int64_t kMost = int64_t{1} << 30;  // kernels count pixels and channels in 32 bits
    const std::pair<const char*, int64_t> sizes[] = {
        {"batch", s.batch}, {"pixels", s.pixels}, {"heads", s.heads}};
    for (const auto& [name, size] : sizes) require(size < kMost, name, "1 .. 2^30 - 1", size);
    require(s.words <= kMostWords, "words", "1 .. " + std::to_string(kMostWords), s.words);
    for (const int64_t width : {s.width, s.text_value_width, s.image_value_width})
        require(width / s.heads <= kMostCrossModalHeadDim, "heads",
                "heads of at most " + std::to_string(kMostCrossModalHeadDim) + " channels", width / s.heads);
    const int64_t most = std::numeric_limits<int64_t>::max() / 1024;
    const int64_t widest = std::max({s.width, s.text_value_width, s.image_value_width, s.heads * kMostWords});
    require(s.pixels <= most / widest / s.batch, "batch", "batch * pixels * width numbers to be addressable",
            s.batch);
}

RowTensor rows_of(const TensorView& view) {
    return {view.data, view.strides[0], view.strides[1]};
}

/// The call's tensors, checked.
CrossModalInputs checked_inputs(const CrossModalViews& views, Float32Products products) {
    const CrossModalTensors& t = views.tensors;
    check_kernel_dtype(t.image_query.given() ? t.image_query : t.image_key,
                       t.image_query.given() ? "image_query" : "image_key");
    const CrossModalSizes sizes{checked_shape(views), views.scale, products};
    check_sizes(sizes);
    return {sizes,
            rows_of(t.image_query),
            rows_of(t.text_key),
            rows_of(t.text_value),
            rows_of(t.text_query),
            rows_of(t.image_key),
            rows_of(t.image_value),
            static_cast<const uint8_t*>(views.text_mask.data)};
}

/// Shares of the pixels: enough blocks of one call of gather to fill the device twice.
int64_t splits_of(const CrossModalSizes& s, int64_t width, const Device& device) {
    const int64_t blocks = s.batch * s.heads * whole(width / s.heads, kChunk);
    return std::clamp<int64_t>(whole(4 * static_cast<int64_t>(device.multiprocessors), blocks), 1,
                               whole(s.pixels, kTilePixels));
}

/// Pieces of the workspace, in numbers of float32.
struct Workspace {
    int64_t matrix, row_log, columns, column_parts, parts;
    explicit Workspace(const CrossModalSizes& s, const Device& device) {
        const int64_t rows = s.batch * s.heads, words = whole(s.words, 16) * 16;
        matrix = rows * s.pixels * words;
        row_log = whole(rows * s.pixels, 4) * 4;
        columns = rows * words;
        column_parts = rows * whole(s.pixels, kTilePixels) * words * 2;
        parts = 0;
        for (const int64_t width : {s.width, s.text_value_width, s.image_value_width})
            if (width > 0)
                parts = std::max(parts, splits_of(s, width, device) * rows * words * (width / s.heads));
    }
    /// Two similarities and two gradients; row_log; column_log and column_sums.
    int64_t bytes() const { return (4 * matrix + row_log + 2 * columns + column_parts + parts) * 4; }
};

CrossModalKernel chosen(Dtype dtype, CrossModalKernel (*bfloat16)(), CrossModalKernel (*float16)(),
                        CrossModalKernel (*float32)()) {
    return dtype == Dtype::kBFloat16 ? bfloat16() : dtype == Dtype::kFloat16 ? float16() : float32();
}
#define MAGNET_FAST_CHOSEN(name)                                                          \
    chosen(dtype_, &CrossModalKernels<BFloat16>::name, &CrossModalKernels<Float16>::name, \
           &CrossModalKernels<float>::name)

/// A call's device, workspace and common parameters, and its steps.
class Call {
  public:
    Call(const CrossModalInputs& in, const Place& place, const TensorView& workspace)
        : in_(in),
          dtype_(in.sizes.dtype),
          bytes_(static_cast<int>(bytes_of(in.sizes.dtype))),
          device_(place),
          sizes_(in.sizes, device_) {
        check_workspace(workspace, sizes_.bytes(), "cross_modal_attention_workspace");
        float* at = static_cast<float*>(workspace.data);
        const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
        for (float** matrix : {&similarity[0], &similarity[1], &slopes[0], &slopes[1]})
            *matrix = take(sizes_.matrix);
        base_.row_log = take(sizes_.row_log);
        base_.column_log = take(sizes_.columns);
        base_.column_sums = take(sizes_.columns);
        base_.column_parts = take(sizes_.column_parts);
        base_.parts = take(sizes_.parts);
        const CrossModalSizes& s = in.sizes;
        base_.rows = s.batch * s.heads;
        base_.heads = static_cast<int32_t>(s.heads);
        base_.pixels = static_cast<int32_t>(s.pixels);
        base_.words = static_cast<int32_t>(s.words);
        base_.padded_words = static_cast<int32_t>(whole(s.words, 16) * 16);
        base_.tiles = static_cast<int32_t>(whole(s.pixels, kTilePixels));
        base_.products = s.products;
        base_.mask = in.text_mask;
    }

    float *similarity[2], *slopes[2];  // of the image's attention and the text's

    /// to = factor * image . text, with the softmax's sums over words or pixels.
    void scores(const RowTensor& image, const RowTensor& text, int64_t width, double factor, float* to,
                bool row_log, bool columns) {
        CrossModalParams p = product(image, text, width, factor);
        p.scores = to;
        if (!row_log) p.row_log = nullptr;
        if (!columns) p.column_parts = nullptr;
        device_.start(MAGNET_FAST_CHOSEN(scores), p.rows * p.tiles, kCrossModalThreads,
                      cross_modal_shared(2, 2, p.padded_words, bytes_), p);
        if (columns)
            device_.start(cross_modal_columns(), whole(p.rows * p.padded_words, kCrossModalThreads),
                          kCrossModalThreads, 0, p);
    }

    /// out (batch, pixels, width) = factor * weights text.
    void spread(const float* matrix, Weights weights, const RowTensor& text, int64_t width, double factor,
                void* out) {
        CrossModalParams p = product({}, text, width, factor);
        p.scores = const_cast<float*>(matrix);
        p.weights = weights;
        set_out(p, out);
        device_.start(MAGNET_FAST_CHOSEN(spread), p.rows * p.tiles, kCrossModalThreads,
                      cross_modal_shared(1, 2, p.padded_words, bytes_), p);
    }

    /// out (batch, words, width) = factor * weights image.
    void gather(const float* matrix, Weights weights, const RowTensor& image, int64_t width, double factor,
                void* out) {
        CrossModalParams p = product(image, {}, width, factor);
        p.scores = const_cast<float*>(matrix);
        p.weights = weights;
        p.splits = static_cast<int32_t>(splits_of(in_.sizes, width, device_));
        p.out = out;
        device_.start(MAGNET_FAST_CHOSEN(gather), p.rows * whole(p.width, kChunk) * p.splits,
                      kCrossModalThreads, cross_modal_shared(3, 0, p.padded_words, bytes_), p);
        const int64_t numbers = in_.sizes.batch * in_.sizes.words * width;
        device_.start(MAGNET_FAST_CHOSEN(merge), whole(numbers, kCrossModalThreads), kCrossModalThreads, 0,
                      p);
    }

    /// slopes[0], the gradients of the image's weights, become those of its similarities.
    void image_gradient() {
        CrossModalParams p = base_;
        p.scores = similarity[0];
        p.slopes = slopes[0];
        device_.start(cross_modal_image_gradient(), whole(p.rows * p.pixels * 32, kCrossModalThreads),
                      kCrossModalThreads, 0, p);
    }

    /// slopes[1] likewise of the text's; or added to slopes[0].
    void text_gradient(const float* scores, bool add) {
        CrossModalParams p = base_;
        p.scores = const_cast<float*>(scores);
        p.slopes = slopes[1];
        p.add = add;
        p.out = slopes[0];
        // Whole warps, and a thread for every word of as many pixels as fit.
        const int threads = p.padded_words * (p.padded_words == 48 ? 4 : 4 * kMostWords / p.padded_words);
        device_.start(cross_modal_text_parts(), p.rows * p.tiles, threads, threads * 4, p);
        device_.start(cross_modal_text_sums(), whole(p.rows * p.padded_words, kCrossModalThreads),
                      kCrossModalThreads, 0, p);
        device_.start(cross_modal_text_gradient(), p.rows * p.tiles, threads, 0, p);
    }

  private:
    CrossModalParams product(const RowTensor& image, const RowTensor& text, int64_t width,
                             double factor) const {
        CrossModalParams p = base_;
        p.image = image;
        p.text = text;
        p.width = static_cast<int32_t>(width / p.heads);
        p.factor = static_cast<float>(factor);
        p.aligned_in = p.width * bytes_ % 16 == 0;
        for (const RowTensor& tensor : {image, text})
            p.aligned_in = p.aligned_in && reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 &&
                           tensor.batch * bytes_ % 16 == 0 && tensor.row * bytes_ % 16 == 0;
        return p;
    }
    void set_out(CrossModalParams& p, void* out) const {
        p.out = out;
        p.aligned_out = reinterpret_cast<uintptr_t>(out) % 16 == 0 && p.width * bytes_ % 16 == 0;
    }

    const CrossModalInputs& in_;
    Dtype dtype_;
    int bytes_;
    Device device_;
    Workspace sizes_;
    CrossModalParams base_{};
};

}  // namespace

int64_t cross_modal_attention_workspace(const CrossModalViews& views, const Place& place) {
    return Workspace(checked_inputs(views, Float32Products::kExact).sizes, Device(place)).bytes();
}

void cross_modal_attention_forward(const CrossModalViews& views, Float32Products products, const Place& place,
                                   const TensorView& image_out, const TensorView& text_out,
                                   const TensorView& workspace) {
    const CrossModalInputs in = checked_inputs(views, products);
    const CrossModalSizes& s = in.sizes;
    check_result(image_out, "image_out", views.tensors.text_value, s.batch, s.pixels);
    check_result(text_out, "text_out", views.tensors.image_value, s.batch, s.words);
    const bool image = in.text_value.data, text = in.image_value.data, separate = in.text_query.data;

    Call call(in, place, workspace);
    if (in.image_query.data)
        call.scores(in.image_query, in.text_key, s.width, s.scale * kLog2E, call.similarity[0], image,
                    text && !separate);
    if (image)
        call.spread(call.similarity[0], Weights::kImage, in.text_value, s.text_value_width, 1.0,
                    image_out.data);
    if (!text) return;
    if (separate)
        call.scores(in.image_key, in.text_query, s.width, s.scale * kLog2E, call.similarity[1], false, true);
    call.gather(call.similarity[separate], Weights::kText, in.image_value, s.image_value_width, 1.0,
                text_out.data);
}

void cross_modal_attention_backward(const CrossModalViews& views, Float32Products products,
                                    const Place& place, const TensorView& image_gradient,
                                    const TensorView& text_gradient, const CrossModalTensors& gradients,
                                    const TensorView& workspace) {
    const CrossModalInputs in = checked_inputs(views, products);
    const CrossModalSizes& s = in.sizes;
    check_gradients(views.tensors, s, image_gradient, text_gradient, gradients);
    const RowTensor grad_image_out = rows_of(image_gradient), grad_text_out = rows_of(text_gradient);
    const CrossModalGradients wanted{gradients.image_query.data, gradients.text_key.data,
                                     gradients.text_value.data,  gradients.text_query.data,
                                     gradients.image_key.data,   gradients.image_value.data};
    const bool image = grad_image_out.data, text = grad_text_out.data, separate = in.text_query.data;
    const bool scored = in.image_query.data && (image || (text && !separate));

    Call call(in, place, workspace);
    float* const text_scores = call.similarity[separate];
    if (scored)
        call.scores(in.image_query, in.text_key, s.width, s.scale * kLog2E, call.similarity[0], image,
                    text && !separate);
    if (text && separate)
        call.scores(in.image_key, in.text_query, s.width, s.scale * kLog2E, call.similarity[1], false, true);
    // Values first: their gradients need the weights alone.
    if (wanted.text_value)
        call.gather(call.similarity[0], Weights::kImage, grad_image_out, s.text_value_width, 1.0,
                    wanted.text_value);
    if (wanted.image_value)
        call.spread(text_scores, Weights::kText, grad_text_out, s.image_value_width, 1.0, wanted.image_value);

    const bool from_image = image && (wanted.image_query || wanted.text_key);
    const bool from_text =
        text && (separate ? wanted.text_query || wanted.image_key : wanted.image_query || wanted.text_key);
    if (from_image) {
        call.scores(grad_image_out, in.text_value, s.text_value_width, 1.0, call.slopes[0], false, false);
        call.image_gradient();
    }
    if (from_text) {
        call.scores(in.image_value, grad_text_out, s.image_value_width, 1.0, call.slopes[1], false, false);
        call.text_gradient(text_scores, /*add=*/!separate && from_image);
    }
    const float* gradient = from_image ? call.slopes[0] : call.slopes[1];  // of the shared similarity
    if (wanted.image_query)
        call.spread(gradient, Weights::kPlain, in.text_key, s.width, s.scale, wanted.image_query);
    if (wanted.text_key)
        call.gather(gradient, Weights::kPlain, in.image_query, s.width, s.scale, wanted.text_key);
    if (wanted.text_query)
        call.gather(call.slopes[1], Weights::kPlain, in.image_key, s.width, s.scale, wanted.text_query);
    if (wanted.image_key)
        call.spread(call.slopes[1], Weights::kPlain, in.text_query, s.width, s.scale, wanted.image_key);
}

}  // namespace cuda
}  // namespace magnet_fast
