"""Build the kernels in this folder on first use with torch.utils.cpp_extension; later starts load the cached library.

The cache is keyed by sources, compilers, their flags and the CPU (home folders are shared between machines, and
-march=native is not), not by torch: the kernels use torch's stable ABI only. One process builds while others wait; a
killed build leaves no `ready` file and is repeated.
"""
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from csrc import autograd

HERE, PIP_CUDA = Path(__file__).parent, Path(torch.__file__).parents[1] / "nvidia" / "cu13"
note = ""  # what load() built, for the first line of a run
NAMES = {"cpu": "seg_ops", "cuda": "seg_ops_cuda"}
SOURCES = {"cpu": ("*.cpp", "*.h"), "cuda": ("*.cu", "*.cuh", "exponentials.h")}
INCLUDE = [PIP_CUDA / "include"]  # headers from pip, which a toolkit may lack
TARGET = "-DTORCH_TARGET_VERSION=0x020d000000000000"  # the oldest supported torch, see requirements.txt
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", TARGET]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", TARGET, *os.environ.get("SEG_OPS_CFLAGS", "").split()]


def cpu():
    """Return the model and features of the CPU, on which -march=native depends."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return platform.machine() + "".join(sorted({x for x in lines if x.startswith(("flags", "model name", "Features"))}))


def cxx():
    return os.environ.get("CXX") or "c++"  # one word or more


def version(compiler):
    return subprocess.run(f"{compiler} --version", shell=True, capture_output=True, text=True).stdout


def folder(device="cpu"):
    """Return the cache folder of a device's library; without a compiler, any other compiler's library will do."""
    flags = [*FLAGS, cpu()] if device == "cpu" else [*CUDA_FLAGS, *architectures()]
    place = cache_folder(NAMES[device], [*flags, platform.system()], sources(device))
    compilers = [cxx(), shlex.quote(f"{cuda_home()}/bin/nvcc")][:1 if device == "cpu" else 2]
    versions = [version(compiler) for compiler in compilers]
    ready = next(place.parent.glob(f"{place.name}_*/ready"), None)
    return ready.parent if ready and "" in versions else cache_folder(place.name, [cxx(), *versions], [])


def sources(device):
    """Return all files that a device's library is made from."""
    return [file for pattern in SOURCES[device] for file in sorted(HERE.glob(pattern))]


def cache_folder(name, words, files):
    """Return the folder in the cache for what is made from these files with these words (flags, versions)."""
    key = hashlib.sha256("\n".join(words).encode() + b"".join(file.read_bytes() for file in files))
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"{name}_{key.hexdigest()[:16]}"


def cuda_home():
    """Return the CUDA toolkit: $CUDA_HOME, pip's, the usual place, or that of nvcc; None if there is none."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), PIP_CUDA, "/usr/local/cuda", nvcc and Path(nvcc).resolve().parents[1]]
    return next((Path(place) for place in places if place and (Path(place) / "bin" / "nvcc").exists()), None)


def architectures():
    """Return compute capabilities such as "9.0": those of TORCH_CUDA_ARCH_LIST, or of the GPUs that are there."""
    found = {"{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())}
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split() or sorted(found)


def load(device="cpu"):
    """Make torch.ops.seg_ops.* callable on "cpu" or "cuda"; a RuntimeError of one line says why it cannot."""
    autograd.register()
    place = folder(device)
    try:
        if not load_cached(place, device):
            build(place, device)
    except (OSError, ImportError) as e:
        raise RuntimeError(f"{place}: {str(e).splitlines()[0]}") from None


def load_cached(place, device):
    """Load the library in `place` and return whether that worked; one that does not load is noted."""
    global note
    library, ready = place / f"{NAMES[device]}.so", place / "ready"
    try:
        if ready.exists() and ready.read_text() != str(library.stat().st_size):
            raise OSError(f"{library} was cut off")  # loading it would end the process
        if ready.exists():
            torch.ops.load_library(library)
        return ready.exists()
    except OSError as e:
        ready.unlink()
        note += f", the cached library does not load ({str(e).splitlines()[0]})"
        return False


def build(place, device="cpu"):
    """Compile and load the library in `place`, unless another process did."""
    global note
    if not version(cxx()):
        raise RuntimeError(f"no C++ compiler: {cxx()}")
    if device == "cuda" and not cuda_home():
        raise RuntimeError('no CUDA compiler: pip install "cuda-toolkit[nvcc,cccl]"')
    import fcntl  # Windows has none
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if this process dies
        if load_cached(place, device):
            return
        for file in {*place.iterdir()} - {place / "building"}:  # of a killed build, with torch's own lock
            file.unlink()
        if sys.stderr.isatty():
            print(f"building the kernels in {place} ...", file=sys.stderr)
        start = time.monotonic()
        try:
            run_cpp_extension(place, device)
        except (RuntimeError, OSError, subprocess.SubprocessError) as e:
            errors = [line for line in str(e).splitlines() if "error" in line] or repr(e).splitlines()
            raise RuntimeError(f"the build in {place} failed: {errors[0]}") from None
        (place / "ready").write_text(str((place / f"{NAMES[device]}.so").stat().st_size))
        note += f", built in {time.monotonic() - start:.0f} s"


def run_cpp_extension(place, device):
    """Call cpp_extension.load; it reads the environment, which is restored afterwards."""
    script = place / "c++"  # torch takes $CXX for one word
    script.write_text(f'#!/bin/sh\nexec {cxx()} "$@"\n')
    script.chmod(0o755)
    # ninja is beside python in an environment that was not activated
    env = {"CXX": str(script), "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])}
    if device == "cuda":
        env["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures())
        if runtime := next(PIP_CUDA.glob("lib/libcudart.so*"), None):  # pip's has a version in its name
            (place / "libcudart.so").symlink_to(runtime)
    log = logging.getLogger("torch.utils.cpp_extension")  # warns about CUDA, which the CPU does not need
    with mock.patch.dict(os.environ, env), mock.patch.object(log, "disabled", True):
        from torch.utils import cpp_extension
        with mock.patch.object(cpp_extension, "CUDA_HOME", cuda_home()):  # torch may take a wrapper for the toolkit
            cpp_extension.load(
                NAMES[device], [str(f) for f in sorted(HERE.glob(SOURCES[device][0]))], extra_cflags=FLAGS,
                extra_cuda_cflags=[*CUDA_FLAGS, *(f"-isystem={p}" for p in INCLUDE)],  # after nvcc's own
                extra_ldflags=[f"-L{place}", *(f for f in FLAGS if f.startswith("-fsanitize"))],
                build_directory=str(place), is_python_module=False)
