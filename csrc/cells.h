// Bilinear interpolation by cells, align_corners=True: four neighbouring points of the logits' grid span a cell.
//
//  top_left - - - - - - - top_right     At the fractions fx and fy of the cell, both in 0..1, a class's logit is
//     |         : fy          |            A + fx * B, with A = a + fy * down and B = right + fy * both, where
//     |   fx    :             |            a = top_left               down = bottom_left - top_left
//     | . . . . P             |            right = top_right - a      both = bottom_right - bottom_left - right
//     |                       |          Along a row of pixels fy, and so A and B, are constants.
//  bottom_left  - - - - bottom_right
//
// A vector holds the same pixel of LANES neighbouring cells: the points are read, and their gradients written, in
// memory's order without a gather or a shuffle.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "vec.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int PIXELS = 8;  // of a cell's row at once

// One axis: n points, m output positions, in float32 as ATen computes them.
struct Axis {
  int n, m;
  int next;                 // from a point to its neighbour; 0 where the axis keeps its size, and every point is alone
  float step;               // distance of two outputs, in cells
  std::vector<int> first;   // (n+1) cell x holds the outputs first[x] .. first[x+1] - 1
  std::vector<float> frac;  // (m) where in its cell an output lies

  Axis(int n, int m) : n(n), m(m), next(n != m), step(m > 1 ? float(n - 1) / (m - 1) : 0.f), first(n + 1, m), frac(m) {
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

// P pixels of an output row in LANES cells.
struct Block {
  const int *first, *pixels;  // (LANES) the cells' first columns, and how many they have
  int row, at;                // of the picture; the block's first pixel in each cell
  const float* fx;            // (P * LANES) pixel p of lane l is at fx[p * LANES + l]
  float fy;

  int column(int lane) const { return first[lane] + at; }
  int count(int lane, int P) const { return std::clamp(pixels[lane] - at, 0, P); }
};

// The x axis in vectors of cells.
struct Lanes {
  int vectors, stride;            // stride: floats of a padded row of points
  std::vector<int> first, pixels; // (vectors * LANES) a cell's first column, and how many it has
  std::vector<int> most, offset;  // (vectors) the most of `pixels`; where in `fx` a vector's first pixels are
  std::vector<float> fx;          // (sum of most, LANES)

  explicit Lanes(const Axis& x) : vectors((x.n + LANES - 1) / LANES), stride((vectors + 1) * LANES) {
    for (int cell = 0; cell < vectors * LANES; cell++) {
      first.push_back(x.first[std::min(cell, x.n)]);
      pixels.push_back(x.count(cell));
    }
    for (int v = 0; v < vectors; v++) {
      const int* count = &pixels[v * LANES];
      most.push_back(*std::max_element(count, count + LANES));
      offset.push_back(fx.size());
      for (int j = 0; j < most[v]; j++)
        for (int l = 0; l < LANES; l++) fx.push_back(j < count[l] ? x.frac[first[v * LANES + l] + j] : 0.f);
    }
    fx.resize(fx.size() + (PIXELS - 1) * LANES);  // the last block may reach that far
  }
};

// Logits (N,K,h,w) float32 or bfloat16 as they lie in memory.
struct Points {
  const void* data;
  bool bf16;
  int64_t sizes[4], strides[4];

  explicit Points(const Tensor& t) : data(t.data_ptr()), bf16(t.scalar_type() == ScalarType::BFloat16) {
    for (int i = 0; i < 4; i++) sizes[i] = t.size(i), strides[i] = t.stride(i);
  }
  // Row y of picture n to rows[k * stride ...], the last point repeated behind the end.
  void row(int64_t n, int64_t y, const Lanes& lanes, float* rows) const {
    const int64_t start = n * strides[0] + std::min(y, sizes[2] - 1) * strides[2], w = sizes[3];
    for (int64_t k = 0; k < sizes[1]; k++, rows += lanes.stride) {
      if (bf16) copy(static_cast<const uint16_t*>(data) + start + k * strides[1], rows);
      else copy(static_cast<const float*>(data) + start + k * strides[1], rows);
      std::fill(rows + w, rows + lanes.stride, rows[w - 1]);
    }
  }

 private:
  template <class T>
  void copy(const T* from, float* row) const {
    const int64_t w = sizes[3], step = strides[3];
    int64_t x = 0;
    for (; step == 1 && x + LANES <= w; x += LANES) store(row + x, load(from + x));
    for (; x < w; x++) row[x] = load(from + x * step, 1)[0];
  }
};

// Rows of cells, `rows` in each picture, on all threads: each makes itself a job and calls job(picture, row). With two
// rounds the even rows come first, then the odd ones, so that a job may also add to what is the next row's: no two
// threads meet, and the bits do not depend on their number.
template <class Make>
void each_row(int64_t pictures, int64_t rows, int rounds, const Make& make) {
  for (int round = 0; round < rounds; round++) {
    const int64_t own = (rows + rounds - 1 - round) / rounds;
    torch::stable::parallel_for(0, pictures * own, 1, [&](int64_t begin, int64_t end) {
      auto job = make();
      for (int64_t i = begin; i < end; i++) job(i / own, i % own * rounds + round);
    });
  }
}

// A class in LANES cells.
struct Cell {
  V a, down, right, both;
};
struct Power {  // in a block: e the first pixel's exponential, e + e * m the next one's; both, brought down a row
  V e, m, e_down, m_down;
};
struct Quad {
  V top_left, top_right, bottom_left, bottom_right;
};

// What the threads share: logits, and the axes of their upsampling.
struct Upsampling {
  Points logits;
  Axis y, x;
  Lanes lanes;

  Upsampling(const Tensor& t, int64_t height, int64_t width)
      : logits(t), y(t.size(2), height), x(t.size(3), width), lanes(x) {}
};

// A thread's walk over cells, LANES of them at a time.
struct Walk {
  const Upsampling& up;
  const int K;
  std::vector<float> top, bottom;  // (K,stride) the rows of points above and below
  std::vector<Cell> cells;         // (K)
  std::vector<Quad> quads;         // (K), read only where the cells are not smooth
  std::vector<int> rows;           // (blocks of a cell's row) of the picture, that `powers` are of
  std::vector<Power> powers;       // (blocks of a cell's row, K)
  bool smooth = true;              // for exponentials by recurrence: finite, and none underflows that matters
  V largest{};                     // point

  explicit Walk(const Upsampling& up)
      : up(up), K(up.logits.sizes[1]), top(K * up.lanes.stride), bottom(top), cells(K), quads(K),
        rows(*std::max_element(up.lanes.most.begin(), up.lanes.most.end()) / PIXELS + 1), powers(K * rows.size()) {}

  // The cells between the points' rows `cell` and `cell` + 1 of picture n. For every LANES cells: visit(P, block) for
  // each P pixels of an output row (P is an integral_constant, PIXELS or 1, which it is where not smooth); then end(x),
  // x being the first cell.
  template <class Visit, class End>
  void operator()(int64_t n, int64_t cell, const Visit& visit, const End& end) {
    const Lanes& lanes = up.lanes;
    up.logits.row(n, cell, lanes, top.data());
    up.logits.row(n, cell + up.y.next, lanes, bottom.data());
    for (int v = 0; v < lanes.vectors; v++) {
      read(v * LANES);
      Block block{&lanes.first[v * LANES], &lanes.pixels[v * LANES], 0, 0, nullptr, 0};
      for (block.row = up.y.first[cell]; block.row < up.y.first[cell + 1]; block.row++) {
        block.fx = &lanes.fx[lanes.offset[v]], block.fy = up.y.frac[block.row];
        for (block.at = 0; block.at < lanes.most[v];) {
          const int P = smooth && block.at + 4 <= lanes.most[v] ? PIXELS : 1;
          if (P == 1) visit(std::integral_constant<int, 1>(), block);
          else visit(std::integral_constant<int, PIXELS>(), block);
          block.at += P, block.fx += P * LANES;
        }
      }
      end(v * LANES);
    }
  }

 private:
  Quad quad(int k, int x) const {
    const float *t = &top[k * up.lanes.stride + x], *u = &bottom[k * up.lanes.stride + x];
    return {load(t), load(t + up.x.next), load(u), load(u + up.x.next)};
  }
  void read(int x) {
    V floor = largest = splat(-INFINITY), steepest{}, steep_down{}, broken{};
    for (int k = 0; k < K; k++) {
      const auto [a, b, c, d] = quad(k, x);
      largest = max(max(max(a, b), max(c, d)), largest);
      floor = max(min(min(a, b), min(c, d)), floor);  // the best class of any pixel is at least that
      steepest = max(max(abs(b - a), abs(d - c)), steepest);
      steep_down = max(max(abs(c - a), abs(d - b)), steep_down);
      broken += (a + b + c + d) * 0;  // 0, or NaN
      cells[k] = {a, c - a, b - a, (d - c) - (b - a)};
    }
    // with two pixels a cell there is no recurrence
    const V fall = up.x.step > 0.5f ? V{} : max(up.x.step * steepest, up.y.step * steep_down);
    smooth = all(is_smooth(largest, floor, steepest, fall, broken));
    for (int k = 0; k < K && !smooth; k++) quads[k] = quad(k, x);
    std::fill(rows.begin(), rows.end(), -2);
  }
};

// The logit of a pixel in cells that are not smooth, by ATen's formula.
inline V exact(const Quad& q, float fy, V fx) {
  return (1 - fy) * ((1 - fx) * q.top_left + fx * q.top_right) +
         fy * ((1 - fx) * q.bottom_left + fx * q.bottom_right);
}

// e[k*P + p] = exp(logit - shift) of class k at a block's pixels, and their sums over k; -> shift. saw(k, first, slope)
// gets the exponents to base 2: first + fx * slope. Where not STORED, only K of e are used, and none is of use.
template <int P, bool STORED = true, class Saw>
inline V exponentials(Walk& walk, const Block& block, V* e, V* sums, const Saw& saw) {
  const V fx = load(block.fx);
  V total[P] = {}, shift = walk.largest;
  if (P == 1 && !walk.smooth) {
    shift = splat(-INFINITY);
    for (int k = 0; k < walk.K; k++) e[k] = exact(walk.quads[k], block.fy, fx), shift = max(e[k], shift);
    for (int k = 0; k < walk.K; k++) {
      const V exponent = LOG2E * (e[k] - shift);
      saw(k, exponent, V{});
      e[k] = exp2(exponent), total[0] += e[k];
    }
    sums[0] = total[0];
    return shift;
  }
  const float right = walk.up.x.step, down = walk.up.y.step;
  const int place = block.at / PIXELS;
  const bool anew = walk.rows[place] + 1 != block.row;  // also behind rows without labels, which are left out
  if (P > 1) walk.rows[place] = block.row;
  for (int k = 0; k < walk.K; k++, e += P) {
    const Cell& c = walk.cells[k];
    Power& power = walk.powers[place * walk.K + k];
    const V first = LOG2E * (c.a + block.fy * c.down - shift), slope = LOG2E * (c.right + block.fy * c.both);
    saw(k, first, slope);
    V now, m{};
    if (P == 1) {
      now = exp2(first + fx * slope);
    } else if (anew) {
      now = exp2(first + fx * slope), m = exp2_minus_1(right * slope);
      power.e_down = exp2_minus_1(LOG2E * down * (c.down + fx * c.both));
      power.m_down = exp2_minus_1(LOG2E * down * right * c.both);
    } else {
      now = power.e + power.e * power.e_down, m = power.m + (power.m + 1) * power.m_down;
    }
    if (P > 1) power.e = now, power.m = m;
    for (int p = 0; p < P; p++) {
      if (STORED) e[p] = now;
      total[p] += now;
      now += now * m;
    }
  }
  for (int p = 0; p < P; p++) sums[p] = total[p];
  return shift;
}

// A class's gradient in LANES cells, summed over their pixels: plain, times fx, times fy, times both.
struct Sums {
  V one, x, y, xy;

  // Add what the row at fy sums up to: `a` plain, `b` times fx.
  void add(V a, V b, float fy) { one += a, x += b, y += fy * a, xy += fy * b; }
};

// The gradient of a row of cells, on its way to grad (N,K,h,w).
struct Gradient {
  float* grad;
  const int64_t K, h, w, stride;
  std::vector<float> corners[4];  // (K,stride) top left, top right, bottom left, bottom right, each at its point
  std::vector<Sums> sums;         // (K), of the LANES cells at hand

  Gradient(float* grad, const Upsampling& up)
      : grad(grad), K(up.logits.sizes[1]), h(up.logits.sizes[2]), w(up.logits.sizes[3]), stride(up.lanes.stride),
        sums(K) {
    for (auto& corner : corners) corner.resize(K * stride);
  }
  // The cells at x are done.
  void to_corners(int x) {
    for (int64_t k = 0, at = x; k < K; k++, at += stride) {
      Sums& s = sums[k];
      store(&corners[0][at], s.one - s.x - s.y + s.xy);
      store(&corners[1][at + 1], s.x - s.xy);
      store(&corners[2][at], s.y - s.xy);
      store(&corners[3][at + 1], s.xy);
      s.one = s.x = s.y = s.xy = V{};
    }
  }
  // Row `cell` of them is done, in picture n.
  void add(int64_t n, int64_t cell) {
    for (int64_t y = cell; y < std::min(cell + 2, h); y++)
      for (int64_t k = 0; k < K; k++) {
        const float *left = &corners[y == cell ? 0 : 2][k * stride], *right = &corners[y == cell ? 1 : 3][k * stride];
        float* __restrict to = grad + ((n * K + k) * h + y) * w;
        for (int64_t x = 0; x < w; x++) to[x] += left[x] + right[x];
      }
  }
};
