// The most probable class of every pixel of bilinearly upsampled logits.
//
// In: logits (N,K,h,w) float32 or bfloat16, any strides. Out: class ids (N,H,W) uint8, the lowest class on a tie, the first NaN
// where there is one. Never stored: the upsampled logits.
#include "tensors.h"

namespace {
// ids of P * LANES pixels to their columns of the row `to`
template <int P>
void put(const int* column, int width, I* ids, uint8_t* to) {
  if constexpr (P == 8) {
    if (dense<P>(column, width)) {
      interleave_8(ids);
      for (int p = 0; p < P; p++) {
        const U8 bytes = __builtin_convertvector(ids[p], U8);
        std::memcpy(to + column[0] + p * LANES, &bytes, sizeof bytes);
      }
      return;
    }
  }
  for (int i = 0; i < P * LANES; i++)
    if (column[i] < width) to[column[i]] = ids[i / LANES][i % LANES];
}

Tensor upsample_argmax(Tensor logits, int64_t height, int64_t width) {
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width}, ScalarType::Byte);
  uint8_t* ids = out.mutable_data_ptr<uint8_t>();
  const Points from = points(logits);
  const Axis y(from.sizes[2], height), x(from.sizes[3], width);
  const Lanes lanes(x);
  each_row(from.sizes[0], y.n, 1, [&] {
    return [&, walk = Walk(from, y, x, lanes)](int64_t n, int64_t cell) mutable {
      walk(n, cell, [&](auto P, int row, int at) {
        V top[P];
        I arg[P];
        argmax<P>(walk, y.frac[row], &lanes.frac[at * LANES], top, arg);
        put<P>(&lanes.column[at * LANES], width, arg, ids + (n * height + row) * width);
      }, [](int) {});
    };
  });
  return out;
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seg_ops, CPU, m) { m.impl("upsample_argmax", TORCH_BOX(&upsample_argmax)); }
