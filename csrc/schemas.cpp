// The operators as torch sees them; ops.py says what they compute. Probabilities lie as (N,H,W,K), channels last.
#include <torch/csrc/stable/library.h>

#ifndef SEG_OPS_LIBRARY
#define SEG_OPS_LIBRARY seg_ops
#endif

STABLE_TORCH_LIBRARY(SEG_OPS_LIBRARY, m) {
  m.def("label_map(Tensor target, Tensor? confidence, Tensor? valid, float threshold, int classes, int ignore) -> "
        "(Tensor labels, Tensor counts)");  // (N,H,W) uint8, 255 where a pixel does not count; kept, everything, bad
  m.def("cross_entropy(Tensor logits, Tensor labels, bool with_grad) -> (Tensor total, Tensor grad)");
  m.def("upsample_softmax(Tensor logits, Tensor? valid, SymInt height, SymInt width, ScalarType dtype) -> Tensor");
  m.def("upsample_softmax_backward(Tensor grad, Tensor logits, Tensor? valid) -> Tensor");
  m.def("upsample_argmax(Tensor logits, SymInt height, SymInt width) -> Tensor");
  m.def("confusion_matrix(Tensor prediction, Tensor target, int ignore, Tensor(a!) out) -> ()");
}
