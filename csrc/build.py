"""Build the C++ kernels in this folder on first use and load them; later starts load the cached binary.

The cache is keyed by sources, compiler flags and the CPU's own flags (home folders are shared between machines, and
-march=native is not), not by torch: the kernels use torch's stable ABI only. One process builds while others wait; a
build that was killed leaves no `ready` file and is done again.
"""
import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch

from csrc import autograd

HERE = Path(__file__).parent
note = ""  # of a build in this process, for the first line of a run
NAMES = {"cpu": "seg_ops", "cuda": "seg_ops_cuda"}
SOURCES = {"cpu": ("*.cpp", "*.h"), "cuda": ("*.cu", "*.cuh", "exponentials.h")}
INCLUDE = [Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"]  # what pip brings, and a toolkit may lack
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020e000000000000"]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020e000000000000",
         *os.environ.get("SEG_OPS_CFLAGS", "").split()]


def cpu():
    """What the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def folder(device="cpu"):
    """Where the binary of a device for these sources and this machine is, or will be."""
    flags = [*FLAGS, cpu()] if device == "cpu" else [*CUDA_FLAGS, *architectures(), str(cuda_home())]
    return cache_folder(NAMES[device], [*flags, platform.system()], sources(device))


def sources(device):
    """All files that the binary of a device is made of."""
    return [file for pattern in SOURCES[device] for file in sorted(HERE.glob(pattern))]


def cache_folder(name, words, files):
    """The folder in the cache for what is made of these files with these words (flags, versions)."""
    key = hashlib.sha256("\n".join(words).encode())
    for file in files:
        key.update(file.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"{name}_{key.hexdigest()[:16]}"


@contextlib.contextmanager
def building(place):
    """Whether the caller has to fill the folder `place`, because none has; others wait until this block ends."""
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the system when its process dies
        empty = not (place / "ready").exists()
        yield empty
        if empty:
            (place / "ready").touch()


def cuda_home():
    """The CUDA toolkit: $CUDA_HOME, pip's, the usual place, or where nvcc is; None where there is none."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), Path(torch.__file__).parents[1] / "nvidia" / "cu13", "/usr/local/cuda",
              nvcc and Path(nvcc).resolve().parents[1]]
    return next((Path(place) for place in places if place and (Path(place) / "bin" / "nvcc").exists()), None)


def architectures():
    """As in "9.0": those of TORCH_CUDA_ARCH_LIST, or of the GPUs that are there."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    capabilities = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return given or sorted({"{}.{}".format(*c) for c in capabilities})


def load(device="cpu"):
    """Make torch.ops.seg_ops.* callable on "cpu" or "cuda". Errors: RuntimeError, one line that says why it cannot."""
    define()
    place = folder(device)
    try:
        if not (place / "ready").exists():
            build(place, device)
        torch.ops.load_library(place / f"{NAMES[device]}.so")
    except OSError as e:
        raise RuntimeError(f"{place}: {str(e).splitlines()[0]}") from None


define = cache(autograd.register)  # one namespace for both


def build(place, device="cpu"):
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise RuntimeError(f"no C++ compiler: {compiler}")
    if device == "cuda" and not cuda_home():
        raise RuntimeError('no CUDA compiler: pip install "cuda-toolkit[nvcc,cccl]==13.0.*"')
    with building(place) as empty:
        if not empty:
            return
        (place / "lock").unlink(missing_ok=True)  # torch's own lock, which a killed build leaves behind
        if sys.stderr.isatty():
            print(f"building the kernels in {place} ...", file=sys.stderr)
        began = time.monotonic()
        # torch would speak of CUDA, which is not needed
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from torch.utils import cpp_extension
        # ninja is beside python in an environment that was not activated
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        more = dict(extra_ldflags=[f for f in FLAGS if f.startswith("-fsanitize")])
        if device == "cuda":
            cpp_extension.CUDA_HOME = str(cuda_home())  # torch's guess takes a wrapper on the PATH for the toolkit
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures())
            more = dict(extra_cuda_cflags=CUDA_FLAGS, extra_include_paths=[str(p) for p in INCLUDE if p.exists()],
                        extra_ldflags=[f"-L{place}"])
            runtime = next(INCLUDE[0].parent.glob("lib/libcudart.so*"), None)  # pip's has a version in its name
            if runtime and not (place / "libcudart.so").exists():
                (place / "libcudart.so").symlink_to(runtime)
        try:
            units = [str(f) for f in sorted(HERE.glob(SOURCES[device][0]))]
            cpp_extension.load(NAMES[device], units, extra_cflags=FLAGS, build_directory=str(place),
                               is_python_module=False, **more)
        except (RuntimeError, OSError) as e:
            errors = [line for line in str(e).splitlines() if "error" in line] or str(e).splitlines()
            raise RuntimeError(f"the build in {place} failed: {errors[0]}") from None
        global note
        note += f", built in {time.monotonic() - began:.0f} s"
