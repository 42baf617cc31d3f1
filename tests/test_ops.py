"""The references against definitions written out in float64 loops."""
import math

import numpy as np
import pytest
import torch

from common.console import InputError
from csrc import ops

pytestmark = pytest.mark.quick


def upsample(x, size):
    """Bilinear, align_corners=True, of (K,h,w) float64, from the definition."""
    def weights(n_in, n_out):
        m = np.zeros((n_out, n_in))
        for i in range(n_out):
            at = i * (n_in - 1) / (n_out - 1) if n_out > 1 else 0
            low = min(int(at), n_in - 1)
            m[i, low] += 1 - (at - low)
            m[i, min(low + 1, n_in - 1)] += at - low
        return m
    return np.einsum("yh,xw,khw->kyx", weights(x.shape[1], size[0]), weights(x.shape[2], size[1]), x)


def loss_of(logits, target, confidence, valid, threshold, size, divide):
    """(loss, kept), pixel by pixel."""
    total = kept = everything = 0
    for n in range(len(logits)):
        u = upsample(logits[n], size)
        c = None if confidence is None else upsample(confidence[n], size)[0]
        for y in range(size[0]):
            for x in range(size[1]):
                label = u[:, y, x].argmax() if target is None else target[n, y, x]
                if label == 255 or (valid is not None and not valid[n, y, x]):
                    continue
                everything += 1
                if c is not None and not 1 / (1 + math.exp(-c[y, x])) > threshold:
                    continue
                kept += 1
                total -= u[label, y, x] - np.log(np.exp(u[:, y, x]).sum())
    return total / max(1, kept if divide == "kept" else everything), kept


def test_upsample_argmax_is_its_definition():
    logits = np.random.RandomState(0).randn(2, 4, 3, 4)
    for size in ((9, 13), (3, 4)):
        want = np.stack([upsample(x, size).argmax(0) for x in logits])
        for dtype in (torch.float64, torch.float32):
            ids = ops.upsample_argmax(torch.from_numpy(logits).to(dtype), size)
            assert ids.dtype == torch.uint8 and np.array_equal(ids.numpy(), want)


def test_pseudo_labels_are_their_definition():
    """One limit and one for each class, as a number of a float64 softmax; the mask; nothing is above 1, or NaN."""
    rng = np.random.RandomState(0)
    logits, limits = 2 * rng.randn(2, 4, 3, 4), [0.3, 0.5, 0.7, 0.9]
    for size in ((9, 13), (3, 4)):
        valid = rng.rand(2, *size) < 0.8
        p = np.exp(np.stack([upsample(x, size) for x in logits]))
        p /= p.sum(1, keepdims=True)
        for given, limit in ((0.6, np.full(4, 0.6)), (torch.tensor(limits), np.array(limits))):
            sure = p.max(1) > limit[p.argmax(1)]
            assert 0.1 < sure.mean() < 0.9
            for dtype in (torch.float64, torch.float32):
                x = torch.from_numpy(logits).to(dtype)
                for mask, want in ((None, sure), (torch.from_numpy(valid), sure & valid)):
                    ids = ops.pseudo_labels(x, size, given, mask)
                    assert ids.dtype == torch.uint8 and np.array_equal(ids.numpy(), np.where(want, p.argmax(1), 255))
        for f in (ops.pseudo_labels, ops.pseudo_labels_reference):
            steep = torch.from_numpy(logits).float() * 100
            assert (f(steep, size, 1) == 255).all() and (f(steep, size, float("nan")) == 255).all()
            assert torch.equal(f(steep, size, 0), ops.upsample_argmax(steep, size))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("divide", ["kept", "all"])
