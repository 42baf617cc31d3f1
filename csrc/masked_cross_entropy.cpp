// Which pixels count, and the cross entropy of bilinearly upsampled logits over these, with its gradient.
//
// label_map: labels (N,H,W) uint8 or int64, a mask of padding and confidences (N,1,a,b) to a byte a pixel, its class or
// NONE where it does not count; and how many count.
// cross_entropy: logits (N,K,h,w) float32 or bfloat16, any strides, and those bytes to the sum of the losses and the
// gradient of that sum (N,K,h,w) in float32. Never stored: anything of size N x K x H x W.
//
// Along a row of pixels in a cell a class's logit is A + fx * B, so two exponentials serve PIXELS pixels: e = 2^A and
// m = 2^(step*B) - 1, then e += e*m from pixel to pixel, which costs half an ulp each time. A and B are linear from row
// to row, so e and m are brought to the next row in the same way. The shift that keeps exponentials in range is the
// cell's largest corner; where a logit falls too far within a cell, or a corner is not finite, `exact` computes pixel
// by pixel as ATen does.
//
// The gradient needs two sums a class and row of a cell, of p and of fx*p, and these go to the four corners. Losses are
// summed in float over a row of a cell, in double and in order over those: the same bits for any number of threads.
#include <cmath>
#include <mutex>
#include <numeric>

#include "cells.h"

namespace {
constexpr uint8_t NONE = 255;

// The bytes of labels, unsigned integers; NONE, all bits set, for `ignore` and for what is no class, which is an error.
template <class T>
bool read(const T* __restrict labels, int64_t n, int64_t K, int64_t ignore, uint8_t* __restrict to) {
  const T end = K, none = ignore, all_count = int64_t(none) == ignore ? 0 : ~T(0);
  T bad = 0;
  for (int64_t i = 0; i < n; i++) {
    const T outside = labels[i] < end ? 0 : ~T(0), counts = (labels[i] == none ? 0 : ~T(0)) | all_count;
    bad |= outside & counts;
    to[i] = labels[i] | outside | T(~counts);
  }
  return bad;
}

// NONE where not valid.
void mask(const bool* __restrict valid, int64_t n, uint8_t* __restrict to) {
  for (int64_t i = 0; i < n; i++) to[i] |= uint8_t(valid[i]) - 1;
}

int64_t count(const uint8_t* labels, int64_t n) {
  int32_t counted = 0;
  for (int32_t i = 0; i < int32_t(n); i++) counted += labels[i] != NONE;
  return counted;
}

// Confidences (N,1,a,b) and what they must be above, once upsampled.
struct Confidence {
  const float* data;
  const float cutoff;
  Axis y, x;

  Confidence(const Tensor& t, const Tensor& threshold, int64_t height, int64_t width)
      : data(t.const_data_ptr<float>()), cutoff(logit(threshold)), y(t.size(2), height), x(t.size(3), width) {}
  // Where not above it, a pixel of row `row` of picture n is NONE. `line`: x.n + 1 + x.m.
  void mask(int64_t n, int row, uint8_t* __restrict to, float* __restrict line) const {
    const int cell = std::upper_bound(y.first.begin(), y.first.end() - 1, row) - y.first.begin() - 1;
    const float *p = data + (n * y.n + cell) * x.n, *q = cell + 1 < y.n ? p + y.next * x.n : p;
    const float *fx = x.frac.data(), fy = y.frac[row];
    float* __restrict here = line + x.n + 1;
    for (int i = 0; i < x.n; i++) line[i] = (1 - fy) * p[i] + fy * q[i];
    line[x.n] = line[x.n - 1];
    for (int i = 0; i < x.n; i++)
      for (int o = x.first[i]; o < x.first[i + 1]; o++) here[o] = (1 - fx[o]) * line[i] + fx[o] * line[i + x.next];
    // nothing is interpolated where the size is its own: 0 times infinity would be NaN
    const float* const compared = y.next || x.next ? here : p;
    for (int o = 0; o < x.m; o++) to[o] = compared[o] > cutoff ? to[o] : NONE;
  }
};

// (labels, counts): see autograd.py. Throws std::invalid_argument on a label that is no class.
std::tuple<Tensor, Tensor> label_map(Tensor target, std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                     Tensor threshold, int64_t K, int64_t ignore) {
  const int64_t height = target.size(1), width = target.size(2);
  Tensor labels = torch::stable::new_empty(target, target.sizes(), ScalarType::Byte);
  Tensor counts = torch::stable::new_zeros(target, {3}, ScalarType::Long);
  std::optional<Confidence> sure;
  if (confidence) sure.emplace(*confidence, threshold, height, width);
  uint8_t* out = labels.mutable_data_ptr<uint8_t>();
  int64_t* total = counts.mutable_data_ptr<int64_t>();
  const void* given = target.data_ptr();
  const bool wide = target.scalar_type() == ScalarType::Long;
  std::mutex lock;
  torch::stable::parallel_for(0, target.size(0) * height, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> line(sure ? sure->x.n + 1 + width : 0);
    int64_t kept = 0, everything = 0, bad = 0;
    for (int64_t row = begin, at = begin * width; row < end; row++, at += width) {
      uint8_t* to = out + at;
      bad |= wide ? read(static_cast<const uint64_t*>(given) + at, width, K, ignore, to)
                  : read(static_cast<const uint8_t*>(given) + at, width, K, ignore, to);
      if (valid) mask(valid->const_data_ptr<bool>() + at, width, to);
      const int64_t all = count(to, width);
      if (sure) sure->mask(row / height, row % height, to, line.data());
      everything += all, kept += sure ? count(to, width) : all;
    }
    std::lock_guard<std::mutex> guard(lock);
    total[0] += kept, total[1] += everything, total[2] |= bad;
  });
  for (int64_t i = 0; total[2] && i < target.numel(); i++) {
    const int64_t label = wide ? static_cast<const int64_t*>(given)[i] : static_cast<const uint8_t*>(given)[i];
    if (label != ignore && (label < 0 || label >= K))
      throw std::invalid_argument("target holds " + std::to_string(label) + ", outside 0.." + std::to_string(K - 1) +
                                  " and not ignored");
  }
  return {labels, counts};
}

