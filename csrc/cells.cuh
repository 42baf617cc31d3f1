// Bilinear interpolation by cells, align_corners=True, for the CUDA kernels.
//
// Four neighbouring low-resolution points span a cell. A block takes 8 cells side by side of a picture and keeps their
// points in shared memory; the grid's x axis holds all blocks. In a cell a class's logit is a + fx*b + fy*(c + fx*d),
// so that down a column of 8 pixels one exponential and a polynomial do: e += e * m from pixel to pixel, with
// m = exp(step) - 1, which costs half an ulp. The largest corner of a cell is subtracted first. Where a logit falls too
// far within a cell, or a corner is not finite, its warp computes pixels one by one by ATen's formula.
//
// A gradient is summed for each class and cell in shared memory: plain, times fx, times fy, times both. A second
// kernel makes of these sums the gradients of the points, each of which has up to four cells around it. So no sum
// needs an atomic, and all have a fixed order.
#pragma once
#include "cuda.cuh"
#include "exponentials.h"

constexpr int CELLS = 8, THREADS = 4;  // cells of a block; a cell's threads, where a warp has all eight
constexpr unsigned ALL = 0xffffffffu;  // threads of a warp

// Logits (N,K,h,w) as they lie in memory.
struct Points {
  const void* data;
  ScalarType type;
  int64_t sizes[4], strides[4];

  explicit Points(const Tensor& t) : data(t.data_ptr()), type(t.scalar_type()) {
    for (int i = 0; i < 4; i++) sizes[i] = t.size(i), strides[i] = t.stride(i);
  }
};

// One axis: n low-resolution points, m output positions, in float32 as ATen computes them; but the last point's
// outputs belong to the cell before it, at fraction 1.
struct Axis {
  int n, m;
  int next;             // from a point to its neighbour; 0 where the axis keeps its size, and every point is alone
  float step, outputs;  // distance of two outputs, in cells; outputs in a cell, about

  Axis(int64_t n, int64_t m)
      : n(n), m(m), next(n != m && n > 1), step(m > 1 ? float(n - 1) / (m - 1) : 0.f),
        outputs(step > 0 ? 1 / step : m) {}
  __host__ __device__ int cells() const { return n - next; }
  __device__ int cell(int o) const { return min(int(__fmul_rn(step, o)), cells() - 1); }
  __device__ float frac(int o) const { return fminf(__fmul_rn(step, o) - cell(o), 1.f); }
  // The first output of cell x, m where there is none at or behind it.
  __device__ int first(int x) const {
    int o = min(int(x * outputs), m);
    while (o > 0 && cell(o - 1) >= x) o--;
    while (o < m && cell(o) < x) o++;
    return o;
  }
};

// As ATen interpolates; to it the last point, here at fraction 1, is a cell of its own at fraction 0: an infinite
// neighbour is not even multiplied by 0.
__device__ inline float blend(float a, float b, float f) {
  if (f == 1) a = b, f = 0;
  return __fadd_rn(__fmul_rn(1 - f, a), __fmul_rn(f, b));
}
__device__ inline float bilinear(float4 c, float fx, float fy) {
  return blend(blend(c.x, c.y, fx), blend(c.z, c.w, fx), fy);
}

// 2^x - 1 for |x| < 126, also where x is close to 0, relative error 3 * 2^-24
__device__ inline float exp2_minus_1(float x) {
  const float shifted = x + 12582912.f, r = x - (shifted - 12582912.f);  // 1.5 * 2^23: its last bits are x, rounded
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return power * (r * exp2_polynomial(r)) + (power - 1);
}

// Sums over each `GROUP` threads of a warp, in one order: a lane gets that of v[lane % COUNT]. All threads call it.
template <int COUNT, int GROUP, class T>
__device__ inline T sum_lanes(T* v) {
  for (int half = COUNT / 2; half; half /= 2)
    for (int i = 0; i < half; i++) {
      const bool upper = threadIdx.x & half;
      v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(ALL, upper ? v[i] : v[i + half], half);
    }
  for (int distance = COUNT; distance < GROUP; distance *= 2) v[0] += __shfl_xor_sync(ALL, v[0], distance);
  return v[0];
}
__device__ inline float max_lanes(float v, int threads) {
  for (int distance = 1; distance < threads; distance *= 2) v = fmaxf(v, __shfl_xor_sync(ALL, v, distance));
  return v;
}

