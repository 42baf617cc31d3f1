"""The CUDA kernels, compiled by g++ and run by cuda_on_cpu.h, against the float64 references; and that header's own tests."""
import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_kernels
import torch
from conftest import ROOT

from csrc import ops

CXX = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = pytest.mark.skipif(not CXX, reason="no C++ compiler")
INCLUDE, LIB = (Path(torch.__file__).parent / folder for folder in ("include", "lib"))
FLAGS = ["-std=c++17", "-fPIC", "-w", "-ffp-contract=off", "-fno-gnu-unique", "-DTORCH_TARGET_VERSION=0x020e000000000000",
         f"-I{INCLUDE}", f"-I{INCLUDE}/torch/csrc/api/include", "-include", str(ROOT / "tests/cuda_on_cpu.h"), "-x", "c++"]
SOURCES = [*sorted((ROOT / "csrc").glob("*.cu")), ROOT / "csrc/schemas.cpp"]
# N, K, h, w, H, W
SHAPES = [(2, 5, 4, 5, 25, 33), (1, 3, 1, 1, 7, 5), (1, 5, 7, 9, 33, 50), (1, 7, 9, 9, 5, 3), (1, 6, 2, 3, 5, 40),
          (1, 150, 3, 3, 17, 17), (1, 255, 3, 2, 9, 5), (2, 2, 3, 3, 49, 35)]


def run(*words, **kw):
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, **kw)


def build(folder, name, *flags, link=()):
    """A library of all kernels whose operators are torch.ops.NAME."""
    def compile_one(source):
        done = run(CXX, *FLAGS, f"-DSEG_OPS_LIBRARY={name}", *flags, "-c", source, "-o", folder / f"{source.name}.o")
        assert done.returncode == 0, done.stderr
        return folder / f"{source.name}.o"
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    done = run(CXX, "-shared", "-Wl,-Bsymbolic", *link, *objects, "-o", folder / f"{name}.so", f"-L{LIB}", "-ltorch",
               "-ltorch_cpu", "-lc10")
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(folder / f"{name}.so")
    return ctypes.CDLL(folder / f"{name}.so")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """(operators, seed setter)"""
    library = build(tmp_path_factory.mktemp("plain"), "cuda_on_cpu", "-O2")
    return torch.ops.cuda_on_cpu, library.cuda_on_cpu_seed


def cross_entropy(op, logits, *, target=None, confidence=None, valid=None, threshold=0.5, size=None, divide="kept"):
    size = size or tuple(target.shape[1:])
    if logits.shape[2:] == size:
        loss, kept, share, *rest = op.plain_cross_entropy(logits.contiguous(), target, confidence, valid, ops._logit(threshold), 255,
                                                          divide == "all")
        return loss, op.plain_cross_entropy_backward(share, logits.contiguous(), *rest), kept
    loss, kept, grad = op.masked_cross_entropy(logits, target, confidence, valid, ops._logit(threshold), *size, 255, divide == "all")
    return loss, grad.to(logits.dtype), kept


