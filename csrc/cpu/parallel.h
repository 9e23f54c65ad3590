// Splitting an op over threads: the only part that knows them. A result does not depend on the split, because a range
// that begins at a multiple of 64 coordinates can be worked on alone, and counts add up.
#ifndef SIGNVOTE_CPU_PARALLEL_H
#define SIGNVOTE_CPU_PARALLEL_H

#include <stddef.h>

#include <algorithm>
#include <atomic>

namespace signvote {

// How numel coordinates are split: ranges of `step`, a multiple of 64, over num_threads threads.
struct Split {
  size_t numel, step, num_threads;
};

// At most max_threads threads, fewer where the op moves too little memory to pay for them, 1 thread and 1 range where
// it pays for none.
Split split(size_t numel, size_t bits_per_coordinate, size_t max_threads);

struct Range {
  size_t begin, end;
};

// The ranges of a split, each handed out once, in ascending order, to the thread that asks next: a thread that comes
// late, or gets less of its CPU, takes fewer.
class Ranges {
 public:
  explicit Ranges(const Split& split) : numel_(split.numel), step_(split.step) {}

  bool next(Range* range) {
    const size_t begin = next_.fetch_add(step_, std::memory_order_relaxed);
    if (begin >= numel_) return false;
    *range = {begin, begin + std::min(step_, numel_ - begin)};
    return true;
  }

 private:
  const size_t numel_, step_;
  std::atomic<size_t> next_{0};
};

// task(context, 0) on the caller's thread and, at the same time, task(context, 1) to task(context, num_threads - 1),
// or only some of these, on others. Returns when all that have begun have ended.
using Task = void (*)(void* context, size_t thread) noexcept;
void run_on_threads(size_t num_threads, Task task, void* context);

// work(ranges, thread) on up to num_threads threads, thread = 0 to num_threads - 1; each takes ranges until there are
// none. It must not throw.
template <class Work>
void parallel(const Split& split, const Work& work) {
  struct Context {
    Ranges ranges;
    const Work& work;
  } context{Ranges(split), work};
  const auto task = [](void* pointer, size_t thread) noexcept {
    auto& shared = *static_cast<Context*>(pointer);
    shared.work(shared.ranges, thread);
  };
  run_on_threads(split.num_threads, task, &context);
}

}  // namespace signvote

#endif
