#include "cpu/window_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/launch.h"
#include "cpu/window_plan.h"

namespace magnet_fast {
namespace {

/// Elements between neighbours along batch, height and width; the last dimension is contiguous.
struct MapStrides {
    int64_t batch, height, width;
};

template <typename Element>
struct WindowAttentionForward {
    using Real = typename Computed<Element>::Real;
    WindowAttentionSizes sizes;
    const Element* qkv;
    MapStrides qkv_strides;
    const Real* bias;
    const Element* pad_qkv;  // null: zeros
    Element* out;
    MapStrides out_strides;
};

template <typename Element>
struct WindowAttentionBackward {
    using Real = typename Computed<Element>::Real;
    WindowAttentionSizes sizes;
    const Element* grad_out;
    MapStrides grad_out_strides;
    const Element* qkv;
    MapStrides qkv_strides;
    const Real* bias;
    const Element* pad_qkv;
    Element* grad_qkv;  // null: not wanted
    MapStrides grad_qkv_strides;
    Real* grad_bias;
    Real* grad_pad_qkv;
};

void check_sizes(const WindowAttentionSizes& s) {
    // The map's number of elements must fit in 63 bits; these bounds make every product below safe.
    constexpr int64_t kMost = int64_t{1} << 31;
    for (const int64_t size : {s.height, s.width, s.channels})
        require(size > 0 && size < kMost, "qkv", "height, width and 3 * channels of 1 .. 2^31 - 1", size);
    const std::pair<const char*, int64_t> positive[] = {
        {"heads", s.heads}, {"window_h", s.window_h}, {"window_w", s.window_w}, {"threads", s.threads}};
    for (const auto& [name, value] : positive)
        require(value > 0 && value < kMost, name, "1 .. 2^31 - 1", value);
    require(s.batch >= 0 && s.batch < kMost, "qkv", "a batch of 0 .. 2^31 - 1", s.batch);
    require(s.channels % s.heads == 0, "heads", "a divisor of " + std::to_string(s.channels) + " channels",
            s.heads);
    require(s.window_h <= 4096, "window_h", "at most 4096", s.window_h);
    require(s.window_w <= 4096, "window_w", "at most 4096", s.window_w);
    require(s.threads <= 4096, "threads", "at most 4096", s.threads);
    require(s.shift_h >= 0 && s.shift_h < s.window_h, "shift_h", "0 .. window_h - 1", s.shift_h);
    require(s.shift_w >= 0 && s.shift_w < s.window_w, "shift_w", "0 .. window_w - 1", s.shift_w);
    if (!std::isfinite(s.scale) || s.scale <= 0)
        throw std::invalid_argument("scale: expected a finite number above 0");
    constexpr int64_t kBytes = std::numeric_limits<int64_t>::max() / 8;
    const int64_t map = s.height * s.width;  // < 2^62
    require(map <= kBytes / (3 * s.channels) / std::max<int64_t>(1, s.batch), "qkv",
            "batch * height * width * 3 * channels numbers to be addressable", s.batch);
}

/// Sizes of a call, checked together with the inputs.
WindowAttentionSizes checked_sizes(const WindowAttentionInputs& a) {
    check_dtype(a.qkv, "qkv");
    check_tensor(a.qkv, "qkv", 4, a.qkv.dtype);
    const int64_t* size = a.qkv.sizes;
    require(size[3] % 3 == 0, "qkv", "q, k and v in the last dimension, a multiple of 3", size[3]);
    const WindowAttentionSizes s{a.settings, size[0], size[1], size[2], size[3] / 3, a.threads};
    check_sizes(s);
    check_dense(a.qkv, "qkv", 3);
    check_contiguous(a.bias, "bias", {(2 * s.window_h - 1) * (2 * s.window_w - 1), s.heads},
                     computed(a.qkv.dtype));
    check_contiguous(a.pad_qkv, "pad_qkv", {3 * s.channels}, a.qkv.dtype, /*may_be_missing=*/true);
    return s;
}

/// A map that is read may have any strides; one that is written must at least step over its channels.
void check_map(const WindowAttentionSizes& s, const TensorView& map, const char* name, int64_t channels,
               Dtype dtype, bool written) {
    check_tensor(map, name, {s.batch, s.height, s.width, channels}, dtype);
    check_dense(map, name, 3);
    for (int i = 0; written && i < 3; ++i)
        if (map.sizes[i] > 1 && map.strides[i] < channels)
            refuse(name, "strides of at least " + std::to_string(channels), map.strides[i]);
}

MapStrides strides_of(const TensorView& map) {
    return {map.strides[0], map.strides[1], map.strides[2]};
}

/// What one thread works with. Made before the threads start: an exception could not leave a parallel region.
template <typename Element>
struct Worker {
    using Real = typename Computed<Element>::Real;
    std::vector<GroupBias<Real>> bias;  // one a head of the task
    AlignedFloats scratch;
    std::vector<const Element*> query, next, grad_out, next_grad_out;
    std::vector<Element*> written;
    AlignedNumbers<Real> bias_gradient;  // of every head of the task

