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