// The cells of all pictures, and how blocks share them.
struct Cells {
  Points logits;
  Axis y, x;
  int K, across;  // classes; blocks in a row of cells
  size_t shared;  // bytes of a block

  // `floats`: how many the kernel keeps of a class and cell: all of Tile's, or 4, the corners alone.
  Cells(const Tensor& t, int64_t height, int64_t width, int floats = 9)
      : logits(t), y(t.size(2), height), x(t.size(3), width), K(t.size(1)), across((x.cells() + CELLS - 1) / CELLS),
        shared(sizeof(float) * floats * CELLS * pitch()) {}
  int64_t blocks() const { return logits.sizes[0] * y.cells() * across; }
  __host__ __device__ int pitch() const { return K | 1; }  // odd: neighbouring cells lie in other banks
};

// A block's cells in shared memory, and which of them is a thread's own.
struct Tile {
  const int K, pitch;
  const int row, first;   // row of cells; the block's first cell in it
  const int64_t n;        // picture
  const int threads, cell;  // threads of a cell; the thread's cell in the block
  // (CELLS, pitch):
  float4* const corners;  // a class's logits: top left, top right, bottom left, bottom right; once `smooth` is true, a
                          // to d above, to base 2
  float4* const sums;     // of a gradient over a cell's pixels: plain, times fx, times fy, times both
  float* const bends;     // 2^(d of one pixel to the right and down) - 1: 1 + m grows by it from a column to the next
  bool smooth = false;    // whether exponentials in the warp's cells go by recurrence; if not, some may not be finite

  // Reads the corners; ends with a barrier.
  __device__ explicit Tile(const Cells& all)
      : K(all.K), pitch(all.pitch()), row(blockIdx.x / all.across % all.y.cells()),
        first(blockIdx.x % all.across * CELLS), n(blockIdx.x / all.across / all.y.cells()), threads(blockDim.x / CELLS),
        cell(threadIdx.x / threads), corners(shared_memory<float4>()), sums(corners + CELLS * pitch),
        bends(reinterpret_cast<float*>(sums + CELLS * pitch)) {
    if (all.logits.type == ScalarType::Float) load<float>(all);
    else if (all.logits.type == ScalarType::Half) load<Half>(all);
    else load<BFloat16>(all);
    __syncthreads();
  }
  __device__ int at(int k) const { return cell * pitch + k; }

  // For exponentials and gradients: sets all but the corners, and these where smooth. A cell's threads share its
  // classes. Ends with a barrier.
  __device__ void prepare(const Cells& all) {
    float largest = -INFINITY, floor = -INFINITY, down = 0, right = 0, broken = 0;
    for (int k = threadIdx.x % threads; k < K; k += threads) {
      const float4 c = corners[at(k)];
      largest = fmaxf(largest, fmaxf(fmaxf(c.x, c.y), fmaxf(c.z, c.w)));
      floor = fmaxf(floor, fminf(fminf(c.x, c.y), fminf(c.z, c.w)));
      down = fmaxf(down, fmaxf(fabsf(c.z - c.x), fabsf(c.w - c.y)));
      right = fmaxf(right, fmaxf(fabsf(c.y - c.x), fabsf(c.w - c.z)));
      broken += (c.x + c.y + c.z + c.w) * 0;
    }
    largest = max_lanes(largest, threads), floor = max_lanes(floor, threads);
    down = max_lanes(down, threads), right = max_lanes(right, threads);
    const float fall = fmaxf(all.y.step * down, all.x.step * right);
    smooth = __all_sync(ALL, is_smooth(largest, floor, fmaxf(down, right), fall, broken));
    const float pixel = all.y.step * fminf(all.x.step, 1);  // where it is more no cell has two columns
    for (int k = threadIdx.x % threads; k < K; k += threads) {
      const float4 c = corners[at(k)];
      const float d = LOG2E * (c.w - c.z - (c.y - c.x));
      sums[at(k)] = make_float4(0, 0, 0, 0), bends[at(k)] = exp2_minus_1(pixel * d);
      if (smooth) corners[at(k)] = make_float4(LOG2E * (c.x - largest), LOG2E * (c.y - c.x), LOG2E * (c.z - c.x), d);
    }
    __syncthreads();
  }
  // After a barrier, to all cells' sums (N,K,rows,columns).
  __device__ void store(float4* to, const Cells& all) const {
    __syncthreads();
    const int x = first + threadIdx.x % CELLS;
    for (int k = threadIdx.x / CELLS; k < K && x < all.x.cells(); k += threads)
      to[((n * K + k) * all.y.cells() + row) * all.x.cells() + x] = sums[threadIdx.x % CELLS * pitch + k];
  }

