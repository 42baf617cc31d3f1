"""The C++ operators against the float64 reference: at most twice the float32 one's error, or few roundings."""
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
from torch.utils._pytree import tree_map

from csrc import build, ops

pytestmark = pytest.mark.skipif(not ops.in_use().startswith("kernel"), reason="the kernels are not in use")

quick = pytest.mark.quick
NAN, INF = float("nan"), float("inf")
# N, K, h, w, H, W
SHAPES = [(2, 21, 41, 41, 321, 321), (1, 3, 1, 1, 7, 5), (2, 2, 4, 4, 4, 4), (1, 5, 7, 9, 33, 50),
          (1, 255, 5, 6, 33, 41), (1, 7, 9, 9, 5, 3), (1, 19, 3, 70, 17, 553), (1, 6, 2, 3, 3, 40),
          (3, 11, 9, 9, 129, 129), (1, 2, 1, 9, 1, 9), (1, 9, 5, 1, 9, 1), (1, 5, 3, 10, 9, 127), (1, 5, 3, 5, 9, 63),
          (2, 5, 3, 3, 9, 31), (1, 4, 3, 4, 9, 4), (1, 5, 2, 3, 700, 33)]
SHAPES = [pytest.param(s, marks=quick) if i in (3, 5, 6, 8, 11, 12, 13) else s for i, s in enumerate(SHAPES)]
DEVICE = "cpu"  # where the operators run; tests/test_cuda.py changes it


def inputs(n, k, h, w, height, width, scale=3.0, ignored=0.3):
    """Return random (logits, target, confidence, valid); a share `ignored` of the target is 255."""
    g = torch.Generator().manual_seed(0)
    target = torch.randint(0, k, (n, height, width), generator=g)
    target[torch.rand(n, height, width, generator=g) < ignored] = 255
    tensors = (torch.randn(n, k, h, w, generator=g) * scale, target.to(torch.uint8),
               torch.randn(n, 1, 3, 2, generator=g) * 2, torch.rand(n, height, width, generator=g) < 0.8)
    return tuple(x.to(DEVICE) for x in tensors)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def with_gradient(op, logits, *args, upstream=1.0, **kw):
    """Return the operator's first output, the gradient of the logits from it, and further outputs."""
    logits = logits.detach().requires_grad_()
    out = op(logits, *args, **kw)
    first, *rest = out if isinstance(out, tuple) else (out,)
    first.backward(upstream.to(first.dtype) if isinstance(upstream, torch.Tensor) else torch.full_like(first, upstream))
    return first.detach(), logits.grad, *rest


def reference(name):
    """Return ops.<name>_reference on the CPU: on CUDA ATen has 0 * infinity along an axis that keeps its size."""
    def call(*args, **kw):
        args, kw = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, (args, kw))
        return tree_map(lambda x: x.to(DEVICE), getattr(ops, f"{name}_reference")(*args, **kw))
    return call


def in_float64(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def class_weights(k):
    """Return (K,) weights from 0.02 to 50, not contiguous; that of every third class is 0."""
    weight = 50 ** noise(k, 2).clamp(-1, 1)
    weight[1::3] = 0
    return weight[:, 0]


def compare(name, logits, *args, floor=1e-6, **kw):
    """Return with_gradient() of an operator after comparing it with the float64 reference.

    Its errors are at most twice those of the float32 reference, or `floor` of the largest value: what the rounding of a
    sum or two can cost. If logits are not finite, the first outputs of kernel and reference are NaN at the same places.
    """
    before = logits.clone()
    ours = with_gradient(getattr(ops, name), logits, *args, **kw)
    eager = with_gradient(reference(name), logits, *args, **kw)
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)
    assert [x.dtype for x in ours] == [x.dtype for x in eager]
    if not logits.isfinite().all():
        torch.testing.assert_close(ours[0], eager[0], equal_nan=True)
        return ours
    double = {key: torch.float64 if key == "dtype" else value if key == "weight" else in_float64(value)
              for key, value in kw.items()}
    exact = with_gradient(reference(name), logits.double(), *args, **double)
    if ours[2:] != exact[2:]:  # beside infinite confidences float32 may select other pixels of the last column
        exact, floor = eager, max(floor, torch.finfo(logits.dtype).eps)
    for a, b, c in zip(ours, eager, exact):
        a, b, c = a.double(), b.double(), c.double()
        bound = max(2 * (b - c).abs().max().item(), floor * c.abs().max().item())
        assert (a - c).abs().max().item() <= bound, f"{(a - c).abs().max():.3g} against {bound:.3g}"
    return ours


