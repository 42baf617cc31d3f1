"""The CUDA kernels, compiled by g++ and run by cuda_on_cpu.h, against the float64 references; that header's tests."""
import ctypes
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_kernels
import torch
from conftest import ROOT

from csrc import autograd, build, ops

CXX, VERSION = build.cxx().split(), build.version(build.cxx())
pytestmark = pytest.mark.skipif(not VERSION, reason="no C++ compiler")
INCLUDE, LIB = (Path(torch.__file__).parent / folder for folder in ("include", "lib"))
FLAGS = ["-std=c++17", "-fPIC", "-w", "-ffp-contract=off", "-fno-gnu-unique", "-x", "c++", build.TARGET]
HEADER = ROOT / "tests/cuda_on_cpu.h"
HEADERS = [HEADER, ROOT / "tests/cuda_on_cpu_watch.h"]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
# the CPU's, scaled down: N, K, h, w, H, W
SHAPES = [(2, 5, 4, 5, 25, 33), (1, 3, 1, 1, 7, 5), (2, 2, 4, 4, 4, 4), (1, 5, 7, 9, 33, 50), (1, 255, 3, 2, 9, 5),
          (1, 7, 9, 9, 5, 3), (1, 6, 2, 18, 9, 137), (1, 6, 2, 3, 3, 40), (2, 2, 3, 3, 49, 35), (1, 2, 1, 9, 1, 9),
          (1, 9, 5, 1, 9, 1), (1, 5, 3, 10, 9, 127), (1, 150, 3, 10, 9, 73)]
quick = pytest.mark.quick
SHAPES = [pytest.param(s, marks=quick) if i in (0, 6) else s for i, s in enumerate(SHAPES)]


def run(*words, **kw):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def made_once(name, make, files, *words):
    """The folder that make(folder) has filled from `files` and `words`: once on a machine, in csrc/build.py's cache."""
    folder = build.cache_folder(name, [torch.__version__, *map(str, words)], files)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            make(folder)
            (folder / "ready").touch()
    return folder


def library(name, *flags, link=()):
    """A library of all kernels whose operators are torch.ops.NAME."""
    flags = [*FLAGS, f"-DSEG_OPS_LIBRARY={name}", *flags]

    def make(folder):
        def compile_one(source):
            run(*CXX, *flags, f"-I{INCLUDE}", f"-I{INCLUDE}/torch/csrc/api/include", "-include", HEADER, "-c", source,
                "-o", folder / f"{source.name}.o")
            return folder / f"{source.name}.o"
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, SOURCES))
        run(*CXX, "-shared", "-Wl,-Bsymbolic", *link, *objects, "-o", folder / "library.so", f"-L{LIB}", "-ltorch",
            "-ltorch_cpu", "-lc10")
    files = [*SOURCES, *build.sources("cuda"), *HEADERS]
    file = made_once(name, make, files, *flags, *link, VERSION) / "library.so"
    torch.ops.load_library(file)
    autograd.register(name)
    return ctypes.CDLL(file)


class Schedules:
    """torch.ops.seg_ops for tests: runs each call with so many schedules, which have to agree to the bit."""

    def __init__(self, operators, seed, schedules):
        self.operators, self.seed, self.schedules = operators, seed, schedules

    def __getattr__(self, name):
        operator, in_place = getattr(self.operators, name), name == "confusion_matrix"

        def call(*args):
            runs = []
            for n in range(self.schedules):
                self.seed(n)
                counts = args[-1].clone() if in_place else None
                result = operator(*args[:-1], counts) if in_place else operator(*args)
                runs.append(counts if in_place else result)
            for other in runs[1:]:
                torch.testing.assert_close(other, runs[0], rtol=0, atol=0, equal_nan=True)
            return args[-1].copy_(runs[0]) if in_place else runs[0]
        return call


def use(patch, namespace):
    """Have csrc/ops.py call the kernels in `namespace`, for all three types, without looking at values, as on a GPU."""
    patch.setattr(torch.ops, "seg_ops", namespace, raising=False)

    def takes(x, *dtypes, size=None):
        return x.shape[2:] != size and torch.float64 not in (x.dtype, *dtypes)
    patch.setattr(ops, "_kernel", takes)
    patch.setattr(ops, "_can_look", lambda x: False)


