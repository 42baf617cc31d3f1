"""What torch must know of the C++ operators, whichever device's are loaded: schemas, shapes of results, gradients."""
from functools import cache

import torch
from torch.autograd.function import once_differentiable

SCHEMAS = {  # ops.py says what they compute; confusion_of_logits is there on CUDA only
    "masked_cross_entropy": "(Tensor logits, Tensor? target, Tensor? confidence, Tensor? valid, float cutoff, "
                            "int height, int width, int ignore, bool divide_all) -> (Tensor, Tensor, Tensor)",
    "upsample_softmax": "(Tensor logits, Tensor? valid, int height, int width, ScalarType dtype) -> Tensor",
    "upsample_softmax_backward": "(Tensor grad, Tensor logits, Tensor? valid) -> Tensor",
    "upsample_argmax": "(Tensor logits, int height, int width) -> Tensor",
    "confusion_matrix": "(Tensor prediction, Tensor target, int num_classes, int ignore, Tensor(a!) out) -> ()",
    "confusion_of_logits": "(Tensor logits, Tensor target, int ignore, Tensor(a!) out) -> ()"}


@cache
def register(library="seg_ops"):
    """Define torch.ops.<library>.*; kernels for any device are loaded before or after."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{library}::{name}", schema)

    @torch.library.register_fake(f"{library}::masked_cross_entropy")
    def _(logits, *_):
        return (logits.new_empty((), dtype=torch.float32), logits.new_empty((), dtype=torch.int64),
                logits.new_empty(logits.shape, dtype=torch.float32))

    def keep_gradient(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype
        ctx.save_for_backward(output[2])

    @once_differentiable
    def scale_gradient(ctx, upstream, *_):
        return (ctx.saved_tensors[0] * upstream).to(ctx.dtype), *[None] * 8

    torch.library.register_autograd(f"{library}::masked_cross_entropy", scale_gradient, setup_context=keep_gradient)

    @torch.library.register_fake(f"{library}::upsample_softmax")
    def _(logits, valid, height, width, dtype):
        return logits.new_empty((*logits.shape[:2], height, width), dtype=dtype)

    @torch.library.register_fake(f"{library}::upsample_softmax_backward")
    def _(grad, logits, valid):
        return logits.new_empty(logits.shape, dtype=torch.float32)

    def keep_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @once_differentiable
    def to_low_resolution(ctx, grad):
        logits, valid = ctx.saved_tensors
        down = torch.ops.seg_ops.upsample_softmax_backward(grad, logits, valid)
        return down.to(logits.dtype), None, None, None, None

    torch.library.register_autograd(f"{library}::upsample_softmax", to_low_resolution, setup_context=keep_inputs)

    @torch.library.register_fake(f"{library}::upsample_argmax")
    def _(logits, height, width):
        return logits.new_empty((len(logits), height, width), dtype=torch.uint8)

    for name in ("confusion_matrix", "confusion_of_logits"):
        torch.library.register_fake(f"{library}::{name}", lambda *_: None)
