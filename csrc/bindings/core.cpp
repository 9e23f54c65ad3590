// The module signvote._core: check every argument once, release the GIL, call the table through runs.h and tally.h.
//
// Arrays are taken as they are, never converted. bfloat16 has no NumPy dtype and crosses as 16-bit integers, words
// cross as 32-bit ones. Every error names op, argument, what it is and what was expected, and is raised before
// anything is written.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "kernels.h"
#include "runs.h"
#include "tally.h"

namespace py = pybind11;

namespace {

using signvote::coins_by_place;
using signvote::coins_of_array;
using signvote::CounterPlanes;
using signvote::DType;
using signvote::kBFloat16;
using signvote::Kernels;
using signvote::kFloat32;
using signvote::kFloat64;
using signvote::kNumDTypes;
using signvote::mix;
using signvote::MomentumCoefficients;
using signvote::PackCounts;
using signvote::Run;
using signvote::Runs;
using signvote::Undecided;
using signvote::whole_run;

constexpr const char* kDTypeNames[kNumDTypes] = {"float32", "float64", "float16", "bfloat16"};
constexpr size_t kItemSizes[kNumDTypes] = {4, 8, 2, 2};
constexpr size_t kMaxRows = 65535;

size_t num_words(size_t numel) { return numel / 32 + (numel % 32 != 0); }

// The name of the op and of the argument that is looked at, for the error messages.
struct Argument {
  const char* op;
  std::string name;

  [[noreturn]] void value_error(const std::string& is, const std::string& expected) const {
    throw py::value_error(message(is, expected));
  }
  [[noreturn]] void type_error(const std::string& is, const std::string& expected) const {
    throw py::type_error(message(is, expected));
  }

 private:
  std::string message(const std::string& is, const std::string& expected) const {
    return std::string(op) + ": " + name + " " + is + ", expected " + expected;
  }
};

std::string is_repr(py::handle object) { return "is " + std::string(py::repr(object)); }

bool is_string(py::handle object, const char* text) {
  return PyUnicode_Check(object.ptr()) && PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

std::vector<const Kernels*> all_kernels() {
  size_t count = 0;
  const Kernels* const* list = signvote::implementations(&count);
  return {list, list + count};
}

const Kernels& to_kernels(const char* op, py::handle object) {
  std::string names;
  for (const Kernels* kernels : all_kernels()) {
    if (is_string(object, kernels->name)) return *kernels;
    names += std::string(names.empty() ? "'" : ", '") + kernels->name + "'";
  }
  Argument{op, "implementation"}.value_error(is_repr(object), "one of " + names);
}

DType to_dtype(const char* op, py::handle object) {
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
    if (is_string(object, kDTypeNames[dtype])) return static_cast<DType>(dtype);
  }
  Argument{op, "dtype"}.type_error(is_repr(object), "'float32', 'float64', 'float16' or 'bfloat16'");
}

Undecided to_undecided(const char* op, const char* name, py::handle object) {
  if (is_string(object, "coin")) return signvote::kCoin;
  if (is_string(object, "positive")) return signvote::kPositive;
  if (is_string(object, "negative")) return signvote::kNegative;
  Argument{op, name}.value_error(is_repr(object), "'coin', 'positive' or 'negative'");
}

py::int_ to_integer(const char* op, const char* name, py::handle object) {
  PyObject* integer = PyNumber_Index(object.ptr());
  if (integer == nullptr) {
    PyErr_Clear();
    Argument{op, name}.type_error(is_repr(object), "an integer");
  }
  return py::reinterpret_steal<py::int_>(integer);
}

uint64_t to_uint64(const char* op, const char* name, py::handle object) {
  const py::int_ integer = to_integer(op, name, object);
  const uint64_t value = PyLong_AsUnsignedLongLong(integer.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    Argument{op, name}.value_error(is_repr(integer), "an integer from 0 to 2**64 - 1");
  }
  return value;
}

size_t to_numel(const char* op, py::handle object) {
  const py::int_ integer = to_integer(op, "numel", object);
  const long long value = PyLong_AsLongLong(integer.ptr());
  if (PyErr_Occurred() || value < 0) {
    PyErr_Clear();
    Argument{op, "numel"}.value_error(is_repr(integer), "an integer from 0 to 2**63 - 1");
  }
  return static_cast<size_t>(value);
}

size_t to_num_threads(const char* op, py::handle object) {
  const py::int_ integer = to_integer(op, "num_threads", object);
  const long long value = PyLong_AsLongLong(integer.ptr());
  if (PyErr_Occurred() || value < 1) {
    PyErr_Clear();
    Argument{op, "num_threads"}.value_error(is_repr(integer), "an integer from 1 to 2**63 - 1");
  }
  return static_cast<size_t>(value);
}

// A range of memory with `size` items.
struct Span {
  char* data;
  size_t size;
  size_t itemsize;

