// Arguments of the native ops as they cross from Python: what they are checked for, and what they become. They are
// taken as they are, never converted. bfloat16 has no NumPy dtype and crosses as 16-bit integers, words cross as 32-bit
// ones. Every error names op, argument, what it is and what was expected, and is raised before anything is written.
#ifndef SIGNVOTE_ARGUMENTS_H
#define SIGNVOTE_ARGUMENTS_H

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "run.h"

namespace signvote {
namespace binding {

namespace py = pybind11;

// An array, as far as its description goes: its memory may be a device's.
struct Array {
  py::handle object;
  char kind = 0;  // as NumPy says it: 'f' for floating-point numbers, 'i' and 'u' for integers
  size_t itemsize = 0;
  bool is_native = true, is_contiguous = false, is_writable = true;
  bool is_numpy = false;
  const char* expected = nullptr;  // in its place, if its memory is not where the module works
  size_t ndim = 0, size = 0;
  size_t shape[3] = {0, 0, 0};
  py::ssize_t strides[3] = {0, 0, 0};  // bytes; of the first three dimensions, as the shape
  void* data = nullptr;
};

// False if it is no NumPy array.
inline bool describe_numpy(py::handle object, Array* array) {
  if (!py::isinstance<py::array>(object)) return false;
  const auto numpy = py::reinterpret_borrow<py::array>(object);
  const py::dtype dtype = numpy.dtype();
  array->object = object;
  array->is_numpy = true;
  array->kind = dtype.kind();
  array->itemsize = static_cast<size_t>(dtype.itemsize());
  array->is_native = dtype.byteorder() == '=' || dtype.byteorder() == '|';
  array->is_contiguous = (numpy.flags() & py::array::c_style) != 0;
  array->is_writable = numpy.writeable();
  array->ndim = static_cast<size_t>(numpy.ndim());
  array->size = static_cast<size_t>(numpy.size());
  for (size_t i = 0; i < 3 && i < array->ndim; ++i) {
    array->shape[i] = static_cast<size_t>(numpy.shape(static_cast<py::ssize_t>(i)));
    array->strides[i] = numpy.strides(static_cast<py::ssize_t>(i));
  }
  array->data = const_cast<void*>(numpy.data());
  return true;
}

// False if it is none that the module takes: each module says which.
bool to_array(py::handle object, Array* array);

}  // namespace binding
}  // namespace signvote

namespace pybind11 {
namespace detail {

template <>
struct type_caster<signvote::binding::Array> {
  PYBIND11_TYPE_CASTER(signvote::binding::Array, const_name("array"));
  bool load(handle object, bool) { return signvote::binding::to_array(object, &value); }
};

}  // namespace detail
}  // namespace pybind11

