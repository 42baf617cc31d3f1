// Bilinear interpolation by cells, align_corners=True: four neighbouring points of the logits' grid span a cell.
//
//  top_left - - - - - - - top_right     At the fractions fx and fy of the cell, both in 0..1, a class's logit is
//     |         : fy          |            A + fx * B, with A = a + fy * down and B = right + fy * both, where
//     |   fx    :             |            a = top_left               down = bottom_left - top_left
//     | . . . . P             |            right = top_right - a      both = bottom_right - bottom_left - right
//     |                       |          Along a row of pixels fy, and so A and B, are constants.
//  bottom_left  - - - - bottom_right
//
// A vector holds the same pixel of LANES neighbouring cells, so that logits are read, and their gradients written, in
// memory order. Each operator's file opens with a naive kernel of one image in float32, which uses this code:
//
// ```cpp
// // The points around the output pixel (Y,X) and their weights.
// struct Neighbours {
//   int point[4];
//   float weight[4];
//   Neighbours(int h, int w, int H, int W, int Y, int X) {
//     const float y = H > 1 ? float(h - 1) / (H - 1) * Y : 0, x = W > 1 ? float(w - 1) / (W - 1) * X : 0;
//     for (int i = 0; i < 4; i++) {
//       const int row = std::min(int(y) + i / 2, h - 1), column = std::min(int(x) + i % 2, w - 1);
//       const float fy = y - int(y), fx = x - int(x);
//       point[i] = row * w + column;
//       weight[i] = (i / 2 ? fy : 1 - fy) * (i % 2 ? fx : 1 - fx);
//     }
//   }
//   float logit(const float* z) const {  // z: (h,w), the logits of one class
//     return weight[0] * z[point[0]] + weight[1] * z[point[1]] + weight[2] * z[point[2]] + weight[3] * z[point[3]];
//   }
// };
// ```
#pragma once
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "vec.h"

constexpr int PIXELS = 8;  // pixels of a row of a cell that are computed at once

inline void check_class(const char* name, int64_t id, int64_t K) {
  if (id < 0 || id >= K)
    throw std::invalid_argument(std::string(name) + " holds " + std::to_string(id) + ", outside 0.." +
                                std::to_string(K - 1) + " and not ignored");
}

// Writes n ids as bytes, NONE for `ignore` and for ids outside 0..K-1. Returns whether another one was outside.
template <class T>
bool read_ids(const T* __restrict from, int64_t n, T K, int64_t ignore, uint8_t* __restrict to) {
  const T ignored_id = ignore, can_ignore = int64_t(ignored_id) == ignore;
  T wrong = 0;
  for (int64_t i = 0; i < n; i++) {
    const T ignored = can_ignore & (from[i] == ignored_id), outside = from[i] >= K;
    wrong |= outside & ~ignored;
    to[i] = ignored | outside ? NONE : from[i];
  }
  return wrong;
}
inline bool read_ids(const ClassIds& ids, int64_t begin, int64_t n, int64_t K, int64_t ignore, uint8_t* to) {
  if (ids.is_int64) return read_ids<uint64_t>(static_cast<const uint64_t*>(ids.data) + begin, n, K, ignore, to);
  return read_ids<uint8_t>(static_cast<const uint8_t*>(ids.data) + begin, n, K, ignore, to);
}

// An axis with the cell and the fraction of each output. The last point is a cell of its own.
struct AxisTable : Axis {
  std::vector<int> first;       // (points+1) cell x holds the outputs first[x] .. first[x+1] - 1
  std::vector<int> cell;        // (outputs)
  std::vector<float> fraction;  // (outputs)

  AxisTable(int64_t points, int64_t outputs) : Axis(points, outputs), first(points + 1, outputs), cell(outputs),
                                             fraction(outputs) {
    for (int o = outputs - 1, above = points; o >= 0; o--) {
      const float position = step * o;
      const int x = cell[o] = std::min(int(position), this->points - 1);
      fraction[o] = x == points - 1 ? 0.f : std::min(position - x, 1.f);
      while (above > x + 1) first[--above] = o + 1;  // cells without outputs
      first[above = x] = o;
    }
  }
  int count(int x) const { return x < points ? first[x + 1] - first[x] : 0; }
};

// The columns of the output, grouped into vectors of LANES cells.
struct ColumnLayout {
  int vectors, row_size;           // row_size: floats of a row of points with padding
  std::vector<int> first, count;   // (vectors * LANES) a cell's first column, and how many it has
  std::vector<int> most, offset;   // (vectors) the largest `count`; index in `fx` of the first pixels
  std::vector<float> fx;           // (sum of most, LANES) fractions