 private:
  template <class T>
  __device__ void load(const Cells& all) const {
    const int64_t* const strides = all.logits.strides;
    const int x = min(first + int(threadIdx.x) % CELLS, all.x.cells() - 1);
    const int64_t right = all.x.next * strides[3], down = all.y.next * strides[2];
    const T* from = static_cast<const T*>(all.logits.data) + n * strides[0] + row * strides[2] + x * strides[3];
    for (int64_t k = threadIdx.x / CELLS; k < K; k += threads) {
      const T* c = from + k * strides[1];
      corners[threadIdx.x % CELLS * pitch + k] = make_float4(c[0], c[right], c[down], c[down + right]);
    }
  }
};

// A thread's pixels in its cell, C columns and R rows from (y,x): pixel i is in column i / R, row i % R. For
// exponentials it is one where the warp's cells are not smooth, and only there.
template <int C, int R>
struct Patch {
  static constexpr int COLUMNS = C, ROWS = R, PIXELS = C * R;
  const Cells& all;
  const Tile& tile;
  const int y, x, rows, columns;  // the first pixel, and how many there are: no columns in a thread that has none left
  float fy, fx[C];                // where in the cell they lie
  float shift;                    // of one pixel: what `exps` subtracts, in place of the largest corner

  __device__ Patch(const Cells& all, const Tile& tile, int y, int x, int rows, int columns)
      : all(all), tile(tile), y(y), x(x), rows(rows), columns(columns), fy(all.y.frac(y)), shift(-INFINITY) {
    for (int c = 0; c < C; c++) fx[c] = all.x.frac(x + c);
  }
  __device__ bool has(int i) const { return i / R < columns && i % R < rows; }
  __device__ int64_t pixel(int i) const { return (tile.n * all.y.m + y + i % R) * all.x.m + x + i / R; }  // in (N,H,W)
  // logit - shift of class k in pixel i
  __device__ float below(int k, int i) const {
    const float4 p = tile.corners[tile.at(k)];
    if (PIXELS == 1) return bilinear(p, fx[0], fy) - shift;
    const float f = fx[i / R];
    return LN2 * (p.x + f * p.y + (fy + i % R * all.y.step) * (p.z + f * p.w));
  }
  // e[i] = exp(logit - shift) of class k in pixel i
  __device__ void exps(int k, float* e) const {
    if (PIXELS == 1) {
      e[0] = exp2f(LOG2E * below(k, 0));
      return;
    }
    const float4 p = tile.corners[tile.at(k)];
    const float bend = tile.bends[tile.at(k)];
    float m = exp2_minus_1(all.y.step * (p.z + fx[0] * p.w));
    for (int c = 0; c < C; c++) {
      float now = fast_exp2(p.x + fx[c] * p.y + fy * (p.z + fx[c] * p.w));
      for (int r = 0; r < R; r++) e[c * R + r] = now, now += now * m;
      m += m * bend + bend;
    }
  }
  // all[i]: sum of `exps` over the classes
  __device__ void denominators(float* all) {
    float e[PIXELS];
    for (int i = 0; i < PIXELS; i++) all[i] = 0;
    for (int k = 0; k < tile.K && PIXELS == 1; k++)
      shift = fmaxf(shift, bilinear(tile.corners[tile.at(k)], fx[0], fy));
    for (int k = 0; k < tile.K; k++) {
      exps(k, e);
      for (int i = 0; i < PIXELS; i++) all[i] += e[i];
    }
  }
};

