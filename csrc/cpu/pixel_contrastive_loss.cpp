// One image: its pixels are sorted by side, inside first, and packed in blocks; pairs of blocks i <= j, half
// of the similarity matrix, are all that is computed, a tile at a time. Each serves the rows of both blocks.
#include "cpu/pixel_contrastive_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpu/launch.h"
#include "cpu/pixel_contrastive_kernel.h"
#include "cpu/pixel_contrastive_schedule.h"

namespace magnet_fast {

namespace {

/// With one shift for the whole image a sum may be as small as e^-40 of what a sum is otherwise.
constexpr double kSharedRange = 40;
constexpr double kEps = 1e-6;  // the reference's, under which a norm does not fall

/// Sizes of a call, checked together with its inputs.
PixelContrastiveSizes checked_sizes(const PixelContrastiveInputs& a) {
    check_dtype(a.features, "features");
    check_tensor(a.features, "features", 3, a.features.dtype);
    const PixelContrastiveSizes s{a.features.sizes[0], a.features.sizes[1], a.features.sizes[2],
                                  a.temperature,       a.normalize,         a.threads};
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    for (const int64_t size : {s.pixels, s.channels})
        require(size > 0 && size <= kMost, "features", "1 .. 2^31 - 1 pixels and channels", size);
    require(s.batch <= kMost, "features", "a batch of 0 .. 2^31 - 1", s.batch);
    require(s.threads > 0 && s.threads <= 4096, "threads", "1 .. 4096", s.threads);
    // Room for the rounding up of both.
    const int64_t room = std::numeric_limits<int64_t>::max() / 16 / (s.pixels + 2 * kPixelBlock);
    require(s.channels + 64 <= room / std::max<int64_t>(1, s.batch), "features",
            "batch * pixels * channels numbers to be addressable", s.batch);
    if (!(s.temperature > 0) || !std::isfinite(s.temperature))
        throw std::invalid_argument("temperature: expected a finite number above 0, got " +
                                    std::to_string(s.temperature));
    check_contiguous(a.inside, "inside", {s.batch, s.pixels}, Dtype::kBool);
    return s;
}

/// Uninitialised memory for `count` numbers at a 64-byte boundary. Not by aligned operator new: glibc then
/// leaves a block that the forward pass freed unused by the backward pass, and the peak is a third higher.
template <typename Real>
class Numbers {
  public:
    explicit Numbers(int64_t count) : memory_(new unsigned char[count * sizeof(Real) + kAlignment]) {
        const uintptr_t address = reinterpret_cast<uintptr_t>(memory_.get());
        first_ = reinterpret_cast<Real*>((address + kAlignment - 1) / kAlignment * kAlignment);
    }
    Real* get() const { return first_; }
    Real* operator+(int64_t offset) const { return first_ + offset; }
    Real& operator[](int64_t i) const { return first_[i]; }

  private:
    static constexpr uintptr_t kAlignment = 64;
    std::unique_ptr<unsigned char[]> memory_;
    Real* first_;
};

/// What one thread works with.
template <typename Real>
struct Worker {
    explicit Worker(int64_t channels)
        : columns(channels * kPixelBlock), scratch((kPixelBlock + 3) * kPixelBlock) {}
    Numbers<Real> columns, scratch;  // a block packed as columns, and what a kernel asks for
};

/// The working memory for one image at a time, and what is done with it. Arrays over pixels are in slots:
/// kPixelBlock for every block, those of the inside first.
template <typename Element>
class Image {
  public:
    using Real = typename Computed<Element>::Real;

    Image(const PixelContrastiveSizes& sizes, const FeatureStrides& strides, int64_t team, bool backward)
        : sizes_(sizes),
          strides_(strides),
          team_(static_cast<int>(team)),
          backward_(backward),
          most_slots_((sizes.pixels / kPixelBlock + 2) * kPixelBlock),
          wide_(kernels_.row_floats(sizes.channels)),
          order_(most_slots_),
          columns_(most_slots_ * wide_),
          z_(backward ? most_slots_ * wide_ : 0),
          norm_(most_slots_),
          square_(most_slots_) {
        blocks_.reserve(most_slots_ / kPixelBlock);  // the threads must not allocate
        for (int side = 0; side < 2; ++side) {
            sum_.emplace_back(most_slots_);
            most_.emplace_back(most_slots_);
            factor_.emplace_back(most_slots_);
        }
        for (int64_t t = 0; t < team; ++t) workers_.emplace_back(sizes.channels);
    }

