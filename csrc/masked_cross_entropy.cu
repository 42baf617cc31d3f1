// Cross entropy of bilinearly upsampled logits over the pixels that count, and its gradient at the low resolution;
// and the map that says in a byte a pixel which of them count, and with which label.
//
// label_map: target (N,H,W), confidence (N,1,a,b), mask (N,H,W) -> labels (N,H,W), 255 where a pixel does not count,
// and three counts. A warp takes whole rows of pixels. The counts are integers: the order of their sums does not
// matter.
//
// cross_entropy: logits (N,K,h,w) float32, float16 or bfloat16, any strides, and that map -> the sum of the pixels'
// cross entropies, and its gradient (N,K,h,w) in float32. Never stored: anything of size N x K x H x W. A block,
// one warp, has 8 cells side by side and 4 threads for each; a thread has 2 x 8 pixels at once, and goes over the
// classes twice, for the softmax's denominators and for the gradient. All sums have a fixed order: the same bits from
// run to run.
#include "cells.cuh"

namespace {
struct Map {
  Ids target;               // (N,H,W)
  const float* confidence;  // (N,1,a,b) or null
  const bool* valid;        // (N,H,W) or null
  Axis y, x;                // of the confidence
  float cutoff;             // a pixel counts where the confidence is above this
  unsigned rows;            // N * H
  int K;
  int64_t ignore;
  uint8_t* labels;  // (N,H,W)
  Count* counts;    // kept, everything, bad
};

__global__ void __launch_bounds__(256) map_labels(Map map) {
  const Axis &ay = map.y, &ax = map.x;
  const bool resizes = ay.n != ay.m || ax.n != ax.m;
  unsigned* const sums = shared_memory<unsigned>();
  unsigned own[3] = {};
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  __syncthreads();
  const unsigned warps = gridDim.x * (blockDim.x / 32);
  for (unsigned row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < map.rows; row += warps) {
    const int y = row % ay.m, i = ay.cell(y);
    const int64_t top = (int64_t(row / ay.m) * ay.n + i) * ax.n, bottom = top + int64_t(ay.next) * ax.n;
    for (int x = threadIdx.x % 32; x < ax.m; x += 32) {
      const int64_t pixel = int64_t(row) * ax.m + x, label = map.target.at(pixel);
      const bool known = label != map.ignore, bad = known && (label < 0 || label >= map.K);
      const bool counts = known && (!map.valid || map.valid[pixel]);
      bool kept = counts;
      if (counts && map.confidence) {
        const int j = ax.cell(x), k = j + ax.next;
        const float* const p = map.confidence;
        const float4 c = make_float4(p[top + j], p[top + k], p[bottom + j], p[bottom + k]);
        kept = (resizes ? bilinear(c, ax.frac(x), ay.frac(y)) : c.x) > map.cutoff;  // 0 * infinity would be NaN
      }
      map.labels[pixel] = kept && !bad ? label : 255;
      own[0] += kept, own[1] += counts, own[2] += bad;
    }
  }
  for (int i = 0; i < 3; i++) atomicAdd(&sums[i], own[i]);
  __syncthreads();
  if (threadIdx.x < 3) atomicAdd(&map.counts[threadIdx.x], Count(sums[threadIdx.x]));
}

std::tuple<Tensor, Tensor> label_map(Tensor target, std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                     Tensor threshold, int64_t K, int64_t ignore) {
  const Launcher launch(target);
  const int64_t height = target.size(1), width = target.size(2), rows = target.size(0) * height;
  Tensor labels = torch::stable::new_empty(target, target.sizes(), ScalarType::Byte);
  Tensor counts = torch::stable::new_zeros(target, {3}, ScalarType::Long);
  const Map map{Ids(target), confidence ? confidence->const_data_ptr<float>() : nullptr,
                valid ? valid->const_data_ptr<bool>() : nullptr, Axis(confidence ? confidence->size(2) : 1, height),
                Axis(confidence ? confidence->size(3) : 1, width), logit(threshold), unsigned(rows), int(K), ignore,
                labels.mutable_data_ptr<uint8_t>(), reinterpret_cast<Count*>(counts.mutable_data_ptr<int64_t>())};
  launch(map_labels, std::clamp<int64_t>(rows / 8, 1, 1056), 256, 3 * sizeof(unsigned), map);
  return {labels, counts};
}

template <bool WITH_GRAD>
__global__ void __launch_bounds__(32, 16) cells_cross_entropy(Cells all, const uint8_t* labels, float4* sums,
                                                              float* losses) {
  Tile tile(all);
  tile.prepare(all);
  float loss = 0;
  auto visit = [&](auto patch) {
    using Pixels = decltype(patch);
    constexpr int PIXELS = Pixels::PIXELS, ROWS = Pixels::ROWS;
    int label[PIXELS], lowest = 255, highest = 0;
    float one[PIXELS], e[PIXELS], product = 1;
    for (int i = 0; i < PIXELS; i++) {
      label[i] = patch.has(i) ? labels[patch.pixel(i)] : 255;
      if (label[i] < 255) lowest = min(lowest, label[i]), highest = max(highest, label[i]);
    }
    if (!__any_sync(ALL, lowest < 255)) return;
    patch.denominators(one);
    for (int i = 0; i < PIXELS; i++) {
      const bool here = label[i] < 255;
      if (here) loss -= patch.below(label[i], i), product *= one[i];
      one[i] = here ? reciprocal(one[i]) : 0;
      if (i % 2 || PIXELS == 1) loss += logf(product), product = 1;  // at least e^-40 each: two share a logarithm
    }
    for (int k = 0; k < tile.K && WITH_GRAD; k++) {
      patch.exps(k, e);
      float sum[4] = {};  // of the gradient: plain, times fx, times fy, times both
      auto add_up = [&](auto gradient) {
        for (int c = 0; c < Pixels::COLUMNS; c++) {
          float plain = 0, rows = 0;  // rows: times the row; what is in row r is added r times
          for (int r = ROWS - 1; r >= 0; r--) {
            plain += gradient(c * ROWS + r);
            if (r) rows += plain;
          }
          const float down = patch.fy * plain + all.y.step * rows;
          sum[0] += plain, sum[1] += patch.fx[c] * plain, sum[2] += down, sum[3] += patch.fx[c] * down;
        }
      };
      auto share = [&](int i) { return PIXELS > 1 || label[i] < 255 ? one[i] * e[i] : 0; };  // e may be NaN
      if (k < lowest || k > highest) add_up(share);
      else add_up([&](int i) { return share(i) - (label[i] == k); });
      reinterpret_cast<float*>(&tile.sums[tile.at(k)])[threadIdx.x % THREADS] += sum_lanes<THREADS, THREADS>(sum);
    }
  };
  if (tile.smooth) each_patch<2, 8>(all, tile, visit);
  else each_patch<1, 1>(all, tile, visit);
  loss = sum_lanes<1, 32>(&loss);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
  if (WITH_GRAD) tile.store(sums, all);
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, bool with_grad) {
  const Launcher launch(logits);
  const Cells all(logits, labels.size(1), labels.size(2));
  const Results results(logits, all, with_grad, all.blocks());
  launch(with_grad ? cells_cross_entropy<true> : cells_cross_entropy<false>, all.blocks(), 32, all.shared, all,
         labels.const_data_ptr<uint8_t>(), results.cells(), results.losses.mutable_data_ptr<float>());
  results.finish(launch, all);
  return {results.total, results.grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("label_map", TORCH_BOX(&label_map));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}
