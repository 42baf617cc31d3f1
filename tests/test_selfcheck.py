"""The self-check of the kernels: on the CPU's, with planted errors, and what it decides on a GPU that is pretended."""
import re
import sys
from concurrent.futures import ThreadPoolExecutor

from common.console import InputError

import pytest
import torch
from conftest import python
from torch.torch_version import TorchVersion

from csrc import build, ops, selfcheck

KERNELS = pytest.mark.skipif(not ops.in_use().startswith("kernel"), reason="no kernels can be built here")


@KERNELS
def test_the_kernels_of_the_cpu_pass():
    done = python("-m", "csrc.selfcheck", "cpu")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_one_line_and_status_1():
    done = python("-m", "csrc.selfcheck", "gpu")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "gpu" in done.stderr and not done.stdout


@KERNELS
@pytest.mark.quick
@pytest.mark.parametrize("name", ["pseudo_labels", "confusion_matrix", "upsample_softmax", "masked_cross_entropy"])
def test_bits_that_differ_are_found(monkeypatch, name):
    """In the second run; compiled errors: tests/stress/selfcheck.py."""
    shape, operator, calls = (2, 3, 3, 3, 9, 9), getattr(ops, name), []
    selfcheck.check_repeats("cpu", shape, times=1)

    def differs(*args, **kw):
        result, _ = operator(*args, **kw), calls.append(1)
        first = result[0] if isinstance(result, tuple) else result
        return result if len(calls) < 2 else first * 0
    monkeypatch.setattr(ops, name, differs)
    with pytest.raises(selfcheck.Mismatch, match="from run to run"):
        selfcheck.check_repeats("cpu", shape, times=1)


@KERNELS
@pytest.mark.quick
def test_an_image_that_differs_alone_is_found(monkeypatch):
    softmax = ops.upsample_softmax
    monkeypatch.setattr(ops, "upsample_softmax", lambda x, *args: softmax(x * (1 + len(x) % 2 * 0.01), *args))
    with pytest.raises(selfcheck.Mismatch, match="alone"):
        selfcheck.check_repeats("cpu", (2, 3, 3, 3, 9, 9), times=1)


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """gpu(code) -> ops.describe("cuda") in a new process with a built library and a GPU, whose self-check is `code`."""
    for name, value in dict(is_available=True, current_device=1, get_device_name="A GPU",
                            get_device_capability=(9, 0)).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(build, "folder", lambda device: tmp_path)
    monkeypatch.setattr(build, "is_complete", lambda library: True)
    monkeypatch.setattr(torch.ops, "load_library", lambda library: None)
    monkeypatch.setattr(ops, "_choose", ops._choose.__wrapped__)  # without its cache
    monkeypatch.setattr(ops, "SEG_OPS", "auto")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    def describe(code):
        start = f"import os, sys; print(sys.argv[1], 'RANK' in os.environ, file=open({str(tmp_path / 'calls')!r}, 'a'))"
        monkeypatch.setattr(build, "SELFCHECK", [sys.executable, "-c", f"{start}\n{code}"])
        monkeypatch.setattr(build, "note", "")
        return ops.describe("cuda")
    describe.count = lambda: (tmp_path / "calls").read_text().count("cuda:1 False\n")
    return describe


@pytest.mark.quick
def test_a_gpu_that_passed_is_not_checked_again(gpu, monkeypatch):
    """Another GPU, architecture or torch is; a failure is repeated."""
    assert gpu("sys.exit('a failure')").startswith("reference (") and gpu.count() == 1
    assert gpu("") == "kernel, self-check passed in 0 s" and gpu.count() == 2
    assert gpu("") == gpu("sys.exit(1)") == "kernel" and gpu.count() == 2
    for module, name, value in ((torch.cuda, "get_device_name", lambda: "Another GPU"),
                                (torch, "__version__", TorchVersion("3.0")),
                                (torch.cuda, "get_device_capability", lambda: (8, 0))):
        before = gpu.count()
        monkeypatch.setattr(module, name, value)
        assert gpu("").startswith("kernel, self-check") and gpu("") == "kernel" and gpu.count() == before + 1


@pytest.mark.quick
def test_ranks_wait_for_one_check(gpu, tmp_path):
    assert gpu("sys.exit(1)").startswith("reference") and gpu.count() == 1
    build.SELFCHECK[-1] = build.SELFCHECK[-1].replace("sys.exit(1)", "import time; time.sleep(1)")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build.check_on_gpu, [tmp_path] * 2))
    assert gpu.count() == 2


@pytest.mark.quick
@pytest.mark.parametrize("code, reason", [
    ("print('a\\nb', file=sys.stderr); sys.exit('argmax of (1, 2)')", r"argmax of \(1, 2\)"),
    ("sys.exit('x' * 5000)", "x{200}"), ("sys.exit(3)", "exit status 3"),
    ("os.kill(os.getpid(), 11)", "killed by SIGSEGV"), ("import time; time.sleep(60)", "not finished after 0.5 s")])
def test_one_line_says_why_the_kernels_of_a_gpu_are_not_used(gpu, monkeypatch, code, reason):
    monkeypatch.setattr(build, "SELFCHECK_SECONDS", 0.5 if "sleep" in code else 60)
    line = fr"self-check on A GPU: {reason}; python -m csrc.selfcheck cuda:1 repeats it"
    assert re.fullmatch(fr"reference \({line}\)", gpu(code))
    monkeypatch.setattr(ops, "SEG_OPS", "kernel")
    with pytest.raises(InputError, match=f"SEG_OPS=kernel: {line}"):
        gpu(code)