// What one thread works with.
struct Job {
  const Upsampling& up;
  const uint8_t* labels;  // (N,H,W)
  double* losses;         // (N*h)
  const bool with_grad;
  Walk walk;
  Gradient gradient;
  std::vector<V> e;
  std::vector<float> label_one, label_x;  // (256,LANES), 0 between blocks, but for NONE

  Job(const Upsampling& up, const uint8_t* labels, double* losses, float* grad)
      : up(up), labels(labels), losses(losses), with_grad(grad), walk(up), gradient(grad, up), e(walk.K * PIXELS),
        label_one((NONE + 1) * LANES), label_x(label_one) {}

  // Row `cell` of cells of picture n.
  void operator()(int64_t n, int64_t cell) {
    if (!up.y.count(cell)) return;
    double loss[LANES] = {};
    walk(n, cell,
         [&](auto P, const Block& block) {
           const V lost = pixels<P>(block, labels + (n * up.y.m + block.row) * up.x.m);
           for (int l = 0; l < LANES; l++) loss[l] += lost[l];
         },
         [&](int x) { if (with_grad) gradient.to_corners(x); });
    losses[n * up.y.n + cell] = std::accumulate(loss, loss + LANES, 0.);
    if (with_grad) gradient.add(n, cell);
  }

  // P pixels in LANES cells of a row with these labels: -> loss, and its gradient to the sums.
  template <int P>
  V pixels(const Block& block, const uint8_t* row) {
    I code[P], lowest = NONE - I{}, highest{};
    read_lanes<P>(block, row, code);
    for (int p = 0; p < P; p++) {
      lowest = code[p] < lowest ? code[p] : lowest;
      highest = (code[p] != NONE) & (code[p] > highest) ? code[p] : highest;
    }
    if (all(lowest == NONE)) return V{};
    const I mixed = highest > lowest;
    return P == 1 || all(mixed == 0) ? pixels<P, true>(block, code, lowest)
                                     : pixels<P, false>(block, code, mixed ? -1 - I{} : lowest);
  }

