// Masked cross entropy of bilinearly upsampled logits, with its gradient at the low resolution.
//
//   loss = sum over selected pixels of weight_label * (log(sum over j of exp(z_j)) - z_label)
//   gradient of z_k at a selected pixel = weight_label * (exp(z_k) / (sum over j of exp(z_j)) - (k == label))
//
// z are the logits at the pixel, and weight_k, which is optional, is that of class k. The gradient of a low-resolution
// logit is the sum over pixels of the gradient times the interpolation's coefficient.
//
// Shapes. label_map: target (N,H,W) uint8 or int64, confidence (N,1,a,b), valid (N,H,W) -> labels (N,H,W) uint8, NONE
// if a pixel is not selected, and three counts. cross_entropy: logits (N,K,h,w) float32 or bfloat16 with any strides,
// those labels and weights (K,) float32 or none -> the loss, its gradient (N,K,h,w) in float32, and the sum of the
// weights of the labels.
// Division of work. label_map: threads share the rows of pixels. cross_entropy: threads share the rows of cells; a
// vector holds one pixel of each of LANES cells, a block PIXELS neighbouring pixels of each.
// Never stored: anything of size (N,K,H,W).
// Exponentials. Two serve a block: e = exp(A + fx * B - shift) of its first pixel, see cells.h, with the cell's largest
// corner as shift, and m = exp(step * B) - 1. Then e += e * m from pixel to pixel, at half an ulp if m is small.
// If a cell of a vector is not smooth (is_smooth), its pixels are computed one by one by ATen's formula.
// Order of sums. Losses and weights are summed in float32 over a block and in float64 over blocks, then rows of cells.
// A class's gradient is summed over a block, then over the blocks of a cell, then at its point over up to four cells.
// The bits do not depend on the number of threads.
//
// The naive kernel, with Neighbours of cells.h:
//
// ```cpp
// // Returns the loss of logits (K,h,w), labels (H,W) and weight (K); adds its gradient to grad (K,h,w).
// double cross_entropy(const float* logits, const uint8_t* labels, const float* weight, float* grad, int K, int h,
//                      int w, int H, int W) {
//   double loss = 0;
//   for (int pixel = 0; pixel < H * W; pixel++) {
//     if (labels[pixel] == 255) continue;
//     const Neighbours at(h, w, H, W, pixel / W, pixel % W);
//     const float factor = weight[labels[pixel]];
//     double sum = 0;
//     for (int k = 0; k < K; k++) sum += std::exp(at.logit(logits + k * h * w));
//     loss += factor * (std::log(sum) - at.logit(logits + labels[pixel] * h * w));
//     for (int k = 0; k < K; k++)
//       for (int i = 0; i < 4; i++)
//         grad[k * h * w + at.point[i]] +=
//             at.weight[i] * factor * (std::exp(at.logit(logits + k * h * w)) / sum - (k == labels[pixel]));
//   }
//   return loss;
// }
// ```
#include <memory>
#include <mutex>
#include <numeric>

#include "cells.h"

namespace {
// Sets labels to NONE if `keep` is false, and returns how many labels are not NONE.
int64_t mask_labels(const bool* __restrict keep, int64_t n, uint8_t* __restrict labels) {
  int32_t count = 0;
  for (int64_t i = 0; i < n; i++) {
    labels[i] |= uint8_t(keep[i]) - 1;  // NONE has all bits set
    count += labels[i] != NONE;
  }
  return count;
}

// Confidences (N,1,a,b), which are upsampled and compared with `cutoff`.
struct Confidence {
  const float* data;
  const float cutoff;
  AxisTable y, x;

  Confidence(const Tensor& t, const Tensor& threshold, int64_t height, int64_t width)
      : data(t.const_data_ptr<float>()), cutoff(logit(threshold)), y(t.size(2), height), x(t.size(3), width) {}

