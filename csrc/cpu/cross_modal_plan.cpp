#include "cpu/cross_modal_plan.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <string>
#include <utility>

#include "common/elements.h"

namespace magnet_fast {
namespace {

/// Whether a tensor of these sizes, all below 2^31, can be addressed.
bool addressable(std::initializer_list<int64_t> sizes) {
    int64_t room = std::numeric_limits<int64_t>::max() / 64;
    for (int64_t size : sizes) room /= std::max<int64_t>(1, size);
    return room > 0;
}

void check_sizes(const CrossModalSizes& s) {
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    const std::pair<const char*, int64_t> positive[] = {
        {"batch", s.batch}, {"pixels", s.pixels}, {"words", s.words}, {"heads", s.heads}};
    for (const auto& [name, value] : positive)
        require(value > 0 && value <= kMost, name, "1 .. 2^31 - 1", value);
    const std::pair<const char*, int64_t> widths[] = {{"width", s.width},
                                                      {"text_value_width", s.text_value_width},
                                                      {"image_value_width", s.image_value_width}};
    for (const auto& [name, value] : widths) {
        require(value >= 0 && value <= kMost, name, "0 .. 2^31 - 1", value);
        require(value % s.heads == 0, name, "a multiple of the " + std::to_string(s.heads) + " heads", value);
        require(addressable({s.batch, s.pixels, value}), name, "the image tensors to be addressable", value);
        require(addressable({s.batch, s.words, value}), name, "the text tensors to be addressable", value);
    }
    require(s.width > 0, "width", "at least 1", s.width);
    require(addressable({s.batch, s.heads, s.words, s.pixels}), "words", "the similarity to be addressable",
            s.words);
    require(s.threads > 0 && s.threads <= 4096, "threads", "1 .. 4096", s.threads);
    if (!(s.scale > 0) || std::isinf(s.scale))
        throw std::invalid_argument("scale: expected a finite number above 0, got " +
                                    std::to_string(s.scale));
}

}  // namespace

void check_cross_modal_tensor(const CrossModalTensor& tensor, const char* name, int dtype) {
    if (!tensor.data) return;
    const int64_t size = dtype == static_cast<int>(Dtype::kFloat64)   ? 8
                         : dtype == static_cast<int>(Dtype::kFloat32) ? 4
                                                                      : 2;
    const int64_t misaligned = reinterpret_cast<uintptr_t>(tensor.data) % size;
    require(misaligned == 0, name, "an address aligned for its dtype", misaligned);
    for (int64_t stride : {tensor.batch_stride, tensor.row_stride})
        require(stride >= 0, name, "strides of at least 0", stride);
}

void check_cross_modal_inputs(const CrossModalInputs& a) {
    const CrossModalSizes& s = a.sizes;
    check_sizes(s);
    const auto given = [](const CrossModalTensor& t) { return t.data != nullptr; };
    require(given(a.image_query) == given(a.text_key), "image_query", "text_key beside it and only then",
            given(a.image_query));
    require(given(a.image_key) == given(a.text_query), "image_key", "text_query beside it and only then",
            given(a.image_key));
    require(given(a.image_query) || given(a.image_key), "image_query", "the address of a tensor", 0);
    require(given(a.text_value) || given(a.image_value), "text_value", "it or image_value, or both", 0);
    require(given(a.image_query) || !given(a.text_value), "image_query", "it beside text_value", 0);
    require(given(a.image_value) || !given(a.image_key), "image_value", "it beside image_key", 0);
    require(given(a.text_value) || !given(a.image_key) || !given(a.image_query), "text_value",
            "it beside image_query when image_key is given", 0);
    require((s.text_value_width > 0) == given(a.text_value), "text_value_width", "0 without text_value only",
            s.text_value_width);
    require((s.image_value_width > 0) == given(a.image_value), "image_value_width",
            "0 without image_value only", s.image_value_width);
    const std::pair<const char*, const CrossModalTensor*> tensors[] = {
        {"image_query", &a.image_query}, {"text_key", &a.text_key},   {"text_value", &a.text_value},
        {"text_query", &a.text_query},   {"image_key", &a.image_key}, {"image_value", &a.image_value}};
    for (const auto& [name, tensor] : tensors) check_cross_modal_tensor(*tensor, name, s.dtype);
}

WordLists::WordLists(const CrossModalInputs& inputs) {
    const CrossModalSizes& s = inputs.sizes;
    index.reserve(s.batch * s.words);
    first.reserve(s.batch + 1);
    first.push_back(0);
    for (int64_t image = 0; image < s.batch; ++image) {
        for (int64_t word = 0; word < s.words; ++word)
            if (!inputs.text_mask || inputs.text_mask[image * s.words + word])
                index.push_back(static_cast<int32_t>(word));
        first.push_back(static_cast<int64_t>(index.size()));
        most = std::max(most, count(image));
    }
}

CrossModalPlan::CrossModalPlan(const CrossModalSizes& s)
    : pixels(s.pixels), slices(s.batch * s.heads), units((s.pixels + 15) / 16) {
    // Enough runs for many threads, none much shorter than 96 pixels: each brings sums of its own for the
    // words.
    constexpr int64_t kRuns = 48, kShortest = 96;
    const int64_t enough = (kRuns + slices - 1) / slices;
    runs = std::min(enough, (pixels + kShortest - 1) / kShortest);
    longest = 0;
    for (int64_t run = 0; run < runs; ++run) longest = std::max(longest, begin(run + 1) - begin(run));
    longest = (longest + 15) / 16 * 16;
    // Waking threads costs microseconds: small calls stay on one.
    const double operations = static_cast<double>(s.batch) * s.pixels * s.words *
                              (s.width + s.text_value_width + s.image_value_width);
    team = operations < 5e5 ? 1 : std::min(s.threads, slices * runs);
}

}  // namespace magnet_fast
