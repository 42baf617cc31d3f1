"""The operators on a GPU, where there is one, against the float64 references on the CPU."""
import pytest
import test_kernels
import torch

from csrc import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", test_kernels.SHAPES)
def test_equal_to_the_float64_references(shape, dtype):
    assert ops.in_use("cuda") == "kernel", ops.in_use("cuda")
    both_ways, size = test_kernels.both_ways, shape[4:]
    logits, target, confidence, valid = test_kernels.inputs(*shape)
    logits, floor = logits.to(dtype), 1e-6 if dtype == torch.float32 else 4e-3
    for kw in test_kernels.cross_entropy_ways(logits, target, confidence, valid):
        moved = {name: on_gpu(x) for name, x in kw.items()}
        ours = [x.cpu() for x in both_ways(ops.masked_cross_entropy, logits.cuda(), upstream=3, **moved)]
        eager = both_ways(ops.masked_cross_entropy_reference, logits, upstream=3, **kw)
        exact = both_ways(ops.masked_cross_entropy_reference, logits.double(), upstream=3, **test_kernels.doubled(kw))
        test_kernels.close(ours, eager, exact)
    upstream = torch.randn(*shape[:2], *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    for kw in (dict(), dict(valid=valid)):
        moved = {name: on_gpu(x) for name, x in kw.items()}
        ours = [x.cpu() for x in both_ways(ops.upsample_softmax, logits.cuda(), size, upstream=upstream.cuda(), **moved)]
        test_kernels.close(ours, both_ways(ops.upsample_softmax_reference, logits, size, upstream=upstream, **kw),
                           both_ways(ops.upsample_softmax_reference, logits.double(), size, upstream=upstream.double(), **kw),
                           floor=floor)
    ids = ops.upsample_argmax(logits.cuda(), size)
    assert torch.equal(ids.cpu(), ops.upsample_argmax_reference(logits.double(), size))
    for labels in (target, target.long()):
        exact = ops.confusion_matrix_reference(ids.cpu(), labels, shape[1])
        assert torch.equal(ops.confusion_matrix(logits.cuda(), labels.cuda()).cpu(), exact)
        assert torch.equal(ops.confusion_matrix(ids, labels.cuda(), shape[1]).cpu(), exact)


def test_the_same_bits_from_run_to_run():
    logits, target, confidence, valid = (on_gpu(x) for x in test_kernels.inputs(3, 21, 17, 17, 129, 129))
    upstream, results = torch.randn(3, 21, 129, 129, device="cuda"), []
    for _ in range(5):
        results.append([*test_kernels.both_ways(ops.masked_cross_entropy, logits, target, confidence, valid=valid),
                        *test_kernels.both_ways(ops.masked_cross_entropy, logits, size=(129, 129)),
                        *test_kernels.both_ways(ops.upsample_softmax, logits, (129, 129), upstream=upstream)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("value", [6, 254, -1, 1 << 40])
def test_bad_labels_poison(value):
    logits, target, *_ = (on_gpu(x) for x in test_kernels.inputs(1, 6, 5, 5, 33, 33))
    bad = target.long()
    bad[0, 2, 3] = value
    assert ops.masked_cross_entropy(logits, bad)[0].isnan()
    for matrix in (ops.confusion_matrix(logits, bad), ops.confusion_matrix(target * 0, bad, 6)):
        with pytest.raises(ValueError, match="negative"):
            ops.mean_iou(matrix)


def test_no_synchronisation():
    logits, target, confidence, valid = (on_gpu(x) for x in test_kernels.inputs(2, 5, 4, 4, 25, 25))
    logits.requires_grad_()
    ops.in_use("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = ops.masked_cross_entropy(logits, target, confidence, valid=valid)
        (loss + ops.upsample_softmax(logits, (25, 25), valid=valid).square().mean()).backward()
        ops.confusion_matrix(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
