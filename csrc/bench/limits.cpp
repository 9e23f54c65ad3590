// The module signvote._limits: plain loops that move the bytes of an op and do next to nothing with them, as fast as
// this CPU can. `signvote bench` measures the ops against them.
//
// Threads are those of the ops (cpu/parallel.h). The compiler makes the vector code, once for each instruction set. It
// is kept from turning a loop into a call of memcpy or memset (see CMakeLists.txt): those change to non-temporal stores
// above some size, which is another limit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__)
#define EACH_ISA __attribute__((noinline, target_clones("avx512f", "avx2", "default")))
#define READ_ISA __attribute__((noinline, target_clones("avx2", "default")))
#else
#define EACH_ISA
#define READ_ISA
#endif
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif
#if defined(__GNUC__)
#define INLINE inline __attribute__((always_inline))
#else
#define INLINE inline
#endif

// All sizes are in words. Read words are XORed into a result that the caller must use, so that no load can be left out.
//
// By 256 bits and into four sums: on Zen 4 faster than by 512 bits or into one, by 1.05 to 1.2 from 26 MB on.
#if defined(__GNUC__)
using Part = uint32_t __attribute__((vector_size(32)));
#else
struct Part {
  uint32_t word[8];
  Part& operator^=(const Part& other) {
    for (size_t i = 0; i < 8; ++i) word[i] ^= other.word[i];
    return *this;
  }
  uint32_t operator[](size_t i) const { return word[i]; }
};
#endif

READ_ISA uint32_t read_words(const uint32_t* x, size_t size) {
  constexpr size_t kParts = 4, kWords = sizeof(Part) / 4;
  Part sums[kParts] = {};
  size_t i = 0;
  for (; size - i >= kParts * kWords; i += kParts * kWords) {
    for (size_t k = 0; k < kParts; ++k) {
      Part part;
      memcpy(&part, x + i + k * kWords, sizeof part);
      sums[k] ^= part;
    }
  }
  uint32_t sum = 0;
  for (; i < size; ++i) sum ^= x[i];
  for (const Part& part : sums) {
    for (size_t k = 0; k < kWords; ++k) sum ^= part[k];
  }
  return sum;
}

EACH_ISA void write_words(uint32_t* out, size_t size, uint32_t value) {
  for (size_t i = 0; i < size; ++i) out[i] = value;
}

// Each word `times` times over, which is a multiple of 16.
EACH_ISA void repeat_words(const uint32_t* x, uint32_t* out, size_t size, size_t times) {
  for (size_t i = 0; i < size; ++i) {
    const uint32_t value = x[i];  // not read again after each write, which might have changed it
    for (size_t j = 0; j < times; j += 16, out += 16) {
      for (size_t k = 0; k < 16; ++k) out[k] = value;
    }
  }
}

EACH_ISA void copy_words(const uint32_t* x, uint32_t* out, size_t size) {
  INDEPENDENT
  for (size_t i = 0; i < size; ++i) out[i] = x[i];
}

EACH_ISA void update_words(const uint32_t* x, uint32_t* kept, size_t size) {
  INDEPENDENT
  for (size_t i = 0; i < size; ++i) kept[i] ^= x[i];
}

// Two words of `kept` to one of x, as for a momentum in float32 of a gradient of half the width.
EACH_ISA void update_words_twice(const uint32_t* x, uint32_t* kept, size_t size) {
  size_t i = 0;
  for (; size - i >= 64; i += 64) {
    INDEPENDENT
    for (size_t j = 0; j < 64; ++j) kept[2 * i + j] ^= x[i + j];
    INDEPENDENT
    for (size_t j = 0; j < 64; ++j) kept[2 * i + 64 + j] ^= x[i + j];
  }
  for (; i < size; ++i) {
    kept[2 * i] ^= x[i];
    kept[2 * i + 1] ^= x[i];
  }
}

