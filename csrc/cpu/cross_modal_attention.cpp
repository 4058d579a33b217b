#include "cpu/cross_modal_attention.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/elements.h"
#include "cpu/cross_modal_kernel.h"
#include "cpu/cross_modal_plan.h"
#include "cpu/launch.h"

namespace magnet_fast {
namespace {

/// Calls work(i, thread) for i in [0, count).
template <typename Work>
void for_each(int64_t count, int64_t team, const Work& work) {
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
    for (int64_t i = 0; i < count; ++i) work(i, thread_index());
}

/// Contiguous, shaped like their tensors, overwritten; null: not wanted.
struct CrossModalGradients {
    void *image_query, *text_key, *text_value, *text_query, *image_key, *image_value;
};

/// What the two passes share for tensors of one element type.
template <typename Element>
struct Launch {
    using Real = typename Computed<Element>::Real;
    using ConstRows = Rows<const Element>;

    explicit Launch(const CrossModalInputs& a)
        : inputs(a),
          sizes(a.sizes),
          words(a),
          plan(a.sizes),
          widths{sizes.width / sizes.heads, sizes.text_value_width / sizes.heads,
                 sizes.image_value_width / sizes.heads} {
        int64_t most = 0;
        for (int64_t image = 0; image < sizes.batch; ++image)
            if (words.count(image) > 0)
                most = std::max(most, cross_modal_scratch<Element>(words.count(image), widths));
        for (int64_t thread = 0; thread < plan.team; ++thread) scratch.emplace_back(most);
    }

    /// Rows of one slice's head, which is `width` wide.
    static ConstRows rows(const CrossModalTensor& tensor, int64_t image, int64_t head, int64_t width) {
        if (!tensor.data) return {};
        return {static_cast<const Element*>(tensor.data) + image * tensor.batch_stride + head * width,
                tensor.row_stride};
    }

    /// The same of a contiguous result (batch, count, heads * width).
    Rows<Element> result(void* data, int64_t image, int64_t head, int64_t count, int64_t width) const {
        if (!data) return {};
        const int64_t stride = sizes.heads * width;
        return {static_cast<Element*>(data) + image * count * stride + head * width, stride};
    }

    /// Room for packed words of every slice.
    Numbers<Real> room(bool wanted, int64_t width) const {
        return Numbers<Real>(wanted ? plan.slices * words.most * packed_row(width) : 0);
    }
    Real* of_slice(const Numbers<Real>& packed, int64_t slice, int64_t width) const {
        return packed.get() ? packed.get() + slice * words.most * packed_row(width) : nullptr;
    }

    void pack(const CrossModalTensor& tensor, int64_t slice, int64_t width, const Numbers<Real>& to) const {
        if (!to.get()) return;
        const int64_t image = slice / sizes.heads, head = slice % sizes.heads;
        kernels.pack(rows(tensor, image, head, width), words.of(image), words.count(image), width,
                     of_slice(to, slice, width));
    }

    /// Calls work(image, head, run, thread); the heads of a run follow each other, they share cache lines.
    template <typename Work>
    void for_each_run(const Work& work) const {
        for_each(plan.slices * plan.runs, plan.team, [&](int64_t i, int64_t thread) {
            work(i / sizes.heads / plan.runs, i % sizes.heads, i / sizes.heads % plan.runs, thread);
        });
    }

    /// Fills in what all kernels' arguments have; returns the run's first pixel.
    template <typename Work>
    int64_t describe(Work& work, int64_t image, int64_t head, int64_t run, int64_t thread) const {
        const int64_t begin = plan.begin(run);
        work.pixels = plan.begin(run + 1) - begin;
        work.words = words.count(image);
        work.scale = static_cast<Real>(sizes.scale);
        work.widths = widths;
        work.image_query = rows(inputs.image_query, image, head, widths.similarity).from(begin);
        work.image_key = rows(inputs.image_key, image, head, widths.similarity).from(begin);
        work.image_value = rows(inputs.image_value, image, head, widths.image_value).from(begin);
        work.scratch = scratch[thread].get();
        return begin;
    }

    /// to (batch, words, heads * width), masked rows 0: for every word the sum over runs of the packed parts
    /// (slice, run, word), times factors(slice, word, numbers of the runs).
    template <typename Factors>
    void combine(const Numbers<Real>& parts, int64_t width, void* to, const Factors& factors) const {
        const int64_t row = packed_row(width);
        for_each(plan.slices * sizes.words, plan.team, [&](int64_t i, int64_t thread) {
            const int64_t slice = i / sizes.words, word = i % sizes.words, image = slice / sizes.heads;
            Element* out = result(to, image, slice % sizes.heads, sizes.words, width).from(word).data;
            const int32_t *begin = words.of(image), *end = begin + words.count(image);
            const int32_t* found = std::lower_bound(begin, end, static_cast<int32_t>(word));
            if (found == end || *found != word) {
                kernels.combine(nullptr, 0, 0, nullptr, width, out);
                return;
            }
            Real* numbers = factor_room.data() + thread * plan.runs;
            factors(slice, found - begin, numbers);
            const Real* first = parts.get() + slice * plan.runs * words.most * row + (found - begin) * row;
            kernels.combine(first, plan.runs, words.most * row, numbers, width, out);
        });
    }

