// The fibers behind cuda_runtime.h beside this file.
#include <fenv.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" {
// Of the section that the linker makes of all __shared__ variables.
extern char __start_cuda_shared_memory[] __attribute__((weak));
extern char __stop_cuda_shared_memory[] __attribute__((weak));

// Saves what a function must keep on the stack, and the stack's top in *from; then goes on where `to` was saved. That
// of the C library is far slower under the address sanitizer.
void cuda_on_cpu_change_stack(void** from, void* to);
}

#if !defined(__x86_64__)
#error "the change of stacks is written for x86-64"
#endif
asm(R"(
.text
cuda_on_cpu_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

namespace {

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackSize = 256 << 10;

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "cuda_on_cpu: %s, in thread %u of block %u\n", what.c_str(), threadIdx.x, blockIdx.x);
  abort();
}

// A stack, and where on it to go on. The address sanitizer has to be told of each change of stacks.
struct Context {
  void* top = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;
};

void change(Context& from, Context& to, bool is_last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(is_last ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#else
  (void)is_last;
#endif
  cuda_on_cpu_change_stack(&from.top, to.top);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

struct Fiber : Context {
  std::vector<char> memory = std::vector<char>(kStackSize);
  bool is_done = false;
};

Context scheduler;
std::vector<Fiber> fibers;
const std::function<void()>* thread_body;
bool has_progress;

Fiber& current() { return fibers[threadIdx.x]; }

void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
  (*thread_body)();
  current().is_done = has_progress = true;
  change(current(), scheduler, true);
}

// Where all of a number of threads come again and again.
class Meeting {
 public:
  explicit Meeting(size_t size) : size_(size), rounds_(size, 0) {
    for (auto& values : values_) values.resize(size);
  }

  // Nobody comes to the round after the next before all have read what was brought to this one.
  const uint64_t* meet(size_t member, const char* what, int argument, uint64_t value) {
    const size_t round = rounds_[member]++;
    if (total_++ == round * size_) {
      what_ = what;
      argument_ = argument;
    } else if (strcmp(what, what_) != 0 || argument != argument_) {
      fail(std::string(what) + "(" + std::to_string(argument) + ") while another thread is at " + what_ + "(" +
           std::to_string(argument_) + ")");
    }
    values_[round % 2][member] = value;
    has_progress = true;
    while (total_ < (round + 1) * size_) change(current(), scheduler);
    return values_[round % 2].data();
  }

  const char* what() const { return what_; }

 private:
  size_t size_, total_ = 0;  // how many have come, over all rounds
  std::vector<size_t> rounds_;
  std::vector<uint64_t> values_[2];
  const char* what_ = "nothing";  // that the first of this round has come to
  int argument_ = 0;
};

std::vector<Meeting> warps;
std::vector<Meeting> block;  // one

void start(Fiber& fiber) {
  fiber.is_done = false;
  fiber.stack = fiber.memory.data();
  fiber.stack_size = fiber.memory.size();
  // As if it had been saved at its start, with an address to return to that is never used.
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.memory.data() + kStackSize) & ~uintptr_t{15});
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.top = top;
}

void run_block(bool from_last) {
  if (__start_cuda_shared_memory != nullptr) {
    memset(__start_cuda_shared_memory, 0xA5,
           static_cast<size_t>(__stop_cuda_shared_memory - __start_cuda_shared_memory));
  }
  const unsigned size = blockDim.x;
  fibers.resize(size);
  for (Fiber& fiber : fibers) start(fiber);
  warps.assign(size / kWarpSize, Meeting(kWarpSize));
  block.assign(1, Meeting(size));
  for (unsigned num_done = 0; num_done < size;) {
    has_progress = false;
    num_done = 0;
    for (unsigned i = 0; i < size; ++i) {
      threadIdx.x = from_last ? size - 1 - i : i;
      if (!current().is_done) change(scheduler, current());
      num_done += current().is_done;
    }
    if (!has_progress && num_done < size) {
      fail(std::string("threads wait for ever, last at ") + block[0].what() + " of the block and " + warps[0].what() +
           " of the first warp");
    }
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 of_block, const std::function<void()>& thread) {
  static unsigned num_launches = 0;
  gridDim = grid;
  blockDim = of_block;
  if (blockDim.x % kWarpSize != 0 || gridDim.x == 0) fail("a launch of no whole number of warps");
  // A GPU's arithmetic knows nothing of the caller's floating-point environment.
  fenv_t environment;
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  thread_body = &thread;
  const bool from_last = num_launches++ % 2 != 0;
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(from_last);
  fesetenv(&environment);
}

const uint64_t* meet_in_warp(const char* what, unsigned mask, int argument, uint64_t value) {
  if (mask != 0xFFFFFFFF) fail(std::string(what) + " with a mask that leaves out lanes");
  return warps[threadIdx.x / kWarpSize].meet(threadIdx.x % kWarpSize, what, argument, value);
}

const uint64_t* meet_in_block(const char* what, uint64_t value) { return block[0].meet(threadIdx.x, what, 0, value); }

}  // namespace cuda_on_cpu
