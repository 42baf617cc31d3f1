"""Time and memory of each operator against its reference and the best eager PyTorch, as a Markdown table.

    python csrc/bench.py                 about 10 minutes on two cores
    python csrc/bench.py --device cuda   on a GPU, calls in CUDA graphs, against torch.compile too

Results are compared first. All paths run in turn in one process, a short call for 5 ms a round; times are medians over
rounds. Best eager: one upsampling, argmax as max(1).indices, pairs of ids as int16; malloc keeps its memory, so that no
time goes to page faults. Floor: moving inputs and results once or, if slower, an exponential for each pixel and class.
Memory: what a call adds at its peak, in % of a float32 (N,K,H,W) tensor; on the CPU in a process of its own.
"""
import argparse
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from time import perf_counter

TUNED = dict(MALLOC_MMAP_THRESHOLD_=str(1 << 40), MALLOC_TRIM_THRESHOLD_=str(1 << 40), MALLOC_TOP_PAD_=str(1 << 28))
if __name__ == "__main__" and not TUNED.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)  # glibc reads them when a process starts
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from common.console import InputError, git_commit, launch  # noqa: E402
from csrc import ops  # noqa: E402

SIZES = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)]  # N, K, h = w, H = W
LOGITS = ["cross entropy, labels", "cross entropy, argmax", "upsample_softmax", "pseudo labels",
          "confusion matrix, logits"]
IDS = ["confusion matrix, ids in runs", "confusion matrix, random ids"]


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the operators run (default cpu)")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows with TEXT, as in `ids` or `41, 321) float32`")
    p.add_argument("--seconds", type=float, default=6, help="of rounds for each row (default 6)")
    return p


def main(args):
    cuda, rows = args.device == "cuda", []
    use = ops.in_use(args.device) if not cuda or torch.cuda.is_available() else "there is no GPU here"
    if use != "kernel":
        raise InputError(f"--device {args.device}: the kernels are not in use: {use}")
    cpu = re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    machine = torch.cuda.get_device_name() if cuda else f"{cpu}, {torch.get_num_threads()} threads"
    print(f"{machine}, torch {torch.__version__}, commit {git_commit()}\n")
    rivals, (bandwidth, exponentials) = ["reference", "eager", *["compile"] * cuda], speeds(cuda)
    print(f"| operator | N, K, h, H | dtype | ours, ms | ours / floor | {' | '.join(rivals)} | memory, ours / eager |")
    print("|---" * (6 + len(rivals)) + "|")
    dtypes = ["float32", "bfloat16", *["float16"] * cuda]
    for case, dtype, operator in [*product(SIZES, dtypes, LOGITS), *product([(10, 21, 321, 321)], ["uint8"], IDS)]:
        if args.only not in f"{operator} {case} {dtype}":
            continue
        full, counts = case[0] * case[1] * case[3] ** 2, operator.startswith("confusion")
        share = [peak(operator, case, dtype, path, args.device) / (4 * full) for path in ("ours", "eager")]
        paths, moved = cases(operator, case, dtype, args.device)  # after peak: it forgets what was compiled before
        for path, f in paths.items():
            pairs = [(a.double(), b.double()) for a, b in zip(paths["ours"](), f())]
            off = np.max([((a - b).norm() / b.norm()).item() for a, b in pairs])
            if not off <= 0.02 and (path == "reference" or "float16" not in dtype):  # eager half types are far off
                raise InputError(f"{operator} {case} {dtype}: ours and {path} differ by {off:.0%} in norm")
        graphs = [path for path in paths if cuda and (path == "ours" or not counts)]  # other counts synchronise
        times, floor = timed(paths, args.seconds, graphs), max(moved / bandwidth, 0 if counts else full / exponentials)
        rows.append(dict(operator=operator, case=case, dtype=dtype, floor=floor, memory=share, **times))
        ratios = [f"{times[path] / times['ours']:.1f}x" if path in times else "" for path in rivals]
        print(f"| {operator} | {case} | {dtype} | {1e3 * times['ours']:.4g} | {times['ours'] / floor:.2f} | "
              f"{' | '.join(ratios)} | {share[0]:.1%} / {share[1]:.0%} |", flush=True)
    return rows