  explicit ColumnLayout(const AxisTable& x)
      : vectors((x.points + LANES - 1) / LANES), row_size((vectors + 1) * LANES) {
    for (int cell = 0; cell < vectors * LANES; cell++) {
      first.push_back(x.first[std::min(cell, x.points)]);
      count.push_back(x.count(cell));
    }
    for (int v = 0; v < vectors; v++) {
      const int* counts = &count[v * LANES];
      most.push_back(*std::max_element(counts, counts + LANES));
      offset.push_back(fx.size());
      for (int j = 0; j < most[v]; j++)
        for (int l = 0; l < LANES; l++) fx.push_back(j < counts[l] ? x.fraction[first[v * LANES + l] + j] : 0.f);
    }
    fx.resize(fx.size() + (PIXELS - 1) * LANES);  // the last block may reach that far
  }
};

// P pixels of an output row in each of LANES cells.
struct PixelBlock {
  const int *first_columns, *counts;  // (LANES) first output column of each cell; number of its columns
  int row, offset;                    // output row; the block's first pixel in each cell
  const float* fx;                    // (P * LANES) pixel p of lane l is at fx[p * LANES + l]
  float fy;
  int column(int lane) const { return first_columns[lane] + offset; }
  int count(int lane, int P) const { return std::clamp(counts[lane] - offset, 0, P); }
};

// Calls task(image, row) for each row of cells; each thread creates its own task. With two rounds all even rows run
// before the odd ones, so that a task may add to its own row and to the next one without a race. The bits of the result
// do not depend on the number of threads.
template <class MakeTask>
void parallel_rows(int64_t images, int64_t rows, int rounds, const MakeTask& make_task) {
  for (int round = 0; round < rounds; round++) {
    const int64_t rows_of_round = (rows + rounds - 1 - round) / rounds;
    torch::stable::parallel_for(0, images * rows_of_round, 1, [&](int64_t begin, int64_t end) {
      auto task = make_task();
      for (int64_t i = begin; i < end; i++) task(i / rows_of_round, i % rows_of_round * rounds + round);
    });
  }
}

// What all threads share: logits (N,K,h,w), contiguous float32, and the axes of their upsampling.
struct Upsampling {
  const float* logits;
  const int64_t K;
  AxisTable y, x;
  ColumnLayout columns;

  Upsampling(const Tensor& t, int64_t height, int64_t width)
      : logits(t.const_data_ptr<float>()), K(t.size(1)), y(t.size(2), height), x(t.size(3), width), columns(x) {}

  // Copies row `row` of image n to to[k * row_size ...]; the last point is repeated up to the end.
  void read_row(int64_t n, int64_t row, float* to) const {
    const float* from = logits + (n * K * y.points + std::min<int64_t>(row, y.points - 1)) * x.points;
    for (int64_t k = 0; k < K; k++, from += y.points * x.points, to += columns.row_size) {
      std::copy(from, from + x.points, to);
      std::fill(to + x.points, to + columns.row_size, to[x.points - 1]);
    }
  }
};

// One class in LANES cells: its logits at the corners, and the coefficients of the formula at the top.
struct Corners {
  Floats top_left, top_right, bottom_left, bottom_right;
  // A pixel's logit, in ATen's order of operations.
  Floats interpolate(Floats fx, float fy) const {
    return (1 - fy) * ((1 - fx) * top_left + fx * top_right) + fy * ((1 - fx) * bottom_left + fx * bottom_right);
  }
};
struct BilinearCoeffs {
  Floats a, down, right, both;
};
// A class's exponent to base 2 in a row of a cell: first + fx * slope.
struct Exponent {
  Floats first, slope;
};

// Goes over cells, LANES of them at a time. Each thread has its own.
struct CellIterator {
  const Upsampling& up;
  const int K;
  int x = 0;                           // the first of the current cells
  std::vector<float> top, bottom;      // (K,row_size) the rows of points above and below
  std::vector<BilinearCoeffs> coeffs;  // (K) of the current cells
  std::vector<Exponent> exponents;     // (K) of the current block, set by exponentials()
  bool smooth = true;                  // see is_smooth(); if false, blocks have one pixel and corners() are to be used
  Floats largest{};                    // corner of each current cell, over all classes

  explicit CellIterator(const Upsampling& up)
      : up(up), K(up.K), top(K * up.columns.row_size), bottom(top), coeffs(K), exponents(K) {}

  Corners corners(int k) const {
    const float *above = &top[k * up.columns.row_size + x], *below = &bottom[k * up.columns.row_size + x];
    return {load(above), load(above + up.x.next), load(below), load(below + up.x.next)};
  }

  // Goes over the row of cells between the points' rows `row` and `row` + 1 of image n. For each LANES cells it calls
  // visit(P, block) for blocks of P pixels, P being an integral_constant, PIXELS or 1; then end().
  template <class Visit, class End>
  void for_each_block(int64_t n, int64_t row, const Visit& visit, const End& end) {
    const ColumnLayout& columns = up.columns;
    up.read_row(n, row, top.data());
    up.read_row(n, row + up.y.next, bottom.data());
    for (int v = 0; v < columns.vectors; v++) {
      x = v * LANES;
      read_cells();
      PixelBlock block{&columns.first[x], &columns.count[x], 0, 0, nullptr, 0};
      for (block.row = up.y.first[row]; block.row < up.y.first[row + 1]; block.row++) {
        block.fx = &columns.fx[columns.offset[v]];
        block.fy = up.y.fraction[block.row];
        for (block.offset = 0; block.offset < columns.most[v];) {
          const int P = smooth && block.offset + 4 <= columns.most[v] ? PIXELS : 1;  // fewer left: one by one
          if (P == 1) visit(std::integral_constant<int, 1>(), block);
          else visit(std::integral_constant<int, PIXELS>(), block);
          block.offset += P, block.fx += P * LANES;
        }
      }
      end();
    }
  }