def test_cross_entropy_is_its_definition(given, masked, divide):
    rng, size = np.random.RandomState(0), (9, 13)
    logits, target = rng.randn(2, 4, 3, 4), rng.randint(0, 4, (2, *size)).astype(np.uint8)
    target[0, :3] = 255
    confidence = rng.randn(2, 1, 2, 2) if masked else None
    valid = rng.rand(2, *size) < 0.8 if masked else None
    want, count = loss_of(logits, target if given else None, confidence, valid, 0.4, size, divide)
    tensors = [None if a is None else torch.from_numpy(a) for a in (logits, target, confidence, valid)]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        loss, kept = ops.masked_cross_entropy(tensors[0].to(dtype), tensors[1] if given else None, tensors[2],
                                              valid=tensors[3], threshold=0.4, size=size, divide=divide)
        assert loss.item() == pytest.approx(want, rel=tolerance)
        assert kept.item() == count and kept.dtype == torch.int64
    assert 0 < count < 2 * 9 * 13 or not (given or masked)


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 7, 5))
    target[0, 0] = 255
    confidence = torch.randn(2, 1, 2, 2, requires_grad=True)
    valid = torch.rand(2, 7, 5) < 0.8
    assert torch.autograd.gradcheck(lambda x: ops.masked_cross_entropy(x, target, confidence.detach())[0], logits)
    assert torch.autograd.gradcheck(
        lambda x: ops.masked_cross_entropy(x, target, confidence.detach(), valid=valid, threshold=0.3)[0], logits)
    assert torch.autograd.gradcheck(lambda x: ops.masked_cross_entropy(x, size=(7, 5))[0], logits)
    assert torch.autograd.gradcheck(lambda x: ops.upsample_softmax(x, (5, 4)), logits)
    assert torch.autograd.gradcheck(lambda x: ops.upsample_softmax(x, valid=valid), logits)
    ops.masked_cross_entropy(logits, target, confidence)[0].backward()
    assert confidence.grad is None


def test_nothing_kept_is_zero_with_zero_gradient():
    logits = torch.randn(1, 3, 3, 3, requires_grad=True)
    for target, confidence, threshold in ((torch.full((1, 5, 5), 255), None, 0.5),
                                          (None, torch.full((1, 1, 1, 1), 99.0), 1),
                                          (None, torch.full((1, 1, 1, 1), torch.nan), 0)):
        loss, kept = ops.masked_cross_entropy(logits, target, confidence, threshold=threshold, size=(5, 5))
        logits.grad = None
        loss.backward()
        assert loss.item() == 0 and kept.item() == 0 and logits.grad.abs().max() == 0


def test_nan_stays_where_it_counts():
    logits = torch.zeros(1, 2, 5, 5)
    logits[0, 0, 0, 0] = torch.nan
    logits.requires_grad_()
    target = torch.zeros(1, 5, 5, dtype=torch.uint8)
    assert ops.masked_cross_entropy(logits, target)[0].isnan()
    assert ops.masked_cross_entropy(logits, size=(5, 5))[0].isnan()
    target[0, :2, :2] = 255
    loss, _ = ops.masked_cross_entropy(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and logits.grad[0, :, 2:, 2:].isfinite().all()


def test_softmax_and_dtypes():
    logits = torch.randn(2, 3, 4, 4)
    p = ops.upsample_softmax(logits, (7, 7))
    want = np.exp(upsample(logits[1].double().numpy(), (7, 7)))
    assert np.allclose(p[1].numpy(), want / want.sum(0), atol=1e-6) and p.dtype == torch.float32
    assert ops.upsample_softmax(logits.bfloat16(), (7, 7)).dtype == torch.bfloat16
    assert ops.upsample_softmax(logits, (7, 7), torch.bfloat16).dtype == torch.bfloat16


def test_size_is_that_of_target_or_valid():
    """Where it is not given; without both it is an error that names it."""
    logits, confidence = torch.randn(2, 3, 4, 4), torch.randn(2, 1, 2, 2)
    target, valid = torch.randint(0, 3, (2, 9, 7)), torch.rand(2, 9, 7) < 0.8
    for x in (logits, logits.double()):  # kernel, reference
        assert ops.masked_cross_entropy(x, confidence=confidence, valid=valid) == ops.masked_cross_entropy(
            x, confidence=confidence, valid=valid, size=(9, 7))
        assert ops.masked_cross_entropy(x, target) == ops.masked_cross_entropy(x, target, size=(9, 7))
        assert torch.equal(ops.upsample_softmax(x, valid=valid), ops.upsample_softmax(x, (9, 7), valid=valid))
    for match, call in (("size", lambda: ops.masked_cross_entropy(logits, None, confidence)),
                        ("size", lambda: ops.upsample_softmax(logits)),
                        ("size .* target", lambda: ops.masked_cross_entropy(logits, target, size=(7, 9))),
                        ("valid must be", lambda: ops.masked_cross_entropy(logits, target, valid=valid[:, 1:])),
                        ("valid must be", lambda: ops.upsample_softmax(logits, (7, 9), valid=valid))):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("size", [(9, 9), (4, 4)])
def test_softmax_takes_the_dtype_of_autocast(size):
    """Unless `dtype` is given; without autocast it is the logits', which the gradient's always is."""
    valid = torch.rand(2, *size) < 0.8
    for given in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.randn(2, 3, 4, 4).to(given).requires_grad_()
        want = ops.upsample_softmax_reference(logits.double(), size, valid=valid)
        with torch.autocast("cpu", torch.bfloat16):
            probabilities = ops.upsample_softmax(logits, valid=valid)
            assert ops.upsample_softmax(logits, size, torch.float32).dtype == torch.float32
        assert ops.upsample_softmax(logits, size).dtype == given and probabilities.dtype == torch.bfloat16
        torch.testing.assert_close(probabilities.double(), want, rtol=8e-3, atol=1e-6)
        gradient, = torch.autograd.grad(probabilities[:, 0].sum(), logits)
        assert gradient.dtype == given and gradient.abs().max() > 0


def test_confusion_matrix_and_mean_iou():
    rng = np.random.RandomState(1)
    logits, target = rng.randn(2, 3, 4, 5), rng.randint(0, 3, (2, 9, 9)).astype(np.uint8)
    target[1, 4:] = 255
    want = np.zeros((3, 3), int)
    for n in range(2):
        guess = upsample(logits[n], (9, 9)).argmax(0)
        for t, g in zip(target[n].flat, guess.flat):
            if t != 255:
                want[t, g] += 1
    matrix = ops.confusion_matrix(torch.from_numpy(logits), torch.from_numpy(target))
    assert (matrix.numpy() == want).all() and matrix.dtype == torch.int64
    ids = torch.from_numpy(np.stack([upsample(x, (9, 9)).argmax(0) for x in logits]))
    same = ops.confusion_matrix(ids, torch.from_numpy(target).long(), 3, out=matrix)
    assert same is matrix and (matrix.numpy() == 2 * want).all()
    iou = [want[k, k] / (want[k].sum() + want[:, k].sum() - want[k, k]) for k in range(3)]
    miou, per_class = ops.mean_iou(matrix)
    assert miou == pytest.approx(np.mean(iou)) and np.allclose(per_class.numpy(), iou)


def test_mean_iou_by_hand():
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # class 2 is absent
    assert ops.mean_iou(matrix)[0] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert ops.mean_iou(matrix, "zero")[0] == pytest.approx((3 / 4 + 4 / 5) / 3)
    assert ops.mean_iou(matrix)[1].isnan().tolist() == [False, False, True]
    never_right = torch.tensor([[2, 2], [0, 0]])  # present, no true positive of class 1: it counts as 0
    assert ops.mean_iou(never_right)[0] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="negative"):
        ops.mean_iou(matrix - 1)


