"""The CUDA kernels, compiled by g++ and run by cuda_on_cpu.h, against the float64 references."""
import ctypes
import fcntl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import test_kernels as k
import torch
from conftest import ROOT
from test_kernels import INF, NAN

from csrc import autograd, build, ops

CXX, VERSION = build.cxx().split(), build.version(build.cxx())
pytestmark = pytest.mark.skipif(not VERSION, reason="no C++ compiler")
quick = pytest.mark.quick
INCLUDE, LIB = (Path(torch.__file__).parent / folder for folder in ("include", "lib"))
FLAGS = ["-std=c++17", "-fPIC", "-w", "-ffp-contract=off", "-fno-gnu-unique", "-x", "c++", build.TARGET]
HEADER = ROOT / "tests/cuda_on_cpu.h"
HEADERS = [HEADER, ROOT / "tests/cuda_on_cpu_watch.h"]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
# those of the CPU's kernels, scaled down: N, K, h, w, H, W
SHAPES = [(2, 5, 4, 5, 25, 33), (1, 6, 2, 18, 9, 137), (1, 255, 3, 2, 9, 5), (1, 3, 1, 1, 7, 5), (2, 2, 4, 4, 4, 4),
          (1, 5, 7, 9, 33, 50), (1, 7, 9, 9, 5, 3), (1, 6, 2, 3, 3, 40), (2, 2, 3, 3, 49, 35), (1, 2, 1, 9, 1, 9),
          (1, 9, 5, 1, 9, 1), (1, 5, 3, 10, 9, 127), (1, 150, 3, 10, 9, 73), (1, 3, 5, 5, 5, 17), (1, 3, 5, 5, 17, 5)]


def run(*words, **kw):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def made_once(name, make, files, *words):
    """Return the folder in csrc/build.py's cache that make(folder) fills, once for the same `files` and `words`."""
    folder = build.cache_folder(name, [torch.__version__, *map(str, words)], files)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "ready").exists():
            make(folder)
            (folder / "ready").touch()
    return folder


def library(name, *flags, link=()):
    """Load a library of all kernels as torch.ops.NAME."""
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
    """torch.ops.seg_ops for tests: each call runs under several random schedules, which must agree to the bit."""

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
    """Make csrc/ops.py call the kernels in `namespace` for all three dtypes, without reading values, as on a GPU."""
    patch.setattr(torch.ops, "seg_ops", namespace, raising=False)

    def takes(x, *dtypes, size=None):
        return x.shape[2:] != size and torch.float64 not in (x.dtype, *dtypes)
    patch.setattr(ops, "_uses_kernel", takes)
    patch.setattr(ops, "_can_read_values", lambda x: False)


@pytest.fixture(scope="module")
def built():
    """(operators, seed setter)"""
    seed = library("cuda_on_cpu", "-O2").cuda_on_cpu_seed
    return torch.ops.cuda_on_cpu, seed


@pytest.fixture
def kernels(built, monkeypatch):
    use(monkeypatch, Schedules(*built, 2))


