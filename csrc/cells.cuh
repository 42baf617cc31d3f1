// Bilinear interpolation by cells, align_corners=True, for the CUDA kernels.
//
// Four neighbouring low-resolution points span a cell. A block takes up to 16 cells side by side, in one row of cells of one
// picture, and keeps their points in shared memory: blocks lie in the grid's x axis, block columns first, then rows, then
// pictures. Within a cell a class's logit is a + fx*b + fy*(c + fx*d). One exponential and one polynomial serve 8 pixels in a
// line: from one to the next e += e * m, m = exp(step) - 1, which costs half an ulp. The shift that keeps exponentials in range
// is the cell's largest corner. Where a logit falls too far within a cell of a warp, or a corner is not finite, the warp computes
// its pixels one by one by ATen's formula.
//
// Gradients are summed a cell at a time in shared memory (plain, times fx, times fy, times both) and reach the points without
// atomics: each block stores what it has for its points, and of the up to four blocks that share 16 points of a row the one that
// comes last adds up, in an order that does not depend on which one it is.
#pragma once
#include "cuda.cuh"
#include "exponentials.h"

constexpr int THREADS = 4, COLUMNS = 2, ROWS = 8;  // threads of a cell; pixels that each has at once, where the cell is smooth
constexpr unsigned ALL = 0xffffffffu;              // lanes of a warp

// Logits (N,K,h,w) as they lie in memory.
struct Points {
  const void* data;
  ScalarType type;
  int64_t sizes[4], strides[4];

  explicit Points(const Tensor& t) : data(t.data_ptr()), type(t.scalar_type()) {
    for (int i = 0; i < 4; i++) sizes[i] = t.size(i), strides[i] = t.stride(i);
  }
};

// One axis: n low-resolution points, m output positions, in float32 as ATen computes them; but the last point's outputs belong
// to the cell before it, at fraction 1. Where the size stays each point is a cell of its own whose neighbour is itself, as in
// PyTorch: what lies next to it, perhaps infinite, is not even multiplied by 0.
struct Axis {
  int n, m;
  float step, outputs;  // distance of two outputs, in cells; outputs in a cell, about

  Axis(int64_t n, int64_t m)
      : n(n), m(m), step(m > 1 ? float(n - 1) / (m - 1) : 0.f), outputs(step > 0 ? 1 / step : m) {}
  __host__ __device__ int cells() const { return n == m ? n : n > 1 ? n - 1 : 1; }
  __device__ int next(int x) const { return n == m ? x : min(x + 1, n - 1); }
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
__device__ inline float blend(float a, float b, float f) { return f == 1 ? mix(b, b, 0) : mix(a, b, f); }
__device__ inline float bilinear(float4 c, float fx, float fy) { return blend(blend(c.x, c.y, fx), blend(c.z, c.w, fx), fy); }

// 2^x - 1 for |x| < 126, also where x is close to 0, relative error 3 * 2^-24
__device__ inline float exp2_minus_1(float x) {
  const float shifted = x + 12582912.f, r = x - (shifted - 12582912.f);  // 1.5 * 2^23: its last bits are x, rounded
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u);
  return power * (r * exp2_polynomial(r)) + (power - 1);
}

// Sums over each `GROUP` lanes of a warp, in one order: a lane gets that of v[lane % COUNT]. All lanes call it.
template <int COUNT, int GROUP, class T>
__device__ inline T sum_lanes(T* v) {
  for (int half = COUNT / 2; half; half /= 2) {
    const bool upper = threadIdx.x & half;
    for (int i = 0; i < half; i++)
      v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(ALL, upper ? v[i] : v[i + half], half);
  }
  for (int distance = COUNT; distance < GROUP; distance *= 2) v[0] += __shfl_xor_sync(ALL, v[0], distance);
  return v[0];
}
__device__ inline float max_lanes(float value, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2) value = fmaxf(value, __shfl_xor_sync(ALL, value, distance));
  return value;
}

// What a block keeps of its cells besides their corners; POWERS take their place in smooth cells.
enum Kinds { CORNERS = 0, POWERS = 1, SUMS = 2, BENDS = 4 };

// The cells of all pictures, and how blocks share them.
struct Cells {
  Points logits;
  Axis y, x;
  int K, own, across;  // classes; cells of a block; blocks in a row of cells
  int kinds;
  size_t shared;       // bytes of a block

