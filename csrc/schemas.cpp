// The operators as torch sees them; ops.py says what they compute. confusion_of_logits is there on CUDA only.
#include <torch/csrc/stable/library.h>

#ifndef SEG_OPS_LIBRARY
#define SEG_OPS_LIBRARY seg_ops
#endif

STABLE_TORCH_LIBRARY(SEG_OPS_LIBRARY, m) {
  m.def("masked_cross_entropy(Tensor logits, Tensor? target, Tensor? confidence, Tensor? valid, float cutoff, int height, "
        "int width, int ignore, bool divide_all) -> (Tensor, Tensor, Tensor)");
  m.def("upsample_softmax(Tensor logits, Tensor? valid, int height, int width, ScalarType dtype) -> Tensor");
  m.def("upsample_softmax_backward(Tensor grad, Tensor logits, Tensor? valid) -> Tensor");
  m.def("upsample_argmax(Tensor logits, int height, int width) -> Tensor");
  m.def("confusion_matrix(Tensor prediction, Tensor target, int num_classes, int ignore, Tensor(a!) out) -> ()");
  m.def("confusion_of_logits(Tensor logits, Tensor target, int ignore, Tensor(a!) out) -> ()");
}
