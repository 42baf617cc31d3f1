// Cross entropy of bilinearly upsampled logits over the pixels that count, and its gradient at the low resolution.
//
// In: logits (N,K,h,w) float32 or bfloat16, any strides. Out: the mean loss, the number of pixels counted, the gradient of that
// mean (N,K,h,w) in float32. Never stored: anything of size N x K x H x W.
//
// A cell row is what lies between two rows of low-resolution points. Along a row of pixels in a cell a class's logit is
// A + fx * B, so two exponentials serve all PIXELS pixels: e = 2^A and m = 2^(step*B) - 1, then e += e*m from pixel to pixel,
// which costs half an ulp each time. The shift that keeps exponentials in range is the cell's largest corner; where a logit falls
// too far within a cell, or a corner is not finite, `exact` computes pixel by pixel as ATen does.
//
// The gradient needs two sums a class and row of a cell, of p and of fx*p, and these go to the four corners. Cell rows are taken
// in two rounds, the even ones and the odd ones, so that no two threads write to one row of the gradient: the same bits for
// any number of threads. Losses are summed in float over a row of a cell, in double and in order over those.
#include "counted.h"

namespace {
struct Problem {
  Points logits;
  Counted counted;
  Axis y, x;
  Lanes lanes;
  float* grad;  // (N,K,h,w)
};

// What one thread works with.
struct Job {
  const Problem& problem;
  std::vector<Result>& results;  // (N*h)
  Walk walk;
  const int K;
  Gradient gradient;
  std::vector<float> confidence, label_one, label_x;
  std::vector<int32_t> codes;
  std::vector<V> e;

  Job(const Problem& p, std::vector<Result>& results)
      : problem(p), results(results), walk(p.logits, p.y, p.x, p.lanes), K(walk.K), gradient(p.grad, p.logits, p.lanes),
        confidence(p.counted.cx.n + 1), label_one((K + 1) * LANES), label_x(label_one), e(K * PIXELS) {}

  // Row `cell` of cells of picture n.
  void operator()(int64_t n, int64_t cell) {
    const int first = problem.y.first[cell], rows = problem.y.count(cell);
    const int64_t codes_stride = problem.x.m + 1;
    if (!rows) return;
    Result& result = results[n * problem.y.n + cell];
    codes.resize(rows * codes_stride);
    for (int i = 0; i < rows; i++) problem.counted.row(n, first + i, &codes[i * codes_stride], confidence.data(), result);
    D loss{};
    walk(n, cell,
         [&](auto P, int row, int at) {
           const int32_t* code = &codes[(row - first) * codes_stride];
           if (problem.counted.target) pixels<P, false>(code, at, problem.y.frac[row], loss);
           else pixels<P, true>(code, at, problem.y.frac[row], loss);
         },
         [&](int x) { gradient.to_corners(x); });
    result.loss += sum(loss);
    gradient.add(n, cell);
  }

