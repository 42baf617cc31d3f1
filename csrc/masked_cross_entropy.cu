// Masked cross entropy of bilinearly upsampled logits, with its gradient at the low resolution, on CUDA.
//
//   loss = sum over selected pixels of weight_label * (log(sum over j of exp(z_j)) - z_label)
//   gradient of z_k at a selected pixel = weight_label * (exp(z_k) / (sum over j of exp(z_j)) - (k == label))
//
// z are the logits at the pixel, and weight_k, which is optional, is that of class k. The gradient of a low-resolution
// logit is the sum over pixels of the gradient times the interpolation's coefficient.
//
// Shapes. label_map: target (N,H,W) uint8 or int64, confidence (N,1,a,b), valid (N,H,W) -> labels (N,H,W) uint8, NONE
// if a pixel is not selected, and three counts. cross_entropy: logits (N,K,h,w) float32, float16 or bfloat16 with any
// strides, those labels and weights (K,) float32 or none -> the loss, its gradient (N,K,h,w) in float32, and the sum of
// the weights of the labels.
// Blocks and threads. label_map: a warp takes a row of pixels at a time. cross_entropy: a block, one warp, has 8 cells
// side by side and 4 threads for each; a thread takes 8 pixels of a column at once and goes over the classes twice, for
// the softmax's denominators and for the gradient. Never stored: anything of size (N,K,H,W).
// Order of sums. A thread sums over classes, then pixels; shuffles sum over the threads of a cell, and for the loss and
// the weights over a warp; gather_cell_gradients adds up to four cells. The order is fixed: the same bits from run to
// run. Counts are integers; their order does not matter.
// A naive kernel is the loop body of that in masked_cross_entropy.cpp, with a thread for each pixel and atomicAdd for
// `loss` and `grad`.
#include "cells.cuh"

