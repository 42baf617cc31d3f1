// Bilinear interpolation by cells, align_corners=True. Four neighbouring low-resolution points span a cell; along a row of the
// output pixels in it a class's logit is A + fx * B, with A and B linear in fy. A vector holds the same pixel of LANES
// neighbouring cells: the points are read, and their gradients written, in memory's order without a gather or a shuffle.
#pragma once
#include <algorithm>
#include <vector>

#include "vec.h"

constexpr int PIXELS = 8;  // of a cell's row at once

// One axis: n low-resolution points, m output positions, in float32 as ATen computes them.
struct Axis {
  int n, m;
  float step;               // distance of two outputs, in cells
  std::vector<int> first;   // (n+1) cell x holds the outputs first[x] .. first[x+1] - 1
  std::vector<float> frac;  // (m) where in its cell an output lies

  Axis(int n, int m) : n(n), m(m), step(m > 1 ? float(n - 1) / (m - 1) : 0.f), first(n + 1, m), frac(m) {
    for (int o = m - 1, above = n; o >= 0; o--) {
      float real = step * o;
      int x = std::min(int(real), n - 1);
      frac[o] = x == n - 1 ? 0.f : std::min(real - x, 1.f);
      while (above > x + 1) first[--above] = o + 1;  // cells without outputs
      first[above = x] = o;
    }
  }
  int count(int x) const { return x < n ? first[x + 1] - first[x] : 0; }
};

// The x axis in vectors: vector v holds the cells v*LANES ...; its j-th pixels are row offset[v] + j of `column` and `frac`.
struct Lanes {
  int vectors, stride;           // stride: floats of a padded row of points
  std::vector<int> most, offset; // (vectors) the largest number of pixels in a cell's row
  std::vector<int> column;       // (rows * LANES) the output column, m where a cell has fewer pixels
  std::vector<float> frac;       // (rows * LANES)

  explicit Lanes(const Axis& x) : vectors((x.n + LANES - 1) / LANES), stride((vectors + 1) * LANES) {
    for (int v = 0; v < vectors; v++) {
      most.push_back(0);
      for (int l = 0; l < LANES; l++) most[v] = std::max(most[v], x.count(v * LANES + l));
      offset.push_back(column.size() / LANES);
      for (int j = 0; j < most[v]; j++)
        for (int cell = v * LANES; cell < (v + 1) * LANES; cell++) {
          column.push_back(j < x.count(cell) ? x.first[cell] + j : x.m);
          frac.push_back(j < x.count(cell) ? x.frac[column.back()] : 0.f);
        }
    }
  }
};

// Whether P * LANES pixels with these columns lie side by side, so that `interleave_8` puts them in memory's order; `width`
// stands for a missing one.
template <int P>
inline bool dense(const int* column, int width) {
  return P == 8 && column[P * LANES - 1] < width && column[P * LANES - 1] - column[0] == P * LANES - 1;
}

// Logits (N,K,h,w) as they lie in memory.
struct Points {
  const void* data;
  bool bf16;
  int64_t sizes[4], strides[4];

  float at(int64_t i) const {
    if (!bf16) return static_cast<const float*>(data)[i];
    uint32_t bits = uint32_t(static_cast<const uint16_t*>(data)[i]) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
  // Row y of picture n to rows[k * stride ...], the last point repeated behind the end.
  void row(int64_t n, int64_t y, const Lanes& lanes, float* rows) const {
    y = std::min(y, sizes[2] - 1);
    for (int64_t k = 0; k < sizes[1]; k++, rows += lanes.stride) {
      int64_t start = n * strides[0] + k * strides[1] + y * strides[2];
      if (!bf16 && strides[3] == 1) std::memcpy(rows, static_cast<const float*>(data) + start, 4 * sizes[3]);
      else for (int64_t x = 0; x < sizes[3]; x++) rows[x] = at(start + x * strides[3]);
      std::fill(rows + sizes[3], rows + lanes.stride, rows[sizes[3] - 1]);
    }
  }
};

// A class in LANES cells: the logit at (fy,fx) is a + fy*down + fx*(right + fy*both).
struct Cell {
  V a, down, right, both;
};
struct Quad {  // its points
  V top_left, top_right, bottom_left, bottom_right;
};

// A class's gradient in LANES cells, summed over their pixels: plain, times fx, times fy, times both.
struct Sums {
  V one, x, y, xy;

