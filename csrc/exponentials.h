// What the exponentials of CPU and GPU share. F is a float or a vector of them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cmath>

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

// (2^r - 1) / r for |r| <= 1/2, relative error 1.1e-8 before rounding (Remez by reweighted least squares)
template <class F>
ON_BOTH inline F exp2_polynomial(F r) {
  F p = r * 0.000154035122f + 0.00133907353f;
  p = p * r + 0.00961823761f;
  p = p * r + 0.0555035733f;
  p = p * r + 0.240226492f;
  return p * r + 0.693147182f;
}

// Whether a cell's exponentials may go from pixel to pixel by e += e * m, with its largest corner for a shift: all is
// finite, and what underflows, or loses digits on the way, does not matter. `floor` is what the best class has in any
// pixel at least, `steepest` the largest fall from corner to corner and `fall` from pixel to pixel, `broken` 0 or
// NaN.
template <class F>
ON_BOTH inline auto is_smooth(F largest, F floor, F steepest, F fall, F broken) {
  // a fall by 4 costs e^4 roundings in the next pixel
  return (largest - floor + steepest < 64) & (largest - floor < 40) & (fall < 4) & (broken == 0);
}

// The c above which sigmoid(c) > threshold (a float32 scalar on the CPU): no sigmoid rounds to it.
inline float logit(const torch::stable::Tensor& threshold) {
  const double p = *threshold.const_data_ptr<float>();
  return p > 0 && p < 1 ? std::log(p / (1 - p)) : std::copysign(INFINITY, p - 0.5);
}
#undef ON_BOTH
