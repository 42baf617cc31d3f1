// What a block of the CUDA kernels keeps in shared memory of its cells, four neighbouring low-resolution points each.
//
// A gradient of low resolution is summed in shared memory and written without atomics: a block's first cell is the last one of
// the block on its left, computed twice, so that a block owns the columns of points between its cells; and rows of cells are
// launched in two rounds, the even ones, which write, and the odd ones, which add. All sums have a fixed order.
#pragma once
#include "cuda.cuh"
#include "exponentials.h"

constexpr int LANES = 8, ROWS = 8;
constexpr unsigned ALL = 0xffffffffu;  // lanes of a warp
enum Kinds { CORNERS = 1, POWERS, SUMS };  // of numbers that a block keeps of its cells: those up to the one named

// Logits (N,K,h,w) as they lie in memory.
struct Points {
  const void* data;
  ScalarType type;
  int64_t sizes[4], strides[4];

  explicit Points(const Tensor& t) : data(t.data_ptr()), type(t.scalar_type()) {
    for (int i = 0; i < 4; i++) sizes[i] = t.size(i), strides[i] = t.stride(i);
  }
};

// A block's cells, and how a thread sees its own one.
struct Tile {
  const int K, cells;         // cells of the block
  const int row, first;       // row of cells; the block's first cell, which may lie left of the picture
  const int64_t n;            // picture
  // (K, cells) in shared memory:
  float4* const corners;      // a class's logits: top left, top right, bottom left, bottom right
  float4* const powers;       // log2 of exp(logit - the largest corner): at the top left, what fx adds, what a row adds, what fx adds to that
  float4* const sums;         // of a gradient over a cell's pixels: plain, times fx, times fy, times both
  bool smooth;                // whether exponentials in the thread's cell go by recurrence; if not, it may hold what is not finite

  static size_t bytes(int64_t K, int cells, Kinds kinds) { return sizeof(float4) * K * cells * kinds; }

  // `step`: of the y axis. Reads the block's points, sets sums to 0, and ends with a barrier.
  __device__ Tile(const Points& from, float step, Kinds kinds, int round)
      : K(from.sizes[1]), cells(blockDim.x / LANES), row(kinds == SUMS ? 2 * blockIdx.y + round : blockIdx.y),
        first(kinds == SUMS ? int(blockIdx.x) * (cells - 1) - 1 : blockIdx.x * cells), n(blockIdx.z), corners(shared_memory<float4>()),
        powers(corners + K * cells), sums(powers + K * cells) {
    if (from.type == ScalarType::Float) load<float>(from);
    else if (from.type == ScalarType::Half) load<Half>(from);
    else load<BFloat16>(from);
    __syncthreads();
    survey(step, kinds);
    if (kinds > CORNERS) __syncthreads();
  }

  // Where, in all three, class k of the thread's cell is.
  __device__ int at(int k) const { return k * cells + threadIdx.x / LANES; }

  // A thread's column of the cell sums up to `a` plain, `b` times fy. Called by all threads of a warp.
  __device__ void add(int k, float fx, float a, float b) const {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float c = fx * a, d = fx * b;  // wanted: the sums over the cell's lanes of a in lane 0, c in 1, b in 2, d in 3
    // the odd lanes keep c and d, the even ones a and b; then those with bit 1 the second of the two
    const float p = (odd ? c : a) + __shfl_xor_sync(ALL, odd ? a : c, 1), q = (odd ? d : b) + __shfl_xor_sync(ALL, odd ? b : d, 1);
    float s = (upper ? q : p) + __shfl_xor_sync(ALL, upper ? p : q, 2);
    s += __shfl_xor_sync(ALL, s, 4);
    if (threadIdx.x % LANES < 4) reinterpret_cast<float*>(&sums[at(k)])[threadIdx.x % LANES] += s;
  }

  // Behind a barrier, to the points' gradients (N,K,h,w), sizes being N, K, h, w.
  __device__ void write(float* grad, const int64_t* sizes) const {
    const int left = threadIdx.x % cells, right = left + 1;
    const int64_t h = sizes[2], w = sizes[3], x = first + right;
    if (right == cells || x >= w) return;
    for (int64_t k = threadIdx.x / cells; k < K; k += LANES) {
      const float4 l = sums[k * cells + left], r = sums[k * cells + right];  // of the point between them
      const float above = l.y - l.w + (r.x - r.y - r.z + r.w), below = l.w + (r.z - r.w);
      float* to = grad + ((n * K + k) * h + row) * w + x;
      to[0] = row % 2 ? to[0] + above : above;
      if (row + 1 < h) to[w] = row % 2 && row + 1 < h - 1 ? to[w] + below : below;  // below the last row there are no cells
    }
  }

 private:
  template <class T>
  __device__ void load(const Points& from) const {
    const int local = threadIdx.x % cells, last = from.sizes[3] - 1;
    const int64_t left = min(max(first + local, 0), last) * from.strides[3], right = min(first + local + 1, last) * from.strides[3];
    const T* top = static_cast<const T*>(from.data) + n * from.strides[0] + row * from.strides[2];
    const T* bottom = top + (row + 1 < from.sizes[2] ? from.strides[2] : 0);
    for (int64_t k = threadIdx.x / cells; k < K; k += LANES) {
      const T *t = top + k * from.strides[1], *b = bottom + k * from.strides[1];
      corners[k * cells + local] = make_float4(t[left], t[right], b[left], b[right]);
    }
  }
  // The cell's threads share its classes.
  __device__ void survey(float step, Kinds kinds) {
    float largest = -INFINITY, floor = -INFINITY, steepest = 0, broken = 0;
    for (int k = threadIdx.x % LANES; k < K; k += LANES) {
      const float4 c = corners[at(k)];
      largest = fmaxf(largest, fmaxf(fmaxf(c.x, c.y), fmaxf(c.z, c.w)));
      floor = fmaxf(floor, fminf(fminf(c.x, c.y), fminf(c.z, c.w)));
      steepest = fmaxf(steepest, fmaxf(fabsf(c.z - c.x), fabsf(c.w - c.y)));
      broken += (c.x + c.y + c.z + c.w) * 0;
    }
    for (int distance = 1; distance < LANES; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(ALL, largest, distance));
      floor = fmaxf(floor, __shfl_xor_sync(ALL, floor, distance));
      steepest = fmaxf(steepest, __shfl_xor_sync(ALL, steepest, distance));
      broken += __shfl_xor_sync(ALL, broken, distance);
    }
    smooth = is_smooth(largest, floor, steepest, step * steepest, broken);
    for (int k = threadIdx.x % LANES; k < K && kinds > CORNERS; k += LANES) {
      const float4 c = corners[at(k)];
      const float right = LOG2E * (c.y - c.x), down = LOG2E * step * (c.z - c.x);
      powers[at(k)] = make_float4(LOG2E * (c.x - largest), right, down, LOG2E * step * (c.w - c.z - (c.y - c.x)));
      if (kinds == SUMS) sums[at(k)] = make_float4(0, 0, 0, 0);
    }
  }
};
