// How a map falls into windows: which windows look alike, and which tokens of a window attend to each other.
//
// Along each axis, windows with the same pattern of padding and regions form a class (there are at most
// three: inner windows, and one or two at the end). A class of windows is a pair of axis classes; its groups,
// biases and amount of work are the same for every window in it, so the N x N bias is gathered once per head
// and class instead of once per window.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "cpu/launch.h"
#include "cpu/window_attention.h"
#include "cpu/window_kernel.h"

namespace magnet_fast {

struct Token {
    int64_t y, x;  // place inside the window
};

/// Tokens of a window that attend to each other (one shift region of it).
struct Group {
    std::vector<Token> tokens;      // real tokens, row by row
    std::vector<int64_t> places;    // the tokens as queries: where in the reversed bias table
    std::vector<BiasRun> runs;      // the tokens as keys: neighbours of a window row read forwards in it
    std::vector<BiasRun> pad_runs;  // padded tokens as keys
    int64_t pads = 0;
    int64_t keys() const { return static_cast<int64_t>(tokens.size()) + (pads > 0); }
};

struct WindowClass {
    std::vector<int64_t> rows, columns;  // window indices along each axis; the class is their product
    std::vector<Group> groups;
    int64_t windows() const { return static_cast<int64_t>(rows.size() * columns.size()); }
};

/// A piece of work with its own partial sums: `heads` heads of windows [begin, end) of a class, over the
/// batch. Neighbouring heads lie side by side in memory, and so are done one after the other.
struct Task {
    int64_t first_head, heads, window_class, begin, end;
};

struct WindowPlan {
    explicit WindowPlan(const WindowAttentionSizes& sizes);

    std::vector<int64_t> source_y, source_x;  // source coordinate of every shifted coordinate, -1: padding
    std::vector<WindowClass> classes;
    std::vector<Task> tasks;  // ordered by heads; the cut does not depend on the number of threads
    int64_t max_tokens = 0;   // of any group
    int64_t max_heads = 0;    // of any task
};

/// The bias of one head, for the groups of one class of windows, in units of the scale (see window_kernel.h).
template <typename Real>
class GroupBias {
  public:
    GroupBias(const WindowAttentionSizes& sizes, const WindowPlan& plan,
              const WindowBiasKernels<Real>& kernels);

    /// Gathers the biases of `head` for a class from `table` (WindowAttentionInputs::bias), unless loaded.
    void load(const Real* table, int64_t head, int64_t window_class);

    /// (tokens, row(group)) biases of a group of the loaded class; lanes past its keys hold -infinity.
    const Real* values(int64_t group) const { return values_.get() + offsets_[group]; }
    int64_t row(int64_t group) const { return rows_[group]; }
    /// Numbers of the largest class, in whole cache lines.
    int64_t capacity() const { return capacity_; }
    /// Numbers of all groups of the loaded class together.
    int64_t size() const { return offsets_.back(); }
    int64_t offset(int64_t group) const { return offsets_[group]; }

    /// table_gradient (table_size(), in the reversed order) += the gradients (size()) of the loaded class's
    /// biases.
    void scatter(const Real* gradients, Real* table_gradient);

    int64_t table_size() const { return table_h_ * table_w_; }
    /// Place in the reversed table of row `index` of the caller's bias table.
    int64_t reversed(int64_t index) const {
        return index / table_w_ * table_w_ + (table_w_ - 1 - index % table_w_);
    }

  private:
    void gather(const Group& group, const std::vector<BiasRun>& runs, int64_t columns, Real* to) const;

    const WindowAttentionSizes& sizes_;
    const WindowPlan& plan_;
    const WindowBiasKernels<Real>& kernels_;
    int64_t table_h_, table_w_;
    int64_t head_ = -1, window_class_ = -1;
    std::vector<Real> table_;  // one head's biases, columns reversed: a run of keys then reads forwards
    AlignedNumbers<Real> values_;
    int64_t capacity_ = 0;
    std::vector<Real> pads_;
    std::vector<int64_t> offsets_, rows_;
};

}  // namespace magnet_fast