namespace {
struct LabelMapParams {
  ClassIds target;          // (N,H,W)
  const float* confidence;  // (N,1,a,b) or null
  const bool* valid;        // (N,H,W) or null
  AxisFormula y, x;         // of the confidence
  float cutoff;             // a pixel is selected if its confidence is above this
  unsigned rows;            // N * H
  int K;
  int64_t ignore;
  uint8_t* labels;  // (N,H,W)
  Count* counts;    // selected, not ignored, wrong
};

__global__ void __launch_bounds__(256, 4) map_labels(LabelMapParams params) {
  const AxisFormula &ay = params.y, &ax = params.x;
  const bool same_size = ay.points == ay.outputs && ax.points == ax.outputs;
  unsigned* const block_counts = shared_memory<unsigned>();
  unsigned counts[3] = {};
  if (threadIdx.x < 3) block_counts[threadIdx.x] = 0;
  __syncthreads();
  const unsigned warps = gridDim.x * (blockDim.x / 32);
  for (unsigned row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < params.rows; row += warps) {
    const int y = row % ay.outputs, i = ay.cell(y);
    const float* const top = params.confidence + (int64_t(row / ay.outputs) * ay.points + i) * ax.points;
    const float* const bottom = top + int64_t(ay.next) * ax.points;
    for (int x = threadIdx.x % 32; x < ax.outputs; x += 32) {
      const int64_t pixel = int64_t(row) * ax.outputs + x, label = params.target[pixel];
      const bool known = label != params.ignore, wrong = known && (label < 0 || label >= params.K);
      const bool not_ignored = known && (!params.valid || params.valid[pixel]);
      bool selected = not_ignored;
      if (selected && params.confidence) {
        const int j = ax.cell(x), k = j + ax.next;
        const float4 corners = make_float4(top[j], top[k], bottom[j], bottom[k]);
        // not interpolated at the same size, because 0 times infinity is NaN
        selected = (same_size ? corners.x : bilinear(corners, ax.fraction(x), ay.fraction(y))) > params.cutoff;
      }
      params.labels[pixel] = selected && !wrong ? label : NONE;
      counts[0] += selected, counts[1] += not_ignored, counts[2] += wrong;
    }
  }
  for (int i = 0; i < 3; i++) atomicAdd(&block_counts[i], counts[i]);
  __syncthreads();
  if (threadIdx.x < 3) atomicAdd(&params.counts[threadIdx.x], Count(block_counts[threadIdx.x]));
}

std::tuple<Tensor, Tensor> label_map(Tensor target, std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                     Tensor threshold, int64_t K, int64_t ignore) {
  const Launcher launch(target);
  const int64_t height = target.size(1), width = target.size(2), rows = target.size(0) * height;
  Tensor labels = torch::stable::new_empty(target, target.sizes(), ScalarType::Byte);
  Tensor counts = torch::stable::new_zeros(target, {3}, ScalarType::Long);
  const LabelMapParams params{
      ClassIds(target), confidence ? confidence->const_data_ptr<float>() : nullptr,
      valid ? valid->const_data_ptr<bool>() : nullptr, AxisFormula(confidence ? confidence->size(2) : 1, height),
      AxisFormula(confidence ? confidence->size(3) : 1, width), logit(threshold), unsigned(rows), int(K), ignore,
      labels.mutable_data_ptr<uint8_t>(), reinterpret_cast<Count*>(counts.mutable_data_ptr<int64_t>())};
  launch(map_labels, std::clamp<int64_t>(rows / 8, 1, 1056), 256, 3 * sizeof(unsigned), params);  // 8 warps a block
  return {labels, counts};
}

template <bool WITH_GRAD, bool WEIGHTED>
__global__ void __launch_bounds__(32, 16) cells_cross_entropy(CellGrid grid, const uint8_t* labels, const float* weight,
                                                              float4* sums, float* losses, float* weight_sums) {
  Tile tile(grid);
  tile.prepare(grid);
  float loss = 0, weight_sum = 0;
  auto visit = [&](auto column) {
    constexpr int ROWS = decltype(column)::ROWS;
    int label[ROWS];
    float inv_denominator[ROWS], e[ROWS], product = 1;
    bool any = false;
    for (int i = 0; i < ROWS; i++) {
      label[i] = i < column.rows ? labels[column.pixel(i)] : NONE;
      any |= label[i] != NONE;
    }
    if (!__any_sync(ALL, any)) return;
    column.denominators(inv_denominator);  // inverted below
    for (int i = 0; i < ROWS; i++) {
      const bool selected = label[i] != NONE;
      const float w = WEIGHTED && selected ? weight[label[i]] : 1;
      if (selected) loss -= w * (LN2 * column.exponent(label[i], i)), product *= inv_denominator[i];
      inv_denominator[i] = selected ? w * fast_reciprocal(inv_denominator[i]) : 0;
      if (WEIGHTED && selected) weight_sum += w;
      // without weights two share a logarithm: each is at least e^-40
      if (i % 2 || ROWS == 1 || WEIGHTED) loss += w * logf(product), product = 1;
    }
    for (int k = 0; k < tile.K && WITH_GRAD; k++) {
      column.exponentials(k, e);
      const float w = WEIGHTED ? weight[k] : 1;
      float sum = 0, row_sum = 0;  // row_sum: of row times gradient, by repeated addition
      for (int i = ROWS - 1; i >= 0; i--) {
        // if cells are not smooth, e of a pixel that is not selected may be NaN
        if (ROWS > 1 || label[i] != NONE) sum += inv_denominator[i] * e[i] - (label[i] == k ? w : 0);
        if (i) row_sum += sum;
      }
      const float down = column.fy * sum + grid.y.step * row_sum;
      float moments[4] = {sum, column.fx * sum, down, column.fx * down};
      reinterpret_cast<float*>(&tile.sums[tile.at(k)])[threadIdx.x % THREADS] += sum_lanes<THREADS, THREADS>(moments);
    }
  };
  if (tile.smooth) for_each_column<8>(grid, tile, visit);
  else for_each_column<1>(grid, tile, visit);
  loss = sum_lanes<1, 32>(&loss);
  if (threadIdx.x == 0) losses[blockIdx.x] = loss;
  if (WEIGHTED) weight_sum = sum_lanes<1, 32>(&weight_sum);
  if (WEIGHTED && threadIdx.x == 0) weight_sums[blockIdx.x] = weight_sum;
  if (WITH_GRAD) tile.write_sums(sums, grid);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, bool with_grad,
                                                 std::optional<Tensor> weight) {
  const Launcher launch(logits);
  logits = to_contiguous_float(logits);
  const CellGrid grid(logits, labels.size(1), labels.size(2));
  Tensor losses = torch::stable::new_empty(logits, {grid.blocks}, ScalarType::Float);
  Tensor weight_sums = torch::stable::new_empty(logits, {weight ? grid.blocks : 0}, ScalarType::Float);
  Tensor empty = torch::stable::new_empty(logits, {0}, ScalarType::Float);
  Tensor sums = with_grad ? new_cell_sums(logits, grid) : empty;
  const auto kernel = weight ? (with_grad ? cells_cross_entropy<true, true> : cells_cross_entropy<false, true>)
                             : (with_grad ? cells_cross_entropy<true, false> : cells_cross_entropy<false, false>);
  launch(kernel, grid.blocks, 32, grid.shared, grid, labels.const_data_ptr<uint8_t>(),
         weight ? weight->const_data_ptr<float>() : nullptr, static_cast<float4*>(sums.data_ptr()),
         losses.mutable_data_ptr<float>(), weight_sums.mutable_data_ptr<float>());
  return {torch::stable::sum(losses), with_grad ? gather(launch, grid, logits, sums) : empty,
          weight ? torch::stable::sum(weight_sums) : weight_sums};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("label_map", TORCH_BOX(&label_map));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}
