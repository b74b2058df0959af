// Work shared between threads, and features brought into the layout that is sampled: channels of a cell contiguous.
#pragma once

#include "cpu/numbers.h"

namespace refinedet {
namespace {

// Hands out the numbers 0, 1, ... to the threads.
class Counter {
 public:
  int64_t next() { return __atomic_fetch_add(&value_, 1, __ATOMIC_RELAXED); }

 private:
  int64_t value_ = 0;
};

// Calls body(worker) on every worker, each of which takes its work from a shared Counter.
template <typename Body>
void run_parallel(const AlignConvProblem& problem, const Body& body) {
  problem.parallel(
      problem.num_workers, [](int worker, void* context) { (*static_cast<const Body*>(context))(worker); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

template <typename T>
T* allocate(const AlignConvProblem& problem, int64_t count) {
  return static_cast<T*>(problem.allocate(problem.arena, count * static_cast<int64_t>(sizeof(T))));
}

inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// One row of cells of one image, [F, W] -> [W, F]; a cache line of channels at a time, so that lines are written whole.
template <typename S>
void copy_row(const AlignConvProblem& problem, const AlignConvLevel& level, int64_t image, int64_t y) {
  constexpr int64_t kLine = 64 / sizeof(S);
  const S* from = static_cast<const S*>(level.cells) + image * level.image_step + y * level.row_step;
  S* to = static_cast<S*>(level.copy) + (image * level.height + y) * level.width * problem.channels;
  for (int64_t begin = 0; begin < problem.channels; begin += kLine) {
    const int64_t count = minimum(kLine, problem.channels - begin);
    const S* line = from + begin * level.channel_step;
    for (int64_t x = 0; x < level.width; ++x) {
      const S* cell = line + x * level.column_step;
      S* channels = to + x * problem.channels + begin;
      if (count == kLine) {
#pragma GCC unroll 32
        for (int64_t f = 0; f < kLine; ++f) channels[f] = cell[f * level.channel_step];
      } else {
        for (int64_t f = 0; f < count; ++f) channels[f] = cell[f * level.channel_step];
      }
    }
  }
}

template <typename S>
void copy_cells(AlignConvProblem& problem) {
  int64_t num_rows = 0;
  for (int l = 0; l < problem.num_levels; ++l) {
    if (problem.levels[l].copy != nullptr) num_rows += problem.batch * problem.levels[l].height;
  }
  if (num_rows == 0) return;
  Counter counter;
  run_parallel(problem, [&](int) {
    for (int64_t task; (task = counter.next()) < num_rows;) {
      int l = 0;
      for (;; ++l) {
        const int64_t rows = problem.levels[l].copy != nullptr ? problem.batch * problem.levels[l].height : 0;
        if (task < rows) break;
        task -= rows;
      }
      copy_row<S>(problem, problem.levels[l], task / problem.levels[l].height, task % problem.levels[l].height);
    }
  });
  for (int l = 0; l < problem.num_levels; ++l) {
    AlignConvLevel& level = problem.levels[l];
    if (level.copy == nullptr) continue;
    level.cells = level.copy;
    level.channel_step = 1;
    level.column_step = problem.channels;
    level.row_step = level.width * level.column_step;
    level.image_step = level.height * level.row_step;
  }
}

}  // namespace
}  // namespace refinedet