  const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(data); }
  uint32_t* mutable_words() const { return reinterpret_cast<uint32_t*>(data); }
};

enum class Access { kRead, kWrite };

bool has_dtype(const py::array& array, const char* kinds, size_t itemsize) {
  const py::dtype dtype = array.dtype();
  const char order = dtype.byteorder();
  return std::string(kinds).find(dtype.kind()) != std::string::npos &&
         static_cast<size_t>(dtype.itemsize()) == itemsize && (order == '=' || order == '|');
}

void check_writable(const Argument& argument, const py::array& array) {
  if (!array.writeable()) argument.value_error("is read-only", "a writable array");
}

Span to_span(const Argument& argument, const py::array& array, size_t itemsize, Access access) {
  if ((array.flags() & py::array::c_style) == 0) {
    argument.value_error("is not contiguous",
                         "a C-contiguous array; numpy.ascontiguousarray(x) or x.contiguous() makes one");
  }
  if (access == Access::kWrite) check_writable(argument, array);
  const Span span{static_cast<char*>(const_cast<void*>(array.data())), static_cast<size_t>(array.size()), itemsize};
  if (span.size != 0 && reinterpret_cast<uintptr_t>(span.data) % itemsize != 0) {
    argument.value_error("is not aligned", "an address that is a multiple of " + std::to_string(itemsize));
  }
  return span;
}

Span to_coordinates(const Argument& argument, const py::array& array, DType dtype, Access access) {
  const char* kinds = dtype == kBFloat16 ? "iu" : "f";
  if (!has_dtype(array, kinds, kItemSizes[dtype])) {
    argument.type_error(is_repr(array.dtype()),
                        dtype == kBFloat16 ? "uint16 or int16, the bits of bfloat16" : kDTypeNames[dtype]);
  }
  return to_span(argument, array, kItemSizes[dtype], access);
}

void check_words_dtype(const Argument& argument, const py::array& array) {
  if (!has_dtype(array, "ui", 4)) argument.type_error(is_repr(array.dtype()), "uint32 (NumPy) or int32 (torch) words");
}

Span to_words(const Argument& argument, const py::array& array, Access access) {
  check_words_dtype(argument, array);
  if (array.ndim() != 1) argument.value_error("has " + std::to_string(array.ndim()) + " dimensions", "1");
  return to_span(argument, array, 4, access);
}

void check_size(const Argument& argument, const Span& span, const char* unit, size_t expected) {
  if (span.size != expected) {
    argument.value_error("has " + std::to_string(span.size) + " " + unit, std::to_string(expected));
  }
}

// What is written must share no byte with `other`.
void check_apart(const Argument& written, const Span& span, const std::string& other_name, const Span& other) {
  if (span.size == 0 || other.size == 0) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(span.data);
  const uintptr_t other_begin = reinterpret_cast<uintptr_t>(other.data);
  if (begin < other_begin + other.size * other.itemsize && other_begin < begin + span.size * span.itemsize) {
    written.value_error("overlaps " + other_name, "memory of its own");
  }
}

// The rows of a vote, all of `width` words.
struct Rows {
  std::vector<const uint32_t*> pointers;
  size_t width = 0;
};

void check_num_rows(const Argument& argument, size_t num_rows) {
  if (num_rows < 1 || num_rows > kMaxRows) {
    argument.value_error("has " + std::to_string(num_rows) + " rows", "1 to " + std::to_string(kMaxRows));
  }
}

