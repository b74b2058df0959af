// Soft-NMS for one instruction set. Boxes that lie close together share a block of kWidth; a block whose bounds a box
// does not reach is not looked into, and the best box is found from the blocks' best scores. Internal linkage, as in
// merge_kernels.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "cpu/merge.h"
#include "cpu/merge_columns.h"
#include "cpu/merge_vector.h"

namespace refinedet {
namespace {

// The members at or above the threshold, sorted by the cell of a 16 x 16 grid that holds their centre, along a Z curve:
// positions in the group go to `order`. Returns how many.
int64_t sort_by_place(const MergeGroup& group, float score_threshold, int64_t* order) {
  constexpr int kGrid = 16;
  Buffer<int64_t> chosen(group.count);
  int64_t count = 0;
  float low[2] = {FLT_MAX, FLT_MAX}, high[2] = {-FLT_MAX, -FLT_MAX};
  for (int64_t i = 0; i < group.count; ++i) {
    if (!(group.scores[group.members[i]] >= score_threshold)) continue;
    chosen[count++] = i;
    const float* box = group.boxes + 4 * group.members[i];
    for (int c = 0; c < 2; ++c) {
      low[c] = std::min(low[c], box[c] + box[c + 2]);
      high[c] = std::max(high[c], box[c] + box[c + 2]);
    }
  }
  const float scale[2] = {kGrid / std::max(high[0] - low[0], 1e-6f), kGrid / std::max(high[1] - low[1], 1e-6f)};
  constexpr int kSpread[kGrid] = {0, 1, 4, 5, 16, 17, 20, 21, 64, 65, 68, 69, 80, 81, 84, 85};  // bits two apart
  Buffer<uint8_t> cells(count);
  int64_t place[kGrid * kGrid + 1] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float* box = group.boxes + 4 * group.members[chosen[i]];
    int cell = 0;
    for (int c = 0; c < 2; ++c) {
      const float at = (box[c] + box[c + 2] - low[c]) * scale[c];
      const int step = at < kGrid - 1.0f ? static_cast<int>(at) : kGrid - 1;  // also where sides overflowed to NaN
      cell |= kSpread[step] << c;
    }
    cells[i] = static_cast<uint8_t>(cell);
    ++place[cell + 1];
  }
  for (int cell = 0; cell < kGrid * kGrid; ++cell) place[cell + 1] += place[cell];
  for (int64_t i = 0; i < count; ++i) order[place[cells[i]]++] = chosen[i];
  return count;
}

struct alignas(REFINEDET_VECTOR_BYTES) Block {
  enum { kX1, kY1, kX2, kY2, kArea, kScore, kNumColumns };
  float values[kNumColumns][kWidth];

  Floats operator[](int column) const { return load(values[column]); }
};

// What is known of kWidth blocks without looking into them: where their boxes lie, and their best scores.
struct alignas(REFINEDET_VECTOR_BYTES) Summary {
  float low[2][kWidth], high[2][kWidth], top[kWidth];

  void clear(int64_t lane) {
    for (int c = 0; c < 2; ++c) {
      low[c][lane] = FLT_MAX;
      high[c][lane] = -FLT_MAX;
    }
    top[lane] = kGone;
  }
};

class Blocks {
 public:
  explicit Blocks(int64_t capacity)
      : ids_(capacity + kWidth), blocks_(capacity / kWidth + 1), summaries_(capacity / (kWidth * kWidth) + 1) {}

  int64_t size() const { return size_; }
  int64_t id(int64_t i) { return ids_[i]; }
  float score(int64_t i) { return value(i, Block::kScore); }

  void append(const float* box, float score, int64_t id, float one) {
    for (int c = 0; c < 4; ++c) value(size_, c) = box[c];
    value(size_, Block::kArea) = (box[2] - box[0] + one) * (box[3] - box[1] + one);
    value(size_, Block::kScore) = score;
    ids_[size_++] = id;
  }

  // Close the ranks of the boxes that are left.
  void compact() {
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
      if (score(i) == kGone) continue;
      for (int c = 0; c < Block::kNumColumns; ++c) value(kept, c) = value(i, c);
      ids_[kept++] = ids_[i];
    }
    size_ = kept;
  }

