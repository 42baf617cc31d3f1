// Which pixels count, and with which label: a row at a time, from labels, a mask of padding and the discriminator's confidence.
#pragma once
#include "cells.h"

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
  void row(int64_t n, int y, int16_t* codes, float* scratch, Tally& tally) const {
    int64_t start = (n * height + y) * width;
    for (int64_t x = 0; x < width; x++) {
      int64_t label = !target ? 0 : wide ? static_cast<const int64_t*>(target)[start + x]
                                         : static_cast<const uint8_t*>(target)[start + x];
      bool counts = !target || label != ignore;
      if (counts && (label < 0 || label >= K)) {
        if (!tally.has_bad) tally.bad = label;
        tally.has_bad = true, counts = false;
      }
      if (valid) counts &= valid[start + x];
      tally.everything += counts;
      codes[x] = counts ? label : K;
    }
    codes[width] = K;
    if (confidence) {
      int cell = std::upper_bound(cy.first.begin(), cy.first.end() - 1, y) - cy.first.begin() - 1;
      const float *p = confidence + (n * cy.n + cell) * cx.n, *q = cell + 1 < cy.n ? p + cx.n : p;
      for (int i = 0; i < cx.n; i++) scratch[i] = (1 - cy.frac[y]) * p[i] + cy.frac[y] * q[i];
      scratch[cx.n] = scratch[cx.n - 1];
      for (int i = 0; i < cx.n; i++)
        for (int x = cx.first[i]; x < cx.first[i + 1]; x++) {
          float here = (1 - cx.frac[x]) * scratch[i] + cx.frac[x] * scratch[i + 1];
          codes[x] = here > cutoff ? codes[x] : K;
        }
    }
    for (int64_t x = 0; x < width; x++) tally.kept += codes[x] != K;
  }
};
