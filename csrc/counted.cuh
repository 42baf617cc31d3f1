// Which pixels count, and with which label; and the sums over all blocks of what they lose.
#pragma once
#include "cells.cuh"

struct Partial {  // of a thread or block
  float loss = 0;
  int kept = 0, everything = 0, bad = 0;
};

struct Counted {
  const void* target;       // (N,H,W) uint8 or int64, or null
  bool wide;                // int64
  const bool* valid;        // (N,H,W) or null
  const float* confidence;  // (N,1,a,b) or null
  Axis cy, cx;              // of the confidence
  float cutoff;             // a pixel counts where the upsampled confidence is above this
  int64_t ignore;
  int K;

  Counted(int64_t K, int64_t height, int64_t width, const std::optional<Tensor>& target, const std::optional<Tensor>& confidence,
          const std::optional<Tensor>& valid, double cutoff, int64_t ignore)
      : target(target ? target->data_ptr() : nullptr), wide(target && target->scalar_type() == ScalarType::Long),
        valid(valid ? valid->const_data_ptr<bool>() : nullptr), confidence(confidence ? confidence->const_data_ptr<float>() : nullptr),
        cy(confidence ? confidence->size(2) : 1, height), cx(confidence ? confidence->size(3) : 1, width), cutoff(cutoff),
        ignore(ignore), K(K) {}

  // The label (0 without target) of pixel (n,y,x), which is the pixel-th of all, -1 where it does not count.
  __device__ int label(int64_t pixel, int64_t n, int y, int x, Partial& sums) const {
    int label = 0;
    if (target && wide) {
      const int64_t given = static_cast<const int64_t*>(target)[pixel];
      label = given == ignore ? -1 : given < 0 || given >= K ? K : given;
    } else if (target) {
      label = static_cast<const uint8_t*>(target)[pixel];
      label = label == ignore ? -1 : label;
    }
    if (label < 0) return -1;
    if (label >= K) return sums.bad = 1, -1;
    if (valid && !valid[pixel]) return -1;
    sums.everything++;
    if (confidence) {
      const int i = cy.cell(y), j = cx.cell(x), below = min(i + 1, cy.n - 1), right = min(j + 1, cx.n - 1);
      const float *p = confidence + (n * cy.n + i) * cx.n, *q = confidence + (n * cy.n + below) * cx.n;
      const float fy = cy.frac(y), left = interpolate(p[j], q[j], fy);
      if (!(interpolate(left, interpolate(p[right], q[right], fy), cx.frac(x)) > cutoff)) return -1;
    }
    sums.kept++;
    return label;
  }
};

// Sum over a warp, in one order; every lane has it.
template <class V>
__device__ V warp_sum(V value) {
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(ALL, value, distance);
  return value;
}

// Sum over a block, to *to. It overwrites the first sizeof(Partial) a warp of shared memory (a tile's corners).
__device__ inline void add_up_block(Partial own, Partial* to) {
  Partial* warps = shared_memory<Partial>();
  own.loss = warp_sum(own.loss), own.kept = warp_sum(own.kept);
  own.everything = warp_sum(own.everything), own.bad = warp_sum(own.bad);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < int(blockDim.x) / 32; i++) {
    own.loss += warps[i].loss, own.kept += warps[i].kept;
    own.everything += warps[i].everything, own.bad += warps[i].bad;
  }
  *to = own;
}

// Every block adds up all partials, in one order; the scalars are written once, and `grad` is divided by the pixels.
static __global__ void __launch_bounds__(256) finish(const Partial* partials, int count, bool divide_all, float* loss,
                                                     int64_t* kept, float* grad, int64_t size) {
  struct Total { double loss; int64_t kept, everything, bad; };
  Total* totals = shared_memory<Total>();
  Total mine{};
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    mine.loss += partials[i].loss, mine.kept += partials[i].kept;
    mine.everything += partials[i].everything, mine.bad += partials[i].bad;
  }
  totals[threadIdx.x] = mine;
  for (int half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= half) continue;
    const Total& other = totals[threadIdx.x + half];
    Total& t = totals[threadIdx.x];
    t.loss += other.loss, t.kept += other.kept, t.everything += other.everything, t.bad += other.bad;
  }
  __syncthreads();
  const Total all = totals[0];
  const int64_t pixels = max(divide_all ? all.everything : all.kept, int64_t(1));
  if (blockIdx.x == 0 && threadIdx.x == 0)
    *loss = all.bad ? NAN : float(all.loss / pixels), *kept = all.kept;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x)
    grad[i] *= 1.f / pixels;
}

// What blocks hand in, and the two scalars that come of it.
struct Result {
  Tensor partials, loss, kept;

  Result(const Tensor& like, int64_t blocks)
      : partials(torch::stable::new_empty(like, {blocks * int64_t(sizeof(Partial))}, ScalarType::Byte)),
        loss(torch::stable::new_empty(like, {}, ScalarType::Float)), kept(torch::stable::new_empty(like, {}, ScalarType::Long)) {}
  Partial* data() { return static_cast<Partial*>(partials.data_ptr()); }
  void add_up(const Launcher& launch, bool divide_all, float* grad, int64_t size) {
    launch(finish, dim3(std::clamp<int64_t>(size / 1024, 1, 1024)), 256, 256 * 4 * sizeof(int64_t), data(),
           int(partials.numel() / sizeof(Partial)), divide_all, loss.mutable_data_ptr<float>(), kept.mutable_data_ptr<int64_t>(),
           grad, size);
  }
};
