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
  int K() const { return logits.sizes[1]; }
};

struct Scratch {  // of one thread
  std::vector<float> top, bottom, confidence, grad_top, grad_bottom, label_one, label_x;
  std::vector<int32_t> codes;
  std::vector<Cell> cells;
  std::vector<Sums> sums;
  std::vector<V> e;
  explicit Scratch(const Problem& p)
      : top(p.K() * p.lanes.stride), bottom(top), confidence(p.counted.cx.n + 1), grad_top(top), grad_bottom(top),
        label_one((p.K() + 1) * LANES), label_x(label_one), cells(p.K()), sums(p.K()), e(p.K() * PIXELS) {}
};

// P pixels of a row in LANES cells, the first being row `at` of the lanes' tables: loss to `loss`, gradient to `s.sums`.
template <int P, bool ARGMAX>
void pixels(const Problem& problem, Scratch& s, const int32_t* row, int at, float fy, bool fit,
            V largest, D& total) {
  const int K = problem.K();
  const int* column = &problem.lanes.column[at * LANES];
  const float* fx = &problem.lanes.frac[at * LANES];
  I code[P], any{};
  if (dense<P>(column)) {
    std::memcpy(code, row + column[0], sizeof code);
    if constexpr (P == 8) deinterleave_8(code);
  } else {
    for (int p = 0; p < P; p++)
      for (int l = 0; l < LANES; l++) code[p][l] = row[column[p * LANES + l]];
  }
  I counts[P];
  for (int p = 0; p < P; p++) counts[p] = code[p] != K, any |= counts[p];
  if (all(any == 0)) return;
  int32_t codes[P * LANES];
  std::memcpy(codes, code, sizeof codes);

  V loss{}, sums[P], top[P];  // top: what the loss of a pixel is beside log(sum), but for its label's logit
  I arg[P];
  if (fit) {
    exponentials<P>(s.cells.data(), K, fy, fx, problem.x.step, largest, s.e.data(), sums);
    if (ARGMAX) argmax<P>(s.cells.data(), K, fy, fx, top, arg);
    for (int p = 0; p < P; p++) top[p] = ARGMAX ? largest - top[p] : V{};
  } else {  // P is 1, and the cells are those of `read_corners`
    exact(s.cells.data(), K, fy, load(fx), s.e.data(), top[0], arg[0]);
    sums[0] = V{};
    for (int l = 0; l < LANES; l++)
      if (!ARGMAX && counts[0][l]) loss[l] -= s.e[codes[l]][l];
    for (int k = 0; k < K; k++) {
      V e = exp2(LOG2E * (s.e[k] - top[0]));
      sums[0] += e;
      s.e[k] = counts[0] ? e : V{};  // a NaN that does not count must not reach the gradient
    }
    if (ARGMAX) top[0] = V{};
  }

  V one[P], x[P];
  for (int p = 0; p < P; p++) {
    one[p] = counts[p] ? 1 / sums[p] : V{};
    x[p] = one[p] * load(fx + p * LANES);
    loss += counts[p] ? top[p] : V{};
    sums[p] = counts[p] ? sums[p] : splat(1);
  }
  constexpr int PAIR = P > 1 ? 2 : 1;  // one logarithm for two: a sum is at least e^-40
  for (int p = 0; p < P; p += PAIR) loss += LN2 * log2(PAIR == 2 ? sums[p] * sums[p + PAIR - 1] : sums[p]);
  if (ARGMAX) {
    for (int p = 0; p < P; p++) code[p] = counts[p] ? arg[p] : K - I{};
    std::memcpy(codes, code, sizeof codes);
  }
  I run = code[0] == code[0];  // most pixels of a cell's row have one label
  V width{};
  for (int p = 0; p < P; p++) run &= code[p] == code[0], width += load(fx + p * LANES);
  for (int l = 0; l < LANES; l++) {
    float *label_one = &s.label_one[l], *label_x = &s.label_x[l];
    if (run[l]) {
      label_one[codes[l] * LANES] -= P;
      label_x[codes[l] * LANES] -= width[l];
      continue;
    }
    for (int i = l; i < P * LANES; i += LANES) {
      label_one[codes[i] * LANES] -= 1;
      label_x[codes[i] * LANES] -= fx[i];
    }
  }
  for (int k = 0; k < K; k++) {
    float *label_one = &s.label_one[k * LANES], *label_x = &s.label_x[k * LANES];
    V a = load(label_one), b = load(label_x);
    store(label_one, V{}), store(label_x, V{});
    const Cell& c = s.cells[k];
    if (!ARGMAX && fit) loss += a * (c.a + fy * c.down - largest) + b * (c.right + fy * c.both);
    const V* e = &s.e[k * P];
    for (int p = 0; p < P; p++) a += one[p] * e[p], b += x[p] * e[p];
    s.sums[k].add(a, b, fy);
  }
  total += __builtin_convertvector(loss, D);
}

