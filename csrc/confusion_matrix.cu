// Confusion matrix (K,K), rows truth, columns prediction, of class ids, or of logits that are upsampled and argmaxed on the way;
// and the argmax alone.
//
// In: ids and labels (N,H,W) uint8 or int64; logits (N,K,h,w) float32, float16 or bfloat16, any strides. Each block counts in
// shared memory (in the result itself where K x K does not fit) and adds what is not zero by 64-bit atomics; sums of integers do
// not depend on their order. Grids: ids, pixels one after the other; logits, blocks and threads as in cells.cuh, no cell twice.
// Never stored: upsampled logits, and for the matrix no prediction. An id that is no class takes 2^44 from the first cell, on
// which ops.mean_iou raises; nothing is read or written out of bounds for it.
#include "cells.cuh"

namespace {
using Count = unsigned long long;

struct Labels {
  const void* data;
  bool wide;  // int64

  explicit Labels(const Tensor& t) : data(t.data_ptr()), wide(t.scalar_type() == ScalarType::Long) {}
  __device__ int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const uint8_t*>(data)[i];
  }
};

// A block's counts.
struct Counts {
  bool fits;       // into shared memory
  unsigned* mine;  // (K,K) there, set by the block, or null
  Count* out;      // (K,K)
  int K;

  static size_t bytes(int64_t K) { return sizeof(unsigned) * K * K <= SHARED ? sizeof(unsigned) * K * K : 0; }

  // To be followed by a barrier.
  __device__ void clear() const {
    for (int i = threadIdx.x; mine && i < K * K; i += blockDim.x) mine[i] = 0;
  }
  __device__ void add(int cell, unsigned pixels) const {
    if (mine) atomicAdd(&mine[cell], pixels);
    else atomicAdd(&out[cell], Count(pixels));
  }
  // Behind a barrier.
  __device__ void hand_over() const {
    for (int i = threadIdx.x; mine && i < K * K; i += blockDim.x)
      if (mine[i]) atomicAdd(&out[i], Count(mine[i]));
  }
  // The cell of a pixel; -1 where it does not count; -2 where it holds what is no class.
  __device__ int cell(int64_t truth, int64_t guess, int64_t ignore) const {
    if (truth == ignore) return -1;
    return truth < 0 || truth >= K || guess < 0 || guess >= K ? -2 : int(truth * K + guess);
  }
  // 2^44 from the first cell, once however often: counts do not reach these bits.
  __device__ void complain() const { atomicOr(out, Count(0) - (Count(1) << 44)); }
};

__global__ void __launch_bounds__(256) count_ids(Labels guess, Labels truth, int64_t pixels, int64_t ignore, Counts counts) {
  if (counts.fits) counts.mine = shared_memory<unsigned>();
  counts.clear();
  __syncthreads();
  for (int64_t start = int64_t(blockIdx.x) * blockDim.x; start < pixels; start += int64_t(gridDim.x) * blockDim.x) {
    const int64_t i = start + threadIdx.x;
    const int cell = i < pixels ? counts.cell(truth.at(i), guess.at(i), ignore) : -1;
    if (cell == -2) counts.complain();
    const int first = __shfl_sync(ALL, cell, 0);
    if (__ballot_sync(ALL, cell == first) == ALL) {  // labels come in runs: one addition for a warp
      if (threadIdx.x % 32 == 0 && cell >= 0) counts.add(cell, 32);
    } else if (cell >= 0) {
      counts.add(cell, 1);
    }
  }
  __syncthreads();
  counts.hand_over();
}

struct Problem {
  Points logits;
  Walk walk;
  uint8_t* ids;  // (N,H,W): the argmax is written there; or null: it is counted
  Labels truth;
  int64_t ignore;
  Counts counts;
};

__global__ void __launch_bounds__(128) argmax_of(Problem problem, int) {
  const Tile tile(problem.logits, problem.walk.y.step, CORNERS, 0);
  Counts& counts = problem.counts;
  uint8_t* const ids = problem.ids;
  if (counts.fits) counts.mine = reinterpret_cast<unsigned*>(tile.powers);  // behind the corners
  if (!ids) counts.clear();
  __syncthreads();
  problem.walk(tile, [&](Column& column, int x, int y, int rows) {
    int arg[ROWS], before = -1;
    unsigned run = 0;
    column.argmax(arg);
    for (int r = 0; r < ROWS; r++) {
      const int64_t pixel = (tile.n * problem.walk.y.m + y + r) * problem.walk.x.m + x;
      if (r < rows && ids) ids[pixel] = arg[r];
      if (r >= rows || ids) continue;
      const int cell = counts.cell(problem.truth.at(pixel), arg[r], problem.ignore);
      if (cell == -2) counts.complain();
      if (cell != before && before >= 0) counts.add(before, run);
      run = cell == before ? run + 1 : 1, before = cell;
    }
    if (before >= 0) counts.add(before, run);
  });
  __syncthreads();
  if (!ids) counts.hand_over();
}

Counts counts_in(Tensor& out) {
  const int64_t K = out.size(0);
  return {Counts::bytes(K) > 0, nullptr, reinterpret_cast<Count*>(out.mutable_data_ptr<int64_t>()), int(K)};
}

// Adds to out (K,K), contiguous. Ids and target are contiguous.
void confusion_matrix(Tensor prediction, Tensor target, int64_t K, int64_t ignore, Tensor out) {
  const int64_t pixels = target.numel();
  const Launcher launch(target);
  launch(count_ids, dim3(std::clamp<int64_t>(pixels / 4096, 1, 1056)), 256, Counts::bytes(K), Labels(prediction), Labels(target),
         pixels, ignore, counts_in(out));
}

void of_logits(const Tensor& logits, int64_t height, int64_t width, uint8_t* ids, const Labels& truth, int64_t ignore, Counts counts) {
  const Launcher launch(logits);
  const Walk walk{Axis(logits.size(2), height), Axis(logits.size(3), width)};
  counts.fits &= Tile::bytes(logits.size(1), 16, CORNERS) + Counts::bytes(counts.K) <= SHARED;
  const Grid grid(launch, logits, walk, CORNERS, counts.fits ? Counts::bytes(counts.K) : 0);
  grid(launch, argmax_of, {Points(logits), walk, ids, truth, ignore, counts});
}

void confusion_of_logits(Tensor logits, Tensor target, int64_t ignore, Tensor out) {
  of_logits(logits, target.size(1), target.size(2), nullptr, Labels(target), ignore, counts_in(out));
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  of_logits(logits, height, width, out.mutable_data_ptr<uint8_t>(), Labels(out), -1, Counts{false, nullptr, nullptr, 1});
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
  m.impl("confusion_of_logits", TORCH_BOX(&confusion_of_logits));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}