    const CrossModalInputs& inputs;
    const CrossModalSizes& sizes;
    const WordLists words;
    const CrossModalPlan plan;
    const CrossModalWidths widths;
    const CrossModalKernels<Element>& kernels = cross_modal_kernels<Element>();
    const CrossModalBackwardKernels<Element>& backward_kernels = cross_modal_backward_kernels<Element>();
    std::vector<Numbers<Real>> scratch;  // of each thread
    mutable std::vector<Real> factor_room = std::vector<Real>(plan.team * plan.runs);
};

/// The softmax over pixels from its parts (slice, run, word).
template <typename Real>
struct MergedSoftmax {
    /// factors[run] = exp(highest of the run - highest of all) / sum; returns (highest, 1 / sum).
    std::pair<Real, Real> factors(int64_t slice, int64_t word, Real* factors) const {
        const int64_t first = slice * runs * words + word;
        Real top = highest[first], total = 0;
        for (int64_t run = 1; run < runs; ++run) top = std::max(top, highest[first + run * words]);
        for (int64_t run = 0; run < runs; ++run) {
            factors[run] = std::exp(highest[first + run * words] - top);
            total += factors[run] * sum[first + run * words];
        }
        for (int64_t run = 0; run < runs; ++run) factors[run] /= total;
        return {top, 1 / total};
    }

    const Real *highest, *sum;
    int64_t runs, words;
};

template <typename Element>
void forward(const CrossModalInputs& a, void* image_out, void* text_out) {
    using Real = typename Computed<Element>::Real;
    const Launch<Element> launch(a);
    const CrossModalPlan& plan = launch.plan;
    const CrossModalWidths& widths = launch.widths;
    const int64_t d = widths.similarity, most = launch.words.most, read_row = packed_row(widths.image_value);

    const Numbers<Real> key = launch.room(a.text_key.data, d), query = launch.room(a.text_query.data, d),
                        value = launch.room(a.text_value.data, widths.text_value);
    for_each(plan.slices, plan.team, [&](int64_t slice, int64_t) {
        launch.pack(a.text_key, slice, d, key);
        launch.pack(a.text_query, slice, d, query);
        launch.pack(a.text_value, slice, widths.text_value, value);
    });

    const int64_t parts = text_out ? plan.slices * plan.runs * most : 0;
    const Numbers<Real> highest(parts), sum(parts), read(parts * read_row);
    launch.for_each_run([&](int64_t image, int64_t head, int64_t run, int64_t thread) {
        const int64_t slice = image * a.sizes.heads + head, part = (slice * plan.runs + run) * most;
        CrossModalForward<Element> work;
        const int64_t begin = launch.describe(work, image, head, run, thread);
        work.key = launch.of_slice(key, slice, d);
        work.value = launch.of_slice(value, slice, widths.text_value);
        work.query = launch.of_slice(query, slice, d);
        work.image_out = launch.result(image_out, image, head, plan.pixels, widths.text_value).from(begin);
        if (parts > 0) work.text = {highest.get() + part, sum.get() + part, read.get() + part * read_row};
        launch.kernels.forward(work);
    });
    if (!text_out) return;
    const MergedSoftmax<Real> softmax{highest.get(), sum.get(), plan.runs, most};
    launch.combine(read, widths.image_value, text_out, [&](int64_t slice, int64_t word, Real* factors) {
        softmax.factors(slice, word, factors);
    });
}

/// What the first of the backward pass's two sweeps over the pixels leaves for the second: scores and their
/// gradients (slice, run, word, kept_row), and for every word of a slice the softmax over all pixels.
template <typename Element>
struct TextDirection {
    using Real = typename Computed<Element>::Real;

    TextDirection(const Launch<Element>& launch, bool grad_scores)
        : kept_row(launch.plan.longest + 16),
          parts(launch.plan.slices * launch.plan.runs * launch.words.most),
          score(parts * kept_row),
          grad_weight(grad_scores ? parts * kept_row : 0),
          highest(launch.plan.slices * launch.words.most),
          inverse_sum(launch.plan.slices * launch.words.most),
          mean(launch.plan.slices * launch.words.most) {}

