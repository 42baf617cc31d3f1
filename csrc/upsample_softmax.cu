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
template <class P>
struct Problem {
  Points logits;
  Walk walk;
  const bool* valid;   // (N,H,W) or null
  P* probs;            // (N,K,H,W); backward: their gradient
  int64_t strides[4];  // of them
  float* grad;         // (N,K,h,w)

  // Where class 0 of a pixel is.
  __device__ P* pixel(int64_t n, int y, int x) const { return probs + n * strides[0] + y * strides[2] + x * strides[3]; }
  // one[r] = 1 / the softmax's denominator, 0 where there is no pixel or it is not valid
  __device__ void shares(const Tile& tile, Column& column, int x, int y, int rows, float* one) const {
    unsigned needed = 0;
    for (int r = 0; r < rows; r++)
      needed |= unsigned(!valid || valid[(tile.n * walk.y.m + y + r) * walk.x.m + x]) << r;
    column.need(needed);
    column.denominators(one);
    for (int r = 0; r < ROWS; r++) one[r] = needed >> r & 1 ? reciprocal(one[r]) : 0;
  }
};

template <class P>
__global__ void __launch_bounds__(128, 4) probabilities(Problem<P> problem, int) {
  const Tile tile(problem.logits, problem.walk.y.step, POWERS, 0);
  problem.walk(tile, [&](Column& column, int x, int y, int rows) {
    float e[ROWS], one[ROWS];
    problem.shares(tile, column, x, y, rows, one);
    P* to = problem.pixel(tile.n, y, x);
    for (int k = 0; k < tile.K; k++, to += problem.strides[1]) {
      column.exps(k, e);
      for (int r = 0; r < ROWS; r++)
        if (r < rows) to[r * problem.strides[2]] = P(e[r] * one[r]);
    }
  });
}

// grad of logit k: p_k * (g_k - sum of p_j * g_j)
template <class P>
__global__ void __launch_bounds__(128, 4) probabilities_backward(Problem<P> problem, int round) {
  const Tile tile(problem.logits, problem.walk.y.step, SUMS, round);
  problem.walk(tile, [&](Column& column, int x, int y, int rows) {
    float e[ROWS], one[ROWS], dot[ROWS] = {};
    problem.shares(tile, column, x, y, rows, one);
    const P* from = problem.pixel(tile.n, y, x);
    auto upstream = [&](int k, int r) {
      return column.needed >> r & 1 ? float(from[k * problem.strides[1] + r * problem.strides[2]]) : 0.f;
    };
    for (int k = 0; k < tile.K; k++) {
      column.exps(k, e);
      for (int r = 0; r < ROWS; r++) dot[r] += e[r] * one[r] * upstream(k, r);
    }
    for (int k = 0; k < tile.K; k++) {
      float a = 0, b = 0;
      column.exps(k, e);
      for (int r = 0; r < ROWS; r++) {
        const float g = e[r] * one[r] * (upstream(k, r) - dot[r]);
        a += g, b += column.fy[r] * g;
      }
      tile.add(k, column.fx, a, b);
    }
  });
  __syncthreads();
  tile.write(problem.grad, problem.logits.sizes);
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  const int64_t K = logits.size(1);
  const Launcher launch(logits);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), K, height, width}, dtype);
  const Walk walk{Axis(logits.size(2), height), Axis(logits.size(3), width)};
  const Grid grid(launch, logits, walk, POWERS);
  with_type(out, [&](auto* probs) {
    using P = std::decay_t<decltype(*probs)>;
    grid(launch, probabilities<P>, {Points(logits), walk, valid ? valid->const_data_ptr<bool>() : nullptr, probs,
                              {K * height * width, height * width, width, 1}, nullptr});
  });
  return out;
}

// grad (N,K,H,W) float32, float16 or bfloat16, any strides -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  const Launcher launch(logits);
  Tensor out = torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float);
  const Walk walk{Axis(logits.size(2), grad.size(2)), Axis(logits.size(3), grad.size(3))};
  const Grid grid(launch, logits, walk, SUMS);
  with_type(grad, [&](auto* upstream) {
    using P = std::decay_t<decltype(*upstream)>;
    grid(launch, probabilities_backward<P>, {Points(logits), walk, valid ? valid->const_data_ptr<bool>() : nullptr, upstream,
                                             {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)},
                                             out.mutable_data_ptr<float>()});
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
