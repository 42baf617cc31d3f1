// Class probabilities of bilinearly upsampled logits, and the gradient straight to the low resolution.
//
// In: logits (N,K,h,w) float32 or bfloat16, any strides; a mask (N,H,W) of pixels that are zero. Out: (N,K,H,W) float32 or
// bfloat16. Never stored: the upsampled logits; backward computes the probabilities again from the low resolution.
// Cells, exponentials and the two rounds of backward are those of masked_cross_entropy.cpp.
#include "tensors.h"

namespace {
// One row of pixels of one picture, all classes: (K,W) at `plane` elements from class to class.
template <class T>
struct Row {
  T* data;
  int64_t plane;
  const bool* valid;  // (W) or null
  const int* column;  // of P * LANES pixels, `width` where there is none
  int width;

  bool there(int i) const { return column[i] < width && (!valid || valid[column[i]]); }
};

// The numerators e[k*P + p] of the softmax and their sums over k, for P pixels in LANES cells.
template <int P>
void numerators(const Cell* cells, int K, float fy, const float* fx, float step, bool fit, V shift, V* e,
                V* sums) {
  if (fit) return exponentials<P>(cells, K, fy, fx, step, shift, e, sums);
  V top;
  I arg;
  exact(cells, K, fy, load(fx), e, top, arg);  // P is 1
  sums[0] = V{};
  for (int k = 0; k < K; k++) e[k] = exp2(LOG2E * (e[k] - top)), sums[0] += e[k];
}

template <int P, class T>
void write(const Row<T>& row, int K, const V* e, const V* sums) {
  V share[P];
  for (int i = 0; i < P * LANES; i++) share[i / LANES][i % LANES] = row.there(i) ? 1 : 0;
  const bool side_by_side = dense<P>(row.column);
  for (int p = 0; p < P; p++) share[p] = share[p] == 0 ? V{} : 1 / sums[p];
  for (int k = 0; k < K; k++, e += P) {
    T* out = row.data + k * row.plane;
    V probability[P];
    for (int p = 0; p < P; p++) probability[p] = share[p] == 0 ? V{} : e[p] * share[p];
    if (side_by_side) {
      if constexpr (P == 8) interleave_8(probability);
      for (int p = 0; p < P; p++) store(out + row.column[0] + p * LANES, probability[p]);
    } else {
      for (int p = 0; p < P; p++) {
        T values[LANES];
        store(values, probability[p]);
        for (int l = 0; l < LANES; l++)
          if (row.column[p * LANES + l] < row.width) out[row.column[p * LANES + l]] = values[l];
      }
    }
  }
}

// grad of logit k: p_k * (g_k - sum of p_j * g_j); to the corners' sums.
template <int P, class T>
void read(const Row<T>& row, int K, const V* e, const V* sums, const float* fx, float fy, V* g, Sums* to) {
  V share[P], dot[P] = {}, f[P];
  const bool side_by_side = dense<P>(row.column);
  for (int i = 0; i < P * LANES; i++) share[i / LANES][i % LANES] = row.there(i) ? 1 : 0;
  for (int p = 0; p < P; p++) share[p] = share[p] == 0 ? V{} : 1 / sums[p], f[p] = load(fx + p * LANES);
  for (int k = 0; k < K; k++) {
    const T* in = row.data + k * row.plane;
    V* grad = g + k * P;
    if (side_by_side) {
      for (int p = 0; p < P; p++) grad[p] = load(in + row.column[0] + p * LANES);
      if constexpr (P == 8) deinterleave_8(grad);
    } else {
      for (int p = 0; p < P; p++) {
        T values[LANES] = {};
        for (int l = 0; l < LANES; l++)
          if (row.column[p * LANES + l] < row.width) values[l] = in[row.column[p * LANES + l]];
        grad[p] = load(values);
      }
    }
    for (int p = 0; p < P; p++) dot[p] += e[k * P + p] * grad[p];
  }
  for (int p = 0; p < P; p++) dot[p] *= share[p];
  for (int k = 0; k < K; k++) {
    V a{}, b{};
    for (int p = 0; p < P; p++) {
      V grad = share[p] == 0 ? V{} : e[k * P + p] * share[p] * (g[k * P + p] - dot[p]);
      a += grad, b += grad * f[p];
    }
    to[k].add(a, b, fy);
  }
}

// Forward writes probs, backward (grad not null) reads their gradient in `probs` and adds to `grad`, for cell row `cell`.
struct Job {
  Points logits;
  Axis y, x;
  Lanes lanes;
  const bool* valid;
  float* grad;