// An (M, W) array, whose rows may lie at any distance from each other, or a sequence of M arrays of W words.
Rows to_rows(const Argument& argument, const py::object& object) {
  Rows rows;
  if (py::isinstance<py::array>(object)) {
    const py::array array = py::reinterpret_borrow<py::array>(object);
    check_words_dtype(argument, array);
    if (array.ndim() != 2) argument.value_error("has " + std::to_string(array.ndim()) + " dimensions", "2");
    const size_t num_rows = static_cast<size_t>(array.shape(0));
    check_num_rows(argument, num_rows);
    rows.width = static_cast<size_t>(array.shape(1));
    if (rows.width > 1 && array.strides(1) != 4) {
      argument.value_error("is not contiguous",
                           "rows of contiguous words; numpy.ascontiguousarray(x) or x.contiguous() makes them");
    }
    const char* data = static_cast<const char*>(array.data());
    const py::ssize_t stride = num_rows > 1 ? array.strides(0) : 0;
    if (rows.width > 0 && (reinterpret_cast<uintptr_t>(data) % 4 != 0 || stride % 4 != 0)) {
      argument.value_error("is not aligned", "addresses that are multiples of 4");
    }
    rows.pointers.reserve(num_rows);
    for (size_t row = 0; row < num_rows; ++row) {
      rows.pointers.push_back(reinterpret_cast<const uint32_t*>(data + static_cast<py::ssize_t>(row) * stride));
    }
    return rows;
  }
  if (!py::isinstance<py::list>(object)) argument.type_error(is_repr(object), "an (M, W) array or a list of M arrays");
  const py::list list = py::reinterpret_borrow<py::list>(object);
  check_num_rows(argument, list.size());
  rows.pointers.reserve(list.size());
  for (const py::handle item : list) {
    const Argument row{argument.op, argument.name + "[" + std::to_string(rows.pointers.size()) + "]"};
    if (!py::isinstance<py::array>(item)) row.type_error(is_repr(item), "an array of words");
    const Span span = to_words(row, py::reinterpret_borrow<py::array>(item), Access::kRead);
    if (rows.pointers.empty()) rows.width = span.size;
    check_size(row, span, "words", rows.width);
    rows.pointers.push_back(span.words());
  }
  return rows;
}

void check_apart(const Argument& written, const Span& span, const std::string& other_name, const Rows& rows) {
  for (const uint32_t* pointer : rows.pointers) {
    check_apart(written, span, other_name,
                Span{reinterpret_cast<char*>(const_cast<uint32_t*>(pointer)), rows.width, 4});
  }
}

MomentumCoefficients to_coefficients(const char* op, DType dtype, const std::array<double, 4>& coefficients) {
  for (const double value : coefficients) {
    if (!std::isfinite(dtype == kFloat64 ? value : static_cast<float>(value))) {
      Argument{op, "coefficients"}.value_error(is_repr(py::cast(coefficients)), "four finite numbers");
    }
  }
  return {coefficients[0], coefficients[1], coefficients[2], coefficients[3]};
}

// The momentum that belongs to `numel` coordinates of `dtype`: float64 for float64, float32 otherwise.
Span to_momentum(const char* op, const py::array& array, DType dtype, size_t numel) {
  const Argument argument{op, "momentum"};
  const Span momentum = to_coordinates(argument, array, dtype == kFloat64 ? kFloat64 : kFloat32, Access::kWrite);
  check_size(argument, momentum, "coordinates", numel);
  return momentum;
}