    Worker(const WindowAttentionSizes& sizes, const WindowPlan& plan, const WindowKernels<Element>& kernels,
           bool backward)
        : scratch(
              aligned_floats(kernels.scratch_bytes(plan.max_tokens, sizes.channels / sizes.heads) / 4 + 1)) {
        bias.reserve(plan.max_heads);
        for (int64_t h = 0; h < plan.max_heads; ++h) bias.emplace_back(sizes, plan, kernels.bias);
        if (backward) bias_gradient = aligned_numbers<Real>(plan.max_heads * bias.front().capacity());
        for (auto* pointers : {&query, &next, &grad_out, &next_grad_out}) pointers->reserve(plan.max_tokens);
        written.reserve(plan.max_tokens);
    }

    Real* bias_gradient_of(int64_t h) { return bias_gradient.get() + h * bias.front().capacity(); }

    /// Moves the pointers of this call on to the next head.
    void advance(int64_t head_dim) {
        for (auto* pointers : {&query, &grad_out})
            for (const Element*& pointer : *pointers) pointer += head_dim;
        for (Element*& pointer : written) pointer += head_dim;
    }
};

/// One group of one window; `window` counts its class's windows over the batch.
struct Place {
    const Task* task;
    size_t group;
    int64_t window;
};

/// Everything both passes need: the plan, the padding's key and value, and a worker per thread.
template <typename Element>
struct Launch {
    using Real = typename Computed<Element>::Real;
    const WindowAttentionSizes& sizes;
    const WindowKernels<Element>& kernels = window_kernels<Element>();
    WindowPlan plan{sizes};
    int64_t head_dim = sizes.channels / sizes.heads;
    std::vector<Element> padding;  // (3C) q, k and v of padded tokens
    std::vector<Element> zeros;    // (d)
    std::vector<Worker<Element>> workers;

    Launch(const WindowAttentionSizes& s, const Element* pad_qkv, bool backward)
        : sizes(s), padding(3 * s.channels), zeros(s.channels / s.heads) {
        if (pad_qkv) std::copy(pad_qkv, pad_qkv + padding.size(), padding.begin());
        const int64_t count = std::min<int64_t>(s.threads, std::max<size_t>(1, plan.tasks.size()));
        for (int64_t i = 0; i < count; ++i) workers.emplace_back(s, plan, kernels, backward);
    }

    const Group& group_at(const Place& at) const {
        return plan.classes[at.task->window_class].groups[at.group];
    }