    void sweep(const Launch<Element>& launch, const Numbers<Real>& query, const Numbers<Real>& grad_out) {
        const CrossModalPlan& plan = launch.plan;
        const int64_t most = launch.words.most, heads = launch.sizes.heads;
        const Numbers<Real> part_highest(parts), part_sum(parts), part_dot(parts);
        launch.for_each_run([&](int64_t image, int64_t head, int64_t run, int64_t thread) {
            const int64_t slice = image * heads + head, part = (slice * plan.runs + run) * most;
            CrossModalStatistics<Element> work;
            launch.describe(work, image, head, run, thread);
            if (!work.image_key) work.image_key = work.image_query;
            work.query = launch.of_slice(query, slice, work.widths.similarity);
            work.grad_text_out = launch.of_slice(grad_out, slice, work.widths.image_value);
            work.score = score.get() + part * kept_row;
            work.grad_weight = grad_weight.get() ? grad_weight.get() + part * kept_row : nullptr;
            work.kept_row = kept_row;
            work.highest = part_highest.get() + part;
            work.sum = part_sum.get() + part;
            work.dot = part_dot.get() + part;
            launch.backward_kernels.statistics(work);
        });
        const MergedSoftmax<Real> softmax{part_highest.get(), part_sum.get(), plan.runs, most};
        std::vector<Real> factors(plan.runs);
        for (int64_t slice = 0; slice < plan.slices; ++slice)
            for (int64_t word = 0; word < launch.words.count(slice / heads); ++word) {
                const int64_t at = slice * most + word;
                std::tie(highest.get()[at], inverse_sum.get()[at]) =
                    softmax.factors(slice, word, factors.data());
                mean.get()[at] = 0;
                for (int64_t run = 0; run < plan.runs; ++run)
                    mean.get()[at] += factors[run] * part_dot.get()[(slice * plan.runs + run) * most + word];
            }
    }

    void describe(const Launch<Element>& launch, int64_t slice, int64_t run,
                  CrossModalBackward<Element>& work) const {
        const int64_t words = slice * launch.words.most,
                      part = (slice * launch.plan.runs + run) * launch.words.most;
        work.score = score.get() + part * kept_row;
        work.grad_weight = grad_weight.get() ? grad_weight.get() + part * kept_row : nullptr;
        work.kept_row = kept_row;
        work.highest = highest.get() + words;
        work.inverse_sum = inverse_sum.get() + words;
        work.mean = mean.get() + words;
    }

