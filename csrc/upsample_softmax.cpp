// Class probabilities of bilinearly upsampled logits, and the gradient straight to the low resolution.
//
// In: logits (N,K,h,w) float32 or bfloat16, any strides; a mask (N,H,W) of pixels that are zero. Out: (N,K,H,W) float32 or
// bfloat16. Never stored: the upsampled logits; backward computes the probabilities again from the low resolution.
// Cells, exponentials and the two rounds of backward are those of masked_cross_entropy.cpp.
#include "tensors.h"

namespace {
// P * LANES pixels of one row of pixels, all classes.
template <class T>
struct Row {
  T* data;            // (K,W), `plane` elements from class to class
  int64_t plane;
  const bool* valid;  // (W) or null
  const int* column;  // of the pixels, `width` where there is none
  int width;

  // 1 / sums, 0 where there is no pixel or it is not valid
  template <int P>
  void shares(const V* sums, V* share) const {
    for (int i = 0; i < P * LANES; i++) {
      const int x = column[i];
      share[i / LANES][i % LANES] = x < width && (!valid || valid[x]) ? 1 : 0;
    }
    for (int p = 0; p < P; p++) share[p] = share[p] == 0 ? V{} : 1 / sums[p];
  }

  template <int P>
  void put(int k, V* values) const {
    T* out = data + k * plane;
    if (dense<P>(column, width)) {
      if constexpr (P == 8) interleave_8(values);
      for (int p = 0; p < P; p++) store(out + column[0] + p * LANES, values[p]);
      return;
    }
    T one[P * LANES];
    for (int p = 0; p < P; p++) store(one + p * LANES, values[p]);
    for (int i = 0; i < P * LANES; i++)
      if (column[i] < width) out[column[i]] = one[i];
  }

  template <int P>
  void get(int k, V* values) const {
    const T* in = data + k * plane;
    if (dense<P>(column, width)) {
      for (int p = 0; p < P; p++) values[p] = load(in + column[0] + p * LANES);
      if constexpr (P == 8) deinterleave_8(values);
      return;
    }
    std::remove_const_t<T> one[P * LANES] = {};
    for (int i = 0; i < P * LANES; i++)
      if (column[i] < width) one[i] = in[column[i]];
    for (int p = 0; p < P; p++) values[p] = load(one + p * LANES);
  }
};

// Probabilities from numerators `e` and their sums.
template <int P, class T>
void write(const Row<T>& row, int K, const V* e, const V* sums) {
  V share[P];
  row.template shares<P>(sums, share);
  for (int k = 0; k < K; k++, e += P) {
    V probability[P];
    for (int p = 0; p < P; p++) probability[p] = share[p] == 0 ? V{} : e[p] * share[p];
    row.template put<P>(k, probability);
  }
}

// grad of logit k: p_k * (g_k - sum of p_j * g_j); to the corners' sums. g: K * P of scratch.
template <int P, class T>
void read(const Row<T>& row, int K, const V* e, const V* sums, const float* fx, float fy, V* g, Sums* to) {
  V share[P], dot[P] = {}, f[P];
  row.template shares<P>(sums, share);
  for (int k = 0; k < K; k++) {
    row.template get<P>(k, g + k * P);
    for (int p = 0; p < P; p++) dot[p] += e[k * P + p] * g[k * P + p];
  }
  for (int p = 0; p < P; p++) dot[p] *= share[p], f[p] = load(fx + p * LANES);
  for (int k = 0; k < K; k++) {
    V a{}, b{};
    for (int p = 0; p < P; p++) {
      V grad = share[p] == 0 ? V{} : e[k * P + p] * share[p] * (g[k * P + p] - dot[p]);
      a += grad, b += grad * f[p];
    }
    to[k].add(a, b, fy);
  }
}

struct Problem {
  Points logits;
  Axis y, x;
  Lanes lanes;
  const bool* valid;  // (N,H,W) or null

