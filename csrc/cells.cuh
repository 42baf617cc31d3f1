// Bilinear interpolation by columns of cells, align_corners=True, for the CUDA kernels.
//
// Four neighbouring low-resolution points span a cell. A block has a row of `cells` cells side by side of one picture, and LANES
// threads for each: thread i of a cell has the columns i, i + LANES, ... of its pixels, so that a warp reads and writes pixels
// side by side. Down a column in a cell a class's logit is linear, so two exponentials serve ROWS pixels: from one to the next
// e += e * m, m = exp(step) - 1, which costs half an ulp. The shift that keeps exponentials in range is the column's largest
// end; where a logit falls too far within a cell, or an end is not finite, pixels are computed one by one by ATen's formula.
#pragma once
#include "cuda.cuh"

constexpr int LANES = 8, ROWS = 8;
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

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
  int most() const { return int(outputs) + 3; }  // outputs in a cell, at the most
};

// Logits (N,K,h,w) as they lie in memory.
template <class T>
struct Points {
  const T* data;
  int64_t sizes[4], strides[4];

  Points(const T* data, const Tensor& t) : data(data) {
    for (int i = 0; i < 4; i++) sizes[i] = t.size(i), strides[i] = t.stride(i);
  }
  __device__ float at(int64_t n, int64_t k, int64_t y, int64_t x) const {
    return float(data[n * strides[0] + k * strides[1] + y * strides[2] + x * strides[3]]);
  }
};

// The points of a block's cells in shared memory: (K, 2, cells + 1).
struct Tile {
  float* points;
  int K, cells;

  __host__ __device__ static size_t bytes(int K, int cells) { return sizeof(float) * K * 2 * (cells + 1); }

  // Points y and y + 1 of picture n, from x on (x may be -1: the cell left of the first). To be followed by a barrier.
  template <class T>
  __device__ void load(const Points<T>& from, int64_t n, int y, int x) const {
    const int width = cells + 1;
    for (int i = threadIdx.x; i < K * 2 * width; i += blockDim.x) {
      const int64_t k = i / (2 * width), row = min(int64_t(y + i / width % 2), from.sizes[2] - 1);
      points[i] = from.at(n, k, row, min(max(int64_t(x + i % width), int64_t(0)), from.sizes[3] - 1));
    }
  }
};

__device__ inline float lerp(float a, float b, float f) { return f == 1 ? b : __fadd_rn(__fmul_rn(1 - f, a), __fmul_rn(f, b)); }

// 2^x - 1 for |x| < 126, relative error 3 * 2^-24, also where x is close to 0 (the polynomial of vec.h)
__device__ inline float exp2_minus_1(float x) {
  const float n = rintf(x), r = x - n, power = exp2f(n);
  float p = r * 0.000154035122f + 0.00133907353f;
  p = p * r + 0.00961823761f;
  p = p * r + 0.0555035733f;
  p = p * r + 0.240226492f;
  p = p * r + 0.693147182f;
  return power * (r * p) + (power - 1);
}

// A thread's column of pixels in its cell.
struct Column {
  const float* corner;  // of class 0 at the top left
  int width;            // of a row of the tile
  float fx, fy[ROWS];   // where in the cell its pixels lie
  float step;           // from one fy to the next
  float shift[ROWS];    // what `exps` subtracts
  bool smooth;          // for exponentials by recurrence: finite, and none underflows that matters

  __device__ float top(int k) const { return lerp(corner[2 * k * width], corner[2 * k * width + 1], fx); }
  __device__ float bottom(int k) const { return lerp(corner[(2 * k + 1) * width], corner[(2 * k + 1) * width + 1], fx); }

  // Look at all classes: set `shift` and `smooth`.
  __device__ void survey(int K) {
    float largest = -INFINITY, floor = -INFINITY, steepest = 0, broken = 0;
    for (int k = 0; k < K; k++) {
      const float a = top(k), b = bottom(k);
      largest = fmaxf(largest, fmaxf(a, b));
      floor = fmaxf(floor, fminf(a, b));  // the best class of any pixel is at least that
      steepest = fmaxf(steepest, fabsf(b - a));
      broken += (a + b) * 0;  // 0, or NaN
    }
    // a step that falls by 4 costs e^4 roundings in the next pixel
    smooth = largest - floor + steepest < 64 && largest - floor < 40 && broken == 0 && step * steepest < 4;
    for (int r = 0; r < ROWS; r++) shift[r] = largest;
    for (int k = 0; k < K && !smooth; k++) {
      const float a = top(k), b = bottom(k);
      for (int r = 0; r < ROWS; r++) shift[r] = k == 0 ? lerp(a, b, fy[r]) : fmaxf(shift[r], lerp(a, b, fy[r]));
    }
  }
  // e[r] = exp(logit - shift) of class k
  __device__ void exps(int k, float* e) const {
    const float a = top(k), b = bottom(k);
    if (!smooth) {
      for (int r = 0; r < ROWS; r++) e[r] = exp2f(LOG2E * (lerp(a, b, fy[r]) - shift[r]));
      return;
    }
    const float slope = LOG2E * (b - a), m = exp2_minus_1(step * slope);
    float now = exp2f(LOG2E * (a - shift[0]) + fy[0] * slope);
    for (int r = 0; r < ROWS; r++) {
      e[r] = now;
      now += now * m;
    }
  }
  // The class of the largest logit of each pixel, the lowest on a tie, the first NaN where there is one; and that logit.
  __device__ void argmax(int K, float* best, int* arg) const {
    for (int r = 0; r < ROWS; r++) best[r] = -INFINITY, arg[r] = 0;
    for (int k = 0; k < K; k++) {
      const float a = top(k), b = bottom(k);
      for (int r = 0; r < ROWS; r++) {
        const float logit = lerp(a, b, fy[r]);
        if (logit > best[r] || (logit != logit && best[r] == best[r])) best[r] = logit, arg[r] = k;
      }
    }
  }
};

