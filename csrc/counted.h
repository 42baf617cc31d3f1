// Which pixels count, and with which label: a row at a time, from labels, a mask of padding and the discriminator's confidence.
#pragma once
#include "tensors.h"

struct Counted {
  const void* target;  // (N,H,W) uint8 or int64, or null
  bool wide;           // int64
  const bool* valid;   // (N,H,W) or null
  const float* confidence;  // (N,1,a,b) or null
  int64_t height, width, K, ignore;
  float cutoff;   // a pixel counts where the upsampled confidence is above this
  Axis cy, cx;    // of the confidence

  struct Tally {
    int64_t kept = 0, everything = 0, bad = 0;
    bool has_bad = false;
  };

  // codes[x]: the label (0 without target) of pixel (n,y,x), K where it does not count; codes[width] = K. `scratch`: cx.n + 1.
  void row(int64_t n, int y, int32_t* codes, float* scratch, Tally& tally) const {
    const int64_t start = (n * height + y) * width;
    if (!target) std::fill(codes, codes + width, 0);
    else if (wide) read(static_cast<const int64_t*>(target) + start, codes, tally);
    else read(static_cast<const uint8_t*>(target) + start, codes, tally);
    const int32_t none = K;
    codes[width] = none;
    if (valid)
      for (int64_t x = 0; x < width; x++) codes[x] = valid[start + x] ? codes[x] : none;
    tally.everything += count(codes);
    if (confidence) {
      const int cell = std::upper_bound(cy.first.begin(), cy.first.end() - 1, y) - cy.first.begin() - 1;
      const float *p = confidence + (n * cy.n + cell) * cx.n, *q = cell + 1 < cy.n ? p + cx.n : p;
      for (int i = 0; i < cx.n; i++) scratch[i] = (1 - cy.frac[y]) * p[i] + cy.frac[y] * q[i];
      scratch[cx.n] = scratch[cx.n - 1];
      for (int i = 0; i < cx.n; i++) {
        const float left = scratch[i], right = scratch[i + 1];
        for (int x = cx.first[i]; x < cx.first[i + 1]; x++)
          codes[x] = (1 - cx.frac[x]) * left + cx.frac[x] * right > cutoff ? codes[x] : none;
      }
    }
    tally.kept += count(codes);
  }

  int64_t count(const int32_t* codes) const {
    const int32_t none = K, end = width;
    int32_t counted = 0;
    for (int32_t x = 0; x < end; x++) counted += codes[x] != none;
    return counted;
  }

  template <class T>
  void read(const T* __restrict labels, int32_t* __restrict codes, Tally& tally) const {
    const T void_label = T(ignore), end = T(K);
    const bool none_ignored = ignore != int64_t(void_label);
    const int32_t none = K, n = width;
    int32_t bad = 0;
    for (int32_t x = 0; x < n; x++) {
      const bool kept = none_ignored | (labels[x] != void_label), inside = (labels[x] >= 0) & (labels[x] < end);
      bad |= kept & !inside;
      codes[x] = kept & inside ? int32_t(labels[x]) : none;
    }
    for (int32_t x = 0; bad && !tally.has_bad && x < n; x++)
      if ((none_ignored || labels[x] != void_label) && !(labels[x] >= 0 && labels[x] < end))
        tally.bad = labels[x], tally.has_bad = true;
  }
};

inline Counted counted(int64_t K, int64_t height, int64_t width, const std::optional<Tensor>& target,
                       const std::optional<Tensor>& confidence, const std::optional<Tensor>& valid, double cutoff,
                       int64_t ignore) {
  return {target ? target->data_ptr() : nullptr,
          target && target->scalar_type() == ScalarType::Long,
          valid ? valid->const_data_ptr<bool>() : nullptr,
          confidence ? confidence->const_data_ptr<float>() : nullptr,
          height, width, K, ignore, float(cutoff),
          Axis(confidence ? confidence->size(2) : 1, height), Axis(confidence ? confidence->size(3) : 1, width)};
}

struct Result : Counted::Tally {
  double loss = 0;
};

// The sum of all, in order. Throws where a label was out of range.
inline Result add_up(const std::vector<Result>& results, int64_t K) {
  Result all;
  for (const Result& r : results) {
    if (r.has_bad)
      throw std::invalid_argument("target holds " + std::to_string(r.bad) + ", outside 0.." + std::to_string(K - 1) +
                                  " and not ignored");
    all.kept += r.kept, all.everything += r.everything, all.loss += r.loss;
  }
  return all;
}
