// Class probabilities of bilinearly upsampled logits, and the gradient straight to the low resolution.
//
// In: logits (N,K,h,w) float32, float16 or bfloat16, any strides; a mask (N,H,W) of pixels that are zero. Out: (N,K,H,W) float32,
// float16 or bfloat16. Never stored: the upsampled logits; backward computes the probabilities again.
//
// Grid, blocks and threads are those of masked_cross_entropy.cu; in forward no cell is computed twice, and all rows of cells
// are one launch. Bound by memory: the probabilities, or their gradient, which backward reads twice (the second time from a
// cache: a block's is (K, 8, 128) numbers). All sums have a fixed order: the same bits from run to run.
#include "cells.cuh"

namespace {
template <class T, class P>
struct Problem {
  Points<T> logits;
  Walk walk;
  int cells;          // of a block
  const bool* valid;  // (N,H,W) or null
  P* probs;           // (N,K,H,W); backward: their gradient
  int64_t strides[4]; // of them
  float* grad;        // (N,K,h,w)

  // The place of class 0 of a pixel
  __device__ P* pixel(int64_t n, int y, int x) const { return probs + n * strides[0] + y * strides[2] + x * strides[3]; }
  __device__ bool there(int64_t n, int64_t y, int64_t x) const {
    return !valid || valid[(n * walk.y.m + y) * walk.x.m + x];
  }
};

// one[r] = 1 / the softmax's denominator, 0 for a pixel that is not there
template <class T, class P>
__device__ void denominators(const Problem<T, P>& problem, Column& column, int64_t n, int x, int y, int rows, float* one) {
  float e[ROWS], all[ROWS] = {};
  column.survey(problem.logits.sizes[1]);
  for (int k = 0; k < problem.logits.sizes[1]; k++) {
    column.exps(k, e);
    for (int r = 0; r < ROWS; r++) all[r] += e[r];
  }
  for (int r = 0; r < ROWS; r++) one[r] = r < rows && problem.there(n, y + r, x) ? __fdividef(1, all[r]) : 0;
}

template <class T, class P>
__global__ void __launch_bounds__(128) forward(Problem<T, P> problem) {
  const int K = problem.logits.sizes[1], first = blockIdx.x * problem.cells;
  const int64_t n = blockIdx.z;
  const Tile tile{shared_memory<float>(), K, problem.cells};
  tile.load(problem.logits, n, blockIdx.y, first);
  __syncthreads();
  problem.walk(tile, blockIdx.y, first, [&](Column& column, int x, int y, int rows) {
    float e[ROWS], one[ROWS];
    denominators(problem, column, n, x, y, rows, one);
    for (int k = 0; k < K; k++) {
      column.exps(k, e);
      for (int r = 0; r < ROWS; r++)
        if (r < rows) problem.pixel(n, y + r, x)[k * problem.strides[1]] = P(one[r] == 0 ? 0 : e[r] * one[r]);
    }
  });
}

// grad of logit k: p_k * (g_k - sum of p_j * g_j)
template <class T, class P>
__global__ void __launch_bounds__(128) backward(Problem<T, P> problem, int odd) {
  const int K = problem.logits.sizes[1], cells = problem.cells, row = 2 * blockIdx.y + odd, first = blockIdx.x * (cells - 1) - 1;
  const int64_t n = blockIdx.z;
  const Tile tile{shared_memory<float>(), K, cells};
  const Corners corners{tile.points + Tile::bytes(K, cells) / sizeof(float), K, cells};
  tile.load(problem.logits, n, row, first);
  corners.clear();
  __syncthreads();
  problem.walk(tile, row, first, [&](Column& column, int x, int y, int rows) {
    float e[ROWS], one[ROWS], dot[ROWS] = {};
    denominators(problem, column, n, x, y, rows, one);
    auto upstream = [&](int k, int r) {
      return one[r] == 0 ? 0.f : float(problem.pixel(n, y + r, x)[k * problem.strides[1]]);
    };
    for (int k = 0; k < K; k++) {
      column.exps(k, e);
      for (int r = 0; r < ROWS; r++) dot[r] += one[r] == 0 ? 0 : e[r] * one[r] * upstream(k, r);
    }
    for (int k = 0; k < K; k++) {
      column.exps(k, e);
      float a = 0, b = 0;
      for (int r = 0; r < ROWS; r++) {
        const float g = one[r] == 0 ? 0 : e[r] * one[r] * (upstream(k, r) - dot[r]);
        a += g, b += column.fy[r] * g;
      }
      corners.add(k, column.fx, a, b);
    }
  });
  __syncthreads();
  corners.write(problem.grad, n, problem.logits.sizes, row, first, odd);
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  const int64_t N = logits.size(0), K = logits.size(1);
  Tensor out = torch::stable::new_empty(logits, {N, K, height, width}, dtype);
  const Axis y(logits.size(2), height), x(logits.size(3), width);
  const int cells = cells_of_a_block([&](int cells) { return Tile::bytes(K, cells); });
  const Launcher launch(logits);
  with_type(logits, [&](auto* data) {
    with_type(out, [&](auto* probs) {
      using T = std::decay_t<decltype(*data)>;
      using P = std::decay_t<decltype(*probs)>;
      const Problem<T, P> problem{Points<T>(data, logits), Walk(y, x), cells, valid ? valid->const_data_ptr<bool>() : nullptr, probs,
                                  {K * height * width, height * width, width, 1}, nullptr};
      launch(forward<T, P>, dim3((x.cells() + cells - 1) / cells, y.cells(), N), cells * LANES, Tile::bytes(K, cells), problem);
    });
  });
  return out;
}

// grad (N,K,H,W) float32, float16 or bfloat16, any strides -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  const int64_t N = logits.size(0), K = logits.size(1), w = logits.size(3);
  Tensor out = torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float);
  const Axis y(logits.size(2), grad.size(2)), x(w, grad.size(3));
  auto bytes = [&](int cells) { return Tile::bytes(K, cells) + Corners::bytes(K, cells); };
  const int cells = cells_of_a_block(bytes);
  const Launcher launch(logits);
  with_type(logits, [&](auto* data) {
    with_type(grad, [&](auto* upstream) {
      using T = std::decay_t<decltype(*data)>;
      using P = std::decay_t<decltype(*upstream)>;
      const Problem<T, P> problem{Points<T>(data, logits), Walk(y, x), cells, valid ? valid->const_data_ptr<bool>() : nullptr,
                                  upstream, {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)},
                                  out.mutable_data_ptr<float>()};
      for (int odd = 0; odd < 2; odd++) {
        const dim3 grid((w + cells - 2) / (cells - 1), (y.cells() + 1 - odd) / 2, N);
        if (grid.y) launch(backward<T, P>, grid, cells * LANES, bytes(cells), problem, odd);
      }
    });
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