    const int64_t kept_row, parts;
    const Numbers<Real> score, grad_weight, highest, inverse_sum, mean;
};

template <typename Element>
void backward(const CrossModalInputs& a, const CrossModalTensor& grad_image_out,
              const CrossModalTensor& grad_text_out, const CrossModalGradients& wanted) {
    using Real = typename Computed<Element>::Real;
    const Launch<Element> launch(a);
    const CrossModalPlan& plan = launch.plan;
    const CrossModalWidths& widths = launch.widths;
    const int64_t d = widths.similarity, dv = widths.text_value, dw = widths.image_value,
                  most = launch.words.most;
    const bool separate = a.text_query.data, text = grad_text_out.data;
    const bool grad_scores = wanted.image_query || wanted.text_key;

    const Numbers<Real> key = launch.room(a.text_key.data, d), value = launch.room(a.text_value.data, dv),
                        query = launch.room(separate && text, d), grad_out = launch.room(text, dw);
    for_each(plan.slices, plan.team, [&](int64_t slice, int64_t) {
        launch.pack(a.text_key, slice, d, key);
        launch.pack(a.text_value, slice, dv, value);
        launch.pack(a.text_query, slice, d, query);
        launch.pack(grad_text_out, slice, dw, grad_out);
    });

    std::optional<TextDirection<Element>> direction;
    if (text && most > 0) {
        direction.emplace(launch, separate ? wanted.image_key || wanted.text_query : grad_scores);
        direction->sweep(launch, separate ? query : key, grad_out);
    }

    const int64_t parts = plan.slices * plan.runs * most;
    const Numbers<Real> grad_key(wanted.text_key ? parts * packed_row(d) : 0),
        grad_value(wanted.text_value ? parts * packed_row(dv) : 0),
        grad_query(wanted.text_query ? parts * packed_row(d) : 0);
    launch.for_each_run([&](int64_t image, int64_t head, int64_t run, int64_t thread) {
        const int64_t slice = image * a.sizes.heads + head, part = (slice * plan.runs + run) * most;
        CrossModalBackward<Element> work{};
        const int64_t begin = launch.describe(work, image, head, run, thread);
        work.grad_image_out = launch.rows(grad_image_out, image, head, dv).from(begin);
        work.key = launch.of_slice(key, slice, d);
        work.value = launch.of_slice(value, slice, dv);
        work.query = launch.of_slice(query, slice, d);
        work.grad_text_out = launch.of_slice(grad_out, slice, dw);
        if (direction) direction->describe(launch, slice, run, work);
        const auto pixels = [&](void* grad, int64_t width) {
            return launch.result(grad, image, head, plan.pixels, width).from(begin);
        };
        work.grad_image_query = pixels(wanted.image_query, d);
        work.grad_image_key = pixels(wanted.image_key, d);
        work.grad_image_value = pixels(wanted.image_value, dw);
        const auto words = [&](const Numbers<Real>& sums, int64_t width) {
            return sums.get() ? sums.get() + part * packed_row(width) : nullptr;
        };
        work.grad_text_key = words(grad_key, d);
        work.grad_text_value = words(grad_value, dv);
        work.grad_text_query = words(grad_query, d);
        launch.backward_kernels.backward(work);
    });

    const auto ones = [&](int64_t, int64_t, Real* factors) {
        std::fill(factors, factors + plan.runs, static_cast<Real>(1));
    };
    if (wanted.text_key) launch.combine(grad_key, d, wanted.text_key, ones);
    if (wanted.text_value) launch.combine(grad_value, dv, wanted.text_value, ones);
    if (wanted.text_query) launch.combine(grad_query, d, wanted.text_query, ones);
}

/// The tensor from image `first` on.
template <typename Element>
CrossModalTensor images_from(CrossModalTensor tensor, int64_t first) {
    if (tensor.data) tensor.data = static_cast<const Element*>(tensor.data) + first * tensor.batch_stride;
    return tensor;
}

template <typename Element>
void* images_from(void* data, int64_t first, int64_t image) {
    return data ? static_cast<Element*>(data) + first * image : nullptr;
}

/// Some images at a time, enough for many threads: the scores that are kept then take bounded room.
template <typename Element>
void backward_in_groups(const CrossModalInputs& a, const CrossModalTensor& grad_image_out,
                        const CrossModalTensor& grad_text_out, const CrossModalGradients& wanted) {
    const CrossModalSizes& s = a.sizes;
    const int64_t group = (63 + s.heads) / s.heads;
    for (int64_t i = 0; i < s.batch; i += group) {
        CrossModalInputs part = a;
        part.sizes.batch = std::min(group, s.batch - i);
        for (CrossModalTensor* tensor : {&part.image_query, &part.text_key, &part.text_value,
                                         &part.text_query, &part.image_key, &part.image_value})
            *tensor = images_from<Element>(*tensor, i);
        if (a.text_mask) part.text_mask += i * s.words;
        CrossModalGradients grads = wanted;
        for (void** grad : {&grads.image_query, &grads.image_key})
            *grad = images_from<Element>(*grad, i, s.pixels * s.width);
        for (void** grad : {&grads.text_key, &grads.text_query})
            *grad = images_from<Element>(*grad, i, s.words * s.width);
        grads.text_value = images_from<Element>(grads.text_value, i, s.words * s.text_value_width);
        grads.image_value = images_from<Element>(grads.image_value, i, s.pixels * s.image_value_width);
        backward<Element>(part, images_from<Element>(grad_image_out, i),
                          images_from<Element>(grad_text_out, i), grads);
    }
}

}  // namespace

void cross_modal_attention_forward(const CrossModalViews& views, const TensorView& image_out,
                                   const TensorView& text_out, int64_t threads) {
    const CrossModalInputs inputs = checked_inputs(views, threads);
    const CrossModalSizes& s = inputs.sizes;
    check_result(image_out, "image_out", views.tensors.text_value, s.batch, s.pixels);
    check_result(text_out, "text_out", views.tensors.image_value, s.batch, s.words);
    with_element(s.dtype,
                 [&](auto element) { forward<decltype(element)>(inputs, image_out.data, text_out.data); });
}

void cross_modal_attention_backward(const CrossModalViews& views, const TensorView& grad_image_out,
                                    const TensorView& grad_text_out, const CrossModalTensors& gradients,
                                    int64_t threads) {
    const CrossModalInputs inputs = checked_inputs(views, threads);
    check_gradients(views.tensors, inputs.sizes, grad_image_out, grad_text_out, gradients);
    const CrossModalGradients wanted{gradients.image_query.data, gradients.text_key.data,
                                     gradients.text_value.data,  gradients.text_query.data,
                                     gradients.image_key.data,   gradients.image_value.data};
    with_element(inputs.sizes.dtype, [&](auto element) {
        backward_in_groups<decltype(element)>(inputs, rows_of(grad_image_out), rows_of(grad_text_out),
                                              wanted);
    });
}

}  // namespace magnet_fast