    Real loss(const Element* features, const bool* inside, Real* statistics) {
        if (!pack(features, inside)) {
            std::fill_n(statistics, kPixelStatistics * sizes_.pixels, Real{0});
            return constant();
        }
        summarise();
        each_statistic([&](Real& ours, int64_t place) { statistics[place] = ours; });
        double total = 0;
        for (const Block& block : blocks_) {
            double of_block = 0;
            for (int64_t i = block.first; i < block.first + block.count; ++i) {
                // log of own + other over own.
                const Real ratio = log_ratio(i);
                of_block += ratio > 0 ? ratio + std::log1p(std::exp(-ratio)) : std::log1p(std::exp(ratio));
            }
            total += of_block / count_[block.outside];
        }
        return static_cast<Real>(total);
    }

    /// `statistics` are those that loss() wrote for the same features.
    void gradient(const Element* features, const bool* inside, const Real* statistics, Real grad_loss,
                  Element* grad) {
        if (!pack(features, inside)) {
            // All bits set are NaN in every format.
            const bool zero = constant() * grad_loss == 0;
            std::memset(static_cast<void*>(grad), zero ? 0 : 0xFF,
                        sizes_.pixels * sizes_.channels * sizeof(Element));
            return;
        }
        each_statistic([&](Real& ours, int64_t place) { ours = statistics[place]; });
        differentiate_sums();
        const Numbers<Real>& grad_z = columns_;  // the columns are no longer needed: memory is used twice
        each_block([&](const Block& block) {
            std::fill_n(grad_z + block.first * wide_, kPixelBlock * wide_, Real{0});
        });
        const auto pack_columns = [&](const Block& block, Worker<Real>& worker) {
            kernels_.to_columns(z_ + block.first * wide_, sizes_.channels, worker.columns.get());
        };
        each_pair(pack_columns, [&](const Block& row, const Block& column, Worker<Real>& worker) {
            const bool other = row.outside != column.outside;
            PixelGradients<Real> pair;
            prepare(row, column, worker, pair);
            pair.column_block = worker.columns.get();
            pair.without_itself = unit_;
            pair.row_z = z_ + row.first * wide_;
            pair.column_z = z_ + column.first * wide_;
            pair.row_factor = factor_[other] + row.first;
            pair.column_factor = factor_[other] + column.first;
            pair.row_most = most_[other] + row.first;
            pair.column_most = most_[other] + column.first;
            pair.grad_rows = grad_z + row.first * wide_;
            pair.grad_columns = grad_z + column.first * wide_;
            kernels_.gradients(pair);
        });
        const Real scale = static_cast<Real>(grad_loss / sizes_.temperature);
        each_block([&](const Block& block) {
            kernels_.unpack(rows_of(features, block), static_cast<Real>(kEps), scale,
                            z_ + block.first * wide_, norm_ + block.first, grad_z + block.first * wide_,
                            grad);
        });
    }

  private:
    struct Block {
        int64_t first, count;  // slot, and pixels
        int outside;           // 0 or 1
    };

    /// Packs every pixel, and settles the exponentials' shift. False: the loss is constant().
    bool pack(const Element* features, const bool* inside) {
        sort(inside);
        each_block([&](const Block& block) {
            Real* columns = columns_of(block);
            kernels_.pack(rows_of(features, block), static_cast<Real>(kEps), columns, norm_ + block.first,
                          square_ + block.first);
            if (backward_) kernels_.to_rows(columns, sizes_.channels, z_ + block.first * wide_);
        });
        Real least = std::numeric_limits<Real>::infinity(), most = 0;
        finite_ = true;
        unit_ = sizes_.normalize;
        for (const Block& block : blocks_)
            for (int64_t i = block.first; i < block.first + block.count; ++i) {
                least = std::min(least, square_[i]);
                most = std::max(most, square_[i]);
                finite_ = finite_ && std::isfinite(square_[i]);
                unit_ = unit_ && norm_[i] >= static_cast<Real>(kEps);
            }
        // No similarity is above the greatest of a pixel with itself, and a pixel is among its own sum.
        shift_ = static_cast<Real>(most / sizes_.temperature);
        finite_ = finite_ && std::isfinite(shift_);
        if (!finite_ || count_[0] == 0 || count_[1] == 0) return false;
        shared_ = (most - least) / sizes_.temperature <= kSharedRange;
        return true;
    }

    /// Sums over both sides for every pixel.
    void summarise() {
        for (int other = 0; other < 2; ++other) {
            std::fill_n(sum_[other].get(), most_slots_, Real{0});
            std::fill_n(most_[other].get(), most_slots_, -std::numeric_limits<Real>::infinity());
        }
        const auto nothing = [](const Block&, Worker<Real>&) {};
        each_pair(nothing, [&](const Block& row, const Block& column, Worker<Real>& worker) {
            const bool other = row.outside != column.outside;
            PixelSums<Real> pair;
            prepare(row, column, worker, pair);
            pair.row_block = columns_of(row);
            pair.column_block = columns_of(column);
            pair.row_sum = sum_[other] + row.first;
            pair.column_sum = sum_[other] + column.first;
            pair.row_most = most_[other] + row.first;
            pair.column_most = most_[other] + column.first;
            kernels_.sums(pair);
        });
    }

