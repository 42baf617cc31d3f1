// Cross entropy of bilinearly upsampled logits over the pixels that count, and its gradient at the low resolution; and the map
// that says in a byte a pixel which of them count, and with which label.
//
// label_map: target (N,H,W), mask (N,H,W), confidence (N,1,a,b) -> labels (N,H,W), 255 where a pixel does not count, and three
// counts. A warp takes whole rows of pixels. The counts are integers, for which the order of a sum does not matter.
//
// cross_entropy: logits (N,K,h,w) float32, float16 or bfloat16, any strides, and that map -> the sum of the pixels' cross
// entropies, and its gradient (N,K,h,w) in float32. Never stored: anything of size N x K x H x W. A block has 16 cells side by
// side (8 for many classes) and 4 threads for each; a thread has 2 x 8 pixels at once, and goes over the classes twice, for the
// softmax's denominators and for the gradient. One launch: what blocks share is added up by the last one of them. All sums have
// a fixed order: the same bits from run to run.
#include "cells.cuh"

namespace {
struct Map {
  const void* target;       // (N,H,W) uint8 or int64
  bool wide;                // int64
  const float* confidence;  // (N,1,a,b) or null
  const bool* valid;        // (N,H,W) or null
  Axis y, x;                // of the confidence
  bool resizes;             // whether it has another size than the labels
  float least;              // a pixel counts where the confidence is above this
  int64_t rows;             // of all pictures
  int classes;
  int64_t ignore;
  uint8_t* labels;             // (N,H,W)
  unsigned long long* counts;  // kept, everything, bad
};

__global__ void __launch_bounds__(256) map_labels(Map map) {
  const Axis &ay = map.y, &ax = map.x;
  unsigned* const sums = shared_memory<unsigned>();
  unsigned own[3] = {};
  if (threadIdx.x < 3) sums[threadIdx.x] = 0;
  __syncthreads();
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / 32; row < map.rows; row += warps) {
    const int y = row % ay.m, i = ay.cell(y);
    const float* const top = map.confidence + (row / ay.m * ay.n + i) * ax.n;
    const float* const bottom = top + int64_t(ay.next(i) - i) * ax.n;
    for (int x = threadIdx.x % 32; x < ax.m; x += 32) {
      const int64_t pixel = row * ax.m + x;
      const int64_t label = map.wide ? static_cast<const int64_t*>(map.target)[pixel]
                                     : static_cast<const uint8_t*>(map.target)[pixel];
      const bool known = label != map.ignore, bad = known && (label < 0 || label >= map.classes);
      const bool counts = known && (!map.valid || map.valid[pixel]);
      bool kept = counts;
      if (counts && map.confidence) {
        const int j = ax.cell(x), k = ax.next(j);
        const float4 corners = make_float4(top[j], top[k], bottom[j], bottom[k]);
        kept = (map.resizes ? bilinear(corners, ax.frac(x), ay.frac(y)) : corners.x) > map.least;
      }
      map.labels[pixel] = kept && !bad ? label : 255;
      own[0] += kept, own[1] += counts, own[2] += bad;
    }
  }
  for (int i = 0; i < 3; i++) atomicAdd(&sums[i], own[i]);
  __syncthreads();
  if (threadIdx.x < 3) atomicAdd(&map.counts[threadIdx.x], (unsigned long long)sums[threadIdx.x]);
}

std::tuple<Tensor, Tensor> label_map(Tensor target, std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                     double threshold, int64_t classes, int64_t ignore) {
  const Launcher launch(target);
  const int64_t height = target.size(1), width = target.size(2), rows = target.size(0) * height;
  const Axis y(confidence ? confidence->size(2) : 1, height), x(confidence ? confidence->size(3) : 1, width);
  Tensor labels = torch::stable::new_empty(target, target.sizes(), ScalarType::Byte);
  Tensor counts = torch::stable::new_zeros(target, {3}, ScalarType::Long);
  const double p = float(threshold);
  const double least = p > 0 && p < 1 ? std::log(p / (1 - p)) : std::copysign(INFINITY, p - 0.5);
  launch(map_labels, std::clamp<int64_t>(rows / 8, 1, 1056), 256, 3 * sizeof(unsigned),
         Map{target.data_ptr(), target.scalar_type() == ScalarType::Long,
             confidence ? confidence->const_data_ptr<float>() : nullptr, valid ? valid->const_data_ptr<bool>() : nullptr, y, x,
             y.n != y.m || x.n != x.m, float(least), rows, int(classes), ignore, labels.mutable_data_ptr<uint8_t>(),
             reinterpret_cast<unsigned long long*>(counts.mutable_data_ptr<int64_t>())});
  return {labels, counts};
}

