// Class probabilities of bilinearly upsampled logits, and the gradient straight to the low resolution.
//
// In: logits (N,K,h,w) float32 or bfloat16, any strides; a mask (N,H,W) of pixels that are zero. Out: (N,H,W,K) float32
// or bfloat16. Never stored: the upsampled logits; backward computes the probabilities again from the low resolution.
// Cells, exponentials and the two rounds of backward are those of masked_cross_entropy.cpp. A vector holds one class of
// LANES cells, and a pixel's classes lie side by side in memory: LANES classes at a time are transposed on the way.
#include "cells.h"

namespace {
struct Problem : Upsampling {
  const bool* valid;  // (N,H,W) or null

  Problem(const Tensor& logits, const std::optional<Tensor>& valid, int64_t height, int64_t width)
      : Upsampling(logits, height, width), valid(valid ? valid->const_data_ptr<bool>() : nullptr) {}
  // The first pixel of a block's row.
  int64_t row(int64_t n, const Block& block) const { return (n * y.m + block.row) * x.m; }
  // e[k*P + p]: the probabilities of a block's pixels; there[p]: all bits set where a pixel is there and valid, else 0
  template <int P>
  void probabilities(Walk& walk, const Block& block, int64_t row, I* there, V* e) const {
    V sums[P];
    exponentials<P>(walk, block, e, sums, [](int, V, V) {});
    for (int p = 0; p < P; p++) {
      for (int l = 0; l < LANES; l++)
        there[p][l] = p < block.count(l, P) && (!valid || valid[row + block.column(l) + p]) ? -1 : 0;
      sums[p] = reciprocal(sums[p]);
    }
    for (int i = 0; i < walk.K * P; i++) e[i] = there[i % P] ? e[i] * sums[i % P] : V{};
  }
};

// numbers[k*P + p] of a block's pixels to (W,K) `row`
template <int P, class T>
void put(const Block& block, int K, const V* numbers, T* row) {
  for (int begin = 0; begin < K; begin += LANES)
    for (int p = 0; p < P; p++) {
      V classes[LANES];
      const int n = std::min(LANES, K - begin);
      for (int k = 0; k < LANES; k++) classes[k] = k < n ? numbers[(begin + k) * P + p] : V{};
      transpose(classes);
      for (int l = 0; l < LANES; l++)
        if (p < block.count(l, P)) store(row + int64_t(block.column(l) + p) * K + begin, classes[l], n);
    }
}

// and back, 0 where there is none
template <int P, class T>
void get(const Block& block, int K, V* numbers, const T* row) {
  for (int begin = 0; begin < K; begin += LANES)
    for (int p = 0; p < P; p++) {
      V classes[LANES];
      const int n = std::min(LANES, K - begin);
      for (int l = 0; l < LANES; l++)
        classes[l] = p < block.count(l, P) ? load(row + int64_t(block.column(l) + p) * K + begin, n) : V{};
      transpose(classes);
      for (int k = 0; k < n; k++) numbers[(begin + k) * P + p] = classes[k];
    }
}

template <class T>
void forward(const Problem& problem, T* probs) {
  const int64_t K = problem.logits.sizes[1];
  each_row(problem.logits.sizes[0], problem.y.n, 1, [&] {
    return [&, walk = Walk(problem), e = std::vector<V>(K * PIXELS)](int64_t n, int64_t cell) mutable {
      walk(n, cell, [&](auto P, const Block& block) {
        I there[P];
        const int64_t row = problem.row(n, block);
        problem.probabilities<P>(walk, block, row, there, e.data());
        put<P>(block, K, e.data(), probs + row * K);
      }, [](int) {});
    };
  });
}

// grad of logit k: p_k * (g_k - sum of p_j * g_j)
template <class T>
void backward(const Problem& problem, const T* upstream, float* grad) {
  const int64_t K = problem.logits.sizes[1];
  each_row(problem.logits.sizes[0], problem.y.n, 2, [&] {
    return [&, walk = Walk(problem), gradient = Gradient(grad, problem), e = std::vector<V>(K * PIXELS),
            g = std::vector<V>(K * PIXELS)](int64_t n, int64_t cell) mutable {
      walk(n, cell, [&](auto P, const Block& block) {
        V dot[P] = {}, fx[P];
        I there[P];
        const int64_t row = problem.row(n, block);
        problem.probabilities<P>(walk, block, row, there, e.data());
        get<P>(block, K, g.data(), upstream + row * K);
        for (int p = 0; p < P; p++) fx[p] = load(block.fx + p * LANES);
        for (int i = 0; i < K * P; i++) dot[i % P] += e[i] * g[i];
        for (int k = 0; k < K; k++) {
          V a{}, b{};
          for (int p = 0; p < P; p++) {
            const V grad = there[p] ? e[k * P + p] * (g[k * P + p] - dot[p]) : V{};
            a += grad, b += grad * fx[p];
          }
          gradient.sums[k].add(a, b, block.fy);
        }
      }, [&](int x) { gradient.to_corners(x); });
      gradient.add(n, cell);
    };
  });
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width, logits.size(1)}, dtype);
  const Problem problem(logits, valid, height, width);
  if (dtype == ScalarType::BFloat16) forward(problem, static_cast<uint16_t*>(out.data_ptr()));
  else forward(problem, out.mutable_data_ptr<float>());
  return out;
}

// grad (N,H,W,K) float32 or bfloat16 -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  Tensor out = torch::stable::new_zeros(logits, logits.sizes(), ScalarType::Float);
  const Problem problem(logits, valid, grad.size(1), grad.size(2));
  if (grad.scalar_type() == ScalarType::BFloat16)
    backward(problem, static_cast<const uint16_t*>(grad.data_ptr()), out.mutable_data_ptr<float>());
  else backward(problem, grad.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