    /// Where a thread will most likely go on after `at`: a task of its own ends, and it takes the one that is
    /// as many tasks ahead as there are threads. A task null: nowhere. It decides what is fetched ahead,
    /// nothing else.
    Place following(Place at) const {
        if (at.window + 1 < at.task->end) return {at.task, at.group, at.window + 1};
        if (at.group + 1 < plan.classes[at.task->window_class].groups.size())
            return {at.task, at.group + 1, at.task->begin};
        const size_t next = at.task - plan.tasks.data() + workers.size();
        if (next >= plan.tasks.size()) return {nullptr, 0, 0};
        return {&plan.tasks[next], 0, plan.tasks[next].begin};
    }

    /// Pointers to the channels of the task's first head for every token of the group.
    template <typename Number>
    void locate(const Place& at, Number* map, const MapStrides& strides,
                std::vector<Number*>& pointers) const {
        const Group& group = group_at(at);
        const WindowClass& part = plan.classes[at.task->window_class];
        const int64_t image = at.window / part.windows(), place = at.window % part.windows();
        const int64_t columns = static_cast<int64_t>(part.columns.size());
        const int64_t* source_y = plan.source_y.data() + part.rows[place / columns] * sizes.window_h;
        const int64_t* source_x = plan.source_x.data() + part.columns[place % columns] * sizes.window_w;
        Number* origin = map + image * strides.batch + at.task->first_head * head_dim;
        pointers.resize(group.tokens.size());  // never beyond what was reserved
        Number** to = pointers.data();
        for (const Token& token : group.tokens)
            *to++ = origin + source_y[token.y] * strides.height + source_x[token.x] * strides.width;
    }

    /// Fills what the two passes share and all heads have in common; `next` is where the thread goes on.
    void prepare(const Place& at, const Place& next, const Element* qkv, const MapStrides& strides,
                 Worker<Element>& worker, GroupForward<Element>& arguments) const {
        arguments.tokens = static_cast<int64_t>(group_at(at).tokens.size());
        arguments.keys = group_at(at).keys();
        arguments.head_dim = head_dim;
        arguments.channels = sizes.channels;
        arguments.scale = static_cast<Real>(sizes.scale);
        locate(at, qkv, strides, worker.query);
        arguments.query = worker.query.data();
        arguments.zeros = zeros.data();
        worker.next.clear();
        if (next.task) locate(next, qkv, strides, worker.next);
        arguments.scratch = worker.scratch.get();
    }

    /// Fills what belongs to the task's head h.
    void prepare_head(const Place& at, int64_t h, const Worker<Element>& worker,
                      GroupForward<Element>& arguments) const {
        const int64_t g = static_cast<int64_t>(at.group);
        arguments.pad_key = padding.data() + sizes.channels + (at.task->first_head + h) * head_dim;
        arguments.pad_value = arguments.pad_key + sizes.channels;
        arguments.bias = worker.bias[h].values(g);
        arguments.bias_row = worker.bias[h].row(g);
        const bool last = h + 1 == at.task->heads;
        arguments.next = last ? worker.next.data() : arguments.query;
        arguments.next_tokens = last ? static_cast<int64_t>(worker.next.size()) : arguments.tokens;
        arguments.next_offset = last ? 0 : head_dim;
    }

