// Runs, as the ops over them take them: a table in a NumPy array, of words in one plane or in two.
#ifndef SIGNVOTE_RUNS_ARGUMENT_H
#define SIGNVOTE_RUNS_ARGUMENT_H

#include <pybind11/pybind11.h>

#include <string>

#include "bindings/arguments.h"
#include "run.h"

namespace signvote {
namespace binding {

// Rows of (place, first, numel, coordinate, word), each within `numel` coordinates, if those matter, and `width` words.
constexpr size_t kAnyNumel = SIZE_MAX;
inline Runs to_runs(const char* op, const Array& array, size_t numel, size_t width) {
  const Argument argument{op, "runs"};
  if (!array.is_numpy) argument.type_error(is_repr(py::type::of(array.object)), "a NumPy array");
  if (!has_dtype(array, "i", 8)) argument.type_error(is_repr(array.object.attr("dtype")), "int64");
  if (array.ndim != 2 || array.shape[1] != 5) argument.value_error(has_shape(array), "(n, 5)");
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
