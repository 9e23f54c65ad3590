// The module signvote._cuda: the ops on a CUDA device, as launches of its kernels. Tensors cross as they are, and tell
// what they know of themselves: no torch headers, so that one binary serves every torch version.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/ops.h"
#include "cuda/kernels.h"
#include "kernels.h"

namespace py = pybind11;

// A NumPy array, which runs are, or a tensor.
bool signvote::binding::to_array(py::handle object, Array* array) {
  if (describe_numpy(object, array)) return true;
  if (!py::hasattr(object, "data_ptr")) return false;
  const auto ask = [&](const char* name, auto... arguments) {
    return object.attr(name)(arguments...).template cast<size_t>();
  };
  array->object = object;
  array->kind = object.attr("dtype").attr("is_floating_point").cast<bool>() ? 'f' : 'i';
  array->itemsize = ask("element_size");
  array->is_contiguous = ask("is_contiguous") != 0;
  array->ndim = ask("dim");
  array->size = ask("numel");
  for (size_t i = 0; i < 2 && i < array->ndim; ++i) {
    array->shape[i] = ask("size", i);
    array->strides[i] = static_cast<py::ssize_t>(ask("stride", i) * array->itemsize);
  }
  array->data = reinterpret_cast<void*>(ask("data_ptr"));
  return true;
}

namespace {

using namespace signvote::binding;
namespace cuda = signvote::cuda;
using signvote::MomentumCoefficients;
using signvote::PackCounts;
using signvote::Run;
using signvote::Runs;
using signvote::Undecided;

void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA: " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }
}

// The target of an op: a stream. Of an op on runs, also their pieces in the device's memory; and where it is to count,
// if anywhere, what the op on a CPU returns.
class Stream {
 public:
  Stream(const char* op, const std::optional<Array>& pieces, const std::optional<Array>& counts, int device,
         uintptr_t stream)
      : op_(op), device_(device), stream_(reinterpret_cast<cudaStream_t>(stream)) {
    if (pieces) pieces_ = to_int64({op, "pieces"}, *pieces, Access::kRead);
    if (counts) counts_ = to_int64({op, "counts"}, *counts, Access::kWrite);
  }

  void pack_signs(const Coordinates& x, const Seeded& work, Undecided zeros, const Span& words) const {
    launch(cuda::pack_signs, x.dtype, x.span.data, work_on(work), zeros, words.mutable_words(), pack_counts());
  }
  void pack_momentum(const Coordinates& x, const Span& momentum, const MomentumCoefficients& coefficients,
                     const Seeded& work, Undecided zeros, const Span& words) const {
    launch(cuda::pack_momentum, x.dtype, x.span.data, momentum.data, work_on(work), coefficients, zeros,
           words.mutable_words(), pack_counts());
  }
  void has_nonfinite(const Coordinates& x, const Runs& runs) const {
    launch(cuda::pack_signs, x.dtype, x.span.data, cuda::on_array(static_cast<size_t>(runs.data->numel), 0),
           signvote::kNegative, nullptr, pack_counts());
  }
  void majority_vote(const Rows& rows, const Seeded& work, Undecided ties, const Span& words) const {
    launch(cuda::majority_vote, rows.pointers[0], rows.pointers.size(), static_cast<size_t>(rows.stride), work_on(work),
           ties, words.mutable_words(), reinterpret_cast<uint64_t*>(counts_of(1)));
  }
  void unpack_signs(const Span& words, const Runs& runs, uint64_t positive, const Coordinates& out) const {
    launch(cuda::unpack_signs, out.dtype, words.words(), work_on({runs, signvote::coins_of_array, 0}), positive,
           static_cast<void*>(out.span.data));
  }

 private:
  static Span to_int64(const Argument& argument, const Array& array, Access access) {
    if (!has_dtype(array, "i", 8)) argument.type_error(is_repr(array.object.attr("dtype")), "int64");
    return to_span(argument, array, 8, access);
  }

  cuda::Work work_on(const Seeded& work) const {
    if (pieces_) {
      return cuda::on_pieces(reinterpret_cast<const Run*>(pieces_->data), pieces_->size / 5, work.seed);
    }
    return cuda::on_array(static_cast<size_t>(work.runs.data->numel), work.coins_of(*work.runs.data, work.seed));
  }

  char* counts_of(size_t size) const {
    if (!counts_) return nullptr;
    check_size({op_, "counts"}, *counts_, "counts", size);
    return counts_->data;
  }
  PackCounts* pack_counts() const { return reinterpret_cast<PackCounts*>(counts_of(2)); }

  template <class... Parameters, class... Arguments>
  void launch(cudaError_t (*function)(Parameters...), const Arguments&... arguments) const {
    check(op_, cudaSetDevice(device_));  // of this thread, in the runtime that is linked in: it is torch's already
    check(op_, function(arguments..., stream_));
  }

  const char* op_;
  int device_;
  cudaStream_t stream_;
  std::optional<Span> pieces_, counts_;
};

// A row of a vote, before it is copied to a tensor of them all.
void check_row(const char* op, const std::string& name, const Array& row, size_t width) {
  const Argument argument{op, name};
  check_size(argument, to_words(argument, row, Access::kRead), "words", width);
}

// Names and compute capabilities of the devices; none where there is no driver.
std::vector<std::tuple<std::string, int, int>> devices() {
  std::vector<std::tuple<std::string, int, int>> found;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) return found;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    check("devices", cudaGetDeviceProperties(&properties, device));
    found.emplace_back(properties.name, properties.major, properties.minor);
  }
  return found;
}

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
  m.def("runtime_version", &runtime_version);
  m.def("driver_version", &driver_version);
  m.def("check_row", &check_row);
  // The arguments are those of _core's functions, but at the end those of Stream.
  using Maybe = const std::optional<Array>&;
  m.def("pack_signs", &pack_signs<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("pack_momentum", &pack_momentum<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("has_nonfinite", &has_nonfinite<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("majority_vote", &majority_vote<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("unpack_signs", &unpack_signs<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("pack_runs", &pack_runs<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("vote_runs", &vote_runs<Stream, Maybe, Maybe, int, uintptr_t>);
  m.def("unpack_runs", &unpack_runs<Stream, Maybe, Maybe, int, uintptr_t>);
}
