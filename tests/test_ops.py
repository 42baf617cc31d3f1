"""The references against definitions written out in float64 loops."""
import itertools
import math

from common.console import InputError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from csrc import ops

pytestmark = pytest.mark.quick


def upsample(x, size):
    """Return (K,h,w) float64 upsampled bilinearly with align_corners=True, from the definition."""
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
    """Return (loss, kept), computed pixel by pixel."""
    total = kept = everything = 0
    for n in range(len(logits)):
        u = upsample(logits[n], size)
        c = None if confidence is None else upsample(confidence[n], size)[0]
        for y, x in np.ndindex(*size):
            label = u[:, y, x].argmax() if target is None else target[n, y, x]
            if label == 255 or (valid is not None and not valid[n, y, x]):
                continue
            everything += 1
            if c is not None and not 1 / (1 + math.exp(-c[y, x])) > threshold:
                continue
            kept += 1
            total -= u[label, y, x] - np.log(np.exp(u[:, y, x]).sum())
    return total / max(1, kept if divide == "kept" else everything), kept


def test_probabilities_argmax_and_pseudo_labels_are_their_definition():
    """One limit, and one for each class; nothing is above 1 or NaN, everything above 0."""
    rng = np.random.RandomState(0)
    logits, limits = 2 * rng.randn(2, 4, 3, 4), [0.3, 0.5, 0.7, 0.9]
    for size, dtype in itertools.product(((9, 13), (3, 4)), (torch.float64, torch.float32)):
        x, valid = torch.from_numpy(logits).to(dtype), rng.rand(2, *size) < 0.8
        p = np.exp(np.stack([upsample(image, size) for image in logits]))
        p /= p.sum(1, keepdims=True)
        probabilities = ops.upsample_softmax(x, size)
        assert np.allclose(probabilities.numpy(), p, atol=1e-6) and probabilities.dtype == dtype
        masked = ops.upsample_softmax(x, valid=torch.from_numpy(valid))
        assert np.allclose(masked.numpy(), p * valid[:, None], atol=1e-6)
        ids = ops.upsample_argmax(x, size)
        assert ids.dtype == torch.uint8 and np.array_equal(ids.numpy(), p.argmax(1))
        for given, limit in ((0.6, np.full(4, 0.6)), (torch.tensor(limits), np.array(limits))):
            above = p.max(1) > limit[p.argmax(1)]
            assert 0.1 < above.mean() < 0.9
            for mask, selected in ((None, above), (torch.from_numpy(valid), above & valid)):
                labels = ops.pseudo_labels(x, size, given, mask)
                assert labels.dtype == torch.uint8
                assert np.array_equal(labels.numpy(), np.where(selected, p.argmax(1), 255))
        steep = x * 100
        for limit in (1, math.nan):
            assert (ops.pseudo_labels(steep, size, limit) == 255).all()
        assert torch.equal(ops.pseudo_labels(steep, size, 0), ops.upsample_argmax(steep, size))


