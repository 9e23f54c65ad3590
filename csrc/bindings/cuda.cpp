// The module signvote._cuda: the ops on a CUDA device, as launches of its kernels. Tensors cross as they are, and tell
// what they know of themselves: no torch headers, so that one binary serves every torch version.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/array.h"
#include "bindings/ops.h"
#include "bindings/rows.h"
#include "cuda/kernels.h"
#include "kernels.h"

namespace py = pybind11;

// A NumPy array, which runs are, or a tensor, which all else is.
bool signvote::binding::to_array(py::handle object, Array* array) {
  *array = {};
  const bool is_numpy = describe_numpy(object, array);
  if (!is_numpy && !py::hasattr(object, "is_cuda")) return false;
  if (is_numpy || !object.attr("is_cuda").cast<bool>()) {
    array->object = object;
    array->expected = "a tensor on a CUDA device";
    return true;
  }
  const auto ask = [&](const char* name, auto... arguments) {
    return object.attr(name)(arguments...).template cast<size_t>();
  };
  array->object = object;
  const std::string dtype = py::str(object.attr("dtype"));
  const auto is_a = [&](const char* name) { return dtype.rfind(name, 0) == 0; };
  array->kind = is_a("torch.float") ? 'f' : is_a("torch.int") ? 'i' : is_a("torch.uint") ? 'u' : 'V';
  array->itemsize = ask("element_size");
  array->is_contiguous = ask("is_contiguous") != 0;
  array->ndim = ask("dim");
  array->size = ask("numel");
  for (size_t i = 0; i < 3 && i < array->ndim; ++i) {
    array->shape[i] = ask("size", i);
    array->strides[i] = static_cast<py::ssize_t>(ask("stride", i) * array->itemsize);
  }
  array->data = reinterpret_cast<void*>(ask("data_ptr"));
  return true;
}

namespace {

using namespace signvote::binding;
namespace cuda = signvote::cuda;
using signvote::CoinsOf;
using signvote::MomentumCoefficients;
using signvote::PackCounts;
using signvote::Planes;
using signvote::Run;
using signvote::Runs;
using signvote::Undecided;

std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA: " + describe(error));
}

bool is_no_code(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
         error == cudaErrorUnsupportedPtxVersion;
}

cudaDeviceProp properties_of(const char* op, int device) {
  cudaDeviceProp properties;
  check(op, cudaGetDeviceProperties(&properties, device));
  return properties;
}

// The target of an op: a stream. Of an op on runs, also their pieces in the device's memory; and where it is to count,
// if anywhere, what the op on a CPU returns.
class Stream {
 public:
  static constexpr bool kTakesLists = false;

  Stream(const char* op, const std::optional<Array>& counts, int device, uintptr_t stream)
      : op_(op), device_(device), stream_(reinterpret_cast<cudaStream_t>(stream)) {
    if (counts) counts_ = to_int64({op, "counts"}, *counts, Access::kWrite);
  }
  Stream(const char* op, const Array& pieces, const std::optional<Array>& counts, int device, uintptr_t stream)
      : Stream(op, counts, device, stream) {
    const Argument argument{op, "pieces"};
    pieces_ = to_int64(argument, pieces, Access::kRead);
    if (pieces.ndim != 2 || pieces.shape[1] != 5) argument.value_error(has_shape(pieces), "(n, 5)");
  }