// The fastest found at 26 MB and M = 4 to 256, of 4, 8, 16 and 32 rows and tiles of 1 KB to 1 MB: more rows do not fit
// in the registers, and with small tiles no row is read for long enough at a time.
constexpr size_t kRowsAtOnce = 16;
constexpr size_t kTile = 8192;  // words of out that are written again for the next rows

template <size_t kRows, bool kFirst>
INLINE void xor_tile(const uint32_t* const* rows, uint32_t* out, size_t begin, size_t end) {
  const uint32_t* row[kRows];
  for (size_t k = 0; k < kRows; ++k) row[k] = rows[k];
  INDEPENDENT
  for (size_t i = begin; i < end; ++i) {
    uint32_t sum = kFirst ? 0 : out[i];
    for (size_t k = 0; k < kRows; ++k) sum ^= row[k][i];
    out[i] = sum;
  }
}

template <size_t kRows, bool kFirst>
INLINE void xor_some(const uint32_t* const* rows, size_t num_rows, uint32_t* out, size_t begin, size_t end) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) return xor_some<kRows - 1, kFirst>(rows, num_rows, out, begin, end);
  }
  xor_tile<kRows, kFirst>(rows, out, begin, end);
}

EACH_ISA void xor_words(const uint32_t* const* rows, size_t num_rows, uint32_t* out, size_t size) {
  const size_t tile = num_rows <= kRowsAtOnce ? size : kTile;
  for (size_t begin = 0; begin < size; begin += tile) {
    const size_t end = size - begin < tile ? size : begin + tile;
    xor_some<kRowsAtOnce, true>(rows, num_rows, out, begin, end);
    for (size_t row = kRowsAtOnce; row < num_rows; row += kRowsAtOnce) {
      xor_some<kRowsAtOnce, false>(rows + row, num_rows - row, out, begin, end);
    }
  }
}

// The words of a contiguous array.
struct Words {
  uint32_t* data;
  size_t size;
};

Words to_words(const py::array& array) {
  if ((array.flags() & py::array::c_style) == 0) throw py::value_error("expected contiguous arrays");
  if (array.nbytes() % 4 != 0) throw py::value_error("expected arrays of whole words");
  return {static_cast<uint32_t*>(const_cast<void*>(array.data())), static_cast<size_t>(array.nbytes()) / 4};
}

Words to_out(const py::array& array) {
  if (!array.writeable()) throw py::value_error("expected a writable out");
  return to_words(array);
}

std::vector<const uint32_t*> to_rows(const py::list& arrays, size_t size) {
  if (arrays.size() == 0) throw py::value_error("expected at least one row");
  std::vector<const uint32_t*> rows;
  for (const py::handle array : arrays) {
    const Words row = to_words(py::cast<py::array>(array));
    if (row.size != size) throw py::value_error("expected rows as long as out");
    rows.push_back(row.data);
  }
  return rows;
}

// work(begin, end) on parts of `size` words, on as many threads as an op on as much memory would have. A part is large
// even if an op's would not be, so that a row is read in one go.
template <class Work>
void for_each_part(size_t size, size_t bits_per_word, size_t num_threads, const Work& work) {
  signvote::Split split = signvote::split(size, bits_per_word, num_threads);
  if (split.num_threads > 1) split.step = std::max(split.step, size / (8 * split.num_threads) / 64 * 64);
  signvote::parallel(split, [&](signvote::Ranges& ranges, size_t) {
    for (signvote::Range range; ranges.next(&range);) work(range.begin, range.end);
  });
}

uint32_t read_array(const py::array& x, size_t num_threads) {
  const Words words = to_words(x);
  const py::gil_scoped_release release;
  std::atomic<uint32_t> sum{0};
  for_each_part(words.size, 32, num_threads,
                [&](size_t begin, size_t end) { sum ^= read_words(words.data + begin, end - begin); });
  return sum;
}

void write_array(const py::array& out, uint32_t value, size_t num_threads) {
  const Words words = to_out(out);
  const py::gil_scoped_release release;
  for_each_part(words.size, 32, num_threads,
                [&](size_t begin, size_t end) { write_words(words.data + begin, end - begin, value); });
}

