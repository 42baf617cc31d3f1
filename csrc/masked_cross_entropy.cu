// Cross entropy of bilinearly upsampled logits over the pixels that count, and its gradient at the low resolution.
//
// In: logits (N,K,h,w) float32, float16 or bfloat16, any strides. Out: the mean loss, the number of pixels counted, the gradient
// of that mean (N,K,h,w) in float32. Never stored: anything of size N x K x H x W.
//
// Grid: (w / (cells - 1), half the rows of cells, N), two launches. Block: 16 cells in a row (8 for many classes), 8 threads each;
// tile.cuh says who owns what. A thread goes over the classes twice, for the softmax's denominators and for the gradient, and
// once more for the argmax. The gradient of a class in a cell needs four sums over its pixels (p, fx*p, fy*p, fx*fy*p), by
// shuffles, which then go to the four corners. All sums have a fixed order: the same bits from run to run.
#include "counted.cuh"

namespace {
struct Problem {
  Points logits;
  Walk walk;
  Counted counted;
  float* grad;        // (N,K,h,w)
  Partial* partials;  // of all blocks
};

template <bool ARGMAX>
__global__ void __launch_bounds__(128, ARGMAX ? 4 : 6) cells_cross_entropy(Problem problem, int round) {
  const Tile tile(problem.logits, problem.walk.y.step, SUMS, round);
  Partial own{};
  problem.walk(tile, [&](Column& column, int x, int y, int rows) {
    const int64_t pixel = (tile.n * problem.walk.y.m + y) * problem.walk.x.m + x;
    int label[ROWS], arg[ROWS];
    float one[ROWS];  // 1 / the softmax's denominator
    unsigned counts = 0;
    for (int r = 0; r < ROWS; r++) {
      label[r] = r < rows ? problem.counted.label(pixel + r * problem.walk.x.m, tile.n, y + r, x, own) : -1;
      counts |= (label[r] >= 0) << r;
    }
    column.need(counts);
    column.denominators(one);
    if (ARGMAX) column.argmax(arg);
    float product[2];   // of denominators, at least e^-40 each, so that two share a logarithm
    bool mixed = false; // whether some pixel does not count, or has another label than the first
    for (int r = 0; r < ROWS; r++) {
      const bool here = counts >> r & 1;
      if (here && ARGMAX) label[r] = arg[r];
      if (here) own.loss -= column.below(label[r], r);
      product[r % 2] = here ? one[r] : 1;
      if (r % 2) own.loss += logf(product[0] * product[1]);
      one[r] = here ? reciprocal(one[r]) : 0;
      mixed |= !here || label[r] != label[0];
    }
    for (int k = 0; k < tile.K; k++) {
      float g[ROWS], a = 0, b = 0;
      column.exps(k, g);
      for (int r = 0; r < ROWS; r++) g[r] = one[r] * g[r] - (!mixed && label[0] == k);
      for (int r = 0; r < ROWS && mixed; r++) g[r] -= label[r] == k;
      for (int r = 0; r < ROWS; r++) a += g[r], b += column.fy[r] * g[r];
      tile.add(k, column.fx, a, b);
    }
  });
  __syncthreads();
  tile.write(problem.grad, problem.logits.sizes);
  if (threadIdx.x < LANES) own = Partial{};  // the first cell's pixels are counted by the block on the left
  add_up_block(own, &problem.partials[(tile.n * problem.walk.y.cells() + tile.row) * gridDim.x + blockIdx.x]);
}

// (loss, kept, gradient) as csrc/ops.py says
std::tuple<Tensor, Tensor, Tensor> masked_cross_entropy(Tensor logits, std::optional<Tensor> target,
                                                        std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                                        double cutoff, int64_t height, int64_t width, int64_t ignore,
                                                        bool divide_all) {
  const Launcher launch(logits);
  const Walk walk{Axis(logits.size(2), height), Axis(logits.size(3), width)};
  const Grid grid(launch, logits, walk, SUMS);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes(), ScalarType::Float);
  Result result(logits, grid.count());
  const Problem problem{Points(logits), walk, Counted(logits.size(1), height, width, target, confidence, valid, cutoff, ignore),
                        grad.mutable_data_ptr<float>(), result.data()};
  grid(launch, target ? cells_cross_entropy<false> : cells_cross_entropy<true>, problem);
  result.add_up(launch, divide_all, problem.grad, grad.numel());
  return {result.loss, result.kept, grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) { m.impl("masked_cross_entropy", TORCH_BOX(&masked_cross_entropy)); }
