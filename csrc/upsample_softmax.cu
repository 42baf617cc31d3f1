// Class probabilities of bilinearly upsampled logits, and the gradient straight to the low resolution.
//
// In: logits (N,K,h,w) float32, float16 or bfloat16, any strides; a mask (N,H,W) of pixels that are zero. Out: (N,H,W,K),
// channels last, float32, float16 or bfloat16. Never stored: the upsampled logits; backward computes the probabilities again.
//
// A block has 16 cells side by side (8 for many classes) and four warps, which share the cells. A warp takes 8 pixels of a row
// of its cell at once, a class in each lane: a pixel's classes lie side by side in memory, and a class's gradient needs no sum
// over threads. With more than 32 classes it goes over them twice, for the softmax's denominators and for the results. Bound by
// memory: the probabilities, or their gradient. All sums have a fixed order: the same bits from run to run.
#include "cells.cuh"

namespace {
template <class T>
struct Problem {
  Cells all;
  const bool* valid;  // (N,H,W) or null
  T* probs;           // (N,H,W,K); backward: their gradient
  Gradient gradient;
};

// P pixels side by side in a cell of the warp. P is 1 where its cells are not smooth.
template <int P>
struct Run {
  static constexpr int PIXELS = P;
  const Cells& all;
  const Tile& tile;
  const int cell, y, x;  // the cell in the block; the first pixel
  const int end;         // of the cell's columns
  const float fy, fx;    // where in the cell it lies
  int64_t pixel;         // its number among all
  unsigned needed;       // bit p: pixel p is there and valid
  float shift;           // where P is 1: what `exps` subtracts, in place of the largest corner