def everything(op, shape, dtype, seed=0):
    """Results of all operators: [(ours, eager, exact)], each a list of tensors."""
    logits, target, confidence, valid = test_kernels.inputs(*shape, seed=seed)
    logits, size, found = logits.to(dtype), shape[4:], []
    both_ways = test_kernels.both_ways
    for kw in test_kernels.cross_entropy_ways(logits, target, confidence, valid):
        found.append((cross_entropy(op, logits, **kw), both_ways(ops.masked_cross_entropy_reference, logits, **kw),
                      both_ways(ops.masked_cross_entropy_reference, logits.double(), **test_kernels.doubled(kw))))
    upstream = torch.randn(*shape[:2], *size, generator=torch.Generator().manual_seed(1)).to(dtype)
    for kw in (dict(), dict(valid=valid)):
        ours = (op.upsample_softmax(logits, kw.get("valid"), *size, dtype),
                op.upsample_softmax_backward(upstream, logits, kw.get("valid")).to(dtype))
        found.append((ours, both_ways(ops.upsample_softmax_reference, logits, size, upstream=upstream, **kw),
                      both_ways(ops.upsample_softmax_reference, logits.double(), size, upstream=upstream.double(), **kw)))
    ids = op.upsample_argmax(logits, *size)
    exact = ops.upsample_argmax_reference(logits.double(), size)
    found.append(([ids], [exact], [exact]))
    for labels in (target, target.long()):
        of_logits, of_ids = (torch.ones(shape[1], shape[1], dtype=torch.int64) for _ in range(2))
        op.confusion_of_logits(logits, labels, 255, of_logits)
        op.confusion_matrix(ids, labels, shape[1], 255, of_ids)
        exact = ops.confusion_matrix_reference(exact if exact.dim() == 3 else ids, labels, shape[1]) + 1
        found.append(([of_logits, of_ids], [exact, exact], [exact, exact]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_float64_references(kernels, shape, dtype):
    op, seed = kernels
    seed(hash(shape) % 1000)
    for ours, eager, exact in everything(op, shape, dtype):
        test_kernels.close(ours, eager, exact, floor=1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("shape", [(1, 4, 3, 4, 12, 20), (1, 3, 2, 18, 6, 40)])
def test_the_same_bits_for_twenty_schedules(kernels, shape):
    op, seed = kernels
    results = []
    for n in range(20):
        seed(n)
        results.append([x for ours, _, _ in everything(op, shape, torch.float32) for x in ours])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 200.0])
def test_not_finite_and_steep(kernels, bad):
    op, _ = kernels
    logits, target, *_ = test_kernels.inputs(1, 4, 4, 3, 25, 17, ignored=0)
    logits[0, 1, 2, 1] = bad
    size = (25, 17)
    for kw in (dict(target=target), dict(size=size)):
        ours, eager = cross_entropy(op, logits, **kw), ops.masked_cross_entropy_reference(logits, **kw)
        torch.testing.assert_close(ours[0], eager[0], equal_nan=True)
    torch.testing.assert_close(op.upsample_softmax(logits, None, *size, torch.float32),
                               ops.upsample_softmax_reference(logits, size), equal_nan=True)
    assert torch.equal(op.upsample_argmax(logits, *size), ops.upsample_argmax_reference(logits, size))


def test_layouts_and_nothing_counted(kernels):
    op, _ = kernels
    logits, target, confidence, valid = test_kernels.inputs(2, 5, 4, 4, 25, 25)
    upstream = torch.randn(2, 5, 25, 25)
    for x in test_kernels.layouts(logits):
        y = x.contiguous()
        assert all(torch.equal(a, b) for a, b in zip(cross_entropy(op, x, target=target), cross_entropy(op, y, target=target)))
        for a, b in [(op.upsample_softmax(x, valid, 25, 25, x.dtype), op.upsample_softmax(y, valid, 25, 25, x.dtype)),
                     (op.upsample_softmax_backward(test_kernels.layouts(upstream)[2], x, valid),
                      op.upsample_softmax_backward(upstream, y, valid)),
                     (op.upsample_argmax(x, 25, 25), op.upsample_argmax(y, 25, 25))]:
            assert torch.equal(a, b)
    loss, grad, kept = cross_entropy(op, logits, confidence=confidence, threshold=1.0, size=(25, 25))
    assert loss == 0 and kept == 0 and (grad == 0).all()


@pytest.mark.parametrize("value", [6, 254, -1, 1 << 40])
def test_bad_labels_poison(kernels, value):
    """NaN from the loss, a first cell below 0; `watched` below sees that nothing is touched out of bounds."""
    op, _ = kernels
    logits, target, *_ = test_kernels.inputs(1, 6, 5, 5, 33, 33)
    bad = target.long()
    bad[0, 2, 3] = value
    assert cross_entropy(op, logits, target=bad)[0].isnan()
    for count in (lambda out: op.confusion_of_logits(logits, bad, 255, out),
                  lambda out: op.confusion_matrix(bad, target * 0, 6, -1, out)):
        out = torch.zeros(6, 6, dtype=torch.int64)
        count(out)
        with pytest.raises(ValueError, match="negative"):
            ops.mean_iou(out)


def test_no_races_and_few_sectors(tmp_path):
    """Every access to memory is watched: no two threads meet without a barrier, and few sectors are touched."""
    library, op = build(tmp_path, "watched", "-O1", "-fsanitize=thread"), torch.ops.watched
    n, k, h, w, height, width = shape = (1, 8, 6, 8, 41, 57)
    logits, target, confidence, valid = test_kernels.inputs(*shape)

    sectors = library.cuda_on_cpu_sectors
    low, labels, full = n * k * h * w / 8, n * height * width / 32, n * k * height * width / 8
    sectors()
    cross_entropy(op, logits, target=target)
    touched = {"cross entropy": (sectors(), 2 * low + labels)}
    cross_entropy(op, logits, confidence=confidence, valid=valid, size=(height, width))
    touched["cross entropy of the argmax"] = sectors(), 2 * low + labels
    op.upsample_softmax(logits, valid, height, width, torch.float32)
    touched["upsample_softmax"] = sectors(), low + labels + full
    op.upsample_softmax_backward(torch.randn(n, k, height, width), logits, valid)
    touched["upsample_softmax_backward"] = sectors(), 2 * low + labels + full
    ids = op.upsample_argmax(logits, height, width)
    touched["upsample_argmax"] = sectors(), low + labels
    out = torch.zeros(k, k, dtype=torch.int64)
    op.confusion_of_logits(logits, target, 255, out)
    touched["confusion_of_logits"] = sectors(), low + labels + k * k / 4
    op.confusion_matrix(ids, target, k, 255, out)
    touched["confusion_matrix"] = sectors(), 2 * labels + k * k / 4
    few = 30  # sums of blocks, arguments of launches, sectors that a tensor's ends share with another's
    assert all(seen <= 1.3 * fewest + few for seen, fewest in touched.values()), touched


PLANTS = {0: "", 1: "race: thread", 2: "race: thread", 3: "wrong with seed", 4: "race: thread", 5: "not all threads reach"}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_header_finds_what_is_planted(plant, tmp_path):
    """1, 2: no barrier before or after a read; 3: one too far in a tile; 4: a plain addition; 5: a barrier for a few."""
    found = {}
    for kind, compiling, linking in (("schedules", [], []), ("watched", ["-fsanitize=thread"], []),
                                     ("address", ["-fsanitize=address"], ["-fsanitize=address"])):
        done = run(CXX, "-std=c++17", "-O1", "-w", *compiling, f"-DPLANT={plant}", "-include", ROOT / "tests/cuda_on_cpu.h",
                   "-x", "c++", "-c", ROOT / "tests/planted.cu", "-o", tmp_path / "planted.o")
        assert done.returncode == 0, done.stderr
        done = run(CXX, *linking, tmp_path / "planted.o", "-o", tmp_path / "planted")
        assert done.returncode == 0, done.stderr
        done = run(tmp_path / "planted")
        found[kind] = done.stdout + done.stderr
        if kind != "address" and plant != 4 or kind == "watched":
            assert (done.returncode == 0) == (plant == 0), found
    assert PLANTS[plant] in found["watched"], found
    if plant in (1, 2):
        assert "wrong with seed" in found["schedules"]
    if plant == 3:
        assert "heap-buffer-overflow" in found["address"]


def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pathlib, torch, test_cuda_on_cpu as t
t.build(pathlib.Path({str(tmp_path)!r}), "sanitized", *{flags!r}, link={flags[2:3]!r})
for shape in t.SHAPES[:5]:
    t.everything(torch.ops.sanitized, shape, torch.float32)
print("clean")
"""
    names = [run(CXX, f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libubsan.so")]
    done = run(sys.executable, "-c", code, env=os.environ | {"LD_PRELOAD": " ".join(names), "ASAN_OPTIONS": "detect_leaks=0",
                                                             "SEG_OPS": "reference"})
    assert done.stdout == "clean\n", done.stderr[-2000:]
