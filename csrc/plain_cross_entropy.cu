// Cross entropy over the pixels that count, of logits that are at the labels' own resolution.
//
// In: logits (N,K,H,W) float32, float16 or bfloat16, contiguous. Forward reads them once and keeps, a pixel, the logarithm of the
// softmax's denominator and the label (5 bytes beside 4K); backward reads them once more and writes the gradient. Bound by memory. A probability's relative error is
// that logarithm's absolute one: 2^-24 of the largest logit.
//
// Grid: (H*W / 256, N). Block: 256 pixels side by side, a thread each. All sums have a fixed order: the same bits from run to run.
#include "counted.cuh"

namespace {
constexpr int THREADS = 256;

template <class T>
struct Plain {
  const T* logits;
  int64_t plane;  // H*W
  int K;
  float* lse;       // (N,H,W)
  uint8_t* labels;  // (N,H,W), 255 where a pixel does not count

  // The pixel of this thread in its picture, and where its logits begin.
  __device__ int64_t pixel() const { return int64_t(blockIdx.x) * THREADS + threadIdx.x; }
  __device__ int64_t start() const { return int64_t(blockIdx.y) * K * plane + pixel(); }
};

template <class T, bool ARGMAX>
__global__ void __launch_bounds__(THREADS) plain_forward(Plain<T> problem, Counted counted, Partial* partials) {
  const int64_t pixel = problem.pixel(), at = blockIdx.y * problem.plane + pixel;
  Partial own{};
  if (pixel < problem.plane) {
    const T* logits = problem.logits + problem.start();
    float top = -3.40282347e38f, best = -INFINITY, all = 0, chosen = 0;
    int arg = 0, label = counted.label(at, blockIdx.y, pixel / counted.cx.m, pixel % counted.cx.m, own);
    for (int k = 0; k < problem.K; k++) {
      const float now = logits[k * problem.plane], before = top;
      if (now > best || (now != now && best == best)) best = now, arg = k;
      if (k == label) chosen = now;
      top = fmaxf(top, now);
      all = all * fast_exp2(LOG2E * (before - top)) + fast_exp2(LOG2E * (now - top));
    }
    const float log_all = logf(all);
    if (label >= 0) own.loss = log_all + (top - (ARGMAX ? best : chosen));
    problem.lse[at] = top + log_all;
    problem.labels[at] = label < 0 ? 255 : ARGMAX ? arg : label;
  }
  add_up_block(own, &partials[blockIdx.y * gridDim.x + blockIdx.x]);
}

template <class T>
__global__ void __launch_bounds__(THREADS) plain_backward(Plain<T> problem, const float* upstream, T* grad) {
  const int64_t pixel = problem.pixel(), at = blockIdx.y * problem.plane + pixel;
  if (pixel >= problem.plane) return;
  const float lse = problem.lse[at], share = *upstream;
  const int label = problem.labels[at];
  for (int k = 0; k < problem.K; k++) {
    const int64_t i = problem.start() + k * problem.plane;
    grad[i] = T(label == 255 ? 0.f : (exp2f(LOG2E * (float(problem.logits[i]) - lse)) - (label == k)) * share);
  }
}

// (loss, kept, 1 / pixels divided by, log of the denominators (N,H,W), labels (N,H,W))
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> plain_cross_entropy(Tensor logits, std::optional<Tensor> target,
                                                                       std::optional<Tensor> confidence,
                                                                       std::optional<Tensor> valid, double cutoff,
                                                                       int64_t ignore, bool divide_all) {
  const int64_t N = logits.size(0), K = logits.size(1), H = logits.size(2), W = logits.size(3);
  const dim3 grid((H * W + THREADS - 1) / THREADS, N);
  const Launcher launch(logits);
  Tensor lse = torch::stable::new_empty(logits, {N, H, W}, ScalarType::Float);
  Tensor labels = torch::stable::new_empty(logits, {N, H, W}, ScalarType::Byte);
  Result result(logits, int64_t(grid.x) * N);
  const Counted counted(K, H, W, target, confidence, valid, cutoff, ignore);
  with_type(logits, [&](auto* data) {
    using T = std::decay_t<decltype(*data)>;
    const Plain<T> problem{data, H * W, int(K), lse.mutable_data_ptr<float>(), labels.mutable_data_ptr<uint8_t>()};
    launch(target ? plain_forward<T, false> : plain_forward<T, true>, grid, THREADS, THREADS / 32 * sizeof(Partial), problem, counted, result.data());
  });
  result.add_up(launch, divide_all);
  return {result.loss, result.kept, result.share, lse, labels};
}

// upstream: a float32 scalar, the gradient of the sum of losses
Tensor plain_cross_entropy_backward(Tensor upstream, Tensor logits, Tensor lse, Tensor labels) {
  const int64_t N = logits.size(0), plane = logits.size(2) * logits.size(3);
  Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  const Launcher launch(logits);
  with_type(logits, [&](auto* data) {
    using T = std::decay_t<decltype(*data)>;
    const Plain<T> problem{data, plane, int(logits.size(1)), lse.mutable_data_ptr<float>(), labels.mutable_data_ptr<uint8_t>()};
    launch(plain_backward<T>, dim3((plane + THREADS - 1) / THREADS, N), THREADS, 0, problem, upstream.const_data_ptr<float>(),
           static_cast<T*>(grad.data_ptr()));
  });
  return grad;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEG_OPS_LIBRARY, SEG_OPS_DEVICE, m) {
  m.impl("plain_cross_entropy", TORCH_BOX(&plain_cross_entropy));
  m.impl("plain_cross_entropy_backward", TORCH_BOX(&plain_cross_entropy_backward));
}