// Rows of (place, first, numel, coordinate, word), each within `numel` coordinates, if those matter, and `width` words.
constexpr size_t kAnyNumel = SIZE_MAX;
Runs to_runs(const char* op, const py::array& array, size_t numel, size_t width) {
  const Argument argument{op, "runs"};
  if (!has_dtype(array, "i", 8)) argument.type_error(is_repr(array.dtype()), "int64");
  if (array.ndim() != 2 || array.shape(1) != 5) {
    argument.value_error("has shape " + std::string(py::repr(array.attr("shape"))), "(n, 5)");
  }
  const Span span = to_span(argument, array, 8, Access::kRead);
  static_assert(sizeof(Run) == 5 * sizeof(int64_t), "a row of the array is a Run");
  const Runs runs{reinterpret_cast<const Run*>(span.data), static_cast<size_t>(array.shape(0))};
  for (size_t i = 0; i < runs.size; ++i) {
    const Run& run = runs.data[i];
    const auto is = [&](const char* column, int64_t value, const std::string& more = "") {
      return "has " + std::string(column) + " " + std::to_string(value) + more + " in row " + std::to_string(i);
    };
    const auto and_numel = [&] { return " and numel " + std::to_string(run.numel); };
    if (run.place < 0) argument.value_error(is("place", run.place), "0 or more");
    if (run.first < 0 || run.first % 64 != 0) argument.value_error(is("first", run.first), "a multiple of 64");
    if (run.numel < 0) argument.value_error(is("numel", run.numel), "0 or more");
    const size_t count = static_cast<size_t>(run.numel);
    if (run.coordinate < 0 || (numel != kAnyNumel && (static_cast<size_t>(run.coordinate) > numel ||
                                                      count > numel - static_cast<size_t>(run.coordinate)))) {
      argument.value_error(is("coordinate", run.coordinate, and_numel()),
                           "a range within " + std::to_string(numel) + " coordinates");
    }
    if (run.word < 0 || static_cast<size_t>(run.word) > width ||
        num_words(count) > width - static_cast<size_t>(run.word)) {
      argument.value_error(is("word", run.word, and_numel()), "a range within " + std::to_string(width) + " words");
    }
  }
  return runs;
}

// The runs stay as they were checked while the op writes.
void check_runs_apart(const char* op, const Runs& runs, const std::string& written_name, const Span& written) {
  check_apart({op, "runs"}, Span{reinterpret_cast<char*>(const_cast<Run*>(runs.data)), runs.size, sizeof(Run)},
              written_name, written);
}

using Counts = std::pair<uint64_t, uint64_t>;  // zeros, nonfinite

Counts pack_signs(const py::array& x, py::handle dtype_name, py::handle zeros_name, py::handle seed_object,
                  const py::array& out, py::handle implementation, py::handle num_threads) {
  const char* op = "pack_signs";
  const Kernels& kernels = to_kernels(op, implementation);
  const DType dtype = to_dtype(op, dtype_name);
  const Undecided zeros = to_undecided(op, "zeros", zeros_name);
  const uint64_t seed = to_uint64(op, "seed", seed_object);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Span source = to_coordinates({op, "x"}, x, dtype, Access::kRead);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", num_words(source.size));
  check_apart(out_argument, words, "x", source);
  const Run whole = whole_run(source.size);
  py::gil_scoped_release release;
  const PackCounts counts = signvote::pack_runs(kernels, dtype, source.data, source.itemsize, {&whole, 1}, zeros,
                                                coins_of_array, seed, words.mutable_words(), max_threads);
  return {counts.zeros, counts.nonfinite};
}

Counts pack_momentum(const py::array& x, py::handle dtype_name, const py::array& momentum_array,
                     const std::array<double, 4>& coefficients_array, py::handle zeros_name, py::handle seed_object,
                     const py::array& out, py::handle implementation, py::handle num_threads) {
  const char* op = "pack_momentum";
  const Kernels& kernels = to_kernels(op, implementation);
  const DType dtype = to_dtype(op, dtype_name);
  const Undecided zeros = to_undecided(op, "zeros", zeros_name);
  const uint64_t seed = to_uint64(op, "seed", seed_object);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Span source = to_coordinates({op, "x"}, x, dtype, Access::kRead);
  const Span momentum = to_momentum(op, momentum_array, dtype, source.size);
  const MomentumCoefficients coefficients = to_coefficients(op, dtype, coefficients_array);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", num_words(source.size));
  check_apart({op, "momentum"}, momentum, "x", source);
  check_apart(out_argument, words, "x", source);
  check_apart(out_argument, words, "momentum", momentum);
  const Run whole = whole_run(source.size);
  py::gil_scoped_release release;
  const PackCounts counts = signvote::pack_runs_momentum(kernels, dtype, source.data, source.itemsize, momentum.data,
                                                         momentum.itemsize, coefficients, {&whole, 1}, zeros,
                                                         coins_of_array, seed, words.mutable_words(), max_threads);
  return {counts.zeros, counts.nonfinite};
}

