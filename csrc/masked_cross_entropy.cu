// Cross entropy of bilinearly upsampled logits over the pixels that count, and its gradient at the low resolution.
//
// In: logits (N,K,h,w) float32, float16 or bfloat16, any strides. Out: the mean loss, the number of pixels counted, the gradient
// of that mean (N,K,h,w) in float32. Never stored: anything of size N x K x H x W.
//
// Grid: (w / (cells - 1), half the rows of cells, N), two launches: even rows of cells, then odd ones, so that no two blocks of a
// launch add to one row of the gradient. Block: `cells` cells in a row, 8 threads each (cells.cuh); the first one is the last of
// the block on the left and is computed twice, so that a block owns its points' columns. A thread goes over the classes three
// times: for the shift, for the softmax's denominators, for the gradient. The gradient of a class in a cell needs four sums over
// its pixels (p, fx*p, fy*p, fx*fy*p), by shuffles, which then go to the four corners. All sums have a fixed order: the same bits
// from run to run. Nothing is read out of bounds for a label that is no class: it makes the loss NaN.
#include "cells.cuh"

namespace {
struct Partial {  // of a block
  float loss;
  int kept, everything, bad;
};

template <class T>
struct Problem {
  Points<T> logits;
  Walk walk;
  int cells;  // of a block
  const void* target;  // (N,H,W) uint8 or int64, or null
  bool wide;           // int64
  const bool* valid;   // (N,H,W) or null
  const float* confidence;  // (N,1,a,b) or null
  Axis cy, cx;              // of the confidence
  float cutoff;             // a pixel counts where the upsampled confidence is above this
  int64_t ignore;
  float* grad;        // (N,K,h,w)
  Partial* partials;  // of all blocks, the even rows' first

  // The label (0 without target) of a pixel, -1 where it does not count.
  __device__ int label(int64_t n, int y, int x, int K, Partial& sums) const {
    const int64_t pixel = (n * walk.y.m + y) * walk.x.m + x;
    int64_t label = 0;
    if (target) label = wide ? static_cast<const int64_t*>(target)[pixel] : static_cast<const uint8_t*>(target)[pixel];
    if (target && label == ignore) return -1;
    if (label < 0 || label >= K) return sums.bad = 1, -1;
    if (valid && !valid[pixel]) return -1;
    sums.everything++;
    if (confidence) {
      const int i = cy.cell(y), j = cx.cell(x), below = min(i + 1, cy.n - 1), right = min(j + 1, cx.n - 1);
      const float *p = confidence + (n * cy.n + i) * cx.n, *q = confidence + (n * cy.n + below) * cx.n;
      const float fy = cy.frac(y), left = lerp(p[j], q[j], fy);
      if (!(lerp(left, lerp(p[right], q[right], fy), cx.frac(x)) > cutoff)) return -1;
    }
    sums.kept++;
    return label;
  }
};

template <class T, bool ARGMAX>
__global__ void __launch_bounds__(128) cell_rows(Problem<T> problem, int odd) {
  const int K = problem.logits.sizes[1], cells = problem.cells, row = 2 * blockIdx.y + odd;
  const int first = blockIdx.x * (cells - 1) - 1;
  const int64_t n = blockIdx.z;
  const Tile tile{shared_memory<float>(), K, cells};
  const Corners corners{tile.points + Tile::bytes(K, cells) / sizeof(float), K, cells};
  tile.load(problem.logits, n, row, first);
  corners.clear();
  __syncthreads();

  Partial own{};
  problem.walk(tile, row, first, [&](Column& column, int x, int y, int rows) {
    int label[ROWS], arg[ROWS];
    float e[ROWS], all[ROWS], one[ROWS], best[ROWS], loss = 0;
    for (int r = 0; r < ROWS; r++) label[r] = r < rows ? problem.label(n, y + r, x, K, own) : -1;
    column.survey(K);
    for (int r = 0; r < ROWS; r++) all[r] = 0;
    for (int k = 0; k < K; k++) {
      column.exps(k, e);
      for (int r = 0; r < ROWS; r++) all[r] += e[r];
    }
    if (ARGMAX) column.argmax(K, best, arg);
    for (int r = 0; r < ROWS; r++) {
      one[r] = __fdividef(1, all[r]);
      if (label[r] < 0) continue;
      if (ARGMAX) label[r] = arg[r];
      else best[r] = lerp(column.top(label[r]), column.bottom(label[r]), column.fy[r]);
      loss += logf(all[r]) + (column.shift[r] - best[r]);
    }
    own.loss += loss;
    for (int k = 0; k < K; k++) {
      column.exps(k, e);
      float a = 0, b = 0;
      for (int r = 0; r < ROWS; r++) {
        const float g = label[r] < 0 ? 0 : one[r] * e[r] - (label[r] == k);
        a += g, b += column.fy[r] * g;
      }
      corners.add(k, column.fx, a, b);
    }
  });
  __syncthreads();

  corners.write(problem.grad, n, problem.logits.sizes, row, first, odd);
  __syncthreads();

  if (threadIdx.x < LANES) own = Partial{};  // the first cell's pixels are counted by the block on the left
  Partial* warps = shared_memory<Partial>();
  own.loss = warp_sum(own.loss), own.kept = warp_sum(own.kept);
  own.everything = warp_sum(own.everything), own.bad = warp_sum(own.bad);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x) return;
  for (int i = 1; i < int(blockDim.x) / 32; i++) {
    own.loss += warps[i].loss, own.kept += warps[i].kept;
    own.everything += warps[i].everything, own.bad += warps[i].bad;
  }
  const int even_blocks = (problem.walk.y.cells() + 1) / 2 * gridDim.x * gridDim.z;
  problem.partials[odd * even_blocks + (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = own;
}

// Every block adds up all partials, in one order; loss and kept are written once, the gradient is scaled.
__global__ void __launch_bounds__(256) finish(const Partial* partials, int count, bool divide_all, float* grad, int64_t size,
                                              float* loss, int64_t* kept) {
  struct Total { double loss; int64_t kept, everything, bad; };
  Total* totals = shared_memory<Total>();
  Total mine{};
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    mine.loss += partials[i].loss, mine.kept += partials[i].kept;
    mine.everything += partials[i].everything, mine.bad += partials[i].bad;
  }
  totals[threadIdx.x] = mine;
  for (int half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= half) continue;
    const Total& other = totals[threadIdx.x + half];
    Total& t = totals[threadIdx.x];
    t.loss += other.loss, t.kept += other.kept, t.everything += other.everything, t.bad += other.bad;
  }
  __syncthreads();
  const Total all = totals[0];
  const int64_t pixels = max(divide_all ? all.everything : all.kept, int64_t(1));
  if (blockIdx.x == 0 && threadIdx.x == 0) *loss = all.bad ? NAN : float(all.loss / pixels), *kept = all.kept;
  const float scale = 1.f / pixels;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x)
    grad[i] *= scale;
}

