// Bilinear interpolation by cells, align_corners=True, for the CUDA kernels. cells.h has a drawing of a cell.
//
// A block takes 8 cells side by side and keeps their corners in shared memory; all blocks lie along the grid's x axis.
// In a cell a class's logit is a + fx*b + fy*(c + fx*d). Down a column of pixels (softmax: along a row) one
// exponential and one polynomial are enough: e += e * m from pixel to pixel, m = exp(step * (c + fx*d)) - 1. The
// largest corner of a cell is subtracted first. If a corner is not finite, or corners are far apart, the cell's warp
// computes pixels one by one by ATen's formula.
//
// A gradient is summed for each class and cell in shared memory: plain, times fx, times fy, times both. A second
// kernel adds these sums up for each logit, which has up to four cells around it. So no sum needs an atomic
// operation, and all have a fixed order.
#pragma once
#include "cuda.cuh"

constexpr int CELLS = 8, THREADS = 4;  // cells of a block; threads of a cell if a block is one warp
constexpr unsigned ALL = 0xffffffffu;  // threads of a warp
static_assert(2 * sizeof(float4) * CELLS * 255 <= 64 << 10);  // see CellGrid; sm_75 has 64 KB a block

// An axis that computes the cell and the fraction of an output. The last point's outputs belong to the cell before it,
// at fraction 1.
struct AxisFormula : Axis {
  float outputs_of_cell;  // approximately

  AxisFormula(int64_t points, int64_t outputs)
      : Axis(points, outputs), outputs_of_cell(step > 0 ? 1 / step : outputs) {}
  __host__ __device__ int cells() const { return points - next; }
  __device__ int cell(int o) const { return min(int(__fmul_rn(step, o)), cells() - 1); }
  __device__ float fraction(int o) const { return fminf(__fmul_rn(step, o) - cell(o), 1.f); }
  // The first output in cell x or a later one; `outputs` if there is none.
  __device__ int first(int x) const {
    int o = min(int(x * outputs_of_cell), outputs);
    while (o > 0 && cell(o - 1) >= x) o--;
    while (o < outputs && cell(o) < x) o++;
    return o;
  }
};

// Interpolates as ATen does. To ATen the last point is a cell of its own at fraction 0, so that at fraction 1 the other
// point is not used at all: it may be infinite.
__device__ inline float linear(float a, float b, float f) {
  if (f == 1) a = b, f = 0;
  return __fadd_rn(__fmul_rn(1 - f, a), __fmul_rn(f, b));
}
__device__ inline float bilinear(float4 c, float fx, float fy) {
  return linear(linear(c.x, c.y, fx), linear(c.z, c.w, fx), fy);
}

// 2^x - 1 for |x| < 126, also where x is close to 0, relative error 3 * 2^-24
__device__ inline float exp2_minus_1(float x) {
  const float shifted = x + 12582912.f, r = x - (shifted - 12582912.f);  // 1.5 * 2^23: its last bits are x, rounded
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return power * (r * exp2_polynomial(r)) + (power - 1);
}

