"""Register the C++ operators with torch, for all devices: schemas, shapes of the results, gradients."""
from functools import cache

import torch
from torch.autograd.function import once_differentiable

SCHEMAS = {  # ops.py says what they compute
    # labels (N,H,W) uint8, 255 if not selected; counts: pixels selected, not ignored, invalid (the CPU raises);
    # threshold: a tensor on the CPU, because torch.compile makes a graph for each value of a float
    "label_map": "(Tensor target, Tensor? confidence, Tensor? valid, Tensor threshold, int K, int ignore) -> "
                 "(Tensor labels, Tensor counts)",
    # total: sum over labels that are not 255; grad: (N,K,h,w) float32, empty unless with_grad; weight: (K,) float32;
    # sum_of_weights: of these labels, empty without weight
    "cross_entropy": "(Tensor logits, Tensor labels, bool with_grad, Tensor? weight=None) -> "
                     "(Tensor total, Tensor grad, Tensor sum_of_weights)",
    # probabilities, and their gradient, are (N,H,W,K)
    "upsample_softmax": "(Tensor logits, Tensor? valid, SymInt height, SymInt width, ScalarType dtype) -> Tensor",
    "upsample_softmax_backward": "(Tensor grad, Tensor logits, Tensor? valid) -> Tensor",
    "upsample_argmax": "(Tensor logits, SymInt height, SymInt width, Tensor? confidence=None, Tensor? valid=None) "
                       "-> Tensor",  # confidence: (K,) float32
    "confusion_matrix": "(Tensor prediction, Tensor target, int ignore, Tensor(a!) out) -> ()"}  # of logits or ids


class CrossEntropy(torch.autograd.Function):
    """The operator cross_entropy / divisor (None: the sum of weights). register_autograd takes much longer."""

    @staticmethod
    def forward(ctx, logits, labels, with_grad, weight, divisor):
        total, grad, sum_of_weights = torch.ops.seg_ops.cross_entropy(logits, labels, with_grad, weight)
        divisor = sum_of_weights.where(sum_of_weights != 0, 1) if divisor is None else divisor
        ctx.save_for_backward(grad, divisor)
        return total / divisor  # div_ takes longer

    @staticmethod
    def backward(ctx, upstream):
        scale = CrossEntropy.scale  # once_differentiable takes time
        scale = once_differentiable(scale) if torch.is_grad_enabled() else scale
        return scale(ctx, upstream), None, None, None, None

    @staticmethod
    def scale(ctx, upstream):
        grad, divisor = ctx.saved_tensors
        return grad * (upstream / divisor)  # autograd casts it to the dtype of logits


@cache
def register(library="seg_ops"):
    """Define torch.ops.<library>.*; kernels may be loaded before or after."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{library}::{name}", schema)

    @torch.library.register_fake(f"{library}::label_map")
    def _(target, *_):
        return target.new_empty(target.shape, dtype=torch.uint8), target.new_empty(3, dtype=torch.int64)

    @torch.library.register_fake(f"{library}::cross_entropy")
    def _(logits, labels, with_grad, weight=None):
        shapes = (), logits.shape if with_grad else 0, 0 if weight is None else ()
        return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in shapes)

    @torch.library.register_fake(f"{library}::upsample_softmax")
    def _(logits, valid, height, width, dtype):
        return logits.new_empty((logits.shape[0], height, width, logits.shape[1]), dtype=dtype)

    @torch.library.register_fake(f"{library}::upsample_softmax_backward")
    def _(grad, logits, valid):
        return logits.new_empty(logits.shape, dtype=torch.float32)

    def keep_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @once_differentiable
    def to_low_resolution(ctx, grad):
        logits, valid = ctx.saved_tensors
        down = torch.ops.seg_ops.upsample_softmax_backward(grad.contiguous(), logits, valid)
        return down.to(logits.dtype), None, None, None, None

    torch.library.register_autograd(f"{library}::upsample_softmax", to_low_resolution, setup_context=keep_inputs)

    @torch.library.register_fake(f"{library}::upsample_argmax")
    def _(logits, height, width, *_):
        return logits.new_empty((logits.shape[0], height, width), dtype=torch.uint8)

    torch.library.register_fake(f"{library}::confusion_matrix", lambda *_: None)
