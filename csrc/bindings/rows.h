// Words in several rows and planes: what is voted on, and ternary words.
#ifndef SIGNVOTE_ROWS_H
#define SIGNVOTE_ROWS_H

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "run.h"

namespace signvote {
namespace binding {

constexpr size_t kMaxRows = 65535;

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

// A list of M arrays, if lists are taken in place of an array of `shape`: `add` puts each to `stack`, Rows or Ballots.
template <class Stack, class Add>
void add_list(Stack* stack, const Argument& argument, const py::object& object, bool takes_lists,
              const std::string& shape, const Add& add) {
  if (!takes_lists) argument.type_error(is_repr(object), "an " + shape + " tensor");
  if (!py::isinstance<py::list>(object)) {
    argument.type_error(is_repr(object), "an " + shape + " array or a list of M arrays");
  }
  const py::list list = py::reinterpret_borrow<py::list>(object);
  check_num_rows(argument, list.size());
  stack->pointers.reserve(list.size());
  for (const py::handle item : list) {
    const Argument row{argument.op, argument.name + "[" + std::to_string(stack->pointers.size()) + "]"};
    Array array;
    if (!to_array(item, &array)) row.type_error(is_repr(item), "an array of words");
    add(row, array);
  }
}

// An (M, W) array, whose rows may lie at any distance from each other, or, if lists are taken, a list of M arrays of W
// words.
inline Rows to_rows(const Argument& argument, const py::object& object, bool takes_lists) {
  Rows rows;
  Array array;
  if (to_array(object, &array)) {
    check_words_dtype(argument, array);
    check_ndim(argument, array, 2);
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
  add_list(&rows, argument, object, takes_lists, "(M, W)", [&](const Argument& row, const Array& words) {
    const Span span = to_words(row, words, Access::kRead);
    if (rows.pointers.empty()) rows.width = span.size;
    check_size(row, span, "words", rows.width);
    rows.pointers.push_back(span.words());
  });
  return rows;
}

inline void check_apart(const Argument& written, const Span& span, const std::string& other_name, const Rows& rows) {
  for (const uint32_t* pointer : rows.pointers) {
    check_apart(written, span, other_name, span_of_words(pointer, rows.width));
  }
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
  add_list(&ballots, argument, object, takes_lists, "(M, 2, W)", [&](const Argument& row, const Array& planes) {
    const auto ballot = to_ternary<const uint32_t>(row, planes, ballots.pointers.empty() ? kAnyWidth : ballots.width);
    ballots.width = ballot.width;
    ballots.pointers.push_back(ballot.planes);
  });
  return ballots;
}

}  // namespace binding
}  // namespace signvote

#endif
