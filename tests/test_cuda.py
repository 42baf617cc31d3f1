"""The operators on a GPU, if there is one: the tests of the CPU's kernels, and what only a GPU can show."""
import pytest
import test_kernels as k
import torch
from test_cuda_on_cpu import TESTS

from csrc import bench, build, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
    if not build.cuda_home():
        pytest.skip("no nvcc")
    assert ops.in_use("cuda") == "kernel", ops.in_use("cuda")
    monkeypatch.setattr(k, "DEVICE", "cuda")


@pytest.mark.parametrize("check", k.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", k.SHAPES)
def test_shapes(shape, dtype, check):
    k.test_shapes(shape, dtype, check)


@pytest.mark.parametrize("test, args", TESTS)
def test_kernels(test, args):
    test(*args)


def test_the_same_bits_from_run_to_run():
    first, *others = (k.large_results() for _ in range(5))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_offsets_beyond_32_bits():
    """The last image of a tensor of more than 2^31 numbers gives the same as alone."""
    logits, *_ = k.inputs(7, 19, 33, 33, 4097, 4097)  # 2.2e9 probabilities, in bfloat16 4.5 GB
    probs = ops.upsample_softmax(logits, (4097, 4097), torch.bfloat16)
    assert torch.equal(probs[-1:], ops.upsample_softmax(logits[-1:], (4097, 4097), torch.bfloat16))


def test_more_images_than_a_grid_has_in_z(operators=torch.ops.seg_ops, n=65_537):
    """Each of n equal images gives the same result."""
    logits, target, confidence, _ = (x[:1].expand(n, *x.shape[1:]) for x in k.inputs(1, 2, 2, 1, 3, 2))
    labels, counts = operators.label_map(target.contiguous(), confidence.contiguous(), None, torch.tensor(0.5), 2, 255)
    total, grad, _ = operators.cross_entropy(logits, labels, True)
    probs = operators.upsample_softmax(logits, None, 3, 2, torch.float32)
    out = torch.zeros(2, 2, dtype=torch.int64, device=labels.device)
    operators.confusion_matrix(logits, labels, 255, out)
    results = [labels, grad, probs, operators.upsample_softmax_backward(probs, logits, None),
               operators.upsample_argmax(logits, 3, 2)]
    assert all(len(x) == n and torch.equal(x, x[:1].expand_as(x)) for x in results)
    assert out.sum() == counts[0] == (labels < 255).sum() and total > 0


def test_another_stream():
    """The kernels run in the current stream, after what was queued there."""
    logits, target, *_ = k.inputs(2, 5, 4, 4, 25, 25)
    expected, stream = ops.masked_cross_entropy(logits, target)[0], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = logits * 1
        loss = ops.masked_cross_entropy(late, target)[0]
    stream.synchronize()
    assert torch.equal(loss, expected)


def test_no_synchronisation():
    logits, target, confidence, valid = k.inputs(2, 5, 4, 4, 25, 25)
    logits.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = ops.masked_cross_entropy(logits, target, confidence, valid=valid)
        (loss + ops.upsample_softmax(logits, (25, 25), valid=valid).square().mean()).backward()
        ops.confusion_matrix(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_benchmark(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SIZES", [(1, 3, 9, 65)])
    bench.main(bench.flags().parse_args(["--device=cuda", "--only=) float32", "--seconds=0"]))
    assert capsys.readouterr().out.count("| float32 |") == len(bench.OPERATORS)
