"""The C++ operators against the float64 reference: at most twice the float32 one's error, on every kind of input."""
import ctypes
import itertools
import random
import re
import subprocess
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import ROOT

from common.console import InputError
from csrc import bench, build, ops

pytestmark = pytest.mark.skipif(not ops.in_use().startswith("kernel"), reason="the kernels are not in use")

quick = pytest.mark.quick
# N, K, h, w, H, W
SHAPES = [(2, 21, 41, 41, 321, 321), (1, 3, 1, 1, 7, 5), (2, 2, 4, 4, 4, 4), (1, 5, 7, 9, 33, 50),
          (1, 255, 5, 6, 33, 41), (1, 7, 9, 9, 5, 3), (1, 19, 3, 70, 17, 553), (1, 6, 2, 3, 3, 40),
          (3, 11, 9, 9, 129, 129), (1, 2, 1, 9, 1, 9), (1, 9, 5, 1, 9, 1), (1, 5, 3, 10, 9, 127), (1, 5, 3, 5, 9, 63),
          (2, 5, 3, 3, 9, 31), (1, 4, 3, 4, 9, 4), (1, 5, 2, 3, 700, 33)]
SHAPES = [pytest.param(s, marks=quick) if i in (3, 5, 6, 8, 11, 12, 13) else s for i, s in enumerate(SHAPES)]
DEVICE = "cpu"  # where the operators run; tests/test_cuda.py changes it