@pytest.mark.parametrize("has_target", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("divide", ["kept", "all"])
def test_cross_entropy_is_its_definition(has_target, masked, divide):
    """The size defaults to the size of target or valid."""
    rng, size = np.random.RandomState(0), (9, 13)
    logits, target = rng.randn(2, 4, 3, 4), rng.randint(0, 4, (2, *size)).astype(np.uint8)
    target[0, :3] = 255
    target = target if has_target else None
    confidence = rng.randn(2, 1, 2, 2) if masked else None
    valid = rng.rand(2, *size) < 0.8 if masked else None
    expected, count = loss_of(logits, target, confidence, valid, 0.4, size, divide)
    x, *given = (a if a is None else torch.from_numpy(a) for a in (logits, target, confidence, valid))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        loss, kept = ops.masked_cross_entropy(x.to(dtype), *given[:2], valid=given[2], threshold=0.4, divide=divide,
                                              size=None if has_target or masked else size)
        assert loss.item() == pytest.approx(expected, rel=tolerance)
        assert kept.item() == count and kept.dtype == torch.int64
    assert 0 < count < 2 * 9 * 13 or not (has_target or masked)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_are_those_of_cross_entropy(dtype):
    """A mean, also if weights sum up to less than 1; with divide="all" the divisor has those of unselected pixels."""
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 4, 3, 4, generator=g, dtype=dtype), torch.randint(0, 4, (2, 9, 13), generator=g)
    target[0, :3] = 255
    weight, valid = torch.tensor([5e-5, 0, 1e-7, 3e-3]), torch.rand(2, 9, 13, generator=g) < 0.8
    confidence = torch.randn(2, 1, 9, 13, generator=g)
    pixels = F.interpolate(logits.double(), (9, 13), mode="bilinear", align_corners=True)
    given, selected = target.where(valid, 255), valid & (confidence[:, 0] > 0)
    loss, kept = ops.masked_cross_entropy(logits, target.to(torch.uint8), valid=valid, weight=weight)
    expected = F.cross_entropy(pixels, given, weight.double(), ignore_index=255)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6) and kept == (given < 255).sum()
    total = F.cross_entropy(pixels, given.where(selected, 255), weight.double(), ignore_index=255, reduction="sum")
    for divide, counted in (("kept", selected), ("all", valid)):
        loss, _ = ops.masked_cross_entropy(logits, target, confidence, valid=valid, weight=weight, divide=divide)
        sum_of_weights = weight[given[counted & (given < 255)]].double().sum()
        assert loss.item() == pytest.approx((total / sum_of_weights).item(), rel=1e-6)
    logits.requires_grad_()
    loss, kept = ops.masked_cross_entropy(logits, target * 0 + 1, weight=weight)  # all weights are 0
    loss.backward()
    assert loss == 0 and kept == target.numel() and not logits.grad.any()


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 7, 5))
    target[0, 0] = 255
    confidence, valid = torch.randn(2, 1, 2, 2, requires_grad=True), torch.rand(2, 7, 5) < 0.8
    for f in (lambda x: ops.masked_cross_entropy(x, target, confidence.detach())[0],
              lambda x: ops.masked_cross_entropy(x, target, confidence.detach(), valid=valid, threshold=0.3)[0],
              lambda x: ops.masked_cross_entropy(x, size=(7, 5))[0],
              lambda x: ops.masked_cross_entropy(x, target, weight=torch.tensor([0.1, 0, 20]))[0],
              lambda x: ops.upsample_softmax(x, (5, 4)), lambda x: ops.upsample_softmax(x, valid=valid)):
        assert torch.autograd.gradcheck(f, logits)
    ops.masked_cross_entropy(logits, target, confidence)[0].backward()
    assert confidence.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nan_counts_only_on_selected_pixels(dtype):
    logits = torch.zeros(1, 2, 5, 5, dtype=dtype)
    logits[0, 0, 0, 0] = torch.nan
    logits.requires_grad_()
    target = torch.zeros(1, 5, 5, dtype=torch.uint8)
    assert ops.masked_cross_entropy(logits, target)[0].isnan()
    assert ops.masked_cross_entropy(logits, size=(5, 5))[0].isnan()
    target[0, :2, :2] = 255
    loss, _ = ops.masked_cross_entropy(logits, target)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and logits.grad[0, :, 2:, 2:].isfinite().all()


@pytest.mark.parametrize("size", [(9, 9), (4, 4)])
def test_softmax_takes_the_dtype_of_autocast(size):
    """Unless `dtype` is given; without autocast it is that of the logits, which the gradient's always is."""
    valid = torch.rand(2, *size) < 0.8
    for given in (torch.float32, torch.bfloat16, torch.float64):
        logits = torch.randn(2, 3, 4, 4).to(given).requires_grad_()
        expected = ops.upsample_softmax_reference(logits.double(), size, valid=valid)
        with torch.autocast("cpu", torch.bfloat16):
            probabilities = ops.upsample_softmax(logits, valid=valid)
            assert ops.upsample_softmax(logits, size, torch.float32).dtype == torch.float32
        assert ops.upsample_softmax(logits, size).dtype == given and probabilities.dtype == torch.bfloat16
        torch.testing.assert_close(probabilities.double(), expected, rtol=8e-3, atol=1e-6)
        gradient, = torch.autograd.grad(probabilities[:, 0].sum(), logits)
        assert gradient.dtype == given and gradient.abs().max() > 0


