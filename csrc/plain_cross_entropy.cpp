// Cross entropy over the pixels that count, of logits that are at the labels' own resolution.
//
// In: logits (N,K,H,W) float32 or bfloat16, contiguous. Forward reads them once and keeps, a pixel, the logarithm of the
// softmax's denominator and the label (5 bytes beside 4K); backward reads them once more and writes the gradient. It is bound by
// memory, so that computing the exponentials twice is cheaper than storing a gradient to scale it later.
#include "counted.h"

namespace {
constexpr int P = 4;  // vectors of pixels at once

// The log of the denominator and the label of up to P * LANES pixels of a row; adds to `loss`.
template <class T, bool ARGMAX>
void forward(const T* logits, int64_t plane, int K, int width, const int32_t* codes, float* lse, uint8_t* labels, V* scratch,
             D& total) {
  V top[P], sums[P] = {}, loss{};
  I which[P] = {};
  for (int p = 0; p < P; p++) top[p] = splat(-INFINITY);
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) {
      V logit = scratch[k * P + p] = load_some(logits + k * plane + p * LANES, width - p * LANES);
      I larger = logit > top[p];
      top[p] = larger ? logit : top[p];
      if (ARGMAX) which[p] = larger ? k - I{} : which[p];
    }
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) sums[p] += exp2(LOG2E * (scratch[k * P + p] - top[p]));
  for (int p = 0; p < P; p++) {
    const V all = top[p] + LN2 * log2(sums[p]);
    const int n = width - p * LANES;
    I code = K - I{};
    if (n >= LANES) std::memcpy(&code, codes + p * LANES, sizeof code);
    else for (int l = 0; l < n; l++) code[l] = codes[p * LANES + l];
    V own = top[p];
    if (!ARGMAX)
      for (int l = 0; l < LANES; l++) own[l] = scratch[std::min(code[l], K - 1) * P + p][l];
    loss += code != K ? all - own : V{};
    const U8 label = __builtin_convertvector(code == K ? 255 - I{} : ARGMAX ? which[p] : code, U8);
    if (n > 0) std::memcpy(labels + p * LANES, &label, std::min(n, LANES));
    store_some(lse + p * LANES, n, all);
  }
  total += __builtin_convertvector(loss, D);
}

template <class T>
void backward(const T* logits, T* grad, int64_t plane, int K, int width, const float* lse, const uint8_t* labels,
              float share) {
  V all[P], scale[P];
  I label[P];
  for (int p = 0; p < P; p++) {
    all[p] = load_some(lse + p * LANES, width - p * LANES);
    for (int l = 0; l < LANES; l++) label[p][l] = p * LANES + l < width ? labels[p * LANES + l] : 255;
    scale[p] = label[p] == 255 ? V{} : splat(share);
  }
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) {
      V e = exp2(LOG2E * (load_some(logits + k * plane + p * LANES, width - p * LANES) - all[p]));
      V g = (e - (label[p] == k ? splat(1) : V{})) * scale[p];
      store_some(grad + k * plane + p * LANES, width - p * LANES, scale[p] == 0 ? V{} : g);
    }
}

// (loss, kept, 1 / pixels divided by, log of the denominators (N,H,W), labels (N,H,W) with 255 where a pixel does not count)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plain_cross_entropy(Tensor logits, std::optional<Tensor> target,
                                                                       std::optional<Tensor> confidence,
                                                                       std::optional<Tensor> valid, double cutoff,
                                                                       int64_t ignore, bool divide_all) {
  const int64_t N = logits.size(0), K = logits.size(1), H = logits.size(2), W = logits.size(3);
  Tensor lse = torch::stable::new_empty(logits, {N, H, W}, ScalarType::Float);
  Tensor labels = torch::stable::new_empty(logits, {N, H, W}, ScalarType::Byte);
  const Counted which = counted(K, H, W, target, confidence, valid, cutoff, ignore);
  std::vector<Result> results(N * H);
  auto rows = [&](const auto* data) {
    using T = std::decay_t<decltype(*data)>;
    torch::stable::parallel_for(0, N * H, 8, [&](int64_t begin, int64_t end) {
      std::vector<int32_t> codes(W + 1);
      std::vector<float> scratch(which.cx.n + 1);
      std::vector<V> block(K * P);
      for (int64_t i = begin; i < end; i++) {
        which.row(i / H, i % H, codes.data(), scratch.data(), results[i]);
        D loss{};
        for (int64_t x = 0; x < W; x += P * LANES) {
          auto run = target ? forward<T, false> : forward<T, true>;
          run(data + (i / H * K * H + i % H) * W + x, H * W, K, W - x, &codes[x], lse.mutable_data_ptr<float>() + i * W + x,
              labels.mutable_data_ptr<uint8_t>() + i * W + x, block.data(), loss);
        }
        results[i].loss = sum(loss);
      }
    });
  };
  if (logits.scalar_type() == ScalarType::Float) rows(logits.const_data_ptr<float>());
  else rows(static_cast<const uint16_t*>(logits.data_ptr()));
  const Result all = add_up(results, K);
  const int64_t pixels = std::max<int64_t>(divide_all ? all.everything : all.kept, 1);
  return {scalar(logits, float(all.loss / pixels)), scalar(logits, all.kept), scalar(logits, 1.f / pixels), lse, labels};
}

// upstream: a float32 scalar, the gradient of the sum of losses
Tensor plain_cross_entropy_backward(Tensor upstream, Tensor logits, Tensor lse, Tensor labels) {
  const int64_t N = logits.size(0), K = logits.size(1), H = logits.size(2), W = logits.size(3);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  const float share = *upstream.const_data_ptr<float>();
  auto rows = [&](const auto* data, auto* out) {
    torch::stable::parallel_for(0, N * H, 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        for (int64_t x = 0, start = (i / H * K * H + i % H) * W; x < W; x += P * LANES)
          backward(data + start + x, out + start + x, H * W, K, W - x, lse.const_data_ptr<float>() + i * W + x,
                   labels.const_data_ptr<uint8_t>() + i * W + x, share);
    });
  };
  if (logits.scalar_type() == ScalarType::Float) rows(logits.const_data_ptr<float>(), grad.mutable_data_ptr<float>());
  else rows(static_cast<const uint16_t*>(logits.data_ptr()), static_cast<uint16_t*>(grad.data_ptr()));
  return grad;
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seg_ops, m) {
  m.def("plain_cross_entropy(Tensor logits, Tensor? target, Tensor? confidence, Tensor? valid, float cutoff, int ignore, "
        "bool divide_all) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("plain_cross_entropy_backward(Tensor upstream, Tensor logits, Tensor lse, Tensor labels) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("plain_cross_entropy", TORCH_BOX(&plain_cross_entropy));
  m.impl("plain_cross_entropy_backward", TORCH_BOX(&plain_cross_entropy_backward));
}
