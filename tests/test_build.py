"""The build of the kernels: killed, two at once, other compilers, failing; the cache, damaged, and its key."""
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

from common.console import InputError

import pytest
import torch
from conftest import ROOT

from csrc import build, ops

pytestmark = pytest.mark.skipif(not ops.in_use().startswith("kernel"), reason="no kernels can be built here")
NVCC = pytest.mark.skipif(not build.cuda_home(), reason="no nvcc")


@pytest.fixture
def start(tmp_path):
    """start(**environment) -> a process that loads csrc, whose only source says so; it compiles for a second."""
    tree, wrapper = tmp_path / "tree", tmp_path / "ccache"
    shutil.copytree(ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("*.cpp", "*.cu*", "*.md", "*.pyc"))
    (tree / "csrc/kernel.cpp").write_text('#include <unistd.h>\nstatic int loaded = write(1, "loaded\\n", 7);')
    (tree / "common").mkdir()
    for name in ("__init__.py", "console.py"):  # all that csrc imports from outside
        shutil.copy(ROOT / "common" / name, tree / "common")
    wrapper.write_text('#!/bin/sh\ncase "$*" in *kernel.cpp*) sleep 1;; esac\nexec "$@"\n')
    wrapper.chmod(0o755)

    def start_process(**env):
        env = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "SEG_OPS": "auto", "CXX": f"{wrapper} c++"} | env
        command = sys.executable, "-c", "from csrc import ops; print(ops.describe())"
        return subprocess.Popen(command, cwd=tree, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env=os.environ | env)
    return start_process


def test_killed_build_then_two_at_once_then_a_damaged_cache(start, tmp_path):
    """The compiler's command has two words; a complete library needs none; a truncated one is built again."""
    first = start()
    while not list(tmp_path.glob("cache/*/*.ninja")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not list(tmp_path.glob("cache/*/ready"))
    both = [start(), start()]
    done = sorted(process.communicate() for process in both)
    assert done[0] == ("loaded\nkernel\n", "")
    assert re.fullmatch(r"loaded\nkernel, built in \d+ s\n", done[1][0]) and not done[1][1], done
    assert start(CXX="no-such-compiler").communicate() == ("loaded\nkernel\n", "")

    library, = tmp_path.glob("cache/*/seg_ops_cpu.so")
    content = library.read_bytes()
    library.write_bytes(content[:len(content) // 2])
    out, err = start().communicate()
    assert out.startswith("loaded\nkernel, built in") and not err, (out, err)
    library.write_bytes(b"for another system")
    (library.parent / "ready").write_text(str(library.stat().st_size))
    out, err = start().communicate()
    assert re.fullmatch(rf"reference \(.*{library.parent}.*\)\n", out) and not err, (out, err)


def test_one_line_says_why_a_build_failed(start):
    out, err = start(SEG_OPS_CFLAGS="--no-such-flag").communicate()
    assert re.fullmatch(r"reference \(.*--no-such-flag.*\)\n", out) and not err, (out, err)


def test_a_cache_folder_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=f"{tmp_path / 'file'}.*set TORCH_EXTENSIONS_DIR") as error:
        build.load()
    assert "\n" not in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError("no flock")])
def test_a_file_system_without_locks(monkeypatch, tmp_path, error):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(build.FileLock, "acquire", mock.Mock(side_effect=error))
    with pytest.raises(RuntimeError, match="set TORCH_EXTENSIONS_DIR to another folder$"):
        build.load()


@pytest.fixture
def cuda(tmp_path, monkeypatch):
    """cuda(TORCH_CUDA_ARCH_LIST, source) -> (ops.in_use("cuda"), text of build.ninja), without a GPU."""
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(build, "HERE", tmp_path / "csrc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "_choose", ops._choose.__wrapped__)  # without its cache
    monkeypatch.setattr(ops, "SEG_OPS", "auto")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))

    def in_use(listed, source="__global__ void kernel() {}"):
        (tmp_path / "csrc/kernel.cu").write_text(source)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        line = ops.in_use("cuda")
        assert len(line) < 400 and "\n" not in line
        return line, "".join(file.read_text() for file in tmp_path.glob("cache/*/build.ninja"))
    return in_use


