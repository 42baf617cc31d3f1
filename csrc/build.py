"""Build the kernels in this folder with torch.utils.cpp_extension on first use; later runs load the cached library.

The cache key has sources, compilers, flags, C library and CPU, but not torch: the kernels use only its stable ABI.
"""
import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock

from csrc import autograd

HERE = Path(__file__).parent
SOURCES = {"cpu": ("*.cpp", "*.h"), "cuda": ("*.cu", "*.cuh", "exponentials.h")}
CUDA_12 = (torch.version.cuda or "").startswith("12")  # its packages have a folder each, later ones share one
PIP_CUDA = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("cuda_*" if CUDA_12 else "cu1?"))
INCLUDE = [place / "include" for place in PIP_CUDA]  # headers from pip, which a toolkit may lack
OLDEST_TORCH = 2, 10  # whose stable ABI the kernels use
TARGET = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", TARGET]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", TARGET, *os.environ.get("SEG_OPS_CFLAGS", "").split()]
SELFCHECK, SELFCHECK_SECONDS = [sys.executable, "-m", "csrc.selfcheck"], 120
note = ""  # how long builds and self-checks of this process took, for the first line of a run


def load(device="cpu", check=True):
    """Load the kernels for "cpu" or "cuda", built first if necessary, on a GPU only if they pass csrc/selfcheck.py.

    Raises RuntimeError: one line with the reason.
    """
    if torch.__version__ < OLDEST_TORCH:
        raise RuntimeError("the kernels need torch {}.{} or newer, ".format(*OLDEST_TORCH) + f"not {torch.__version__}")
    autograd.register()
    library = folder(device) / f"seg_ops_{device}.so"
    try:
        if not is_complete(library):
            build(library, device)
        if device == "cuda" and check and torch.cuda.is_available():
            check_on_gpu(library.parent)
        torch.ops.load_library(library)
    except (OSError, NotImplementedError) as e:  # no number: a damaged library; otherwise a folder without permission
        hint = "; set TORCH_EXTENSIONS_DIR to another folder" if getattr(e, "errno", "no locks") else ""
        raise RuntimeError(f"{library.parent}: {str(e).splitlines()[0]}{hint}") from None


def is_complete(library):
    """Return whether the build finished and the library still has its size; loading a truncated library crashes."""
    ready = library.parent / "ready"
    return ready.exists() and library.exists() and ready.read_text() == str(library.stat().st_size)


def build(library, device="cpu"):
    """Build a library, or wait if another process is building it."""
    global note
    if not version(cxx()):
        raise RuntimeError(f"no C++ compiler: {cxx()}")
    if device == "cuda" and not cuda_home():
        pip = f'pip install "cuda-toolkit[nvcc,cccl]=={torch.version.cuda}.*"'
        hint = f"install the toolkit of CUDA {torch.version.cuda}; pip has no nvcc of CUDA 12" if CUDA_12 else pip
        raise RuntimeError(f"no CUDA compiler: {hint}")
    library.parent.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{library.parent}.lock"):  # the system releases it if this process is killed
        if not is_complete(library):
            if sys.stderr.isatty():
                print(f"building the kernels in {library.parent} ...", file=sys.stderr)
            start = time.monotonic()
            run_cpp_extension(library.parent, device)
            (library.parent / "ready").write_text(str(library.stat().st_size))
            note += f", built in {time.monotonic() - start:.0f} s"


def check_on_gpu(place):
    """Run csrc/selfcheck.py for the library in `place` on the current GPU, unless it has passed there before."""
    global note
    gpu, name, driver = torch.cuda.current_device(), torch.cuda.get_device_name(), Path("/proc/driver/nvidia/version")
    facts = [name, *architectures(), driver.read_text() if driver.exists() else "", torch.__version__]
    proof = place / cache_folder("proved", facts, []).name
    if proof.exists():
        return
    with FileLock(f"{place}.lock"):
        if proof.exists():  # of another process, for which this one waited
            return
        start = time.monotonic()
        if error := run_selfcheck(gpu, place.parent):
            raise RuntimeError(f"self-check on {name}: {error}; python -m csrc.selfcheck cuda:{gpu} repeats it")
        proof.touch()
        note += f", self-check passed in {time.monotonic() - start:.0f} s"