// Sums over each GROUP threads of a warp in a fixed order; a lane gets the sum of v[lane % COUNT]. All threads call it.
template <int COUNT, int GROUP>
__device__ inline float sum_lanes(float* v) {
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

// The cells of all images, and how blocks share them.
struct CellGrid {
  const float* logits;  // (N,K,h,w)
  AxisFormula y, x;
  int K, pitch;        // classes; elements from cell to cell, odd, to avoid bank conflicts
  int blocks_of_row;   // of cells
  int64_t blocks;
  size_t shared;       // bytes of a block

  CellGrid(const Tensor& t, int64_t height, int64_t width, bool with_sums = true)
      : logits(t.const_data_ptr<float>()), y(t.size(2), height), x(t.size(3), width), K(t.size(1)), pitch(K | 1),
        blocks_of_row((x.cells() + CELLS - 1) / CELLS), blocks(t.size(0) * y.cells() * blocks_of_row),
        shared(sizeof(float4) * (with_sums ? 2 : 1) * CELLS * pitch) {}
};

// A block's cells in shared memory.
struct Tile {
  const int K, pitch;
  const int row, first;     // row of cells; the block's first cell in it
  const int64_t n;          // image
  const int threads, cell;  // threads of a cell; the thread's cell in the block
  float4* const corners;    // (CELLS,pitch) logits: top left, top right, bottom left, bottom right; if smooth, after
                            // prepare() a, b, c, d of the formula above to base 2, without the largest corner
  float4* const sums;       // (CELLS,pitch) of a gradient over a cell's pixels: plain, times fx, times fy, times both
  bool smooth = false;      // see is_smooth(); the same for all threads of a warp

  // Reads the corners; ends with a barrier.
  __device__ explicit Tile(const CellGrid& grid)
      : K(grid.K), pitch(grid.pitch), row(blockIdx.x / grid.blocks_of_row % grid.y.cells()),
        first(blockIdx.x % grid.blocks_of_row * CELLS), n(blockIdx.x / grid.blocks_of_row / grid.y.cells()),
        threads(blockDim.x / CELLS), cell(threadIdx.x / threads), corners(shared_memory<float4>()),
        sums(corners + CELLS * pitch) {
    const int x = min(first + int(threadIdx.x) % CELLS, grid.x.cells() - 1), w = grid.x.points;
    const int right = grid.x.next, down = grid.y.next * w;
    for (int64_t k = threadIdx.x / CELLS; k < K; k += threads) {
      const float* c = grid.logits + ((n * K + k) * grid.y.points + row) * w + x;
      corners[threadIdx.x % CELLS * pitch + k] = make_float4(c[0], c[right], c[down], c[down + right]);
    }
    __syncthreads();
  }
  __device__ int at(int k) const { return cell * pitch + k; }

  // Prepares exponentials and gradients: sets `smooth`, clears the sums, and converts the corners of smooth cells. The
  // threads of a cell share its classes. Ends with a barrier.
  __device__ void prepare(const CellGrid& grid) {
    float largest = -INFINITY, lowest_best = -INFINITY, max_down = 0, max_right = 0, nonfinite = 0;
    for (int k = threadIdx.x % threads; k < K; k += threads) {
      const float4 c = corners[at(k)];
      largest = fmaxf(largest, fmaxf(fmaxf(c.x, c.y), fmaxf(c.z, c.w)));
      lowest_best = fmaxf(lowest_best, fminf(fminf(c.x, c.y), fminf(c.z, c.w)));
      max_down = fmaxf(max_down, fmaxf(fabsf(c.z - c.x), fabsf(c.w - c.y)));
      max_right = fmaxf(max_right, fmaxf(fabsf(c.y - c.x), fabsf(c.w - c.z)));
      nonfinite += (c.x + c.y + c.z + c.w) * 0;
    }
    largest = max_lanes(largest, threads), lowest_best = max_lanes(lowest_best, threads);
    max_down = max_lanes(max_down, threads), max_right = max_lanes(max_right, threads);
    const float max_step = fmaxf(grid.y.step * max_down, grid.x.step * max_right);
    smooth = __all_sync(ALL, is_smooth(largest, lowest_best, max_step, nonfinite));
    for (int k = threadIdx.x % threads; k < K; k += threads) {
      const float4 c = corners[at(k)];
      sums[at(k)] = make_float4(0, 0, 0, 0);
      if (smooth)
        corners[at(k)] = make_float4(LOG2E * (c.x - largest), LOG2E * (c.y - c.x), LOG2E * (c.z - c.x),
                                     LOG2E * (c.w - c.z - (c.y - c.x)));
    }
    __syncthreads();
  }
  // Begins with a barrier; writes the sums to those of all cells (N,K,rows,columns).
  __device__ void write_sums(float4* to, const CellGrid& grid) const {
    __syncthreads();
    const int x = first + threadIdx.x % CELLS;
    for (int k = threadIdx.x / CELLS; k < K && x < grid.x.cells(); k += threads)
      to[((n * K + k) * grid.y.cells() + row) * grid.x.cells() + x] = sums[threadIdx.x % CELLS * pitch + k];
  }
};

// Pixels of a thread: R of them down a column of its cell, one if the warp's cells are not smooth.
template <int R>
struct PixelColumn {
  static constexpr int ROWS = R;
  const CellGrid& grid;
  const Tile& tile;
  const int y, x, rows;  // the first pixel; how many there are, 0 in a thread that has none left
  const float fy, fx;
  float shift = -INFINITY;  // if R is 1: subtracted from logits in place of the largest corner

  __device__ PixelColumn(const CellGrid& grid, const Tile& tile, int y, int x, int rows)
      : grid(grid), tile(tile), y(y), x(x), rows(rows), fy(grid.y.fraction(y)), fx(grid.x.fraction(x)) {}
  // Index of pixel i in (N,H,W).
  __device__ int64_t pixel(int i) const { return (tile.n * grid.y.outputs + y + i) * grid.x.outputs + x; }
  // Exponent of class k at pixel i to base 2.
  __device__ float exponent(int k, int i) const {
    const float4 c = tile.corners[tile.at(k)];
    if (R == 1) return LOG2E * (bilinear(c, fx, fy) - shift);
    return c.x + fx * c.y + (fy + i * grid.y.step) * (c.z + fx * c.w);
  }
  // e[i] = exp(logit - shift) of class k at pixel i
  __device__ void exponentials(int k, float* e) const {
    const float4 c = tile.corners[tile.at(k)];
    const float m = R == 1 ? 0 : exp2_minus_1(grid.y.step * (c.z + fx * c.w));
    float now = R == 1 ? exp2f(exponent(k, 0)) : fast_exp2(exponent(k, 0));
    for (int i = 0; i < R; i++) e[i] = now, now += now * m;
  }
  // sums[i] = sum of the exponentials over the classes; sets the shift
  __device__ void denominators(float* sums) {
    float e[R];
    for (int k = 0; k < tile.K && R == 1; k++) shift = fmaxf(shift, bilinear(tile.corners[tile.at(k)], fx, fy));
    for (int i = 0; i < R; i++) sums[i] = 0;
    for (int k = 0; k < tile.K; k++) {
      exponentials(k, e);
      for (int i = 0; i < R; i++) sums[i] += e[i];
    }
  }
};

// Calls visit(column) for all pixels of a thread, THREADS threads a cell. All threads of a warp make the same number of
// calls, so that these may contain shuffles.
template <int R, class Visit>
__device__ void for_each_column(const CellGrid& grid, const Tile& tile, const Visit& visit) {
  const int cell = tile.first + tile.cell, top = grid.y.first(tile.row), bottom = grid.y.first(tile.row + 1);
  const int left = grid.x.first(cell), right = grid.x.first(cell + 1);  // both are W for cells outside of the image
  for (int x = left + threadIdx.x % THREADS; __any_sync(ALL, x < right); x += THREADS)
    for (int y = top; y < bottom; y += R)
      visit(PixelColumn<R>(grid, tile, y, x, x < right ? min(bottom - y, R) : 0));
}

// Computes the gradient (N,K,h,w) from the sums of cells (N,K,rows,columns). A warp takes a row of logits at a time.
static __global__ void __launch_bounds__(256) gather_cell_gradients(const float4* sums, int rows, int columns,
                                                                    float* grad, int h, int w, unsigned lines) {
  const unsigned lane = threadIdx.x % 32, warps = gridDim.x * (blockDim.x / 32);
  for (unsigned line = (blockIdx.x * blockDim.x + threadIdx.x) / 32; line < lines; line += warps) {
    const int y = line % h;
    auto cell = [&](int y, int x) {
      const bool exists = y >= 0 && y < rows && x >= 0 && x < columns;
      return exists ? sums[(int64_t(line / h) * rows + y) * columns + x] : make_float4(0, 0, 0, 0);
    };
    for (int x = lane; x < w; x += 32) {
      const float4 a = cell(y - 1, x - 1), b = cell(y - 1, x), c = cell(y, x - 1), d = cell(y, x);
      grad[int64_t(line) * w + x] = a.w + (b.z - b.w) + (c.y - c.w) + (d.x - d.y - d.z + d.w);
    }
  }
}

// An uninitialised float32 tensor for the sums of all cells.
inline Tensor new_cell_sums(const Tensor& logits, const CellGrid& grid) {
  const int64_t cells = logits.size(0) * grid.K * grid.y.cells() * grid.x.cells();
  return torch::stable::new_empty(logits, {4 * cells}, ScalarType::Float);
}
// Returns the gradient of the logits.
inline Tensor gather(const Launcher& launch, const CellGrid& grid, const Tensor& logits, const Tensor& sums) {
  Tensor grad = torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float);
  const unsigned lines = grad.numel() / grid.x.points;
  launch(gather_cell_gradients, std::clamp(lines / 8, 1u, 4096u), 256, 0, static_cast<const float4*>(sums.data_ptr()),
         grid.y.cells(), grid.x.cells(), grad.mutable_data_ptr<float>(), grid.y.points, grid.x.points, lines);
  return grad;
}
