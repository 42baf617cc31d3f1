// Cross entropy over the pixels that count, of logits that are at the labels' own resolution.
//
// In: logits (N,K,H,W) float32 or bfloat16, contiguous. Forward reads them once and keeps, a pixel, the logarithm of the
// softmax's denominator and the label (5 bytes beside 4K); backward reads them once more and writes the gradient. It is bound by
// memory, so that computing the exponentials twice is cheaper than storing a gradient to scale it later. A probability's relative
// error is that logarithm's absolute one: 2^-24 of the largest logit.
#include "counted.h"

namespace {
constexpr int P = 4, BLOCK = P * LANES;  // pixels at once
constexpr int AHEAD = 256;               // pixels by which memory is read ahead: K planes are more than the hardware follows
constexpr int ROWS = 4;                  // of pixels a job, side by side in memory: few blocks are not full

template <class T>
inline V read(const T* logits, bool full, int n) {
  __builtin_prefetch(logits + AHEAD);
  return full ? load(logits) : load_some(logits, n);
}

// The log of the denominator and the label of the first n of BLOCK pixels; -> their loss.
template <class T, bool ARGMAX>
V forward(const T* logits, int64_t plane, int K, int n, const int32_t* codes, float* lse, uint8_t* labels, V* scratch) {
  const bool full = n == BLOCK;
  V top[P], sums[P] = {}, loss{};
  I which[P] = {};
  for (int p = 0; p < P; p++) top[p] = splat(-INFINITY);
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) {
      V logit = scratch[k * P + p] = read(logits + k * plane + p * LANES, full, n - p * LANES);
      I larger = logit > top[p];
      top[p] = larger ? logit : top[p];
      if (ARGMAX) which[p] = larger ? k - I{} : which[p];
    }
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) sums[p] += exp2(LOG2E * (scratch[k * P + p] - top[p]));
  float own[BLOCK];
  for (int i = 0; i < BLOCK && !ARGMAX; i++)
    own[i] = reinterpret_cast<const float*>(scratch)[std::min(codes[i], K - 1) * BLOCK + i];
  for (int p = 0; p < P; p++) {
    const V log_sum = LN2 * log2(sums[p]), all = top[p] + log_sum;
    const int rest = n - p * LANES;
    I code;
    std::memcpy(&code, codes + p * LANES, sizeof code);
    loss += code != K ? log_sum + (ARGMAX ? V{} : top[p] - load(own + p * LANES)) : V{};
    const U8 label = __builtin_convertvector(code == K ? 255 - I{} : ARGMAX ? which[p] : code, U8);
    if (rest > 0) std::memcpy(labels + p * LANES, &label, std::min(rest, LANES));
    store_some(lse + p * LANES, rest, all);
  }
  return loss;
}

template <class T>
void backward(const T* logits, T* grad, int64_t plane, int K, int n, const float* lse, const uint8_t* labels, float share) {
  const bool full = n == BLOCK;
  V all[P], scale[P];
  I label[P];
  for (int p = 0; p < P; p++) {
    const int rest = n - p * LANES;
    U8 bytes;
    std::memset(&bytes, 255, sizeof bytes);
    if (rest > 0) std::memcpy(&bytes, labels + p * LANES, std::min(rest, LANES));
    label[p] = __builtin_convertvector(bytes, I);
    all[p] = load_some(lse + p * LANES, rest);
    scale[p] = label[p] == 255 ? V{} : splat(share);
  }
  for (int k = 0; k < K; k++)
    for (int p = 0; p < P; p++) {
      const int64_t at = k * plane + p * LANES;
      V e = exp2(LOG2E * (read(logits + at, full, n - p * LANES) - all[p]));
      V g = (e - (label[p] == k ? splat(1) : V{})) * scale[p];
      g = scale[p] == 0 ? V{} : g;
      if (full) store(grad + at, g);
      else store_some(grad + at, n - p * LANES, g);
    }
}

// Call job(picture, first row, rows) for ROWS rows at a time, the same ones for any number of threads.
template <class Make>
void each_rows(int64_t N, int64_t H, const Make& make) {
  const int64_t jobs = (H + ROWS - 1) / ROWS;
  each_row(N, jobs, 1, [&] {
    return [&, job = make()](int64_t n, int64_t i) mutable { job(n, i * ROWS, std::min<int64_t>(H - i * ROWS, ROWS)); };
  });
}