// Walks a thread over its columns and rows: visit(column, x, y, rows) for every ROWS pixels down from (y,x). x is -1 and rows 0 in
// a thread that has none left: all threads of a block make the same number of visits, so a visit may hold barriers and shuffles.
struct Walk {
  Axis y, x;
  int columns;  // visits side by side: enough for the widest cell

  Walk(const Axis& y, const Axis& x) : y(y), x(x), columns((std::min(x.most(), x.m) + LANES - 1) / LANES) {}

  template <class Visit>
  __device__ void operator()(const Tile& tile, int row_of_cells, int first_cell, const Visit& visit) const {
    const int local = threadIdx.x / LANES, lane = threadIdx.x % LANES, cell = first_cell + local;
    const int begin = y.first(row_of_cells), end = y.first(row_of_cells + 1);
    const bool inside = cell >= 0 && cell < x.cells();
    const int left = inside ? x.first(cell) : 0, right = inside ? x.first(cell + 1) : 0;
    Column column{tile.points + local, tile.cells + 1};
    column.step = y.step;
    for (int c = 0; c < columns; c++)
      for (int row = begin; row < end; row += ROWS) {
        const int at = left + lane + c * LANES;
        const bool here = at < right;
        column.fx = here ? x.frac(at) : 0;
        for (int r = 0; r < ROWS; r++) column.fy[r] = y.frac(min(row + r, end - 1));
        visit(column, here ? at : -1, row, here ? min(end - row, ROWS) : 0);
      }
  }
};

// Sums over a cell's LANES threads: lane 0 of them has sum(a), lane 1 sum(b), lane 2 sum(c), lane 3 sum(d).
__device__ inline float sum_over_cell(float a, float b, float c, float d) {
  const unsigned all = 0xffffffffu;
  const int lane = threadIdx.x % LANES;
  const bool odd = lane & 1, upper = lane & 2;
  // lanes with an odd number keep b and d, the even ones a and c; then those with bit 1 the second of the two
  float p = (odd ? b : a) + __shfl_xor_sync(all, odd ? a : b, 1), q = (odd ? d : c) + __shfl_xor_sync(all, odd ? c : d, 1);
  float s = (upper ? q : p) + __shfl_xor_sync(all, upper ? p : q, 2);
  return s + __shfl_xor_sync(all, s, 4);
}

// A class's gradient at the points around a block's cells: four sums a cell in shared memory (K, cells, 4): plain, times fx, times
// fy, times both. Zero it, add to it, and write it behind a barrier each.
struct Corners {
  float* sums;
  int K, cells;

  __host__ __device__ static size_t bytes(int K, int cells) { return sizeof(float) * K * cells * 4; }

  __device__ void clear() const {
    for (int i = threadIdx.x; i < K * cells * 4; i += blockDim.x) sums[i] = 0;
  }
  // What the pixels of the thread's column sum up to: `a` plain, `b` times fy. Called by all threads of a warp.
  __device__ void add(int k, float fx, float a, float b) const {
    const float s = sum_over_cell(a, fx * a, b, fx * b);
    if (threadIdx.x % LANES < 4) sums[(k * cells + threadIdx.x / LANES) * 4 + threadIdx.x % LANES] += s;
  }
  // To grad (N,K,h,w), sizes being N, K, h, w: the points between the cells of row `row`, the first one being `first`. Even rows
  // write, odd rows, in a later launch, add: no two blocks meet. The last row of points has no cells below.
  __device__ void write(float* grad, int64_t n, const int64_t* sizes, int row, int first, int odd) const {
    for (int i = threadIdx.x; i < K * (cells - 1); i += blockDim.x) {
      const int k = i / (cells - 1), c = i % (cells - 1);
      const int64_t x = first + 1 + c, h = sizes[2], w = sizes[3];
      if (x >= w) continue;
      const float *l = &sums[(k * cells + c) * 4], *r = l + 4;  // of the cells left and right of the point
      const float above = l[1] - l[3] + (r[0] - r[1] - r[2] + r[3]), below = l[3] + (r[2] - r[3]);
      float* to = grad + ((n * K + k) * h + row) * w + x;
      to[0] = odd ? to[0] + above : above;
      if (row + 1 < h) to[w] = odd && row + 1 < h - 1 ? to[w] + below : below;
    }
  }
};

// How many cells a block takes so that its shared memory, bytes(cells), is no more than every GPU has.
template <class F>
int cells_of_a_block(const F& bytes) {
  int cells = 16;
  while (cells > 4 && bytes(cells) > SHARED) cells /= 2;
  return cells;
}

// Sum over a warp, in one order; every lane has it.
template <class V>
__device__ V warp_sum(V value) {
  for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
