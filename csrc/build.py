"""Build the C++ kernels in this folder on first use and load them; later starts load the cached binary.

The cache is keyed by sources, compilers, their flags and the CPU's own flags (home folders are shared between machines,
and -march=native is not), not by torch: the kernels use torch's stable ABI only. One process builds while others wait;
a build that was killed leaves no `ready` file and is done again.
"""
import contextlib
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

HERE = Path(__file__).parent
note = ""  # of a build in this process, for the first line of a run
NAMES = {"cpu": "seg_ops", "cuda": "seg_ops_cuda"}
SOURCES = {"cpu": ("*.cpp", "*.h"), "cuda": ("*.cu", "*.cuh", "exponentials.h")}
INCLUDE = [Path(torch.__file__).parents[1] / "nvidia" / "cu13" / "include"]  # what pip brings, and a toolkit may lack
TARGET = "-DTORCH_TARGET_VERSION=0x020d000000000000"  # of the oldest torch, see requirements.txt
CUDA_FLAGS = ["-O3", "-std=c++17", "-DUSE_CUDA", TARGET]
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", TARGET,
         *os.environ.get("SEG_OPS_CFLAGS", "").split()]


def cpu():
    """What the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def cxx():
    """The C++ compiler, in one word or more."""
    return os.environ.get("CXX") or "c++"


def version(compiler):
    """What it says of itself, "" where it is not there."""
    return subprocess.run(f"{compiler} --version", shell=True, capture_output=True, text=True).stdout


def folder(device="cpu"):
    """Where the binary of a device for these sources, this machine and its compilers is, or will be."""
    flags = [*FLAGS, cpu()] if device == "cpu" else [*CUDA_FLAGS, *architectures()]
    place = cache_folder(NAMES[device], [*flags, platform.system()], sources(device))
    nvcc = shlex.quote(f"{cuda_home()}/bin/nvcc")
    versions = [version(compiler) for compiler in (cxx(), nvcc)[:1 if device == "cpu" else 2]]
    ready = next(place.parent.glob(f"{place.name}_*/ready"), None)
    if ready and "" in versions:
        return ready.parent  # where there is no compiler, any one's will do
    return cache_folder(place.name, [cxx(), *versions], [])


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
    import fcntl  # Windows has none
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
    global note
    autograd.register()
    place = folder(device)
    try:
        if (place / "ready").exists():
            wrong = fault(place, device)
            if not wrong:
                return
            note += f", the cached library does not load ({wrong})"
        build(place, device)
    except (OSError, ImportError) as e:
        raise RuntimeError(f"{place}: {str(e).splitlines()[0]}") from None


def fault(place, device):
    """Load the library in `place`; why that cannot be, or None."""
    library = place / f"{NAMES[device]}.so"
    try:
        if (place / "ready").read_text() != str(library.stat().st_size):
            return f"{library} was cut off"  # to load it would end the process
        torch.ops.load_library(library)
    except OSError as e:
        return str(e).splitlines()[0]


def build(place, device="cpu"):
    """Fill `place`, if no other process does so first, and load the library."""
    if not version(cxx()):
        raise RuntimeError(f"no C++ compiler: {cxx()}")
    if device == "cuda" and not cuda_home():
        raise RuntimeError('no CUDA compiler: pip install "cuda-toolkit[nvcc,cccl]"')
    with building(place) as empty:
        if not empty and not fault(place, device):
            return
        for file in {*place.iterdir()} - {place / "building"}:  # of a build that was killed, with torch's own lock
            file.unlink()
        if sys.stderr.isatty():
            print(f"building the kernels in {place} ...", file=sys.stderr)
        began = time.monotonic()
        try:
            make(place, device)
        except (RuntimeError, OSError, subprocess.SubprocessError) as e:
            errors = [line for line in str(e).splitlines() if "error" in line] or repr(e).splitlines()
            raise RuntimeError(f"the build in {place} failed: {errors[0]}") from None
        (place / "ready").write_text(str((place / f"{NAMES[device]}.so").stat().st_size))
        global note
        note += f", built in {time.monotonic() - began:.0f} s"


def make(place, device):
    """By torch, which reads the environment; that, and torch's settings, are as before afterwards."""
    script = place / "c++"  # torch takes $CXX for one word
    script.write_text(f'#!/bin/sh\nexec {cxx()} "$@"\n')
    script.chmod(0o755)
    # ninja is beside python in an environment that was not activated
    env = {"CXX": str(script), "PATH": os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])}
    if device == "cuda":
        env["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures())
        runtime = next(INCLUDE[0].parent.glob("lib/libcudart.so*"), None)  # pip's has a version in its name
        if runtime:
            (place / "libcudart.so").symlink_to(runtime)
    log = logging.getLogger("torch.utils.cpp_extension")  # would speak of CUDA, which is not needed
    with mock.patch.dict(os.environ, env), mock.patch.object(log, "disabled", True):
        from torch.utils import cpp_extension
        with mock.patch.object(cpp_extension, "CUDA_HOME", cuda_home()):  # torch may take a wrapper for the toolkit
            cpp_extension.load(NAMES[device], [str(f) for f in sorted(HERE.glob(SOURCES[device][0]))],
                               extra_cflags=FLAGS,
                               extra_cuda_cflags=[*CUDA_FLAGS, *(f"-isystem={p}" for p in INCLUDE)],  # after nvcc's own
                               extra_ldflags=[f"-L{place}", *(f for f in FLAGS if f.startswith("-fsanitize"))],
                               build_directory=str(place), is_python_module=False)
