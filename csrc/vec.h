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
typedef double D __attribute__((vector_size(8 * LANES)));

inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
typedef uint16_t U16 __attribute__((vector_size(2 * LANES)));
typedef uint8_t U8 __attribute__((vector_size(LANES)));
inline V load(const uint16_t* p) {  // bfloat16
  U16 half;
  std::memcpy(&half, p, sizeof half);
  I bits = __builtin_convertvector(half, I) << 16;
  V v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
inline void store(uint16_t* p, V v) {  // to the nearest bfloat16, ties to even
  I bits;
  std::memcpy(&bits, &v, sizeof v);
  bits = v == v ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
  U16 half = __builtin_convertvector(bits >> 16, U16);
  std::memcpy(p, &half, sizeof half);
}
inline V splat(float x) { return x - V{}; }  // 0 - x would lose the sign of zero
inline V max(V a, V b) { return a > b ? a : b; }
inline V min(V a, V b) { return a < b ? a : b; }
inline V abs(V a) { return max(a, -a); }
inline bool all(I mask) {
  int32_t every = -1;
  for (int i = 0; i < LANES; i++) every &= mask[i];
  return every;
}
inline double sum(D a) {
  double total = 0;
  for (int i = 0; i < LANES; i++) total += a[i];
  return total;
}

// Lanes of the same index of 8 vectors next to each other, and back: element p * LANES + l goes to l * 8 + p. One round of
// zip moves an element's index bits round by one.
#if defined(__AVX512F__)
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that one from 12 on
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
template <class T>
inline void interleave_8(T* v) {
  for (int round = 0; round < 3; round++) {
    T next[8];
    for (int i = 0; i < 4; i++) {
      next[2 * i] = SHUFFLE(v[i], v[i + 4], LOW);
      next[2 * i + 1] = SHUFFLE(v[i], v[i + 4], HIGH);
    }
    for (int i = 0; i < 8; i++) v[i] = next[i];
  }
}
template <class T>
inline void deinterleave_8(T* v) {
  for (int round = 0; round < 3; round++) {
    T next[8];
    for (int i = 0; i < 4; i++) {
      next[i] = SHUFFLE(v[2 * i], v[2 * i + 1], EVEN);
      next[i + 4] = SHUFFLE(v[2 * i], v[2 * i + 1], ODD);
    }
    for (int i = 0; i < 8; i++) v[i] = next[i];
  }
}
#undef SHUFFLE
#undef LOW
#undef HIGH
#undef EVEN
#undef ODD

inline V round_to_integer(V x) {
#ifdef __AVX512F__
  return _mm512_roundscale_ps(x, 0);
#else
  return (x + 12582912.f) - 12582912.f;
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
