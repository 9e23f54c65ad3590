// The module signvote._core: the ops on the CPU, through runs.h and tally.h.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/array.h"
#include "bindings/ops.h"
#include "bindings/rows.h"
#include "bindings/runs_argument.h"
#include "cpu/dispatch.h"
#include "kernels.h"
#include "runs.h"
#include "tally.h"

namespace py = pybind11;

bool signvote::binding::to_array(py::handle object, Array* array) { return describe_numpy(object, array); }

namespace {

using namespace signvote::binding;
using signvote::coins_by_place;
using signvote::coins_of_array;
using signvote::CounterPlanes;
using signvote::Kernels;
using signvote::mix;
using signvote::MomentumCoefficients;
using signvote::PackCounts;
using signvote::Planes;
using signvote::Run;
using signvote::Runs;
using signvote::Undecided;
using signvote::whole_run;

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

size_t to_num_threads(const char* op, py::handle object) {
  const py::int_ integer = to_integer(op, "num_threads", object);
  const long long value = PyLong_AsLongLong(integer.ptr());
  if (PyErr_Occurred() || value < 1) {
    PyErr_Clear();
    Argument{op, "num_threads"}.value_error(is_repr(integer), "an integer from 1 to 2**63 - 1");
  }
  return static_cast<size_t>(value);
}

// The target of an op: an implementation and a number of threads.
struct Cpu {
  static constexpr bool kTakesLists = true;
  const Kernels& kernels;
  size_t max_threads;

  Cpu(const char* op, py::handle implementation, py::handle num_threads)
      : kernels(to_kernels(op, implementation)), max_threads(to_num_threads(op, num_threads)) {}

  // Zeros, nonfinite.
  using Counts = std::pair<uint64_t, uint64_t>;