  // Add what the row at fy sums up to: `a` plain, `b` times fx.
  void add(V a, V b, float fy) { one += a, x += b, y += fy * a, xy += fy * b; }
  // Hand the sums to the cells' corners, `top` and `bottom` being the places of the left ones.
  void to_corners(float* top, float* bottom) const {
    store(top, load(top) + (one - x - y + xy));
    store(top + 1, load(top + 1) + (x - xy));
    store(bottom, load(bottom) + (y - xy));
    store(bottom + 1, load(bottom + 1) + xy);
  }
};

// The gradient of a row of cells of picture n, on its way to grad (N,K,h,w).
struct Gradient {
  float* grad;
  const int64_t K, h, w;
  const int stride;                // of a padded row of points
  std::vector<float> top, bottom;  // the rows of points above and below
  std::vector<Sums> sums;          // (K), of the LANES cells at hand

  Gradient(float* grad, const Points& p, const Lanes& lanes)
      : grad(grad), K(p.sizes[1]), h(p.sizes[2]), w(p.sizes[3]), stride(lanes.stride), top(K * stride), bottom(top), sums(K) {}

  // The cells at x are done.
  void to_corners(int x) {
    for (int64_t k = 0, at = x; k < K; k++, at += stride) sums[k].to_corners(&top[at], &bottom[at]);
    std::fill(sums.begin(), sums.end(), Sums{});
  }
  // Row `cell` of them is done.
  void add(int64_t n, int64_t cell) {
    add_row(top, n, cell);
    if (cell + 1 < h) add_row(bottom, n, cell + 1);
    std::fill(top.begin(), top.end(), 0.f);
    std::fill(bottom.begin(), bottom.end(), 0.f);
  }

 private:
  void add_row(const std::vector<float>& rows, int64_t n, int64_t y) {
    for (int64_t k = 0; k < K; k++) {
      float* __restrict to = grad + ((n * K + k) * h + y) * w;
      for (int64_t x = 0; x < w; x++) to[x] += rows[k * stride + x];
    }
  }
};

// A thread's walk over cells, LANES of them at a time.
struct Walk {
  const Points& logits;
  const Axis& y;
  const Lanes& lanes;
  const int K;
  const float step;                // of the x axis
  std::vector<float> top, bottom;  // the rows of points above and below
  std::vector<Cell> cells;         // (K)
  std::vector<Quad> quads;         // (K), read only where the cells are not smooth
  bool smooth = true;              // for exponentials by recurrence: finite, and none underflows that matters
  V largest{};                     // point

  Walk(const Points& logits, const Axis& y, const Axis& x, const Lanes& lanes)
      : logits(logits), y(y), lanes(lanes), K(logits.sizes[1]), step(x.step), top(K * lanes.stride), bottom(top), cells(K), quads(K) {}

  // The cells between the points' rows `cell` and `cell` + 1 of picture n. For every LANES cells: block(P, row, at) for each P
  // pixels of an output row, the first being row `at` of the lanes' tables (P is an integral_constant, 1 where not smooth); then
  // end(x), x being the first cell.
  template <class Block, class End>
  void operator()(int64_t n, int64_t cell, const Block& block, const End& end) {
    logits.row(n, cell, lanes, top.data());
    logits.row(n, cell + 1, lanes, bottom.data());
    for (int v = 0; v < lanes.vectors; v++) {
      read(v * LANES);
      for (int row = y.first[cell]; row < y.first[cell + 1]; row++)
        for (int at = lanes.offset[v], last = at + lanes.most[v]; at < last;) {
          const int rest = smooth ? last - at : 1;
          if (rest >= 8) block(std::integral_constant<int, 8>(), row, at), at += 8;
          else if (rest >= 4) block(std::integral_constant<int, 4>(), row, at), at += 4;
          else block(std::integral_constant<int, 1>(), row, at), at += 1;
        }
      end(v * LANES);
    }
  }