// (loss, kept, gradient) as csrc/ops.py says
std::tuple<Tensor, Tensor, Tensor> masked_cross_entropy(Tensor logits, std::optional<Tensor> target,
                                                        std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                                        double cutoff, int64_t height, int64_t width, int64_t ignore,
                                                        bool divide_all) {
  const int64_t N = logits.size(0), K = logits.size(1), h = logits.size(2), w = logits.size(3);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float);
  Tensor loss = torch::stable::new_empty(logits, {}, ScalarType::Float);
  Tensor kept = torch::stable::new_empty(logits, {}, ScalarType::Long);
  const Axis y(h, height), x(w, width);
  auto bytes = [&](int cells) { return std::max(Tile::bytes(K, cells) + Corners::bytes(K, cells), 4 * sizeof(Partial)); };
  const int cells = cells_of_a_block(bytes);
  const int across = (w + cells - 2) / (cells - 1), blocks = across * y.cells() * N;
  Tensor partials = torch::stable::new_empty(logits, {blocks * int64_t(sizeof(Partial))}, ScalarType::Byte);
  Partial* sums = reinterpret_cast<Partial*>(partials.mutable_data_ptr<uint8_t>());
  const Launcher launch(logits);
  with_type(logits, [&](auto* data) {
    using T = std::decay_t<decltype(*data)>;
    const Problem<T> problem{Points<T>(data, logits), Walk(y, x), cells, target ? target->data_ptr() : nullptr,
                             target && target->scalar_type() == ScalarType::Long,
                             valid ? valid->const_data_ptr<bool>() : nullptr,
                             confidence ? confidence->const_data_ptr<float>() : nullptr,
                             Axis(confidence ? confidence->size(2) : 1, height), Axis(confidence ? confidence->size(3) : 1, width),
                             float(cutoff), ignore, grad.mutable_data_ptr<float>(), sums};
    for (int odd = 0; odd < 2; odd++) {
      const dim3 grid(across, (y.cells() + 1 - odd) / 2, N);
      if (grid.y) launch(target ? cell_rows<T, false> : cell_rows<T, true>, grid, cells * LANES, bytes(cells), problem, odd);
    }
  });
  const int64_t size = N * K * h * w;
  launch(finish, dim3(std::clamp<int64_t>(size / 1024, 1, 1024)), 256, 256 * 4 * sizeof(int64_t), sums, blocks, divide_all,
         grad.mutable_data_ptr<float>(), size, loss.mutable_data_ptr<float>(), kept.mutable_data_ptr<int64_t>());
  return {loss, kept, grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) { m.impl("masked_cross_entropy", TORCH_BOX(&masked_cross_entropy)); }