namespace signvote {
namespace binding {

constexpr const char* kDTypeNames[kNumDTypes] = {"float32", "float64", "float16", "bfloat16"};
constexpr size_t kItemSizes[kNumDTypes] = {4, 8, 2, 2};
constexpr size_t kMaxRows = 65535;

inline size_t num_words(size_t numel) { return numel / 32 + (numel % 32 != 0); }

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

inline std::string is_repr(py::handle object) { return "is " + std::string(py::repr(object)); }

inline bool is_string(py::handle object, const char* text) {
  return PyUnicode_Check(object.ptr()) && PyUnicode_CompareWithASCIIString(object.ptr(), text) == 0;
}

inline DType to_dtype(const char* op, py::handle object) {
  for (int dtype = 0; dtype < kNumDTypes; ++dtype) {
    if (is_string(object, kDTypeNames[dtype])) return static_cast<DType>(dtype);
  }
  Argument{op, "dtype"}.type_error(is_repr(object), "'float32', 'float64', 'float16' or 'bfloat16'");
}

inline Undecided to_undecided(const char* op, const char* name, py::handle object) {
  if (is_string(object, "coin")) return kCoin;
  if (is_string(object, "positive")) return kPositive;
  if (is_string(object, "negative")) return kNegative;
  Argument{op, name}.value_error(is_repr(object), "'coin', 'positive' or 'negative'");
}

inline py::int_ to_integer(const char* op, const char* name, py::handle object) {
  PyObject* integer = PyNumber_Index(object.ptr());
  if (integer == nullptr) {
    PyErr_Clear();
    Argument{op, name}.type_error(is_repr(object), "an integer");
  }
  return py::reinterpret_steal<py::int_>(integer);
}

inline uint64_t to_uint64(const char* op, const char* name, py::handle object) {
  const py::int_ integer = to_integer(op, name, object);
  const uint64_t value = PyLong_AsUnsignedLongLong(integer.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    Argument{op, name}.value_error(is_repr(integer), "an integer from 0 to 2**64 - 1");
  }
  return value;
}

inline size_t to_size(const char* op, const char* name, py::handle object) {
  const py::int_ integer = to_integer(op, name, object);
  const long long value = PyLong_AsLongLong(integer.ptr());
  if (PyErr_Occurred() || value < 0) {
    PyErr_Clear();
    Argument{op, name}.value_error(is_repr(integer), "an integer from 0 to 2**63 - 1");
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

inline bool has_dtype(const Array& array, const char* kinds, size_t itemsize) {
  return std::string(kinds).find(array.kind) != std::string::npos && array.itemsize == itemsize && array.is_native;
}

inline void check_dtype(const Argument& argument, const Array& array, const char* kinds, size_t itemsize,
                        const std::string& expected) {
  if (array.expected != nullptr) {
    if (array.is_numpy) argument.type_error("is a NumPy array", array.expected);
    argument.value_error("is on device " + std::string(py::str(array.object.attr("device"))), array.expected);
  }
  if (!has_dtype(array, kinds, itemsize)) argument.type_error(is_repr(array.object.attr("dtype")), expected);
}

inline void check_writable(const Argument& argument, const Array& array) {
  if (!array.is_writable) argument.value_error("is read-only", "a writable array");
}

inline Span to_span(const Argument& argument, const Array& array, size_t itemsize, Access access) {
  if (!array.is_contiguous) {
    argument.value_error("is not contiguous",
                         "a C-contiguous array; numpy.ascontiguousarray(x) or x.contiguous() makes one");
  }
  if (access == Access::kWrite) check_writable(argument, array);
  const Span span{static_cast<char*>(array.data), array.size, itemsize};
  if (span.size != 0 && reinterpret_cast<uintptr_t>(span.data) % itemsize != 0) {
    argument.value_error("is not aligned", "an address that is a multiple of " + std::to_string(itemsize));
  }
  return span;
}

inline Span to_coordinates(const Argument& argument, const Array& array, DType dtype, Access access) {
  check_dtype(argument, array, dtype == kBFloat16 ? "iu" : "f", kItemSizes[dtype],
              dtype == kBFloat16 ? "uint16 or int16, the bits of bfloat16" : kDTypeNames[dtype]);
  return to_span(argument, array, kItemSizes[dtype], access);
}

inline void check_words_dtype(const Argument& argument, const Array& array) {
  check_dtype(argument, array, "ui", 4, "uint32 (NumPy) or int32 (torch) words");
}

inline Span to_words(const Argument& argument, const Array& array, Access access) {
  check_words_dtype(argument, array);
  if (array.ndim != 1) argument.value_error("has " + std::to_string(array.ndim) + " dimensions", "1");
  return to_span(argument, array, 4, access);
}

inline void check_size(const Argument& argument, const Span& span, const char* unit, size_t expected) {
  if (span.size != expected) {
    argument.value_error("has " + std::to_string(span.size) + " " + unit, std::to_string(expected));
  }
}

// What is written must share no byte with `other`.
inline void check_apart(const Argument& written, const Span& span, const std::string& other_name, const Span& other) {
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
  py::ssize_t stride = 0;  // of an array: how many words a row begins after the one before
};

inline void check_num_rows(const Argument& argument, size_t num_rows) {
  if (num_rows < 1 || num_rows > kMaxRows) {
    argument.value_error("has " + std::to_string(num_rows) + " rows", "1 to " + std::to_string(kMaxRows));
  }
}

inline std::string has_shape(const Array& array) {
  return "has shape " + std::string(py::repr(array.object.attr("shape")));
}

// Rows of words at any distance from each other: only the last dimension is contiguous.
inline void check_rows_of_words(const Argument& argument, const Array& array) {
  const size_t last = array.ndim - 1;
  if (array.shape[last] > 1 && array.strides[last] != 4) {
    argument.value_error("is not contiguous",
                         "rows of contiguous words; numpy.ascontiguousarray(x) or x.contiguous() makes them");
  }
  bool is_aligned = reinterpret_cast<uintptr_t>(array.data) % 4 == 0;
  for (size_t i = 0; i < last; ++i) is_aligned = is_aligned && (array.shape[i] <= 1 || array.strides[i] % 4 == 0);
  if (array.size > 0 && !is_aligned) argument.value_error("is not aligned", "addresses that are multiples of 4");
}

// An (M, W) array, whose rows may lie at any distance from each other, or, if lists are taken, a list of M arrays of W
// words.
inline Rows to_rows(const Argument& argument, const py::object& object, bool takes_lists) {
  Rows rows;
  Array array;
  if (to_array(object, &array)) {
    check_words_dtype(argument, array);
    if (array.ndim != 2) argument.value_error("has " + std::to_string(array.ndim) + " dimensions", "2");
    const size_t num_rows = array.shape[0];
    check_num_rows(argument, num_rows);
    rows.width = array.shape[1];
    check_rows_of_words(argument, array);
    const char* data = static_cast<const char*>(array.data);
    const py::ssize_t stride = num_rows > 1 ? array.strides[0] : 0;
    rows.stride = stride / 4;
    rows.pointers.reserve(num_rows);
    for (size_t row = 0; row < num_rows; ++row) {
      rows.pointers.push_back(reinterpret_cast<const uint32_t*>(data + static_cast<py::ssize_t>(row) * stride));
    }
    return rows;
  }
  if (!takes_lists) argument.type_error(is_repr(object), "an (M, W) tensor");
  if (!py::isinstance<py::list>(object)) argument.type_error(is_repr(object), "an (M, W) array or a list of M arrays");
  const py::list list = py::reinterpret_borrow<py::list>(object);
  check_num_rows(argument, list.size());
  rows.pointers.reserve(list.size());
  for (const py::handle item : list) {
    const Argument row{argument.op, argument.name + "[" + std::to_string(rows.pointers.size()) + "]"};
    if (!to_array(item, &array)) row.type_error(is_repr(item), "an array of words");
    const Span span = to_words(row, array, Access::kRead);
    if (rows.pointers.empty()) rows.width = span.size;
    check_size(row, span, "words", rows.width);
    rows.pointers.push_back(span.words());
  }
  return rows;
}

inline void check_apart(const Argument& written, const Span& span, const std::string& other_name, const Rows& rows) {
  for (const uint32_t* pointer : rows.pointers) {
    check_apart(written, span, other_name,
                Span{reinterpret_cast<char*>(const_cast<uint32_t*>(pointer)), rows.width, 4});
  }
}

inline Span span_of_words(const uint32_t* words, size_t size) {
  return {reinterpret_cast<char*>(const_cast<uint32_t*>(words)), size, 4};
}

// Ternary words, `width` in each plane.
template <class Word>
struct TernarySpan {
  Planes<Word> planes;
  size_t width;

  Span sign() const { return span_of_words(planes.sign, width); }
  Span active() const { return span_of_words(planes.active, width); }
};

// A (2, width) array, whose planes may lie at any distance from each other.
constexpr size_t kAnyWidth = SIZE_MAX;
template <class Word>
TernarySpan<Word> to_ternary(const Argument& argument, const Array& array, size_t width) {
  check_words_dtype(argument, array);
  if (array.ndim != 2 || array.shape[0] != 2 || (width != kAnyWidth && array.shape[1] != width)) {
    argument.value_error(has_shape(array), "(2, " + (width == kAnyWidth ? "W" : std::to_string(width)) + ")");
  }
  check_rows_of_words(argument, array);
  char* data = static_cast<char*>(array.data);
  return {{reinterpret_cast<Word*>(data), reinterpret_cast<Word*>(data + array.strides[0])}, array.shape[1]};
}

// The same of planes that are written to.
inline TernarySpan<uint32_t> to_written_ternary(const Argument& argument, const Array& array, size_t width) {
  const auto ternary = to_ternary<uint32_t>(argument, array, width);
  check_writable(argument, array);
  check_apart(argument, ternary.sign(), "itself", ternary.active());
  return ternary;
}

// What is written must share no byte with `other`, which is a Span or Rows.
template <class Other>
void check_apart(const Argument& written, const TernarySpan<uint32_t>& ternary, const std::string& other_name,
                 const Other& other) {
  check_apart(written, ternary.sign(), other_name, other);
  check_apart(written, ternary.active(), other_name, other);
}

// The ballots of a ternary vote, of `width` words in each plane.
struct Ballots {
  std::vector<Planes<const uint32_t>> pointers;
  size_t width = 0;
  py::ssize_t stride = 0, plane_stride = 0;  // of an array: how many words a row, and a plane, begins after another

  Rows planes() const {
    Rows rows;
    rows.width = width;
    for (const Planes<const uint32_t>& ballot : pointers) {
      rows.pointers.push_back(ballot.sign);
      rows.pointers.push_back(ballot.active);
    }
    return rows;
  }
};

// An (M, 2, W) array, whose rows and planes may lie at any distance from each other, or, if lists are taken, a list of
// M arrays of shape (2, W).
inline Ballots to_ballots(const Argument& argument, const py::object& object, bool takes_lists) {
  Ballots ballots;
  Array array;
  if (to_array(object, &array)) {
    check_words_dtype(argument, array);
    if (array.ndim != 3 || array.shape[1] != 2) argument.value_error(has_shape(array), "(M, 2, W)");
    const size_t num_rows = array.shape[0];
    check_num_rows(argument, num_rows);
    check_rows_of_words(argument, array);
    const char* data = static_cast<const char*>(array.data);
    ballots.width = array.shape[2];
    ballots.stride = (num_rows > 1 ? array.strides[0] : 0) / 4;
    ballots.plane_stride = array.strides[1] / 4;
    ballots.pointers.reserve(num_rows);
    for (size_t row = 0; row < num_rows; ++row) {
      const char* sign = data + static_cast<py::ssize_t>(row) * ballots.stride * 4;
      ballots.pointers.push_back({reinterpret_cast<const uint32_t*>(sign),
                                  reinterpret_cast<const uint32_t*>(sign + ballots.plane_stride * 4)});
    }
    return ballots;
  }
  if (!takes_lists) argument.type_error(is_repr(object), "an (M, 2, W) tensor");
  if (!py::isinstance<py::list>(object)) {
    argument.type_error(is_repr(object), "an (M, 2, W) array or a list of M arrays");
  }
  const py::list list = py::reinterpret_borrow<py::list>(object);
  check_num_rows(argument, list.size());
  ballots.pointers.reserve(list.size());
  for (const py::handle item : list) {
    const Argument row{argument.op, argument.name + "[" + std::to_string(ballots.pointers.size()) + "]"};
    if (!to_array(item, &array)) row.type_error(is_repr(item), "an array of words");
    const auto ballot = to_ternary<const uint32_t>(row, array, ballots.pointers.empty() ? kAnyWidth : ballots.width);
    ballots.width = ballot.width;
    ballots.pointers.push_back(ballot.planes);
  }
  return ballots;
}

inline uint64_t to_quorum(const char* op, py::handle object) {
  const uint64_t quorum = to_uint64(op, "quorum", object);
  if (quorum < 1) Argument{op, "quorum"}.value_error(is_repr(object), "an integer from 1 on");
  return quorum;
}

inline MomentumCoefficients to_coefficients(const char* op, DType dtype, const std::array<double, 4>& coefficients) {
  for (const double value : coefficients) {
    if (!std::isfinite(dtype == kFloat64 ? value : static_cast<float>(value))) {
      Argument{op, "coefficients"}.value_error(is_repr(py::cast(coefficients)), "four finite numbers");
    }
  }
  return {coefficients[0], coefficients[1], coefficients[2], coefficients[3]};
}

// The momentum that belongs to `numel` coordinates of `dtype`: float64 for float64, float32 otherwise.
inline Span to_momentum(const char* op, const Array& array, DType dtype, size_t numel) {
  const Argument argument{op, "momentum"};
  const Span momentum = to_coordinates(argument, array, dtype == kFloat64 ? kFloat64 : kFloat32, Access::kWrite);
  check_size(argument, momentum, "coordinates", numel);
  return momentum;
}

// Rows of (place, first, numel, coordinate, word), each within `numel` coordinates, if those matter, and `width` words.
constexpr size_t kAnyNumel = SIZE_MAX;
inline Runs to_runs(const char* op, const Array& array, size_t numel, size_t width) {
  const Argument argument{op, "runs"};
  if (!array.is_numpy) argument.type_error(is_repr(py::type::of(array.object)), "a NumPy array");
  if (!has_dtype(array, "i", 8)) argument.type_error(is_repr(array.object.attr("dtype")), "int64");
  if (array.ndim != 2 || array.shape[1] != 5) {
    argument.value_error(has_shape(array), "(n, 5)");
  }
  const Span span = to_span(argument, array, 8, Access::kRead);
  static_assert(sizeof(Run) == 5 * sizeof(int64_t), "a row of the array is a Run");
  const Runs runs{reinterpret_cast<const Run*>(span.data), array.shape[0]};
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

// How many words the plane `active` lies behind `sign`, in messages of `width` words.
inline size_t to_stride(const char* op, py::handle object, size_t width) {
  const size_t stride = to_size(op, "stride", object);
  if (stride > width) Argument{op, "stride"}.value_error(is_repr(object), "at most " + std::to_string(width));
  return stride;
}

// As to_runs, of ternary words: both planes of each run are within `width` words.
inline Runs to_ternary_runs(const char* op, const Array& array, size_t numel, size_t width, size_t stride) {
  const Runs runs = to_runs(op, array, numel, width - stride);
  for (size_t i = 0; i < runs.size; ++i) {
    const size_t count = num_words(static_cast<size_t>(runs.data[i].numel));
    if (count > stride) {
      Argument{op, "stride"}.value_error(
          "is " + std::to_string(stride),
          std::to_string(count) + " or more, as row " + std::to_string(i) + " of runs has so many words");
    }
  }
  return runs;
}

template <class Word>
Planes<Word> planes_at(Word* sign, size_t stride) {
  return {sign, sign + stride};
}

// The runs stay as they were checked while the op writes.
inline void check_runs_apart(const char* op, const Runs& runs, const std::string& written_name, const Span& written) {
  check_apart({op, "runs"}, Span{reinterpret_cast<char*>(const_cast<Run*>(runs.data)), runs.size, sizeof(Run)},
              written_name, written);
}

}  // namespace binding
}  // namespace signvote

#endif
