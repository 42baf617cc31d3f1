// What the CUDA kernels share on the host: launching them, where and on which stream. tests/cuda_on_cpu.h takes the
// place of the part that needs nvcc.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifndef CUDA_ON_CPU
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define SEG_OPS_LIBRARY seg_ops
#define SEG_OPS_DEVICE CUDA

// The shared memory of a block, as long as the launch says.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// 2^x, absolute error of the result's exponent 2^-22; what is below 2^-126 may be 0
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, one rounding off at the most, for what is neither tiny nor huge
__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y + y * (1 - x * y);
}

constexpr size_t SHARED = 48 << 10;  // bytes a block has on every GPU without asking for more

// Makes the tensor's device the current one, and knows its stream.
struct Launcher {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launcher(const Tensor& t) : guard(t.get_device_index()) {
    const auto current = torch::stable::accelerator::getCurrentStream(t.get_device_index());
    stream = static_cast<cudaStream_t>(current.nativeHandle());
  }
  template <class... Params, class... Args>
  void operator()(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, Args... args) const {
    if (shared > SHARED)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
    kernel<<<unsigned(blocks), threads, shared, stream>>>(args...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};
#endif

using Count = unsigned long long;  // as atomicAdd takes it

// Class ids or labels, uint8 or int64, as they lie in memory.
struct Ids {
  const void* data;
  bool wide;

  explicit Ids(const Tensor& t) : data(t.data_ptr()), wide(t.scalar_type() == ScalarType::Long) {}
  __device__ int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const uint8_t*>(data)[i];
  }
};

// Call f(pointer) with the type of a floating-point tensor.
template <class F>
void with_type(const Tensor& t, const F& f) {
  void* data = t.data_ptr();
  if (t.scalar_type() == ScalarType::Float) f(static_cast<float*>(data));
  else if (t.scalar_type() == ScalarType::Half) f(static_cast<Half*>(data));
  else f(static_cast<BFloat16*>(data));
}