  // Writes whether the pixels of row `row` of image n are above the cutoff. `line` has room for x.points + 1 + outputs.
  void compare_row(int64_t n, int row, float* __restrict line, bool* __restrict above) const {
    const int cell = y.cell[row], below = std::min(cell + y.next, y.points - 1);
    const float *p = data + (n * y.points + cell) * x.points, *q = data + (n * y.points + below) * x.points;
    const float *fx = x.fraction.data(), fy = y.fraction[row];
    float* __restrict pixels = line + x.points + 1;
    for (int i = 0; i < x.points; i++) line[i] = (1 - fy) * p[i] + fy * q[i];
    line[x.points] = line[x.points - 1];
    for (int i = 0; i < x.points; i++)
      for (int o = x.first[i]; o < x.first[i + 1]; o++) pixels[o] = (1 - fx[o]) * line[i] + fx[o] * line[i + x.next];
    // at the same size they are not interpolated, because 0 times infinity is NaN
    const float* const compared = y.points == y.outputs && x.points == x.outputs ? p : pixels;
    for (int o = 0; o < x.outputs; o++) above[o] = compared[o] > cutoff;
  }
};

// Returns (labels, counts), see autograd.py. Throws std::invalid_argument if a label is no class.
std::tuple<Tensor, Tensor> label_map(Tensor target, std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                     Tensor threshold, int64_t K, int64_t ignore) {
  const int64_t height = target.size(1), width = target.size(2);
  Tensor labels = torch::stable::new_empty(target, target.sizes(), ScalarType::Byte);
  Tensor counts = torch::stable::new_empty(target, {3}, ScalarType::Long);
  std::optional<Confidence> upsampled;
  if (confidence) upsampled.emplace(*confidence, threshold, height, width);
  uint8_t* const out = labels.mutable_data_ptr<uint8_t>();
  int64_t* const total = counts.mutable_data_ptr<int64_t>();
  std::fill_n(total, 3, 0);  // new_zeros would take microseconds
  const ClassIds ids(target);
  std::mutex lock;
  torch::stable::parallel_for(0, target.size(0) * height, 64, [&](int64_t begin, int64_t end) {
    const auto keep = std::make_unique<bool[]>(width);
    std::vector<float> line(upsampled ? upsampled->x.points + 1 + width : 0);
    int64_t selected = 0, not_ignored = 0, wrong = 0;
    for (int64_t row = begin, at = begin * width; row < end; row++, at += width) {
      std::fill(keep.get(), keep.get() + width, true);
      wrong += read_ids(ids, at, width, K, ignore, out + at);
      not_ignored += mask_labels(valid ? valid->const_data_ptr<bool>() + at : keep.get(), width, out + at);
      if (upsampled) upsampled->compare_row(row / height, row % height, line.data(), keep.get());
      selected += mask_labels(keep.get(), width, out + at);
    }
    std::lock_guard<std::mutex> guard(lock);
    total[0] += selected, total[1] += not_ignored, total[2] += wrong;
  });
  for (int64_t i = 0; total[2] && i < target.numel(); i++)
    if (ids[i] != ignore) check_class("target", ids[i], K);
  return {labels, counts};
}

// The state of one thread. A call computes the loss and the gradient of a row of cells.
template <bool WEIGHTED>
struct CrossEntropyTask {
  const Upsampling& up;
  const uint8_t* labels;  // (N,H,W)
  double* sums;           // (N*h,2) losses, and weights of labels if WEIGHTED
  const float* weight;    // (NONE+1) if WEIGHTED
  const bool with_grad;
  CellIterator cells;
  Gradient gradient;
  std::vector<Floats> e;                    // (K*PIXELS)
  std::vector<float> label_sum, label_sum_x;  // (256,LANES), 0 between blocks except row NONE, never read

  CrossEntropyTask(const Upsampling& up, const uint8_t* labels, double* sums, const float* weight, float* grad)
      : up(up), labels(labels), sums(sums), weight(weight), with_grad(grad), cells(up), gradient(grad, up),
        e(cells.K * PIXELS), label_sum((NONE + 1) * LANES), label_sum_x(label_sum) {}

  void operator()(int64_t n, int64_t row) {
    double loss[LANES] = {}, weights[LANES] = {};
    cells.for_each_block(n, row, [&](auto P, const PixelBlock& block) {
      compute_block<P>(block, labels + (n * up.y.outputs + block.row) * up.x.outputs, loss, weights);
    }, [&] { if (with_grad) gradient.finish_cells(cells.x); });
    double* const sums_of_row = sums + 2 * (n * up.y.points + row);
    sums_of_row[0] = std::accumulate(loss, loss + LANES, 0.);
    sums_of_row[1] = std::accumulate(weights, weights + LANES, 0.);
    if (with_grad) gradient.finish_row(n, row);
  }