template <bool ARGMAX>
void cell_row(const Problem& problem, Scratch& s, int64_t n, int y, Result& result) {
  const int K = problem.K(), first = problem.y.first[y], rows = problem.y.count(y);
  const int64_t h = problem.y.n, w = problem.x.n, codes_stride = problem.x.m + 1;
  const Lanes& lanes = problem.lanes;
  if (!rows) return;
  s.codes.resize(rows * codes_stride);
  for (int i = 0; i < rows; i++)
    problem.counted.row(n, first + i, &s.codes[i * codes_stride], s.confidence.data(), result);
  problem.logits.row(n, y, lanes, s.top.data());
  problem.logits.row(n, y + 1, lanes, s.bottom.data());
  std::fill(s.grad_top.begin(), s.grad_top.end(), 0.f);
  std::fill(s.grad_bottom.begin(), s.grad_bottom.end(), 0.f);
  for (int v = 0; v < lanes.vectors; v++) {
    V largest;
    D loss{};
    bool fit = read_cells(s.top.data(), s.bottom.data(), K, v, lanes, s.cells.data(), largest);
    if (!fit) read_corners(s.top.data(), s.bottom.data(), K, v, lanes, s.cells.data());
    std::fill(s.sums.begin(), s.sums.end(), Sums{});
    for (int i = 0; i < rows; i++) {
      const int32_t* codes = &s.codes[i * codes_stride];
      float fy = problem.y.frac[first + i];
      for (int j = 0, at = lanes.offset[v]; j < lanes.most[v];) {
        int left = lanes.most[v] - j, P = !fit ? 1 : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        if (P == 8) pixels<8, ARGMAX>(problem, s, codes, at + j, fy, fit, largest, loss);
        if (P == 4) pixels<4, ARGMAX>(problem, s, codes, at + j, fy, fit, largest, loss);
        if (P == 2) pixels<2, ARGMAX>(problem, s, codes, at + j, fy, fit, largest, loss);
        if (P == 1) pixels<1, ARGMAX>(problem, s, codes, at + j, fy, fit, largest, loss);
        j += P;
      }
    }
    result.loss += sum(loss);
    for (int k = 0, at = v * LANES; k < K; k++, at += lanes.stride) s.sums[k].to_corners(&s.grad_top[at], &s.grad_bottom[at]);
  }
  add_row(s.grad_top.data(), lanes.stride, problem.grad, n, K, h, w, y);
  add_row(s.grad_bottom.data(), lanes.stride, problem.grad, n, K, h, w, y + 1);
}

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
  for (int64_t odd = 0; odd < 2; odd++) {
    const int64_t rows = (h + 1 - odd) / 2;
    torch::stable::parallel_for(0, N * rows, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(problem);
      for (int64_t i = begin; i < end; i++) {
        const int64_t n = i / rows, row = 2 * (i % rows) + odd;
        auto run = target ? cell_row<false> : cell_row<true>;
        run(problem, scratch, n, row, results[n * h + row]);
      }
    });
  }
  const Result all = add_up(results, K);
  const int64_t pixels = std::max<int64_t>(divide_all ? all.everything : all.kept, 1);
  for (int64_t i = 0, total = N * K * h * x.n; i < total; i++) g[i] *= 1.f / pixels;
  return {scalar(logits, float(all.loss / pixels)), scalar(logits, all.kept), grad};
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seg_ops, m) {
  m.def("masked_cross_entropy(Tensor logits, Tensor? target, Tensor? confidence, Tensor? valid, float cutoff, int height, "
        "int width, int ignore, bool divide_all) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) { m.impl("masked_cross_entropy", TORCH_BOX(&masked_cross_entropy)); }