  // `more`: bytes that the kernel wants behind the tile.
  Cells(const Tensor& t, int64_t height, int64_t width, int kinds, size_t more = 0)
      : logits(t), y(t.size(2), height), x(t.size(3), width), K(t.size(1)), own(16), kinds(kinds) {
    if (bytes() + more > SHARED) own = 8;
    shared = bytes() + more, across = (x.cells() + own - 1) / own;
  }
  int64_t blocks() const { return logits.sizes[0] * y.cells() * across; }
  __host__ __device__ int groups() const { return (x.n + own - 1) / own; }  // of as many points in a row
  __host__ __device__ int pitch() const { return K | 1; }  // odd: neighbouring cells lie in other banks
  size_t bytes() const {
    const int sums = kinds & SUMS ? sizeof(float4) : 0, bends = kinds & BENDS ? sizeof(float) : 0;
    return (sizeof(float4) + sums + bends) * own * pitch();
  }
};

// A block's cells in shared memory, and which of them is a thread's own.
struct Tile {
  const int K, cells, pitch;
  const int column, row;   // the block among those of a row of cells; its row of cells
  const int64_t n;         // picture
  const int lanes, cell;   // threads of a cell, and the thread's cell
  // (cells, pitch):
  float4* const corners;   // a class's logits: top left, top right, bottom left, bottom right; or its powers
  float4* const sums;      // of a gradient over a cell's pixels: plain, times fx, times fy, times both
  float* const bends;      // exp(a pixel's steps in x and y times d) - 1: by that 1 + m grows from a column to the next
  bool smooth;             // whether exponentials in the warp's cells go by recurrence; if not, some may not be finite

  // Reads the block's points and sets sums to 0; ends with a barrier.
  __device__ explicit Tile(const Cells& all)
      : K(all.K), cells(all.own), pitch(all.pitch()), column(blockIdx.x % all.across),
        row(blockIdx.x / all.across % all.y.cells()), n(blockIdx.x / all.across / all.y.cells()),
        lanes(blockDim.x / cells), cell(threadIdx.x / lanes), corners(shared_memory<float4>()),
        sums(corners + cells * pitch), bends(reinterpret_cast<float*>(sums + (all.kinds & SUMS ? cells * pitch : 0))) {
    if (all.logits.type == ScalarType::Float) load<float>(all);
    else if (all.logits.type == ScalarType::Half) load<Half>(all);
    else load<BFloat16>(all);
    __syncthreads();
    survey(all);
    __syncthreads();
  }
  __device__ int first() const { return column * cells; }  // cell
  __device__ int at(int k) const { return cell * pitch + k; }

  // A thread's pixels of its cell sum up to this. All lanes call it; lanes is THREADS.
  __device__ void add(int k, float plain, float x, float y, float xy) const {
    float all[4] = {plain, x, y, xy};
    const float sum = sum_lanes<THREADS, THREADS>(all);
    reinterpret_cast<float*>(&sums[at(k)])[threadIdx.x % THREADS] += sum;
  }

 private:
  template <class T>
  __device__ void load(const Cells& all) const {
    const Points& from = all.logits;
    const int local = threadIdx.x % cells, x = min(first() + local, all.x.n - 1);
    const int64_t left = x * from.strides[3], right = all.x.next(x) * from.strides[3];
    const T* top = static_cast<const T*>(from.data) + n * from.strides[0] + row * from.strides[2];
    const T* bottom = top + (all.y.next(row) - row) * from.strides[2];
    for (int64_t k = threadIdx.x / cells; k < K; k += lanes) {
      const T *t = top + k * from.strides[1], *b = bottom + k * from.strides[1];
      corners[local * pitch + k] = make_float4(t[left], t[right], b[left], b[right]);
    }
  }
  // The cell's threads share its classes.
  __device__ void survey(const Cells& all) {
    float largest = -INFINITY, floor = -INFINITY, down = 0, right = 0, broken = 0;
    for (int k = threadIdx.x % lanes; k < K; k += lanes) {
      const float4 c = corners[at(k)];
      largest = fmaxf(largest, fmaxf(fmaxf(c.x, c.y), fmaxf(c.z, c.w)));
      floor = fmaxf(floor, fminf(fminf(c.x, c.y), fminf(c.z, c.w)));
      down = fmaxf(down, fmaxf(fabsf(c.z - c.x), fabsf(c.w - c.y)));
      right = fmaxf(right, fmaxf(fabsf(c.y - c.x), fabsf(c.w - c.z)));
      broken += (c.x + c.y + c.z + c.w) * 0;
    }
    largest = max_lanes(largest, lanes), floor = max_lanes(floor, lanes);
    down = max_lanes(down, lanes), right = max_lanes(right, lanes);
    const float fall = fmaxf(all.y.step * down, all.x.step * right);
    smooth = broken == 0 && (all.kinds == CORNERS || is_smooth(largest, floor, fmaxf(down, right), fall, broken));
    smooth = __all_sync(ALL, smooth);
    const float both = LOG2E * all.y.step * fminf(all.x.step, 1);  // with more there are no two columns in a cell
    for (int k = threadIdx.x % lanes; k < K && all.kinds != CORNERS; k += lanes) {
      const float4 c = corners[at(k)];
      const float d = c.w - c.z - (c.y - c.x);
      if (all.kinds & BENDS) bends[at(k)] = exp2_minus_1(both * d);
      if (all.kinds & SUMS) sums[at(k)] = make_float4(0, 0, 0, 0);
      if (smooth) corners[at(k)] = make_float4(LOG2E * (c.x - largest), LOG2E * (c.y - c.x), LOG2E * (c.z - c.x), LOG2E * d);
    }
  }
};