// (loss, kept, 1 / pixels divided by, log of the denominators (N,H,W), labels (N,H,W) with 255 where a pixel does not count)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plain_cross_entropy(Tensor logits, std::optional<Tensor> target,
                                                                       std::optional<Tensor> confidence,
                                                                       std::optional<Tensor> valid, double cutoff,
                                                                       int64_t ignore, bool divide_all) {
  const int64_t N = logits.size(0), K = logits.size(1), H = logits.size(2), W = logits.size(3);
  Tensor denominators = torch::stable::new_empty(logits, {N, H, W}, ScalarType::Float);
  Tensor chosen = torch::stable::new_empty(logits, {N, H, W}, ScalarType::Byte);
  float* lse = denominators.mutable_data_ptr<float>();
  uint8_t* labels = chosen.mutable_data_ptr<uint8_t>();
  const Counted which = counted(K, H, W, target, confidence, valid, cutoff, ignore);
  std::vector<Result> results(N * H);
  auto run = [&](const auto* data) {
    using T = std::decay_t<decltype(*data)>;
    each_rows(N, H, [&] {
      return [&, codes = std::vector<int32_t>(ROWS * W + BLOCK, K), scratch = std::vector<float>(which.cx.n + 1),
              block = std::vector<V>(K * P)](int64_t n, int64_t first, int64_t rows) mutable {
        Result& result = results[n * H + first];
        for (int64_t i = 0; i < rows; i++) which.row(n, first + i, &codes[i * W], scratch.data(), result);
        std::fill(codes.begin() + rows * W, codes.end(), K);
        const int64_t start = (n * K * H + first) * W, pixel = (n * H + first) * W;
        D loss{};
        for (int64_t x = 0; x < rows * W; x += BLOCK)
          loss += __builtin_convertvector((target ? forward<T, false> : forward<T, true>)(
              data + start + x, H * W, K, std::min<int64_t>(rows * W - x, BLOCK), &codes[x], lse + pixel + x,
              labels + pixel + x, block.data()), D);
        result.loss = sum(loss);
      };
    });
  };
  if (logits.scalar_type() == ScalarType::Float) run(logits.const_data_ptr<float>());
  else run(static_cast<const uint16_t*>(logits.data_ptr()));
  const Result all = add_up(results, K);
  const int64_t pixels = std::max<int64_t>(divide_all ? all.everything : all.kept, 1);
  return {scalar(logits, float(all.loss / pixels)), scalar(logits, all.kept), scalar(logits, 1.f / pixels), denominators, chosen};
}

// upstream: a float32 scalar, the gradient of the sum of losses
Tensor plain_cross_entropy_backward(Tensor upstream, Tensor logits, Tensor denominators, Tensor chosen) {
  const int64_t N = logits.size(0), K = logits.size(1), H = logits.size(2), W = logits.size(3);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  const float share = *upstream.const_data_ptr<float>(), *lse = denominators.const_data_ptr<float>();
  const uint8_t* labels = chosen.const_data_ptr<uint8_t>();
  auto run = [&](const auto* data, auto* out) {
    each_rows(N, H, [&] {
      return [&](int64_t n, int64_t first, int64_t rows) {
        const int64_t start = (n * K * H + first) * W, pixel = (n * H + first) * W;
        for (int64_t x = 0; x < rows * W; x += BLOCK)
          backward(data + start + x, out + start + x, H * W, K, std::min<int64_t>(rows * W - x, BLOCK), lse + pixel + x,
                   labels + pixel + x, share);
      };
    });
  };
  if (logits.scalar_type() == ScalarType::Float) run(logits.const_data_ptr<float>(), grad.mutable_data_ptr<float>());
  else run(static_cast<const uint16_t*>(logits.data_ptr()), static_cast<uint16_t*>(grad.data_ptr()));
  return grad;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("plain_cross_entropy", TORCH_BOX(&plain_cross_entropy));
  m.impl("plain_cross_entropy_backward", TORCH_BOX(&plain_cross_entropy_backward));
}