    /// Calls visit(number, place) for every sum and maximum and its place among the image's statistics, which
    /// are in the caller's order of pixels.
    template <typename Visit>
    void each_statistic(const Visit& visit) {
        for (const Block& block : blocks_)
            for (int64_t i = block.first; i < block.first + block.count; ++i)
                for (int other = 0; other < 2; ++other) {
                    visit(sum_[other][i], 2 * other * sizes_.pixels + order_[i]);
                    visit(most_[other][i], (2 * other + 1) * sizes_.pixels + order_[i]);
                }
    }

    /// A mask that is full or empty: 0. Features that are not finite, or whose similarities are not: NaN, as
    /// every pixel's sums hold every other pixel.
    Real constant() const { return finite_ ? Real{0} : std::numeric_limits<Real>::quiet_NaN(); }

    /// The logarithm of the other side's sum over the own side's.
    Real log_ratio(int64_t i) const {
        const Real sums = std::log(sum_[1][i] / sum_[0][i]);
        return shared_ ? sums : sums + (most_[1][i] - most_[0][i]) / static_cast<Real>(sizes_.temperature);
    }

    /// From sums to the factors of exponentials in the gradient. With r the other side's part of both sums
    /// and n the pixels of its side, the loss of pixel i falls by r / n * exp(s_ij) / own sum for j on its
    /// side and grows by r / n * exp(s_ij) / other sum for those on the other.
    void differentiate_sums() {
        for (const Block& block : blocks_)
            for (int64_t i = block.first; i < block.first + block.count; ++i) {
                const Real own = sum_[0][i], other = sum_[1][i];
                const Real weight = 1 / static_cast<Real>(count_[block.outside]);
                if (shared_) {  // the other sum may have vanished, the own one not
                    factor_[0][i] = -weight * (other / (own + other)) / own;
                    factor_[1][i] = weight / (own + other);
                } else {  // neither has
                    const Real odds = std::exp(-std::abs(log_ratio(i)));
                    const Real part = weight * (log_ratio(i) > 0 ? 1 : odds) / (1 + odds);
                    factor_[0][i] = -part / own;
                    factor_[1][i] = part / other;
                }
            }
    }

    void sort(const bool* inside) {
        count_[0] = std::count(inside, inside + sizes_.pixels, true);
        count_[1] = sizes_.pixels - count_[0];
        blocks_.clear();
        int64_t next[2] = {0, (count_[0] + kPixelBlock - 1) / kPixelBlock * kPixelBlock};
        for (int outside = 0; outside < 2; ++outside)
            for (int64_t done = 0; done < count_[outside]; done += kPixelBlock)
                blocks_.push_back(
                    {next[outside] + done, std::min(kPixelBlock, count_[outside] - done), outside});
        for (int64_t pixel = 0; pixel < sizes_.pixels; ++pixel) order_[next[!inside[pixel]]++] = pixel;
    }

    Real* columns_of(const Block& block) const { return columns_ + block.first * sizes_.channels; }

    PixelRows<Element> rows_of(const Element* features, const Block& block) const {
        return {features,    strides_.pixel,  strides_.channel, order_.data() + block.first,
                block.count, sizes_.channels, sizes_.normalize};
    }

    void prepare(const Block& row, const Block& column, const Worker<Real>& worker,
                 PixelPair<Real>& pair) const {
        pair.rows = row.count;
        pair.columns = column.count;
        pair.channels = sizes_.channels;
        pair.diagonal = row.first == column.first;
        pair.shared = shared_;
        pair.scale = static_cast<Real>(1 / sizes_.temperature);
        pair.shift = shift_;
        pair.scratch = worker.scratch.get();
    }

    template <typename Work>
    void each_block(const Work& work) {
        const int64_t count = static_cast<int64_t>(blocks_.size());
#pragma omp parallel for num_threads(team_) schedule(dynamic, 1) if (team_ > 1)
        for (int64_t b = 0; b < count; ++b) work(blocks_[b]);
    }

    /// Calls work(row, column, worker) for every pair of blocks row <= column, in an order that is the same,
    /// for each block, whatever the number of threads; before some of a column's pairs, begin(column,
    /// worker).
    template <typename Begin, typename Work>
    void each_pair(const Begin& begin, const Work& work) {
        const int64_t count = static_cast<int64_t>(blocks_.size());
        const RoundRobin rounds(count);
        for (int64_t round = 0; round < rounds.rounds(); ++round) {
#pragma omp parallel for num_threads(team_) schedule(dynamic, 1) if (team_ > 1)
            for (int64_t match = 0; match < rounds.matches(round); ++match) {
                const RoundRobin::Match m = rounds.match(round, match);
                Worker<Real>& worker = workers_[thread_index()];
                for (int64_t column = m.second.begin; column < m.second.end; ++column) {
                    begin(blocks_[column], worker);
                    // A group against itself: the pairs up to the diagonal.
                    const int64_t end = round == 0 ? column + 1 : m.first.end;
                    for (int64_t row = m.first.begin; row < end; ++row)
                        work(blocks_[row], blocks_[column], worker);
                }
            }
        }
    }