// A thread's pixels in its cell, C side by side and R down from (y,x); pixel i is in column i / R and row i % R. R is 1 where the
// warp's cells are not smooth.
template <int C, int R>
struct Patch {
  static constexpr int COLUMNS = C, ROWS = R, PIXELS = C * R;
  const Cells& all;
  const Tile& tile;
  const int y, x, rows, columns;  // the first pixel, and how many there are: no columns in a thread that has none left
  float fx[C], fy;                // where in the cell it lies, and those beside it
  float shift = 0;                // where R is 1: what `exps` subtracts, in place of the largest corner
  unsigned needed = 0;            // bit i: exponentials of pixel i are wanted

  __device__ Patch(const Cells& all, const Tile& tile, int y, int x, int rows, int columns)
      : all(all), tile(tile), y(y), x(x), rows(rows), columns(columns), fy(all.y.frac(y)) {
    for (int c = 0; c < C; c++) fx[c] = all.x.frac(x + c);
  }
  __device__ bool has(int i) const { return i / R < columns && i % R < rows; }
  // Pixel i in (N,H,W).
  __device__ int64_t pixel(int i) const { return (tile.n * all.y.m + y + i % R) * all.x.m + x + i / R; }
  // To be called before `exps` and `below`.
  __device__ void need(unsigned pixels) {
    needed = pixels, shift = -INFINITY;
    for (int k = 0; k < tile.K && R == 1; k++) shift = fmaxf(shift, bilinear(tile.corners[tile.at(k)], fx[0], fy));
  }
  // logit - shift of class k in pixel i
  __device__ float below(int k, int i) const {
    const float4 p = tile.corners[tile.at(k)];
    if (R == 1) return bilinear(p, fx[0], fy) - shift;
    const float f = fx[i / R];
    return LN2 * (p.x + f * p.y + (fy + i % R * all.y.step) * (p.z + f * p.w));
  }
  // e[i] = exp(logit - shift) of class k in pixel i; finite where it is not needed.
  __device__ void exps(int k, float* e) const {
    if (R == 1) {
      e[0] = needed ? exp2f(LOG2E * below(k, 0)) : 0;
      return;
    }
    const float4 p = tile.corners[tile.at(k)];
    const float bend = tile.bends[tile.at(k)];
    float m = exp2_minus_1(all.y.step * (p.z + fx[0] * p.w));
    for (int c = 0; c < C; c++) {
      float now = fast_exp2(p.x + fx[c] * p.y + fy * (p.z + fx[c] * p.w));
      for (int r = 0; r < R; r++) {
        e[c * R + r] = now;
        now += now * m;
      }
      m += m * bend + bend;
    }
  }
  // The class of the largest logit of each pixel, the lowest on a tie, the first NaN where there is one.
  __device__ void argmax(int* arg) const {
    float best[PIXELS];
    for (int i = 0; i < PIXELS; i++) best[i] = -INFINITY, arg[i] = 0;
    for (int k = 0; k < tile.K; k++) {
      const float4 p = tile.corners[tile.at(k)];
      for (int i = 0; i < PIXELS; i++) {
        const float f = fx[i / R], down = all.y.frac(y + i % R);
        const float now = R == 1 ? bilinear(p, f, down) : mix(mix(p.x, p.y, f), mix(p.z, p.w, f), down);
        if (now > best[i] || (R == 1 && now != now && best[i] == best[i])) best[i] = now, arg[i] = k;
      }
    }
  }
};

// visit(patch) for every patch of a thread; all threads of a warp make the same visits, so that these may hold shuffles.
template <int C, int R, class Visit>
__device__ void each_patch(const Cells& all, const Tile& tile, const Visit& visit) {
  const int cell = tile.first() + tile.cell, begin = all.y.first(tile.row), end = all.y.first(tile.row + 1);
  const bool inside = cell < all.x.cells();
  const int right = inside ? all.x.first(cell + 1) : 0;
  for (int x = (inside ? all.x.first(cell) : 0) + threadIdx.x % THREADS * C; __any_sync(ALL, x < right); x += THREADS * C)
    for (int y = begin; y < end; y += R) visit(Patch<C, R>(all, tile, y, x, min(end - y, R), min(max(right - x, 0), C)));
}
template <class Visit>
__device__ void each_patch(const Cells& all, const Tile& tile, const Visit& visit) {
  if (tile.smooth) each_patch<COLUMNS, ROWS>(all, tile, visit);
  else each_patch<1, 1>(all, tile, visit);
}