@pytest.mark.quick
def test_torch_without_the_stable_abi(train, capsys, monkeypatch):
    """The references run, and the first line says why."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1+cu128"))
    monkeypatch.setattr(ops, "_choose", ops._choose.__wrapped__)  # without its cache
    monkeypatch.setattr(ops, "SEG_OPS", "auto")
    train("train_base", "--iters", 1)
    line, *_, last = capsys.readouterr().out.splitlines()
    assert "ops reference (the kernels need torch 2.10 or newer, not 2.9.1+cu128)" in line and "mIoU" in last
    monkeypatch.setattr(ops, "SEG_OPS", "kernel")
    with pytest.raises(InputError, match=r"^SEG_OPS=kernel: the kernels need torch 2\.10 or newer"):
        ops.in_use()


@NVCC
def test_cuda_build_has_its_architectures_and_compiler(cuda, tmp_path, monkeypatch):
    """Also if a path contains "arch", on which torch drops its own flags; nvcc calls the compiler of $CXX."""
    monkeypatch.setattr(build, "INCLUDE", [*build.INCLUDE, tmp_path / "research"])
    (tmp_path / "wrapper").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec c++ "$@"\n')
    (tmp_path / "wrapper").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "wrapper"))
    line, ninja = cuda("sm_90 8.8+PTX;")
    assert line == "kernel" and {*re.findall(r",code=(\w+)", ninja)} == {"sm_88", "sm_90"}
    assert re.search(r"kernel\.cu ", (tmp_path / "calls").read_text())


@NVCC
@pytest.mark.parametrize("listed, source, reason", [
    ("1.0", "", "nvcc fatal.*compute_10"), ("9.0", "#error " + "x" * 5000, "error.*xxx"), ("", "", "no GPU"),
    ("native", "", "no GPU.*'native'"), ("a\nb" * 500, "", "no GPU.*TORCH_CUDA_ARCH_LIST")])
def test_one_line_says_why_a_cuda_build_failed(cuda, listed, source, reason):
    assert re.fullmatch(rf"reference \(.*{reason}.*\)", cuda(listed, source)[0])


@pytest.mark.quick
def test_a_cuda_build_is_for_the_current_gpu(monkeypatch):
    """Not for others of the machine, nor for TORCH_CUDA_ARCH_LIST, which containers set."""
    gpus, folders = [(6, 1), (9, 0)], set()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=current: gpus[i])
        for listed in ("8.8", "native", "7.0 6.1"):
            monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
            folders.add(build.folder("cuda"))
        assert len(folders) == current + 1 and build.architectures() == [["61"], ["90"]][current]


@pytest.mark.quick
def test_cache_key_has_sources_compilers_flags_and_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "HERE", shutil.copytree(build.HERE, tmp_path / "csrc"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    version, seen = build.version, {build.folder(), build.folder("cuda")}
    changes = [(build.platform, "machine", lambda: "another"), (build.platform, "libc_ver", lambda: "another"),
               (build, "FLAGS", [*build.FLAGS, "-g"]),
               *((build, "version", lambda name, changed=changed: "another" if changed in name else version(name))
                 for changed in (build.cxx(), "nvcc"))]
    for change in changes:
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            seen |= {build.folder(), build.folder("cuda")}
    assert len(seen) == 2 + 1 + 2 + 1 + 2 + 1  # C library and C++ compiler belong to both keys
    for name in ("vec.h", "confusion_matrix.cpp"):
        with open(tmp_path / "csrc" / name, "a") as file:
            file.write("\n")
        assert build.folder() not in seen
        seen.add(build.folder())


@pytest.mark.quick
@pytest.mark.parametrize("device", build.SOURCES)
def test_cache_key_has_every_header(device):
    files = {file.name: file for file in build.sources(device)}
    included = {name for file in files.values() for name in re.findall(r'#include "(.*?)"', file.read_text())}
    assert included and included <= set(files)
