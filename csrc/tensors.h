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