def test_confusion_matrix_and_mean_iou():
    rng = np.random.RandomState(1)
    logits, target = rng.randn(2, 3, 4, 5), rng.randint(0, 3, (2, 9, 9)).astype(np.uint8)
    target[1, 4:] = 255
    ids = np.stack([upsample(x, (9, 9)).argmax(0) for x in logits])
    expected = np.zeros((3, 3), int)
    for truth, guess in zip(target.flat, ids.flat):
        if truth != 255:
            expected[truth, guess] += 1
    matrix = ops.confusion_matrix(torch.from_numpy(logits), torch.from_numpy(target))
    assert (matrix.numpy() == expected).all() and matrix.dtype == torch.int64
    same = ops.confusion_matrix(torch.from_numpy(ids), torch.from_numpy(target).long(), 3, out=matrix)
    assert same is matrix and (matrix.numpy() == 2 * expected).all()
    iou = [expected[k, k] / (expected[k].sum() + expected[:, k].sum() - expected[k, k]) for k in range(3)]
    miou, per_class = ops.mean_iou(matrix)
    assert miou == pytest.approx(np.mean(iou)) and np.allclose(per_class.numpy(), iou)
    ties = ops.confusion_matrix(torch.zeros(1, 4, 2, 2).double(), torch.full((1, 3, 3), 2))
    assert ties[2].tolist() == [9, 0, 0, 0]  # the lowest class


def test_mean_iou_by_hand():
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # class 2 is absent
    assert ops.mean_iou(matrix)[0] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert ops.mean_iou(matrix, "zero")[0] == pytest.approx((3 / 4 + 4 / 5) / 3)
    assert ops.mean_iou(matrix)[1].isnan().tolist() == [False, False, True]
    never_right = torch.tensor([[2, 2], [0, 0]])  # class 1 is predicted, never rightly: its IoU is 0
    assert ops.mean_iou(never_right)[0] == pytest.approx(0.25)


Z, T, C = torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 1, 2, 2)
V = torch.ones(1, 4, 4, dtype=torch.bool)
SELECT = ops.select_labels, ops.select_labels_reference


