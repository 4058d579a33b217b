#include "cpu/cross_modal_plan.h"

#include <algorithm>
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
    const std::pair<const char*, int64_t> sizes[] = {{"batch", s.batch},
                                                     {"pixels", s.pixels},
                                                     {"words", s.words},
                                                     {"heads", s.heads},
                                                     {"width", s.width},
                                                     {"text_value_width", s.text_value_width},
                                                     {"image_value_width", s.image_value_width}};
    for (const auto& [name, value] : sizes)
        if (value > kMost) refuse(name, "at most 2^31 - 1", value);
    for (const int64_t width : {s.width, s.text_value_width, s.image_value_width}) {
        require(addressable({s.batch, s.pixels, width}), "pixels", "the image tensors to be addressable",
                s.pixels);
        require(addressable({s.batch, s.words, width}), "words", "the text tensors to be addressable",
                s.words);
    }
    require(addressable({s.batch, s.heads, s.words, s.pixels}), "words", "the similarity to be addressable",
            s.words);
    require(s.threads > 0 && s.threads <= 4096, "threads", "1 .. 4096", s.threads);
}

}  // namespace

CrossModalTensor rows_of(const TensorView& view) {
    return {view.data, view.strides[0], view.strides[1]};
}

CrossModalInputs checked_inputs(const CrossModalViews& views, int64_t threads) {
    const CrossModalSizes sizes{checked_shape(views), views.scale, threads};
    check_sizes(sizes);
    const CrossModalTensors& t = views.tensors;
    return {sizes,
            rows_of(t.image_query),
            rows_of(t.text_key),
            rows_of(t.text_value),
            rows_of(t.text_query),
            rows_of(t.image_key),
            rows_of(t.image_value),
            static_cast<const uint8_t*>(views.text_mask.data)};
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