    /// Calls work(task index, worker) for every task, on all threads.
    template <typename Work>
    void run(const Work& work) {
        const int64_t count = static_cast<int64_t>(plan.tasks.size());
        const int team = static_cast<int>(workers.size());
#pragma omp parallel for num_threads(team) schedule(dynamic, 1) if (team > 1)
        for (int64_t t = 0; t < count; ++t) work(t, workers[thread_index()]);
    }
};

/// Sums the tasks' partial results (max_heads of length each) head by head, in the tasks' order and in
/// double, so that the bits do not depend on the number of threads; calls write(head, index, sum).
template <typename Real, typename Write>
void reduce(const WindowPlan& plan, const std::vector<Real>& parts, int64_t heads, int64_t length,
            const Write& write) {
    std::vector<double> sums(length);
    size_t first = 0;  // task of the head's block
    for (int64_t head = 0; head < heads; ++head) {
        std::fill(sums.begin(), sums.end(), 0.0);
        while (first < plan.tasks.size() && head >= plan.tasks[first].first_head + plan.tasks[first].heads)
            ++first;
        for (size_t t = first; t < plan.tasks.size() && plan.tasks[t].first_head <= head; ++t) {
            const Real* part = parts.data() + (t * plan.max_heads + head - plan.tasks[t].first_head) * length;
            for (int64_t index = 0; index < length; ++index) sums[index] += part[index];
        }
        for (int64_t index = 0; index < length; ++index) write(head, index, static_cast<Real>(sums[index]));
    }
}

template <typename Element>
void forward(const WindowAttentionForward<Element>& a) {
    Launch<Element> launch(a.sizes, a.pad_qkv, /*backward=*/false);
    launch.run([&](int64_t t, Worker<Element>& worker) {
        const Task& task = launch.plan.tasks[t];
        for (int64_t h = 0; h < task.heads; ++h)
            worker.bias[h].load(a.bias, task.first_head + h, task.window_class);
        const std::vector<Group>& groups = launch.plan.classes[task.window_class].groups;
        for (size_t g = 0; g < groups.size(); ++g) {
            for (int64_t window = task.begin; window < task.end; ++window) {
                GroupForward<Element> arguments;
                const Place at{&task, g, window};
                launch.prepare(at, launch.following(at), a.qkv, a.qkv_strides, worker, arguments);
                launch.locate(at, a.out, a.out_strides, worker.written);
                arguments.out = worker.written.data();
                for (int64_t h = 0; h < task.heads; ++h, worker.advance(launch.head_dim)) {
                    launch.prepare_head(at, h, worker, arguments);
                    launch.kernels.forward(arguments);
                }
            }
        }
    });
}

template <typename Element>
void backward(const WindowAttentionBackward<Element>& a) {
    using Real = typename Computed<Element>::Real;
    const WindowAttentionSizes& s = a.sizes;
    Launch<Element> launch(s, s.batch > 0 ? a.pad_qkv : nullptr, /*backward=*/true);
    const std::vector<Task>& tasks = launch.plan.tasks;
    const int64_t d = launch.head_dim, table = (2 * s.window_h - 1) * (2 * s.window_w - 1);
    // A task adds to its own partial sums only, whichever thread runs it.
    const size_t parts = tasks.size() * launch.plan.max_heads;
    std::vector<Real> bias_parts(a.grad_bias ? parts * table : 0),
        pad_parts(a.grad_pad_qkv ? parts * 2 * d : 0);
    launch.run([&](int64_t t, Worker<Element>& worker) {
        const Task& task = tasks[t];
        const int64_t part = t * launch.plan.max_heads;
        for (int64_t h = 0; h < task.heads; ++h) {
            worker.bias[h].load(a.bias, task.first_head + h, task.window_class);
            if (a.grad_bias) std::fill_n(worker.bias_gradient_of(h), worker.bias[h].size(), Real{0});
        }
        const std::vector<Group>& groups = launch.plan.classes[task.window_class].groups;
        for (size_t g = 0; g < groups.size(); ++g) {
            if (!a.grad_qkv && !a.grad_bias && !(a.grad_pad_qkv && groups[g].pads)) continue;
            for (int64_t window = task.begin; window < task.end; ++window) {
                GroupBackward<Element> arguments;
                const Place at{&task, g, window}, next = launch.following(at);
                launch.prepare(at, next, a.qkv, a.qkv_strides, worker, arguments);
                launch.locate(at, a.grad_out, a.grad_out_strides, worker.grad_out);
                arguments.grad_out = worker.grad_out.data();
                if (next.task) launch.locate(next, a.grad_out, a.grad_out_strides, worker.next_grad_out);
                arguments.grad_query = nullptr;
                if (a.grad_qkv) {
                    launch.locate(at, a.grad_qkv, a.grad_qkv_strides, worker.written);
                    arguments.grad_query = worker.written.data();
                }
                for (int64_t h = 0; h < task.heads; ++h, worker.advance(d)) {
                    launch.prepare_head(at, h, worker, arguments);
                    arguments.next_grad_out =
                        h + 1 == task.heads ? worker.next_grad_out.data() : arguments.grad_out;
                    arguments.grad_bias =
                        a.grad_bias ? worker.bias_gradient_of(h) + worker.bias[h].offset(g) : nullptr;
                    arguments.grad_pad_key = a.grad_pad_qkv ? pad_parts.data() + (part + h) * 2 * d : nullptr;
                    arguments.grad_pad_value = a.grad_pad_qkv ? arguments.grad_pad_key + d : nullptr;
                    launch.kernels.backward(arguments);
                }
            }
        }
        if (a.grad_bias)
            for (int64_t h = 0; h < task.heads; ++h)
                worker.bias[h].scatter(worker.bias_gradient_of(h), bias_parts.data() + (part + h) * table);
    });

    if (a.grad_bias) {
        const GroupBias<Real>& layout = launch.workers.front().bias.front();
        reduce(launch.plan, bias_parts, s.heads, table, [&](int64_t head, int64_t index, Real sum) {
            a.grad_bias[layout.reversed(index) * s.heads + head] = sum;
        });
    }
    if (a.grad_pad_qkv) {
        std::fill_n(a.grad_pad_qkv, s.channels, Real{0});
        reduce(launch.plan, pad_parts, s.heads, 2 * d, [&](int64_t head, int64_t index, Real sum) {
            a.grad_pad_qkv[(1 + index / d) * s.channels + head * d + index % d] = sum;
        });
    }
}

template <typename Element>
Element* data(const TensorView& view) {
    return static_cast<Element*>(view.data);
}

}  // namespace

void window_attention_forward(const WindowAttentionInputs& a, const TensorView& out) {
    const WindowAttentionSizes s = checked_sizes(a);
    check_map(s, out, "out", s.channels, a.qkv.dtype, /*written=*/true);
    if (s.batch == 0) return;
    with_element(a.qkv.dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = typename Computed<Element>::Real;
        forward(WindowAttentionForward<Element>{s, data<const Element>(a.qkv), strides_of(a.qkv),
                                                data<const Real>(a.bias), data<const Element>(a.pad_qkv),
                                                data<Element>(out), strides_of(out)});
    });
}