@pytest.mark.parametrize("threshold", [0, 0.4, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_selected_labels_are_their_definition(threshold, masked):
    """In float64; cross entropy of them is that of labels, confidence and mask, to the bit."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 17, 23), generator=g)
    labels[0, :2] = 255
    confidence = torch.randn(2, 1, 3, 4, generator=g)
    confidence[1, 0, 2, 3] = torch.nan
    valid = torch.rand(2, 17, 23, generator=g) < 0.8 if masked else None
    above = F.interpolate(confidence.double(), (17, 23), mode="bilinear", align_corners=True)[:, 0].sigmoid()
    expected = labels.where((above > threshold) & (torch.tensor(True) if valid is None else valid), 255)
    for select, dtype in itertools.product(SELECT, (torch.uint8, torch.int64)):
        selected = select(labels.to(dtype), confidence, valid=valid, threshold=threshold)
        assert selected.dtype == torch.uint8 and torch.equal(selected, expected.to(torch.uint8))
        everything = select(labels.to(dtype), None, valid=valid)
        assert torch.equal(everything, (labels if valid is None else labels.where(valid, 255)).to(torch.uint8))
    results = []
    for arguments, more in (((labels, confidence), dict(valid=valid, threshold=threshold)), ((selected,), {})):
        logits = torch.randn(2, 5, 5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss, kept = ops.masked_cross_entropy(logits, *arguments, **more)
        loss.backward()
        results.append((loss, kept, logits.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and (results[0][1] > 0) == (threshold < 1)


@pytest.mark.parametrize("above", [True, False])
def test_a_float64_confidence_is_compared_in_float64(above):
    """Nearer to the threshold than float32 can tell."""
    confidence = torch.full((1, 1, 2, 2), math.log(0.3 / 0.7) + (1e-10 if above else -1e-10), dtype=torch.float64)
    for select in SELECT:
        assert ((select(T, confidence, threshold=0.3) < 255) == above).all()
    for loss in (ops.masked_cross_entropy, ops.masked_cross_entropy_reference):
        assert loss(Z, T, confidence, threshold=0.3)[1] == 16 * above


@pytest.mark.parametrize("name, call", [
    ("labels", lambda: ops.select_labels(T.float(), C)), ("labels", lambda: ops.select_labels(T[0, 0, 0], C)),
    ("labels .*300", lambda: ops.select_labels(T.long() + 300, C)),
    ("labels .*300", lambda: ops.select_labels_reference(T.long() + 300, C)),
    ("confidence", lambda: ops.select_labels(T, T)), ("valid", lambda: ops.select_labels(T, C, valid=T)),
    ("logits", lambda: ops.masked_cross_entropy(Z[0], T)), ("logits", lambda: ops.upsample_softmax(Z.long(), (4, 4))),
    ("target", lambda: ops.masked_cross_entropy(Z, T.int())), ("target", lambda: ops.masked_cross_entropy(Z, T[:, 0])),
    ("target .*3", lambda: ops.masked_cross_entropy(Z, T + 3)),
    ("target .*-1", lambda: ops.masked_cross_entropy(Z.double(), T.long() - 1)),
    ("target .*meta", lambda: ops.masked_cross_entropy(Z, T.to("meta"))),
    ("target", lambda: ops.masked_cross_entropy(Z, T, size=(7, 9))),
    ("confidence", lambda: ops.masked_cross_entropy(Z, T, Z)),
    ("valid", lambda: ops.masked_cross_entropy(Z, T, valid=T)),
    ("valid", lambda: ops.masked_cross_entropy(Z, T, valid=V[:, 1:])),
    ("valid", lambda: ops.upsample_softmax(Z, (7, 9), valid=V)),
    ("weight", lambda: ops.masked_cross_entropy(Z, T, weight=torch.ones(4))),
    ("weight", lambda: ops.masked_cross_entropy(Z, T, weight=torch.ones(3).double())),
    ("weight .*meta", lambda: ops.masked_cross_entropy(Z, T, weight=torch.ones(3, device="meta"))),
    ("divide", lambda: ops.masked_cross_entropy(Z, T, divide="some")),
    ("size", lambda: ops.masked_cross_entropy(Z, None, C)), ("size", lambda: ops.upsample_softmax(Z)),
    ("num_classes", lambda: ops.confusion_matrix(T, T)),
    ("target", lambda: ops.confusion_matrix(T[0, 0, 0], T[0, 0, 0], 3)),
    ("target .*7", lambda: ops.confusion_matrix(Z.double(), T + 7)),
    ("prediction", lambda: ops.confusion_matrix(T[:, 1:], T, 3)),
    ("prediction .*5", lambda: ops.confusion_matrix(T + 5, T, 3)),
    ("out", lambda: ops.confusion_matrix(T, T, 3, out=torch.zeros(2, 2, dtype=torch.int64))),
    ("absent", lambda: ops.mean_iou(torch.eye(2), "maybe")), ("matrix", lambda: ops.mean_iou(torch.eye(2) - 1)),
])
def test_errors_name_the_argument(name, call):
    with pytest.raises(ValueError, match=name):
        call()


def test_seg_ops(monkeypatch, tmp_path):
    """Without a compiler `auto` runs the references and says why; `kernel` is an error, as is an unknown value."""
    monkeypatch.setattr(ops, "_choose", ops._choose.__wrapped__)  # without its cache
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(ops, "SEG_OPS", "auto")
    assert ops.in_use().startswith("reference (") and "no-such-compiler" in ops.in_use()
    monkeypatch.setattr(ops, "SEG_OPS", "kernel")
    with pytest.raises(InputError, match="SEG_OPS=kernel.*no-such-compiler"):
        ops.in_use()
    monkeypatch.setattr(ops, "SEG_OPS", "fast")
    with pytest.raises(InputError, match="SEG_OPS=fast"):
        ops.in_use()


def test_labels_out_of_range_without_synchronisation(monkeypatch):
    """What CUDA does: the loss is NaN, the matrix's first cell negative however often it happens; no bad index."""
    monkeypatch.setattr(ops, "_can_read_values", lambda x: False)
    loss, matrix = ops.masked_cross_entropy_reference, ops.confusion_matrix_reference
    assert loss(Z, T + 7)[0].isnan() and loss(Z, T + 255)[0] == 0 and loss(Z, T)[0].isfinite()
    out = torch.zeros(3, 3, dtype=torch.int64)
    for _ in range(5):
        matrix(Z, T + 7, out=out)
        with pytest.raises(ValueError, match="matrix"):
            ops.mean_iou(out)
    assert matrix(Z, T)[0, 0] == 16