// visit(patch) for every patch of a thread, THREADS a cell; all threads of a warp make the same visits, so that these
// may hold shuffles.
template <int C, int R, class Visit>
__device__ void each_patch(const Cells& all, const Tile& tile, const Visit& visit) {
  const int cell = tile.first + tile.cell, top = all.y.first(tile.row), bottom = all.y.first(tile.row + 1);
  const int left = all.x.first(cell), right = all.x.first(cell + 1);  // both W outside of the picture
  for (int x = left + threadIdx.x % THREADS * C; __any_sync(ALL, x < right); x += THREADS * C)
    for (int y = top; y < bottom; y += R)
      visit(Patch<C, R>(all, tile, y, x, min(bottom - y, R), min(max(right - x, 0), C)));
}

// Cells' sums (N,K,rows,columns) to their points' gradients (N,K,h,w), a row of points a warp; and the sum of all
// losses, if there are any.
static __global__ void __launch_bounds__(256) to_points(const float4* sums, int rows, int columns, float* grad, int h,
                                                        int w, unsigned lines, const float* losses, int64_t count,
                                                        float* total) {
  const unsigned lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  for (unsigned line = warp; line < lines; line += gridDim.x * (blockDim.x / 32)) {
    const int y = line % h;
    auto cell = [&](int y, int x) {
      const bool is = y >= 0 && y < rows && x >= 0 && x < columns;
      return is ? sums[(int64_t(line / h) * rows + y) * columns + x] : make_float4(0, 0, 0, 0);
    };
    for (int x = lane; x < w; x += 32) {
      const float4 a = cell(y - 1, x - 1), b = cell(y - 1, x), c = cell(y, x - 1), d = cell(y, x);
      grad[int64_t(line) * w + x] = a.w + (b.z - b.w) + (c.y - c.w) + (d.x - d.y - d.z + d.w);
    }
  }
  if (warp || !total) return;
  double sum = 0;
#pragma unroll 16
  for (int64_t i = lane; i < count; i += 32) sum += losses[i];
  sum = sum_lanes<1, 32>(&sum);
  if (lane == 0) *total = sum;
}

// What the kernels write, and `finish` makes of it: a gradient (N,K,h,w) of sums over cells, both empty where it is
// not wanted; the total of `count` losses.
struct Results {
  Tensor grad, sums, losses, total;

  Results(const Tensor& logits, const Cells& all, bool with_grad, int64_t count)
      : grad(floats(logits, 0)),
        sums(floats(logits, with_grad * 4 * logits.size(0) * all.K * all.y.cells() * all.x.cells())),
        losses(floats(logits, count)), total(torch::stable::new_empty(logits, {}, ScalarType::Float)) {
    if (with_grad) grad = torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float);
  }
  static Tensor floats(const Tensor& like, int64_t count) {
    return torch::stable::new_empty(like, {count}, ScalarType::Float);
  }
  float4* cells() const { return static_cast<float4*>(sums.mutable_data_ptr()); }
  void finish(const Launcher& launch, const Cells& all) const {
    const unsigned lines = grad.numel() / all.x.n;
    launch(to_points, std::clamp(lines / 8, 1u, 4096u), 256, 0, cells(), all.y.cells(), all.x.cells(),
           grad.mutable_data_ptr<float>(), all.y.n, all.x.n, lines, losses.const_data_ptr<float>(), losses.numel(),
           losses.numel() ? total.mutable_data_ptr<float>() : nullptr);
  }
};
