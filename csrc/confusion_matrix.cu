// Confusion matrix (K,K), rows truth, columns prediction, of class ids, or of logits that are upsampled and argmaxed
// on the way; and the argmax alone.
//
// In: ids and labels (N,H,W) uint8 or int64; logits (N,K,h,w) float32, float16 or bfloat16, any strides. Ids: blocks
// of 256 threads take pixels one after the other. Logits: a block has 16 cells side by side (8 for many classes), 4
// threads each, with 2 x 8 pixels at once. Never stored: upsampled logits, and for the matrix no prediction. A block
// counts in shared memory (in the result where K x K does not fit) and adds what is not zero by 64-bit atomics; sums
// of integers do not depend on their order. An id that is no class takes 2^44 from the first cell, on which
// ops.mean_iou raises; nothing is read or written out of bounds for it.
#include "cells.cuh"

namespace {
// A block's counts.
struct Counts {
  Count* out;      // (K,K)
  int K;
  int64_t ignore;
  size_t bytes;    // of shared memory: 0 where they do not fit
  unsigned* mine;  // (K,K) there, or null: set by `begin`

  Counts(Tensor& out, int64_t ignore, size_t taken = 0)
      : out(reinterpret_cast<Count*>(out.mutable_data_ptr<int64_t>())), K(out.size(0)), ignore(ignore),
        bytes(sizeof(unsigned) * K * K), mine(nullptr) {
    if (bytes + taken > SHARED) bytes = 0;
  }
  // Ends with a barrier.
  __device__ void begin(void* shared) {
    if (bytes) mine = static_cast<unsigned*>(shared);
    for (int i = threadIdx.x; mine && i < K * K; i += blockDim.x) mine[i] = 0;
    __syncthreads();
  }
  // The cell of a pixel, -1 where it does not count. What is no class takes 2^44 from the first cell, once however
  // often: counts do not reach these bits.
  __device__ int cell(int64_t truth, int64_t guess) const {
    if (truth == ignore) return -1;
    if (truth >= 0 && truth < K && guess >= 0 && guess < K) return truth * K + guess;
    atomicOr(out, Count(0) - (Count(1) << 44));
    return -1;
  }
  __device__ void add(int cell, unsigned pixels) const {
    if (cell < 0) return;
    if (mine) atomicAdd(&mine[cell], pixels);
    else atomicAdd(&out[cell], Count(pixels));
  }
  __device__ void end() const {
    __syncthreads();
    for (int i = threadIdx.x; mine && i < K * K; i += blockDim.x)
      if (mine[i]) atomicAdd(&out[i], Count(mine[i]));
  }
};

__global__ void __launch_bounds__(256) count_ids(Ids guess, Ids truth, int64_t pixels, Counts counts) {
  counts.begin(shared_memory<unsigned>());
  for (int64_t start = int64_t(blockIdx.x) * blockDim.x; start < pixels; start += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = start + threadIdx.x;
    const int cell = i < pixels ? counts.cell(truth.at(i), guess.at(i)) : -1;
    const bool alike = __all_sync(ALL, cell == __shfl_sync(ALL, cell, 0));  // runs of labels: one addition for a warp
    if (!alike || threadIdx.x % 32 == 0) counts.add(cell, alike ? 32 : 1);
  }
  counts.end();
}

__global__ void __launch_bounds__(64) count_argmax(Cells all, Ids truth, Counts counts) {
  const Tile tile(all);
  counts.begin(tile.sums);  // behind the corners
  each_patch(all, tile, [&](const auto& patch) {
    using Pixels = std::decay_t<decltype(patch)>;
    int arg[Pixels::PIXELS], before = -1;
    unsigned run = 0;
    patch.argmax(arg);
    for (int i = 0; i < Pixels::PIXELS; i++) {
      if (!patch.has(i)) continue;
      const int cell = counts.cell(truth.at(patch.pixel(i)), arg[i]);
      if (cell != before) counts.add(before, run), before = cell, run = 0;
      run++;
    }
    counts.add(before, run);
  });
  counts.end();
}

__global__ void __launch_bounds__(64) write_argmax(Cells all, uint8_t* ids) {
  const Tile tile(all);
  each_patch(all, tile, [&](const auto& patch) {
    int arg[std::decay_t<decltype(patch)>::PIXELS];
    patch.argmax(arg);
    for (int i = 0; i < int(sizeof arg / sizeof *arg); i++)
      if (patch.has(i)) ids[patch.pixel(i)] = arg[i];
  });
}

// Adds to out (K,K), contiguous. Ids and target are contiguous.
void confusion_matrix(Tensor prediction, Tensor target, int64_t ignore, Tensor out) {
  const Launcher launch(target);
  if (prediction.dim() == 4) {
    const Counts counts(out, ignore, Cells(prediction, target.size(1), target.size(2), CORNERS).shared);
    const Cells all(prediction, target.size(1), target.size(2), CORNERS, counts.bytes);
    launch(count_argmax, all.blocks(), all.own * THREADS, all.shared, all, Ids(target), counts);
  } else {
    const Counts counts(out, ignore);
    const int64_t pixels = target.numel(), blocks = std::clamp<int64_t>(pixels / 4096, 1, 1056);
    launch(count_ids, blocks, 256, counts.bytes, Ids(prediction), Ids(target), pixels, counts);
  }
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width) {
  const Launcher launch(logits);
  const Cells all(logits, height, width, CORNERS);
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  launch(write_argmax, all.blocks(), all.own * THREADS, all.shared, all, out.mutable_data_ptr<uint8_t>());
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}