  template <class T>
  void run(T* probs, int64_t begin, int64_t end, int64_t stride, int64_t odd) const {
    const int64_t K = logits.sizes[1], h = y.n, w = x.n, H = y.m, W = x.m, per_picture = (h + stride - 1 - odd) / stride;
    std::vector<float> top(K * lanes.stride), bottom(top), grad_top(top), grad_bottom(top);
    std::vector<Cell> cells(K);
    std::vector<Sums> sums(K);
    std::vector<V> e(K * PIXELS), g(grad ? K * PIXELS : 0);
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / per_picture, cell = i % per_picture * stride + odd;
      if (!y.count(cell)) continue;
      logits.row(n, cell, lanes, top.data());
      logits.row(n, cell + 1, lanes, bottom.data());
      std::fill(grad_top.begin(), grad_top.end(), 0.f);
      std::fill(grad_bottom.begin(), grad_bottom.end(), 0.f);
      for (int v = 0; v < lanes.vectors; v++) {
        V shift;
        const bool fit = read_cells(top.data(), bottom.data(), K, v, lanes, cells.data(), shift);
        if (!fit) read_corners(top.data(), bottom.data(), K, v, lanes, cells.data());
        std::fill(sums.begin(), sums.end(), Sums{});
        for (int row = y.first[cell]; row < y.first[cell + 1]; row++) {
          for (int j = 0; j < lanes.most[v];) {
            const int at = (lanes.offset[v] + j) * LANES, P = fit && lanes.most[v] - j >= PIXELS ? PIXELS : 1;
            const float* fx = &lanes.frac[at];
            Row<T> pixels{probs + n * K * H * W + row * W, H * W, valid ? valid + (n * H + row) * W : nullptr,
                          &lanes.column[at], int(W)};
            V total[PIXELS];
            auto block = [&](auto size) {
              constexpr int B = decltype(size)::value;
              numerators<B>(cells.data(), K, y.frac[row], fx, x.step, fit, shift, e.data(), total);
              if (grad) read<B>(pixels, K, e.data(), total, fx, y.frac[row], g.data(), sums.data());
              else write<B>(pixels, K, e.data(), total);
            };
            if (P == PIXELS) block(std::integral_constant<int, PIXELS>());
            else block(std::integral_constant<int, 1>());
            j += P;
          }
        }
        for (int k = 0, at = v * LANES; k < K && grad; k++, at += lanes.stride) sums[k].to_corners(&grad_top[at], &grad_bottom[at]);
      }
      if (!grad) continue;
      add_row(grad_top.data(), lanes.stride, grad, n, K, h, w, cell);
      add_row(grad_bottom.data(), lanes.stride, grad, n, K, h, w, cell + 1);
    }
  }
};

template <class T>
void forward(const Job& job, T* probs) {
  torch::stable::parallel_for(0, job.logits.sizes[0] * job.y.n, 1,
                              [&](int64_t begin, int64_t end) { job.run(probs, begin, end, 1, 0); });
}

template <class T>
void backward(const Job& job, T* probs) {
  for (int64_t odd = 0; odd < 2; odd++)
    torch::stable::parallel_for(0, job.logits.sizes[0] * ((job.y.n + 1 - odd) / 2), 1,
                                [&](int64_t begin, int64_t end) { job.run(probs, begin, end, 2, odd); });
}

Job job(const Tensor& logits, const std::optional<Tensor>& valid, int64_t height, int64_t width, float* grad) {
  Axis x(logits.size(3), width);
  return {points(logits), Axis(logits.size(2), height), x, Lanes(x), valid ? valid->const_data_ptr<bool>() : nullptr, grad};
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, bool bf16) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), height, width},
                                        bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  Job j = job(logits, valid, height, width, nullptr);
  if (bf16) forward(j, static_cast<uint16_t*>(out.data_ptr()));
  else forward(j, out.mutable_data_ptr<float>());
  return out;
}

// grad (N,K,H,W), contiguous -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  Tensor out = torch::stable::new_zeros(logits, logits.sizes(), ScalarType::Float);
  Job j = job(logits, valid, grad.size(2), grad.size(3), out.mutable_data_ptr<float>());
  if (grad.scalar_type() == ScalarType::BFloat16) backward(j, static_cast<uint16_t*>(grad.data_ptr()));
  else backward(j, static_cast<float*>(grad.data_ptr()));
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seg_ops, m) {
  m.def("upsample_softmax(Tensor logits, Tensor? valid, int height, int width, bool bf16) -> Tensor");
  m.def("upsample_softmax_backward(Tensor grad, Tensor logits, Tensor? valid) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