def check_cross_entropy(logits, target, confidence, valid, threshold=0.3, floor=1e-6):
    size = tuple(target.shape[1:])
    for kw in (dict(target=target), dict(size=size),
               dict(target=target.long(), confidence=confidence, valid=valid, threshold=threshold, divide="all"),
               dict(size=size, confidence=confidence, valid=valid, threshold=threshold)):
        compare("masked_cross_entropy", logits, upstream=3, floor=floor, **kw)


def check_weighted_cross_entropy(logits, target, confidence, valid, threshold=0.3, floor=1e-6):
    size, weight = tuple(target.shape[1:]), class_weights(logits.shape[1])
    for kw in (dict(target=target), dict(size=size, valid=valid),
               dict(target=target.long(), confidence=confidence, valid=valid, threshold=threshold, divide="all")):
        compare("masked_cross_entropy", logits, upstream=3, floor=floor, weight=weight, **kw)


def check_upsample_softmax(logits, target, confidence, valid, floor=1e-6, **_):
    """The gradient that comes in is contiguous, or channels last as the discriminator's."""
    size = tuple(target.shape[1:])
    floor = floor if logits.dtype == torch.float32 else 4e-3
    last = noise(len(logits), *size, logits.shape[1]).permute(0, 3, 1, 2)
    for upstream, mask in ((last, None), (last.contiguous(), valid)):
        compare("upsample_softmax", logits, size, upstream=upstream, valid=mask, dtype=logits.dtype, floor=floor)
    for given, wanted in ((logits, torch.float32), (logits.float(), torch.bfloat16)):
        assert ops.upsample_softmax(given, size, wanted).dtype == wanted


def check_confusion_matrix(logits, target, confidence, valid, **_):
    size, k = tuple(target.shape[1:]), logits.shape[1]
    ids, expected = ops.upsample_argmax(logits, size), reference("upsample_argmax")(logits, size)
    upsampled = ops._upsample(logits.double(), size)
    largest = [upsampled.gather(1, x.long()[:, None])[:, 0][ids != expected] for x in (ids, expected)]
    torch.testing.assert_close(*largest, rtol=1e-6, atol=0)  # equal but for a rounding
    assert ids.dtype == torch.uint8
    exact = reference("confusion_matrix")(ids, target, k)
    assert torch.equal(ops.confusion_matrix(logits, target), exact)
    out = torch.ones(2 * k, k, dtype=torch.int64, device=DEVICE)[::2]  # not contiguous
    assert ops.confusion_matrix(logits, target.long(), out=out) is out and torch.equal(out, exact + 1)
    for guess in (ids, target.flip(1).clamp(max=k - 1)):
        exact = reference("confusion_matrix")(guess, target, k)
        for a, b in itertools.product((guess.to(torch.uint8), guess.long()), (target.to(torch.uint8), target.long())):
            assert torch.equal(ops.confusion_matrix(a, b, k), exact)


def check_limits(logits, size, confidence, valid=None):
    """Compare pseudo_labels with the float64 probability of the kernel's argmax, but for a rounding of it."""
    ids, best = ops.pseudo_labels(logits, size, confidence, valid), ops.upsample_argmax(logits, size)
    p = ops._upsample(logits.double(), size).softmax(1).gather(1, best.long()[:, None])[:, 0]
    limit = (torch.ones(logits.shape[1], device=DEVICE) * confidence)[best.long()]
    above, clear = p > limit, ~((p - limit).abs() < 2e-6)
    if valid is not None:
        above, clear = above & valid, clear | ~valid
    assert torch.equal(ids[clear], best.where(above, 255)[clear]) and clear.float().mean() > 0.9
    assert ((ids == best) | (ids == 255)).all() and ids.dtype == torch.uint8


def check_pseudo_labels(logits, target, confidence, valid, **_):
    size, k = tuple(target.shape[1:]), logits.shape[1]
    finite = logits.isfinite().all()
    median = 0.99 * ops._upsample(logits, size).softmax(1).amax(1).nanmedian().nan_to_num(0.5)
    for limits, mask in itertools.product((median.item(), noise(k) * 0.1 + median), (None, valid)):
        if finite:
            check_limits(logits, size, limits, mask)
        else:
            ours, eager = (f(logits, size, limits, mask) for f in (ops.pseudo_labels, reference("pseudo_labels")))
            assert (ours == eager).float().mean() > 0.99
    assert torch.equal(ops.pseudo_labels(logits, size, 0), ops.upsample_argmax(logits, size)) or not finite
    assert (ops.pseudo_labels(logits, size, 1) == 255).all()


