// Runs every implementation that this CPU has on the cases in a file and compares the results bit for bit with those in
// the file. tests/test_driver.py writes it; this program needs neither Python nor the binding, so that it can be built
// for another architecture, or with sanitizers.
//
// Every buffer ends at a page that cannot be accessed, then begins behind one, so that an access outside of it is a
// crash or a damaged guard byte, and addresses have all alignments. Every case runs in the default floating-point
// environment and in one that rounds towards zero and flushes subnormal numbers.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

using namespace signvote;

namespace {

[[noreturn]] void fail(const std::string& what) {
  fprintf(stderr, "%s\n", what.c_str());
  exit(1);
}

enum Op : int64_t {
  kPackSigns,
  kPackMomentum,
  kHasNonfinite,
  kMajorityVote,
  kUnpackSigns,
  kAddCounts,
  kDecideCounts,
  kDecideCountsTernary,
  kPackTernary,
  kMajorityVoteTernary,
  kUnpackTernary,
  kAddCountsTernary,
  kNumOps
};
constexpr const char* kOpNames[] = {
    "pack_signs",     "pack_momentum",     "has_nonfinite",         "majority_vote", "unpack_signs",
    "add_counts",     "decide_counts",     "decide_counts_ternary", "pack_ternary",  "majority_vote_ternary",
    "unpack_ternary", "add_counts_ternary"};
constexpr const char* kDTypeNames[] = {"float32", "float64", "float16", "bfloat16"};
constexpr size_t kItemSizes[] = {4, 8, 2, 2};

// As tests/test_driver.py writes it, followed by the arrays that the op reads and those that it should have written.
struct Header {
  int64_t op, dtype, undecided, numel;
  int64_t num_rows;  // or planes
  uint64_t coins, positive;
  // Of counters: the addends that are not null, as bits; num_votes; negative_below, positive_from; the weight. Of
  // pack_ternary: limit. Of majority_vote_ternary: quorum.
  uint64_t limits[2];
  int64_t counts[2];  // what the op should return
  MomentumCoefficients coefficients;
};

using Bytes = std::vector<unsigned char>;

enum Placement { kAtEnd, kAtBegin };
constexpr const char* kPlacementNames[] = {"at the end of a page", "at the beginning of a page"};
constexpr unsigned char kGuard = 0xA5;

class Buffer {
 public:
  explicit Buffer(size_t capacity) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    capacity_ = (capacity + page_) / page_ * page_;
    void* memory = mmap(nullptr, capacity_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap failed");
    begin_ = static_cast<unsigned char*>(memory) + page_;
    if (mprotect(begin_, capacity_, PROT_READ | PROT_WRITE) != 0) fail("mprotect failed");
  }
  ~Buffer() { munmap(begin_ - page_, capacity_ + 2 * page_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Room for `size` bytes, with guard bytes on the side that has no page behind it.
  unsigned char* place(size_t size, Placement placement) {
    if (size > capacity_) fail("a case is larger than its buffer");
    data_ = placement == kAtEnd ? begin_ + capacity_ - size : begin_;
    size_ = size;
    guard_size_ = capacity_ - size < 512 ? capacity_ - size : 512;
    guard_ = placement == kAtEnd ? data_ - guard_size_ : data_ + size;
    memset(data_, kGuard, size);
    memset(guard_, kGuard, guard_size_);
    return data_;
  }
  unsigned char* place(const Bytes& bytes, Placement placement) {
    place(bytes.size(), placement);
    if (!bytes.empty()) memcpy(data_, bytes.data(), bytes.size());
    return data_;
  }

  bool guard_holds() const {
    for (size_t i = 0; i < guard_size_; ++i) {
      if (guard_[i] != kGuard) return false;
    }
    return true;
  }

 private:
  size_t page_, capacity_, size_ = 0, guard_size_ = 0;
  unsigned char *begin_, *data_ = nullptr, *guard_ = nullptr;
};

class HostileEnvironment {
 public:
#if defined(__x86_64__)
  static unsigned read() { return _mm_getcsr(); }
  static void write(unsigned value) { _mm_setcsr(value); }
  static constexpr unsigned kHostile = 0x1F80 | 0x8000 | 0x6000 | 0x0040;  // flush to zero, round to zero, and DAZ
#elif defined(__aarch64__)
  static unsigned read() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return static_cast<unsigned>(value);
  }
  static void write(unsigned value) { asm volatile("msr fpcr, %0" : : "r"(static_cast<uint64_t>(value))); }
  static constexpr unsigned kHostile = 1u << 24 | 3u << 22;  // flush to zero, round to zero
#else
  static unsigned read() { return 0; }
  static void write(unsigned) {}
  static constexpr unsigned kHostile = 0;
#endif
  HostileEnvironment() : saved_(read()) { write(kHostile); }
  ~HostileEnvironment() { write(saved_); }
  static bool holds() { return (read() & kHostile) == kHostile; }

 private:
  unsigned saved_;
};

// Equal bits, or both NaN.
bool same_momentum(const unsigned char* a, const Bytes& b, bool is_double) {
  for (size_t i = 0; i < b.size(); i += is_double ? 8 : 4) {
    if (is_double) {
      double x, y;
      memcpy(&x, a + i, 8);
      memcpy(&y, &b[i], 8);
      if (memcmp(&x, &y, 8) != 0 && (x == x || y == y)) return false;
    } else {
      float x, y;
      memcpy(&x, a + i, 4);
      memcpy(&y, &b[i], 4);
      if (memcmp(&x, &y, 4) != 0 && (x == x || y == y)) return false;
    }
  }
  return true;
}

bool same(const unsigned char* a, const Bytes& b) { return b.empty() || memcmp(a, b.data(), b.size()) == 0; }

struct Case {
  Header header;
  std::vector<Bytes> inputs, outputs;
};

struct Buffers {
  Buffer first, second, out;
};

// Rows, or planes, of words that lie one behind the other.
template <class Word, class Byte>
std::vector<Word*> rows_of(const Header& h, Byte* data) {
  std::vector<Word*> rows;
  for (int64_t i = 0; i < h.num_rows; ++i) {
    rows.push_back(reinterpret_cast<Word*>(data) + static_cast<size_t>(i * ((h.numel + 31) / 32)));
  }
  return rows;
}

// What is wrong, or nothing.
std::string run(const Kernels& kernels, const Case& c, Buffers& buffers, Placement placement) {
  const Header& h = c.header;
  const auto numel = static_cast<size_t>(h.numel);
  const size_t width = (numel + 31) / 32;
  const auto undecided = static_cast<Undecided>(h.undecided);
  int64_t counts[2] = {0, 0};
  std::string wrong;
  unsigned char* in = buffers.first.place(c.inputs[0], placement);
  unsigned char* out = buffers.out.place(c.outputs.empty() ? 0 : c.outputs[0].size(), placement);
  auto* out_words = reinterpret_cast<uint32_t*>(out);
  switch (h.op) {
    case kPackSigns: {
      const PackCounts found = kernels.pack_signs[h.dtype](in, numel, undecided, h.coins, out_words);
      counts[0] = static_cast<int64_t>(found.zeros);
      counts[1] = static_cast<int64_t>(found.nonfinite);
      break;
    }
    case kPackMomentum: {
      unsigned char* momentum = buffers.second.place(c.inputs[1], placement);
      const PackCounts found =
          kernels.pack_momentum[h.dtype](in, momentum, numel, h.coefficients, undecided, h.coins, out_words);
      counts[0] = static_cast<int64_t>(found.zeros);
      counts[1] = static_cast<int64_t>(found.nonfinite);
      if (!same_momentum(momentum, c.outputs[1], h.dtype == kFloat64)) wrong += " momentum";
      if (!buffers.second.guard_holds()) wrong += " guard of momentum";
      break;
    }
    case kHasNonfinite:
      counts[0] = kernels.has_nonfinite[h.dtype](in, numel);
      break;
    case kMajorityVote: {
      const auto rows = rows_of<const uint32_t>(h, in);
      counts[0] =
          static_cast<int64_t>(kernels.majority_vote(rows.data(), rows.size(), numel, undecided, h.coins, out_words));
      break;
    }
    case kUnpackSigns:
      kernels.unpack_signs[h.dtype](reinterpret_cast<const uint32_t*>(in), numel, h.positive, out);
      break;
    case kAddCounts: {
      if (!c.inputs[1].empty()) memcpy(out, c.inputs[1].data(), c.inputs[1].size());
      auto addends = rows_of<const uint32_t>(h, in);
      for (size_t i = 0; i < addends.size(); ++i) {
        if ((h.limits[0] >> i & 1) == 0) addends[i] = nullptr;
      }
      kernels.add_counts(rows_of<uint32_t>(h, out).data(), addends.size(), addends.data(), numel);
      break;
    }
    case kDecideCounts: {
      const auto planes = rows_of<const uint32_t>(h, in);
      counts[0] = static_cast<int64_t>(
          kernels.decide_counts(planes.data(), planes.size(), h.limits[0], numel, undecided, h.coins, out_words));
      break;
    }
    case kDecideCountsTernary: {
      const auto planes = rows_of<const uint32_t>(h, in);
      counts[0] = static_cast<int64_t>(kernels.decide_counts_ternary(planes.data(), planes.size(), h.limits[0],
                                                                     h.limits[1], numel, out_words, out_words + width));
      break;
    }
    case kPackTernary: {
      const PackCounts found = kernels.pack_ternary[h.dtype](in, numel, h.limits[0], out_words, out_words + width);
      counts[0] = static_cast<int64_t>(found.zeros);
      counts[1] = static_cast<int64_t>(found.nonfinite);
      break;
    }
    case kMajorityVoteTernary: {  // a row is a plane
      const auto planes = rows_of<const uint32_t>(h, in);
      std::vector<const uint32_t*> signs, actives;
      for (size_t i = 0; i < planes.size(); i += 2) {
        signs.push_back(planes[i]);
        actives.push_back(planes[i + 1]);
      }
      counts[0] = static_cast<int64_t>(kernels.majority_vote_ternary(signs.data(), actives.data(), signs.size(), numel,
                                                                     h.limits[0], out_words, out_words + width));
      break;
    }
    case kUnpackTernary: {
      const auto* planes = reinterpret_cast<const uint32_t*>(in);
      kernels.unpack_ternary[h.dtype](planes, planes + width, numel, h.positive, out);
      break;
    }
    case kAddCountsTernary: {
      if (!c.inputs[1].empty()) memcpy(out, c.inputs[1].data(), c.inputs[1].size());
      const auto* planes = reinterpret_cast<const uint32_t*>(in);
      const auto counters = rows_of<uint32_t>(h, out);
      kernels.add_counts_ternary(counters.data(), counters.size(), planes, planes + width, h.limits[0], numel);
      break;
    }
    default:
      fail("unknown op");
  }
  if (!c.outputs.empty() && !same(out, c.outputs[0])) wrong += " output";
  if (!buffers.out.guard_holds()) wrong += " guard of output";
  if (!same(in, c.inputs[0])) wrong += " input";
  for (int i = 0; i < 2; ++i) {
    if (counts[i] != h.counts[i]) {
      wrong += " count " + std::to_string(counts[i]) + " for " + std::to_string(h.counts[i]);
    }
  }
  return wrong;
}

void read(FILE* file, void* to, size_t size) {
  if (size != 0 && fread(to, 1, size, file) != size) fail("the file of cases ends within a case");
}

Bytes read_bytes(FILE* file, size_t size) {
  Bytes bytes(size);
  read(file, bytes.data(), size);
  return bytes;
}

bool read_case(FILE* file, Case* c) {
  const int first = fgetc(file);
  if (first == EOF) return false;
  ungetc(first, file);
  Header& h = c->header;
  read(file, &h, sizeof h);
  if (h.op < 0 || h.op >= kNumOps || h.dtype < 0 || h.dtype >= kNumDTypes) fail("not a case");
  const auto numel = static_cast<size_t>(h.numel);
  const size_t words = (numel + 31) / 32 * 4, coordinates = numel * kItemSizes[h.dtype];
  const size_t momentum = numel * (h.dtype == kFloat64 ? 8 : 4);
  const size_t planes = static_cast<size_t>(h.num_rows) * words;  // or rows
  c->inputs.clear();
  c->outputs.clear();
  const auto input = [&](size_t size) { c->inputs.push_back(read_bytes(file, size)); };
  const auto output = [&](size_t size) { c->outputs.push_back(read_bytes(file, size)); };
  switch (h.op) {
    case kPackSigns:
      input(coordinates), output(words);
      break;
    case kPackMomentum:
      input(coordinates), input(momentum), output(words), output(momentum);
      break;
    case kHasNonfinite:
      input(coordinates);
      break;
    case kMajorityVote:
      input(planes), output(words);
      break;
    case kUnpackSigns:
      input(words), output(coordinates);
      break;
    case kAddCounts:
      input(planes), input(planes), output(planes);
      break;
    case kDecideCounts:
      input(planes), output(words);
      break;
    case kPackTernary:
      input(coordinates), output(2 * words);
      break;
    case kUnpackTernary:
      input(2 * words), output(coordinates);
      break;
    case kAddCountsTernary:
      input(2 * words), input(planes), output(planes);
      break;
    default:
      input(planes), output(2 * words);
  }
  return true;
}

std::string describe(const Kernels& kernels, const Header& h, Placement placement, bool hostile) {
  return std::string(kernels.name) + " " + kOpNames[h.op] + " " + kDTypeNames[h.dtype] +
         ": numel=" + std::to_string(h.numel) + " num_rows=" + std::to_string(h.num_rows) +
         " undecided=" + std::to_string(h.undecided) + ", buffers " + kPlacementNames[placement] +
         (hostile ? ", hostile environment" : "") + ": wrong:";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("usage: driver FILE_OF_CASES");
  FILE* file = fopen(argv[1], "rb");
  if (file == nullptr) fail(std::string("cannot open ") + argv[1]);
  size_t num_implementations = 0, num_cases = 0, num_wrong = 0;
  const Kernels* const* all = implementations(&num_implementations);
  constexpr size_t kCapacity = 4 << 20;
  Buffers buffers{Buffer(kCapacity), Buffer(kCapacity), Buffer(kCapacity)};
  Case c;
  for (; read_case(file, &c); ++num_cases) {
    for (size_t i = 0; i < num_implementations; ++i) {
      for (const Placement placement : {kAtEnd, kAtBegin}) {
        std::string wrong = run(*all[i], c, buffers, placement), wrong_hostile;
        bool restored;
        {
          const HostileEnvironment environment;
          wrong_hostile = run(*all[i], c, buffers, placement);
          restored = HostileEnvironment::holds();
        }
        if (!restored) wrong_hostile += " environment";
        if (!wrong.empty())
          fprintf(stderr, "%s%s\n", describe(*all[i], c.header, placement, false).c_str(), wrong.c_str());
        if (!wrong_hostile.empty()) {
          fprintf(stderr, "%s%s\n", describe(*all[i], c.header, placement, true).c_str(), wrong_hostile.c_str());
        }
        num_wrong += !wrong.empty() + !wrong_hostile.empty();
      }
    }
  }
  fclose(file);
  printf("%zu cases,", num_cases);
  for (size_t i = 0; i < num_implementations; ++i) printf(" %s", all[i]->name);
  printf(": %zu wrong\n", num_wrong);
  return num_wrong == 0 ? 0 : 1;
}
