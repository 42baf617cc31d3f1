// Confusion matrix (K,K), rows truth, columns prediction, of class ids, or of logits that are upsampled and argmaxed on
// the way; and the argmax alone: the lowest class on a tie, the first NaN where there is one. With confidences (K,) and
// a mask it is 255 where the softmax of the argmax is not above its class's, or the mask is false.
//
// In: ids and labels (N,H,W) uint8 or int64, contiguous; logits (N,K,h,w) float32 or bfloat16, any strides. Each thread
// counts all pairs of bytes, also those that are ignored or out of range, which the end of a count sees in its table:
// nothing is checked pixel by pixel. Labels come in runs, and a run of equal pairs is one addition. Sums of integers do
// not depend on their order. Never stored: the upsampled logits; their argmax is a byte a pixel.
#include <mutex>

#include "cells.h"

namespace {
constexpr int GROUP = 64, CHUNK = 1024, BYTES = 256;

// Bit i is set where (guess[i], truth[i]) is not (guess[i+1], truth[i+1]), for GROUP pixels.
inline uint64_t run_ends(const uint8_t* guess, const uint8_t* truth) {
#ifdef __AVX512BW__
  auto differ = [](const uint8_t* ids) -> uint64_t {
    return _mm512_cmpneq_epu8_mask(_mm512_loadu_si512(ids), _mm512_loadu_si512(ids + 1));
  };
  return differ(guess) | differ(truth);
#else
  return ~uint64_t(0);  // without a compare into a mask runs do not pay
#endif
}

// How often a thread saw each pair: a row for each byte of truth, a column for each class and one for all that is no
// class. Tables take turns where pairs change often: a counter that is written twice in a row would wait for itself.
struct Counter {
  const int K, stride, tables, size;
  std::vector<uint32_t> counts;  // of fewer than 2^32 pixels

  explicit Counter(int K)
      : K(K), stride((K + 16) / 16 * 16 + 16), tables(K <= 64 ? 4 : 1), size(BYTES * stride), counts(tables * size) {}

  int cell(uint8_t guess, uint8_t truth) const { return truth * stride + std::min<int>(guess, K); }

  void add_runs(const uint8_t* guess, const uint8_t* truth, uint64_t ends) {
    for (int begun = 0; ends; ends &= ends - 1) {
      const int last = __builtin_ctzll(ends);
      counts[cell(guess[last], truth[last])] += last + 1 - begun;
      begun = last + 1;
    }
  }

  void add(const uint8_t* guess, const uint8_t* truth, int64_t pixels) {
    for (; pixels > GROUP; pixels -= GROUP, guess += GROUP, truth += GROUP) {
      const uint64_t ends = run_ends(guess, truth);
      if (__builtin_popcountll(ends) <= GROUP / 3) {
        add_runs(guess, truth, ends | uint64_t(1) << (GROUP - 1));
        continue;
      }
      int cells[GROUP];
      for (int i = 0; i < GROUP; i++) cells[i] = cell(guess[i], truth[i]);
      uint32_t* table[4];
      for (int i = 0; i < 4; i++) table[i] = &counts[i % tables * size];
      for (int i = 0; i < GROUP; i += 4)
        for (int j = 0; j < 4; j++) table[j][cells[i + j]]++;
    }
    // the last 1 to GROUP pixels: `run_ends` reads one more than it looks at
    uint8_t g[GROUP + 1] = {}, t[GROUP + 1] = {};
    std::copy(guess, guess + pixels, g);
    std::copy(truth, truth + pixels, t);
    const uint64_t last = uint64_t(1) << (pixels - 1);
    add_runs(g, t, (run_ends(g, t) & (last - 1)) | last);
  }

  // Add what was seen to total (K,K), but for one row of truth; -> whether an id was no class.
  bool add_to(int64_t* total, int64_t ignored_row) const {
    uint32_t outside = 0;
    for (int table = 0; table < tables; table++)
      for (int t = 0; t < BYTES; t++) {
        const uint32_t* row = &counts[table * size + t * stride];
        if (t == ignored_row) continue;
        outside |= row[K];
        for (int g = 0; g < K; g++) {
          if (t < K) total[t * K + g] += row[g];
          else outside |= row[g];
        }
      }
    return outside;
  }
};

// Class ids as they lie in memory.
struct Ids {
  const void* data;
  bool wide;  // int64