void window_attention_backward(const WindowAttentionInputs& a, const TensorView& grad_out,
                               const TensorView& grad_qkv, const TensorView& grad_bias,
                               const TensorView& grad_pad_qkv) {
    const WindowAttentionSizes s = checked_sizes(a);
    const Dtype sums = computed(a.qkv.dtype);
    check_map(s, grad_out, "grad_out", s.channels, a.qkv.dtype, /*written=*/false);
    if (grad_qkv.given()) check_map(s, grad_qkv, "grad_qkv", 3 * s.channels, a.qkv.dtype, /*written=*/true);
    check_contiguous(grad_bias, "grad_bias", {a.bias.sizes[0], s.heads}, sums, /*may_be_missing=*/true);
    check_contiguous(grad_pad_qkv, "grad_pad_qkv", {3 * s.channels}, sums, /*may_be_missing=*/true);
    with_element(a.qkv.dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = typename Computed<Element>::Real;
        backward(WindowAttentionBackward<Element>{
            s, data<const Element>(grad_out), strides_of(grad_out), data<const Element>(a.qkv),
            strides_of(a.qkv), data<const Real>(a.bias), data<const Element>(a.pad_qkv),
            data<Element>(grad_qkv), strides_of(grad_qkv), data<Real>(grad_bias), data<Real>(grad_pad_qkv)});
    });
}

}  // namespace magnet_fast
