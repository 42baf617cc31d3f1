// Class probabilities of bilinearly upsampled logits, and the gradient straight to the low resolution.
//
// In: logits (N,K,h,w) float32, float16 or bfloat16, any strides; a mask (N,H,W) of pixels that are zero. Out:
// (N,H,W,K), channels last, float32, float16 or bfloat16. Never stored: the upsampled logits; backward computes the
// probabilities again.
//
// A block has 8 cells side by side, two for each of its four warps. A warp takes 8 pixels of a row of a cell at once,
// a class in each lane: a pixel's classes lie side by side in memory, and a class's gradient needs no sum over threads.
// It goes over the classes twice, for the softmax's denominators and for the results; up to 32 are still there the
// second time. All sums have a fixed order: the same bits from run to run.
#include "cells.cuh"

namespace {
// P pixels at once, 1 where the warp's cells are not smooth. Forward writes `probs` (N,H,W,K), backward reads their
// gradient there: that of logit k is p_k * (g_k - sum of p_j * g_j).
template <bool BACKWARD, int P, class T>
__device__ void each_pixel(const Cells& all, const Tile& tile, const bool* valid, T* probs) {
  const int K = tile.K, lane = threadIdx.x % 32, last = (K - 1) / 32 * 32 + lane;  // its last class; there may be none
  const int top = all.y.first(tile.row), bottom = all.y.first(tile.row + 1);
  const int begin = threadIdx.x / 32 * (32 / tile.threads);  // the first cell whose corners the warp has looked at
  for (int cell = begin; cell < begin + 32 / tile.threads; cell++)
    for (int x = all.x.first(tile.first + cell), end = all.x.first(tile.first + cell + 1); x < end; x += P)
      for (int y = top; y < bottom; y++) {
        const int64_t pixel = (tile.n * all.y.m + y) * all.x.m + x;
        const unsigned there = P < end - x ? (1u << P) - 1 : (1u << (end - x)) - 1;  // bit p: pixel p is there
        const unsigned wanted = __ballot_sync(ALL, there >> lane & 1 && (!valid || valid[pixel + lane]));
        if (BACKWARD && !wanted) continue;
        const float4* const corners = tile.corners + cell * tile.pitch;
        const float fy = all.y.frac(y), fx = all.x.frac(x);
        float shift = -INFINITY, e[P], g[P], sums[P] = {}, dots[P] = {}, share[P], dot[P];
        for (int k = lane; k < K && P == 1; k += 32) shift = fmaxf(shift, bilinear(corners[k], fx, fy));
        if (P == 1) shift = max_lanes(shift, 32);
        // e = exp(logit - shift) of class k, 0 where there is no class or a NaN might not be wanted; g = the gradient
        auto read = [&](int k) {
          const float4 c = corners[min(k, K - 1)];
          const float slope = c.y + fy * c.w, m = exp2_minus_1(all.x.step * slope);
          float now = P == 1 ? exp2f(LOG2E * (bilinear(c, fx, fy) - shift)) : fast_exp2(c.x + fy * c.z + fx * slope);
          if (k >= K || (P == 1 && !wanted)) now = 0;
          const T* from = probs + pixel * K + k;
          const unsigned mine = k < K ? wanted : 0;
          for (int p = 0; p < P; p++, from += K) {
            e[p] = now, now += now * m;
            if (BACKWARD) g[p] = mine >> p & 1 ? float(*from) : 0.f;
          }
        };
#pragma unroll 1
        for (int k = lane; k <= last; k += 32) {
          read(k);
          for (int p = 0; p < P; p++) {
            sums[p] += e[p];
            if (BACKWARD) dots[p] += e[p] * g[p];
          }
        }
        const float one = reciprocal(sum_lanes<P, 32>(sums)), mean = BACKWARD ? one * sum_lanes<P, 32>(dots) : 0;
        for (int p = 0; p < P; p++) {
          share[p] = __shfl_sync(ALL, wanted >> lane % P & 1 ? one : 0, p);
          if (BACKWARD) dot[p] = __shfl_sync(ALL, mean, p);
        }
#pragma unroll 1
        for (int k = last; k >= 0; k -= 32) {
          if (k < last) read(k);
          if (k >= K) continue;
          T* to = probs + pixel * K + k;
          float sum = 0, columns = 0;  // columns: times the column; what is in column p is added p times
          for (int p = 0; p < P && !BACKWARD; p++, to += K)
            if (there >> p & 1) *to = T(e[p] * share[p]);
          for (int p = P - 1; p >= 0 && BACKWARD; p--) {
            sum += e[p] * share[p] * (g[p] - dot[p]);
            if (p) columns += sum;
          }
          const float right = fx * sum + all.x.step * columns;
          float4& s = tile.sums[cell * tile.pitch + k];
          if (BACKWARD) s = make_float4(s.x + sum, s.y + right, s.z + fy * sum, s.w + fy * right);
        }
      }
}

template <bool BACKWARD, class T>
__global__ void __launch_bounds__(128, 5) probabilities(Cells all, const bool* valid, T* probs, float4* sums) {
  Tile tile(all);
  tile.prepare(all);
  if (tile.smooth) each_pixel<BACKWARD, 8>(all, tile, valid, probs);
  else each_pixel<BACKWARD, 1>(all, tile, valid, probs);
  if (BACKWARD) tile.store(sums, all);
}

template <bool BACKWARD>
void run(const Launcher& launch, const Cells& all, const std::optional<Tensor>& valid, const Tensor& probs,
         float4* sums) {
  with_type(probs, [&](auto* data) {
    using T = std::decay_t<decltype(*data)>;
    launch(probabilities<BACKWARD, T>, all.blocks(), 128, all.shared, all,
           valid ? valid->const_data_ptr<bool>() : nullptr, data, sums);
  });
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width, logits.size(1)}, dtype);
  run<false>(Launcher(logits), Cells(logits, height, width), valid, out, nullptr);
  return out;
}

// grad (N,H,W,K) contiguous, float32, float16 or bfloat16 -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  const Launcher launch(logits);
  const Cells all(logits, grad.size(1), grad.size(2));
  const Results results(logits, all, true, 0);
  run<true>(launch, all, valid, grad, results.cells());
  results.finish(launch, all);
  return results.grad;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