def test_ties_go_to_the_lowest_class():
    matrix = ops.confusion_matrix(torch.zeros(1, 4, 2, 2), torch.full((1, 3, 3), 2))
    assert matrix[2].tolist() == [9, 0, 0, 0]


Z, T, C = torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 2, 2)


@pytest.mark.parametrize("threshold", [0, 0.4, 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("masked", [True, False])
def test_selected_labels_are_their_definition(threshold, dtype, masked):
    """In float64, pixel by pixel; cross entropy against them is that with labels, confidence and mask, to the bit."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 17, 23), generator=g).to(dtype)
    labels[0, :2] = 255
    confidence = torch.randn(2, 1, 3, 4, generator=g)
    confidence[1, 0, 2, 3] = torch.nan
    valid = torch.rand(2, 17, 23, generator=g) < 0.8 if masked else None
    above = torch.nn.functional.interpolate(confidence.double(), (17, 23), mode="bilinear", align_corners=True)[:, 0]
    want = labels.where((above.sigmoid() > threshold) & (torch.ones(()).bool() if valid is None else valid), 255)
    for select in (ops.select_labels, ops.select_labels_reference):
        got = select(labels, confidence, valid=valid, threshold=threshold)
        assert got.dtype == torch.uint8 and torch.equal(got, want.to(torch.uint8))
    found = []
    for arguments, more in (((labels, confidence), dict(valid=valid, threshold=threshold)), ((got,), {})):
        logits = torch.randn(2, 5, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss, kept = ops.masked_cross_entropy(logits, *arguments, **more)
        loss.backward()
        found.append((loss, kept, logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found)) and (found[0][1] > 0) == (threshold < 1)


def test_without_a_confidence_all_valid_labels_are_selected():
    labels = torch.arange(16).view(1, 4, 4)
    valid = labels % 3 > 0
    for select in (ops.select_labels, ops.select_labels_reference):
        assert torch.equal(select(labels, None), labels.to(torch.uint8))
        assert torch.equal(select(labels, None, valid=valid), labels.where(valid, 255).to(torch.uint8))


@pytest.mark.parametrize("above", [True, False])
def test_a_float64_confidence_is_compared_in_float64(above):
    """Nearer to the threshold than float32 can tell."""
    confidence = torch.full((1, 1, 2, 2), math.log(0.3 / 0.7) + (1e-10 if above else -1e-10), dtype=torch.float64)
    for select in (ops.select_labels, ops.select_labels_reference):
        assert ((select(T, confidence, threshold=0.3) < 255) == above).all()
    for loss in (ops.masked_cross_entropy, ops.masked_cross_entropy_reference):
        assert loss(Z, T, confidence, threshold=0.3)[1] == 16 * above


@pytest.mark.parametrize("match,call", [
    ("labels must be", lambda: ops.select_labels(T.float(), C)),
    ("labels must be", lambda: ops.select_labels(T[0, 0, 0], C)),
    ("labels holds 300", lambda: ops.select_labels(T.long() + 300, C)),
    ("labels holds 300", lambda: ops.select_labels_reference(T.long() + 300, C)),
    ("target must be", lambda: ops.confusion_matrix(T[0, 0, 0], T[0, 0, 0], 3)),
    ("confidence must be", lambda: ops.select_labels(T, T)),
    ("valid must be", lambda: ops.select_labels(T, C, valid=T)),
    ("target holds 3", lambda: ops.masked_cross_entropy(Z, T + 3)),
    ("target holds -1", lambda: ops.masked_cross_entropy(Z, T.long() - 1)),
    ("target holds 7", lambda: ops.confusion_matrix(Z, T + 7)),
    ("prediction holds 5", lambda: ops.confusion_matrix(T + 5, T, 3)),
    ("logits must be", lambda: ops.masked_cross_entropy(Z[0], T)),
    ("logits must be", lambda: ops.upsample_softmax(Z.long(), (4, 4))),
    ("target must be", lambda: ops.masked_cross_entropy(Z, T.int())),
    ("target must be", lambda: ops.masked_cross_entropy(Z, T[:, 0])),
    ("confidence must be", lambda: ops.masked_cross_entropy(Z, T, Z)),
    ("valid must be", lambda: ops.masked_cross_entropy(Z, T, valid=T)),
    ("divide must be", lambda: ops.masked_cross_entropy(Z, T, divide="some")),
    ("num_classes must be", lambda: ops.confusion_matrix(T, T)),
    ("prediction must be", lambda: ops.confusion_matrix(T[:, 1:], T, 3)),
    ("out must be", lambda: ops.confusion_matrix(T, T, 3, out=torch.zeros(2, 2, dtype=torch.int64))),
    ("target must be .* on meta", lambda: ops.masked_cross_entropy(Z, T.to("meta"))),
    ("absent must be", lambda: ops.mean_iou(torch.eye(2), "maybe")),
])
def test_wrong_arguments_are_named(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_seg_ops(monkeypatch, tmp_path):
    """Without a compiler: auto says so and runs the references, kernel is an error."""
    path = ops._choose.__wrapped__  # without its cache
    monkeypatch.setattr(ops.build, "folder", lambda *_: tmp_path / "nothing built here")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(ops, "SEG_OPS", "auto")
    assert path() == "reference (no C++ compiler: no-such-compiler)"
    monkeypatch.setattr(ops, "SEG_OPS", "kernel")
    with pytest.raises(InputError, match="SEG_OPS=kernel: no C.. compiler: no-such-compiler; fix that"):
        path()
    monkeypatch.setattr(ops, "SEG_OPS", "fast")
    monkeypatch.setattr(ops, "_choose", path)
    with pytest.raises(InputError, match="SEG_OPS=fast: it must be auto, reference or kernel"):
        ops.in_use()


def test_where_looking_would_synchronise_bad_labels_poison(monkeypatch):
    """What CUDA does, run here: NaN from the loss, a negative first cell however often it happens, no bad index."""
    monkeypatch.setattr(ops, "_can_look", lambda x: False)
    loss, matrix = ops.masked_cross_entropy_reference, ops.confusion_matrix_reference
    assert loss(Z, T + 7)[0].isnan() and loss(Z, T + 255)[0] == 0 and loss(Z, T)[0].isfinite()
    out = torch.zeros(3, 3, dtype=torch.int64)
    for _ in range(5):
        matrix(Z, T + 7, out=out)
        with pytest.raises(ValueError, match="negative"):
            ops.mean_iou(out)
    assert matrix(Z, T)[0, 0] == 16