  // Adds the loss of a block's pixels, their weights if WEIGHTED, and the gradient to the sums. `row`: labels of the
  // block's row.
  template <int P>
  void compute_block(const PixelBlock& block, const uint8_t* row, double* loss_sums, double* weight_sums) {
    Ints selected[P];
    Floats weights[P];  // of the pixels' labels, if WEIGHTED
    if (!read_labels<P>(block, row, selected, weights)) return;
    Floats denominator[P], inv_denominator[P], inv_denominator_x[P], loss{};
    exponentials<P>(cells, block, e.data(), denominator);
    for (int k = 0; k < cells.K && P == 1; k++) e[k] = selected[0] ? e[k] : Floats{};  // it may be NaN
    for (int p = 0; p < P; p++) {
      inv_denominator[p] = selected[p] ? (WEIGHTED ? weights[p] : splat(1)) / denominator[p] : Floats{};
      inv_denominator_x[p] = inv_denominator[p] * load(block.fx + p * LANES);
      denominator[p] = selected[p] ? denominator[p] : splat(1);
    }
    for (int p = 0; p < P && WEIGHTED; p++) loss += weights[p] * log2(denominator[p]);
    for (int p = 0; p < P && !WEIGHTED; p += 2)  // one logarithm of two denominators, each at least e^-40
      loss += log2(P > 1 ? denominator[p] * denominator[p + 1] : denominator[p]);
    for (int k = 0; k < cells.K; k++) {
      Floats label = load(&label_sum[k * LANES]), label_x = load(&label_sum_x[k * LANES]);
      const Exponent& exponent = cells.exponents[k];
      Floats logits = label != 0 ? label * exponent.first + label_x * exponent.slope : Floats{};
      if (WEIGHTED) label *= weight[k], label_x *= weight[k], logits *= weight[k];
      loss += logits;
      store(&label_sum[k * LANES], Floats{});
      store(&label_sum_x[k * LANES], Floats{});
      if (!with_grad) continue;
      // two sums of half of the pixels each: short sums keep more digits if the result is close to 0
      Floats sum[2] = {label / 2, label / 2}, sum_x[2] = {label_x / 2, label_x / 2};
      for (int p = 0; p < P; p++) {
        sum[p % 2] += inv_denominator[p] * e[k * P + p];
        sum_x[p % 2] += inv_denominator_x[p] * e[k * P + p];
      }
      gradient.sums[k].add(sum[0] + sum[1], sum_x[0] + sum_x[1], block.fy);
    }
    loss *= LN2;
    for (int l = 0; l < LANES; l++) loss_sums[l] += loss[l];
    for (int p = 1; p < P && WEIGHTED; p++) weights[0] += weights[p];
    for (int l = 0; l < LANES && WEIGHTED; l++) weight_sums[l] += weights[0][l];
  }

  // Reads the labels of a block: sets the bits of selected[p] in lanes whose pixel p is selected, looks up the weights
  // of labels, and subtracts 1 and fx of each of these pixels from the sums of its label. Returns whether any pixel is
  // selected.
  template <int P>
  bool read_labels(const PixelBlock& block, const uint8_t* row, Ints* selected, Floats* weights) {
    float label_weights[P * LANES];
    int32_t masks[P * LANES], any = 0;
    for (int l = 0; l < LANES; l++)
      for (int p = 0; p < P; p++) {
        const int i = p * LANES + l, label = p < block.count(l, P) ? row[block.column(l) + p] : NONE;
        any |= masks[i] = label == NONE ? 0 : -1;
        if (WEIGHTED) label_weights[i] = weight[label];
        label_sum[label * LANES + l] -= 1;
        label_sum_x[label * LANES + l] -= block.fx[i];
      }
    std::memcpy(selected, masks, sizeof masks);
    if (WEIGHTED) std::memcpy(weights, label_weights, sizeof label_weights);
    return any;
  }
};

// Returns (total, grad, sum_of_weights), see autograd.py.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, bool with_grad,
                                                 std::optional<Tensor> weight) {
  logits = to_contiguous_float(logits);
  const Upsampling up(logits, labels.size(1), labels.size(2));
  Tensor total = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor sum_of_weights = weight ? torch::stable::new_empty(logits, {}, ScalarType::Float)
                                 : torch::stable::new_empty(logits, {0}, ScalarType::Float);
  Tensor grad = with_grad ? torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float)
                          : torch::stable::new_empty(logits, {0}, ScalarType::Float);
  float* const to = with_grad ? grad.mutable_data_ptr<float>() : nullptr;
  std::fill_n(grad.mutable_data_ptr<float>(), grad.numel(), 0.f);
  std::vector<double> sums(2 * logits.size(0) * up.y.points);
  std::vector<float> weights(NONE + 1);  // 0 for NONE
  if (weight) std::copy_n(weight->const_data_ptr<float>(), up.K, weights.data());
  const auto run = [&](auto weighted) {
    parallel_rows(logits.size(0), up.y.points, 2, [&] {
      return CrossEntropyTask<weighted>(up, labels.const_data_ptr<uint8_t>(), sums.data(), weights.data(), to);
    });
  };
  weight ? run(std::true_type()) : run(std::false_type());
  double both[2] = {};
  for (size_t i = 0; i < sums.size(); i++) both[i % 2] += sums[i];
  *total.mutable_data_ptr<float>() = both[0];
  if (weight) *sum_of_weights.mutable_data_ptr<float>() = both[1];
  return {total, grad, sum_of_weights};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("label_map", TORCH_BOX(&label_map));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}
