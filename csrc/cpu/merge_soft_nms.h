// Soft-NMS for one instruction set. Boxes that lie close together share a block of kWidth; a block whose bounds a box
// does not reach is not looked into, and the best box is found from the blocks' best scores.
//
// Gaussian: a box's score is its first one times exp(-sum of overlap^2 / sigma) over the boxes taken. Scores only fall,
// so the sums are kept, and a block's scores are computed when an old one of them is the best of all: few exponentials
// instead of one a pair. Internal linkage, as in merge_kernels.h.
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
  enum { kX1, kY1, kX2, kY2, kArea, kScore, kFirstScore, kSum, kNumColumns };  // the last two: Gaussian
  float values[kNumColumns][kWidth];

  Floats operator[](int column) const { return load(values[column]); }
};

// Where the boxes of kWidth blocks lie.
struct alignas(REFINEDET_VECTOR_BYTES) Bounds {
  float low[2][kWidth], high[2][kWidth];

  void clear(int64_t lane) {
    for (int c = 0; c < 2; ++c) {
      low[c][lane] = FLT_MAX;
      high[c][lane] = -FLT_MAX;
    }
  }
};

class Blocks {
  static constexpr int64_t kVectorsInWord = 64 / kWidth;  // vectors of blocks whose bits fill a word
  static constexpr float kRenewed = 0.95f;

 public:
  explicit Blocks(int64_t capacity)
      : ids_(capacity + kWidth),
        blocks_(capacity / kWidth + 1),
        bounds_(capacity / (kWidth * kWidth) + 1),
        tops_(capacity / kWidth + kWidth + 1),
        stale_(capacity / (64 * kWidth) + 2) {}

  int64_t size() const { return size_; }
  int64_t id(int64_t i) { return ids_[i]; }
  float score(int64_t i) { return value(i, Block::kScore); }

  void append(const float* box, float score, int64_t id, float one) {
    for (int c = 0; c < 4; ++c) value(size_, c) = box[c];
    value(size_, Block::kArea) = (box[2] - box[0] + one) * (box[3] - box[1] + one);
    value(size_, Block::kScore) = value(size_, Block::kFirstScore) = score;
    value(size_, Block::kSum) = 0;
    ids_[size_++] = id;
  }

  // Close the ranks of the boxes that are left.
  void compact(const MergeRule& rule) {
    renew_from(kGone, rule);
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
    num_vectors_ = (num_blocks_ + kWidth - 1) / kWidth;
    for (int64_t block = 0; block < num_vectors_ * kWidth; ++block) clear(block);
    for (int64_t word = 0; word <= num_blocks_ / 64; ++word) stale_[word] = 0;
    for (int64_t i = 0; i < size_; ++i) {
      const int64_t block = i / kWidth, lane = block % kWidth;
      Bounds& bounds = bounds_[block / kWidth];
      for (int c = 0; c < 2; ++c) {
        bounds.low[c][lane] = std::min(bounds.low[c][lane], value(i, c));
        bounds.high[c][lane] = std::max(bounds.high[c][lane], value(i, c + 2));
      }
      tops_[block] = std::max(tops_[block], score(i));
    }
  }

  // The box with the best score, of equal ones the first of the input; -1 where none is left.
  template <bool gaussian>
  int64_t find_best(const MergeRule& rule) {
    for (;;) {
      Floats most = load(tops_.get()), more = most;
      for (int64_t v = 1; v + 1 < num_vectors_; v += 2) {
        most = vmax(most, load(tops_.get() + v * kWidth));
        more = vmax(more, load(tops_.get() + (v + 1) * kWidth));
      }
      most = vmax(vmax(most, more), load(tops_.get() + (num_vectors_ - 1) * kWidth));
      const float top = largest(most);
      if (top == kGone) return -1;
      if constexpr (gaussian) {
        // Those that may be next are computed with it: one after the other, each would wait for the one before.
        if (renew_from(std::min(top, top * kRenewed), rule)) continue;
      }
      int64_t best = -1;
      for (int64_t v = 0; v < num_vectors_; v += kVectorsInWord) {
        for (uint64_t found = blocks_where(v, [top](Floats tops) { return tops == fill(top); }); found;
             found &= found - 1) {
          const int64_t block = v * kWidth + __builtin_ctzll(found);
          for (unsigned same = signs(blocks_[block][Block::kScore] == fill(top)); same; same &= same - 1) {
            const int64_t i = block * kWidth + __builtin_ctz(same);
            if (best < 0 || ids_[i] < ids_[best]) best = i;
          }
        }
      }
      return best;
    }
  }

  void take(int64_t i) {
    ++num_gone_;
    value(i, Block::kScore) = kGone;
    update(i / kWidth, blocks_[i / kWidth][Block::kScore]);
  }

  // Lower the scores of the boxes that overlap box `i`.
  template <bool gaussian>
  void lower(int64_t i, const MergeRule& rule) {
    const First first(value(i, 0), value(i, 1), value(i, 2), value(i, 3), value(i, Block::kArea),
                      rule.plus_one ? 1.0f : 0.0f);
    for (int64_t v = 0; v < num_vectors_; v += kVectorsInWord) {
      uint64_t near = 0, grown = 0;
      for (int64_t k = 0; k < std::min(kVectorsInWord, num_vectors_ - v); ++k) {
        near |= static_cast<uint64_t>(find_near(bounds_[v + k], first)) << (k * kWidth);
      }
      for (; near; near &= near - 1) {
        const int64_t bit = __builtin_ctzll(near), block = v * kWidth + bit;
        if constexpr (gaussian) {
          grown |= static_cast<uint64_t>(add_overlaps(block, first)) << bit;
        } else {
          lower_linear(block, first, rule);
        }
      }
      stale_[v / kVectorsInWord] |= grown;
    }
  }

