// Class ids of upsampled logits, and the confusion matrix (K,K), rows truth, columns prediction.
//
// upsample_argmax: logits (N,K,h,w) float32, float16 or bfloat16, any strides -> ids (N,H,W) uint8, the class of the
// largest logit, the lowest on a tie, the first NaN where there is one; with confidences (K,) and a mask (N,H,W) 255
// where its softmax is not above its class's confidence, or the mask is false. A block, one warp, has 8 cells side by
// side, 4 threads each, with 2 x 8 pixels at once (1 x 8 with confidences). Never stored: upsampled logits.
//
// confusion_matrix: ids, or logits, of which ids are made first, a byte a pixel, and labels (N,H,W), uint8 or int64.
// Blocks of 256 threads take pixels one after the other. A block counts in shared memory (in the result where K x K
// does not fit) and adds what is not zero by 64-bit atomics; sums of integers do not depend on their order. An id that
// is no class takes 2^44 from the first cell, on which ops.mean_iou raises; nothing is read or written out of bounds
// for it.
#include "cells.cuh"

namespace {
template <bool SURE>
__global__ void __launch_bounds__(32) write_argmax(Cells all, const float* confidence, const bool* valid,
                                                   uint8_t* ids) {
  const Tile tile(all);
  each_patch<SURE ? 1 : 2, 8>(all, tile, [&](const auto& patch) {
    constexpr int ROWS = 8, PIXELS = SURE ? ROWS : 2 * ROWS;
    float best[PIXELS];
    int arg[PIXELS] = {};
    for (float& b : best) b = -INFINITY;
    auto logit = [&](int k, int i) {
      return bilinear(tile.corners[tile.at(k)], patch.fx[i / ROWS], all.y.frac(patch.y + i % ROWS));
    };
    for (int k = 0; k < tile.K; k++)
      for (int i = 0; i < PIXELS; i++) {
        const float now = logit(k, i);
        if (now > best[i] || (now != now && best[i] == best[i])) best[i] = now, arg[i] = k;
      }
    float sums[PIXELS] = {};
    for (int k = 0; SURE && k < tile.K; k++)
      for (int i = 0; i < PIXELS; i++) sums[i] += fast_exp2(LOG2E * (logit(k, i) - best[i]));
    for (int i = 0; SURE && i < PIXELS; i++) arg[i] = 1 > confidence[arg[i]] * sums[i] ? arg[i] : 255;
    for (int i = 0; i < PIXELS; i++)
      if (patch.has(i)) ids[patch.pixel(i)] = !SURE || !valid || valid[patch.pixel(i)] ? arg[i] : 255;
  });
}

// `fits`: whether the counts do, into shared memory.
__global__ void __launch_bounds__(256) count_ids(Ids guesses, Ids truths, int64_t pixels, int K, int64_t ignore,
                                                 bool fits, Count* out) {
  unsigned* const mine = shared_memory<unsigned>();
  for (int i = threadIdx.x; fits && i < K * K; i += blockDim.x) mine[i] = 0;
  __syncthreads();
  for (int64_t start = int64_t(blockIdx.x) * blockDim.x; start < pixels; start += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = start + threadIdx.x, truth = i < pixels ? truths.at(i) : ignore;
    int cell = -1;
    if (truth != ignore) {
      const int64_t guess = guesses.at(i);
      if (truth >= 0 && truth < K && guess >= 0 && guess < K) cell = truth * K + guess;
      else atomicOr(out, Count(0) - (Count(1) << 44));  // once however often: counts do not reach these bits
    }
    const bool alike = __all_sync(ALL, cell == __shfl_sync(ALL, cell, 0));  // runs of labels: one addition for a warp
    if (cell < 0 || (alike && threadIdx.x % 32)) continue;
    if (fits) atomicAdd(&mine[cell], alike ? 32u : 1u);
    else atomicAdd(&out[cell], Count(alike ? 32 : 1));
  }
  __syncthreads();
  for (int i = threadIdx.x; fits && i < K * K; i += blockDim.x)
    if (mine[i]) atomicAdd(&out[i], Count(mine[i]));
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width, std::optional<Tensor> confidence,
                       std::optional<Tensor> valid) {
  const Launcher launch(logits);
  const Cells all(logits, height, width, 4);
  Tensor ids = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  launch(confidence ? write_argmax<true> : write_argmax<false>, all.blocks(), 32, all.shared, all,
         confidence ? confidence->const_data_ptr<float>() : nullptr, valid ? valid->const_data_ptr<bool>() : nullptr,
         ids.mutable_data_ptr<uint8_t>());
  return ids;
}

// Adds to out (K,K), contiguous. Ids and target are contiguous.
void confusion_matrix(Tensor prediction, Tensor target, int64_t ignore, Tensor out) {
  if (prediction.dim() == 4) prediction = upsample_argmax(prediction, target.size(1), target.size(2), {}, {});
  const Launcher launch(target);
  const int64_t pixels = target.numel(), blocks = std::clamp<int64_t>(pixels / 4096, 1, 1056);
  const size_t bytes = sizeof(unsigned) * out.numel();
  const bool fits = bytes <= SHARED;
  launch(count_ids, blocks, 256, fits ? bytes : 0, Ids(prediction), Ids(target), pixels, int(out.size(0)), ignore, fits,
         reinterpret_cast<Count*>(out.mutable_data_ptr<int64_t>()));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}