CHECKS = (check_cross_entropy, check_weighted_cross_entropy, check_upsample_softmax, check_confusion_matrix,
          check_pseudo_labels)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype, check):
    logits, *rest = inputs(*shape)
    check(logits.to(dtype), *rest)


def layouts(x):
    """Return the same numbers with other strides; the last is expanded: every image is the first."""
    n, k, h, w = x.shape
    wide = torch.zeros(n, k, h, 2 * w, device=x.device)
    wide[..., ::2] = x
    return [wide[..., ::2], x.transpose(2, 3).contiguous().transpose(2, 3),
            x.contiguous(memory_format=torch.channels_last), x[:1].expand(n, -1, -1, -1)]


def random_case(seed):
    """Return ((logits, target, confidence, valid), threshold) with random sizes, strides, dtypes and magnitudes."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    n, k = rng.choice([1, 1, 2, 3]), rng.choice([2, 3, 7, 16, 21, 34 + seed % 221, 255])
    low, size = ([rng.randint(1, most) for _ in range(2)] for most in (12 if k > 99 else 40, 70))
    if rng.random() < 0.5:  # as networks have them: a stride of 4, 8, 16 or 32
        size[rng.randrange(2)] = rng.choice([4, 8, 32]) * 4 + 1
        low = [5 if side % 4 == 1 else other for side, other in zip(size, low)]
    logits = torch.randn(n, k, *low, generator=g) * rng.choice([0.1, 1, 3, 10, 50])
    logits = rng.choice([logits, *layouts(logits)[:3]])
    if rng.random() < 0.2:
        logits[0, rng.randrange(k), rng.randrange(low[0]), rng.randrange(low[1])] = rng.choice([NAN, INF, -INF])
    block = rng.choice([1, 5, 30])
    target = torch.randint(0, k, (n, *(-(-side // block) for side in size)), generator=g)
    target = target.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :size[0], :size[1]].contiguous()
    target[torch.rand(target.shape, generator=g) < rng.choice([0, 0.05, 0.9])] = 255
    confidence = torch.randn(n, 1, *rng.choice([(1, 1), (3, 2), (size[0], 2), (3, size[1]), size]), generator=g)
    confidence = rng.choice([confidence, torch.where(confidence.abs() > 1, confidence * INF, confidence)])
    valid = torch.rand(n, *size, generator=g) < 0.7
    logits, target = logits.to(rng.choice([torch.float32, torch.bfloat16])), target.to(
        rng.choice([torch.uint8, torch.int64]))
    return (logits, target, confidence, valid), rng.choice([0, 0.2, 0.5, 0.9])


@pytest.mark.parametrize("first", range(0, 125, 25))
def test_random_cases(first):
    """125 cases of all operators; a failure names its case: `random_case(seed)`."""
    for seed, check in itertools.product(range(first, first + 25), CHECKS):
        case, threshold = random_case(seed)
        try:
            check(*case, threshold=threshold, floor=6e-6)
        except AssertionError as e:
            raise AssertionError(f"{check.__name__} of random_case({seed})") from e


@quick
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_pseudo_labels_of_steep_and_nonfinite_logits(bad):
    """No NaN is above a confidence; steps of 200 within a cell, or between classes, cost no digits."""
    logits, *_, valid = inputs(1, 5, 5, 5, 33, 33, scale=30)
    check_limits(logits, (33, 33), 0.9, valid)
    check_limits(logits + torch.arange(5., device=DEVICE) * 300, (33, 33), 0.9, valid)
    certain = logits * 0.05 + 25 * (torch.arange(5, device=DEVICE) == 1)[:, None, None]
    assert (ops.pseudo_labels(certain, (33, 33), 1) == 255).all()
    logits[0, 2, 1, 3] = bad
    expected = reference("pseudo_labels")(logits, (33, 33), 0.9, valid)
    assert torch.equal(ops.pseudo_labels(logits, (33, 33), 0.9, valid), expected) and (expected < 255).any()
    equal = torch.zeros(1, 3, 2, 2, device=DEVICE)
    assert (ops.pseudo_labels(equal, (5, 5), 0.3) == 0).all()


@pytest.mark.parametrize("pixels", [1, 31, 63, 1024, pytest.param(1025, marks=quick), 3000, 100_001])
@pytest.mark.parametrize("longest", [1, 50, 3000])
def test_confusion_matrix_of_runs(pixels, longest):
    """Runs of equal ids of any length, which end in both inputs independently, across the ends of blocks and chunks."""
    g = torch.Generator().manual_seed(pixels)
    runs = 4 * pixels // longest + 4
    for k, ignore in [(2, 255), (21, 255), (21, 0), (255, 0)]:
        guess, target = (torch.repeat_interleave(torch.randint(0, k, (runs,), generator=g), torch.randint(
            1, longest + 1, (runs,), generator=g))[:pixels].view(1, 1, pixels) for _ in range(2))
        target[torch.rand(target.shape, generator=g) < 0.1 / longest] = ignore
        guess, target = guess.to(DEVICE), target.to(DEVICE)
        exact = reference("confusion_matrix")(guess, target, k, ignore=ignore)
        assert torch.equal(ops.confusion_matrix(guess.to(torch.uint8), target.to(torch.uint8), k, ignore=ignore), exact)


@quick
@pytest.mark.parametrize("ignored", [0, 1])
def test_nothing_or_everything_ignored(ignored):
    logits, target, confidence, _ = inputs(2, 5, 4, 4, 25, 25, ignored=ignored)
    loss, grad, kept = compare("masked_cross_entropy", logits, target)
    assert kept == (0 if ignored else target.numel()) and (loss == 0) == (grad == 0).all() == bool(ignored)
    for size in ((25, 25), (4, 4)):
        loss, grad, kept = compare("masked_cross_entropy", logits, confidence=confidence, threshold=1.0, size=size)
        assert loss == 0 and kept == 0 and (grad == 0).all()


@quick
def test_backward_twice_but_not_differentiated_twice():
    logits, target, *_ = inputs(1, 5, 4, 4, 25, 25)
    logits.requires_grad_()
    for y in (ops.masked_cross_entropy(logits, target)[0], ops.upsample_softmax(logits, (25, 25)).square().sum()):
        first, second = (torch.autograd.grad(y * 2, logits, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and first.abs().max() > 0
        third, = torch.autograd.grad(y * y, logits, create_graph=True)
        with pytest.raises(RuntimeError):
            third.sum().backward()


@quick
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_strides(check):
    logits, target, confidence, valid = inputs(2, 5, 4, 4, 25, 25)
    target, valid = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (target, valid))
    for x in layouts(logits):
        check(x, target, confidence.mT, valid)


@quick
def test_ties_go_to_the_lowest_class():
    logits = torch.zeros(1, 6, 5, 5, device=DEVICE)
    logits[:, [2, 4]] = noise(1, 1, 5, 5).abs() + 1  # two equal winners
    target = torch.zeros(1, 33, 33, dtype=torch.uint8, device=DEVICE)
    assert ops.confusion_matrix(logits, target)[0].tolist() == [0, 0, 33 * 33, 0, 0, 0]
    for size in ((33, 33), (5, 5)):
        grad = with_gradient(ops.masked_cross_entropy, logits, size=size)[1]
        assert (grad[:, 2] < 0).all() and (grad[:, 4] > 0).all()


@pytest.mark.parametrize("bad", [pytest.param(NAN, marks=quick), INF, -INF])
@pytest.mark.parametrize("size", [(33, 33), (33, 5), (5, 33)])
def test_nonfinite_logits(bad, size):
    """NaN if eager PyTorch on the selected pixels gives NaN; a pixel that is not selected changes nothing."""
    logits, target, *_ = inputs(1, 6, 5, 5, *size, ignored=0)
    for k, y, x in ((0, 0, 0), (3, 2, 4), (5, 4, 4)):
        nonfinite = logits.clone()
        nonfinite[0, k, y, x] = bad
        compare("masked_cross_entropy", nonfinite, target)
        compare("masked_cross_entropy", nonfinite, size=size)
        weight = class_weights(6)
        weight[2], weight[k] = 1, 0
        compare("masked_cross_entropy", nonfinite, target, weight=weight)
        compare("upsample_softmax", nonfinite, size)
        assert torch.equal(ops.confusion_matrix(nonfinite, target), reference("confusion_matrix")(nonfinite, target))
        nothing, ones = torch.zeros(1, *size, dtype=torch.bool, device=DEVICE), torch.ones(1, 6, *size, device=DEVICE)
        for f in (reference("upsample_softmax"), ops.upsample_softmax):
            assert all((x == 0).all() for x in with_gradient(f, nonfinite, size, valid=nothing, upstream=ones))
        touched = F.interpolate(nonfinite, size, mode="bilinear", align_corners=True).isfinite().all(1).logical_not()
        far = target.masked_fill(touched, 255)
        ours, clean = (with_gradient(ops.masked_cross_entropy, x, far) for x in (nonfinite, logits))
        assert ours[0].item() == pytest.approx(clean[0].item(), rel=1e-5) and ours[1].isfinite().all()


def check_steep(logits, target, axis=2):
    """Compare softmax and both cross entropies, as they are or transposed, where exponentials underflow on the way."""
    if axis == 3:
        logits, target = logits.transpose(2, 3).contiguous(), target.transpose(1, 2).contiguous()
    size = tuple(target.shape[1:])
    compare("upsample_softmax", logits, size, upstream=noise(*logits.shape[:2], *size), floor=4e-6)
    for kw in (dict(target=target), dict(size=size), dict(target=target, weight=class_weights(logits.shape[1]))):
        compare("masked_cross_entropy", logits, floor=4e-6, **kw)


@quick
def test_steps_of_hundreds_within_a_cell():
    for scale, size in itertools.product((5, 10, 30, 100, 1000), ((25, 25), (13, 13), (14, 11))):
        logits, target, *_ = inputs(1, 6, 4, 4, *size, scale=scale)
        check_steep(logits, target)


STEPS = {  # ((K, h, w, H, W), scale of the noise, what is added to a row of logits, in turn, (rows, K))
    # 200 in one class at a time
    "one class": ((6, 8, 3, 57, 25), 3, 200 * torch.eye(3, 6)),
    # 7.5 from pixel to pixel, but between classes 30 at most: an exponential that has lost its digits still matters
    "pixels": ((4, 8, 3, 29, 9), 0.1, torch.tensor([(0.0, -30, -28, -29), (-30, -20, -22, -21)])),
    # 50, but little from pixel to pixel: at one end of a cell all exponentials, and their sum, are tiny
    "all classes": ((4, 3, 3, 65, 65), 0.1, torch.tensor([0.0, 50])[:, None].expand(2, 4))}


@quick
@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("kind", STEPS)
def test_steps_along_one_axis(kind, axis):
    """Along the other axis nothing shows how far apart the logits are."""
    shape, scale, rows = STEPS[kind]
    logits, target, *_ = inputs(1, *shape, scale=scale)
    rows = rows.to(DEVICE)[torch.arange(shape[1]) % len(rows)]  # (h,K)
    check_steep(logits + rows.T[:, :, None], target, axis)


@quick
@pytest.mark.parametrize("ignore", [0, 2, 300])
def test_another_ignore_index(ignore):
    """One of the classes, or none; the argmax is never ignored."""
    logits, target, confidence, valid = inputs(1, 5, 4, 4, 25, 25, ignored=0)
    for kw in (dict(target=target), dict(target=target.long(), confidence=confidence, valid=valid, divide="all"),
               dict(target=target, confidence=confidence, divide="all", weight=class_weights(5)),
               dict(size=(25, 25), divide="all")):
        compare("masked_cross_entropy", logits, ignore=ignore, floor=4e-6, **kw)
    for value in (44, 255) if ops._can_read_values(target) else ():  # as a byte 300 is 44
        target[0, 3, 3] = value
        for f in (ops.masked_cross_entropy, ops.confusion_matrix):
            with pytest.raises(ValueError, match=f"target .*{value}"):
                f(logits, target, ignore=ignore)


@quick
def test_confidence_at_its_threshold():
    labels = torch.zeros(1, 17, 17, dtype=torch.uint8, device=DEVICE)
    for value, threshold, selected in [(NAN, 0.0, False), (0.0, 0.5, False), (1e-3, 0.5, True), (-200, 0.2, False),
                                       (200, 0.2, True), (200, 1.0, False), (-5, 0.0, True)]:
        confidence = torch.full((1, 1, 2, 2), float(value), device=DEVICE)
        for f in (ops.select_labels, reference("select_labels")):
            assert ((f(labels, confidence, threshold=threshold) == 0) == selected).all(), (value, threshold)


@quick
@pytest.mark.parametrize("low", [(5, 7), (3, 2), (5, 2), (3, 7), (1, 1), (9, 9)])
def test_select_labels(low):
    """Along an axis on which it has the labels' size, a confidence of plus and minus infinity is not interpolated."""
    _, target, _, valid = inputs(3, 5, 1, 1, 5, 7)
    confidence = noise(3, 1, *low)
    infinite = torch.where(confidence > 0, INF, -INF)
    confidence[0, 0, 0, 0] = NAN
    for labels, mask, (x, threshold) in itertools.product(
            (target, target.long()), (None, valid),
            ((None, 0.9), (confidence, 0.3), (confidence, 0.0), (confidence, 1.0), (infinite, 0.5))):
        ours = ops.select_labels(labels, x, valid=mask, threshold=threshold)
        assert torch.equal(ours, reference("select_labels")(labels, in_float64(x), valid=mask, threshold=threshold))