void repeat_array(const py::array& x, const py::array& out, size_t num_threads) {
  const Words from = to_words(x), to = to_out(out);
  const size_t times = from.size > 0 ? to.size / from.size : 0;
  if (times == 0 || times % 16 != 0 || to.size % from.size != 0) {
    throw py::value_error("expected an out 16, 32, 48, ... times as long as x");
  }
  const py::gil_scoped_release release;
  for_each_part(from.size, 32 * (times + 1), num_threads, [&](size_t begin, size_t end) {
    repeat_words(from.data + begin, to.data + times * begin, end - begin, times);
  });
}

void copy_array(const py::array& x, const py::array& out, size_t num_threads) {
  const Words from = to_words(x), to = to_out(out);
  if (from.size != to.size) throw py::value_error("expected an out as long as x");
  const py::gil_scoped_release release;
  for_each_part(to.size, 64, num_threads,
                [&](size_t begin, size_t end) { copy_words(from.data + begin, to.data + begin, end - begin); });
}

void update_array(const py::array& x, const py::array& kept, size_t num_threads) {
  const Words from = to_words(x), to = to_out(kept);
  if (to.size != from.size && to.size != 2 * from.size) {
    throw py::value_error("expected a kept as long as x, or twice as long");
  }
  const py::gil_scoped_release release;
  if (to.size == from.size) {
    for_each_part(from.size, 96, num_threads,
                  [&](size_t begin, size_t end) { update_words(from.data + begin, to.data + begin, end - begin); });
  } else {
    for_each_part(from.size, 160, num_threads, [&](size_t begin, size_t end) {
      update_words_twice(from.data + begin, to.data + 2 * begin, end - begin);
    });
  }
}

std::vector<const uint32_t*> from_word(std::vector<const uint32_t*> rows, size_t begin) {
  for (const uint32_t*& row : rows) row += begin;
  return rows;
}

void xor_rows(const py::list& rows, const py::array& out, size_t num_threads) {
  const Words to = to_out(out);
  const std::vector<const uint32_t*> from = to_rows(rows, to.size);
  const py::gil_scoped_release release;
  for_each_part(to.size, 32 * (from.size() + 1), num_threads, [&](size_t begin, size_t end) {
    xor_words(from_word(from, begin).data(), from.size(), to.data + begin, end - begin);
  });
}

void read_rows_then_write(const py::list& rows, const py::array& out, size_t num_threads) {
  const Words to = to_out(out);
  const std::vector<const uint32_t*> from = to_rows(rows, to.size);
  const py::gil_scoped_release release;
  for_each_part(to.size, 32 * (from.size() + 1), num_threads, [&](size_t begin, size_t end) {
    uint32_t sum = 0;
    for (const uint32_t* row : from) sum ^= read_words(row + begin, end - begin);
    write_words(to.data + begin, end - begin, sum);
  });
}

}  // namespace

PYBIND11_MODULE(_limits, module) {
  module.doc() = "Plain loops over memory, to measure the ops against; not part of the API.";
  module.def("read", &read_array, py::arg("x").noconvert(), py::arg("num_threads") = 1);
  module.def("write", &write_array, py::arg("out").noconvert(), py::arg("value"), py::arg("num_threads") = 1);
  module.def("repeat", &repeat_array, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("num_threads") = 1);
  module.def("copy", &copy_array, py::arg("x").noconvert(), py::arg("out").noconvert(), py::arg("num_threads") = 1);
  module.def("update", &update_array, py::arg("x").noconvert(), py::arg("kept").noconvert(),
             py::arg("num_threads") = 1);
  module.def("xor_rows", &xor_rows, py::arg("rows"), py::arg("out").noconvert(), py::arg("num_threads") = 1);
  module.def("read_rows_then_write", &read_rows_then_write, py::arg("rows"), py::arg("out").noconvert(),
             py::arg("num_threads") = 1);
}
