// The order in which pairs of blocks are treated: like the matches of a tournament.
#pragma once

#include <algorithm>
#include <cstdint>

namespace magnet_fast {

/// Blocks are cut into groups. In round 0 every group meets itself, and in each round after that no group
/// appears in two matches: the matches of a round can write to their groups' rows at the same time, without
/// copies, and what reaches a row arrives round by round, in one order however many threads there are.
class RoundRobin {
  public:
    struct Range {
        int64_t begin, end;  // blocks
    };
    struct Match {
        Range first, second;
    };

    explicit RoundRobin(int64_t blocks)
        : blocks_(blocks),
          groups_(std::min(blocks, std::clamp<int64_t>(blocks / 4, kFewest, kMost))),
          seats_(groups_ + groups_ % 2) {}

    int64_t rounds() const { return groups_ > 1 ? seats_ : 1; }
    int64_t matches(int64_t round) const { return round == 0 ? groups_ : seats_ / 2; }

    /// Empty ranges where a group has nobody to meet.
    Match match(int64_t round, int64_t index) const {
        if (round == 0) return {group(index), group(index)};
        // All but the last seat turn by one place a round; opposite seats meet.
        const int64_t circle = seats_ - 1, turn = round - 1;
        const int64_t one = index == 0 ? circle : (turn + index) % circle;
        const int64_t two = (turn - index + circle) % circle;
        return {group(std::min(one, two)), group(std::max(one, two))};
    }

  private:
    // Enough for some threads, and few enough that a block once transposed serves some pairs.
    static constexpr int64_t kFewest = 8, kMost = 32;

    Range group(int64_t index) const {
        if (index >= groups_) return {0, 0};
        return {blocks_ * index / groups_, blocks_ * (index + 1) / groups_};
    }

    int64_t blocks_, groups_, seats_;
};

}  // namespace magnet_fast