  void pack_signs(const Coordinates& x, const Seeded& work, Undecided zeros, const Span& words) const {
    PackCounts* counts = pack_counts({x.span, words});
    launch(cuda::pack_signs, x.dtype, x.span.data, work_on(work.runs, work.coins_of, work.seed, cuda::kPiece), zeros,
           words.mutable_words(), counts);
  }
  void pack_momentum(const Coordinates& x, const Span& momentum, const MomentumCoefficients& coefficients,
                     const Seeded& work, Undecided zeros, const Span& words) const {
    PackCounts* counts = pack_counts({x.span, momentum, words});
    launch(cuda::pack_momentum, x.dtype, x.span.data, momentum.data,
           work_on(work.runs, work.coins_of, work.seed, cuda::kPiece), coefficients, zeros, words.mutable_words(),
           counts);
  }
  void has_nonfinite(const Coordinates& x, const Runs& runs) const {
    launch(cuda::pack_signs, x.dtype, x.span.data, work_on(runs, signvote::coins_of_array, 0, cuda::kPiece),
           signvote::kNegative, nullptr, pack_counts({x.span}));
  }
  void majority_vote(const Rows& rows, const Seeded& work, Undecided ties, const Span& words) const {
    char* tied = counts_of(1, {words});
    if (counts_) check_apart({op_, "counts"}, *counts_, "the rows", rows);
    launch(cuda::majority_vote, rows.pointers[0], rows.pointers.size(), static_cast<size_t>(rows.stride),
           work_on(work.runs, work.coins_of, work.seed, cuda::kVotePiece), ties, words.mutable_words(),
           reinterpret_cast<uint64_t*>(tied));
  }
  void unpack_signs(const Span& words, const Runs& runs, uint64_t positive, const Coordinates& out) const {
    launch(cuda::unpack_signs, out.dtype, words.words(), work_on(runs, signvote::coins_of_array, 0, cuda::kPiece),
           positive, static_cast<void*>(out.span.data));
  }
  void pack_ternary(const Coordinates& x, const Runs& runs, uint64_t limit, const Planes<uint32_t>& out) const {
    const size_t width = width_of(runs);
    PackCounts* counts = pack_counts({x.span, span_of_words(out.sign, width), span_of_words(out.active, width)});
    launch(cuda::pack_ternary, x.dtype, x.span.data, work_on(runs, signvote::coins_of_array, 0, cuda::kPiece), limit,
           out.sign, out.active, counts);
  }
  void majority_vote_ternary(const Ballots& ballots, const Runs& runs, uint64_t quorum,
                             const Planes<uint32_t>& out) const {
    const size_t width = width_of(runs);
    char* zeros = counts_of(1, {span_of_words(out.sign, width), span_of_words(out.active, width)});
    if (counts_) check_apart({op_, "counts"}, *counts_, "the rows", ballots.planes());
    launch(cuda::majority_vote_ternary, ballots.pointers[0].sign, ballots.pointers[0].active, ballots.pointers.size(),
           static_cast<size_t>(ballots.stride), work_on(runs, signvote::coins_of_array, 0, cuda::kVotePiece), quorum,
           out.sign, out.active, reinterpret_cast<uint64_t*>(zeros));
  }
  void unpack_ternary(const Planes<const uint32_t>& planes, const Runs& runs, uint64_t positive,
                      const Coordinates& out) const {
    launch(cuda::unpack_ternary, out.dtype, planes.sign, planes.active,
           work_on(runs, signvote::coins_of_array, 0, cuda::kPiece), positive, static_cast<void*>(out.span.data));
  }

 private:
  // How many words there are in a plane at least.
  static size_t width_of(const Runs& runs) {
    size_t width = 0;
    for (const Run& run : runs) {
      width = std::max(width, static_cast<size_t>(run.word) + num_words(static_cast<size_t>(run.numel)));
    }
    return width;
  }

  static Span to_int64(const Argument& argument, const Array& array, Access access) {
    check_dtype(argument, array, "i", 8, "int64");
    return to_span(argument, array, 8, access);
  }

  // Pieces lie where only the device can read them: that there are as many as the runs make is all that is checked.
  cuda::Work work_on(const Runs& runs, CoinsOf coins_of, uint64_t seed, size_t piece) const {
    if (!pieces_) return cuda::on_array(static_cast<size_t>(runs.data->numel), coins_of(*runs.data, seed));
    size_t expected = 0;
    for (const Run& run : runs) expected += (static_cast<size_t>(run.numel) + piece - 1) / piece;
    check_size({op_, "pieces"}, {pieces_->data, pieces_->size / 5, sizeof(Run)}, "rows", expected);
    return cuda::on_pieces(reinterpret_cast<const Run*>(pieces_->data), expected, seed);
  }

  char* counts_of(size_t size, std::initializer_list<Span> others) const {
    if (!counts_) return nullptr;
    const Argument argument{op_, "counts"};
    check_size(argument, *counts_, "counts", size);
    for (const Span& other : others) check_apart(argument, *counts_, "another argument", other);
    if (pieces_) check_apart(argument, *counts_, "the pieces of runs", *pieces_);
    return counts_->data;
  }
  PackCounts* pack_counts(std::initializer_list<Span> others) const {
    return reinterpret_cast<PackCounts*>(counts_of(2, others));
  }

  template <class... Parameters, class... Arguments>
  void launch(cudaError_t (*function)(Parameters...), const Arguments&... arguments) const {
    check(op_, cudaSetDevice(device_));  // of this thread, in the runtime that is linked in: it is torch's already
    const cudaError_t error = function(arguments..., stream_);
    if (is_no_code(error)) {
      const cudaDeviceProp properties = properties_of(op_, device_);
      throw std::runtime_error(std::string(op_) + ": CUDA: " + describe(error) + ": device " + std::to_string(device_) +
                               " has compute capability " + std::to_string(properties.major) + "." +
                               std::to_string(properties.minor) +
                               ", signvote was built for the architectures " SIGNVOTE_CUDA_ARCHITECTURES);
    }
    check(op_, error);
  }

