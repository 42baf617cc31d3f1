"""Time and memory of each operator against its reference, the best eager PyTorch and torch.compile of that, as a table.

    python csrc/bench.py [--device cuda]   # 20 minutes on two cores; on a GPU calls are in CUDA graphs

Results are compared first. The paths are timed alternately, about 5 ms each per round. Times are medians over rounds;
those of other paths are multiples of ours, and that of the faster of eager and torch.compile is bold. Memory: what a
call adds at its peak, in % of a float32 (N,K,H,W) tensor. To imitate a CPU with AVX2: the environment variables named
in tests/stress/steps.py, and TORCHINDUCTOR_CPP_MARCH=haswell.
"""
import argparse
import ctypes
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.console import InputError, git_commit, launch  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from csrc import ops  # noqa: E402

SIZES = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)]  # N, K, h = w, H = W
OPERATORS = ["cross entropy, labels", "cross entropy, weights", "cross entropy, argmax", "upsample_softmax",
             "pseudo labels", "confusion matrix"]
IDS = "confusion matrix of ids"


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the operators (default cpu)")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows with TEXT, as in `ids` or `41, 321) float32`")
    p.add_argument("--seconds", type=float, default=6, help="seconds of timing for each row (default 6)")
    return p


def main(args):
    cuda = args.device == "cuda"
    path = ops.in_use(args.device) if not cuda or torch.cuda.is_available() else "there is no GPU here"
    if path != "kernel":
        raise InputError(f"--device {args.device}: the kernels are not in use: {path}")
    for option in (-1, -2, -3):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, 1 << 30)  # freed memory is kept: no path pays for page faults
    cpu = re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    cpu = f"{cpu}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if cuda else cpu
    print(f"{machine}, torch {torch.__version__}, commit {git_commit()}\n")
    dtypes, others = ["float32", "bfloat16", *["float16"] * cuda], ["reference", "eager", "compile"]
    print(f"| operator | N, K, h, H | dtype | ours, ms | {' | '.join(others)} | memory, ours / eager |")
    print("|---" * (5 + len(others)) + "|")
    for case, dtype, operator in [*product(SIZES, dtypes, OPERATORS), (SIZES[0], "uint8", IDS)]:
        if args.only not in f"{operator} {case} {dtype}":
            continue
        full = 4 * case[0] * case[1] * case[3] ** 2
        ours, eager = (peak(operator, case, dtype, path, args.device) / full for path in ("ours", "eager"))
        paths = cases(operator, case, dtype, args.device)
        cells = {}
        for path in others:
            try:
                pairs = [(a.double(), b.double()) for a, b in zip(paths["ours"](), paths[path]())]
            except Exception as e:  # torch.compile needs a compiler
                if path != "compile":
                    raise
                cells[path] = f"fails: {str(e).splitlines()[0][:80]}"
                del paths[path]
                continue
            close = all((a - b).norm() <= 0.02 * b.norm() for a, b in pairs)
            if not close and (path == "reference" or "float16" not in dtype):  # half types are less precise elsewhere
                raise InputError(f"{operator} {case} {dtype}: the results of ours and {path} differ")
        graphs = [path for path in paths if cuda and (path == "ours" or not operator.startswith("confusion"))]
        times = timed(paths, args.seconds, graphs)  # others synchronise, which a graph cannot
        best = min(times[path] for path in times if path in others[1:])
        cells |= {path: f"{time / times['ours']:.1f}x" for path, time in times.items()}
        columns = [f"{1e3 * times['ours']:.4g}", *(f"**{cells[path]}**" if times.get(path) == best else cells[path]
                                                   for path in others)]
        print(f"| {operator} | {case} | {dtype} | {' | '.join(columns)} | {ours:.1%} / {eager:.0%} |", flush=True)


