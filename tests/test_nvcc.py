"""nvcc and ptxas on the CUDA kernels, without a GPU: warnings, spills, registers, C++20."""
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_cuda_on_cpu import CXX, FLAGS, HEADER, INCLUDE, made_once, run

from csrc import build, ops

pytestmark = pytest.mark.skipif(not build.cuda_home() or ops.in_use() != "kernel", reason="no nvcc, or no kernels")
ARCHITECTURES = ("80", "90", "100", "120")
REGISTERS = 96  # a multiprocessor has 65,536: five blocks of 128 threads with up to 102 each


def compile_kernels(architectures):
    """Return {file: (output of nvcc, PTX for each architecture)}."""
    nvcc, sources = build.cuda_home() / "bin/nvcc", sorted((ROOT / "csrc").glob("*.cu"))
    flags = [*build.CUDA_FLAGS, "-Xptxas", "-v", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror",
             *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures)]
    include = [*build.INCLUDE, Path(torch.__file__).parent / "include"]

    def make(folder):
        def compile_one(source):
            with tempfile.TemporaryDirectory() as kept:
                said = run(nvcc, *flags, *(word for path in include for word in ("-isystem", path)), "--keep",
                           "--keep-dir", kept, "-c", source, "-o", f"{kept}/{source.name}.o")
                for ptx in Path(kept).glob("*.ptx"):
                    shutil.copy(ptx, folder)
            (folder / f"{source.stem}.said").write_text(said)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, sources))
    versions = build.version(nvcc), build.version("g++")
    folder = made_once("nvcc", make, build.sources("cuda"), *flags, *versions)
    return {source.name: ((folder / f"{source.stem}.said").read_text(),
                          [ptx.read_text() for ptx in folder.glob(f"{source.stem}*.ptx")]) for source in sources}


def test_no_spills_and_few_registers(architectures=("90",)):  # all of them: tests/stress/kernels.py
    for name, (said, _) in compile_kernels(architectures).items():
        assert "warning" not in said
        reports = re.findall(r"entry function '(\w+)' for 'sm_(\d+)'\n(.*\n.*\n.*registers.*)", said)
        assert {architecture for _, architecture, _ in reports} == {*architectures}, name
        for *kernel, report in reports:
            assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report, (kernel, report)
            assert "smem" not in report, report  # shared memory is dynamic
            assert int(re.search(r"Used (\d+) registers", report)[1]) <= REGISTERS, (kernel, report)


@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda file: file.name)
def test_c_plus_plus_20(source):
    """With math.h, as in nvcc, std::lerp and others of C++20 are global names that ours must not collide with."""
    run(*CXX, *FLAGS, "-std=c++20", f"-isystem{INCLUDE}", "-include", "math.h", "-include", HEADER, "-fsyntax-only",
        source)
