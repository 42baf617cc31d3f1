// What the kernels for the CPU and for CUDA share: class ids, one axis of an interpolation, and exponentials.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;
constexpr uint8_t NONE = 255;  // the label of a pixel that is not selected

// Returns logits as contiguous float32; they have the low resolution, so that the copy costs little.
inline Tensor to_contiguous_float(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float && t.is_contiguous()) return t;  // a call of torch takes microseconds
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Float));
}

// Contiguous class ids, uint8 or int64.
struct ClassIds {
  const void* data;
  bool is_int64;

  explicit ClassIds(const Tensor& t) : data(t.data_ptr()), is_int64(t.scalar_type() == ScalarType::Long) {}
  ON_BOTH int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const uint8_t*>(data)[i];
  }
};

// One axis of a bilinear interpolation with align_corners=True.
struct Axis {
  int points, outputs;  // sizes at the low and at the high resolution
  int next;             // offset to the next point: 1, or 0 if the axis keeps its size or has one point
  float step;           // distance of two outputs in cells, in float32 as ATen computes it

  Axis(int64_t points, int64_t outputs)
      : points(points), outputs(outputs), next(points != outputs && points > 1),
        step(outputs > 1 ? float(points - 1) / (outputs - 1) : 0.f) {}
};

// (2^r - 1) / r for |r| <= 1/2, relative error 1.1e-8 before rounding (Remez by reweighted least squares). F is float
// or a vector of floats.
template <class F>
ON_BOTH inline F exp2_polynomial(F r) {
  F p = r * 0.000154035122f + 0.00133907353f;
  p = p * r + 0.00961823761f;
  p = p * r + 0.0555035733f;
  p = p * r + 0.240226492f;
  return p * r + 0.693147182f;
}

// Whether the exponentials of a cell may be computed from pixel to pixel by e += e * m, with the largest corner as the
// shift. All corners are finite (`nonfinite` is 0, not NaN). `lowest_best` is a lower bound of a pixel's largest logit,
// so that denominators are above e^-40. A step between pixels is below 4: it costs up to e^4 roundings, and in the 7
// steps of a block an e that underflowed, below e^-87, stays below e^-59, which is 4e-9 of the denominator.
template <class F>
ON_BOTH inline auto is_smooth(F largest, F lowest_best, F max_step, F nonfinite) {
  return (largest - lowest_best < 40) & (max_step < 4) & (nonfinite == 0);
}

// The logit of a threshold (float32 on the CPU). Comparing logits avoids sigmoids that round to the threshold.
inline float logit(const Tensor& threshold) {
  const double p = *threshold.const_data_ptr<float>();
  return p > 0 && p < 1 ? std::log(p / (1 - p)) : std::copysign(INFINITY, p - 0.5);
}