def run_selfcheck(gpu, cache):
    """Return how csrc/selfcheck.py failed, in one line, or nothing. A child process, because a bad kernel ends CUDA."""
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    env["TORCH_EXTENSIONS_DIR"] = str(cache)
    try:
        done = subprocess.run([*SELFCHECK, f"cuda:{gpu}"], cwd=HERE.parent, env=env, capture_output=True, text=True,
                              errors="replace", timeout=SELFCHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not finished after {SELFCHECK_SECONDS} s"
    if done.returncode < 0:
        return f"killed by {signal.Signals(-done.returncode).name}"
    return done.returncode and (done.stderr.strip().rpartition("\n")[2] or f"exit status {done.returncode}")[:200]


def run_cpp_extension(place, device):
    """Call cpp_extension.load in a child process, which has environment variables of its own."""
    shutil.rmtree(place, ignore_errors=True)  # what a killed build left
    place.mkdir(exist_ok=True)
    if runtimes := [file for path in PIP_CUDA for file in path.glob("lib/libcudart.so*")]:  # with a version in its name
        (place / "libcudart.so").symlink_to(runtimes[0])
    script = place / "c++"  # torch expects $CXX to be one word
    script.write_text(f'#!/bin/sh\nexec {cxx()} "$@"\n')
    script.chmod(0o755)
    path = f"{os.environ.get('PATH', '')}:{Path(sys.executable).parent}"  # ninja is beside python
    env = os.environ | {"CXX": str(script), "CC": str(script), "CUDA_HOME": str(cuda_home() or ""), "PATH": path}
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures()] if device == "cuda" else []
    arguments = dict(
        name=f"seg_ops_{device}", sources=[str(file) for file in sorted(HERE.glob(SOURCES[device][0]))],
        extra_cflags=FLAGS, extra_ldflags=[f"-L{place}"], build_directory=str(place), is_python_module=False,
        extra_cuda_cflags=[*CUDA_FLAGS, *gencode, *(f"-isystem={path}" for path in INCLUDE)])  # after the toolkit's own
    code = f"from torch.utils.cpp_extension import load\nload(**{arguments})"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True,
                          errors="replace")
    if done.returncode:
        lines = re.findall(".*(?:error|fatal) *:.*", done.stderr) or [done.stderr.strip().rpartition("\n")[2]]
        raise RuntimeError(f"the build in {place} failed (exit status {done.returncode}): {lines[0][:200]}")


def folder(device="cpu"):
    """Return the cache folder of a device's library; without a compiler, one built by any compiler."""
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        cpu = re.findall("^(?:model name|flags|Features).*", info.read_text(), re.M) if info.exists() else []
        words, versions = [*FLAGS, platform.machine(), *sorted(set(cpu))], [version(cxx())]
    else:
        words = [*CUDA_FLAGS, *architectures()]
        versions = [version(cxx()), version(f"'{cuda_home()}/bin/nvcc'")]
    place = cache_folder(f"seg_ops_{device}", [*words, *platform.libc_ver()], sources(device))
    ready = next(place.parent.glob(f"{place.name}_*/ready"), None)
    return ready.parent if ready and "" in versions else cache_folder(place.name, [cxx(), *versions], [])


def architectures():
    """Return that of the current GPU, as in ["90"]; without a GPU those in TORCH_CUDA_ARCH_LIST, as in 9.0;12.0a."""
    if torch.cuda.is_available():
        return ["{}{}".format(*torch.cuda.get_device_capability())]
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    found = {major + minor for major, minor in re.findall(r"(\d+)\.?(\d[af]?)\b", listed)}
    if not found:
        raise RuntimeError(f"no GPU, and TORCH_CUDA_ARCH_LIST={listed[:50]!r} has no architecture such as 9.0")
    return sorted(found)


def cache_folder(name, words, files):
    """Return the cache folder of what is built from `files` with these `words` (flags, versions)."""
    key = hashlib.sha256("\n".join(words).encode() + b"".join(file.read_bytes() for file in files))
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root).absolute() / f"{name}_{key.hexdigest()[:16]}"


def sources(device):
    """Return all files that a device's library is made from, headers included."""
    return [file for pattern in SOURCES[device] for file in sorted(HERE.glob(pattern))]


def cxx():
    return os.environ.get("CXX") or "c++"  # one word or more, such as "ccache c++"


def version(compiler):
    return subprocess.run(f"{compiler} --version", shell=True, capture_output=True, text=True).stdout


def cuda_home():
    """Return the CUDA toolkit: $CUDA_HOME, pip's, the usual place, or that of nvcc; None if there is none."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), *PIP_CUDA, "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    return next((Path(place) for place in places if place and (Path(place) / "bin" / "nvcc").exists()), None)
