// Stands in for <cuda_runtime.h> where the kernels of csrc/cuda run without a GPU: a host compiler that finds this file
// first makes plain functions of them, "device memory" is memory, and a launch is over when it returns.
//
// Every thread of a block is a fiber. A warp's shuffle or vote, and a barrier of the block, are meetings: a thread
// waits at one until all threads of the warp, or block, have come to it. What CUDA leaves undefined ends the program:
// threads that come to different meetings, or to a shuffle with different distances, a mask that is not the whole warp
// (the kernels use no other), a thread that ends while others wait for it. Shared memory is filled with 0xA5 before
// each block. Blocks run one by one, so that a data race between blocks is not seen; threads in turn, from the first or
// from the last on in turn from launch to launch.
#ifndef SIGNVOTE_TESTS_CUDA_ON_CPU_H
#define SIGNVOTE_TESTS_CUDA_ON_CPU_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared_memory")))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222
};
using cudaStream_t = struct CUstream_st*;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
};

struct cudaFuncAttributes {};

// Device 0 runs kernels. Device 1 is one that they were not built for.
inline int cuda_on_cpu_device = 0;
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device != 0 && device != 1) return cudaErrorInvalidDevice;
  cuda_on_cpu_device = device;
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"fibers on a CPU", 0, 0};
  return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorNoKernelImageForDevice";
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : "no kernel image is available";
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  memset(memory, value, size);
  return cudaSuccess;
}

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

// Waits for all threads of the warp, or block, to come to `what` with the same `argument`, and returns the values they
// have brought, in the order of the threads.
const uint64_t* meet_in_warp(const char* what, unsigned mask, int argument, uint64_t value);
const uint64_t* meet_in_block(const char* what, uint64_t value);

}  // namespace cuda_on_cpu

template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(Parameters...)) {
  return cuda_on_cpu_device == 0 ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

template <class... Parameters, size_t... kIndices>
void cuda_on_cpu_call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<kIndices...>) {
  kernel(*static_cast<Parameters*>(arguments[kIndices])...);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  if (cuda_on_cpu_device != 0) return cudaErrorNoKernelImageForDevice;
  cuda_on_cpu::run_grid(
      grid, block, [&] { cuda_on_cpu_call(kernel, arguments, std::make_index_sequence<sizeof...(Parameters)>()); });
  return cudaSuccess;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  const uint64_t* values = cuda_on_cpu::meet_in_warp("__shfl_xor_sync", mask, distance, value);
  return static_cast<T>(values[(threadIdx.x % 32) ^ static_cast<unsigned>(distance)]);
}

inline int __any_sync(unsigned mask, int predicate) {
  const uint64_t* values = cuda_on_cpu::meet_in_warp("__any_sync", mask, 0, predicate != 0);
  int any = 0;
  for (int lane = 0; lane < 32; ++lane) any |= values[lane] != 0;
  return any;
}

inline void __syncthreads() { cuda_on_cpu::meet_in_block("__syncthreads", 0); }

inline int __syncthreads_or(int predicate) {
  const uint64_t* values = cuda_on_cpu::meet_in_block("__syncthreads_or", predicate != 0);
  int any = 0;
  for (unsigned thread = 0; thread < blockDim.x; ++thread) any |= values[thread] != 0;
  return any;
}

// Threads give way to each other at meetings only.
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  const unsigned long long before = *to;
  *to += value;
  return before;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }

// Built without contraction, so that these are what they say.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

template <class To, class From>
To cuda_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline unsigned __float_as_uint(float x) { return cuda_bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_bit_cast<double>(x); }

#endif