    const PixelContrastiveKernels<Element>& kernels_ = pixel_contrastive_kernels<Element>();
    const PixelContrastiveSizes& sizes_;
    const FeatureStrides& strides_;
    const int team_;
    const bool backward_;
    const int64_t most_slots_, wide_;
    std::vector<int64_t> order_;  // the pixel of every slot
    std::vector<Block> blocks_;
    int64_t count_[2];                 // pixels inside and outside
    const Numbers<Real> columns_, z_;  // all blocks, packed as columns and as rows
    const Numbers<Real> norm_, square_;
    // Over a pixel's own side [0] and over the other [1]: sums of exponentials, see PixelPair, and the
    // gradients' factors.
    std::vector<Numbers<Real>> sum_, most_, factor_;
    std::vector<Worker<Real>> workers_;
    Real shift_ = 0;
    bool shared_ = false, finite_ = true, unit_ = false;
};

/// Calls work(image, index) for every image of the batch: many at once, each on one thread, when there are
/// enough, else one after the other on all threads. The results are the same.
template <typename Element, typename Work>
void each_image(const PixelContrastiveSizes& sizes, const FeatureStrides& strides, bool backward,
                const Work& work) {
    if (sizes.batch == 0) return;
    const int64_t together = sizes.batch >= sizes.threads ? sizes.threads : 1;
    std::vector<std::unique_ptr<Image<Element>>> images;
    for (int64_t t = 0; t < together; ++t)
        images.push_back(
            std::make_unique<Image<Element>>(sizes, strides, together > 1 ? 1 : sizes.threads, backward));
#pragma omp parallel for num_threads(static_cast<int>(together)) schedule(dynamic, 1) if (together > 1)
    for (int64_t b = 0; b < sizes.batch; ++b) work(*images[thread_index()], b);
}

FeatureStrides strides_of(const TensorView& features) {
    return {features.strides[0], features.strides[1], features.strides[2]};
}

}  // namespace

void pixel_contrastive_forward(const PixelContrastiveInputs& a, const TensorView& loss,
                               const TensorView& statistics) {
    const PixelContrastiveSizes s = checked_sizes(a);
    const FeatureStrides strides = strides_of(a.features);
    const Dtype results = computed(a.features.dtype);
    check_contiguous(loss, "loss", {s.batch}, results);
    check_contiguous(statistics, "statistics", {s.batch, kPixelStatistics, s.pixels}, results);
    with_element(a.features.dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = typename Computed<Element>::Real;
        each_image<Element>(s, strides, false, [&](Image<Element>& image, int64_t b) {
            static_cast<Real*>(loss.data)[b] =
                image.loss(static_cast<const Element*>(a.features.data) + b * strides.batch,
                           static_cast<const bool*>(a.inside.data) + b * s.pixels,
                           static_cast<Real*>(statistics.data) + b * kPixelStatistics * s.pixels);
        });
    });
}

void pixel_contrastive_backward(const PixelContrastiveInputs& a, const TensorView& grad_loss,
                                const TensorView& statistics, const TensorView& grad_features) {
    const PixelContrastiveSizes s = checked_sizes(a);
    const FeatureStrides strides = strides_of(a.features);
    const Dtype results = computed(a.features.dtype);
    check_contiguous(grad_loss, "grad_loss", {s.batch}, results);
    check_contiguous(statistics, "statistics", {s.batch, kPixelStatistics, s.pixels}, results);
    check_contiguous(grad_features, "grad_features", {s.batch, s.pixels, s.channels}, a.features.dtype);
    with_element(a.features.dtype, [&](auto element) {
        using Element = decltype(element);
        using Real = typename Computed<Element>::Real;
        each_image<Element>(s, strides, true, [&](Image<Element>& image, int64_t b) {
            image.gradient(static_cast<const Element*>(a.features.data) + b * strides.batch,
                           static_cast<const bool*>(a.inside.data) + b * s.pixels,
                           static_cast<const Real*>(statistics.data) + b * kPixelStatistics * s.pixels,
                           static_cast<const Real*>(grad_loss.data)[b],
                           static_cast<Element*>(grad_features.data) + b * s.pixels * s.channels);
        });
    });
}

}  // namespace magnet_fast