 private:
  void read_cells() {
    Floats lowest_best = largest = splat(-INFINITY), max_right{}, nonfinite{};
    for (int k = 0; k < K; k++) {
      const auto [a, b, c, d] = corners(k);
      largest = max(max(max(a, b), max(c, d)), largest);
      lowest_best = max(min(min(a, b), min(c, d)), lowest_best);
      max_right = max(max(abs(b - a), abs(d - c)), max_right);
      nonfinite += (a + b + c + d) * 0;  // 0, or NaN
      coeffs[k] = {a, c - a, b - a, (d - c) - (b - a)};
    }
    // rows start anew: no limit between them; nor in cells of at most two columns, whose blocks have one pixel
    const Floats max_step = up.x.step > 0.5f ? Floats{} : up.x.step * max_right;
    const Ints mask = is_smooth(largest, lowest_best, max_step, nonfinite);
    smooth = true;
    for (int l = 0; l < LANES; l++) smooth &= mask[l] != 0;
  }
};

// Computes exp(logit - shift) of a block's pixels and returns the shift. Class k at pixel p goes to e[k*P + p] unless e
// is null, the sums over the classes go to sums[p], and the exponents to cells.exponents.
template <int P>
inline Floats exponentials(CellIterator& cells, const PixelBlock& block, Floats* e, Floats* sums) {
  const Floats fx = load(block.fx);
  Floats total[P] = {}, shift = P == 1 ? splat(-INFINITY) : cells.largest;
  for (int k = 0; k < cells.K && P == 1; k++) {
    cells.exponents[k].first = cells.corners(k).interpolate(fx, block.fy);
    shift = max(cells.exponents[k].first, shift);
  }
  for (int k = 0; k < cells.K; k++) {
    const BilinearCoeffs& c = cells.coeffs[k];
    Exponent& exponent = cells.exponents[k];
    Floats now, m{};
    if (P == 1) {
      exponent = {LOG2E * (exponent.first - shift), Floats{}};
      now = exp2(exponent.first);
    } else {
      exponent = {LOG2E * (c.a + block.fy * c.down - shift), LOG2E * (c.right + block.fy * c.both)};
      now = exp2(exponent.first + fx * exponent.slope);
      m = exp2_minus_1(cells.up.x.step * exponent.slope);
    }
    for (int p = 0; p < P; p++) {
      if (e) e[k * P + p] = now;
      total[p] += now;
      now += now * m;
    }
  }
  for (int p = 0; p < P; p++) sums[p] = total[p];
  return shift;
}

// The gradient of a class's logit in LANES cells, summed over their pixels: plain, times fx, times fy, times both.
struct GradientSums {
  Floats plain, x, y, xy;
  // Adds a row of pixels: `sum` is the sum of its gradients, `sum_x` the sum of gradients times fx.
  void add(Floats sum, Floats sum_x, float fy) {
    plain += sum, x += sum_x;
    y += fy * sum, xy += fy * sum_x;
  }
};

// Collects the gradient of a row of cells and adds it to grad (N,K,h,w).
struct Gradient {
  float* grad;
  const int64_t K, h, w, row_size;
  std::vector<float> corners;      // (4,K,row_size) top left, top right, bottom left, bottom right, at its column
  std::vector<GradientSums> sums;  // (K) of the current cells

  Gradient(float* grad, const Upsampling& up)
      : grad(grad), K(up.K), h(up.y.points), w(up.x.points), row_size(up.columns.row_size),
        corners(4 * K * row_size), sums(K) {}
  float* corner(int i, int64_t k) { return &corners[(i * K + k) * row_size]; }
  // Moves the sums of the cells at x to their corners.
  void finish_cells(int x) {
    for (int64_t k = 0; k < K; k++) {
      GradientSums& s = sums[k];
      store(corner(0, k) + x, s.plain - s.x - s.y + s.xy);
      store(corner(1, k) + x + 1, s.x - s.xy);
      store(corner(2, k) + x, s.y - s.xy);
      store(corner(3, k) + x + 1, s.xy);
      s = GradientSums{};
    }
  }
  // Adds the corners of a row of cells in image n to the gradient.
  void finish_row(int64_t n, int64_t row) {
    for (int64_t y = row; y < std::min(row + 2, h); y++)
      for (int64_t k = 0; k < K; k++) {
        const float *left = corner(y == row ? 0 : 2, k), *right = corner(y == row ? 1 : 3, k);
        float* __restrict to = grad + ((n * K + k) * h + y) * w;
        for (int64_t x = 0; x < w; x++) to[x] += left[x] + right[x];
      }
  }
};
