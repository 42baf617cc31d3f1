"""Compare the kernels of a device with their float64 references on the CPU.

    python -m csrc.selfcheck cuda:0    # or cpu; exit status 0, or 1 and one line: what differs, and for which input

csrc/build.py runs this once for each CUDA build, GPU, driver and torch, before the kernels are used.
"""
import sys
from itertools import product

import torch
from torch.utils._pytree import tree_map

from csrc import build, ops

# N, K, h, w, H, W: stride 8; three blocks of cells in a row; more than 48 KB of shared memory; several classes a lane;
# downsampling; an axis that keeps its size
SHAPES = [(2, 21, 4, 7, 25, 49), (1, 2, 4, 19, 25, 145), (1, 255, 2, 10, 9, 73), (1, 150, 3, 5, 17, 33),
          (2, 3, 9, 9, 5, 4), (1, 5, 5, 9, 5, 65)]
INPUTS = [(torch.float32, 3), (torch.float32, 300), (torch.bfloat16, 3), (torch.float16, 3)]  # and their magnitude
LAYOUTS = [lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last),
           lambda x: x.mT.contiguous().mT]


class Mismatch(Exception):
    """One line: which operator is wrong, and for which input."""


def require(condition, line):
    if not condition:  # an assert would be removed by python -O
        raise Mismatch(line)


def results(function, x, *args, upstream=None, **kw):
    """Return the outputs of an operator and, if the first is differentiable, the gradient of x."""
    x = x.detach().requires_grad_(x.is_floating_point())
    outputs = function(x, *args, **kw)
    first, *rest = outputs if isinstance(outputs, tuple) else (outputs,)
    if first.requires_grad:
        upstream = upstream if upstream is None else upstream.to(first.device, first.dtype)
        rest += torch.autograd.grad(first, x, upstream)
    return first.detach(), *rest


def in_float64(x):
    """Return logits (N,K,h,w) and dtypes in float64, all else as it is."""
    is_float = isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point()
    return x.double() if is_float else torch.float64 if isinstance(x, torch.dtype) else x


def compare(device, name, *args, tolerance=2e-5, certain=None, **kw):
    """Compare the results of an operator with those of its reference in float64 on the CPU. Raises Mismatch.

    Args:
        args, kw: the operator's, on the CPU; upstream: (N,K,H,W), gradient of the first output, default 1.
        tolerance: allowed error of float32, as a fraction of the largest value; of half types it is 1e-2.
        certain: (N,H,W) bool, False where rounding may change a class id.
    """
    on_device = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, (args, kw))
    ours, exact = (results(getattr(ops, name + suffix), *args, **kw) for suffix, (args, kw) in (
        ("", on_device), ("_reference", tree_map(in_float64, (args, kw)))))
    for number, (a, b) in enumerate(zip(ours, exact)):
        what = f"{name} of {tuple(args[0].shape)} {args[0].dtype}, result {number}"
        limit = tolerance if a.dtype == torch.float32 else 1e-2 if a.is_floating_point() else 0
        a, b = a.double().cpu(), b.double()
        error = (a - b).nan_to_num(0).abs()
        error = error if certain is None else error.where(certain, 0)
        limit *= b.nan_to_num(0).abs().max().item()
        require(torch.equal(a.isnan(), b.isnan()), f"{what}: NaN at other places")
        require(error.max() <= limit, f"{what}: error {error.max():.2g}, allowed {limit:.2g}")