  __device__ Run(const Cells& all, const bool* valid, const Tile& tile, int cell, int y, int x, int end)
      : all(all), tile(tile), cell(cell), y(y), x(x), end(end), fy(all.y.frac(y)), fx(all.x.frac(x)),
        pixel((tile.n * all.y.m + y) * all.x.m + x), shift(-INFINITY) {
    const int lane = threadIdx.x % 32;
    needed = __ballot_sync(ALL, lane < P && x + lane < end && (!valid || valid[pixel + lane]));
    for (int k = lane; k < tile.K && P == 1; k += 32) shift = fmaxf(shift, bilinear(corners(k), fx, fy));
    if (P == 1) shift = max_lanes(shift, 32);
  }
  __device__ bool needs(int p) const { return needed >> p & 1; }
  __device__ float4 corners(int k) const { return tile.corners[cell * tile.pitch + k]; }
  // e[p] = exp(logit - shift) of class k in pixel p; 0 where there is no class, finite where it is not needed.
  __device__ void exps(int k, float* e) const {
    for (int p = 0; p < P; p++) e[p] = 0;
    if (k >= tile.K) return;
    const float4 c = corners(k);
    if (P == 1) {
      e[0] = needed ? exp2f(LOG2E * (bilinear(c, fx, fy) - shift)) : 0;
      return;
    }
    const float slope = c.y + fy * c.w, m = exp2_minus_1(all.x.step * slope);
    float now = fast_exp2(c.x + fy * c.z + fx * slope);
    for (int p = 0; p < P; p++) {
      e[p] = now;
      now += now * m;
    }
  }
};

// visit(run) for all pixels of a warp's cells.
template <int P, class Visit>
__device__ void each_run(const Cells& all, const bool* valid, const Tile& tile, const Visit& visit) {
  const int cells = 32 / tile.lanes, begin = threadIdx.x / 32 * cells;  // those whose corners the warp has looked at
  const int top = all.y.first(tile.row), bottom = all.y.first(tile.row + 1);
  for (int cell = begin; cell < begin + cells && tile.first() + cell < all.x.cells(); cell++) {
    const int left = all.x.first(tile.first() + cell), right = all.x.first(tile.first() + cell + 1);
    for (int y = top; y < bottom; y++)
      for (int x = left; x < right; x += P) visit(Run<P>(all, valid, tile, cell, y, x, right));
  }
}
template <class Visit>
__device__ void each_run(const Cells& all, const bool* valid, const Tile& tile, const Visit& visit) {
  if (tile.smooth) each_run<8>(all, valid, tile, visit);
  else each_run<1>(all, valid, tile, visit);
}

template <class T>
__global__ void __launch_bounds__(128) probabilities(Problem<T> problem) {
  const Tile tile(problem.all);
  each_run(problem.all, problem.valid, tile, [&](const auto& run) {
    constexpr int P = std::decay_t<decltype(run)>::PIXELS;
    const int lane = threadIdx.x % 32, last = (tile.K - 1) / 32 * 32 + lane;
    float e[P], sums[P] = {};
    for (int k = lane; k <= last; k += 32) {
      run.exps(k, e);
      for (int p = 0; p < P; p++) sums[p] += e[p];
    }
    const float sum = sum_lanes<P, 32>(sums), one = run.needs(lane % P) ? reciprocal(sum) : 0;
    float share[P];
    for (int p = 0; p < P; p++) share[p] = __shfl_sync(ALL, one, p);
    for (int k = last; k >= 0; k -= 32) {  // the last class's are still there
      if (k < last) run.exps(k, e);
      T* const to = problem.probs + run.pixel * tile.K + k;
      for (int p = 0; p < P; p++)
        if (k < tile.K && run.x + p < run.end) to[p * tile.K] = T(e[p] * share[p]);
    }
  });
}

// The gradient of logit k is p_k * (g_k - sum of p_j * g_j).
template <class T>
__global__ void __launch_bounds__(128) probabilities_backward(Problem<T> problem) {
  const Tile tile(problem.all);
  each_run(problem.all, problem.valid, tile, [&](const auto& run) {
    constexpr int P = std::decay_t<decltype(run)>::PIXELS;
    if (!run.needed) return;
    const int lane = threadIdx.x % 32, last = (tile.K - 1) / 32 * 32 + lane;
    float e[P], g[P], sums[P] = {}, dots[P] = {}, share[P], dot[P];
    auto read = [&](int k) {
      const T* const from = problem.probs + run.pixel * tile.K + k;
      run.exps(k, e);
      for (int p = 0; p < P; p++) g[p] = k < tile.K && run.needs(p) ? float(from[p * tile.K]) : 0.f;
    };
    for (int k = lane; k <= last; k += 32) {
      read(k);
      for (int p = 0; p < P; p++) sums[p] += e[p], dots[p] += e[p] * g[p];
    }
    const float one = reciprocal(sum_lanes<P, 32>(sums)), mean = one * sum_lanes<P, 32>(dots);
    for (int p = 0; p < P; p++) {
      share[p] = __shfl_sync(ALL, run.needs(lane % P) ? one : 0, p);
      dot[p] = __shfl_sync(ALL, mean, p);
    }
    for (int k = last; k >= 0; k -= 32) {  // the last class's are still there
      if (k < last) read(k);
      float sum = 0, columns = 0;  // columns: times the column; each column is in the sums of all on its left
      for (int p = P - 1; p >= 0; p--) {
        sum += e[p] * share[p] * (g[p] - dot[p]);
        if (p) columns += sum;
      }
      if (k >= tile.K) continue;
      const float x = run.fx * sum + problem.all.x.step * columns;
      float4& to = tile.sums[run.cell * tile.pitch + k];
      to = make_float4(to.x + sum, to.y + x, to.z + run.fy * sum, to.w + run.fy * x);
    }
  });
  __syncthreads();
  problem.gradient.store(tile);
  arrive_and_finish(4, [&](int i) { return problem.gradient.arrive(problem.all, tile, i); },
                    [&](int i) { problem.gradient.finish(problem.all, tile, i); });
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  const Launcher launch(logits);
  const Cells all(logits, height, width, POWERS);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width, logits.size(1)}, dtype);
  with_type(out, [&](auto* probs) {
    using T = std::decay_t<decltype(*probs)>;
    const Problem<T> problem{all, valid ? valid->const_data_ptr<bool>() : nullptr, probs, {}};
    launch(probabilities<T>, all.blocks(), 128, all.shared, problem);
  });
  return out;
}

// grad (N,H,W,K) contiguous, float32, float16 or bfloat16 -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  const Launcher launch(logits);
  const Cells all(logits, grad.size(1), grad.size(2), POWERS | SUMS);
  const GradientMemory memory(logits, all, true);
  with_type(grad, [&](auto* upstream) {
    using T = std::decay_t<decltype(*upstream)>;
    const Problem<T> problem{all, valid ? valid->const_data_ptr<bool>() : nullptr, upstream,
                             memory.gradient()};
    launch(probabilities_backward<T>, all.blocks(), 128, all.shared, problem);
  });
  return memory.grad;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
