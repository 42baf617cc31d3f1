// Bilinear interpolation by columns of cells, align_corners=True, for the CUDA kernels.
//
// Four neighbouring low-resolution points span a cell. A block has a row of cells side by side of one picture, and LANES threads
// for each: thread i of a cell has the columns i, i + LANES, ... of its pixels, so that a warp reads and writes pixels side by
// side where a cell has 8. Down a column in a cell a class's logit is linear, so one exponential and a polynomial serve ROWS
// pixels: from one to the next e += e * m, m = exp(step) - 1, which costs half an ulp. The shift that keeps exponentials in range
// is the cell's largest corner; where a logit falls too far within a cell, or a corner is not finite, pixels are computed one by
// one by ATen's formula.
#pragma once
#include "tile.cuh"

// One axis: n low-resolution points, m output positions, in float32 as ATen computes them; but the last point's outputs belong to
// the cell before it, at fraction 1.
struct Axis {
  int n, m;
  float step, outputs;  // distance of two outputs, in cells; outputs in a cell, about

  Axis(int n, int m) : n(n), m(m), step(m > 1 ? float(n - 1) / (m - 1) : 0.f), outputs(step > 0 ? 1 / step : m) {}
  __host__ __device__ int cells() const { return n > 1 ? n - 1 : 1; }
  __device__ int cell(int o) const { return min(int(__fmul_rn(step, o)), cells() - 1); }
  __device__ float frac(int o) const { return fminf(__fmul_rn(step, o) - cell(o), 1.f); }
  // The first output of cell x, m where there is none at or behind it.
  __device__ int first(int x) const {
    if (x <= 0 || step == 0) return x <= 0 ? 0 : m;
    if (x >= cells()) return m;
    int o = min(int(x * outputs), m);
    while (o > 0 && cell(o - 1) >= x) o--;
    while (o < m && cell(o) < x) o++;
    return o;
  }
};

// As ATen interpolates finite numbers.
__device__ inline float mix(float a, float b, float f) { return __fadd_rn(__fmul_rn(1 - f, a), __fmul_rn(f, b)); }
// As it interpolates any: to it the last point, here at fraction 1, is a cell of its own at fraction 0, where infinity is NaN.
__device__ inline float interpolate(float a, float b, float f) { return f == 1 ? mix(b, b, 0) : mix(a, b, f); }

// 2^x - 1 for |x| < 126, also where x is close to 0, relative error 3 * 2^-24
__device__ inline float exp2_minus_1(float x) {
  const float shifted = x + 12582912.f, r = x - (shifted - 12582912.f);  // 1.5 * 2^23: its last bits are x, rounded
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return power * (r * exp2_polynomial(r)) + (power - 1);
}

// A thread's pixels, ROWS of them down a column in its cell.
struct Column {
  const Tile& tile;
  float fx, fy[ROWS];   // where in the cell they lie
  float start;          // the first one's fy, in rows of pixels
  unsigned needed;      // bit r: exponentials of the r-th pixel are wanted
  float shift[ROWS];    // what `exps` subtracts where the cell is not smooth

