"""Time and memory of each operator against its reference and the best eager PyTorch, as a Markdown table.

    python csrc/bench.py [--json FILE]   about 10 minutes on two cores
    python csrc/bench.py --device cuda   on a GPU, against torch.compile too

Results are compared first; then all paths run in turn in one process, and figures are medians over rounds, in which a
short call is repeated for 5 ms. Best eager: one upsampling, argmax as max(1).indices, pairs of ids as int16; malloc
keeps its memory, so that no time goes to page faults. On a GPU calls are captured in CUDA graphs, but for confusion
matrices other than ours, which synchronise. Floor: the time to move inputs and results once, or to compute an
exponential for each pixel and class where that takes longer; what fits stays in the caches. Memory: what a call adds
at its peak, in % of an (N,K,H,W) tensor of the same type; on the CPU in a process of its own.
"""
import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from timeit import timeit

TUNED = dict(MALLOC_MMAP_THRESHOLD_=str(1 << 40), MALLOC_TRIM_THRESHOLD_=str(1 << 40), MALLOC_TOP_PAD_=str(1 << 28))
if __name__ == "__main__" and not TUNED.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)  # glibc reads them when a process starts
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.benchmark import timer  # noqa: E402

from cli import InputError, Parser, commit, launch  # noqa: E402
from csrc import ops  # noqa: E402

SIZES, IDS = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)], (10, 21, 321, 321)  # N, K, h = w, H = W
DTYPES = {"cpu": ["float32", "bfloat16"], "cuda": ["float32", "float16", "bfloat16"]}
OF_LOGITS = ["cross entropy, labels", "cross entropy, argmax", "upsample_softmax", "confusion matrix, logits"]
OF_IDS = ["confusion matrix, ids in runs", "confusion matrix, random ids"]


def flags():
    p = Parser(__doc__)
    p.add_argument("--device", choices=[*DTYPES], default="cpu", help="where the operators run (default cpu)")
    p.add_argument("--json", metavar="FILE", help="write the figures there, times in seconds")
    p.add_argument("--only", default="", metavar="TEXT", help="only rows with TEXT, as in `ids` or `41, 321) float32`")
    p.add_argument("--seconds", type=float, default=6, help="of rounds for each row (default 6)")
    return p


def main(args):
    cuda, rows = args.device == "cuda", []
    use = ops.in_use(args.device) if not cuda or torch.cuda.is_available() else "there is no GPU here"
    if use != "kernel":
        raise InputError(f"--device {args.device}: the kernels are not in use: {use}")
    cpu = re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    about = {"machine": torch.cuda.get_device_name() if cuda else cpu, "threads": torch.get_num_threads(),
             "torch": torch.__version__, "commit": commit()}
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    rivals, (bandwidth, exponentials) = ["reference", "eager", "compile" if cuda else "numpy"], speeds(cuda)
    print(f"| operator | N, K, h, H | dtype | ours, ms | ours / floor | {' | '.join(rivals)} | memory, ours / eager |")
    print("|---" * 9 + "|")
    for case, dtype, operator in [*product(SIZES, DTYPES[args.device], OF_LOGITS), *product([IDS], ["uint8"], OF_IDS)]:
        if args.only not in f"{operator} {case} {dtype}":
            continue
        paths, moved = cases(operator, case, dtype, args.device)
        check(paths, dtype)
        memory = [peak(paths[path]) if cuda else peak_alone(operator, case, dtype, path) for path in ("ours", "eager")]
        full, counts = case[0] * case[1] * case[3] ** 2, operator.startswith("confusion")
        if cuda:
            paths = {path: f if counts and path != "ours" else captured(f) for path, f in paths.items()}
        times, floor = timed(paths, args.seconds), max(moved / bandwidth, 0 if counts else full / exponentials)
        share = [m / full / getattr(torch, dtype).itemsize for m in memory]
        rows.append(dict(operator=operator, case=case, dtype=dtype, floor=floor, memory=share, **times))
        ratios = [f"{times[path] / times['ours']:.1f}x" if path in times else "" for path in rivals]
        print(f"| {operator} | {case} | {dtype} | {1e3 * times['ours']:.4g} | {times['ours'] / floor:.2f} | "
              f"{' | '.join(ratios)} | {share[0]:.1%} / {share[1]:.0%} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def cases(operator, case, dtype, device="cpu"):
    """{"ours": f, ...}, bytes moved at least: f() -> [result, gradient]; labels in blocks, as in pictures, 5 % void."""
    (n, k, h, size), ids, _ = case, operator in OF_IDS, torch.manual_seed(0)
    few = torch.randint(0, k, (2, n, *[size if "random" in operator else 24] * 2))
    label, x = F.interpolate(few.float(), (size, size)).to(device, torch.uint8)
    label[(torch.rand(n, size, 1 if ids else size) < 0.05).expand_as(label)] = 255  # rows: runs stay runs
    x = x if ids else torch.randn(n, k, h, h).mul(3).to(device, getattr(torch, dtype)).requires_grad_()
    grad = torch.randn(n, k, size, size).to(x) if operator == "upsample_softmax" else None
    long, conf = label.long(), torch.randn(n, 1, size // 32, size // 32).to(device)

    def up(x):
        return F.interpolate(x, (size, size), mode="bilinear", align_corners=True)

    def eager_argmax(x):
        guess = up(x.detach()).max(1)
"""
"""