  // To be called after boxes were appended, or moved.
  void summarize() {
    num_blocks_ = (size_ + kWidth - 1) / kWidth;
    for (int64_t i = size_; i < num_blocks_ * kWidth; ++i) {
      for (int c = 0; c < Block::kNumColumns; ++c) value(i, c) = 0;
      value(i, Block::kScore) = kGone;
    }
    num_summaries_ = (num_blocks_ + kWidth - 1) / kWidth;
    for (int64_t block = 0; block < num_summaries_ * kWidth; ++block) summaries_[block / kWidth].clear(block % kWidth);
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t block = i / kWidth, lane = block % kWidth;
      Summary& summary = summaries_[block / kWidth];
      for (int c = 0; c < 2; ++c) {
        summary.low[c][lane] = std::min(summary.low[c][lane], value(i, c));
        summary.high[c][lane] = std::max(summary.high[c][lane], value(i, c + 2));
      }
      summary.top[lane] = std::max(summary.top[lane], score(i));
    }
  }

  // The box with the best score, of equal ones the first of the input; there must be one left.
  int64_t find_best() {
    Floats most = fill(kGone);
    for (int64_t s = 0; s < num_summaries_; ++s) most = vmax(most, load(summaries_[s].top));
    const Floats wanted = fill(largest(most));
    int64_t best = -1;
    for (int64_t s = 0; s < num_summaries_; ++s) {
      for (unsigned found = signs(load(summaries_[s].top) == wanted); found; found &= found - 1) {
        const int64_t block = s * kWidth + __builtin_ctz(found);
        for (unsigned same = signs(blocks_[block][Block::kScore] == wanted); same; same &= same - 1) {
          const int64_t i = block * kWidth + __builtin_ctz(same);
          if (best < 0 || ids_[i] < ids_[best]) best = i;
        }
      }
    }
    return best;
  }

  void take(int64_t i) {
    value(i, Block::kScore) = kGone;
    update(i / kWidth, blocks_[i / kWidth][Block::kScore]);
  }

  // Lower the scores of the boxes that overlap box `i`; returns how many fell below the threshold.
  int64_t lower(int64_t i, const MergeRule& rule) {
    const First first(value(i, 0), value(i, 1), value(i, 2), value(i, 3), value(i, Block::kArea),
                      rule.plus_one ? 1.0f : 0.0f);
    constexpr int64_t kAtOnce = 64 / kWidth;  // summaries whose blocks' bits fill a word
    int64_t num_dropped = 0;
    for (int64_t s = 0; s < num_summaries_; s += kAtOnce) {
      uint64_t near = 0;
      for (int64_t k = 0; k < std::min(kAtOnce, num_summaries_ - s); ++k) {
        near |= static_cast<uint64_t>(find_near(summaries_[s + k], first)) << (k * kWidth);
      }
      for (; near; near &= near - 1) num_dropped += lower_block(s * kWidth + __builtin_ctzll(near), first, rule);
    }
    return num_dropped;
  }

 private:
  float& value(int64_t i, int column) { return blocks_[i / kWidth].values[column][i % kWidth]; }

  void update(int64_t block, Floats scores) {
    const float top = largest(scores);
    Summary& summary = summaries_[block / kWidth];
    if (top == kGone) return summary.clear(block % kWidth);
    summary.top[block % kWidth] = top;
  }

  // Bit k: a box of the summary's block k may overlap `first`.
  static unsigned find_near(const Summary& summary, const First& first) {
    const Floats zero{};
    const Floats width = vmin(load(summary.high[0]), first.x2) - vmax(load(summary.low[0]), first.x1) + first.one;
    const Floats height = vmin(load(summary.high[1]), first.y2) - vmax(load(summary.low[1]), first.y1) + first.one;
    return signs((width > zero) & (height > zero));
  }

  int lower_block(int64_t index, const First& first, const MergeRule& rule) {
    Block& block = blocks_[index];
    const Floats overlaps =
        overlap(block[Block::kX1], block[Block::kY1], block[Block::kX2], block[Block::kY2], block[Block::kArea], first);
    const Floats score = block[Block::kScore];
    Floats lowered;
    if (rule.gaussian) {
      lowered = score * exp_negative(overlaps * overlaps * fill(1.0f / rule.sigma));
    } else {
      const Ints meets = overlaps > fill(rule.iou);
      if (!signs(meets)) return 0;
      lowered = meets ? score * (fill(1.0f) - overlaps) : score;
    }
    const Floats lowest = fill(rule.score_threshold);
    const Ints live = score >= lowest, stays = live & (lowered >= lowest);
    const Floats updated = stays ? lowered : fill(kGone);
    store(block.values[Block::kScore], updated);
    update(index, updated);
    return __builtin_popcount(signs(live)) - __builtin_popcount(signs(stays));
  }

  int64_t size_ = 0, num_blocks_ = 0, num_summaries_ = 0;
  Buffer<int64_t> ids_;
  Buffer<Block> blocks_;
  Buffer<Summary> summaries_;
};

int64_t soft_nms(const MergeGroup& group, const MergeRule& rule, const MergeOutput& output) {
  Blocks left(group.count);
  Buffer<int64_t> order(group.count);
  int64_t num_left = sort_by_place(group, rule.score_threshold, order.get()), count = 0;
  for (int64_t i = 0; i < num_left; ++i) {
    const int64_t member = group.members[order[i]];
    left.append(group.boxes + 4 * member, group.scores[member], member, rule.plus_one ? 1.0f : 0.0f);
  }
  while (num_left > 0) {
    left.summarize();
    const int64_t few = left.size() > 4 * kWidth ? left.size() / 2 : 0;
    while (num_left > few) {
      const int64_t best = left.find_best();
      output.index[count] = left.id(best);
      output.scores[count++] = left.score(best);
      left.take(best);
      num_left -= 1 + left.lower(best, rule);
    }
    left.compact();
  }
  return count;
}

}  // namespace
}  // namespace refinedet
