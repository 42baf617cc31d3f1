// Runs CUDA kernels on the CPU: `g++ -x c++ -include tests/cuda_on_cpu.h kernel.cu`. For tests only.
//
// A CUDA thread is a fiber; one runs until it waits for others (barrier, shuffle, ballot). Who goes on next is drawn
// from cuda_on_cpu_seed(n): blocks run one after the other in a random order, and each puts its warps in a random order
// of priority, so that one runs ahead to a barrier while another has not begun, which finds barriers that are missing
// before a read or after one. Shared memory is poisoned with NaN before each block. A barrier that not all threads of a
// block reach is an error, as is a shuffle without a lane of its mask.
//
// cuda_on_cpu_watch.h finds races by looking at memory, and counts what is touched. Nothing here says anything of the
// GPU's memory model or speed.
#pragma once
#define CUDA_ON_CPU
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#ifndef SEG_OPS_LIBRARY
#define SEG_OPS_LIBRARY cuda_on_cpu
#endif
#define SEG_OPS_DEVICE CPU
#define UNWATCHED __attribute__((no_sanitize("thread")))
#define WEAK extern "C" UNWATCHED __attribute__((weak))  // every kernel file has them

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 blockIdx, blockDim, gridDim;

namespace on_cpu {
constexpr size_t STACK = 1 << 16;

struct Fiber {
  ucontext_t context;                 // where it begins
  jmp_buf here;                       // where it goes on
  bool begun = false;
  std::unique_ptr<char[]> stack{new char[STACK]};
  dim3 index;
  int number;                         // in the block
  const char* waits = nullptr;        // for what: "barrier", "shuffle", ...; null where it can go on
  int line = 0;                       // of the call that waits
  unsigned mask = 0;                  // of lanes that it waits for
  uint64_t value = 0, received[32];   // what it gave to its warp, and what the lanes of `mask` gave
  bool done = false;
};
inline std::vector<Fiber> fibers;
inline Fiber* running = nullptr;
inline jmp_buf scheduler;
inline std::function<void()> body;  // what a thread does
inline std::vector<char> shared;
inline int seed = 0;
inline std::mt19937 dice;
inline int epoch = 0;      // counts the barriers of a launch, over all blocks
inline std::string error;  // of the first thing that went wrong
inline bool watching = false;  // what memory is touched: only in a thread's own code

UNWATCHED inline void fail(const std::string& what) {
  if (error.empty())
    error = what + " in block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
            std::to_string(blockIdx.z) + ")";
}
}  // namespace on_cpu

#include "cuda_on_cpu_watch.h"