bool has_nonfinite(const py::array& x, py::handle dtype_name, py::handle implementation, py::handle num_threads) {
  const char* op = "has_nonfinite";
  const Kernels& kernels = to_kernels(op, implementation);
  const DType dtype = to_dtype(op, dtype_name);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Span source = to_coordinates({op, "x"}, x, dtype, Access::kRead);
  const Run whole = whole_run(source.size);
  py::gil_scoped_release release;
  return signvote::has_nonfinite(kernels, dtype, source.data, source.itemsize, {&whole, 1}, max_threads);
}

uint64_t majority_vote(const py::object& stack, py::handle numel_object, py::handle ties_name, py::handle seed_object,
                       const py::array& out, py::handle implementation, py::handle num_threads) {
  const char* op = "majority_vote";
  const Kernels& kernels = to_kernels(op, implementation);
  const Undecided ties = to_undecided(op, "ties", ties_name);
  const uint64_t seed = to_uint64(op, "seed", seed_object);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Rows rows = to_rows({op, "stack"}, stack);
  const size_t numel = numel_object.is_none() ? rows.width * 32 : to_numel(op, numel_object);
  if (num_words(numel) != rows.width) {
    Argument{op, "stack"}.value_error("has " + std::to_string(rows.width) + " words in a row",
                                      std::to_string(num_words(numel)) + " for numel " + std::to_string(numel));
  }
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", rows.width);
  check_apart(out_argument, words, "stack", rows);
  const Run whole = whole_run(numel);
  py::gil_scoped_release release;
  return signvote::vote_runs(kernels, rows.pointers, {&whole, 1}, ties, coins_of_array, seed, words.mutable_words(),
                             max_threads);
}

void unpack_signs(const py::array& words_array, py::handle numel_object, py::handle dtype_name, uint64_t positive,
                  const py::array& out, py::handle implementation, py::handle num_threads) {
  const char* op = "unpack_signs";
  const Kernels& kernels = to_kernels(op, implementation);
  const DType dtype = to_dtype(op, dtype_name);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Argument words_argument{op, "words"};
  const Span words = to_words(words_argument, words_array, Access::kRead);
  const size_t numel = to_numel(op, numel_object);
  check_size(words_argument, words, "words", num_words(numel));
  const Argument out_argument{op, "out"};
  const Span target = to_coordinates(out_argument, out, dtype, Access::kWrite);
  check_size(out_argument, target, "coordinates", numel);
  check_apart(out_argument, target, "words", words);
  const Run whole = whole_run(numel);
  py::gil_scoped_release release;
  signvote::unpack_runs(kernels, dtype, words.words(), {&whole, 1}, positive, target.data, target.itemsize,
                        max_threads);
}

Counts pack_runs(const py::array& bucket_array, py::handle dtype_name, const std::optional<py::array>& momentum_array,
                 const std::array<double, 4>& coefficients_array, const py::array& runs_array, py::handle zeros_name,
                 py::handle seed_object, const py::array& out, py::handle implementation, py::handle num_threads) {
  const char* op = "pack_runs";
  const Kernels& kernels = to_kernels(op, implementation);
  const DType dtype = to_dtype(op, dtype_name);
  const Undecided zeros = to_undecided(op, "zeros", zeros_name);
  const uint64_t seed = to_uint64(op, "seed", seed_object);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Span bucket = to_coordinates({op, "bucket"}, bucket_array, dtype, Access::kRead);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  const Runs runs = to_runs(op, runs_array, bucket.size, words.size);
  check_apart(out_argument, words, "bucket", bucket);
  check_runs_apart(op, runs, "out", words);
  PackCounts counts;
  if (momentum_array) {
    const Span momentum = to_momentum(op, *momentum_array, dtype, bucket.size);
    const MomentumCoefficients coefficients = to_coefficients(op, dtype, coefficients_array);
    check_apart({op, "momentum"}, momentum, "bucket", bucket);
    check_apart(out_argument, words, "momentum", momentum);
    check_runs_apart(op, runs, "momentum", momentum);
    py::gil_scoped_release release;
    counts = signvote::pack_runs_momentum(kernels, dtype, bucket.data, bucket.itemsize, momentum.data,
                                          momentum.itemsize, coefficients, runs, zeros, coins_by_place, seed,
                                          words.mutable_words(), max_threads);
  } else {
    py::gil_scoped_release release;
    counts = signvote::pack_runs(kernels, dtype, bucket.data, bucket.itemsize, runs, zeros, coins_by_place, seed,
                                 words.mutable_words(), max_threads);
  }
  return {counts.zeros, counts.nonfinite};
}