@pytest.mark.parametrize("check", k.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("shape, dtype", [  # all shapes in all types: tests/stress/kernels.py
    pytest.param(shape, dtype, marks=quick if i < 2 else ()) for i, shape in enumerate(SHAPES)
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if i < 3 or dtype == torch.float32])
def test_shapes(kernels, shape, dtype, check):
    k.test_shapes(shape, dtype, check)


# tests/test_cuda.py runs the same on a GPU
TESTS = {k.test_confusion_matrix_of_runs: [(n, longest) for n in (1, 63, 1025, 9000) for longest in (1, 50)],
         # more blocks than one sums up at a time
         k.test_shapes: [(shape, torch.float32, k.check_cross_entropy) for shape in [
             (2, 2, 130, 3, 131, 5), *((1, classes, 3, 4, 17, 25) for classes in (2, 31, 64, 65, 128, 254))]],
         k.test_nothing_or_everything_ignored: [(0,), (1,)],
         k.test_backward_twice_but_not_differentiated_twice: [()],
         k.test_strides: [(check,) for check in k.CHECKS],
         k.test_ties_go_to_the_lowest_class: [()],
         k.test_nonfinite_logits: [(NAN, (33, 5)), (INF, (5, 33)), (-INF, (33, 33))],
         k.test_steps_of_hundreds_within_a_cell: [()],
         k.test_steps_along_one_axis: [(kind, axis) for kind in k.STEPS for axis in (2, 3)],
         k.test_pseudo_labels_of_steep_and_nonfinite_logits: [(NAN,), (-INF,)],
         k.test_confidence_at_its_threshold: [()],
         k.test_select_labels: [((5, 7),), ((3, 2),), ((5, 2),), ((3, 7),), ((1, 1),), ((9, 9),)],
         k.test_another_ignore_index: [(2,), (300,)],
         k.test_labels_out_of_range: [(6,), (254,), (-1,), (1 << 40,)]}
QUICK = k.test_strides, k.test_ties_go_to_the_lowest_class, k.test_labels_out_of_range
TESTS = [pytest.param(test, args, id=f"{test.__name__}-{n}", marks=quick if test in QUICK else ())
         for test, several in TESTS.items() for n, args in enumerate(several)]


@pytest.mark.parametrize("test, args", TESTS)
def test_kernels(kernels, test, args):
    test(*args)


def test_no_races_and_few_sectors():
    """Watch every memory access: no two threads meet without a barrier, and few 32-byte sectors are touched."""
    lib, op = library("watched", "-O1", "-fsanitize=thread"), torch.ops.watched
    lib.cuda_on_cpu_request.restype = ctypes.c_double
    n, classes, h, w, height, width = shape = (1, 21, 4, 18, 17, 137)
    logits, target, confidence, valid = k.inputs(*shape)
    half, counts = torch.tensor(0.3), torch.zeros(classes, classes, dtype=torch.int64)
    # sectors of a tensor: logits, labels, probabilities, sums over cells (four numbers each), the matrix
    low, labels, full = n * classes * h * w / 8, n * height * width / 32, n * classes * height * width / 8
    sums, matrix = n * classes * (h - 1) * (w - 1) / 2, classes * classes / 4

    def check(fewest, call, *args):
        lib.cuda_on_cpu_sectors()  # from 0
        result = call(*args)
        for x in (result, *args):
            if isinstance(x, torch.Tensor) and x.shape == (n, height, width, classes):
                # a pixel's classes, 84 or 42 bytes anywhere in memory, lie in 3.5 or 2.25 sectors
                address, size = ctypes.c_void_p(x.data_ptr()), ctypes.c_long(x.nbytes)
                assert lib.cuda_on_cpu_request(address, size) < (3.6 if x.dtype == torch.float32 else 2.4), call
        # 40: sums of blocks, arguments of launches, sectors that a tensor's ends share with another tensor
        assert lib.cuda_on_cpu_sectors() <= 1.3 * fewest + 40, call
        return result

    ids, _ = check(2 * labels, op.label_map, target, None, None, half, classes, 255)
    check(3 * labels, op.label_map, target, confidence, valid, half, classes, 255)
    check(low + labels, op.cross_entropy, logits, ids, False)
    check(2 * low + labels + sums, op.cross_entropy, logits, ids, True)
    for dtype in (torch.float32, torch.bfloat16):
        stored = full * dtype.itemsize / 4
        probs = check(low + labels + stored, op.upsample_softmax, logits, valid, height, width, dtype)
        check(2 * low + sums + stored, op.upsample_softmax_backward, probs, logits, None)
    ids = check(low + labels, op.upsample_argmax, logits, height, width)
    check(low + 2 * labels, op.upsample_argmax, logits, height, width, torch.rand(classes), valid)
    check(low + labels + matrix, op.confusion_matrix, logits, target, 255, counts)
    check(2 * labels + matrix, op.confusion_matrix, ids, target, 255, counts)
