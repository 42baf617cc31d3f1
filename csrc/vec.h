// Vectors of LANES floats by the vector extensions of GCC and Clang: one source for AVX-512, AVX and NEON.
#pragma once
#include <cstring>

#include "exponentials.h"

#ifdef __AVX512F__
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));  // a cast between the two reinterprets the bits

inline Floats load(const float* p) { Floats v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
inline Floats splat(float x) { return x - Floats{}; }  // x + Floats{} would lose the sign of zero
inline Floats max(Floats a, Floats b) { return a > b ? a : b; }
inline Floats min(Floats a, Floats b) { return a < b ? a : b; }
inline Floats abs(Floats a) { return max(a, -a); }

// The low bits of x + SHIFT are x, rounded to an integer.
constexpr float SHIFT = 12582912;  // 1.5 * 2^23
inline Floats power_of_2(Floats shifted) {  // 2^(shifted - SHIFT); 2^-127 is taken as 0
  return (Floats)(((Ints)shifted << 23) + 0x3f800000);
}

// 2^x, relative error 1.5 * 2^-24; NaN stays NaN, -inf gives 0
inline Floats exp2(Floats x) {
  x = x < -127 ? splat(-127) : x;
  const Floats shifted = x + SHIFT, r = x - (shifted - SHIFT);
  return (r * exp2_polynomial(r) + 1) * power_of_2(shifted);
}

// 2^x - 1 for finite x above -126, relative error 3 * 2^-24, also where x is close to 0
inline Floats exp2_minus_1(Floats x) {
  const Floats shifted = x + SHIFT, r = x - (shifted - SHIFT), power = power_of_2(shifted);
  return power * (r * exp2_polynomial(r)) + (power - 1);
}

// log2(x) for normal x, absolute error 1e-7 + relative error 2^-23; inf and NaN are returned unchanged
inline Floats log2(Floats x) {
  const Ints bits = (Ints)x;
  const Ints n = (bits - 0x3f3504f3) >> 23;  // so that the mantissa is in sqrt(1/2) .. sqrt(2)
  const Floats s = (Floats)(bits - (n << 23)) - 1;
  Floats p = s * 0.125836983f - 0.207269728f;
  p = p * s + 0.215716618f;
  p = p * s - 0.238944829f;
  p = p * s + 0.287916243f;
  p = p * s - 0.360703677f;
  p = p * s + 0.480910629f;
  p = p * s - 0.721347332f;
  p = p * s + 1.44269502f;
  const Floats result = s * p + __builtin_convertvector(n, Floats);
  return x < INFINITY ? result : x;
}
