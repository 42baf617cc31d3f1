"""The operators on a GPU, where there is one: the tests of the CPU's kernels, and what only a GPU can show."""
import pytest
import test_kernels
import torch
from test_cuda_on_cpu import EDGES, OF_SHAPES, check_many_pictures

from csrc import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    assert ops.in_use("cuda") == "kernel", ops.in_use("cuda")
    monkeypatch.setattr(test_kernels, "DEVICE", "cuda")


@pytest.mark.parametrize("test", OF_SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", test_kernels.SHAPES)
def test_shapes_of_the_cpu(shape, dtype, test):
    test(shape, dtype)


@pytest.mark.parametrize("test, args", EDGES)
def test_edges_of_the_cpu(test, args):
    test(*args)


def test_the_same_bits_from_run_to_run():
    logits, target, confidence, valid = test_kernels.inputs(3, 21, 17, 17, 129, 129)
    upstream, results = test_kernels.noise(3, 21, 129, 129), []
    for _ in range(5):
        results.append([*test_kernels.both_ways(ops.masked_cross_entropy, logits, target, confidence, valid=valid),
                        *test_kernels.both_ways(ops.masked_cross_entropy, logits, size=(129, 129)),
                        *test_kernels.both_ways(ops.upsample_softmax, logits, (129, 129), upstream=upstream)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("value", [6, 254, -1, 1 << 40])
def test_bad_labels_poison(value):
    logits, target, *_ = test_kernels.inputs(1, 6, 5, 5, 33, 33)
    bad = target.long()
    bad[0, 2, 3] = value
    assert ops.masked_cross_entropy(logits, bad)[0].isnan()
    for matrix in (ops.confusion_matrix(logits, bad), ops.confusion_matrix(target * 0, bad, 6)):
        with pytest.raises(ValueError, match="negative"):
            ops.mean_iou(matrix)


def test_offsets_beyond_32_bits():
    """The last picture of a tensor of more than 2^31 numbers is the same as alone."""
    k, side = 19, 4097
    logits, *_ = test_kernels.inputs(7, k, 33, 33, side, side)  # 2.2e9 probabilities, in bfloat16 4.5 GB
    probs = ops.upsample_softmax(logits, (side, side), torch.bfloat16)
    assert torch.equal(probs[-1:], ops.upsample_softmax(logits[-1:], (side, side), torch.bfloat16))


def test_more_pictures_than_a_grid_has_in_z():
    check_many_pictures(torch.ops.seg_ops)


def test_another_stream():
    """The kernels run in the stream that is current: what waits for it is seen."""
    logits, target, *_ = test_kernels.inputs(2, 5, 4, 4, 25, 25)
    expected, stream = ops.masked_cross_entropy(logits, target)[0], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = logits * 1
        loss = ops.masked_cross_entropy(late, target)[0]
    stream.synchronize()
    assert torch.equal(loss, expected)


def test_no_synchronisation():
    logits, target, confidence, valid = test_kernels.inputs(2, 5, 4, 4, 25, 25)
    logits.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = ops.masked_cross_entropy(logits, target, confidence, valid=valid)
        (loss + ops.upsample_softmax(logits, (25, 25), valid=valid).square().mean()).backward()
        ops.confusion_matrix(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