def check_shape(device, shape, dtype, scale, layout):
    """Compare all operators for logits of one shape, dtype, magnitude and layout, with ignored and masked pixels."""
    n, k, h, w, *size = shape
    g = torch.Generator().manual_seed(0)
    logits = layout((torch.randn(n, k, h, w, generator=g) * scale).to(dtype))
    target = torch.randint(k, (n, size[0], size[1] // 4 + 1), generator=g).repeat_interleave(4, 2)[..., :size[1]]
    target = target.where(torch.rand(n, *size, generator=g) < 0.8, 255)
    valid, upstream = torch.rand(n, *size, generator=g) < 0.8, torch.randn(n, k, *size, generator=g)
    masks = dict(confidence=torch.randn(n, 1, 3, 2, generator=g), valid=valid, threshold=0.3)
    tolerance = 2e-5 if scale < 100 else 5e-3  # steep logits lose digits in any float32
    for labels, kw in ((target.to(torch.uint8), {}), (target, masks | dict(divide="all")),
                       (target, masks | dict(weight=torch.rand(k, generator=g)))):
        compare(device, "masked_cross_entropy", logits, labels, tolerance=tolerance, **kw)
    compare(device, "upsample_softmax", logits, size, dtype, valid, upstream=upstream, tolerance=tolerance)
    compare(device, "select_labels", target, **masks)

    upsampled = ops._upsample(logits.double(), size)
    (first, second), ids = upsampled.topk(2, 1).values.unbind(1), upsampled.argmax(1).to(torch.uint8)
    p, certain = upsampled.softmax(1).amax(1), first - second > 1e-5 * scale
    limits = p.median().float() * (0.9 + 0.2 * torch.rand(k, generator=g))
    compare(device, "upsample_argmax", logits, size, certain=certain)
    certain &= (p - limits[ids.long()]).abs() > 1e-3
    compare(device, "pseudo_labels", logits, size, limits, valid, certain=certain)
    for labels, ignore in ((target.to(torch.uint8), 255), (target.where(target != 255, 1), 1)):
        compare(device, "confusion_matrix", ids.to(labels.dtype), labels, k, ignore=ignore)
    x, labels = logits.to(device), labels.to(device)
    matrices = [ops.confusion_matrix(guess, labels, k, ignore=1) for guess in (x, ops.upsample_argmax(x, size))]
    require(torch.equal(*matrices), f"confusion_matrix of logits {shape} {dtype}: not that of their argmax")


def check_edges(device):
    """Ties, steep and nonfinite logits, confidences at their threshold, no selected pixel, labels that are no class."""
    g = torch.Generator().manual_seed(0)
    noise, upstream = torch.randn(1, 6, 8, 5, generator=g), torch.randn(1, 6, 65, 33, generator=g)
    logits, target = noise[:, :, :5], torch.randint(6, (1, 33, 33), generator=g)
    compare(device, "masked_cross_entropy", logits, target, ignore=2)
    compare(device, "masked_cross_entropy", logits, target, valid=target < 0)
    compare(device, "upsample_argmax", logits[:, [0, 1, 2, 1, 2, 0]], (33, 33))
    almost_1 = 0.05 * logits + 25 * torch.eye(6)[1].view(6, 1, 1)  # rounded probabilities may be above 1
    compare(device, "pseudo_labels", almost_1, (33, 33), 1.0)

    # what is_smooth in exponentials.h excludes: the largest logit falls by 200 in a cell; the sum of exponentials is
    # tiny at one end of a cell; steps of 7.5 a pixel, among classes that are far apart
    for h, height, tolerance, rows in (
            (8, 57, 2e-5, 200 * torch.eye(3, 6)), (3, 65, 5e-5, torch.tensor([0.0, 100])[:, None].expand(2, 4)),
            (8, 29, 3e-6, torch.tensor([(0.0, -30, -28, -29), (-30, -20, -22, -21)]))):
        k = rows.shape[1]
        x = 0.1 * noise[:, :k, :h, :3] + rows[torch.arange(h) % len(rows)].T[:, :, None]
        labels, grad = target.repeat(1, 2, 1)[:, :height, :9] % k, upstream[:, :k, :height, :9]
        for flip in (lambda x: x), lambda x: x.mT:
            compare(device, "masked_cross_entropy", flip(x), flip(labels), tolerance=tolerance)
            compare(device, "upsample_softmax", flip(x), flip(labels).shape[1:], upstream=flip(grad),
                    tolerance=tolerance)

    for bad, size in product((torch.nan, torch.inf, -torch.inf), ((33, 33), (33, 5), (5, 33))):
        x, labels = logits.clone(), target[:, :size[0], :size[1]]
        x[0, 3, 2, 4] = bad
        finite = ops._upsample(x.double(), size).isfinite().all(1)
        compare(device, "masked_cross_entropy", x, labels, valid=finite)
        compare(device, "upsample_softmax", x, size, None, finite, upstream=upstream[..., :size[0], :size[1]])
        compare(device, "pseudo_labels", x, size, 0.4)
        loss, _ = ops.masked_cross_entropy(x.to(device), torch.full_like(labels, 3, device=device))
        require(not loss.isfinite(), f"masked_cross_entropy of a logit {bad}: {loss}")

    labels = torch.zeros(5, 17, 17, dtype=torch.uint8)
    constant = torch.tensor([torch.nan, 0, 200, -200, -5]).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    for threshold in (0.0, 0.5, 1.0):
        compare(device, "select_labels", labels, constant, threshold=threshold)
    for low in ((17, 17), (3, 17), (17, 2)):  # 0 * infinity is NaN: an axis that keeps its size is not interpolated
        compare(device, "select_labels", labels, torch.inf * torch.randn(5, 1, *low, generator=g))
    for label in (6, -1):
        try:  # on the CPU a ValueError
            labels = torch.full((1, 33, 33), label, device=device)
            loss, matrix = (f(logits.to(device), labels) for f in (ops.masked_cross_entropy, ops.confusion_matrix))
            require(loss[0].isnan() and matrix[0, 0] < 0, f"label {label} of 6 classes: loss {loss[0]}, no error")
        except ValueError:
            continue


def check_repeats(device, shape=(10, 21, 41, 41, 321, 321), times=20):
    """At the size of a training: the same bits each time, which a race would not give, and as for each image alone."""
    n, k, h, w, *size = shape
    x, upstream = (torch.randn(n, k, *s, generator=torch.Generator().manual_seed(0)).to(device) for s in ((h, w), size))

    def run(x, upstream):
        ids = ops.pseudo_labels(x, size, 0.1)
        return (*results(ops.upsample_softmax, x, size, upstream=upstream), ids, ops.confusion_matrix(x, ids),
                *results(ops.masked_cross_entropy, x, size=size))
    first, images = run(x, upstream), range(n)
    for _ in range(times):
        require(all(map(torch.equal, first, run(x, upstream))), f"logits {shape}: other bits from run to run")
    alone = zip(*(run(x[i:i + 1], upstream[i:i + 1])[:3] for i in images))
    require(all(map(torch.equal, first, map(torch.cat, alone))), f"logits {shape}: other bits for an image alone")


def check(device, repeats):
    for i, (shape, (dtype, scale)) in enumerate(product(SHAPES, INPUTS)):
        check_shape(device, shape, dtype, scale, LAYOUTS[i % 3])
    check_edges(device)
    if repeats:
        check_repeats(device)


def main(name):
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    build.load(device.type, check=False)
    ops._choose = lambda device: "kernel"
    check(device, repeats=device.type == "cuda")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as e:
        sys.exit(f"{type(e).__name__}: {e}".splitlines()[0])