// A block has written something, and others as well: `count` sums wait for several blocks each. arrive(i) counts this block and
// says whether it is the last one that sum i waits for; if so, all its threads call finish(i), where they see what all of these
// blocks wrote. Overwrites the first bytes of shared memory.
template <class Arrive, class Finish>
__device__ void arrive_and_finish(int count, const Arrive& arrive, const Finish& finish) {
  bool* const last = shared_memory<bool>();
  __threadfence();  // the block's writes come before it arrives,
  __syncthreads();
  if (int(threadIdx.x) < count) last[threadIdx.x] = arrive(threadIdx.x);
  __syncthreads();
  __threadfence();  // and the other blocks' arrivals before it reads
  for (int i = 0; i < count; i++)
    if (last[i]) finish(i);
}

// The gradient of the points, on its way from the tiles' sums. Points of a row go in groups, as many as a block has cells, that
// begin with a block's first cell: a group waits for the blocks above and below it, and for their neighbours on the left.
struct Gradient {
  float* grad;        // (N,K,h,w)
  float* parts;       // (blocks, 2, K, cells + 1): what a block has for the points above its cells, and for those below
  unsigned* arrived;  // 0 at first: a counter for all blocks, then (N, h, groups)

  // Behind a barrier: stores the block's part.
  __device__ void store(const Tile& tile) const {
    const int points = tile.cells + 1, half = tile.K * points;
    float* const to = parts + int64_t(blockIdx.x) * 2 * half;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
      const int k = i / points, x = i % points;
      const float4 none = make_float4(0, 0, 0, 0);
      const float4 l = x ? tile.sums[(x - 1) * tile.pitch + k] : none, r = x < tile.cells ? tile.sums[x * tile.pitch + k] : none;
      to[i] = l.y - l.w + (r.x - r.y - r.z + r.w);
      to[half + i] = l.w + (r.z - r.w);
    }
  }
  // Groups 0 to 3 of the block: those of its points at the top left, top right, bottom left and bottom right.
  __device__ bool arrive(const Cells& all, const Tile& tile, int i) const {
    const int row = tile.row + i / 2, group = tile.column + i % 2, groups = all.groups();
    if (row >= all.y.n || group >= groups) return false;
    const int blocks = ((row > 0) + (row < all.y.cells())) * ((group > 0) + (group < all.across));
    return atomicAdd(&arrived[1 + (tile.n * all.y.n + row) * groups + group], 1u) + 1 == unsigned(blocks);
  }
  __device__ void finish(const Cells& all, const Tile& tile, int i) const {
    const int row = tile.row + i / 2, group = tile.column + i % 2, begin = group * tile.cells, points = tile.cells + 1;
    const int count = min(tile.cells, all.x.n - begin);
    for (int j = threadIdx.x; j < tile.K * count; j += blockDim.x) {
      const int k = j / count, x = j % count;
      float sum = 0;
      for (int from = 0; from < 4; from++) {
        const int y = row - 1 + from / 2, column = group - 1 + from % 2;
        if (y < 0 || y >= all.y.cells() || column < 0 || column >= all.across || (column < group && x > 0)) continue;
        const int64_t block = (tile.n * all.y.cells() + y) * all.across + column;
        sum += parts[((block * 2 + (y < row)) * tile.K + k) * points + (column < group ? tile.cells : x)];
      }
      grad[((tile.n * tile.K + k) * all.y.n + row) * all.x.n + begin + x] = sum;
    }
  }
};

// Memory for it.
struct GradientMemory {
  Tensor grad, parts, arrived;

  GradientMemory(const Tensor& logits, const Cells& all, bool wanted)
      : grad(wanted ? torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float) : floats(logits, 0)),
        parts(floats(logits, wanted ? all.blocks() * 2 * all.K * (all.own + 1) : 0)),
        arrived(torch::stable::new_zeros(logits, {1 + (wanted ? all.logits.sizes[0] * all.y.n * all.groups() : 0)},
                                         ScalarType::Int)) {}
  static Tensor floats(const Tensor& like, int64_t count) {
    return torch::stable::new_empty(like, {count}, ScalarType::Float);
  }
  Gradient gradient() const {
    return {grad.mutable_data_ptr<float>(), parts.mutable_data_ptr<float>(),
            reinterpret_cast<unsigned*>(arrived.mutable_data_ptr<int32_t>())};
  }
};
