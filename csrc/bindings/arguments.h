// Arguments of the native ops: what they are checked for, and what they become. Every error names op, argument, what it
// is and what was expected, and is raised before anything is written.
#ifndef SIGNVOTE_ARGUMENTS_H
#define SIGNVOTE_ARGUMENTS_H

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <string>

#include "bindings/array.h"
#include "kernels.h"

namespace signvote {
namespace binding {

constexpr const char* kDTypeNames[kNumDTypes] = {"float32", "float64", "float16", "bfloat16"};
constexpr size_t kItemSizes[kNumDTypes] = {4, 8, 2, 2};

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

// By how many votes one sign must lead.
inline uint64_t to_quorum(const char* op, py::handle object) {
  const uint64_t quorum = to_uint64(op, "quorum", object);
  if (quorum < 1) Argument{op, "quorum"}.value_error(is_repr(object), "an integer from 1 on");
  return quorum;
}

// A range of memory with `size` items.
struct Span {
  char* data;
  size_t size;
  size_t itemsize;

  const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(data); }
  uint32_t* mutable_words() const { return reinterpret_cast<uint32_t*>(data); }
};

inline Span span_of_words(const uint32_t* words, size_t size) {
  return {reinterpret_cast<char*>(const_cast<uint32_t*>(words)), size, 4};
}

enum class Access { kRead, kWrite };

inline std::string has_shape(const Array& array) {
  return "has shape " + std::string(py::repr(array.object.attr("shape")));
}

inline void check_ndim(const Argument& argument, const Array& array, size_t expected) {
  if (array.ndim != expected) {
    argument.value_error("has " + std::to_string(array.ndim) + " dimensions", std::to_string(expected));
  }
}

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
  check_ndim(argument, array, 1);
  return to_span(argument, array, 4, access);
}

inline void check_size(const Argument& argument, const Span& span, const char* unit, size_t expected) {
  if (span.size != expected) {
    argument.value_error("has " + std::to_string(span.size) + " " + unit, std::to_string(expected));
  }
}

// That `width` words, which are those of a `unit`, are as many as hold `numel` coordinates.
inline void check_width(const Argument& argument, size_t width, const char* unit, size_t numel) {
  if (num_words(numel) != width) {
    argument.value_error("has " + std::to_string(width) + " words in a " + unit,
                         std::to_string(num_words(numel)) + " for numel " + std::to_string(numel));
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

}  // namespace binding
}  // namespace signvote

#endif