  Counts pack_signs(const Coordinates& x, const Seeded& work, Undecided zeros, const Span& words) const {
    const PackCounts counts = signvote::pack_runs(kernels, x.dtype, x.span.data, x.span.itemsize, work.runs, zeros,
                                                  work.coins_of, work.seed, words.mutable_words(), max_threads);
    return {counts.zeros, counts.nonfinite};
  }
  Counts pack_momentum(const Coordinates& x, const Span& momentum, const MomentumCoefficients& coefficients,
                       const Seeded& work, Undecided zeros, const Span& words) const {
    const PackCounts counts = signvote::pack_runs_momentum(
        kernels, x.dtype, x.span.data, x.span.itemsize, momentum.data, momentum.itemsize, coefficients, work.runs,
        zeros, work.coins_of, work.seed, words.mutable_words(), max_threads);
    return {counts.zeros, counts.nonfinite};
  }
  bool has_nonfinite(const Coordinates& x, const Runs& runs) const {
    return signvote::has_nonfinite(kernels, x.dtype, x.span.data, x.span.itemsize, runs, max_threads);
  }
  uint64_t majority_vote(const Rows& rows, const Seeded& work, Undecided ties, const Span& words) const {
    return signvote::vote_runs(kernels, rows.pointers, work.runs, ties, work.coins_of, work.seed, words.mutable_words(),
                               max_threads);
  }
  void unpack_signs(const Span& words, const Runs& runs, uint64_t positive, const Coordinates& out) const {
    signvote::unpack_runs(kernels, out.dtype, words.words(), runs, positive, out.span.data, out.span.itemsize,
                          max_threads);
  }
  Counts pack_ternary(const Coordinates& x, const Runs& runs, uint64_t limit, const Planes<uint32_t>& out) const {
    const PackCounts counts =
        signvote::pack_ternary_runs(kernels, x.dtype, x.span.data, x.span.itemsize, runs, limit, out, max_threads);
    return {counts.zeros, counts.nonfinite};
  }
  uint64_t majority_vote_ternary(const Ballots& ballots, const Runs& runs, uint64_t quorum,
                                 const Planes<uint32_t>& out) const {
    return signvote::vote_ternary_runs(kernels, ballots.pointers, runs, quorum, out, max_threads);
  }
  void unpack_ternary(const Planes<const uint32_t>& planes, const Runs& runs, uint64_t positive,
                      const Coordinates& out) const {
    signvote::unpack_ternary_runs(kernels, out.dtype, planes, runs, positive, out.span.data, out.span.itemsize,
                                  max_threads);
  }
};

// A (P, W) array of counter planes.
CounterPlanes to_counters(const Argument& argument, const Array& array, Access access) {
  check_words_dtype(argument, array);
  check_ndim(argument, array, 2);
  const Span span = to_span(argument, array, 4, access);
  const size_t num_planes = array.shape[0];
  if (num_planes < 1 || num_planes > signvote::kMaxCounterPlanes) {
    argument.value_error("has " + std::to_string(num_planes) + " planes",
                         "1 to " + std::to_string(signvote::kMaxCounterPlanes));
  }
  return {span.mutable_words(), num_planes, array.shape[1]};
}

Span span_of(const CounterPlanes& counters) {
  return {reinterpret_cast<char*>(counters.data), counters.num_planes * counters.width, 4};
}

size_t to_numel_of(const char* op, py::handle object, const CounterPlanes& counters) {
  const size_t numel = to_size(op, "numel", object);
  check_width({op, "planes"}, counters.width, "plane", numel);
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

void tally_add(const Array& planes_array, const Array& words_array, py::handle weight_object, py::handle implementation,
               py::handle num_threads) {
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

void tally_add_ternary(const Array& planes_array, const Array& words_array, py::handle weight_object,
                       py::handle implementation, py::handle num_threads) {
  const char* op = "tally_add_ternary";
  const Kernels& kernels = to_kernels(op, implementation);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Argument planes_argument{op, "planes"};
  const CounterPlanes counters = to_counters(planes_argument, planes_array, Access::kWrite);
  const Argument words_argument{op, "words"};
  const auto words = to_ternary<const uint32_t>(words_argument, words_array, counters.width);
  const uint64_t weight = to_count(op, "weight", weight_object, counters);
  check_apart(planes_argument, span_of(counters), "words", words.sign());
  check_apart(planes_argument, span_of(counters), "words", words.active());
  py::gil_scoped_release release;
  signvote::tally_add_ternary(kernels, counters, words.planes, weight, max_threads);
}

void tally_merge(const Array& planes_array, const Array& others_array, py::handle implementation,
                 py::handle num_threads) {
  const char* op = "tally_merge";
  const Kernels& kernels = to_kernels(op, implementation);
  const size_t max_threads = to_num_threads(op, num_threads);
  const Argument planes_argument{op, "planes"}, others_argument{op, "others"};
  const CounterPlanes counters = to_counters(planes_argument, planes_array, Access::kWrite);
  const CounterPlanes others = to_counters(others_argument, others_array, Access::kRead);
  if (others.width != counters.width || others.num_planes > counters.num_planes) {
    const std::string largest = std::to_string(counters.num_planes) + " planes of " + std::to_string(counters.width);
    others_argument.value_error(has_shape(others_array), "at most " + largest + " words");
  }
  check_apart(planes_argument, span_of(counters), "others", span_of(others));
  py::gil_scoped_release release;
  signvote::tally_merge(kernels, counters, others, max_threads);
}

uint64_t tally_decide(const Array& planes_array, py::handle num_votes_object, py::handle numel_or_runs,
                      py::handle ties_name, py::handle seed_object, const Array& out, py::handle implementation,
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
  Array runs_array;
  if (to_array(numel_or_runs, &runs_array)) {
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

// Of a number of coordinates, to a (2, W) array, without `stride`; of runs, to a message of words.
uint64_t tally_decide_ternary(const Array& planes_array, py::handle num_votes_object, py::handle quorum_object,
                              py::handle numel_or_runs, py::handle stride_object, const Array& out,
                              py::handle implementation, py::handle num_threads) {
  const char* op = "tally_decide_ternary";
  const Kernels& kernels = to_kernels(op, implementation);
  const size_t max_threads = to_num_threads(op, num_threads);
  const CounterPlanes counters = to_counters({op, "planes"}, planes_array, Access::kRead);
  const uint64_t num_votes = to_count(op, "num_votes", num_votes_object, counters);
  const uint64_t quorum = to_quorum(op, quorum_object);
  const Argument out_argument{op, "out"};
  Array runs_array;
  if (to_array(numel_or_runs, &runs_array)) {
    const Span words = to_words(out_argument, out, Access::kWrite);
    const size_t stride = to_stride(op, stride_object, words.size);
    const Runs runs = to_ternary_runs(op, runs_array, kAnyNumel, std::min(words.size, stride + counters.width), stride);
    check_apart(out_argument, words, "planes", span_of(counters));
    check_runs_apart(op, runs, "out", words);
    py::gil_scoped_release release;
    return signvote::tally_decide_ternary(kernels, counters, num_votes, quorum, runs,
                                          planes_at(words.mutable_words(), stride), max_threads);
  }
  const Run whole = whole_run(to_numel_of(op, numel_or_runs, counters));
  const auto result = to_written_ternary(out_argument, out, counters.width);
  check_apart(out_argument, result, "planes", span_of(counters));
  py::gil_scoped_release release;
  return signvote::tally_decide_ternary(kernels, counters, num_votes, quorum, {&whole, 1}, result.planes, max_threads);
}

void tally_counts(const Array& planes_array, py::handle numel_object, const Array& out) {
  const char* op = "tally_counts";
  const CounterPlanes counters = to_counters({op, "planes"}, planes_array, Access::kRead);
  const size_t numel = to_numel_of(op, numel_object, counters);
  const Argument out_argument{op, "out"};
  if (!has_dtype(out, "i", 4)) out_argument.type_error(is_repr(out.object.attr("dtype")), "int32");
  const Span target = to_span(out_argument, out, 4, Access::kWrite);
  check_size(out_argument, target, "coordinates", numel);
  check_apart(out_argument, target, "planes", span_of(counters));
  py::gil_scoped_release release;
  signvote::tally_counts(counters, numel, reinterpret_cast<int32_t*>(target.data));
}

// As the ops over runs check them; errors name `op`.
void check_runs(const std::string& op, const Array& runs, py::handle num_coordinates, py::handle num_words) {
  to_runs(op.c_str(), runs, to_size(op.c_str(), "num_coordinates", num_coordinates),
          to_size(op.c_str(), "num_words", num_words));
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
  m.def("pack_signs", &pack_signs<Cpu, py::handle, py::handle>, py::arg("x"), py::arg("dtype"), py::arg("zeros"),
        py::arg("seed"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("pack_momentum", &pack_momentum<Cpu, py::handle, py::handle>, py::arg("x"), py::arg("dtype"),
        py::arg("momentum"), py::arg("coefficients"), py::arg("zeros"), py::arg("seed"), py::arg("out"),
        py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("has_nonfinite", &has_nonfinite<Cpu, py::handle, py::handle>, py::arg("x"), py::arg("dtype"),
        py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("majority_vote", &majority_vote<Cpu, py::handle, py::handle>, py::arg("rows"), py::arg("numel"),
        py::arg("ties"), py::arg("seed"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("unpack_signs", &unpack_signs<Cpu, py::handle, py::handle>, py::arg("words"), py::arg("numel"),
        py::arg("dtype"), py::arg("positive"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("pack_runs", &pack_runs<Cpu, py::handle, py::handle>, py::arg("bucket"), py::arg("dtype"), py::arg("momentum"),
        py::arg("coefficients"), py::arg("runs"), py::arg("zeros"), py::arg("seed"), py::arg("out"),
        py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("vote_runs", &vote_runs<Cpu, py::handle, py::handle>, py::arg("rows"), py::arg("runs"), py::arg("ties"),
        py::arg("seed"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("unpack_runs", &unpack_runs<Cpu, py::handle, py::handle>, py::arg("words"), py::arg("runs"), py::arg("dtype"),
        py::arg("positive"), py::arg("bucket"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("pack_ternary", &pack_ternary<Cpu, py::handle, py::handle>, py::arg("x"), py::arg("dtype"), py::arg("limit"),
        py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("majority_vote_ternary", &majority_vote_ternary<Cpu, py::handle, py::handle>, py::arg("rows"), py::arg("numel"),
        py::arg("quorum"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("unpack_ternary", &unpack_ternary<Cpu, py::handle, py::handle>, py::arg("planes"), py::arg("numel"),
        py::arg("dtype"), py::arg("positive"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("pack_ternary_runs", &pack_ternary_runs<Cpu, py::handle, py::handle>, py::arg("bucket"), py::arg("dtype"),
        py::arg("limit"), py::arg("runs"), py::arg("stride"), py::arg("out"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("vote_ternary_runs", &vote_ternary_runs<Cpu, py::handle, py::handle>, py::arg("rows"), py::arg("runs"),
        py::arg("stride"), py::arg("quorum"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("unpack_ternary_runs", &unpack_ternary_runs<Cpu, py::handle, py::handle>, py::arg("words"), py::arg("runs"),
        py::arg("stride"), py::arg("dtype"), py::arg("positive"), py::arg("bucket"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("check_runs", &check_runs, py::arg("op"), py::arg("runs"), py::arg("num_coordinates"), py::arg("num_words"));
  m.def("tally_add", &tally_add, py::arg("planes"), py::arg("words"), py::arg("weight"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("tally_add_ternary", &tally_add_ternary, py::arg("planes"), py::arg("words"), py::arg("weight"),
        py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("tally_merge", &tally_merge, py::arg("planes"), py::arg("others"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("tally_decide", &tally_decide, py::arg("planes"), py::arg("num_votes"), py::arg("numel_or_runs"),
        py::arg("ties"), py::arg("seed"), py::arg("out"), py::arg("implementation"), py::arg("num_threads") = 1);
  m.def("tally_decide_ternary", &tally_decide_ternary, py::arg("planes"), py::arg("num_votes"), py::arg("quorum"),
        py::arg("numel_or_runs"), py::arg("stride"), py::arg("out"), py::arg("implementation"),
        py::arg("num_threads") = 1);
  m.def("tally_counts", &tally_counts, py::arg("planes"), py::arg("numel"), py::arg("out"));
}