struct Problem {
  Cells all;
  const uint8_t* labels;  // (N,H,W)
  float* losses;          // of all warps
  float* total;
  Gradient gradient;
};

template <bool GRADIENT>
__global__ void __launch_bounds__(64, 8) cells_cross_entropy(Problem problem) {
  const Cells& all = problem.all;
  const Tile tile(all);
  float loss = 0;
  each_patch(all, tile, [&](auto patch) {
    using Pixels = decltype(patch);
    constexpr int PIXELS = Pixels::PIXELS, ROWS = Pixels::ROWS;
    int label[PIXELS], lowest = 255, highest = 0;
    float one[PIXELS] = {}, e[PIXELS];  // one: 1 / the softmax's denominator, 0 where a pixel does not count
    unsigned counts = 0;
    for (int i = 0; i < PIXELS; i++) {
      label[i] = patch.has(i) ? problem.labels[patch.pixel(i)] : 255;
      if (label[i] == 255) continue;
      counts |= 1u << i, lowest = min(lowest, label[i]), highest = max(highest, label[i]);
    }
    if (!__any_sync(ALL, counts)) return;
    patch.need(counts);
    for (int k = 0; k < tile.K; k++) {
      patch.exps(k, e);
      for (int i = 0; i < PIXELS; i++) one[i] += e[i];
    }
    float product = 1;  // of denominators, at least e^-40 each, so that two share a logarithm
    for (int i = 0; i < PIXELS; i++) {
      const bool here = label[i] < 255;
      if (here) loss -= patch.below(label[i], i), product *= one[i];
      one[i] = here ? reciprocal(one[i]) : 0;
      if (i % 2 || PIXELS == 1) loss += logf(product), product = 1;
    }
    for (int k = 0; k < tile.K && GRADIENT; k++) {
      patch.exps(k, e);
      float plain = 0, x = 0, y = 0, xy = 0;
      auto add_up = [&](auto gradient) {  // of the class's logit at pixel i
        for (int c = 0; c < Pixels::COLUMNS; c++) {
          float sum = 0, rows = 0;  // rows: times the row; each row is in the sums of all above it
          for (int r = ROWS - 1; r >= 0; r--) {
            sum += gradient(c * ROWS + r);
            if (r) rows += sum;
          }
          const float down = patch.fy * sum + all.y.step * rows;
          plain += sum, x += patch.fx[c] * sum, y += down, xy += patch.fx[c] * down;
        }
      };
      if (k < lowest || k > highest) add_up([&](int i) { return one[i] * e[i]; });
      else add_up([&](int i) { return one[i] * e[i] - (label[i] == k); });
      tile.add(k, plain, x, y, xy);
    }
  });
  loss = sum_lanes<1, 32>(&loss);
  const int warps = blockDim.x / 32;
  if (threadIdx.x % 32 == 0) problem.losses[int64_t(blockIdx.x) * warps + threadIdx.x / 32] = loss;
  __syncthreads();
  if (GRADIENT) problem.gradient.store(tile);
  auto arrive = [&](int i) {
    return i ? problem.gradient.arrive(all, tile, i - 1) : atomicAdd(problem.gradient.arrived, 1u) + 1 == gridDim.x;
  };
  arrive_and_finish(GRADIENT ? 5 : 1, arrive, [&](int i) {
    if (i) return problem.gradient.finish(all, tile, i - 1);
    if (threadIdx.x >= 32) return;
    double sum = 0;
#pragma unroll 16
    for (int64_t j = threadIdx.x; j < int64_t(gridDim.x) * warps; j += 32) sum += problem.losses[j];
    sum = sum_lanes<1, 32>(&sum);
    if (threadIdx.x == 0) *problem.total = sum;
  });
}

std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, bool with_grad) {
  const Launcher launch(logits);
  const Cells all(logits, labels.size(1), labels.size(2), with_grad ? POWERS | BENDS | SUMS : POWERS | BENDS);
  const int threads = all.own * THREADS;
  Tensor total = torch::stable::new_empty(logits, {}, ScalarType::Float);
  const Tensor losses = GradientMemory::floats(logits, all.blocks() * threads / 32);
  const GradientMemory memory(logits, all, with_grad);
  const Problem problem{all, labels.const_data_ptr<uint8_t>(), losses.mutable_data_ptr<float>(),
                        total.mutable_data_ptr<float>(), memory.gradient()};
  launch(with_grad ? cells_cross_entropy<true> : cells_cross_entropy<false>, all.blocks(), threads, all.shared, problem);
  return {total, memory.grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("label_map", TORCH_BOX(&label_map));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}