uint64_t vote_runs(const py::object& rows_object, const py::array& runs_array, py::handle ties_name,
                   py::handle seed_object, const py::array& out, py::handle implementation, py::handle num_threads) {
  const char* op = "vote_runs";
  const Kernels& kernels = to_kernels(op, implementation);
  const Undecided ties = to_undecided(op, "ties", ties_name);
  const uint64_t seed = to_uint64(op, "seed", seed_object);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Rows rows = to_rows({op, "rows"}, rows_object);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", rows.width);
  const Runs runs = to_runs(op, runs_array, kAnyNumel, rows.width);
  check_apart(out_argument, words, "rows", rows);
  check_runs_apart(op, runs, "out", words);
  py::gil_scoped_release release;
  return signvote::vote_runs(kernels, rows.pointers, runs, ties, coins_by_place, seed, words.mutable_words(),
                             max_threads);
}

void unpack_runs(const py::array& words_array, const py::array& runs_array, py::handle dtype_name, uint64_t positive,
                 const py::array& bucket_array, py::handle implementation, py::handle num_threads) {
  const char* op = "unpack_runs";
  const Kernels& kernels = to_kernels(op, implementation);
  const DType dtype = to_dtype(op, dtype_name);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Span words = to_words({op, "words"}, words_array, Access::kRead);
  const Argument bucket_argument{op, "bucket"};
  const Span bucket = to_coordinates(bucket_argument, bucket_array, dtype, Access::kWrite);
  const Runs runs = to_runs(op, runs_array, bucket.size, words.size);
  check_apart(bucket_argument, bucket, "words", words);
  check_runs_apart(op, runs, "bucket", bucket);
  py::gil_scoped_release release;
  signvote::unpack_runs(kernels, dtype, words.words(), runs, positive, bucket.data, bucket.itemsize, max_threads);
}

// A (P, W) array of counter planes.
CounterPlanes to_counters(const Argument& argument, const py::array& array, Access access) {
  check_words_dtype(argument, array);
  if (array.ndim() != 2) argument.value_error("has " + std::to_string(array.ndim()) + " dimensions", "2");
  const Span span = to_span(argument, array, 4, access);
  const size_t num_planes = static_cast<size_t>(array.shape(0));
  if (num_planes < 1 || num_planes > signvote::kMaxCounterPlanes) {
    argument.value_error("has " + std::to_string(num_planes) + " planes",
                         "1 to " + std::to_string(signvote::kMaxCounterPlanes));
  }
  return {span.mutable_words(), num_planes, static_cast<size_t>(array.shape(1))};
}

Span span_of(const CounterPlanes& counters) {
  return {reinterpret_cast<char*>(counters.data), counters.num_planes * counters.width, 4};
}

size_t to_numel_of(const char* op, py::handle object, const CounterPlanes& counters) {
  const size_t numel = to_numel(op, object);
  if (num_words(numel) != counters.width) {
    Argument{op, "planes"}.value_error("has " + std::to_string(counters.width) + " words in a plane",
                                       std::to_string(num_words(numel)) + " for numel " + std::to_string(numel));
  }
  return numel;
}

