// From torch's stable tensors to what the kernels take.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cells.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Points points(const Tensor& t) {
  Points p{t.data_ptr(), t.scalar_type() == ScalarType::BFloat16, {}, {}};
  for (int i = 0; i < 4; i++) p.sizes[i] = t.size(i), p.strides[i] = t.stride(i);
  return p;
}

inline Tensor scalar(const Tensor& like, float value) {
  Tensor t = torch::stable::new_empty(like, {}, ScalarType::Float);
  *t.mutable_data_ptr<float>() = value;
  return t;
}
inline Tensor scalar(const Tensor& like, int64_t value) {
  Tensor t = torch::stable::new_empty(like, {}, ScalarType::Long);
  *t.mutable_data_ptr<int64_t>() = value;
  return t;
}

// Rows of cells, `rows` in each picture, on all threads: each makes itself a job and calls job(picture, row). With two rounds
// the even rows come first, then the odd ones, so that a job may also add to what is the next row's: no two threads meet, and
// the bits do not depend on their number.
template <class Make>
void each_row(int64_t pictures, int64_t rows, int rounds, const Make& make) {
  for (int round = 0; round < rounds; round++) {
    const int64_t own = (rows + rounds - 1 - round) / rounds;
    torch::stable::parallel_for(0, pictures * own, 1, [&](int64_t begin, int64_t end) {
      auto job = make();
      for (int64_t i = begin; i < end; i++) job(i / own, i % own * rounds + round);
    });
  }
}