  // The same where each cell has one label, ALIKE, or where some have several.
  template <int P, bool ALIKE>
  V pixels(const Block& block, const I* code, I label) {
    V denominator[P], one[P], x[P], loss{}, count[2] = {}, width[2] = {};  // of every other pixel, see below
    V exponent{}, growth{};  // of the label
    const V shift = exponentials<P>(walk, block, e.data(), denominator, [&](int k, V first, V slope) {
      if (ALIKE) exponent = label == k ? first : exponent, growth = label == k ? slope : growth;
    });
    for (int k = 0; k < walk.K && !walk.smooth; k++) e[k] = code[0] != NONE ? e[k] : V{};  // a NaN that does not count
    for (int p = 0; p < P; p++) {
      const V fx = load(block.fx + p * LANES);
      const I counts = code[p] != NONE;
      one[p] = counts ? reciprocal(denominator[p]) : V{};
      x[p] = one[p] * fx;
      denominator[p] = counts ? denominator[p] : splat(1);
      count[p % 2] += counts ? splat(1) : V{};
      width[p % 2] += counts ? fx : V{};
    }
    for (int p = 0; p < P; p += 2)  // one logarithm for two: a sum is at least e^-40
      loss += log2(P > 1 ? denominator[p] * denominator[(p + 1) % P] : denominator[p]);
    if (ALIKE) loss -= (count[0] + count[1]) * exponent + (width[0] + width[1]) * growth;
    else count_labels<P>(code, block.fx, label, count[0] + count[1], width[0] + width[1]);
    for (int k = 0; k < walk.K && (with_grad || !ALIKE); k++) {
      V a[2] = {}, b[2] = {};  // of every other pixel: 1 - p, where p is close to 1, keeps more digits in a short sum
      if constexpr (ALIKE) {
        for (int i = 0; i < 2; i++) a[i] = label == k ? -count[i] : V{}, b[i] = label == k ? -width[i] : V{};
      } else {
        const Cell& c = walk.cells[k];
        float *own = &label_one[k * LANES], *own_x = &label_x[k * LANES];
        a[0] = load(own), b[0] = load(own_x);
        loss += LOG2E * (a[0] * (c.a + block.fy * c.down - shift) + b[0] * (c.right + block.fy * c.both));
        store(own, V{}), store(own_x, V{});
      }
      if (!with_grad) continue;
      for (int p = 0; p < P; p++) a[p % 2] += one[p] * e[k * P + p], b[p % 2] += x[p] * e[k * P + p];
      gradient.sums[k].add(a[0] + a[1], b[0] + b[1], block.fy);
    }
    return LN2 * loss;
  }

  // Takes each pixel's 1 and fx from those of its label, all at once where a cell is `alike`; those of NONE nobody
  // reads.
  template <int P>
  void count_labels(const I* code, const float* fx, I alike, V count, V width) {
    int32_t codes[P * LANES];
    std::memcpy(codes, code, sizeof codes);
    for (int l = 0; l < LANES; l++) {
      float *one = &label_one[l], *x = &label_x[l];
      if (alike[l] >= 0) one[alike[l] * LANES] -= count[l], x[alike[l] * LANES] -= width[l];
      else
        for (int i = l; i < P * LANES; i += LANES) one[codes[i] * LANES] -= 1, x[codes[i] * LANES] -= fx[i];
    }
  }

  // The labels of a block's pixels, NONE where a cell has no more.
  template <int P>
  static void read_lanes(const Block& block, const uint8_t* row, I* code) {
    int32_t words[2][LANES];  // of four labels each
    for (int l = 0; l < LANES; l++) {
      uint8_t bytes[PIXELS];
      std::memset(bytes, NONE, sizeof bytes);
      const int n = block.count(l, P);
      if (n == PIXELS) std::memcpy(bytes, row + block.column(l), PIXELS);
      else for (int i = 0; i < n; i++) bytes[i] = row[block.column(l) + i];
      std::memcpy(&words[0][l], bytes, 4), std::memcpy(&words[1][l], bytes + 4, 4);
    }
    I halves[2];
    std::memcpy(halves, words, sizeof halves);
    for (int p = 0; p < P; p++) code[p] = halves[p / 4] >> (p % 4 * 8) & 255;
  }
};

// (total, grad): see autograd.py.
std::tuple<Tensor, Tensor> cross_entropy(Tensor logits, Tensor labels, bool with_grad) {
  const Upsampling up(logits, labels.size(1), labels.size(2));
  Tensor total = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor grad = with_grad ? torch::stable::new_zeros(logits, logits.sizes(), ScalarType::Float)
                          : torch::stable::new_empty(logits, {0}, ScalarType::Float);
  float* g = with_grad ? grad.mutable_data_ptr<float>() : nullptr;
  std::vector<double> losses(logits.size(0) * up.y.n);
  each_row(logits.size(0), up.y.n, 2, [&] { return Job(up, labels.const_data_ptr<uint8_t>(), losses.data(), g); });
  *total.mutable_data_ptr<float>() = std::accumulate(losses.begin(), losses.end(), 0.);
  return {total, grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("label_map", TORCH_BOX(&label_map));
  m.impl("cross_entropy", TORCH_BOX(&cross_entropy));
}
