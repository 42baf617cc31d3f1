// Confusion matrix (K,K), rows truth, columns prediction, from logits at any resolution (upsampled and argmaxed on the way) or
// from class ids. Never stored: anything of the size of the pixels. Each thread counts for itself and adds its table to the
// result at the end; sums of integers do not depend on their order.
#include <algorithm>
#include <mutex>

#include "tensors.h"

namespace {
typedef uint16_t W __attribute__((vector_size(64)));  // 32 ids
constexpr int WIDE = 32, BLOCK = 64;
constexpr uint16_t IGNORED = 511, OUTSIDE = 256;

inline W smaller(W a, W b) { return a < b ? a : b; }
inline bool same(W a, W b) {
#ifdef __AVX512BW__
  return !_mm512_cmpneq_epu16_mask((__m512i)a, (__m512i)b);
#endif
  W d = a ^ b;
  uint64_t part[8], any = 0;
  std::memcpy(part, &d, sizeof part);
  for (uint64_t p : part) any |= p;
  return !any;
}
inline W wide(uint16_t id) {
#ifdef __AVX512BW__
  return (W)_mm512_set1_epi16(id);
#endif
  W v;
  for (int i = 0; i < WIDE; i++) v[i] = id;
  return v;
}

// WIDE ids as 16 bits, those equal to `ignore` as IGNORED and those outside 0..254 as OUTSIDE.
inline W narrow(const uint8_t* ids, int64_t ignore) {
#ifdef __AVX512BW__
  const W id = (W)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids)));
#else
  W id;
  for (int i = 0; i < WIDE; i++) id[i] = ids[i];
#endif
  return id == wide(ignore < 0 || ignore > 255 ? IGNORED : ignore) ? wide(IGNORED) : id;
}
inline W narrow(const int64_t* ids, int64_t ignore) {
  uint16_t to[WIDE];
  for (int i = 0; i < WIDE; i++) to[i] = ids[i] == ignore ? IGNORED : uint64_t(ids[i]) > 254 ? OUTSIDE : ids[i];
  W id;
  std::memcpy(&id, to, sizeof id);
  return id;
}

// Counts in tables of (K+1) x (K+1), where row and column K take what is ignored or out of range. Four tables take turns (two
// where four would leave the first cache): a counter that is written twice in a row would wait for itself.
struct Counter {
  const int64_t K, size, tables, ignore;
  std::vector<uint32_t> cells;  // of fewer than 2^32 pixels a thread
  int64_t filling = 0, bad_value = 0;
  const char* bad_name = nullptr;

  Counter(int64_t K, int64_t ignore)
      : K(K), size((K + 1) * (K + 1)), tables(K <= 40 ? 4 : 2), ignore(ignore), cells(tables * size) {}

  template <class G, class T>
  void count(const G* guess, const T* truth, int64_t pixels) {
    int64_t i = 0;
    for (; i + BLOCK <= pixels; i += BLOCK) block(guess + i, truth + i);
    if (i == pixels) return;
    G last_guess[BLOCK] = {};
    T last_truth[BLOCK] = {};
    std::copy(guess + i, guess + pixels, last_guess);
    std::copy(truth + i, truth + pixels, last_truth);
    block(last_guess, last_truth);
    filling += ignore == 0 ? 0 : BLOCK - (pixels - i);  // ids that are 0 and no pixels
  }
  template <class G, class T>
  void block(const G* guess, const T* truth) {
    const W end = wide(K), width = wide(K + 1), ignored = wide(IGNORED);
    W cell[BLOCK / WIDE], outside{};
    for (int i = 0; i < BLOCK / WIDE; i++) {
      const W t = narrow(truth + i * WIDE, ignore), g = narrow(guess + i * WIDE, -1);
      const W row = smaller(t, end), column = smaller(g, end);
      outside |= (W)((row == end) & (t != ignored)) | (W)((row < end) & (column == end));
      cell[i] = row * width + column;
    }
    if (!same(outside, W{})) find(guess, truth);
    uint32_t* table = cells.data();
    const W first = wide(cell[0][0]);
    if (same(cell[0], first) && same(cell[1], first)) {
      table[cell[0][0]] += BLOCK;  // labels come in runs
      return;
    }
    uint16_t at[BLOCK];
    std::memcpy(at, cell, sizeof at);
    for (int i = 0; i < BLOCK; i += 4)
      for (int j = 0; j < 4; j++) table[(j & (tables - 1)) * size + at[i + j]]++;
  }
  template <class G, class T>
  void find(const G* guess, const T* truth) {
    for (int j = 0; j < BLOCK; j++) {
      const int64_t t = truth[j], g = guess[j];
      if (t == ignore) continue;
      if (t < 0 || t >= K) bad_name = "target", bad_value = t;
      else if (g < 0 || g >= K) bad_name = "prediction", bad_value = g;
    }
  }
};