 private:
  void read(int x) {
    V floor = largest = splat(-INFINITY), steepest{}, broken{};
    for (int k = 0; k < K; k++) {
      const float *t = &top[k * lanes.stride + x], *u = &bottom[k * lanes.stride + x];
      V a = load(t), b = load(t + 1), c = load(u), d = load(u + 1);
      largest = max(max(max(a, b), max(c, d)), largest);
      floor = max(min(min(a, b), min(c, d)), floor);  // the best class of any pixel is at least that
      steepest = max(max(abs(b - a), abs(d - c)), steepest);
      broken += (a + b + c + d) * 0;  // 0, or NaN
      cells[k] = {a, c - a, b - a, (d - c) - (b - a)};
    }
    // with two or three pixels a cell there is no recurrence
    smooth = all(is_smooth(largest, floor, steepest, step > 0.5f ? V{} : step * steepest, broken));
    for (int k = 0; k < K && !smooth; k++) {
      const float *t = &top[k * lanes.stride + x], *u = &bottom[k * lanes.stride + x];
      quads[k] = {load(t), load(t + 1), load(u), load(u + 1)};
    }
  }
};

// The logit of a pixel in cells that are not smooth, by ATen's formula.
inline V exact(const Quad& q, float fy, V fx) {
  return (1 - fy) * ((1 - fx) * q.top_left + fx * q.top_right) + fy * ((1 - fx) * q.bottom_left + fx * q.bottom_right);
}

// e[k*P + p] = exp(logit - shift) of class k at the p-th of P pixels in a row, at fx[p*LANES ...], and their sums over k;
// -> shift.
template <int P>
inline V exponentials(const Walk& walk, float fy, const float* fx, V* e, V* sums) {
  const V f = load(fx);
  V total[P] = {}, shift = walk.largest;
  if (P == 1 && !walk.smooth) {
    shift = splat(-INFINITY);
    for (int k = 0; k < walk.K; k++) e[k] = exact(walk.quads[k], fy, f), shift = max(e[k], shift);
    for (int k = 0; k < walk.K; k++) e[k] = exp2(LOG2E * (e[k] - shift)), total[0] += e[k];
    sums[0] = total[0];
    return shift;
  }
  for (int k = 0; k < walk.K; k++, e += P) {
    const Cell& c = walk.cells[k];
    V right = LOG2E * (c.right + fy * c.both);
    V now = exp2(LOG2E * (c.a + fy * c.down - shift) + f * right);
    V m = P > 1 ? exp2_minus_1(walk.step * right) : V{};
    for (int p = 0; p < P; p++) {
      e[p] = now;
      total[p] += now;
      now += now * m;
    }
  }
  for (int p = 0; p < P; p++) sums[p] = total[p];
  return shift;
}

// The largest logit of P pixels in a row and its class: the lowest on a tie, the first NaN where there is one.
template <int P>
inline void argmax(const Walk& walk, float fy, const float* fx, V* top, I* arg) {
  V largest[P], f[P];
  I which[P] = {};
  for (int p = 0; p < P; p++) largest[p] = splat(-INFINITY), f[p] = load(fx + p * LANES);
  for (int k = 0; k < walk.K; k++) {
    const Cell& c = walk.cells[k];
    V a = c.a + fy * c.down, right = c.right + fy * c.both;
    for (int p = 0; p < P; p++) {
      V logit = P > 1 || walk.smooth ? a + f[p] * right : exact(walk.quads[k], fy, f[p]);
      I larger = logit > largest[p];
      if (P == 1) larger |= (logit != logit) & (largest[p] == largest[p]);
      largest[p] = larger ? logit : largest[p];
      which[p] = larger ? k - I{} : which[p];
    }
  }
  for (int p = 0; p < P; p++) top[p] = largest[p], arg[p] = which[p];
}
