"""Peak memory of a training step, computed without a GPU, as a Markdown table.

    python tests/stress/memory.py            # the paper's settings, 2 minutes
    python tests/stress/memory.py --check    # small settings, computed and measured on this CPU

Two steps of each script run on fake tensors, which have shapes but no memory, in bfloat16 as on CUDA. A dispatch mode
adds up the storages that are alive. What operators use inside (workspaces of cuDNN), fragmentation and CUDA's context
are not counted. --check runs the steps on the CPU too, and compares the growth of the process in the second step.
"""
import argparse
import contextlib
import importlib
import itertools
import re
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.console import git_commit  # noqa: E402
from common.run import Run  # noqa: E402

import torch  # noqa: E402
from gpu import SCRIPTS, write_voc  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import data  # noqa: E402
from csrc import ops  # noqa: E402

SETTINGS = {"VOC: crop 321, batch size 10": "--amp",
            "Cityscapes: crop 513, batch size 2": "--amp --crop 513 --batch-size 2"}  # with VOC's 21 classes, not 19


class LiveMemory(TorchDispatchMode):
    """Context: `live`, the bytes of the storages that operators returned and that still exist, and their `peak`."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for storage in (x.untyped_storage() for x in tree_leaves(result) if isinstance(x, torch.Tensor)):
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.add(size := -(-storage.nbytes() // 512) * 512)  # as CUDA's allocator rounds
                weakref.finalize(storage, self.forget, storage._cdata, size)
        return result

    def add(self, size):
        self.live += size
        self.peak = max(self.peak, self.live)

    def forget(self, key, size):
        self.known.remove(key)
        self.live -= size


def apply(self, function, recurse=True):
    """nn.Module._apply for fake tensors, which the original cannot replace."""
    for module in self.modules():
        for name, x in module._parameters.items():
            module._parameters[name] = x if x is None else torch.nn.Parameter(function(x.detach()), x.requires_grad)
        for name, x in module._buffers.items():
            module._buffers[name] = x if x is None else function(x)
    return self


def resident():
    """Return the bytes that this process has, and had at its peak since the last call."""
    held = dict(re.findall(r"(Vm\w+):\s+(\d+)", Path("/proc/self/status").read_text()))
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(held["VmRSS"]), 1024 * int(held["VmHWM"])


def run_steps(script, words, fake=True):
    """Run two steps of a script; return the bytes before the second and at its peak, of tensors or of the process."""
    module, memory, found = importlib.import_module(script), LiveMemory(), []

    class TwoSteps(Run):
        def __init__(self, *args):
            super().__init__(*args)
            if fake:
                stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))  # constants of csrc
                stack.enter_context(memory)

        def steps(self, evaluate):
            yield 1
            memory.peak = memory.live
            found.append(memory.live if fake else resident()[0])
            yield 2
            found.append(memory.peak if fake else resident()[1])

        def log(self, *_, **__):
            pass

        end_step = log

    def batches(samples, name, *, batch_size, crop, **_):
        image = torch.zeros(batch_size, crop, crop, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        return itertools.repeat((image, torch.zeros(batch_size, crop, crop, dtype=torch.uint8).to(
            torch.uint8 if name == "labelled" else torch.bool)))

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(None))
        root = Path(folder) / "voc"
        write_voc(root, 3)
        module.Run, module.data.batches, data.inspect_labels = TwoSteps, batches, lambda *_: None
        args = module.flags().parse_args([*f"--data {root} --out {root}/out --gpu -1 --init none".split(), *words])
        ops.in_use()
        if fake:
            torch.nn.Module._apply = apply
            torch.Tensor.__deepcopy__ = lambda x, _: x.detach().clone().requires_grad_(x.requires_grad)
        module.main(args)
    return found


def main(args):
    if args.measure:
        return print(*run_steps(args.measure, args.flags.split(), fake=False))
    columns = ["computed", "measured", "error"] if args.check else ["before a step", "peak"]
    print(f"GiB, commit {git_commit()}\n\n| script | settings | {' | '.join(columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    settings = {args.flags: f"{args.flags} --no-amp"} if args.check else SETTINGS
    for (name, flags), script in itertools.product(settings.items(), SCRIPTS):
        values = [x / 2**30 for x in run_steps(script, flags.split())]
        if args.check:  # a malloc that returns freed memory at once, as in csrc/bench.py
            command = (f"env MALLOC_MMAP_THRESHOLD_=16384 MALLOC_TRIM_THRESHOLD_=16384 {sys.executable} {__file__} "
                       f"--measure {script} --flags").split()
            measured = [int(x) / 2**30 for x in subprocess.check_output([*command, flags], text=True).split()]
            ours, theirs = (peak - before for before, peak in (values, measured))
            print(f"| {script} | {name} | {ours:.3f} | {theirs:.3f} | {ours / theirs - 1:+.0%} |", flush=True)
        else:
            print(f"| {script} | {name} | {values[0]:.1f} | {values[1]:.1f} |", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="compare with the memory that steps take on this CPU")
    p.add_argument("--flags", default="--backbone resnet18 --crop 129 --batch-size 8", help="flags of the scripts, "
                   "for --check")
    p.add_argument("--measure", metavar="SCRIPT", help="only what --check measures of one script")
    main(p.parse_args())