def inputs(n, k, h, w, height, width, scale=3.0, ignored=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(0, k, (n, height, width), generator=g)
    target[torch.rand(n, height, width, generator=g) < ignored] = 255
    found = (torch.randn(n, k, h, w, generator=g) * scale, target.to(torch.uint8),
             torch.randn(n, 1, 3, 2, generator=g) * 2, torch.rand(n, height, width, generator=g) < 0.8)
    return tuple(x.to(DEVICE) for x in found)


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def both_ways(op, logits, *args, upstream=1.0, **kw):
    """The operator's outputs and the gradient of its first one."""
    logits = logits.detach().requires_grad_()
    out = op(logits, *args, **kw)
    first, *rest = out if isinstance(out, tuple) else (out,)
    first.backward(upstream if isinstance(upstream, torch.Tensor) else torch.full_like(first, upstream))
    return first.detach(), logits.grad, *rest


def close(ours, eager, exact, floor=1e-6):
    """At most twice eager's error, or `floor` of the largest value: what one rounding of a sum or two can cost."""
    for a, b, c in zip(ours, eager, exact):
        a, b, c = a.double(), b.double(), c.double()
        bound = max(2 * (b - c).abs().max().item(), floor * c.abs().max().item())
        assert (a - c).abs().max().item() <= bound, f"{(a - c).abs().max():.3g} against {bound:.3g}"


def cross_entropy_ways(logits, target, confidence, valid):
    size = tuple(target.shape[1:])
    return [dict(target=target),
            dict(target=target.long(), confidence=confidence, valid=valid, threshold=0.3, divide="all"),
            dict(size=size), dict(confidence=confidence, valid=valid, threshold=0.2, size=size)]


def doubled(kw):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kw.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy(shape, dtype):
    logits, *rest = inputs(*shape)
    logits = logits.to(dtype)
    for kw in cross_entropy_ways(logits, *rest):
        before = logits.clone()
        ours = both_ways(ops.masked_cross_entropy, logits, upstream=3, **kw)
        eager = both_ways(ops.masked_cross_entropy_reference, logits, upstream=3, **kw)
        exact = both_ways(ops.masked_cross_entropy_reference, logits.double(), upstream=3, **doubled(kw))
        close(ours, eager, exact)
        assert ours[2].dtype == torch.int64 and abs(ours[2] - exact[2]) <= 0 and ours[1].dtype == dtype
        assert ours[0].dtype == torch.float32 and torch.equal(logits, before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_upsample_softmax(shape, dtype):
    logits, _, _, valid = inputs(*shape)
    logits, size = logits.to(dtype), shape[4:]
    grad = noise(*shape[:2], *size, dtype=dtype)
    for kw in (dict(), dict(valid=valid)):
        ours = both_ways(ops.upsample_softmax, logits, size, upstream=grad, **kw)
        eager = both_ways(ops.upsample_softmax_reference, logits, size, upstream=grad, **kw)
        exact = both_ways(ops.upsample_softmax_reference, logits.double(), size, upstream=grad.double(), **kw)
        close(ours, eager, exact, floor=1e-6 if dtype == torch.float32 else 4e-3)
        assert ours[0].dtype == ours[1].dtype == dtype
    assert ops.upsample_softmax(logits, size, torch.float32).dtype == torch.float32
    assert ops.upsample_softmax(logits.float(), size, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_confusion_matrix(shape, dtype):
    logits, target, *_ = inputs(*shape)
    logits = logits.to(dtype)
    ids = ops.upsample_argmax(logits, shape[4:])
    assert torch.equal(ids, ops.upsample_argmax_reference(logits.double(), shape[4:])) and ids.dtype == torch.uint8
    exact = ops.confusion_matrix_reference(logits.double(), target)
    assert torch.equal(ops.confusion_matrix(logits, target), exact)
    out = torch.ones_like(exact)
    assert ops.confusion_matrix(logits, target.long(), out=out) is out and torch.equal(out, exact + 1)
    k, guess = shape[1], target.flip(1).clamp(max=shape[1] - 1)
    exact = ops.confusion_matrix_reference(guess, target, k)
    for a in (guess, guess.long()):
        for b in (target, target.long()):
            assert torch.equal(ops.confusion_matrix(a, b, k), exact)
    out = torch.ones(2 * k, k, dtype=torch.int64, device=DEVICE)[::2]  # not contiguous
    assert ops.confusion_matrix(guess, target, k, out=out) is out and torch.equal(out, exact + 1)


def check_pseudo_labels(logits, size, confidence, valid=None):
    """The argmax of the kernels, or 255 where the float64 reference says so, but for a rounding of the probability."""
    ids, exact = ops.pseudo_labels(logits, size, confidence, valid), ops._upsample(logits.double(), size).softmax(1)
    best, limit = ops.upsample_argmax(logits, size), torch.ones(logits.shape[1], device=DEVICE) * confidence
    p, limit = exact.gather(1, best.long()[:, None])[:, 0], limit[best.long()]
    sure, clear = p > limit, ~((p - limit).abs() < 2e-6)
    if valid is not None:
        sure, clear = sure & valid, clear | ~valid
    assert torch.equal(ids[clear], best.where(sure, 255)[clear]) and clear.float().mean() > 0.9
    assert ((ids == best) | (ids == 255)).all() and ids.dtype == torch.uint8
    return ids


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pseudo_labels(shape, dtype):
    logits, _, _, valid = inputs(*shape)
    logits, size = logits.to(dtype), shape[4:]
    median = 0.99 * ops._upsample(logits, size).softmax(1).amax(1).median()
    by_class = (noise(shape[1]) * 0.1 + median).clamp(0, 1)
    for confidence in (median.item(), by_class):
        for mask in (None, valid):
            check_pseudo_labels(logits, size, confidence, mask)
    assert torch.equal(ops.pseudo_labels(logits, size, 0), ops.upsample_argmax(logits, size))
    assert (ops.pseudo_labels(logits, size, 1) == 255).all()


@quick
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_pseudo_labels_of_what_is_steep_or_not_finite(bad):
    """No NaN is above a confidence; falls of 200 in a cell, and of what is alike in all classes, cost no digits."""
    logits, *_, valid = inputs(1, 5, 5, 5, 33, 33, scale=30)
    check_pseudo_labels(logits, (33, 33), 0.9, valid)
    check_pseudo_labels(logits + torch.arange(5., device=DEVICE) * 300, (33, 33), 0.9, valid)
    certain = logits * 0.05 + 25 * (torch.arange(5, device=DEVICE) == 1)[:, None, None]
    assert (ops.pseudo_labels(certain, (33, 33), 1) == 255).all()
    logits[0, 2, 1, 3] = bad
    want = ops.pseudo_labels_reference(logits, (33, 33), 0.9, valid)
    assert torch.equal(ops.pseudo_labels(logits, (33, 33), 0.9, valid), want) and (want < 255).any()
    assert torch.equal(ops.pseudo_labels(torch.zeros(1, 3, 2, 2, device=DEVICE), (5, 5), 0.3),
                       torch.zeros(1, 5, 5, dtype=torch.uint8, device=DEVICE))  # a tie


@pytest.mark.parametrize("pixels", [1, 31, 32, 63, 65, 1023, 1024, pytest.param(1025, marks=quick), 3000, 100_001])
@pytest.mark.parametrize("longest", [1, 4, 50, 3000])
def test_confusion_matrix_of_runs(pixels, longest):
    """Runs of ids of any length, that end in both inputs at will, over the ends of blocks and of chunks."""
    g = torch.Generator().manual_seed(pixels)
    runs = 4 * pixels // longest + 4
    for k, ignore in [(2, 255), (21, 255), (21, 0), (255, 0)]:
        guess, target = (torch.repeat_interleave(torch.randint(0, k, (runs,), generator=g), torch.randint(
            1, longest + 1, (runs,), generator=g))[:pixels].view(1, 1, pixels) for _ in range(2))
        target[torch.rand(target.shape, generator=g) < 0.1 / longest] = ignore
        guess, target = guess.to(DEVICE), target.to(DEVICE)
        exact = ops.confusion_matrix_reference(guess, target, k, ignore=ignore)
        assert torch.equal(ops.confusion_matrix(guess.to(torch.uint8), target.to(torch.uint8), k, ignore=ignore), exact)


@pytest.mark.parametrize("k", range(2, 256, 11))
def test_every_number_of_classes(k):
    logits, target, *_ = inputs(1, k, 3, 4, 17, 25)
    close(both_ways(ops.masked_cross_entropy, logits, target),
          both_ways(ops.masked_cross_entropy_reference, logits, target),
          both_ways(ops.masked_cross_entropy_reference, logits.double(), target))


@quick
@pytest.mark.parametrize("ignored", [0, 1])
def test_nothing_ignored_and_everything(ignored):
    logits, target, confidence, _ = inputs(2, 5, 4, 4, 25, 25, ignored=ignored)
    loss, grad, kept = both_ways(ops.masked_cross_entropy, logits, target)
    assert kept == (0 if ignored else target.numel()) and (loss == 0) == (grad == 0).all() == bool(ignored)
    for size in ((25, 25), (4, 4)):
        loss, grad, kept = both_ways(ops.masked_cross_entropy, logits, confidence=confidence, threshold=1.0, size=size)
        assert loss == 0 and kept == 0 and (grad == 0).all()


@quick
def test_second_backward_is_the_same():
    logits, target, *_ = inputs(1, 5, 4, 4, 25, 25)
    logits.requires_grad_()
    loss, _ = ops.masked_cross_entropy(logits, target)
    probs = ops.upsample_softmax(logits, (25, 25))
    for y in (loss, probs.square().sum()):
        first, second = (torch.autograd.grad(y * 2, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first.abs().max() > 0


def test_a_second_derivative_is_refused():
    logits, target, *_ = inputs(1, 5, 4, 4, 25, 25)
    logits.requires_grad_()
    for y in (ops.masked_cross_entropy(logits, target)[0], ops.upsample_softmax(logits, (25, 25)).square().sum()):
        first, = torch.autograd.grad(y * y, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
            first.sum().backward()


def layouts(x):
    """The same numbers with other strides; the last one is expanded, where every picture is the first."""
    n, k, h, w = x.shape
    wide = torch.zeros(n, k, h, 2 * w, device=x.device)
    wide[..., ::2] = x
    return [wide[..., ::2], x.transpose(2, 3).contiguous().transpose(2, 3),
            x.contiguous(memory_format=torch.channels_last), x[:1].expand(n, -1, -1, -1)]


@quick
def test_layouts():
    size = 25, 25
    logits, target, confidence, valid = inputs(2, 5, 4, 4, *size)
    grad = noise(2, 5, *size)
    for x in layouts(logits):
        y = x.contiguous()
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (target, valid)]
        for a, b in [(both_ways(ops.masked_cross_entropy, x, strided[0], confidence, valid=strided[1]),
                      both_ways(ops.masked_cross_entropy, y, target, confidence, valid=valid)),
                     (both_ways(ops.upsample_softmax, x, size, valid=strided[1], upstream=layouts(grad)[2]),
                      both_ways(ops.upsample_softmax, y, size, valid=valid, upstream=grad)),
                     ([ops.confusion_matrix(x, strided[0])], [ops.confusion_matrix(y, target)])]:
            assert all(torch.equal(p, q) for p, q in zip(a, b))


@quick
def test_ties_go_to_the_lowest_class():
    logits = torch.zeros(1, 6, 5, 5, device=DEVICE)
    logits[:, [2, 4]] = noise(1, 1, 5, 5).abs() + 1  # two equal winners
    target = torch.zeros(1, 33, 33, dtype=torch.uint8, device=DEVICE)
    assert ops.confusion_matrix(logits, target)[0].tolist() == [0, 0, 33 * 33, 0, 0, 0]
    grad = both_ways(ops.masked_cross_entropy, logits, size=(33, 33))[1]
    assert (grad[:, 2] < 0).all() and (grad[:, 4] > 0).all()
    same = both_ways(ops.masked_cross_entropy, logits, size=(5, 5))[1]
    assert (same[:, 2] < 0).all() and (same[:, 4] > 0).all()


@pytest.mark.parametrize("bad", [pytest.param(float("nan"), marks=quick), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(33, 33), (33, 5), (5, 33)])
def test_not_finite(bad, size):
    """NaN where eager PyTorch on the counted pixels gives NaN; a pixel that does not count changes nothing."""
    logits, target, *_ = inputs(1, 6, 5, 5, *size, ignored=0)
    for k, y, x in ((0, 0, 0), (3, 2, 4), (5, 4, 4)):
        broken = logits.clone()
        broken[0, k, y, x] = bad
        eager, ours = (f(broken, target)[0] for f in (ops.masked_cross_entropy_reference, ops.masked_cross_entropy))
        torch.testing.assert_close(ours, eager, equal_nan=True)
        eager, ours = (f(broken, size=size)[0] for f in (ops.masked_cross_entropy_reference, ops.masked_cross_entropy))
        torch.testing.assert_close(ours, eager, equal_nan=True)
        eager, ours = (f(broken, size) for f in (ops.upsample_softmax_reference, ops.upsample_softmax))
        torch.testing.assert_close(ours, eager, equal_nan=True)
        assert torch.equal(ops.confusion_matrix(broken, target), ops.confusion_matrix_reference(broken, target))
        nothing, ones = torch.zeros(1, *size, dtype=torch.bool, device=DEVICE), torch.ones(1, 6, *size, device=DEVICE)
        for f in (ops.upsample_softmax_reference, ops.upsample_softmax):
            assert all((x == 0).all() for x in both_ways(f, broken, size, valid=nothing, upstream=ones))
        touched = F.interpolate(broken, size, mode="bilinear", align_corners=True).isfinite().all(1).logical_not()
        far = target.masked_fill(touched, 255)
        ours, clean = (both_ways(ops.masked_cross_entropy, x, far) for x in (broken, logits))
        assert ours[0].isfinite() and ours[0] == pytest.approx(clean[0].item(), rel=1e-5)
        assert ours[1].isfinite().all()


def check_steep(logits, target, size):
    """Softmax and both cross entropies, where exponentials underflow on the way."""
    close([ops.upsample_softmax(logits, size)], [ops.upsample_softmax_reference(logits, size)],
          [ops.upsample_softmax_reference(logits.double(), size)], floor=4e-6)
    for kw in (dict(target=target), dict(size=size)):
        close(both_ways(ops.masked_cross_entropy, logits, **kw),
              both_ways(ops.masked_cross_entropy_reference, logits, **kw),
              both_ways(ops.masked_cross_entropy_reference, logits.double(), **kw), floor=4e-6)


@quick
def test_steep_logits():
    """Falls of hundreds within a cell."""
    for scale, size in itertools.product((5, 10, 30, 100, 1000), ((25, 25), (13, 13), (14, 11))):
        logits, target, *_ = inputs(1, 6, 4, 4, *size, scale=scale)
        check_steep(logits, target, size)


@quick
@pytest.mark.parametrize("axis", [2, 3])
def test_steep_along_one_axis(axis):
    """Falls of 200 along one axis only, so that along the other nothing says how far apart the classes are."""
    shape = (1, 6, 3, 8, 25, 57) if axis == 3 else (1, 6, 8, 3, 57, 25)
    logits, target, *_ = inputs(*shape)
    for i in range(8):
        logits[:, i % 3].select(axis - 1, i).fill_(200)
    check_steep(logits, target, shape[4:])


@quick
@pytest.mark.parametrize("axis", [2, 3])
def test_falls_from_pixel_to_pixel(axis):
    """By 10 along one axis, from class to class by 30 at most: an exponential that has lost its digits still counts."""
    shape = (1, 4, 3, 8, 9, 22) if axis == 3 else (1, 4, 8, 3, 22, 9)
    logits, target, *_ = inputs(*shape, scale=0.1)
    for i in range(8):
        near = logits.select(axis, i)  # (1,4,3)
        near += torch.tensor([(0, -30, -28, -29), (-30, -20, -22, -21)][i % 2], device=near.device)[:, None]
    check_steep(logits, target, shape[4:])


@quick
@pytest.mark.parametrize("axis", [2, 3])
def test_all_classes_fall(axis):
    """By 50 from point to point, little from pixel to pixel: at one end all exponentials, and their sum, are tiny."""
    logits, target, *_ = inputs(1, 4, 3, 3, 65, 65, scale=0.1)
    logits.select(axis, 1).add_(50)
    check_steep(logits, target, (65, 65))


@quick
@pytest.mark.parametrize("ignore", [0, 2, 300])
def test_another_label_ignored(ignore):
    """Of the classes, or none of them; the argmax is never ignored."""
    logits, target, confidence, valid = inputs(1, 5, 4, 4, 25, 25, ignored=0)
    for labels in (target, target.long()):
        for kw in (dict(target=labels), dict(target=labels, confidence=confidence, valid=valid, divide="all"),
                   dict(size=(25, 25), divide="all")):
            ours, eager = (both_ways(f, logits, ignore=ignore, **kw) for f in (
                ops.masked_cross_entropy, ops.masked_cross_entropy_reference))
            close(ours, eager, eager, floor=1e-5)
            assert ours[2] == eager[2]
    for value in (44, 255) if ops._can_look(target) else ():  # as a byte 300 is 44
        target[0, 3, 3] = value
        for f in (ops.masked_cross_entropy, ops.masked_cross_entropy_reference, ops.confusion_matrix,
                  ops.confusion_matrix_reference):
            with pytest.raises(ValueError, match=f"target holds {value}"):
                f(logits, target, ignore=ignore)


@quick
def test_confidence_that_does_not_count():
    logits, *_ = inputs(1, 4, 3, 3, 17, 17)
    for value, threshold, counts in [(float("nan"), 0.0, False), (0.0, 0.5, False), (1e-3, 0.5, True),
                                     (-200, 0.2, False), (200, 0.2, True), (200, 1.0, False), (-5, 0.0, True)]:
        confidence = torch.full((1, 1, 2, 2), float(value), device=DEVICE)
        for f in (ops.masked_cross_entropy, ops.masked_cross_entropy_reference):
            kept = f(logits, confidence=confidence, threshold=threshold, size=(17, 17))[1]
            assert (kept > 0) == counts, (value, threshold)


@quick
def test_infinite_confidence():
    """A mask given as plus and minus infinity, at the labels' own size, where nothing is interpolated."""
    logits, target, _, mask = inputs(2, 4, 3, 3, 17, 9, ignored=0)
    confidence = torch.where(mask, torch.inf, -torch.inf)[:, None]
    confidence[0, 0, 3, 3] = torch.nan
    mask[0, 3, 3] = False
    for f in (ops.masked_cross_entropy, ops.masked_cross_entropy_reference):
        for kw in (dict(target=target), dict(size=(17, 9))):
            loss, grad, kept = both_ways(f, logits, confidence=confidence, threshold=0.2, **kw)
            want, want_grad, want_kept = both_ways(f, logits, valid=mask, **kw)
            assert kept == want_kept == mask.sum() and loss == want and torch.equal(grad, want_grad)


@quick
def test_no_pictures():
    logits, target, confidence, valid = (x[:0] for x in inputs(1, 5, 4, 4, 9, 9))
    for kw in cross_entropy_ways(logits, target, confidence, valid):
        loss, grad, kept = both_ways(ops.masked_cross_entropy, logits, **kw)
        assert loss == 0 and kept == 0 and grad.shape == logits.shape
    assert ops.upsample_softmax(logits, (9, 9)).shape == (0, 5, 9, 9)
    assert ops.upsample_argmax(logits, (9, 9)).shape == ops.pseudo_labels(logits, (9, 9), 0.5).shape == (0, 9, 9)
    assert not ops.confusion_matrix(logits, target).any() and not ops.confusion_matrix(target, target, 5).any()


@quick
@pytest.mark.parametrize("size", [(5, 17), (17, 5)])
def test_an_axis_that_keeps_its_size_stays_with_the_kernels(size):
    logits, target, *_ = inputs(2, 3, 5, 5, *size)
    calls = [lambda: both_ways(ops.masked_cross_entropy, logits, target),
             lambda: both_ways(ops.upsample_softmax, logits, size, upstream=noise(2, 3, *size)),
             lambda: [ops.upsample_argmax(logits, size)], lambda: [ops.pseudo_labels(logits, size, 0.5)],
             lambda: [ops.confusion_matrix(logits, target)]]
    want = [call() for call in calls]
    names = "masked_cross_entropy", "upsample_softmax", "upsample_argmax", "pseudo_labels", "confusion_matrix"
    with mock.patch.multiple(ops, **{f"{name}_reference": None for name in names}):
        assert all(torch.equal(a, b) for call, one in zip(calls, want) for a, b in zip(call(), one))


@quick
def test_only_the_loss_has_a_gradient_and_only_where_it_is_asked_for(monkeypatch):
    logits, target, *_ = inputs(1, 5, 4, 4, 25, 25)
    with torch.no_grad():
        asked = torch.ops.seg_ops.cross_entropy(logits, target, False)
    total, grad = torch.ops.seg_ops.cross_entropy(logits.requires_grad_(), target, True)
    assert asked[0] == total and asked[1].numel() == 0
    assert total.requires_grad and not grad.requires_grad and grad.shape == logits.shape
    seen, cross_entropy = [], torch.ops.seg_ops.cross_entropy
    monkeypatch.setattr(torch.ops.seg_ops, "cross_entropy", lambda *a: seen.append(a[2]) or cross_entropy(*a))
    ops.masked_cross_entropy(logits, target)
    ops.masked_cross_entropy(logits.detach(), target)
    with torch.no_grad():
        ops.masked_cross_entropy(logits, target)
    assert seen == [True, False, False]


def test_compiled_with_symbols():
    """torch.compile of all operators: a graph for the first size and threshold, and one for all others."""
    def step(logits, target, confidence, threshold):
        size = target.shape[1:]
        probabilities = ops.upsample_softmax(logits, size)
        loss, kept = ops.masked_cross_entropy(logits, None, confidence, size=size, threshold=threshold)
        return (loss + probabilities.square().mean() + ops.masked_cross_entropy(logits, target)[0], kept,
                ops.upsample_argmax(logits, size), ops.pseudo_labels(logits, size, threshold),
                ops.confusion_matrix(logits.detach(), target))
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for i in range(15):
        logits, target, confidence, _ = inputs(2 + i % 2, 4, 5 + i, 6 + i, 33 + 2 * i, 40 + i)
        for a, b in zip(*(both_ways(f, logits, target, confidence, 0.2 + i / 20) for f in (step, compiled))):
            torch.testing.assert_close(a, b)
        assert graphs.frame_count <= 2


def drawn(seed):
    """One case of all operators: (logits, target, confidence, valid, keywords), any sizes, strides and numbers."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, k = rng.choice([1, 1, 2, 3]), rng.choice([2, 3, 7, 16, 21, 33, 255])
    low, high = ([rng.randint(1, most) for _ in range(2)] for most in (12 if k > 99 else 40, 70))
    if rng.random() < 0.5:  # as nets have them: a stride of 4, 8, 16 or 32
        high[rng.randrange(2)] = rng.choice([4, 8, 32]) * 4 + 1
        low = [5 if side % 4 == 1 else other for side, other in zip(high, low)]
    logits = torch.randn(n, k, *low, generator=g) * rng.choice([0.1, 1, 3, 10, 50])
    logits = rng.choice([logits, *layouts(logits)[:3]])
    if rng.random() < 0.2:
        place = 0, rng.randrange(k), rng.randrange(low[0]), rng.randrange(low[1])
        logits[place] = float(rng.choice(["nan", "inf", "-inf"]))
    size, block = high, rng.choice([1, 5, 30])
    target = torch.randint(0, k, (n, *(-(-side // block) for side in size)), generator=g)
    target = target.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :size[0], :size[1]].contiguous()
    target[torch.rand(target.shape, generator=g) < rng.choice([0, 0.05, 0.9])] = 255
    confidence = torch.randn(n, 1, *rng.choice([(1, 1), (3, 2), (size[0], 2), (3, size[1]), size]), generator=g)
    confidence = rng.choice([confidence, torch.where(confidence.abs() > 1, confidence * torch.inf, confidence)])
    kw = dict(confidence=rng.choice([None, confidence]), threshold=rng.choice([0, 0.2, 0.5, 0.9]),
              valid=rng.choice([None, torch.rand(n, *size, generator=g) < 0.7]), divide=rng.choice(["kept", "all"]))
    return logits.to(rng.choice([torch.float32, torch.bfloat16])), target.to(rng.choice([torch.uint8, torch.int64])), kw


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_drawn(first):
    """300 cases of all operators; a failure names the seed of its case: `drawn(seed)`."""
    for seed in range(first, first + 25):
        logits, target, kw = drawn(seed)
        size, valid, finite = tuple(target.shape[1:]), kw["valid"], logits.isfinite().all()
        try:
            for given in (dict(target=target), dict(size=size)):
                ours, eager, exact = (both_ways(f, x, **given, **more) for f, x, more in (
                    (ops.masked_cross_entropy, logits, kw), (ops.masked_cross_entropy_reference, logits, kw),
                    (ops.masked_cross_entropy_reference, logits.double(), doubled(kw))))
                assert ours[2] in (eager[2], exact[2])
                if finite:  # an infinite confidence may count elsewhere in float64, where the last column is exact
                    close(ours, eager, exact if exact[2] == eager[2] else eager, floor=4e-6)
                else:
                    assert ours[0].isfinite() == eager[0].isfinite()
            upstream = noise(len(logits), *size, logits.shape[1]).permute(0, 3, 1, 2)
            upstream = upstream if seed % 2 else upstream.contiguous()
            ours, eager, exact = (both_ways(f, x, size, dtype, valid, upstream=upstream.to(dtype)) for f, x, dtype in (
                (ops.upsample_softmax, logits, torch.float32), (ops.upsample_softmax_reference, logits, torch.float32),
                (ops.upsample_softmax_reference, logits.double(), torch.float64)))
            if finite:
                close(ours, eager, exact, floor=4e-6 if logits.dtype == torch.float32 else 4e-3)
            else:
                torch.testing.assert_close(ours[0], eager[0], equal_nan=True)
            ids, other = ops.upsample_argmax(logits, size), ops.upsample_argmax_reference(logits, size)
            upsampled = F.interpolate(logits.double(), size, mode="bilinear", align_corners=True)
            tops = [upsampled.gather(1, x.long()[:, None])[:, 0][ids != other] for x in (ids, other)]
            torch.testing.assert_close(*tops, rtol=1e-6, atol=0)  # ties, but for a rounding
            limits = torch.rand(logits.shape[1], generator=torch.Generator().manual_seed(seed))
            if finite:
                check_pseudo_labels(logits, size, limits, valid)
            else:
                found, want = (f(logits, size, limits, valid) for f in (ops.pseudo_labels, ops.pseudo_labels_reference))
                assert (found == want).float().mean() > 0.99
            matrix = ops.confusion_matrix_reference(ids, target, logits.shape[1])
            assert torch.equal(ops.confusion_matrix(logits, target), matrix)
            assert torch.equal(ops.confusion_matrix(ids, target, logits.shape[1]), matrix)
        except AssertionError as e:
            raise AssertionError(f"drawn({seed})") from e


def test_the_naive_kernel(tmp_path):
    """The one in csrc/LOG.md that a reader starts from."""
    code = re.search("```cpp\n(.*?)```", (ROOT / "csrc/LOG.md").read_text(), re.S)[1]
    headers = "".join(f"#include <{name}>\n" for name in ("algorithm", "cmath", "cstdint", "vector"))
    (tmp_path / "naive.cpp").write_text(headers + code)
    flags = "-O1", "-shared", "-fPIC", "-o", tmp_path / "naive.so"
    subprocess.run([*build.cxx().split(), *flags, tmp_path / "naive.cpp"], check=True)
    naive = ctypes.CDLL(tmp_path / "naive.so").cross_entropy
    naive.restype = ctypes.c_double
    for shape in ((1, 5, 7, 9, 33, 50), (1, 3, 1, 1, 7, 5), (1, 7, 9, 9, 5, 3)):
        logits, target, *_ = inputs(*shape)
        grad = torch.zeros_like(logits)
        loss = naive(*(ctypes.c_void_p(x.data_ptr()) for x in (logits, target, grad)), *shape[1:])
        total, want = torch.ops.seg_ops.cross_entropy(logits, target, True)
        assert loss == pytest.approx(total.item(), rel=1e-5)
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)


@quick
def test_bad_labels():
    logits, target, *_ = inputs(1, 6, 5, 5, 33, 33)
    for value in (6, 254, -1, 1 << 40):
        bad = target.long()
        bad[0, 2, 3] = value
        for labels in [bad, bad.to(torch.uint8)] if 0 <= value < 255 else [bad]:
            for call in (lambda: ops.masked_cross_entropy(logits, labels),
                         lambda: ops.confusion_matrix(logits, labels),
                         lambda: ops.confusion_matrix(labels.clamp(0, 5), labels, 6)):
                with pytest.raises(ValueError, match=f"target holds {value}, outside 0..5"):
                    call()
            with pytest.raises(ValueError, match=f"prediction holds {value}, outside 0..5"):
                ops.confusion_matrix(labels.masked_fill(labels == 255, 0), torch.zeros_like(labels), 6)


@quick
def test_same_bits_for_any_number_of_threads():
    logits, target, confidence, valid = inputs(3, 21, 17, 17, 129, 129)
    grad, threads, results = noise(3, 21, 129, 129), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append([*both_ways(ops.masked_cross_entropy, logits, target, confidence, valid=valid),
                            *both_ways(ops.masked_cross_entropy, logits, size=(129, 129)),
                            *both_ways(ops.upsample_softmax, logits, (129, 129), upstream=grad),
                            ops.confusion_matrix(logits, target), ops.pseudo_labels(logits, (129, 129), 0.5, valid)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_opcheck():
    logits, target, confidence, valid = inputs(1, 4, 3, 3, 9, 9)
    logits.requires_grad_()
    seg = torch.ops.seg_ops
    half = torch.tensor(0.5)
    for args in [(target, None, None, half, 4, 255), (target.long(), confidence, valid, half, 4, 255)]:
        torch.library.opcheck(seg.label_map, args)
    for with_grad in (True, False):
        torch.library.opcheck(seg.cross_entropy, (logits if with_grad else logits.detach(), target, with_grad))
    torch.library.opcheck(seg.upsample_softmax, (logits, valid, 9, 9, torch.float32))
    torch.library.opcheck(seg.upsample_argmax, (logits.detach(), 9, 9))
    torch.library.opcheck(seg.upsample_argmax, (logits.detach(), 9, 9, torch.rand(4), valid))
    for guess in (target.clamp(max=3), logits.detach()):
        torch.library.opcheck(seg.confusion_matrix, (guess, target, 255, torch.zeros(4, 4, dtype=torch.int64)))


def test_the_benchmark_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", [(1, 3, 9, 65)])
    monkeypatch.setattr(bench, "peak", lambda *_: 0)
    bench.main(bench.flags().parse_args(["--only", "py, labels (1, 3, 9", "--seconds", "0"]))
    times = r"\| [\d.e-]+ \| [\d.]+x \| [\d.]+x \| 0.0% / 0% \|\n"  # ours, reference, eager, memory
    rows = [rf"\| cross entropy, labels \| \(1, 3, 9, 65\) \| {dtype} {times}" for dtype in ("float32", "bfloat16")]
    assert re.search("".join(rows) + "$", capsys.readouterr().out)


def test_the_benchmark_compares_first(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", [(1, 3, 9, 65)])
    monkeypatch.setattr(bench, "peak", lambda *_: 0)
    upsample_softmax = ops.upsample_softmax_reference
    monkeypatch.setattr(ops, "upsample_softmax_reference", lambda *args, **kw: 1.03 * upsample_softmax(*args, **kw))
    with pytest.raises(InputError, match="upsample_softmax .* the results of ours and reference differ"):
        bench.main(bench.flags().parse_args(["--only", "upsample_softmax", "--seconds", "0"]))


def test_the_benchmark_measures_memory():
    """In a process of its own: probabilities take what they are stored in, and little more."""
    found = bench.peak("upsample_softmax", (2, 21, 41, 321), "float32", "ours", "cpu")
    assert 0.5 < found / (4 * 2 * 21 * 321 * 321) < 1.2  # 1.01; less where the machine takes pages back meanwhile


def test_the_table_of_a_gpu(monkeypatch, capsys):
    """All of `bench.py --device cuda` but the GPU."""
    cuda, cases = mock.MagicMock(), bench.cases
    cuda.configure_mock(**{"get_device_name.return_value": "H100", "max_memory_allocated.return_value": 5,
                           "memory_allocated.return_value": 1})

    def on_the_cpu(*case):
        paths = cases(*case[:3], "cpu")
        return paths | {"compile": paths["eager"]}
    for where, name, fake in [(torch, "cuda", cuda), (ops, "in_use", lambda _: "kernel"), (bench, "cases", on_the_cpu),
                              (bench, "SIZES", [(1, 21, 41, 321)])]:
        monkeypatch.setattr(where, name, fake)
    bench.main(bench.flags().parse_args(["--device=cuda", "--only=) float32", "--seconds=0"]))
    rows = [line for line in capsys.readouterr().out.splitlines() if "float32" in line]
    assert len(rows) == 5 and all(len(re.findall(r"\dx \|", row)) == 3 for row in rows)  # reference, eager, compile
    assert cuda.graph.call_count == 4 * 4 + 1  # of the confusion matrices ours alone