  Problem(const Tensor& logits, const std::optional<Tensor>& valid, int64_t height, int64_t width)
      : logits(points(logits)), y(logits.size(2), height), x(logits.size(3), width), lanes(x),
        valid(valid ? valid->const_data_ptr<bool>() : nullptr) {}
  template <class T>
  Row<T> row(T* data, int64_t plane, int64_t n, int row, int at) const {
    return {data, plane, valid ? valid + (n * y.m + row) * x.m : nullptr, &lanes.column[at * LANES], x.m};
  }
};

template <class T>
void forward(const Problem& problem, T* probs) {
  const int64_t K = problem.logits.sizes[1], W = problem.x.m, plane = problem.y.m * W;
  each_row(problem.logits.sizes[0], problem.y.n, 1, [&] {
    return [&, walk = Walk(problem.logits, problem.y, problem.x, problem.lanes), e = std::vector<V>(K * PIXELS)](
               int64_t n, int64_t cell) mutable {
      walk(n, cell, [&](auto P, int row, int at) {
        V sums[P];
        exponentials<P>(walk, problem.y.frac[row], &problem.lanes.frac[at * LANES], e.data(), sums);
        write<P>(problem.row(probs + n * K * plane + row * W, plane, n, row, at), K, e.data(), sums);
      }, [](int) {});
    };
  });
}

// The gradient of the probabilities as it lies in memory.
template <class T>
struct Upstream {
  const T* data;
  int64_t strides[4];
};

template <class T>
struct Backward {
  const Problem& problem;
  const Upstream<T>& upstream;
  Walk walk;
  Gradient gradient;
  std::vector<V> e, g;
  std::vector<T> copy;  // (rows,K,W) of a row of cells, where a row of pixels is not contiguous

  Backward(const Problem& p, const Upstream<T>& upstream, float* grad)
      : problem(p), upstream(upstream), walk(p.logits, p.y, p.x, p.lanes), gradient(grad, p.logits, p.lanes),
        e(walk.K * PIXELS), g(e) {}

  void operator()(int64_t n, int64_t cell) {
    const int K = walk.K, W = problem.x.m, first = problem.y.first[cell], rows = problem.y.count(cell);
    const int64_t* s = upstream.strides;
    const T* in = upstream.data + n * s[0] + first * s[2];
    if (!rows) return;
    if (s[3] != 1) {
      copy.resize(int64_t(rows) * K * W);
      for (int64_t row = 0; row < rows; row++)
        for (int64_t x = 0; x < W; x++)
          for (int64_t k = 0; k < K; k++) copy[(row * K + k) * W + x] = in[row * s[2] + x * s[3] + k * s[1]];
    }
    walk(n, cell, [&](auto P, int row, int at) {
      V total[P];
      const float* fx = &problem.lanes.frac[at * LANES];
      const float fy = problem.y.frac[row];
      exponentials<P>(walk, fy, fx, e.data(), total);
      const int64_t y = row - first;
      const T* pixels = s[3] == 1 ? in + y * s[2] : &copy[y * K * W];
      read<P>(problem.row(pixels, s[3] == 1 ? s[1] : W, n, row, at), K, e.data(), total, fx, fy, g.data(), gradient.sums.data());
    }, [&](int x) { gradient.to_corners(x); });
    gradient.add(n, cell);
  }
};

template <class T>
void backward(const Problem& problem, const Tensor& upstream, float* grad) {
  Upstream<T> in{static_cast<const T*>(upstream.data_ptr()), {}};
  for (int i = 0; i < 4; i++) in.strides[i] = upstream.stride(i);
  each_row(problem.logits.sizes[0], problem.y.n, 2, [&] { return Backward<T>(problem, in, grad); });
}

Tensor upsample_softmax(Tensor logits, std::optional<Tensor> valid, int64_t height, int64_t width, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), height, width}, dtype);
  const Problem problem(logits, valid, height, width);
  if (dtype == ScalarType::BFloat16) forward(problem, static_cast<uint16_t*>(out.data_ptr()));
  else forward(problem, out.mutable_data_ptr<float>());
  return out;
}

// grad (N,K,H,W) float32 or bfloat16, any strides -> (N,K,h,w) float32
Tensor upsample_softmax_backward(Tensor grad, Tensor logits, std::optional<Tensor> valid) {
  Tensor out = torch::stable::new_zeros(logits, logits.sizes(), ScalarType::Float);
  const Problem problem(logits, valid, grad.size(2), grad.size(3));
  if (grad.scalar_type() == ScalarType::BFloat16) backward<uint16_t>(problem, grad, out.mutable_data_ptr<float>());
  else backward<float>(problem, grad, out.mutable_data_ptr<float>());
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("upsample_softmax", TORCH_BOX(&upsample_softmax));
  m.impl("upsample_softmax_backward", TORCH_BOX(&upsample_softmax_backward));
}