namespace on_cpu {
// To a fiber, and back: jumps, where ucontext would ask the kernel each time.
UNWATCHED inline void resume(Fiber& f) {
  running = &f;
  if (_setjmp(scheduler)) return;
  if (f.begun) _longjmp(f.here, 1);
  f.begun = true;
  setcontext(&f.context);
}
UNWATCHED inline void leave() {
  if (!_setjmp(running->here)) _longjmp(scheduler, 1);
}
UNWATCHED inline void wait(const char* what, int line, unsigned mask, uint64_t value) {
  watching = false;
  Fiber& me = *running;
  me.waits = what, me.line = line, me.mask = mask, me.value = value;
  leave();
  watching = true;
}
UNWATCHED inline void enter() {
  for (;;) {  // block after block
    watching = true;
    body();
    watching = false;
    running->done = true;
    leave();
  }
}
// Let the lanes of a warp go on that all wait at one place and have exchanged their values; -> whether there were any.
UNWATCHED inline bool exchange(Fiber* warp, int lanes) {
  for (int i = 0; i < lanes; i++) {
    Fiber& f = warp[i];
    if (f.done || !f.waits || !f.mask) continue;
    bool all = true;
    for (int j = 0; j < 32; j++)
      if (f.mask >> j & 1)
        all &= j < lanes && !warp[j].done && warp[j].waits == f.waits && warp[j].line == f.line &&
               warp[j].mask == f.mask;
    if (!all) continue;
    for (int j = 0; j < lanes; j++)
      if (f.mask >> j & 1)
        for (int l = 0; l < lanes; l++) warp[j].received[l] = warp[l].value;
    const unsigned mask = f.mask;
    for (int j = 0; j < lanes; j++)
      if (mask >> j & 1) warp[j].waits = nullptr;
    return true;
  }
  return false;
}
UNWATCHED inline void run_block(int threads) {
  std::vector<int> warps((threads + 31) / 32), lanes(32);
  for (size_t i = 0; i < warps.size(); i++) warps[i] = i;
  for (int i = 0; i < 32; i++) lanes[i] = i;
  std::shuffle(warps.begin(), warps.end(), dice);
  const uint32_t poison = 0x7fdead00;
  for (size_t i = 0; i + 4 <= shared.size(); i += 4) std::memcpy(&shared[i], &poison, 4);
  for (int i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.number = i, f.done = false, f.waits = nullptr;
    f.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    if (f.begun) continue;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = STACK, f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
  for (;;) {
    bool moved = false;
    for (int w : warps) {  // the first warp that can go on, as far as it can
      const int first = w * 32, size = std::min(32, threads - first);
      std::shuffle(lanes.begin(), lanes.end(), dice);
      do {
        for (int lane : lanes) {
          if (lane >= size) continue;
          Fiber& f = fibers[first + lane];
          if (f.done || f.waits) continue;
          moved = true;
          resume(f);
        }
      } while (exchange(&fibers[first], size));
      if (moved) break;
    }
    if (moved) continue;
    int done = 0, line = 0, lines = 0;
    for (int i = 0; i < threads; i++) {
      const Fiber& f = fibers[i];
      done += f.done;
      if (!f.done && f.mask)
        return fail(std::string(f.waits) + " in line " + std::to_string(f.line) + " without a lane of its mask");
      if (f.done) continue;
      lines += f.line != line, line = f.line;
    }
    if (done == threads) return;
    if (done || lines > 1) return fail("not all threads reach the barrier in line " + std::to_string(line));
    epoch++;
    for (int i = 0; i < threads; i++) fibers[i].waits = nullptr;
  }
}

template <class T>
UNWATCHED uint64_t bits(T value) {
  uint64_t b = 0;
  static_assert(sizeof value <= 8);
  std::memcpy(&b, &value, sizeof value);
  return b;
}
template <class T>
UNWATCHED T from_bits(uint64_t b) { T value; std::memcpy(&value, &b, sizeof value); return value; }
template <class T>
UNWATCHED T shuffle(const char* what, int line, unsigned mask, T value, int lane) {
  wait(what, line, mask, bits(value));
  return from_bits<T>(running->received[lane & 31]);
}
UNWATCHED inline unsigned ballot(int line, unsigned mask, bool value) {
  wait("ballot", line, mask, value);
  unsigned result = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) result |= unsigned(running->received[i]) << i;
  return result;
}

template <class F>
UNWATCHED void launch(dim3 grid, int threads, size_t shared_bytes, const F& f) {
  dice.seed(seed);
  if (fibers.size() < size_t(threads)) fibers = std::vector<Fiber>(threads);
  gridDim = grid, blockDim = dim3(threads), body = f, error.clear();
  shared.assign(shared_bytes, 0);
  std::vector<unsigned> order(grid.x * grid.y * grid.z);
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  std::shuffle(order.begin(), order.end(), dice);
  begin_watching();
  for (unsigned i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y), epoch++;
    begin_block();
    run_block(threads);
    if (!error.empty()) break;
  }
  if (error.empty()) return;
  fibers.clear();  // they stopped half way
  throw std::runtime_error("cuda_on_cpu: " + error);
}

}  // namespace on_cpu

template <class T>
UNWATCHED void atomicAdd(T* at, T value) { on_cpu::watch(at, sizeof(T), true, true), *at += value; }
template <class T>
UNWATCHED void atomicOr(T* at, T value) { on_cpu::watch(at, sizeof(T), true, true), *at |= value; }

#define threadIdx (on_cpu::running->index)
#define __syncthreads() on_cpu::wait("barrier", __LINE__, 0, 0)
#define __shfl_sync(mask, value, lane) on_cpu::shuffle("shuffle", __LINE__, mask, value, lane)
#define __shfl_xor_sync(mask, value, x) on_cpu::shuffle("shuffle", __LINE__, mask, value, on_cpu::running->number ^ (x))
#define __ballot_sync(mask, value) on_cpu::ballot(__LINE__, mask, value)
#define __any_sync(mask, value) (on_cpu::ballot(__LINE__, mask, value) != 0)
#define __all_sync(mask, value) (on_cpu::ballot(__LINE__, mask, value) == (mask))
template <class T>
T* shared_memory() { return reinterpret_cast<T*>(on_cpu::shared.data()); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float fast_exp2(float x) {  // as wrong as PTX allows: exact at 0, else 2^-22.5
  return std::exp2(x) * (x == 0 ? 1 : uint32_t(on_cpu::bits(x)) * 0x9e3779b1u >> 31 ? 1 + 1.7e-7f : 1 - 1.7e-7f);
}
inline uint32_t __float_as_uint(float x) { return on_cpu::bits(x); }
inline float __uint_as_float(uint32_t x) { return on_cpu::from_bits<float>(x); }
inline float fast_reciprocal(float x) { return 1 / x; }
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr size_t SHARED = 48 << 10;
using std::max;
using std::min;

// The launch of cuda.cuh, on one device without streams.
namespace torch::stable { class Tensor; }
struct Launcher {
  explicit Launcher(const torch::stable::Tensor&) {}
  template <class... Params, class... Args>
  UNWATCHED void operator()(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, Args... args) const {
    on_cpu::launch(dim3(blocks), threads, shared, [&] { kernel(args...); });
  }
};

WEAK void cuda_on_cpu_seed(int n) { on_cpu::seed = n; }