// Call count(begin, end, counter) on all threads and add what they counted to `out`; throws if an id was out of range.
template <class F>
void count_all(int64_t units, int64_t grain, int64_t K, int64_t ignore, Tensor& out, const F& count) {
  std::mutex lock;
  std::vector<int64_t> total(K * K);
  const char* bad_name = nullptr;
  int64_t bad_value = 0;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Counter mine(K, ignore);
    count(begin, end, mine);
    std::lock_guard<std::mutex> guard(lock);
    if (mine.bad_name) bad_name = mine.bad_name, bad_value = mine.bad_value;
    total[0] -= mine.filling;
    for (int table = 0; table < mine.tables; table++)
      for (int64_t i = 0; i < K; i++)
        for (int64_t j = 0; j < K; j++) total[i * K + j] += mine.cells[table * mine.size + i * (K + 1) + j];
  });
  if (bad_name)
    throw std::invalid_argument(std::string(bad_name) + " holds " + std::to_string(bad_value) + ", outside 0.." +
                                std::to_string(K - 1) + " and not ignored");
  int64_t* cells = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < K * K; i++) cells[i] += total[i];
}

template <class G, class T>
void from_ids(const G* guess, const T* truth, int64_t pixels, int64_t K, int64_t ignore, Tensor& out) {
  count_all(pixels, 1 << 15, K, ignore, out, [&](int64_t begin, int64_t end, Counter& counter) {
    counter.count(guess + begin, truth + begin, end - begin);
  });
}

template <class T>
void from_logits(const Points& logits, const T* target, int64_t height, int64_t width, int64_t ignore, Tensor& out) {
  const int64_t N = logits.sizes[0], K = logits.sizes[1], h = logits.sizes[2];
  const Axis y(h, height), x(logits.sizes[3], width);
  const Lanes lanes(x);
  count_all(N * h, 1, K, ignore, out, [&](int64_t begin, int64_t end, Counter& counter) {
    std::vector<float> top(K * lanes.stride), bottom(top);
    std::vector<Cell> cells(K);
    std::vector<V> e(K);
    V largest, logit[8];
    I arg[8];
    std::vector<uint8_t> guess;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t n = unit / h, cell = unit % h;
      if (!y.count(cell)) continue;
      logits.row(n, cell, lanes, top.data());
      logits.row(n, cell + 1, lanes, bottom.data());
      const int first = y.first[cell], rows = y.count(cell);
      guess.resize(rows * width);
      for (int v = 0; v < lanes.vectors; v++) {
        const bool fit = read_cells(top.data(), bottom.data(), K, v, lanes, cells.data(), largest);
        if (!fit) read_corners(top.data(), bottom.data(), K, v, lanes, cells.data());
        for (int row = 0; row < rows; row++) {
          const float fy = y.frac[first + row];
          for (int j = 0; j < lanes.most[v];) {
            const int at = (lanes.offset[v] + j) * LANES, P = fit && lanes.most[v] - j >= 8 ? 8 : 1;
            const int* column = &lanes.column[at];
            const float* fx = &lanes.frac[at];
            uint8_t* to = &guess[row * width];
            if (P == 8) argmax<8>(cells.data(), K, fy, fx, logit, arg);
            else if (fit) argmax<1>(cells.data(), K, fy, fx, logit, arg);
            else exact(cells.data(), K, fy, load(fx), e.data(), logit[0], arg[0]);
            if (P == 8 && dense<8>(column)) {
              interleave_8(arg);
              for (int p = 0; p < P; p++) {
                const U8 ids = __builtin_convertvector(arg[p], U8);
                std::memcpy(to + column[0] + p * LANES, &ids, sizeof ids);
              }
            } else {
              for (int i = 0; i < P * LANES; i++)
                if (column[i] < width) to[column[i]] = arg[i / LANES][i % LANES];
            }
            j += P;
          }
        }
      }
      counter.count(guess.data(), target + (n * height + first) * width, rows * width);
    }
  });
}

// Adds to `out` (K,K). target (N,H,W) and ids are contiguous, uint8 or int64.
void confusion_from_logits(Tensor logits, Tensor target, int64_t ignore, Tensor out) {
  const int64_t height = target.size(1), width = target.size(2);
  if (target.scalar_type() == ScalarType::Byte)
    from_logits(points(logits), target.const_data_ptr<uint8_t>(), height, width, ignore, out);
  else
    from_logits(points(logits), target.const_data_ptr<int64_t>(), height, width, ignore, out);
}

void confusion_from_ids(Tensor prediction, Tensor target, int64_t num_classes, int64_t ignore, Tensor out) {
  auto with = [&](const auto* truth) {
    if (prediction.scalar_type() == ScalarType::Byte)
      from_ids(prediction.const_data_ptr<uint8_t>(), truth, target.numel(), num_classes, ignore, out);
    else
      from_ids(prediction.const_data_ptr<int64_t>(), truth, target.numel(), num_classes, ignore, out);
  };
  if (target.scalar_type() == ScalarType::Byte) with(target.const_data_ptr<uint8_t>());
  else with(target.const_data_ptr<int64_t>());
}
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(seg_ops, m) {
  m.def("confusion_from_logits(Tensor logits, Tensor target, int ignore, Tensor(a!) out) -> ()");
  m.def("confusion_from_ids(Tensor prediction, Tensor target, int num_classes, int ignore, Tensor(a!) out) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) {
  m.impl("confusion_from_logits", TORCH_BOX(&confusion_from_logits));
  m.impl("confusion_from_ids", TORCH_BOX(&confusion_from_ids));
}
