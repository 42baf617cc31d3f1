"""The build of the kernels: killed, twice at once, with other compilers, failing; the cache, damaged, and its key."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from test_cuda_on_cpu import INCLUDE, run

from csrc import build, ops

pytestmark = pytest.mark.skipif(not ops.in_use().startswith("kernel"), reason="no kernels can be built here")
LOAD = ("import torch; from csrc import build, ops; print(ops.in_use() + build.note);"
        "ids = torch.zeros(1, 3, 3, dtype=torch.uint8); print(ops.confusion_matrix(ids, ids, 2)[0, 0])")
COMPILERS = [name for name in ("g++-10", "g++-11", "clang++-14", "clang++") if shutil.which(name)]


@pytest.fixture
def start(tmp_path):
    """start(code before, **environment) -> a process that loads csrc with one operator alone, which is built faster."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("*.cu*", "*.md", "__pycache__"))
    (tree / "common").mkdir()
    for name in ("__init__.py", "console.py"):  # all that csrc imports from outside
        shutil.copy(ROOT / "common" / name, tree / "common")
    for file in (tree / "csrc").glob("*.cpp"):
        if file.name != "confusion_matrix.cpp":
            file.unlink()

    def run(before="", **env):
        env = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "SEG_OPS": "auto"} | env
        return subprocess.Popen([sys.executable, "-c", before + LOAD], cwd=tree, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=env)
    return run


def test_killed_build_then_two_at_once_then_the_cache(start, tmp_path):
    first = start()
    while not list(tmp_path.glob("cache/*/*.ninja")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("cache/*/ready"))
    both = [start(), start()]
    done = [p.communicate() for p in both]
    assert all(out.startswith("kernel") and out.endswith("\ntensor(9)\n") and not err for out, err in done), done
    assert sum(", built in" in out for out, _ in done) == 1
    assert start(CXX="no-such-compiler").communicate() == ("kernel\ntensor(9)\n", "")  # the cache needs none


def test_a_compiler_of_two_words(start, tmp_path):
    (tmp_path / "ccache").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "ccache").chmod(0o755)
    out, err = start(CXX="ccache c++", PATH=f"{tmp_path}:{os.environ['PATH']}").communicate()
    assert out.startswith("kernel, built in") and not err
    out, err = start(CXX="ccache no-such-compiler", PATH=f"{tmp_path}:{os.environ['PATH']}").communicate()
    assert out.startswith("kernel\n") and not err


def test_a_truncated_library_is_built_again_and_one_for_another_system_refused(start, tmp_path):
    start().communicate()
    library, = tmp_path.glob("cache/*/seg_ops_cpu.so")
    whole = library.read_bytes()
    library.write_bytes(whole[:len(whole) // 2])
    out, err = start(CXX="no-such-compiler").communicate()
    assert out.startswith("reference (no C++ compiler: no-such-compiler)") and not err
    out, err = start().communicate()
    assert re.fullmatch(r"kernel, built in \d+ s\ntensor\(9\)\n", out) and not err, (out, err)
    library.write_bytes(b"for another system")
    (library.parent / "ready").write_text(str(library.stat().st_size))
    out, err = start().communicate()
    assert re.fullmatch(rf"reference \({library.parent}: .*\)\ntensor\(9\)\n", out) and not err, (out, err)


def test_one_line_says_why_a_build_failed(start):
    out, err = start(SEG_OPS_CFLAGS="--no-such-flag").communicate()
    assert re.fullmatch(r"reference \(.* error: .*--no-such-flag.*\)\ntensor\(9\)\n", out) and not err, (out, err)


def test_a_folder_that_is_a_file(tmp_path, monkeypatch):
    """One line says so, and the references run."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(ops, "SEG_OPS", "auto")
    monkeypatch.setattr(ops, "_choose", ops._choose.__wrapped__)  # without its cache
    said = ops.in_use()
    assert said.startswith("reference (") and str(tmp_path / "file") in said and "\n" not in said
    ids = torch.zeros(1, 3, 3, dtype=torch.uint8)
    assert ops.confusion_matrix(ids, ids, 2)[0, 0] == 9


@pytest.mark.quick
def test_cuda_needs_no_kernels_of_the_cpu(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(build, "folder", lambda device: tmp_path / device)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/seg_ops_cuda.so").touch()
    (tmp_path / "cuda/ready").write_text("0")
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.load("cuda")
    assert loaded == [tmp_path / "cuda/seg_ops_cuda.so"]


@pytest.mark.quick
def test_cache_knows_sources_compilers_flags_and_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "HERE", shutil.copytree(build.HERE, tmp_path / "csrc"))
    seen, version = {build.folder()}, build.version
    for name in ("machine", "libc_ver"):  # of the CPU and the C library
        with monkeypatch.context() as patch:
            patch.setattr(build.platform, name, lambda: "another")
            seen.add(build.folder())
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
        seen.add(build.folder())
    with monkeypatch.context() as patch:
        seen.add(build.folder("cuda"))
        for compiler in (build.cxx(), "nvcc"):
            patch.setattr(build, "version", lambda name: "another" if compiler in name else version(name))
            seen |= {build.folder(), build.folder("cuda")}
    for name in ("vec.h", "confusion_matrix.cpp"):
        with open(tmp_path / "csrc" / name, "a") as file:
            file.write("\n")
        seen.add(build.folder())
    assert len(seen) == 10


@pytest.mark.quick
@pytest.mark.parametrize("device", build.SOURCES)
def test_cache_knows_every_header(device):
    """What a source includes is part of the key: else an edit there would not build."""
    files = {file.name: file for file in build.sources(device)}
    included = {name for file in files.values() for name in re.findall(r'#include "(.*?)"', file.read_text())}
    assert included and included <= set(files)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_compilers_understand(compiler):
    run(compiler, *build.FLAGS, f"-isystem{INCLUDE}", "-fsyntax-only", ROOT / "csrc/confusion_matrix.cpp")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_compilers_compile(compiler, tmp_path):
    """For this machine's vectors and for the shortest ones."""
    for flags in (build.FLAGS, [flag for flag in build.FLAGS if flag != "-march=native"]):
        for file in sorted((ROOT / "csrc").glob("*.cpp")):
            run(compiler, *flags, "-w", "-fPIC", f"-isystem{INCLUDE}", "-c", file, "-o", tmp_path / "a.o")