@quick
def test_empty_batch():
    logits, target, confidence, valid = (x[:0] for x in inputs(1, 5, 4, 4, 9, 9))
    for kw in (dict(target=target), dict(confidence=confidence, valid=valid)):
        loss, grad, kept = with_gradient(ops.masked_cross_entropy, logits, **kw)
        assert loss == 0 and kept == 0 and grad.shape == logits.shape
    assert ops.upsample_softmax(logits, (9, 9)).shape == (0, 5, 9, 9)
    assert ops.upsample_argmax(logits, (9, 9)).shape == ops.pseudo_labels(logits, (9, 9), 0.5).shape == (0, 9, 9)
    assert not ops.confusion_matrix(logits, target).any() and not ops.confusion_matrix(target, target, 5).any()


@quick
def test_a_gradient_is_computed_only_if_required():
    logits, target, *_ = inputs(1, 5, 4, 4, 25, 25)
    cross_entropy = torch.ops.seg_ops.cross_entropy
    total, grad, _ = cross_entropy(logits, target, True)
    assert grad.shape == logits.shape and cross_entropy(logits, target, False)[0] == total
    logits.requires_grad_()
    with mock.patch.object(torch.ops.seg_ops, "cross_entropy", wraps=cross_entropy) as kernel:
        ops.masked_cross_entropy(logits, target)
        ops.masked_cross_entropy(logits.detach(), target)
        with torch.no_grad():
            ops.masked_cross_entropy(logits, target)
    assert [call.args[2] for call in kernel.call_args_list] == [True, False, False]