  const char* op_;
  int device_;
  cudaStream_t stream_;
  std::optional<Span> pieces_, counts_;
};

// A row of a vote, before it is copied to a tensor of them all; it must not overlap `out`.
void check_row(const char* op, const std::string& stack, size_t i, const Array& array, size_t width, const Array& out) {
  const Argument argument{op, stack + "[" + std::to_string(i) + "]"}, out_argument{op, "out"};
  const Span row = to_words(argument, array, Access::kRead);
  check_size(argument, row, "words", width);
  check_apart(out_argument, to_words(out_argument, out, Access::kWrite), stack, row);
}

// The same of a vote with abstention.
void check_ballot(const char* op, const std::string& stack, size_t i, const Array& array, size_t width,
                  const Array& out) {
  const Argument argument{op, stack + "[" + std::to_string(i) + "]"}, out_argument{op, "out"};
  const auto ballot = to_ternary<const uint32_t>(argument, array, width);
  const auto written = to_written_ternary(out_argument, out, width);
  check_apart(out_argument, written, stack, ballot.sign());
  check_apart(out_argument, written, stack, ballot.active());
}

// Names and compute capabilities of the devices.
std::vector<std::tuple<std::string, int, int>> devices() {
  std::vector<std::tuple<std::string, int, int>> found;
  int count = 0;
  check("devices", cudaGetDeviceCount(&count));
  for (int device = 0; device < count; ++device) {
    const cudaDeviceProp properties = properties_of("devices", device);
    found.emplace_back(properties.name, properties.major, properties.minor);
  }
  return found;
}

// Whether this driver can run the kernels on the device, which becomes the current one.
bool can_run(int device) { return cudaSetDevice(device) == cudaSuccess && cuda::find_code() == cudaSuccess; }

// 1000 * major + 10 * minor; the driver's is that of the newest CUDA it can run, or 0 where there is none.
int runtime_version() {
  int version = 0;
  check("runtime_version", cudaRuntimeGetVersion(&version));
  return version;
}
int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The CUDA kernels of signvote. signvote.ops and signvote.cuda are the way in.";
  m.attr("architectures") = SIGNVOTE_CUDA_ARCHITECTURES;
  m.attr("piece") = cuda::kPiece;
  m.attr("vote_piece") = cuda::kVotePiece;
  m.def("devices", &devices);
  m.def("can_run", &can_run);
  m.def("runtime_version", &runtime_version);
  m.def("driver_version", &driver_version);
  m.def("check_row", &check_row);
  m.def("check_ballot", &check_ballot);
  // The arguments are those of _core's functions, but at the end those of Stream.
  using Maybe = const std::optional<Array>&;
  m.def("pack_signs", &pack_signs<Stream, Maybe, int, uintptr_t>);
  m.def("pack_momentum", &pack_momentum<Stream, Maybe, int, uintptr_t>);
  m.def("has_nonfinite", &has_nonfinite<Stream, Maybe, int, uintptr_t>);
  m.def("majority_vote", &majority_vote<Stream, Maybe, int, uintptr_t>);
  m.def("unpack_signs", &unpack_signs<Stream, Maybe, int, uintptr_t>);
  m.def("pack_runs", &pack_runs<Stream, const Array&, Maybe, int, uintptr_t>);
  m.def("vote_runs", &vote_runs<Stream, const Array&, Maybe, int, uintptr_t>);
  m.def("unpack_runs", &unpack_runs<Stream, const Array&, Maybe, int, uintptr_t>);
  m.def("pack_ternary", &pack_ternary<Stream, Maybe, int, uintptr_t>);
  m.def("majority_vote_ternary", &majority_vote_ternary<Stream, Maybe, int, uintptr_t>);
  m.def("unpack_ternary", &unpack_ternary<Stream, Maybe, int, uintptr_t>);
  m.def("pack_ternary_runs", &pack_ternary_runs<Stream, const Array&, Maybe, int, uintptr_t>);
  m.def("vote_ternary_runs", &vote_ternary_runs<Stream, const Array&, Maybe, int, uintptr_t>);
  m.def("unpack_ternary_runs", &unpack_ternary_runs<Stream, const Array&, Maybe, int, uintptr_t>);
}
