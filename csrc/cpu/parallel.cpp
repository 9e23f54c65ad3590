#include "parallel.h"

#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#ifndef _WIN32
#include <unistd.h>
#endif

namespace signvote {

namespace {

// To wake a helper costs the caller 1 to 9 µs, on a CPU that another process wants too, and the helper begins 5 to 35
// µs later (AMD EPYC, two virtual CPUs); a thread moves 1 MiB within its caches in about 17 µs, from memory in 40.
constexpr size_t kBytesPerThread = size_t{1} << 20;
constexpr size_t kBytesPerRange = size_t{1} << 17;
constexpr size_t kRangeUnit = 16384;  // coordinates: whole cache lines of words

// Threads that sleep until they are wanted, and are never ended: they hold nothing that the end of the process would
// miss. To start threads for each call would take 20 µs, and the call would wait for every one of them to get a CPU and
// end, while a helper that comes too late is not missed.
class Helpers {
 public:
  // One call at a time has the helpers; callers on several threads occupy several CPUs as it is.
  void run(size_t num_threads, Task task, void* context) {
    Job job{task, context};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (job_ == nullptr) job.num_wanted = start(num_threads - 1);
      if (job.num_wanted > 0) job_ = &job;
    }
    for (size_t i = 0, num = job.num_wanted; i < num; ++i) wanted_.notify_one();
    task(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    if (job_ != &job) return;
    job.num_wanted = 0;
    finished_.wait(lock, [&] { return job.num_running == 0; });
    job_ = nullptr;
  }

 private:
  struct Job {
    Task task;
    void* context;
    size_t num_wanted = 0, num_begun = 0, num_running = 0;
  };

  // How many of `num` helpers there are in the end.
  size_t start(size_t num) {
    try {
      for (; size_ < num; ++size_) std::thread([this] { help(); }).detach();
    } catch (...) {  // no more threads or no memory: then fewer
    }
    return std::min(size_, num);
  }

  [[noreturn]] void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wanted_.wait(lock, [&] { return job_ != nullptr && job_->num_begun < job_->num_wanted; });
      Job& job = *job_;
      const size_t thread = ++job.num_begun;
      ++job.num_running;
      lock.unlock();
      job.task(job.context, thread);
      lock.lock();
      if (--job.num_running == 0) finished_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wanted_, finished_;
  size_t size_ = 0;
  Job* job_ = nullptr;
};

// The helpers of a process and its number: a child of fork has none of its parent's threads, and may have its mutex in
// any state, so it leaves them alone and has helpers of its own.
struct ProcessHelpers {
  long process;
  Helpers helpers;
};

std::atomic<ProcessHelpers*> process_helpers{nullptr};

long this_process() {
#ifdef _WIN32
  return 0;
#else
  return getpid();
#endif
}

// Null without memory.
Helpers* helpers() {
  ProcessHelpers* found = process_helpers.load(std::memory_order_acquire);
  while (found == nullptr || found->process != this_process()) {
    auto* made = new (std::nothrow) ProcessHelpers{this_process(), {}};
    if (made == nullptr) return nullptr;
    if (process_helpers.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return &made->helpers;
    delete made;
  }
  return &found->helpers;
}

}  // namespace

Split split(size_t numel, size_t bits_per_coordinate, size_t max_threads) {
  const double bytes = static_cast<double>(numel) * static_cast<double>(bits_per_coordinate) / 8;
  const double affordable = bytes / kBytesPerThread;
  const size_t num_threads =
      affordable < static_cast<double>(max_threads) ? static_cast<size_t>(affordable) : max_threads;
  if (num_threads <= 1) return {numel, std::max(numel, size_t{1}), 1};
  const size_t units = kBytesPerRange * 8 / bits_per_coordinate / kRangeUnit;
  return {numel, std::max(units, size_t{1}) * kRangeUnit, num_threads};
}

void run_on_threads(size_t num_threads, Task task, void* context) {
  Helpers* const some = num_threads > 1 ? helpers() : nullptr;
  if (some == nullptr) {
    task(context, 0);
  } else {
    some->run(num_threads, task, context);
  }
}

}  // namespace signvote