def test_compiled_for_any_size():
    """torch.compile of all operators makes one graph for the first size and threshold, and one for all others."""
    weight = class_weights(4)

    def step(logits, target, confidence, threshold):
        size = target.shape[1:]
        probabilities = ops.upsample_softmax(logits, size)
        loss, kept = ops.masked_cross_entropy(logits, None, confidence, size=size, threshold=threshold)
        weighted, _ = ops.masked_cross_entropy(logits, target, confidence, divide="all", weight=weight)
        return (weighted + loss + probabilities.square().mean() + ops.masked_cross_entropy(logits, target)[0], kept,
                ops.upsample_argmax(logits, size), ops.pseudo_labels(logits, size, threshold),
                ops.confusion_matrix(logits.detach(), target))
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for i in range(5):
        logits, target, confidence, _ = inputs(2 + i % 2, 4, 5 + i, 6 + i, 33 + 2 * i, 40 + i)
        for a, b in zip(*(with_gradient(f, logits, target, confidence, 0.2 + i / 20) for f in (step, compiled))):
            torch.testing.assert_close(a, b)
        assert graphs.frame_count <= 2


def test_the_naive_kernel(tmp_path):
    """Those at the head of the operators' files compute the same as the kernels."""
    files = "cells.h", "masked_cross_entropy.cpp", "upsample_softmax.cpp", "confusion_matrix.cpp"
    code = "".join(re.search("// ```cpp\n(.*?)// ```", (ROOT / "csrc" / f).read_text(), re.S)[1] for f in files)
    headers = "".join(f"#include <{name}>\n" for name in ("algorithm", "cmath", "cstdint"))
    (tmp_path / "naive.cpp").write_text(headers + 'extern "C" {\n' + re.sub("^// ?", "", code, flags=re.M) + "}\n")
    flags = "-O1", "-shared", "-fPIC", "-o", tmp_path / "naive.so"
    subprocess.run([*build.cxx().split(), *flags, tmp_path / "naive.cpp"], check=True)
    library = ctypes.CDLL(tmp_path / "naive.so")
    library.cross_entropy.restype = ctypes.c_double
    for shape in ((1, 5, 7, 9, 33, 50), (1, 3, 1, 1, 7, 5), (1, 7, 9, 9, 5, 3)):
        logits, target, *_ = inputs(*shape)
        grad, weight = torch.zeros_like(logits), noise(shape[1]).abs()
        probs, matrix = torch.zeros(*shape[4:], shape[1]), torch.zeros(shape[1], shape[1], dtype=torch.int64)

        def naive(name, *tensors):
            return getattr(library, name)(*(ctypes.c_void_p(x.data_ptr()) for x in tensors), *shape[1:])
        loss = naive("cross_entropy", logits, target, weight, grad)
        naive("upsample_softmax", logits, probs)
        naive("confusion_matrix", logits, target, matrix)
        total, want, _ = torch.ops.seg_ops.cross_entropy(logits, target, True, weight)
        assert loss == pytest.approx(total.item(), rel=1e-5)
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(probs.permute(2, 0, 1)[None], ops.upsample_softmax(logits, shape[4:]))
        assert torch.equal(matrix, ops.confusion_matrix(logits, target))


