// The class of each pixel of bilinearly upsampled logits, and the confusion matrix.
//
//   class = argmax of the logits z at a pixel: the lowest class on a tie, the first NaN if there is one
//   matrix[t][p] = number of pixels with label t and class p, without ignored labels
//
// Shapes. upsample_argmax: logits (N,K,h,w) float32 or bfloat16 with any strides -> (N,H,W) uint8. With confidence (K,)
// it is 255 if the argmax's probability is not above the confidence of its class, with valid (N,H,W) also if that is
// false. confusion_matrix: class ids (N,H,W) uint8 or int64, or logits, whose argmax is taken first; labels (N,H,W)
// uint8 or int64; adds to a matrix (K,K) int64.
// Division of work. upsample_argmax: threads share the rows of cells; a vector holds one pixel of each of LANES cells,
// a block PIXELS neighbouring pixels of each. confusion_matrix: threads share the pixels, each with its own counts.
// Never stored: the upsampled logits.
// Order of sums. Exponentials are summed in the order of the classes; for counts, which are integers, the order does
// not matter.
//
// The naive kernel, with Neighbours of cells.h:
//
// ```cpp
// // Adds the pixels of logits (K,h,w) with labels (H,W) to matrix (K,K).
// void confusion_matrix(const float* logits, const uint8_t* labels, int64_t* matrix, int K, int h, int w, int H,
//                       int W) {
//   for (int pixel = 0; pixel < H * W; pixel++) {
//     if (labels[pixel] == 255) continue;
//     const Neighbours at(h, w, H, W, pixel / W, pixel % W);
//     int best = 0;
//     for (int k = 1; k < K; k++)
//       if (at.logit(logits + k * h * w) > at.logit(logits + best * h * w)) best = k;
//     matrix[labels[pixel] * K + best]++;
//   }
// }
// ```
#include <mutex>

#include "cells.h"

namespace {
// Counts of pairs of label and prediction. Row and column K are for NONE. Consecutive pixels use different tables,
// because incrementing a counter that was just stored has to wait.
struct PairCounts {
  static constexpr int TABLES = 4;
  const int K, size;  // size: of a table
  std::vector<uint32_t> counts;  // (TABLES,K+1,K+1)

  explicit PairCounts(int K) : K(K), size((K + 1) * (K + 1)), counts(TABLES * size) {}

  void add(const uint8_t* labels, const uint8_t* predictions, int n) {
    for (int i = 0; i < n; i++)
      counts[i % TABLES * size + std::min<int>(labels[i], K) * (K + 1) + std::min<int>(predictions[i], K)]++;
  }
  // Adds the counts to matrix (K,K). Returns whether a pixel with a valid label has a prediction outside 0..K-1.
  bool add_to(int64_t* matrix) const {
    bool wrong = false;
    for (int i = 0; i < TABLES * size; i++) {
      const int row = i % size / (K + 1), column = i % (K + 1);
      if (row < K && column < K) matrix[row * K + column] += counts[i];
      else wrong |= row < K && counts[i];
    }
    return wrong;
  }
};

// Writes the argmax of a block's pixels to `out` (N,H,W); `pixel` is the index of the row's first one. `confidence` (K)
// and `valid` (N,H,W) may be null.
template <int P>
void write_argmax(CellIterator& cells, const PixelBlock& block, const float* confidence, const bool* valid,
                  uint8_t* out, int64_t pixel) {
  Floats largest[P], fx[P], sums[P];
  Ints ids[P] = {};
  for (int p = 0; p < P; p++) largest[p] = splat(-INFINITY), fx[p] = load(block.fx + p * LANES);
  for (int k = 0; k < cells.K; k++) {
    const BilinearCoeffs& c = cells.coeffs[k];
    const Floats a = c.a + block.fy * c.down, b = c.right + block.fy * c.both;
    for (int p = 0; p < P; p++) {
      const Floats logit = P > 1 ? a + fx[p] * b : cells.corners(k).interpolate(fx[p], block.fy);
      Ints larger = logit > largest[p];
      if (P == 1) larger |= (logit != logit) & (largest[p] == largest[p]);
      largest[p] = larger ? logit : largest[p];
      ids[p] = larger ? k - Ints{} : ids[p];
    }
  }
  if (confidence) {
    const Floats shift = exponentials<P>(cells, block, nullptr, sums);
    for (int p = 0; p < P; p++) {
      Floats limit;
      for (int l = 0; l < LANES; l++) limit[l] = confidence[ids[p][l]];
      // no rounding of the sum may exceed a limit of 1; NaN is above nothing
      const Ints above = (exp2(LOG2E * (largest[p] - shift)) > limit * sums[p]) & (limit < 1);
      ids[p] |= ~above & NONE;
    }
  }
  int32_t bytes[P][LANES];
  std::memcpy(bytes, ids, sizeof bytes);
  for (int l = 0; l < LANES; l++)
    for (int p = 0; p < block.count(l, P); p++) {
      const int64_t i = pixel + block.column(l) + p;
      out[i] = !valid || valid[i] ? bytes[p][l] : NONE;
    }
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width, std::optional<Tensor> confidence,
                       std::optional<Tensor> valid) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  uint8_t* const ids = out.mutable_data_ptr<uint8_t>();
  logits = to_contiguous_float(logits);
  const Upsampling up(logits, height, width);
  const float* const limits = confidence ? confidence->const_data_ptr<float>() : nullptr;
  const bool* const is_valid = valid ? valid->const_data_ptr<bool>() : nullptr;
  parallel_rows(logits.size(0), up.y.points, 1, [&] {
    return [&, cells = CellIterator(up)](int64_t n, int64_t row) mutable {
      cells.for_each_block(n, row, [&](auto P, const PixelBlock& block) {
        write_argmax<P>(cells, block, limits, is_valid, ids, (n * height + block.row) * width);
      }, [] {});
    };
  });
  return out;
}

// Throws std::invalid_argument if an id is no class.
void confusion_matrix(Tensor prediction, Tensor target, int64_t ignore, Tensor out) {
  if (prediction.dim() == 4) prediction = upsample_argmax(prediction, target.size(1), target.size(2), {}, {});
  const ClassIds predictions(prediction), labels(target);
  const int64_t K = out.size(0), pixels = target.numel();
  std::vector<int64_t> total(K * K);
  std::mutex lock;
  bool wrong = false;
  torch::stable::parallel_for(0, pixels, 1 << 15, [&](int64_t begin, int64_t end) {
    PairCounts counts(K);
    constexpr int CHUNK = 1024;  // ids that are read at once
    uint8_t label_bytes[CHUNK], prediction_bytes[CHUNK];
    bool wrong_label = false;
    for (int64_t i = begin; i < end; i += CHUNK) {
      const int n = std::min<int64_t>(end - i, CHUNK);
      wrong_label |= read_ids(labels, i, n, K, ignore, label_bytes);
      read_ids(predictions, i, n, K, -1, prediction_bytes);
      counts.add(label_bytes, prediction_bytes, n);
    }
    std::lock_guard<std::mutex> guard(lock);
    wrong |= counts.add_to(total.data()) | wrong_label;
  });
  for (int64_t i = 0; wrong && i < pixels; i++) {
    if (labels[i] == ignore) continue;
    check_class("target", labels[i], K);
    check_class("prediction", predictions[i], K);
  }
  int64_t* const matrix = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < K * K; i++) matrix[i] += total[i];
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}
