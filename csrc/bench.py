"""Time and memory of each operator against its reference and the best eager PyTorch, as a Markdown table.

    python csrc/bench.py [--json FILE]   about 10 minutes on two cores
    python csrc/bench.py --device cuda   on a GPU, in CUDA graphs, against torch.compile too

Best eager: one upsampling, argmax as max(1).indices, pairs of ids as int16; malloc keeps its memory, so that no time goes
to page faults. All paths run in turn in one process, a short call for 5 ms a round; figures are medians over rounds.
Floor: the time to move inputs and results once, or to compute an exponential for each pixel and class where that takes
longer; what fits stays in the caches. Memory: what a call adds at its peak, in % of an (N,K,H,W) tensor of the dtype.
"""
import json
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

from cli import InputError, Parser, commit, launch  # noqa: E402
from csrc import ops  # noqa: E402

SIZES, IDS = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)], (10, 21, 321, 321)  # N, K, h = w, H = W
OF_LOGITS = ["cross entropy, labels", "cross entropy, argmax", "upsample_softmax", "confusion matrix, logits"]
OF_IDS = ["confusion matrix, ids in runs", "confusion matrix, random ids"]


def flags():
    p = Parser(__doc__)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the operators run (default cpu)")
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
    dtypes = ["float32", "bfloat16", *["float16"] * cuda]
    for case, dtype, operator in [*product(SIZES, dtypes, OF_LOGITS), *product([IDS], ["uint8"], OF_IDS)]:
        if args.only not in f"{operator} {case} {dtype}":
            continue
        paths, moved = cases(operator, case, dtype, args.device)
        for path, f in paths.items():
            for ours, other in zip(paths["ours"](), f()):
                agree = (ours - other).abs().max() <= 0.02 * other.abs().max()
                if not agree and (path == "reference" or "float16" not in dtype):  # eager half types agree with nothing
                    raise InputError(f"{operator} {case} {dtype}: ours and {path} differ")
        full, counts = case[0] * case[1] * case[3] ** 2, operator.startswith("confusion")
        memory = [peak(operator, case, dtype, path, args.device) for path in ("ours", "eager")]
        share = [m / full / getattr(torch, dtype).itemsize for m in memory]
        graphs = [path for path in paths if cuda and (path == "ours" or not counts)]  # other counts synchronise
        times, floor = timed(paths, args.seconds, graphs), max(moved / bandwidth, 0 if counts else full / exponentials)
        rows.append(dict(operator=operator, case=case, dtype=dtype, floor=floor, memory=share, **times))
        ratios = [f"{times[path] / times['ours']:.1f}x" if path in times else "" for path in rivals]
        print(f"| {operator} | {case} | {dtype} | {1e3 * times['ours']:.4g} | {times['ours'] / floor:.2f} | "
              f"{' | '.join(ratios)} | {share[0]:.1%} / {share[1]:.0%} |", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


def cases(operator, case, dtype, device):
    """{"ours": f, ...}, bytes moved at least: f() -> [result, gradient]; labels in blocks, as in pictures, 5 % void."""
    (n, k, h, size), ids, g = case, operator in OF_IDS, torch.Generator().manual_seed(0)
    few = torch.randint(0, k, (2, n, *[size if "random" in operator else 24] * 2), generator=g)
    label, x = F.interpolate(few.float(), (size, size)).to(device, torch.uint8)
    label[(torch.rand(n, size, 1 if ids else size, generator=g) < 0.05).expand_as(label)] = 255  # rows: runs stay runs
    if not ids:
        x = torch.randn(n, k, h, h, generator=g).mul(3).to(device, getattr(torch, dtype))
        x.requires_grad_("confusion" not in operator)
    long, conf = label.long(), torch.randn(n, 1, size // 32, size // 32, generator=g).to(device)
    grad = torch.randn(n, k, size, size, generator=g).to(x) if operator == "upsample_softmax" else None
    up = partial(F.interpolate, size=(size, size), mode="bilinear", align_corners=True)

    def self_taught(x):
        upsampled = up(x)
        ...
