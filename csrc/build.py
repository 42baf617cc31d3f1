"""Build the C++ kernels in this folder on first use and load them; later starts load the cached binary.

The cache is keyed by sources, compiler flags and the CPU's own flags (home folders are shared between machines, and
-march=native is not), not by torch: the kernels use torch's stable ABI only. One process builds while others wait; a build
that was killed leaves no `ready` file and is done again.
"""
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
note = ""  # of a build in this process, for the first line of a run
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020e000000000000",
         *os.environ.get("SEG_OPS_CFLAGS", "").split()]


def cpu():
    """What the compiler's -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()


def folder():
    """Where the binary for these sources and this CPU is, or will be."""
    key = hashlib.sha256("\n".join([*FLAGS, cpu(), platform.system()]).encode())
    for file in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        key.update(file.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"seg_ops_{key.hexdigest()[:16]}"


def load():
    """Make torch.ops.seg_ops.* callable. Errors: RuntimeError with one line that says why it cannot."""
    place = folder()
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "ready").exists():
            build(place)
        torch.ops.load_library(place / "seg_ops.so")
    except OSError as e:
        raise RuntimeError(f"{place}: {str(e).splitlines()[0]}") from None


def build(place):
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        raise RuntimeError(f"no C++ compiler: {compiler}")
    with open(place / "building", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given up by the system when its process dies
        if (place / "ready").exists():
            return
        (place / "lock").unlink(missing_ok=True)  # torch's own lock, which a killed build leaves behind
        if sys.stderr.isatty():
            print(f"building the kernels in {place} ...", file=sys.stderr)
        began = time.monotonic()
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it would speak of CUDA, which is not needed
        from torch.utils import cpp_extension
        # ninja is beside python in an environment that was not activated
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        try:
            cpp_extension.load("seg_ops", [str(f) for f in sorted(HERE.glob("*.cpp"))], extra_cflags=FLAGS,
                               extra_ldflags=[f for f in FLAGS if f.startswith("-fsanitize")],
                               build_directory=str(place), is_python_module=False)
        except RuntimeError as e:
            errors = [line for line in str(e).splitlines() if "error" in line] or str(e).splitlines()
            raise RuntimeError(f"the build in {place} failed: {errors[0]}") from None
        (place / "ready").touch()
        global note
        note = f", built in {time.monotonic() - began:.0f} s"
