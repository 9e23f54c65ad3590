// Arrays as they cross from Python: taken as they are, never converted. bfloat16 has no NumPy dtype and crosses as
// 16-bit integers, words cross as 32-bit ones.
#ifndef SIGNVOTE_ARRAY_H
#define SIGNVOTE_ARRAY_H

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

#endif
