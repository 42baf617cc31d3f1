"""What takes minutes of the C++ and CUDA kernels: all types and more schedules, sanitizers, builds, the benchmark.

    SEG_OPS=kernel python -m pytest tests/stress/kernels.py
"""
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from common.console import InputError

import pytest
import test_cuda
import test_cuda_on_cpu as t
import test_kernels as k
import test_nvcc
import torch
from conftest import ROOT
from test_cuda_on_cpu import CXX, HEADER, HEADERS, INCLUDE, SHAPES, TESTS, VERSION, made_once, run

from csrc import bench, build, ops

built = t.built  # a fixture
NVCC = pytest.mark.skipif(not build.cuda_home(), reason="no nvcc")
COMPILERS = [name for name in ("g++-10", "g++-11", "clang++-14", "clang++") if shutil.which(name)]


@pytest.fixture
def kernels(built, monkeypatch):
    """The CUDA kernels on the CPU, each call under 20 schedules."""
    t.use(monkeypatch, t.Schedules(*built, 20))


@pytest.mark.parametrize("check", k.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(kernels, shape, dtype, check):
    k.test_shapes(shape, dtype, check)


@pytest.mark.parametrize("test, args", TESTS)
def test_kernels(kernels, test, args):
    test(*args)


def test_more_images_than_a_grid_has_in_z(built):
    test_cuda.test_more_images_than_a_grid_has_in_z(built[0])


def test_address_and_undefined_behaviour_sanitizers():
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pytest, torch, test_cuda_on_cpu as t
seed = t.library("sanitized", *{flags!r}, link={flags[2:3]!r}).cuda_on_cpu_seed
t.use(pytest.MonkeyPatch(), t.Schedules(torch.ops.sanitized, seed, 1))
for shape in t.SHAPES[:9]:
    for check in t.k.CHECKS:
        t.k.test_shapes(shape, torch.float32, check)
for value in (6, 1 << 40):
    t.k.test_labels_out_of_range(value)
print("clean")
"""
    names = [run(*CXX, f"-print-file-name={name}").strip() for name in ("libasan.so", "libubsan.so")]
    env = {"LD_PRELOAD": " ".join(names), "ASAN_OPTIONS": "detect_leaks=0", "SEG_OPS": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.stdout == "clean\n", done.stderr[-2000:]


PLANTS = {0: "", 1: "race: thread", 2: "race: thread", 3: "wrong with seed", 4: "race: thread",
          5: "not all threads reach"}


@pytest.mark.parametrize("plant", PLANTS)
def test_the_header_finds_planted_bugs(plant):
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


@NVCC
def test_all_architectures():
    """Few registers, no local memory; a cell's four numbers in shared memory are one access of 16 bytes."""
    test_nvcc.test_no_spills_and_few_registers(test_nvcc.ARCHITECTURES)
    for name, (_, ptx) in test_nvcc.compile_kernels(test_nvcc.ARCHITECTURES).items():
        assert len(ptx) == len(test_nvcc.ARCHITECTURES)
        for text in ptx:
            assert not re.search(r"\.local|ld\.param\.\w+ .*depot", text), name
            assert "ld.shared.v4.f32" in text and "st.shared.v4.f32" in text, name


@NVCC
def test_build_without_a_gpu(tmp_path):
    """The CUDA kernels need no kernels for the CPU, which can be loaded afterwards."""
    code = """
import torch
from csrc import build, ops
build.FLAGS.append("-no-such-flag")
print(ops.in_use("cpu"))
print(ops.in_use("cuda") + build.note)
build.FLAGS.pop()
build.load("cpu")
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(has("seg_ops::upsample_argmax", device) for device in ("CPU", "CUDA")))
"""
    (tmp_path / build.folder().name).symlink_to(build.folder())
    env = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0", "SEG_OPS": "auto"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    print(done.stdout)
    said = re.fullmatch(r"reference \(.*\nkernel, built in (\d+) s\nTrue True\n", done.stdout)
    assert said and not done.stderr, done
    assert int(said[1]) < 60


@pytest.mark.parametrize("flags", [build.FLAGS, [flag for flag in build.FLAGS if flag != "-march=native"]],
                         ids=["this machine's vectors", "the shortest vectors"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_compilers(compiler, flags, tmp_path):
    for file in sorted((ROOT / "csrc").glob("*.cpp")):
        run(compiler, "-w", "-fPIC", f"-isystem{INCLUDE}", *flags, "-c", file, "-o", tmp_path / "a.o")


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark(*flags): run csrc/bench.py with one small size and no time."""
    monkeypatch.setattr(bench, "SIZES", [(1, 3, 9, 65)])
    return lambda *words: bench.main(bench.flags().parse_args([*words, "--seconds", "0"]))


def test_benchmark_prints_times_and_memory(benchmark, monkeypatch, capsys):
    """Memory is measured in a process of its own; probabilities take what they are stored in, and little more."""
    memory = bench.peak("upsample_softmax", (2, 21, 41, 321), "float32", "ours", "cpu")
    assert 0.5 < memory / (4 * 2 * 21 * 321 * 321) < 1.2  # 1.01; less if the machine takes pages back meanwhile
    monkeypatch.setattr(bench, "peak", lambda *_: memory)
    benchmark("--only", "py, labels (1, 3, 9")
    best, other = r"\*\*[\d.]+x\*\*", r"[\d.]+x"  # of eager and torch.compile
    times = rf"\| [\d.e-]+ \| {other} \| ({best} \| {other}|{other} \| {best}) \| [\d.]+% / \d+% \|\n"
    rows = [rf"\| cross entropy, labels \| \(1, 3, 9, 65\) \| {dtype} {times}" for dtype in ("float32", "bfloat16")]
    assert re.search("".join(rows) + "$", capsys.readouterr().out)


def test_benchmark_without_a_compiler(benchmark, monkeypatch, tmp_path, capsys):
    """torch.compile fails, which its column says; eager is the fastest of what is left."""
    monkeypatch.setattr(bench, "peak", lambda *_: 1)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    benchmark("--only", "py, labels (1, 3, 9, 65) float32")
    assert re.search(r"x \| \*\*[\d.]+x\*\* \| fails: InvalidCxxCompiler.* \| ", capsys.readouterr().out)


def test_benchmark_compares_results_first(benchmark, monkeypatch):
    monkeypatch.setattr(bench, "peak", lambda *_: 1)
    upsample_softmax = ops.upsample_softmax_reference
    monkeypatch.setattr(ops, "upsample_softmax_reference", lambda *args, **kw: 1.03 * upsample_softmax(*args, **kw))
    with pytest.raises(InputError, match="upsample_softmax"):
        benchmark("--only", "upsample_softmax")
