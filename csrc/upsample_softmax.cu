// Class probabilities of bilinearly upsampled logits, on CUDA; their gradient goes straight to the low resolution.
//
//   p_k = exp(z_k) / (sum over j of exp(z_j)), z being the logits at a pixel; 0 if the pixel is not valid
//   gradient of z_k = p_k * (g_k - sum over j of p_j * g_j), g being the gradient of p
//
// Shapes. logits (N,K,h,w) float32, float16 or bfloat16 with any strides, valid (N,H,W) -> p (N,H,W,K), channels last,
// in any of these types. Backward: g (N,H,W,K) -> the gradient of the logits (N,K,h,w) in float32.
// Blocks and threads. A block has 8 cells side by side, two for each of its four warps. A warp takes 8 pixels of a row
// of a cell at once, and a lane has a class: a pixel's classes lie side by side in memory, and a class's gradient needs
// no sum over threads. The warp goes over the classes twice, for the softmax's denominators and for the results; the
// last 32 classes are still in registers the second time.
// Never stored: the upsampled logits. Backward computes the probabilities again.
// Order of sums. A lane sums over its classes, shuffles sum over the warp; gradients are summed over pixels, 8 columns
// at a time, then over up to four cells by gather_cell_gradients. The order is fixed: the same bits from run to run.
// A naive kernel is the loop body of that in upsample_softmax.cpp, with a thread for each pixel.
#include "cells.cuh"

namespace {
// P pixels at once; P is 1 if the warp's cells are not smooth. Forward writes `probs` (N,H,W,K), backward reads the
// gradient of the probabilities there.
template <bool BACKWARD, int P, class T>
__device__ void for_each_pixel(const CellGrid& grid, const Tile& tile, const bool* valid, T* probs) {
  const int K = tile.K, lane = threadIdx.x % 32, last = (K - 1) / 32 * 32 + lane;  // the lane's last class, maybe >= K
  const int top = grid.y.first(tile.row), bottom = grid.y.first(tile.row + 1);
  const int begin = threadIdx.x / 32 * (32 / tile.threads);  // of the cells that the warp's `smooth` covers
  for (int cell = begin; cell < begin + 32 / tile.threads; cell++)
    for (int x = grid.x.first(tile.first + cell), end = grid.x.first(tile.first + cell + 1); x < end; x += P)
      for (int y = top; y < bottom; y++) {
        const int64_t pixel = (tile.n * grid.y.outputs + y) * grid.x.outputs + x;
        const unsigned present = P < end - x ? (1u << P) - 1 : (1u << (end - x)) - 1;  // bit p: pixel p exists
        const unsigned selected = __ballot_sync(ALL, present >> lane & 1 && (!valid || valid[pixel + lane]));
        if (BACKWARD && !selected) continue;
        const float4* const corners = tile.corners + cell * tile.pitch;
        const float fy = grid.y.fraction(y), fx = grid.x.fraction(x);
        float shift = -INFINITY, e[P], g[P], sums[P] = {}, dots[P] = {}, inv_denominator[P], dot[P];
        for (int k = lane; k < K && P == 1; k += 32) shift = fmaxf(shift, bilinear(corners[k], fx, fy));
        if (P == 1) shift = max_lanes(shift, 32);
        // e = exp(logit - shift) of class k, 0 if there is no such class or the only pixel, maybe NaN, is not selected;
        // g = the gradient
        auto read_class = [&](int k) {
          const float4 c = corners[min(k, K - 1)];
          const float slope = c.y + fy * c.w, m = exp2_minus_1(grid.x.step * slope);
          float now = P == 1 ? exp2f(LOG2E * (bilinear(c, fx, fy) - shift)) : fast_exp2(c.x + fy * c.z + fx * slope);
          if (k >= K || (P == 1 && !selected)) now = 0;
          const T* from = probs + pixel * K + k;
          for (int p = 0; p < P; p++, from += K) {
            e[p] = now, now += now * m;
            if (BACKWARD) g[p] = k < K && selected >> p & 1 ? float(*from) : 0.f;
          }
        };
#pragma unroll 1
        for (int k = lane; k <= last; k += 32) {
          read_class(k);
          for (int p = 0; p < P; p++) {
            sums[p] += e[p];
            if (BACKWARD) dots[p] += e[p] * g[p];
          }
        }
        const float inverse = fast_reciprocal(sum_lanes<P, 32>(sums));  // of pixel lane % P
        const float mean = BACKWARD ? inverse * sum_lanes<P, 32>(dots) : 0;
        for (int p = 0; p < P; p++) {
          inv_denominator[p] = __shfl_sync(ALL, selected >> lane % P & 1 ? inverse : 0, p);
          if (BACKWARD) dot[p] = __shfl_sync(ALL, mean, p);
        }
#pragma unroll 1
        for (int k = last; k >= 0; k -= 32) {
          if (k < last) read_class(k);
          if (k >= K) continue;
          T* to = probs + pixel * K + k;
          float sum = 0, column_sum = 0;  // column_sum: of column times gradient, by repeated addition
          for (int p = 0; p < P && !BACKWARD; p++, to += K)
            if (present >> p & 1) *to = T(e[p] * inv_denominator[p]);
          for (int p = P - 1; p >= 0 && BACKWARD; p--) {
            sum += e[p] * inv_denominator[p] * (g[p] - dot[p]);
            if (p) column_sum += sum;
          }
          const float right = fx * sum + grid.x.step * column_sum;
          float4& s = tile.sums[cell * tile.pitch + k];
          if (BACKWARD) s = make_float4(s.x + sum, s.y + right, s.z + fy * sum, s.w + fy * right);
        }
      }
}

template <bool BACKWARD, class T>
__global__ void __launch_bounds__(128, 5) probabilities(CellGrid grid, const bool* valid, T* probs, float4* sums) {
  Tile tile(grid);
  tile.prepare(grid);
  if (tile.smooth) for_each_pixel<BACKWARD, 8>(grid, tile, valid, probs);
  else for_each_pixel<BACKWARD, 1>(grid, tile, valid, probs);
  if (BACKWARD) tile.write_sums(sums, grid);
}

template <bool BACKWARD>
void run(const Launcher& launch, const CellGrid& grid, const std::optional<Tensor>& valid, const Tensor& probs,
         float4* sums) {
  auto run_type = [&](auto* data) {
    using T = std::decay_t<decltype(*data)>;
    launch(probabilities<BACKWARD, T>, grid.blocks, 128, grid.shared, grid,
           valid ? valid->const_data_ptr<bool>() : nullptr, data, sums);
  };
  if (probs.scalar_type() == ScalarType::Float) run_type(static_cast<float*>(probs.data_ptr()));
  else if (probs.scalar_type() == ScalarType::Half) run_type(static_cast<Half*>(probs.data_ptr()));
  else run_type(static_cast<BFloat16*>(probs.data_ptr()));
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  const Launcher launch(logits);
  logits = to_contiguous_float(logits);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width, logits.size(1)}, dtype);
  run<false>(launch, CellGrid(logits, height, width), valid, out, nullptr);
  return out;
}

Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  const Launcher launch(logits);
  logits = to_contiguous_float(logits);
  const CellGrid grid(logits, grad.size(1), grad.size(2));
  Tensor sums = new_cell_sums(logits, grid);
  run<true>(launch, grid, valid, grad, static_cast<float4*>(sums.data_ptr()));
  return gather(launch, grid, logits, sums);
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
