"""The operators on a GPU, if there is one: the tests of the CPU's kernels, and what only a GPU can show."""
import pytest
import test_kernels as k
import torch
from test_cuda_on_cpu import TESTS, check_many_images

from csrc import bench, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch):
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
    logits, target, confidence, valid = k.inputs(3, 21, 17, 17, 129, 129)
    upstream, results = k.noise(3, 21, 129, 129), []
    for _ in range(5):
        results.append([*k.with_gradient(ops.masked_cross_entropy, logits, target, confidence, valid=valid),
                        *k.with_gradient(ops.masked_cross_entropy, logits, size=(129, 129)),
                        *k.with_gradient(ops.upsample_softmax, logits, (129, 129), upstream=upstream)])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_offsets_beyond_32_bits():
    """The last image of a tensor of more than 2^31 numbers gives the same as alone."""
    logits, *_ = k.inputs(7, 19, 33, 33, 4097, 4097)  # 2.2e9 probabilities, in bfloat16 4.5 GB
    probs = ops.upsample_softmax(logits, (4097, 4097), torch.bfloat16)
    assert torch.equal(probs[-1:], ops.upsample_softmax(logits[-1:], (4097, 4097), torch.bfloat16))


def test_more_images_than_a_grid_has_in_z():
    check_many_images(torch.ops.seg_ops)


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