  // To be called before `exps`.
  __device__ void need(unsigned rows) {
    needed = rows;
    for (int r = 0; r < ROWS; r++) shift[r] = -INFINITY;
    for (int k = 0; k < tile.K && !tile.smooth; k++)
      for (int r = 0; r < ROWS; r++) shift[r] = fmaxf(shift[r], logit(k, r));
  }
  // By ATen's formula.
  __device__ float logit(int k, int r) const {
    const float4 c = tile.corners[tile.at(k)];
    return interpolate(interpolate(c.x, c.y, fx), interpolate(c.z, c.w, fx), fy[r]);
  }
  // The exponent to base 2 of class k in the first pixel, and what it grows by from one to the next, where the cell is smooth.
  __device__ float2 exponents(int k) const {
    const float4 p = tile.powers[tile.at(k)];
    const float slope = p.z + fx * p.w;
    return make_float2(p.x + fx * p.y + start * slope, slope);
  }
  // logit - shift of class k
  __device__ float below(int k, int r) const {
    if (!tile.smooth) return logit(k, r) - shift[r];
    const float2 p = exponents(k);
    return LN2 * (p.x + r * p.y);
  }
  // e[r] = exp(logit - shift) of class k; finite where the pixel is not needed.
  __device__ void exps(int k, float* e) const {
    if (tile.smooth) {
      const float2 p = exponents(k);
      const float m = exp2_minus_1(p.y);
      float now = fast_exp2(p.x);
      for (int r = 0; r < ROWS; r++) {
        e[r] = now;
        now += now * m;
      }
    } else {
      for (int r = 0; r < ROWS; r++) e[r] = needed >> r & 1 ? exp2f(LOG2E * (logit(k, r) - shift[r])) : 0;
    }
  }
  // all[r] = sum of `exps` over the classes
  __device__ void denominators(float* all) const {
    float e[ROWS];
    for (int r = 0; r < ROWS; r++) all[r] = 0;
    for (int k = 0; k < tile.K; k++) {
      exps(k, e);
      for (int r = 0; r < ROWS; r++) all[r] += e[r];
    }
  }
  // The class of the largest logit of each pixel, the lowest on a tie, the first NaN where there is one.
  __device__ void argmax(int* arg) const {
    float best[ROWS];
    for (int r = 0; r < ROWS; r++) best[r] = -INFINITY, arg[r] = 0;
    for (int k = 0; k < tile.K && tile.smooth; k++) {
      const float4 c = tile.corners[tile.at(k)];
      const float top = mix(c.x, c.y, fx), bottom = mix(c.z, c.w, fx);
      for (int r = 0; r < ROWS; r++) {
        const float now = mix(top, bottom, fy[r]);
        if (now > best[r]) best[r] = now, arg[r] = k;
      }
    }
    for (int k = 0; k < tile.K && !tile.smooth; k++)
      for (int r = 0; r < ROWS; r++) {
        const float now = logit(k, r);
        if (now > best[r] || (now != now && best[r] == best[r])) best[r] = now, arg[r] = k;
      }
  }
};

// Walks a thread over its columns and rows: visit(column, x, y, rows) for every ROWS pixels down from (y,x), of which `rows` are
// there, 0 in a thread that has none left: all threads of a warp make the same visits, so that these may hold shuffles.
struct Walk {
  Axis y, x;

  template <class Visit>
  __device__ void operator()(const Tile& tile, const Visit& visit) const {
    const int cell = tile.first + int(threadIdx.x) / LANES, begin = y.first(tile.row), end = y.first(tile.row + 1);
    const bool inside = cell >= 0 && cell < x.cells();
    const int right = inside ? x.first(cell + 1) : 0;
    Column column{tile};
    for (int at = (inside ? x.first(cell) : 0) + threadIdx.x % LANES; __any_sync(ALL, at < right); at += LANES)
      for (int row = begin; row < end; row += ROWS) {
        column.fx = at < right ? x.frac(at) : 0;
        for (int r = 0; r < ROWS; r++) column.fy[r] = fminf(__fmul_rn(y.step, min(row + r, end - 1)) - tile.row, 1.f);
        column.start = y.step > 0 ? column.fy[0] * y.outputs : 0;
        visit(column, at, row, at < right ? min(end - row, ROWS) : 0);
      }
  }
};

// The blocks for all cells: 16 cells in each, or fewer where they and `more` bytes do not fit into its shared memory.
struct Grid {
  Kinds kinds;
  int cells;
  dim3 blocks;
  size_t shared;

  Grid(const Launcher& launch, const Tensor& logits, const Walk& walk, Kinds kinds, size_t more = 0) : kinds(kinds), cells(16) {
    auto bytes = [&] { return Tile::bytes(logits.size(1), cells, kinds) + more; };
    if (bytes() > SHARED) cells = 8;
    if (bytes() > launch.most_shared) cells = 4;
    shared = bytes();
    const int own = kinds == SUMS ? cells - 1 : cells, across = kinds == SUMS ? logits.size(3) : walk.x.cells();
    blocks = dim3((across + own - 1) / own, walk.y.cells(), logits.size(0));
  }
  int count() const { return blocks.x * blocks.y * blocks.z; }

  // kernel(problem, round), in two rounds where gradients are summed
  template <class Problem>
  void operator()(const Launcher& launch, void (*kernel)(Problem, int), const Problem& problem) const {
    for (unsigned round = 0, rounds = kinds == SUMS ? 2 : 1; round < rounds && round < blocks.y; round++)
      launch(kernel, dim3(blocks.x, (blocks.y + rounds - 1 - round) / rounds, blocks.z), cells * LANES, shared, problem, int(round));
  }
};