def cases(operator, case, dtype, device):
    """{"ours": f, ...}, bytes moved at least: f() -> [result, gradient]; labels in blocks, as in pictures, 5 % void."""
    (n, k, h, size), ids, g = case, operator in IDS, torch.Generator().manual_seed(0)
    few = torch.randint(0, k, (2, n, *[size if "random" in operator else 24] * 2), generator=g)
    label, x = F.interpolate(few.float(), (size, size)).to(device, torch.uint8)
    label[(torch.rand(n, size, 1 if ids else size, generator=g) < 0.05).expand_as(label)] = 255  # rows: runs stay runs
    x = x if ids else torch.randn(n, k, h, h, generator=g).mul(3).to(device, getattr(torch, dtype))
    grad = None
    if operator == "upsample_softmax":  # D's: channels last, as D is
        grad = torch.randn(n, size, size, k, generator=g).to(x).permute(0, 3, 1, 2)
    long, conf = label.long(), torch.randn(n, 1, size // 32, size // 32, generator=g).to(device)
    limits = torch.rand(k, generator=g).to(device)
    up = partial(F.interpolate, size=(size, size), mode="bilinear", align_corners=True)

    def count(x):
        pairs = label.clamp(max=k).to(torch.int16) * k + (x if ids else up(x).max(1).indices.to(torch.int16))
        return pairs.flatten().bincount(minlength=k * k + k)[:k * k].view(k, k)

    def pseudo(x):
        p, ids = up(x).softmax(1).max(1)
        return ids.masked_fill_(p <= limits[ids], 255).to(torch.uint8)

    def call(f):
        y = f(x)
        y = y[0] if isinstance(y, tuple) else y  # (loss, kept)
        return [y.detach(), *torch.autograd.grad(y, x, grad)] if x.requires_grad else [y]

    ours, inputs, eager = dict(zip(LOGITS, [
        (ops.masked_cross_entropy, dict(target=label), lambda x: F.cross_entropy(up(x), long, ignore_index=255)),
        (ops.masked_cross_entropy, dict(confidence=conf, size=(size, size)), lambda x: F.cross_entropy(
            y := up(x), y.detach().max(1).indices.masked_fill_(up(conf)[:, 0].sigmoid() <= 0.5, -100))),
        (ops.upsample_softmax, dict(size=(size, size)), lambda x: up(x).softmax(1)),
        (ops.pseudo_labels, dict(size=(size, size), confidence=limits), pseudo),
    ])).get(operator, (ops.confusion_matrix, dict(target=label, num_classes=k), count))
    x.requires_grad_(ours not in (ops.confusion_matrix, ops.pseudo_labels))
    reference = partial(getattr(ops, f"{ours.__name__}_reference"), **inputs)
    paths = {"ours": partial(ours, **inputs), "reference": reference, "eager": eager}
    if device == "cuda":
        torch._dynamo.reset()  # what was compiled for other sizes would serve these
        paths["compile"] = torch.compile(eager, dynamic=False)
    moved = [x, grad, *inputs.values(), *call(paths["ours"])]
    return {path: partial(call, f) for path, f in paths.items()}, sum(getattr(t, "nbytes", 0) for t in moved)


def timed(paths, seconds, graphs=(), choose=np.median):
    """{path: seconds of a call}, the median over rounds; those in `graphs` as CUDA graphs."""
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
    return {path: choose(t[1:]) for path, t in times.items()}


def speeds(cuda):
    """Bytes and exponentials a second: a GPU's by its clocks, 16 a multiprocessor; a CPU's by a copy and torch.exp."""
    if cuda:
        gpu = torch.cuda.get_device_properties(0)
        return 250 * gpu.memory_clock_rate * gpu.memory_bus_width, 16e3 * gpu.multi_processor_count * gpu.clock_rate
    x, y = torch.randn(2, 1 << 17), torch.zeros(2, 1 << 25)
    times = timed({"exp": lambda: torch.exp(x[0], out=x[1]), "copy": lambda: y[0].copy_(y[1])}, 0.5, choose=min)
    return y.nbytes / times["copy"], x[0].numel() / times["exp"]


def peak(operator, case, dtype, path, device, alone=True):
    """Bytes that a call adds at its peak; on the CPU in a process of its own."""
    if alone and device == "cpu":
        code = f"from csrc.bench import peak; print(peak{operator, case, dtype, path, device, False})"
        env = os.environ | dict.fromkeys(TUNED, str(1 << 14))
        return int(subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, env=env))
    f = cases(operator, case, dtype, device)[0][path]
    for _ in range(2):  # the first call loads what has to be loaded
        torch.cuda.reset_peak_memory_stats() if device == "cuda" else Path("/proc/self/clear_refs").write_text("5")
        f()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    held = dict(re.findall(r"(Vm\w+):\s+(\d+)", Path("/proc/self/status").read_text()))
    return 1024 * (int(held["VmHWM"]) - int(held["VmRSS"]))


if __name__ == "__main__":
    launch(main, flags)