  // P pixels of a row in LANES cells, the first being row `at` of the lanes' tables: loss to `total`, and its gradient.
  template <int P, bool ARGMAX>
  void pixels(const int32_t* row, int at, float fy, D& total) {
    const int* column = &problem.lanes.column[at * LANES];
    const float* fx = &problem.lanes.frac[at * LANES];
    I code[P], counts[P], any{};
    if (dense<P>(column, problem.x.m)) {
      std::memcpy(code, row + column[0], sizeof code);
      if constexpr (P == 8) deinterleave_8(code);
    } else {
      for (int p = 0; p < P; p++)
        for (int l = 0; l < LANES; l++) code[p][l] = row[column[p * LANES + l]];
    }
    for (int p = 0; p < P; p++) counts[p] = code[p] != K, any |= counts[p];
    if (all(any == 0)) return;

    V loss{}, denominator[P], top[P], one[P], x[P];  // of the softmax
    I arg[P];
    const V shift = exponentials<P>(walk, fy, fx, e.data(), denominator);
    if (ARGMAX) argmax<P>(walk, fy, fx, top, arg);
    for (int k = 0; k < K && !walk.smooth; k++) e[k] = counts[0] ? e[k] : V{};  // a NaN that does not count
    for (int p = 0; p < P; p++) {
      if (ARGMAX) code[p] = counts[p] ? arg[p] : code[p];
      if (ARGMAX) loss += counts[p] ? shift - top[p] : V{};
      one[p] = counts[p] ? 1 / denominator[p] : V{};
      x[p] = one[p] * load(fx + p * LANES);
      denominator[p] = counts[p] ? denominator[p] : splat(1);
    }
    constexpr int PAIR = P > 1 ? 2 : 1;  // one logarithm for two: a sum is at least e^-40
    for (int p = 0; p < P; p += PAIR) loss += LN2 * log2(PAIR == 2 ? denominator[p] * denominator[p + 1 % PAIR] : denominator[p]);
    count_labels<P>(code, fx);
    for (int k = 0; k < K; k++) {
      float *own_one = &label_one[k * LANES], *own_x = &label_x[k * LANES];
      V a = load(own_one), b = load(own_x);
      store(own_one, V{}), store(own_x, V{});
      const Cell& c = walk.cells[k];
      if (!ARGMAX && walk.smooth) loss += a * (c.a + fy * c.down - shift) + b * (c.right + fy * c.both);
      if (!ARGMAX && !walk.smooth) loss += a != 0 ? shift - exact(walk.quads[k], fy, load(fx)) : V{};
      for (int p = 0; p < P; p++) a += one[p] * e[k * P + p], b += x[p] * e[k * P + p];
      gradient.sums[k].add(a, b, fy);
    }
    total += __builtin_convertvector(loss, D);
  }

  // Take a pixel's 1 and its fx from those of its label: most pixels of a cell's row have one label. Label K, a row that nobody
  // reads, is that of the pixels that do not count.
  template <int P>
  void count_labels(const I* code, const float* fx) {
    int32_t codes[P * LANES];
    std::memcpy(codes, code, sizeof codes);
    I run = code[0] == code[0];
    V width{};
    for (int p = 0; p < P; p++) run &= code[p] == code[0], width += load(fx + p * LANES);
    for (int l = 0; l < LANES; l++) {
      float *one = &label_one[l], *x = &label_x[l];
      if (run[l]) {
        one[codes[l] * LANES] -= P;
        x[codes[l] * LANES] -= width[l];
        continue;
      }
      for (int i = l; i < P * LANES; i += LANES) {
        one[codes[i] * LANES] -= 1;
        x[codes[i] * LANES] -= fx[i];
      }
    }
  }
};

// (loss, kept, gradient) as csrc/ops.py says
std::tuple<Tensor, Tensor, Tensor> masked_cross_entropy(Tensor logits, std::optional<Tensor> target,
                                                        std::optional<Tensor> confidence, std::optional<Tensor> valid,
                                                        double cutoff, int64_t height, int64_t width, int64_t ignore,
                                                        bool divide_all) {
  const int64_t N = logits.size(0), K = logits.size(1), h = logits.size(2);
  Tensor grad = torch::stable::new_zeros(logits, logits.sizes(), ScalarType::Float);
  float* g = grad.mutable_data_ptr<float>();
  const Axis x(logits.size(3), width);
  const Problem problem{points(logits), counted(K, height, width, target, confidence, valid, cutoff, ignore),
                        Axis(h, height), x, Lanes(x), g};
  std::vector<Result> results(N * h);
  each_row(N, h, 2, [&] { return Job(problem, results); });
  const Result all = add_up(results, K);
  const int64_t pixels = std::max<int64_t>(divide_all ? all.everything : all.kept, 1);
  for (int64_t i = 0, total = N * K * h * x.n; i < total; i++) g[i] *= 1.f / pixels;
  return {scalar(logits, float(all.loss / pixels)), scalar(logits, all.kept), grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) { m.impl("masked_cross_entropy", TORCH_BOX(&masked_cross_entropy)); }