@pytest.fixture(scope="module")
def built():
    """(operators, seed setter)"""
    seed = library("cuda_on_cpu", "-O2").cuda_on_cpu_seed
    return torch.ops.cuda_on_cpu, seed


@pytest.fixture
def kernels(built, monkeypatch, request):
    use(monkeypatch, Schedules(*built, 20 if request.config.getoption("--slow") else 3))
    return torch.ops.seg_ops


OF_SHAPES = [test_kernels.test_cross_entropy, test_kernels.test_upsample_softmax, test_kernels.test_confusion_matrix,
             test_kernels.test_pseudo_labels]


@pytest.mark.parametrize("test", OF_SHAPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_the_cpu(kernels, shape, dtype, test):
    test(shape, dtype)


# the same that tests/test_cuda.py runs on a GPU
EDGES = [(test_kernels.test_confusion_matrix_of_runs, [(n, most) for n in (1, 63, 1025, 9000) for most in (1, 50)]),
         # more blocks than one sums up at a time
         (test_kernels.test_cross_entropy, [((2, 2, 130, 3, 131, 5), torch.float32)]),
         (test_kernels.test_every_number_of_classes, [(2,), (31,), (64,), (65,), (128,), (254,)]),
         (test_kernels.test_nothing_ignored_and_everything, [(0,), (1,)]),
         (test_kernels.test_second_backward_is_the_same, [()]),
         (test_kernels.test_a_second_derivative_is_refused, [()]),
         (test_kernels.test_layouts, [()]),
         (test_kernels.test_ties_go_to_the_lowest_class, [()]),
         (test_kernels.test_not_finite, [(bad, size) for bad in (float("nan"), float("inf"), -float("inf"))
                                         for size in ((33, 33), (33, 5), (5, 33))]),
         (test_kernels.test_steep_logits, [()]),
         (test_kernels.test_steep_along_one_axis, [(2,), (3,)]),
         (test_kernels.test_falls_from_pixel_to_pixel, [(2,), (3,)]),
         (test_kernels.test_all_classes_fall, [(2,), (3,)]),
         (test_kernels.test_pseudo_labels_of_what_is_steep_or_not_finite, [(float("nan"),), (-float("inf"),)]),
         (test_kernels.test_confidence_that_does_not_count, [()]),
         (test_kernels.test_another_label_ignored, [(2,), (300,)]),
         (test_kernels.test_infinite_confidence, [()]),
         (test_kernels.test_an_axis_that_keeps_its_size_stays_with_the_kernels, [((5, 17),), ((17, 5),)])]
QUICK = (test_kernels.test_layouts, test_kernels.test_ties_go_to_the_lowest_class, test_kernels.test_steep_logits,
         test_kernels.test_falls_from_pixel_to_pixel)
EDGES = [pytest.param(test, args, id=f"{test.__name__}-{args}", marks=quick if test in QUICK else ())
         for test, several in EDGES for args in several]


@pytest.mark.parametrize("test, args", EDGES)
def test_edges_of_the_cpu(kernels, test, args):
    test(*args)


def test_any_number_of_bad_labels_poisons(built):
    """2^19 and more of them, which would wrap if each took something away."""
    operators, _ = built
    truth, logits = torch.full((1, 1000, 1100), 7), torch.zeros(1, 6, 2, 2)
    guess = torch.zeros(truth.shape, dtype=torch.uint8)
    for prediction in (guess, logits):
        out = torch.zeros(6, 6, dtype=torch.int64)
        operators.confusion_matrix(prediction, truth, 255, out)
        assert out[0, 0] == -(1 << 44)


@pytest.mark.parametrize("value", [6, 254, -1, 1 << 40])
def test_bad_labels_poison(kernels, value):
    """NaN from the loss, a first cell below 0."""
    logits, target, *_ = test_kernels.inputs(1, 6, 5, 5, 33, 33)
    bad = target.long()
    bad[0, 2, 3] = value
    assert ops.masked_cross_entropy(logits, bad)[0].isnan()
    for prediction, truth, ignore in ((logits, bad, 255), (bad, target * 0, -1)):
        out = torch.zeros(6, 6, dtype=torch.int64)
        kernels.confusion_matrix(prediction, truth, ignore, out)
        with pytest.raises(ValueError, match="negative"):
            ops.mean_iou(out)


SIZES = [((5, 7), (5, 7)), ((3, 2), (5, 7)), ((5, 2), (5, 7)), ((3, 7), (5, 7)), ((1, 1), (5, 7)), ((9, 9), (5, 7))]


@pytest.mark.parametrize("confident, size", SIZES)
def test_label_map(kernels, confident, size):
    """Bytes and counts, whatever is given; a confidence of the labels' size is compared as it is."""
    g = torch.Generator().manual_seed(0)
    target = torch.randint(-2, 7, (3, *size), generator=g)
    valid = torch.rand(target.shape, generator=g) < 0.7
    logits = torch.randn(3, 1, *confident, generator=g)
    infinite = torch.where(logits > 0, torch.inf, -torch.inf)
    logits[0, 0, 0, 0] = torch.nan
    short = target.to(torch.uint8)
    for labels, ignore in ((target, -1), (target, 1 << 40), (short, 254), (short, -1)):
        for mask in (None, valid):
            for confidence, threshold in ((None, 0.9), (logits, 0.3), (logits, 0.0), (logits, 1.0), (infinite, 0.5)):
                known = labels.long() != ignore
                bad = known & ((labels.long() < 0) | (labels.long() > 4))
                counts = known & (torch.tensor(True) if mask is None else mask)
                kept = counts
                if confidence is not None:
                    kept = counts & (ops._upsample(confidence.double(), size).sigmoid()[:, 0] > threshold)
                found, (sure, everything, wrong) = kernels.label_map(labels, confidence, mask, torch.tensor(threshold),
                                                                     5, ignore)
                assert torch.equal(found, labels.where(kept & ~bad, 255).to(torch.uint8))
                assert (sure, everything, wrong) == (kept.sum(), counts.sum(), bad.sum())


@pytest.mark.slow
def test_more_pictures_than_a_grid_has_in_z(built):
    check_many_pictures(built[0])


def check_many_pictures(operators, n=65_537):
    """Every one of them gives the same."""
    logits, target, confidence, _ = (x[:1].expand(n, *x.shape[1:]) for x in test_kernels.inputs(1, 2, 2, 1, 3, 2))
    labels, counts = operators.label_map(target.contiguous(), confidence.contiguous(), None, torch.tensor(0.5), 2, 255)
    total, grad = operators.cross_entropy(logits, labels, True)
    probs = operators.upsample_softmax(logits, None, 3, 2, torch.float32)
    out = torch.zeros(2, 2, dtype=torch.int64, device=labels.device)
    operators.confusion_matrix(logits, labels, 255, out)
    results = [labels, grad, probs, operators.upsample_softmax_backward(probs, logits, None),
               operators.upsample_argmax(logits, 3, 2)]
    assert all(len(x) == n and torch.equal(x, x[:1].expand_as(x)) for x in results)
    assert out.sum() == counts[0] == (labels < 255).sum() and total > 0


@quick
def test_no_races_and_few_sectors():
    """Every access to memory is watched: no two threads meet without a barrier, and few sectors are touched."""
    lib, op = library("watched", "-O1", "-fsanitize=thread"), torch.ops.watched
    lib.cuda_on_cpu_request.restype = ctypes.c_double
    n, k, h, w, height, width = shape = (1, 21, 4, 18, 17, 137)
    logits, target, confidence, valid = test_kernels.inputs(*shape)
    low, labels, full = n * k * h * w / 8, n * height * width / 32, n * k * height * width / 8
    sums = n * k * (h - 1) * (w - 1) / 2  # of cells: four numbers each
    touched, requests = {}, {}

    def sectors(name, fewest, classes_last=None):
        if classes_last is not None:
            address = ctypes.c_void_p(classes_last.data_ptr())
            requests[name] = lib.cuda_on_cpu_request(address, ctypes.c_long(classes_last.nbytes))
        touched[name] = lib.cuda_on_cpu_sectors(), fewest

    lib.cuda_on_cpu_sectors()
    ids, _ = op.label_map(target, None, None, torch.tensor(0.3), k, 255)
    sectors("label_map", 2 * labels)
    op.label_map(target, confidence, valid, torch.tensor(0.3), k, 255)
    sectors("label_map with all", 3 * labels)
    op.cross_entropy(logits, ids, False)
    sectors("cross_entropy", low + labels)
    op.cross_entropy(logits, ids, True)
    sectors("cross_entropy with its gradient", 2 * low + labels + sums)
    for dtype in (torch.float32, torch.bfloat16):
        probs = op.upsample_softmax(logits, valid, height, width, dtype)
        sectors(f"upsample_softmax {dtype}", low + labels + full * dtype.itemsize / 4, probs)
        op.upsample_softmax_backward(probs, logits, None)
        sectors(f"upsample_softmax_backward {dtype}", 2 * low + sums + full * dtype.itemsize / 4, probs)
    ids = op.upsample_argmax(logits, height, width)
    sectors("upsample_argmax", low + labels)
    op.upsample_argmax(logits, height, width, torch.rand(k), valid)
    sectors("upsample_argmax with confidences", low + 2 * labels)
    out = torch.zeros(k, k, dtype=torch.int64)
    op.confusion_matrix(logits, target, 255, out)
    sectors("counts of logits", low + labels + k * k / 4)
    op.confusion_matrix(ids, target, 255, out)
    sectors("counts of ids", 2 * labels + k * k / 4)
    print(touched, requests)
    few = 40  # sums of blocks, arguments of launches, sectors that a tensor's ends share with another tensor
    assert all(seen <= 1.3 * fewest + few for seen, fewest in touched.values()), touched
    # a pixel's classes, 84 or 42 bytes anywhere in memory, lie in 3.5 or 2.25 sectors
    assert all(mean < (3.6 if "float32" in name else 2.4) for name, mean in requests.items()), requests


PLANTS = {0: "", 1: "race: thread", 2: "race: thread", 3: "wrong with seed", 4: "race: thread",
          5: "not all threads reach"}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_header_finds_what_is_planted(plant):
    """1, 2: no barrier before or after a read; 3: one too far in a tile; 4: a plain addition; 5: a barrier for some."""
    flags = ["-std=c++17", "-O1", "-w", f"-DPLANT={plant}"]
    kinds = {"schedules": ([], []), "watched": (["-fsanitize=thread"], []),
             "address": (["-fsanitize=address"], ["-fsanitize=address"])}

    def make(folder):
        def compile_one(kind):
            compiling, linking = kinds[kind]
            run(*CXX, *flags, *compiling, "-include", HEADER, "-x", "c++", "-c", ROOT / "tests/planted.cu", "-o",
                folder / f"{kind}.o")
            run(*CXX, *linking, folder / f"{kind}.o", "-o", folder / kind)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, kinds))
    folder, found = made_once("planted", make, [ROOT / "tests/planted.cu", *HEADERS], *flags, VERSION), {}
    for kind in kinds:
        done = subprocess.run([folder / kind], capture_output=True, text=True)
        found[kind] = done.stdout + done.stderr
        if kind != "address" and plant != 4 or kind == "watched":
            assert (done.returncode == 0) == (plant == 0), found
    assert PLANTS[plant] in found["watched"], found
    if plant in (1, 2):
        assert "wrong with seed" in found["schedules"]
    if plant == 3:
        assert "heap-buffer-overflow" in found["address"]


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers():
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pytest, torch, test_cuda_on_cpu as t
seed = t.library("sanitized", *{flags!r}, link={flags[2:3]!r}).cuda_on_cpu_seed
t.use(pytest.MonkeyPatch(), t.Schedules(torch.ops.sanitized, seed, 1))
for test in t.OF_SHAPES:
    for shape in {[getattr(s, "values", [s])[0] for s in SHAPES[:9]]!r}:
        test(shape, torch.float32)
for value in (6, 1 << 40):
    t.test_bad_labels_poison(torch.ops.seg_ops, value)
print("clean")
"""
    names = [run(*CXX, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    env = {"LD_PRELOAD": " ".join(names), "ASAN_OPTIONS": "detect_leaks=0", "SEG_OPS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.stdout == "clean\n", done.stderr[-2000:]