// A number that the counters can hold.
uint64_t to_count(const char* op, const char* name, py::handle object, const CounterPlanes& counters) {
  const uint64_t largest = (uint64_t{1} << counters.num_planes) - 1;
  const uint64_t count = to_uint64(op, name, object);
  if (count < 1 || count > largest) {
    Argument{op, name}.value_error(is_repr(object), "an integer from 1 to " + std::to_string(largest));
  }
  return count;
}

void tally_add(const py::array& planes_array, const py::array& words_array, py::handle weight_object,
               py::handle implementation, py::handle num_threads) {
  const char* op = "tally_add";
  const Kernels& kernels = to_kernels(op, implementation);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Argument planes_argument{op, "planes"};
  const CounterPlanes counters = to_counters(planes_argument, planes_array, Access::kWrite);
  const Argument words_argument{op, "words"};
  const Span words = to_words(words_argument, words_array, Access::kRead);
  check_size(words_argument, words, "words", counters.width);
  const uint64_t weight = to_count(op, "weight", weight_object, counters);
  check_apart(planes_argument, span_of(counters), "words", words);
  py::gil_scoped_release release;
  signvote::tally_add(kernels, counters, words.words(), weight, max_threads);
}

void tally_merge(const py::array& planes_array, const py::array& others_array, py::handle implementation,
                 py::handle num_threads) {
  const char* op = "tally_merge";
  const Kernels& kernels = to_kernels(op, implementation);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Argument planes_argument{op, "planes"}, others_argument{op, "others"};
  const CounterPlanes counters = to_counters(planes_argument, planes_array, Access::kWrite);
  const CounterPlanes others = to_counters(others_argument, others_array, Access::kRead);
  if (others.width != counters.width || others.num_planes > counters.num_planes) {
    others_argument.value_error(
        "has shape " + std::string(py::repr(others_array.attr("shape"))),
        "at most " + std::to_string(counters.num_planes) + " planes of " + std::to_string(counters.width) + " words");
  }
  check_apart(planes_argument, span_of(counters), "others", span_of(others));
  py::gil_scoped_release release;
  signvote::tally_merge(kernels, counters, others, max_threads);
}

uint64_t tally_decide(const py::array& planes_array, py::handle num_votes_object, py::handle numel_or_runs,
                      py::handle ties_name, py::handle seed_object, const py::array& out, py::handle implementation,
                      py::handle num_threads) {
  const char* op = "tally_decide";
  const Kernels& kernels = to_kernels(op, implementation);
  const Undecided ties = to_undecided(op, "ties", ties_name);
  const uint64_t seed = to_uint64(op, "seed", seed_object);
  const size_t max_threads = to_num_threads(op, num_threads);
  const CounterPlanes counters = to_counters({op, "planes"}, planes_array, Access::kRead);
  const uint64_t num_votes = to_count(op, "num_votes", num_votes_object, counters);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", counters.width);
  check_apart(out_argument, words, "planes", span_of(counters));
  if (py::isinstance<py::array>(numel_or_runs)) {
    const auto runs_array = py::reinterpret_borrow<py::array>(numel_or_runs);
    const Runs runs = to_runs(op, runs_array, kAnyNumel, counters.width);
    check_runs_apart(op, runs, "out", words);
    py::gil_scoped_release release;
    return signvote::tally_decide(kernels, counters, num_votes, runs, ties, coins_by_place, seed, words.mutable_words(),
                                  max_threads);
  }
  const Run whole = whole_run(to_numel_of(op, numel_or_runs, counters));
  py::gil_scoped_release release;
  return signvote::tally_decide(kernels, counters, num_votes, {&whole, 1}, ties, coins_of_array, seed,
                                words.mutable_words(), max_threads);
}

