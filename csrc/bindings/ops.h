// The ops as the native modules have them, each once for all targets: check every argument, release the GIL, call the
// target. A target is made of an op's last arguments, and its methods are the ops on what has been checked.
#ifndef SIGNVOTE_OPS_H
#define SIGNVOTE_OPS_H

#include <array>
#include <optional>

#include "bindings/arguments.h"
#include "bindings/rows.h"
#include "bindings/runs_argument.h"
#include "kernels.h"
#include "run.h"

namespace signvote {
namespace binding {

struct Coordinates {
  DType dtype;
  Span span;
};

// Runs, and what their coins come from.
struct Seeded {
  Runs runs;
  CoinsOf coins_of;
  uint64_t seed;
};

template <class Target, class... TargetArguments>
auto pack_signs(const Array& x, py::handle dtype_name, py::handle zeros_name, py::handle seed, const Array& out,
                TargetArguments... target_arguments) {
  const char* op = "pack_signs";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Undecided zeros = to_undecided(op, "zeros", zeros_name);
  const Coordinates source{dtype, to_coordinates({op, "x"}, x, dtype, Access::kRead)};
  const Run whole = whole_run(source.span.size);
  const Seeded work{{&whole, 1}, coins_of_array, to_uint64(op, "seed", seed)};
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", num_words(source.span.size));
  check_apart(out_argument, words, "x", source.span);
  py::gil_scoped_release release;
  return target.pack_signs(source, work, zeros, words);
}

template <class Target, class... TargetArguments>
auto pack_momentum(const Array& x, py::handle dtype_name, const Array& momentum_array,
                   const std::array<double, 4>& coefficients_array, py::handle zeros_name, py::handle seed,
                   const Array& out, TargetArguments... target_arguments) {
  const char* op = "pack_momentum";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Undecided zeros = to_undecided(op, "zeros", zeros_name);
  const Coordinates source{dtype, to_coordinates({op, "x"}, x, dtype, Access::kRead)};
  const Span momentum = to_momentum(op, momentum_array, dtype, source.span.size);
  const MomentumCoefficients coefficients = to_coefficients(op, dtype, coefficients_array);
  const Run whole = whole_run(source.span.size);
  const Seeded work{{&whole, 1}, coins_of_array, to_uint64(op, "seed", seed)};
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", num_words(source.span.size));
  check_apart({op, "momentum"}, momentum, "x", source.span);
  check_apart(out_argument, words, "x", source.span);
  check_apart(out_argument, words, "momentum", momentum);
  py::gil_scoped_release release;
  return target.pack_momentum(source, momentum, coefficients, work, zeros, words);
}

template <class Target, class... TargetArguments>
auto has_nonfinite(const Array& x, py::handle dtype_name, TargetArguments... target_arguments) {
  const char* op = "has_nonfinite";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Coordinates source{dtype, to_coordinates({op, "x"}, x, dtype, Access::kRead)};
  const Run whole = whole_run(source.span.size);
  py::gil_scoped_release release;
  return target.has_nonfinite(source, {&whole, 1});
}

template <class Target, class... TargetArguments>
auto majority_vote(const py::object& stack, py::handle numel_object, py::handle ties_name, py::handle seed,
                   const Array& out, TargetArguments... target_arguments) {
  const char* op = "majority_vote";
  const Target target(op, target_arguments...);
  const Undecided ties = to_undecided(op, "ties", ties_name);
  const Argument stack_argument{op, "stack"};
  const Rows rows = to_rows(stack_argument, stack, Target::kTakesLists);
  const size_t numel = numel_object.is_none() ? rows.width * 32 : to_size(op, "numel", numel_object);
  check_width(stack_argument, rows.width, "row", numel);
  const Run whole = whole_run(numel);
  const Seeded work{{&whole, 1}, coins_of_array, to_uint64(op, "seed", seed)};
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", rows.width);
  check_apart(out_argument, words, "stack", rows);
  py::gil_scoped_release release;
  return target.majority_vote(rows, work, ties, words);
}

template <class Target, class... TargetArguments>
void unpack_signs(const Array& words_array, py::handle numel_object, py::handle dtype_name, uint64_t positive,
                  const Array& out, TargetArguments... target_arguments) {
  const char* op = "unpack_signs";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Argument words_argument{op, "words"};
  const Span words = to_words(words_argument, words_array, Access::kRead);
  const size_t numel = to_size(op, "numel", numel_object);
  check_size(words_argument, words, "words", num_words(numel));
  const Argument out_argument{op, "out"};
  const Coordinates result{dtype, to_coordinates(out_argument, out, dtype, Access::kWrite)};
  check_size(out_argument, result.span, "coordinates", numel);
  check_apart(out_argument, result.span, "words", words);
  const Run whole = whole_run(numel);
  py::gil_scoped_release release;
  target.unpack_signs(words, {&whole, 1}, positive, result);
}

template <class Target, class... TargetArguments>
auto pack_runs(const Array& bucket, py::handle dtype_name, const std::optional<Array>& momentum_array,
               const std::array<double, 4>& coefficients_array, const Array& runs_array, py::handle zeros_name,
               py::handle seed, const Array& out, TargetArguments... target_arguments) {
  const char* op = "pack_runs";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Undecided zeros = to_undecided(op, "zeros", zeros_name);
  const Coordinates source{dtype, to_coordinates({op, "bucket"}, bucket, dtype, Access::kRead)};
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  const Runs runs = to_runs(op, runs_array, source.span.size, words.size);
  const Seeded work{runs, coins_by_place, to_uint64(op, "seed", seed)};
  check_apart(out_argument, words, "bucket", source.span);
  check_runs_apart(op, runs, "out", words);
  if (!momentum_array) {
    py::gil_scoped_release release;
    return target.pack_signs(source, work, zeros, words);
  }
  const Span momentum = to_momentum(op, *momentum_array, dtype, source.span.size);
  const MomentumCoefficients coefficients = to_coefficients(op, dtype, coefficients_array);
  check_apart({op, "momentum"}, momentum, "bucket", source.span);
  check_apart(out_argument, words, "momentum", momentum);
  check_runs_apart(op, runs, "momentum", momentum);
  py::gil_scoped_release release;
  return target.pack_momentum(source, momentum, coefficients, work, zeros, words);
}

template <class Target, class... TargetArguments>
auto vote_runs(const py::object& rows_object, const Array& runs_array, py::handle ties_name, py::handle seed,
               const Array& out, TargetArguments... target_arguments) {
  const char* op = "vote_runs";
  const Target target(op, target_arguments...);
  const Undecided ties = to_undecided(op, "ties", ties_name);
  const Rows rows = to_rows({op, "rows"}, rows_object, Target::kTakesLists);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", rows.width);
  const Runs runs = to_runs(op, runs_array, kAnyNumel, rows.width);
  const Seeded work{runs, coins_by_place, to_uint64(op, "seed", seed)};
  check_apart(out_argument, words, "rows", rows);
  check_runs_apart(op, runs, "out", words);
  py::gil_scoped_release release;
  return target.majority_vote(rows, work, ties, words);
}

template <class Target, class... TargetArguments>
void unpack_runs(const Array& words_array, const Array& runs_array, py::handle dtype_name, uint64_t positive,
                 const Array& bucket, TargetArguments... target_arguments) {
  const char* op = "unpack_runs";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Span words = to_words({op, "words"}, words_array, Access::kRead);
  const Argument bucket_argument{op, "bucket"};
  const Coordinates result{dtype, to_coordinates(bucket_argument, bucket, dtype, Access::kWrite)};
  const Runs runs = to_runs(op, runs_array, result.span.size, words.size);
  check_apart(bucket_argument, result.span, "words", words);
  check_runs_apart(op, runs, "bucket", result.span);
  py::gil_scoped_release release;
  target.unpack_signs(words, runs, positive, result);
}

template <class Target, class... TargetArguments>
auto pack_ternary(const Array& x, py::handle dtype_name, uint64_t limit, const Array& out,
                  TargetArguments... target_arguments) {
  const char* op = "pack_ternary";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Coordinates source{dtype, to_coordinates({op, "x"}, x, dtype, Access::kRead)};
  const Argument out_argument{op, "out"};
  const auto result = to_written_ternary(out_argument, out, num_words(source.span.size));
  check_apart(out_argument, result, "x", source.span);
  const Run whole = whole_run(source.span.size);
  py::gil_scoped_release release;
  return target.pack_ternary(source, {&whole, 1}, limit, result.planes);
}

template <class Target, class... TargetArguments>
auto majority_vote_ternary(const py::object& stack, py::handle numel_object, py::handle quorum_object, const Array& out,
                           TargetArguments... target_arguments) {
  const char* op = "majority_vote_ternary";
  const Target target(op, target_arguments...);
  const Argument stack_argument{op, "stack"};
  const Ballots ballots = to_ballots(stack_argument, stack, Target::kTakesLists);
  const size_t numel = numel_object.is_none() ? ballots.width * 32 : to_size(op, "numel", numel_object);
  check_width(stack_argument, ballots.width, "plane", numel);
  const uint64_t quorum = to_quorum(op, quorum_object);
  const Argument out_argument{op, "out"};
  const auto result = to_written_ternary(out_argument, out, ballots.width);
  check_apart(out_argument, result, "stack", ballots.planes());
  const Run whole = whole_run(numel);
  py::gil_scoped_release release;
  return target.majority_vote_ternary(ballots, {&whole, 1}, quorum, result.planes);
}

template <class Target, class... TargetArguments>
void unpack_ternary(const Array& planes_array, py::handle numel_object, py::handle dtype_name, uint64_t positive,
                    const Array& out, TargetArguments... target_arguments) {
  const char* op = "unpack_ternary";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const size_t numel = to_size(op, "numel", numel_object);
  const auto source = to_ternary<const uint32_t>({op, "planes"}, planes_array, num_words(numel));
  const Argument out_argument{op, "out"};
  const Coordinates result{dtype, to_coordinates(out_argument, out, dtype, Access::kWrite)};
  check_size(out_argument, result.span, "coordinates", numel);
  check_apart(out_argument, result.span, "planes", source.sign());
  check_apart(out_argument, result.span, "planes", source.active());
  const Run whole = whole_run(numel);
  py::gil_scoped_release release;
  target.unpack_ternary(source.planes, {&whole, 1}, positive, result);
}

template <class Target, class... TargetArguments>
auto pack_ternary_runs(const Array& bucket, py::handle dtype_name, uint64_t limit, const Array& runs_array,
                       py::handle stride_object, const Array& out, TargetArguments... target_arguments) {
  const char* op = "pack_ternary_runs";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Coordinates source{dtype, to_coordinates({op, "bucket"}, bucket, dtype, Access::kRead)};
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  const size_t stride = to_stride(op, stride_object, words.size);
  const Runs runs = to_ternary_runs(op, runs_array, source.span.size, words.size, stride);
  check_apart(out_argument, words, "bucket", source.span);
  check_runs_apart(op, runs, "out", words);
  py::gil_scoped_release release;
  return target.pack_ternary(source, runs, limit, planes_at(words.mutable_words(), stride));
}

template <class Target, class... TargetArguments>
auto vote_ternary_runs(const py::object& rows_object, const Array& runs_array, py::handle stride_object,
                       py::handle quorum_object, const Array& out, TargetArguments... target_arguments) {
  const char* op = "vote_ternary_runs";
  const Target target(op, target_arguments...);
  const Rows rows = to_rows({op, "rows"}, rows_object, Target::kTakesLists);
  const size_t stride = to_stride(op, stride_object, rows.width);
  const uint64_t quorum = to_quorum(op, quorum_object);
  const Argument out_argument{op, "out"};
  const Span words = to_words(out_argument, out, Access::kWrite);
  check_size(out_argument, words, "words", rows.width);
  const Runs runs = to_ternary_runs(op, runs_array, kAnyNumel, rows.width, stride);
  check_apart(out_argument, words, "rows", rows);
  check_runs_apart(op, runs, "out", words);
  Ballots ballots;
  ballots.width = rows.width - stride;
  ballots.stride = rows.stride;
  ballots.plane_stride = static_cast<py::ssize_t>(stride);
  for (const uint32_t* row : rows.pointers) ballots.pointers.push_back(planes_at(row, stride));
  py::gil_scoped_release release;
  return target.majority_vote_ternary(ballots, runs, quorum, planes_at(words.mutable_words(), stride));
}

template <class Target, class... TargetArguments>
void unpack_ternary_runs(const Array& words_array, const Array& runs_array, py::handle stride_object,
                         py::handle dtype_name, uint64_t positive, const Array& bucket,
                         TargetArguments... target_arguments) {
  const char* op = "unpack_ternary_runs";
  const Target target(op, target_arguments...);
  const DType dtype = to_dtype(op, dtype_name);
  const Span words = to_words({op, "words"}, words_array, Access::kRead);
  const size_t stride = to_stride(op, stride_object, words.size);
  const Argument bucket_argument{op, "bucket"};
  const Coordinates result{dtype, to_coordinates(bucket_argument, bucket, dtype, Access::kWrite)};
  const Runs runs = to_ternary_runs(op, runs_array, result.span.size, words.size, stride);
  check_apart(bucket_argument, result.span, "words", words);
  check_runs_apart(op, runs, "bucket", result.span);
  py::gil_scoped_release release;
  target.unpack_ternary(planes_at(words.words(), stride), runs, positive, result);
}

}  // namespace binding
}  // namespace signvote

#endif
