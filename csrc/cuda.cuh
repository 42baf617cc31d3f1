// What the CUDA kernels share: launches, device and stream on the host; in kernels shared memory, two fast functions.
// tests/cuda_on_cpu.h takes the place of the part that needs nvcc.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "exponentials.h"

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

#ifndef CUDA_ON_CPU
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#define SEG_OPS_LIBRARY seg_ops
#define SEG_OPS_DEVICE CUDA

// The shared memory of a block; the launch sets its size.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// 2^x with a relative error of about 2^-22; below 2^-126 the result may be 0
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x with an error of one rounding at most; x is neither tiny nor huge
__device__ inline float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y + y * (1 - x * y);
}

constexpr size_t SHARED = 48 << 10;  // bytes that a block has on every GPU without asking for more

// Launches kernels on the device of a tensor, on its current stream.
struct Launcher {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Launcher(const Tensor& t) : guard(t.get_device_index()) {
    void* current;  // Stream::nativeHandle() needs torch 2.13
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
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

using Count = unsigned long long;  // the type that atomicAdd takes