void tally_decide_ternary(const py::array& planes_array, py::handle num_votes_object, py::handle quorum_object,
                          py::handle numel_object, const py::array& out, py::handle implementation,
                          py::handle num_threads) {
  const char* op = "tally_decide_ternary";
  const Kernels& kernels = to_kernels(op, implementation);
  const size_t max_threads = to_num_threads(op, num_threads);
  const CounterPlanes counters = to_counters({op, "planes"}, planes_array, Access::kRead);
  const uint64_t num_votes = to_count(op, "num_votes", num_votes_object, counters);
  const uint64_t quorum = to_uint64(op, "quorum", quorum_object);
  if (quorum < 1) Argument{op, "quorum"}.value_error(is_repr(quorum_object), "an integer from 1 on");
  const size_t numel = to_numel_of(op, numel_object, counters);
  const Argument out_argument{op, "out"};
  const CounterPlanes words = to_counters(out_argument, out, Access::kWrite);
  if (words.num_planes != 2 || words.width != counters.width) {
    out_argument.value_error("has shape " + std::string(py::repr(out.attr("shape"))),
                             "(2, " + std::to_string(counters.width) + ")");
  }
  check_apart(out_argument, span_of(words), "planes", span_of(counters));
  py::gil_scoped_release release;
  if (quorum > num_votes) {
    std::fill_n(words.data, 2 * words.width, 0);
  } else {
    signvote::tally_decide_ternary(kernels, counters, num_votes, quorum, numel, words.data, words.data + words.width,
                                   max_threads);
  }
}

void tally_counts(const py::array& planes_array, py::handle numel_object, const py::array& out) {
  const char* op = "tally_counts";
  const CounterPlanes counters = to_counters({op, "planes"}, planes_array, Access::kRead);
  const size_t numel = to_numel_of(op, numel_object, counters);
  const Argument out_argument{op, "out"};
  if (!has_dtype(out, "i", 4)) out_argument.type_error(is_repr(out.dtype()), "int32");
  const Span target = to_span(out_argument, out, 4, Access::kWrite);
  check_size(out_argument, target, "coordinates", numel);
  check_apart(out_argument, target, "planes", span_of(counters));
  py::gil_scoped_release release;
  signvote::tally_counts(counters, numel, reinterpret_cast<int32_t*>(target.data));
}

std::vector<std::string> implementation_names() {
  std::vector<std::string> names;
  for (const Kernels* kernels : all_kernels()) names.emplace_back(kernels->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The native ops of signvote. signvote.ops and signvote.runs are the way in.";
  m.def("implementations", &implementation_names);
  m.def("mix", [](py::handle x) { return mix(to_uint64("mix", "x", x)); }, py::arg("x"));
  m.def("pack_signs", &pack_signs, py::arg("x"), py::arg("dtype"), py::arg("zeros"), py::arg("seed"), py::arg("out"),
        py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("pack_momentum", &pack_momentum, py::arg("x"), py::arg("dtype"), py::arg("momentum"), py::arg("coefficients"),
        py::arg("zeros"), py::arg("seed"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("has_nonfinite", &has_nonfinite, py::arg("x"), py::arg("dtype"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("majority_vote", &majority_vote, py::arg("rows"), py::arg("numel"), py::arg("ties"), py::arg("seed"),
        py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("unpack_signs", &unpack_signs, py::arg("words"), py::arg("numel"), py::arg("dtype"), py::arg("positive"),
        py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("pack_runs", &pack_runs, py::arg("bucket"), py::arg("dtype"), py::arg("momentum"), py::arg("coefficients"),
        py::arg("runs"), py::arg("zeros"), py::arg("seed"), py::arg("out"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("vote_runs", &vote_runs, py::arg("rows"), py::arg("runs"), py::arg("ties"), py::arg("seed"), py::arg("out"),
        py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("unpack_runs", &unpack_runs, py::arg("words"), py::arg("runs"), py::arg("dtype"), py::arg("positive"),
        py::arg("bucket"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("tally_add", &tally_add, py::arg("planes"), py::arg("words"), py::arg("weight"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("tally_merge", &tally_merge, py::arg("planes"), py::arg("others"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("tally_decide", &tally_decide, py::arg("planes"), py::arg("num_votes"), py::arg("numel_or_runs"),
        py::arg("ties"), py::arg("seed"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("tally_decide_ternary", &tally_decide_ternary, py::arg("planes"), py::arg("num_votes"), py::arg("quorum"),
        py::arg("numel"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("tally_counts", &tally_counts, py::arg("planes"), py::arg("numel"), py::arg("out"));
}
