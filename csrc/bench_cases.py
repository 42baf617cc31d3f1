"""What bench.py compares: each operator, its reference and the best eager PyTorch, on the same random input."""
import numpy as np
import torch
import torch.nn.functional as F

from csrc import ops


def up(x, size):
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=True)


def both_ways(f, x, upstream=None):
    """f(x) and its backward pass -> the result, the gradient"""
    x = x.detach().requires_grad_()
    y = f(x)
    y.backward(upstream)
    return y.detach(), x.grad


def cases(n, k, h, size, dtype, seed=0, device="cpu"):
    """{operator: {"ours": f, "reference": f, "eager": f}} on random input; labels in blocks, as in pictures, 5 % void.

    On a GPU also "compile": what torch.compile makes of the eager one.
    """
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, h, h, generator=g).mul(3).to(dtype)
    label = F.interpolate(torch.randint(0, k, (n, 1, 24, 24), generator=g).float(), (size, size))[:, 0].to(torch.uint8)
    label[torch.rand(n, size, size, generator=g) < 0.05] = 255
    conf = torch.randn(n, 1, max(1, size // 32), max(1, size // 32), generator=g)
    grad = torch.randn(n, k, size, size, generator=g).to(dtype)
    x, label, conf, grad = (t.to(device) for t in (x, label, conf, grad))
    same, long = h == size, label.long()

    def eager_labels(x):
        return F.cross_entropy(x if same else up(x, size), long, ignore_index=255)

    def eager_argmax(x):
        upsampled = x if same else up(x, size)
        guess = upsampled.detach().max(1).indices
        guess.masked_fill_(up(conf, size)[:, 0].sigmoid() <= 0.5, 255)
        return F.cross_entropy(upsampled, guess, ignore_index=255)

    def eager_confusion(x):
        cell = torch.where(long == 255, k * k, long * k + (x if same else up(x, size)).max(1).indices)
        return torch.bincount(cell.flatten(), minlength=k * k + 1)[:-1].view(k, k)

    def first_of(f, *args, **kw):
        return lambda x: f(x, *args, **kw)[0]

    argmax = dict(confidence=conf, threshold=0.5, size=(size, size))
    ce, ce_reference = ops.masked_cross_entropy, ops.masked_cross_entropy_reference
    found = {
        "cross entropy, labels": dict(ours=first_of(ce, label), reference=first_of(ce_reference, label),
                                      eager=eager_labels),
        "cross entropy, argmax": dict(ours=first_of(ce, **argmax), reference=first_of(ce_reference, **argmax),
                                      eager=eager_argmax)}
    if not same:
        found["upsample_softmax"] = dict(
            ours=lambda x: ops.upsample_softmax(x, (size, size)), eager=lambda x: up(x, size).softmax(1),
            reference=lambda x: ops.upsample_softmax_reference(x, (size, size)))
        found["confusion matrix, logits"] = dict(
            ours=lambda x: ops.confusion_matrix(x, label), eager=eager_confusion,
            reference=lambda x: ops.confusion_matrix_reference(x, label))

    def call(operator, f):
        if operator.startswith("confusion"):
            return lambda: (f(x),)
        return lambda: both_ways(f, x, grad if operator == "upsample_softmax" else None)

    for paths in found.values() if device != "cpu" else ():
        torch._dynamo.reset()  # what was compiled for other sizes would serve these
        paths["compile"] = torch.compile(paths["eager"], dynamic=False)
    return {operator: {name: call(operator, f) for name, f in paths.items()} for operator, paths in found.items()}


def ids_case(side, n=10, k=21, size=321):
    """{way: f} to count uint8 ids and labels, each picture of side x side blocks, 5 % of the labels void."""
    g = torch.Generator().manual_seed(0)
    label, guess = (F.interpolate(torch.randint(0, k, (n, 1, side, side), generator=g).float(), (size, size))[:, 0]
                    .to(torch.uint8) for _ in range(2))
    label[:, :size // 20] = 255
    a, b, long, wide = label.numpy(), guess.numpy(), label.long(), guess.long()

    def part(counts):  # label 255 has rows of its own
        return (torch.as_tensor(counts[:k * k]).view(k, k),)

    def bincount(pairs):
        return part(torch.bincount(pairs.flatten(), minlength=256 * k))

    return {"ours": lambda: (ops.confusion_matrix(guess, label, k),),
            "reference": lambda: (ops.confusion_matrix_reference(guess, label, k),),
            "bincount": lambda: bincount(long * k + wide),
            "bincount of int16": lambda: bincount(label.to(torch.int16) * k + guess),
            "numpy": lambda: part(np.bincount((a.astype(np.uint16) * k + b).ravel(), minlength=256 * k))}