  explicit Ids(const Tensor& t) : data(t.data_ptr()), wide(t.scalar_type() == ScalarType::Long) {}
  int64_t at(int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const uint8_t*>(data)[i];
  }
  // n ids as bytes, maybe in `buffer`. Of int64 ids 255 stands for `ignore` and all outside 0..254, which makes `bad`
  // true.
  const uint8_t* bytes(int64_t begin, int n, int64_t ignore, uint8_t* buffer, bool& bad) const {
    if (!wide) return static_cast<const uint8_t*>(data) + begin;
    const int64_t* ids = static_cast<const int64_t*>(data) + begin;
    for (int i = 0; i < n; i++) {
      const bool outside = uint64_t(ids[i]) > 254;
      bad |= outside & (ids[i] != ignore);
      buffer[i] = outside | (ids[i] == ignore) ? 255 : ids[i];
    }
    return buffer;
  }
};

[[noreturn]] void complain(const Ids& guess, const Ids& truth, int64_t pixels, int64_t K, int64_t ignore) {
  for (const Ids* ids : {&truth, &guess})
    for (int64_t i = 0; i < pixels; i++)
      if (truth.at(i) != ignore && (ids->at(i) < 0 || ids->at(i) >= K))
        throw std::invalid_argument(std::string(ids == &truth ? "target" : "prediction") + " holds " +
                                    std::to_string(ids->at(i)) + ", outside 0.." + std::to_string(K - 1) +
                                    " and not ignored");
  throw std::logic_error("no id is out of range");
}

// Where a class is kept. All or nothing is null.
struct Kept {
  const float* confidence;  // (K)
  const bool* valid;        // (N,H,W)
};

// A block's most probable classes to their places in the output row at `at` of (N,H,W). e: (K) to work with.
template <int P>
void argmax(Walk& walk, const Block& block, const Kept& kept, V* e, uint8_t* out, int64_t at) {
  V largest[P], fx[P], sums[P];
  I ids[P] = {}, words[2] = {};  // words: four ids each
  for (int p = 0; p < P; p++) largest[p] = splat(-INFINITY), fx[p] = load(block.fx + p * LANES);
  for (int k = 0; k < walk.K; k++) {
    const Cell& c = walk.cells[k];
    const V a = c.a + block.fy * c.down, right = c.right + block.fy * c.both;
    for (int p = 0; p < P; p++) {
      const V logit = P > 1 || walk.smooth ? a + fx[p] * right : exact(walk.quads[k], block.fy, fx[p]);
      I larger = logit > largest[p];
      if (P == 1) larger |= (logit != logit) & (largest[p] == largest[p]);
      largest[p] = larger ? logit : largest[p];
      ids[p] = larger ? k - I{} : ids[p];
    }
  }
  if (kept.confidence) {
    const V shift = exponentials<P, false>(walk, block, e, sums, [](int, V, V) {});
    for (int p = 0; p < P; p++) {
      V limit;
      for (int l = 0; l < LANES; l++) limit[l] = kept.confidence[ids[p][l]];
      // a limit of 1 may not be passed by what sums are rounded by; NaN is above nothing
      const I above = (exp2(LOG2E * (largest[p] - shift)) > limit * sums[p]) & (limit < 1);
      ids[p] |= ~above & 255;
    }
  }
  for (int p = 0; p < P; p++) words[p / 4] |= ids[p] << p % 4 * 8;
  int32_t halves[2][LANES];
  std::memcpy(halves, words, sizeof halves);
  for (int l = 0; l < LANES; l++) {
    const int n = block.count(l, P);
    uint8_t bytes[PIXELS], *to = out + at + block.column(l);
    std::memcpy(bytes, &halves[0][l], 4), std::memcpy(bytes + 4, &halves[1][l], 4);
    for (int i = 0; kept.valid && i < n; i++) bytes[i] |= uint8_t(kept.valid[at + block.column(l) + i]) - 1;
    if (n == PIXELS) std::memcpy(to, bytes, PIXELS);
    else for (int i = 0; i < n; i++) to[i] = bytes[i];
  }
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width, std::optional<Tensor> confidence,
                       std::optional<Tensor> valid) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  uint8_t* ids = out.mutable_data_ptr<uint8_t>();
  const Upsampling up(logits, height, width);
  const Kept kept{confidence ? confidence->const_data_ptr<float>() : nullptr,
                  valid ? valid->const_data_ptr<bool>() : nullptr};
  each_row(logits.size(0), up.y.n, 1, [&] {
    return [&, walk = Walk(up), e = std::vector<V>(up.logits.sizes[1])](int64_t n, int64_t cell) mutable {
      walk(n, cell, [&](auto P, const Block& block) {
        argmax<P>(walk, block, kept, e.data(), ids, (n * height + block.row) * width);
      }, [](int) {});
    };
  });
  return out;
}

// Adds to `out` (K,K). prediction: ids (N,H,W), or logits (N,K,h,w). Throws std::invalid_argument on what is no class.
void confusion_matrix(Tensor prediction, Tensor target, int64_t ignore, Tensor out) {
  if (prediction.dim() == 4) prediction = upsample_argmax(prediction, target.size(1), target.size(2), {}, {});
  const Ids guess(prediction), truth(target);
  const int64_t K = out.size(0), pixels = target.numel(), ignored_row = truth.wide ? 255 : ignore;
  std::mutex lock;
  std::vector<int64_t> total(K * K);
  bool bad = false;
  torch::stable::parallel_for(0, pixels, 1 << 15, [&](int64_t begin, int64_t end) {
    Counter seen(K);
    uint8_t guess_bytes[CHUNK], truth_bytes[CHUNK];
    bool bad_truth = false, bad_guess = false;
    for (int64_t i = begin; i < end; i += CHUNK) {
      const int n = std::min<int64_t>(end - i, CHUNK);
      const uint8_t* t = truth.bytes(i, n, ignore, truth_bytes, bad_truth);
      seen.add(guess.bytes(i, n, -1, guess_bytes, bad_guess), t, n);
    }
    std::lock_guard<std::mutex> guard(lock);
    bad |= bad_truth | seen.add_to(total.data(), ignored_row);
  });
  if (bad) complain(guess, truth, pixels, K, ignore);
  int64_t* counts = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < K * K; i++) counts[i] += total[i];
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
  m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax));
}
