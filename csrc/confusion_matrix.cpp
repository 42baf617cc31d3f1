// Confusion matrix (K,K), rows truth, columns prediction, from logits at any resolution (upsampled and argmaxed on the way) or
// from class ids. Never stored: anything of the size of the pixels. Each thread counts for itself and adds its table to the
// result at the end; sums of integers do not depend on their order.
#include <mutex>

#include "tensors.h"

namespace {
struct Counter {
  int64_t K, ignore;
  std::vector<int64_t> cells;  // two tables in turn: a counter that is written twice in a row would wait for itself
  const char* bad_name = nullptr;
  int64_t bad_value = 0;

  Counter(int64_t K, int64_t ignore) : K(K), ignore(ignore), cells(2 * K * K) {}

  void add(int64_t truth, int64_t guess, int64_t turn, int64_t times = 1) {
    if (truth == ignore) return;
    if (uint64_t(truth) >= uint64_t(K)) {
      bad_name = "target", bad_value = truth;
    } else if (uint64_t(guess) >= uint64_t(K)) {
      bad_name = "prediction", bad_value = guess;
    } else {
      cells[(turn & 1) * K * K + truth * K + guess] += times;
    }
  }
};

// Call count(begin, end, counter) on all threads and add what they counted to `out`, or throw if a label was out of range.
template <class F>
void count_all(int64_t units, int64_t grain, int64_t K, int64_t ignore, Tensor& out, const F& count) {
  std::mutex lock;
  Counter total(K, ignore);
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) {
    Counter mine(K, ignore);
    count(begin, end, mine);
    std::lock_guard<std::mutex> guard(lock);
    if (mine.bad_name) total.bad_name = mine.bad_name, total.bad_value = mine.bad_value;
    for (size_t i = 0; i < total.cells.size(); i++) total.cells[i] += mine.cells[i];
  });
  if (total.bad_name)
    throw std::invalid_argument(std::string(total.bad_name) + " holds " + std::to_string(total.bad_value) +
                                ", outside 0.." + std::to_string(K - 1) + " and not ignored");
  int64_t* cells = out.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < K * K; i++) cells[i] += total.cells[i] + total.cells[K * K + i];
}

// Labels come in runs: eight that are equal are counted at once.
inline bool run_of_8(const uint8_t* p) {
  uint64_t bytes;
  std::memcpy(&bytes, p, 8);
  return bytes == p[0] * 0x0101010101010101u;
}
inline bool run_of_8(const int64_t* p) {
  int64_t other = 0;
  for (int i = 1; i < 8; i++) other |= p[i] ^ p[0];
  return !other;
}

template <class G, class T>
void count(const G* guess, const T* truth, int64_t pixels, Counter& counter) {
  int64_t i = 0;
  for (; i + 8 <= pixels; i += 8) {
    if (run_of_8(truth + i) && run_of_8(guess + i)) {
      counter.add(truth[i], guess[i], i >> 3, 8);
    } else {
      for (int j = 0; j < 8; j++) counter.add(truth[i + j], guess[i + j], j);
    }
  }
  for (; i < pixels; i++) counter.add(truth[i], guess[i], i);
}

template <class G, class T>
void from_ids(const G* guess, const T* truth, int64_t pixels, int64_t K, int64_t ignore, Tensor& out) {
  count_all(pixels, 1 << 15, K, ignore, out, [&](int64_t begin, int64_t end, Counter& counter) {
    count(guess + begin, truth + begin, end - begin, counter);
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
      count(guess.data(), target + (n * height + first) * width, rows * width, counter);
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