def cases(operator, case, dtype, device):
    """Return {"ours": f, "reference": f, "eager": f, ...}; f() -> [result, gradient of the logits if there is one]."""
    (n, k, h, size), g = case, torch.Generator().manual_seed(0)
    blocks = torch.randint(0, k, (2, n, 24, 24), generator=g).float()  # a label map has long runs of one class
    target, x = F.interpolate(blocks, (size, size)).to(device, torch.uint8)
    target[:, ::20] = 255
    if operator != IDS:
        x = torch.randn(n, k, h, h, generator=g).mul(3).to(device, getattr(torch, dtype))
    x.requires_grad_(operator in OPERATORS[:4])
    grad = torch.rand(n, k, 1, 1, generator=g).to(x).expand(n, k, size, size)  # of the probabilities
    grad = grad.contiguous(memory_format=torch.channels_last)  # as the discriminator returns it
    weight = (torch.rand(k, generator=g) + 0.5).to(device)  # of the classes
    long, confidence = target.long(), torch.randn(n, 1, size // 32, size // 32, generator=g).to(device)
    up = partial(F.interpolate, size=(size, size), mode="bilinear", align_corners=True)

    def entropy_of_argmax(x):
        logits, ignored = up(x), up(confidence)[:, 0].sigmoid() <= 0.5
        return F.cross_entropy(logits, logits.detach().max(1).indices.masked_fill_(ignored, -100))

    def pseudo_labels(x):
        largest, ids = up(x).softmax(1).max(1)  # faster than argmax
        return ids.masked_fill_(largest <= 0.9, 255).to(torch.uint8)

    def count(x):
        pairs = target.clamp(max=k).short() * k + (x if operator == IDS else up(x).max(1).indices.short())
        return pairs.flatten().bincount(minlength=k * k + k)[:k * k].view(k, k)

    name, arguments, eager = dict(zip(OPERATORS, [
        ("masked_cross_entropy", dict(target=target), lambda x: F.cross_entropy(up(x), long, ignore_index=255)),
        ("masked_cross_entropy", dict(target=target, weight=weight),
         lambda x: F.cross_entropy(up(x), long, weight.to(x.dtype), ignore_index=255)),
        ("masked_cross_entropy", dict(confidence=confidence, size=(size, size)), entropy_of_argmax),
        ("upsample_softmax", dict(size=(size, size)), lambda x: up(x).softmax(1)),
        ("pseudo_labels", dict(size=(size, size), confidence=0.9), pseudo_labels),
    ])).get(operator, ("confusion_matrix", dict(target=target, num_classes=k), count))
    paths = {"ours": partial(getattr(ops, name), **arguments), "eager": eager,
             "reference": partial(getattr(ops, f"{name}_reference"), **arguments)}
    torch._dynamo.reset()  # else a graph of another size may be reused
    paths["compile"] = torch.compile(eager, dynamic=False)

    def call(f):
        y = f(x)
        y = y[0] if isinstance(y, tuple) else y  # (loss, kept)
        return [y.detach(), *torch.autograd.grad(y, x, grad if y.dim() else None)] if x.requires_grad else [y]
    return {path: partial(call, f) for path, f in paths.items()}


def timed(paths, seconds, graphs):
    """Return {path: seconds of a call}; those in `graphs` run as CUDA graphs."""
    for path in graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            paths[path]()
        paths = paths | {path: graph.replay}
    times, repeats, end = {path: [] for path in paths}, dict.fromkeys(paths, 1), perf_counter() + seconds
    while perf_counter() < end or min(map(len, times.values())) < 6:
        for path, f in paths.items():
            began = perf_counter()
            for _ in range(repeats[path]):
                f()
            if graphs:
                torch.cuda.synchronize()
            times[path].append((perf_counter() - began) / repeats[path])
            repeats[path] = max(1, round(5e-3 / times[path][-1]))
    return {path: torch.tensor(several[1:]).median().item() for path, several in times.items()}


def peak(operator, case, dtype, path, device, alone=True):
    """Return the bytes that a call adds at its peak; on the CPU in a child process whose malloc keeps nothing."""
    if alone and device == "cpu":
        code = f"from csrc.bench import peak; print(peak{operator, case, dtype, path, device, False})"
        command = "env", "MALLOC_MMAP_THRESHOLD_=16384", "MALLOC_TRIM_THRESHOLD_=16384", sys.executable, "-c", code
        return int(subprocess.check_output(command, cwd=Path(__file__).parent.parent))
    f = cases(operator, case, dtype, device)[path]
    for _ in range(2):  # the first call loads what has to be loaded
        torch.cuda.reset_peak_memory_stats() if device == "cuda" else Path("/proc/self/clear_refs").write_text("5")
        f()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    held = dict(re.findall(r"(Vm\w+):\s+(\d+)", Path("/proc/self/status").read_text()))
    return 1024 * (int(held["VmHWM"]) - int(held["VmRSS"]))


if __name__ == "__main__":
    launch(main, flags)
