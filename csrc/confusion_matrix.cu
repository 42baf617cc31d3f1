// The class of each pixel of bilinearly upsampled logits, and the confusion matrix, on CUDA.
//
//   class = argmax of the logits z at a pixel: the lowest class on a tie, the first NaN if there is one
//   matrix[t][p] = number of pixels with label t and class p, without ignored labels
//
// Shapes. upsample_argmax: logits (N,K,h,w) float32, float16 or bfloat16 with any strides -> (N,H,W) uint8. With
// confidence (K,) it is 255 if the argmax's probability is not above the confidence of its class, with valid (N,H,W)
// also if that is false. confusion_matrix: class ids (N,H,W) uint8 or int64, or logits, whose argmax is taken first;
// labels (N,H,W) uint8 or int64; adds to a matrix (K,K) int64.
// Blocks and threads. upsample_argmax: a block, one warp, has 8 cells side by side and 4 threads for each; a thread
// takes 8 pixels of a column at once. confusion_matrix: blocks of 256 threads, one pixel a thread at a time. A block
// counts in shared memory, in the matrix itself if K x K does not fit, and adds what is not zero by 64-bit atomics.
// Never stored: the upsampled logits.
// Order of sums. Exponentials are summed in the order of the classes; counts are integers, whose order does not matter.
// Wrong ids. An id that is no class sets bits of the first cell that make it negative, on which ops.mean_iou raises.
// A naive kernel is the loop body of that in confusion_matrix.cpp, with a thread for each pixel and atomicAdd.
#include "cells.cuh"

namespace {
__global__ void __launch_bounds__(32) write_argmax(CellGrid grid, const float* confidence, const bool* valid,
                                                   uint8_t* ids) {
  constexpr int ROWS = 8;
  const Tile tile(grid);
  for_each_column<ROWS>(grid, tile, [&](const auto& column) {
    float largest[ROWS], sums[ROWS] = {};
    int id[ROWS] = {};
    for (float& value : largest) value = -INFINITY;
    auto logit = [&](int k, int i) {
      return bilinear(tile.corners[tile.at(k)], column.fx, grid.y.fraction(column.y + i));
    };
    for (int k = 0; k < tile.K; k++)
      for (int i = 0; i < ROWS; i++) {
        const float now = logit(k, i);
        if (now > largest[i] || (now != now && largest[i] == largest[i])) largest[i] = now, id[i] = k;
      }
    for (int k = 0; confidence && k < tile.K; k++)
      for (int i = 0; i < ROWS; i++) sums[i] += fast_exp2(LOG2E * (logit(k, i) - largest[i]));
    for (int i = 0; confidence && i < ROWS; i++) id[i] = 1 > confidence[id[i]] * sums[i] ? id[i] : NONE;
    for (int i = 0; i < ROWS; i++)
      if (i < column.rows) ids[column.pixel(i)] = !valid || valid[column.pixel(i)] ? id[i] : NONE;
  });
}

// `fits`: whether the counts fit into shared memory.
__global__ void __launch_bounds__(256) count_ids(ClassIds predictions, ClassIds labels, int64_t pixels, int K,
                                                 int64_t ignore, bool fits, Count* matrix) {
  unsigned* const counts = shared_memory<unsigned>();
  for (int i = threadIdx.x; fits && i < K * K; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int64_t start = int64_t(blockIdx.x) * blockDim.x; start < pixels; start += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = start + threadIdx.x, label = i < pixels ? labels[i] : ignore;
    int cell = -1;
    if (label != ignore) {
      const int64_t id = predictions[i];
      if (label >= 0 && label < K && id >= 0 && id < K) cell = label * K + id;
      else atomicOr(matrix, Count(0) - (Count(1) << 44));  // additions could wrap; counts are below 2^44
    }
    const bool same = __all_sync(ALL, cell == __shfl_sync(ALL, cell, 0));  // often so: then one addition for the warp
    if (cell < 0 || (same && threadIdx.x % 32)) continue;
    if (fits) atomicAdd(&counts[cell], same ? 32u : 1u);
    else atomicAdd(&matrix[cell], Count(same ? 32 : 1));
  }
  __syncthreads();
  for (int i = threadIdx.x; fits && i < K * K; i += blockDim.x)
    if (counts[i]) atomicAdd(&matrix[i], Count(counts[i]));
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width, std::optional<Tensor> confidence,
                       std::optional<Tensor> valid) {
  const Launcher launch(logits);
  logits = to_contiguous_float(logits);
  const CellGrid grid(logits, height, width, false);
  Tensor ids = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  launch(write_argmax, grid.blocks, 32, grid.shared, grid, confidence ? confidence->const_data_ptr<float>() : nullptr,
         valid ? valid->const_data_ptr<bool>() : nullptr, ids.mutable_data_ptr<uint8_t>());
  return ids;
}

void confusion_matrix(Tensor prediction, Tensor target, int64_t ignore, Tensor out) {
  if (prediction.dim() == 4) prediction = upsample_argmax(prediction, target.size(1), target.size(2), {}, {});
  const Launcher launch(target);
  const int64_t pixels = target.numel(), blocks = std::clamp<int64_t>(pixels / 4096, 1, 1056);
  const size_t bytes = sizeof(unsigned) * out.numel();
  const bool fits = bytes <= SHARED;
  launch(count_ids, blocks, 256, fits ? bytes : 0, ClassIds(prediction), ClassIds(target), pixels, int(out.size(0)),
         ignore, fits, reinterpret_cast<Count*>(out.mutable_data_ptr<int64_t>()));
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}
