// Class probabilities of bilinearly upsampled logits; their gradient goes straight to the low resolution.
//
//   p_k = exp(z_k) / (sum over j of exp(z_j)), z being the logits at a pixel; 0 if the pixel is not valid
//   gradient of z_k = p_k * (g_k - sum over j of p_j * g_j), g being the gradient of p
//
// Shapes. logits (N,K,h,w) float32 or bfloat16 with any strides, valid (N,H,W) -> p (N,H,W,K), channels last, float32
// or bfloat16. Backward: g (N,H,W,K) -> the gradient of the logits (N,K,h,w) in float32.
// Division of work. Threads share the rows of cells; a vector holds one pixel of each of LANES cells, a block
// PIXELS neighbouring pixels of each. A pixel's classes lie side by side in memory and are written one by one.
// Never stored: the upsampled logits. Backward computes the probabilities again.
// Exponentials and the order of sums are those of masked_cross_entropy.cpp.
//
// The naive kernel, with Neighbours of cells.h:
//
// ```cpp
// // Writes the probabilities (H,W,K) of logits (K,h,w).
// void upsample_softmax(const float* logits, float* p, int K, int h, int w, int H, int W) {
//   for (int pixel = 0; pixel < H * W; pixel++, p += K) {
//     const Neighbours at(h, w, H, W, pixel / W, pixel % W);
//     float sum = 0;
//     for (int k = 0; k < K; k++) sum += p[k] = std::exp(at.logit(logits + k * h * w));
//     for (int k = 0; k < K; k++) p[k] /= sum;
//   }
// }
// ```
#include <torch/headeronly/util/BFloat16.h>

#include "cells.h"

namespace {
using torch::headeronly::BFloat16;

struct SoftmaxTask {
  const Upsampling& up;
  const bool* valid;  // (N,H,W) or null
  CellIterator cells;
  Gradient gradient;
  std::vector<Floats> e, g;  // (K*PIXELS)

  SoftmaxTask(const Upsampling& up, const bool* valid, float* grad)
      : up(up), valid(valid), cells(up), gradient(grad, up), e(cells.K * PIXELS), g(grad ? cells.K * PIXELS : 0) {}

  // Writes the probabilities of a row of cells to probs (N,H,W,K).
  template <class T>
  void forward(int64_t n, int64_t row, T* probs) {
    cells.for_each_block(n, row, [&](auto P, const PixelBlock& block) {
      const int64_t pixel = (n * up.y.outputs + block.row) * up.x.outputs;
      Ints present[P];
      probabilities<P>(block, pixel, present);
      write_pixels<P>(block, probs + pixel * cells.K);
    }, [] {});
  }

  // Adds the gradient of a row of cells, given `upstream` (N,H,W,K), the gradient of the probabilities.
  template <class T>
  void backward(int64_t n, int64_t row, const T* upstream) {
    cells.for_each_block(n, row, [&](auto P, const PixelBlock& block) {
      const int64_t pixel = (n * up.y.outputs + block.row) * up.x.outputs;
      Floats dot[P] = {};
      Ints present[P];
      probabilities<P>(block, pixel, present);
      read_pixels<P>(block, upstream + pixel * cells.K);
      for (int i = 0; i < cells.K * P; i++) dot[i % P] += e[i] * g[i];
      for (int k = 0; k < cells.K; k++) {
        Floats sum{}, sum_x{};
        for (int p = 0; p < P; p++) {
          const Floats grad = present[p] ? e[k * P + p] * (g[k * P + p] - dot[p]) : Floats{};
          sum += grad;
          sum_x += grad * load(block.fx + p * LANES);
        }
        gradient.sums[k].add(sum, sum_x, block.fy);
      }
    }, [&] { gradient.finish_cells(cells.x); });
    gradient.finish_row(n, row);
  }

 private:
  // Sets e[k*P + p] to the probabilities of a block's pixels and the bits of present[p] in lanes whose pixel p exists
  // and is valid. `pixel`: index of the first pixel of the block's row.
  template <int P>
  void probabilities(const PixelBlock& block, int64_t pixel, Ints* present) {
    Floats sums[P];
    exponentials<P>(cells, block, e.data(), sums);
    for (int p = 0; p < P; p++)
      for (int l = 0; l < LANES; l++)
        present[p][l] = p < block.count(l, P) && (!valid || valid[pixel + block.column(l) + p]) ? -1 : 0;
    for (int p = 0; p < P; p++) sums[p] = 1 / sums[p];
    for (int i = 0; i < cells.K * P; i++) e[i] = present[i % P] ? e[i] * sums[i % P] : Floats{};
  }

  // Writes e to the output row (W,K).
  template <int P, class T>
  void write_pixels(const PixelBlock& block, T* row) const {
    const float* from = reinterpret_cast<const float*>(e.data());
    for (int l = 0; l < LANES; l++)
      for (int p = 0; p < block.count(l, P); p++) {
        T* __restrict to = row + int64_t(block.column(l) + p) * cells.K;
        for (int k = 0; k < cells.K; k++) to[k] = from[(k * P + p) * LANES + l];
      }
  }

  // Reads g from a row (W,K). Entries of pixels that do not exist are not set; they are masked later.
  template <int P, class T>
  void read_pixels(const PixelBlock& block, const T* row) {
    float* __restrict to = reinterpret_cast<float*>(g.data());
    for (int l = 0; l < LANES; l++)
      for (int p = 0; p < block.count(l, P); p++) {
        const T* from = row + int64_t(block.column(l) + p) * cells.K;
        for (int k = 0; k < cells.K; k++) to[(k * P + p) * LANES + l] = from[k];
      }
  }
};

// Without `grad`: forward, writes `probs` (N,H,W,K). With it (N,K,h,w): backward, `probs` is their gradient.
template <class T>
void run(Tensor logits, const std::optional<Tensor>& valid, int64_t height, int64_t width, T* probs, float* grad) {
  logits = to_contiguous_float(logits);
  const Upsampling up(logits, height, width);
  const bool* const is_valid = valid ? valid->const_data_ptr<bool>() : nullptr;
  parallel_rows(logits.size(0), up.y.points, grad ? 2 : 1, [&] {
    return [&, task = SoftmaxTask(up, is_valid, grad)](int64_t n, int64_t row) mutable {
      if (grad) task.backward(n, row, probs);
      else task.forward(n, row, probs);
    };
  });
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width, logits.size(1)}, dtype);
  if (dtype == ScalarType::Float) run(logits, valid, height, width, static_cast<float*>(out.data_ptr()), nullptr);
  else run(logits, valid, height, width, static_cast<BFloat16*>(out.data_ptr()), nullptr);
  return out;
}

Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  Tensor out = torch::stable::new_zeros(logits, logits.sizes(), ScalarType::Float);
  const int64_t h = grad.size(1), w = grad.size(2);
  float* const to = out.mutable_data_ptr<float>();
  if (grad.scalar_type() == ScalarType::Float) run(logits, valid, h, w, static_cast<float*>(grad.data_ptr()), to);
  else run(logits, valid, h, w, static_cast<BFloat16*>(grad.data_ptr()), to);
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