  int64_t num_gone() const { return num_gone_; }

 private:
  float& value(int64_t i, int column) { return blocks_[i / kWidth].values[column][i % kWidth]; }

  void clear(int64_t block) {
    bounds_[block / kWidth].clear(block % kWidth);
    tops_[block] = kGone;
  }

  void update(int64_t block, Floats scores) {
    const float top = largest(scores);
    if (top == kGone) return clear(block);
    tops_[block] = top;
  }

  // Bit k: the best score of block v * kWidth + k is so; of as many blocks as a word has bits.
  template <typename Test>
  uint64_t blocks_where(int64_t v, const Test& test) {
    uint64_t found = 0;
    for (int64_t k = 0; k < std::min(kVectorsInWord, num_vectors_ - v); ++k) {
      found |= static_cast<uint64_t>(signs(test(load(tops_.get() + (v + k) * kWidth)))) << (k * kWidth);
    }
    return found;
  }

  // Compute the scores of blocks whose sums have grown and whose best score was `from` or more; whether there were any.
  bool renew_from(float from, const MergeRule& rule) {
    bool any = false;
    for (int64_t v = 0; v < num_vectors_; v += kVectorsInWord) {
      uint64_t& stale = stale_[v / kVectorsInWord];
      if (!stale) continue;
      const uint64_t chosen = stale & blocks_where(v, [from](Floats tops) { return tops >= fill(from); });
      stale &= ~chosen;
      any |= chosen != 0;
      for (uint64_t left = chosen; left; left &= left - 1) renew_scores(v * kWidth + __builtin_ctzll(left), rule);
    }
    return any;
  }

  // Bit k: a box of block k may overlap `first`.
  static unsigned find_near(const Bounds& bounds, const First& first) {
    const Floats zero{};
    const Floats width = vmin(load(bounds.high[0]), first.x2) - vmax(load(bounds.low[0]), first.x1) + first.one;
    const Floats height = vmin(load(bounds.high[1]), first.y2) - vmax(load(bounds.low[1]), first.y1) + first.one;
    return signs((width > zero) & (height > zero));
  }

  // Whether any of the block's boxes overlaps `first`.
  bool add_overlaps(int64_t index, const First& first) {
    Block& block = blocks_[index];
    const Floats overlaps =
        overlap(block[Block::kX1], block[Block::kY1], block[Block::kX2], block[Block::kY2], block[Block::kArea], first);
    store(block.values[Block::kSum], block[Block::kSum] + overlaps * overlaps);
    return signs(overlaps > Floats{}) != 0;
  }

  void renew_scores(int64_t index, const MergeRule& rule) {
    const Block& block = blocks_[index];
    set_scores(index, block[Block::kFirstScore] * exp_negative(block[Block::kSum] * fill(1.0f / rule.sigma)), rule);
  }

  void lower_linear(int64_t index, const First& first, const MergeRule& rule) {
    const Block& block = blocks_[index];
    const Floats overlaps =
        overlap(block[Block::kX1], block[Block::kY1], block[Block::kX2], block[Block::kY2], block[Block::kArea], first);
    const Ints meets = overlaps > fill(rule.iou);
    if (!signs(meets)) return;
    const Floats score = block[Block::kScore];
    set_scores(index, meets ? score * (fill(1.0f) - overlaps) : score, rule);
  }

  // Those that fell below the threshold are gone.
  void set_scores(int64_t index, Floats lowered, const MergeRule& rule) {
    Block& block = blocks_[index];
    const Floats lowest = fill(rule.score_threshold);
    const Ints live = block[Block::kScore] > fill(kGone), stays = live & (lowered >= lowest);
    const Floats updated = stays ? lowered : fill(kGone);
    store(block.values[Block::kScore], updated);
    update(index, updated);
    num_gone_ += __builtin_popcount(signs(live)) - __builtin_popcount(signs(stays));
  }

  int64_t size_ = 0, num_blocks_ = 0, num_vectors_ = 0, num_gone_ = 0;
  Buffer<int64_t> ids_;
  Buffer<Block> blocks_;
  Buffer<Bounds> bounds_;
  Buffer<float> tops_;      // of every block the best score, in whole vectors
  Buffer<uint64_t> stale_;  // bit k of word w: sums of block 64 w + k have grown since its scores were computed
};

int64_t soft_nms(const MergeGroup& group, const MergeRule& rule, const MergeOutput& output) {
  Blocks left(group.count);
  Buffer<int64_t> order(group.count);
  const int64_t num_left = sort_by_place(group, rule.score_threshold, order.get());
  int64_t count = 0;
  for (int64_t i = 0; i < num_left; ++i) {
    const int64_t member = group.members[order[i]];
    left.append(group.boxes + 4 * member, group.scores[member], member, rule.plus_one ? 1.0f : 0.0f);
  }
  for (int64_t size = num_left; size > 0; size = left.size()) {
    left.summarize();
    const int64_t few = size > 4 * kWidth ? size / 2 : 0;
    while (num_left - left.num_gone() > few) {
      const int64_t best = (rule.gaussian ? left.find_best<true>(rule) : left.find_best<false>(rule));
      if (best < 0) return count;
      output.index[count] = left.id(best);
      output.scores[count++] = left.score(best);
      left.take(best);
      rule.gaussian ? left.lower<true>(best, rule) : left.lower<false>(best, rule);
    }
    left.compact(rule);
  }
  return count;
}

}  // namespace
}  // namespace refinedet