@quick
@pytest.mark.parametrize("value", [6, 254, -1, 1 << 40])
def test_labels_out_of_range(value):
    """ValueError with the value; on CUDA the loss is NaN and a matrix's first cell -2^44, for any number of labels."""
    logits, target, *_ = inputs(1, 6, 5, 5, 33, 33, ignored=0)
    one = target.long()
    one[0, 2, 3] = value
    several = [one, torch.full_like(one, value)]
    for labels in several if value != 254 else [x.to(torch.uint8) for x in several]:
        for name, call in (("target", lambda: ops.masked_cross_entropy(logits, labels)),
                           ("target", lambda: ops.confusion_matrix(logits, labels)),
                           ("target", lambda: ops.confusion_matrix(labels.clamp(0, 5), labels, 6)),
                           ("prediction", lambda: ops.confusion_matrix(labels, torch.ones_like(labels), 6))):
            if ops._can_read_values(labels):
                with pytest.raises(ValueError, match=f"{name} .*{value}"):
                    call()
            else:
                result = call()
                assert result[0].isnan() if isinstance(result, tuple) else result[0, 0] < -(1 << 43)
    if not ops._can_read_values(target):
        assert ops.confusion_matrix(logits, labels)[0, 0] == -(1 << 44)


def large_results():
    """Return what the operators compute of three images with 129 x 129 labels."""
    logits, target, confidence, valid = inputs(3, 21, 17, 17, 129, 129)
    return [*with_gradient(ops.masked_cross_entropy, logits, target, confidence, valid=valid),
            *with_gradient(ops.masked_cross_entropy, logits, size=(129, 129)),
            *with_gradient(ops.masked_cross_entropy, logits, target, weight=class_weights(21)),
            *with_gradient(ops.upsample_softmax, logits, (129, 129), upstream=noise(3, 21, 129, 129)),
            ops.confusion_matrix(logits, target), ops.pseudo_labels(logits, (129, 129), 0.5, valid)]


@quick
def test_same_bits_for_any_number_of_threads():
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(large_results())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_opcheck():
    """What torch.compile and autograd rely on: schemas, fake tensors, mutation, autograd registrations."""
    logits, target, confidence, valid = inputs(1, 4, 3, 3, 9, 9)
    seg, half, low = torch.ops.seg_ops, torch.tensor(0.5), logits.clone().requires_grad_()
    for op, *args in [(seg.label_map, target, None, None, half, 4, 255),
                      (seg.label_map, target.long(), confidence, valid, half, 4, 255),
                      (seg.cross_entropy, logits, target, True), (seg.cross_entropy, logits, target, False),
                      (seg.cross_entropy, logits, target, True, torch.rand(4)),
                      (seg.upsample_softmax, low, valid, 9, 9, torch.float32), (seg.upsample_argmax, logits, 9, 9),
                      (seg.upsample_argmax, logits, 9, 9, torch.rand(4), valid),
                      (seg.confusion_matrix, target.clamp(max=3), target, 255, torch.zeros(4, 4).long()),
                      (seg.confusion_matrix, logits, target, 255, torch.zeros(4, 4).long())]:
        torch.library.opcheck(op, tuple(args))
