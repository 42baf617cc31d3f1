// LANES floats at a time by the vector extension of GCC and Clang: one source for AVX-512, AVX2 and NEON.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "exponentials.h"

#ifdef __AVX512F__
#include <immintrin.h>
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float V __attribute__((vector_size(4 * LANES)));
typedef int32_t I __attribute__((vector_size(4 * LANES)));

inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));  // bfloat16
inline V widen(U16 half) {
  const I bits = __builtin_convertvector(half, I) << 16;
  V v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline U16 narrow(V v) {  // to the nearest, ties to even
  U16 half;
#ifdef __AVX512BF16__
  const auto bits = _mm512_cvtneps_pbh(v);
#else
  I whole;
  std::memcpy(&whole, &v, sizeof v);
  whole = v == v ? whole + 0x7fff + ((whole >> 16) & 1) : whole | 0x400000;
  const U16 bits = __builtin_convertvector(whole >> 16, U16);
#endif
  std::memcpy(&half, &bits, sizeof half);
  return half;
}
inline V load(const uint16_t* p) { U16 half; std::memcpy(&half, p, sizeof half); return widen(half); }
// The first n numbers, of LANES at most; what is loaded behind them is 0.
inline V load(const float* p, int n) {
#ifdef __AVX512F__
  return _mm512_maskz_loadu_ps((1u << n) - 1, p);
#else
  V v{};
  std::memcpy(&v, p, n * sizeof *p);
  return v;
#endif
}
inline void store(float* p, V v, int n) {
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(p, (1u << n) - 1, v);
#else
  std::memcpy(p, &v, n * sizeof *p);
#endif
}
inline V load(const uint16_t* p, int n) {
  U16 half{};
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const auto bits = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
  std::memcpy(&half, &bits, sizeof half);
#else
  std::memcpy(&half, p, n * sizeof *p);
#endif
  return widen(half);
}
inline void store(uint16_t* p, V v, int n) {
  const U16 half = narrow(v);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  __m256i bits;
  std::memcpy(&bits, &half, sizeof bits);
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bits);
#else
  std::memcpy(p, &half, n * sizeof *p);
#endif
}
inline V splat(float x) { return x - V{}; }  // x + V{} would lose the sign of zero
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V abs(V a) { return max(a, -a); }
inline bool all(I mask) {
#ifdef __AVX512F__
  __m512i bits;
  std::memcpy(&bits, &mask, sizeof bits);
  return _mm512_test_epi32_mask(bits, bits) == 0xffff;
#else
  int32_t every = -1;
  for (int i = 0; i < LANES; i++) every &= mask[i];
  return every;
#endif
}

// GCC has a builtin for this in every version, Clang another one
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
inline V zip_low(V a, V b) { return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23); }
inline V zip_high(V a, V b) { return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31); }
#elif defined(__AVX__)
inline V zip_low(V a, V b) { return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline V zip_high(V a, V b) { return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline V zip_low(V a, V b) { return SHUFFLE(a, b, 0, 4, 1, 5); }
inline V zip_high(V a, V b) { return SHUFFLE(a, b, 2, 6, 3, 7); }
#endif
#undef SHUFFLE

// Lane j of vector i and lane i of vector j change places. One round of zips moves the bits of (i,j) round by one.
inline void transpose(V* v) {
  for (int round = 1; round < LANES; round *= 2) {
    V next[LANES];
    for (int i = 0; i < LANES / 2; i++) {
      next[2 * i] = zip_low(v[i], v[i + LANES / 2]);
      next[2 * i + 1] = zip_high(v[i], v[i + LANES / 2]);
    }
    for (int i = 0; i < LANES; i++) v[i] = next[i];
  }
}

inline V round_to_integer(V x) {
#ifdef __AVX512F__
  return _mm512_roundscale_ps(x, 0);
#else
  return (x + 12582912.f) - 12582912.f;
#endif
}

// 1 / x, one rounding off at the most, for what is neither tiny nor huge
inline V reciprocal(V x) {
#ifdef __AVX512F__
  const V y = _mm512_rcp14_ps(x);
  return y + y * (1 - x * y);
#else
  return 1 / x;
#endif
}

// y * 2^n for integral n; below 2^-126 the result may be 0
inline V scale(V y, V n) {
#ifdef __AVX512F__
  return _mm512_scalef_ps(y, n);
#else
  I bits = (__builtin_convertvector(max(n, splat(-127)), I) + 127) << 23;
  V power;
  std::memcpy(&power, &bits, sizeof bits);
  return y * power;
#endif
}

// 2^x, relative error 1.5 * 2^-24; NaN stays NaN, -inf gives 0
inline V exp2(V x) {
  x = x < -151 ? splat(-151) : x;
  V n = round_to_integer(x), r = x - n;
  return scale(r * exp2_polynomial(r) + 1, n);
}

// 2^x - 1 for finite x above -126, relative error 3 * 2^-24, also where x is close to 0
inline V exp2_minus_1(V x) {
  V n = round_to_integer(x), r = x - n, power = scale(splat(1), n);
  return power * (r * exp2_polynomial(r)) + (power - 1);
}

// log2(x) for normal x, absolute error 1e-7 + relative error 2^-23; inf and NaN give themselves
inline V log2(V x) {
  I bits;
  std::memcpy(&bits, &x, sizeof bits);
  I n = (bits - 0x3f3504f3) >> 23;  // so that the mantissa is in sqrt(1/2) .. sqrt(2)
  I mantissa = bits - (n << 23);
  V s;
  std::memcpy(&s, &mantissa, sizeof s);
  s = s - 1;
  V p = s * 0.125836983f - 0.207269728f;
  p = p * s + 0.215716618f;
  p = p * s - 0.238944829f;
  p = p * s + 0.287916243f;
  p = p * s - 0.360703677f;
  p = p * s + 0.480910629f;
  p = p * s - 0.721347332f;
  p = p * s + 1.44269502f;
  V result = s * p + __builtin_convertvector(n, V);
  return x < INFINITY ? result : x;
}
