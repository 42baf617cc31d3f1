"""Time and peak memory of each operator against its reference and against the best eager PyTorch, as a Markdown table.

    python csrc/bench.py [--json FILE]     about 10 minutes on two cores

The best eager PyTorch upsamples once, takes labels as int64 and argmax as max(1).indices; malloc keeps its memory, so no time
goes to page faults. All are run in turn in one process, results compared first; figures are medians of rounds.
"""
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

# glibc reads these when a process starts
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
SMALL = {name: str(1 << 14) for name in TUNED}  # for memory: what is freed goes back at once
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from cli import InputError, Parser, launch  # noqa: E402
from common import commit  # noqa: E402
from csrc import ops  # noqa: E402

SIZES = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)]  # N, K, h = w, H = W
PLAIN = (4, 21, 321, 321)


def up(x, size):
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=True)


def both_ways(f, x, upstream=None):
    """f(x) and its backward pass -> the result, the gradient"""
    x = x.detach().requires_grad_()
    y = f(x)
    y.backward(upstream)
    return y.detach(), x.grad


def cases(n, k, h, size, dtype, seed=0):
    """{operator: {"ours": f, "reference": f, "eager": f}} on random input; labels in blocks, as in pictures, 5 % void."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, h, h, generator=g).mul(3).to(dtype)
    label = F.interpolate(torch.randint(0, k, (n, 1, 24, 24), generator=g).float(), (size, size))[:, 0].to(torch.uint8)
    label[torch.rand(n, size, size, generator=g) < 0.05] = 255
    long = label.long()
    conf = torch.randn(n, 1, max(1, size // 32), max(1, size // 32), generator=g)
    grad = torch.randn(n, k, size, size, generator=g).to(dtype)
    same = h == size

    def eager_labels(x):
        return F.cross_entropy(x if same else up(x, size), long, ignore_index=255)

    def eager_argmax(x):
        upsampled = x if same else up(x, size)
        guess = upsampled.detach().max(1).indices
        guess.masked_fill_(up(conf, size)[:, 0].sigmoid() <= 0.5, 255)
        return F.cross_entropy(upsampled, guess, ignore_index=255)

    def eager_confusion():
        cell = torch.where(long == 255, k * k, long * k + (x if same else up(x, size)).max(1).indices)
        return torch.bincount(cell.flatten(), minlength=k * k + 1)[:-1].view(k, k)

    def cross_entropy(f, *args, **kw):
        return lambda: both_ways(lambda x: f(x, *args, **kw)[0], x)

    argmax = dict(confidence=conf, threshold=0.5, size=(size, size))
    ce, ce_reference = ops.masked_cross_entropy, ops.masked_cross_entropy_reference
    found = {
        "cross entropy, labels": dict(ours=cross_entropy(ce, label), reference=cross_entropy(ce_reference, label),
                                      eager=lambda: both_ways(eager_labels, x)),
        "cross entropy, argmax": dict(ours=cross_entropy(ce, **argmax), reference=cross_entropy(ce_reference, **argmax),
                                      eager=lambda: both_ways(eager_argmax, x))}
    if not same:
        found["upsample_softmax"] = dict(
            ours=lambda: both_ways(lambda x: ops.upsample_softmax(x, (size, size)), x, grad),
            reference=lambda: both_ways(lambda x: ops.upsample_softmax_reference(x, (size, size)), x, grad),
            eager=lambda: both_ways(lambda x: up(x, size).softmax(1), x, grad))
        found["confusion matrix, logits"] = dict(
            ours=lambda: (ops.confusion_matrix(x, label),),
            reference=lambda: (ops.confusion_matrix_reference(x, label),), eager=lambda: (eager_confusion(),))
    return found


def ids_case(n=10, k=21, size=321, runs=True):
    g = torch.Generator().manual_seed(0)
    side = 24 if runs else size
    label, guess = (F.interpolate(torch.randint(0, k, (n, 1, side, side), generator=g).float(), (size, size))[:, 0]
                    .to(torch.uint8) for _ in range(2))
    a, b, long, wide = label.numpy(), guess.numpy(), label.long(), guess.long()
    return dict(ours=lambda: (ops.confusion_matrix(guess, label, k),),
                eager=lambda: (torch.bincount((long * k + wide).flatten(), minlength=k * k).view(k, k),),
                numpy=lambda: (torch.from_numpy(np.bincount((a.astype(np.uint16) * k + b).ravel(), minlength=k * k)
                                                .reshape(k, k)),))


def timed(paths, seconds, dtype):
    """{name: median seconds}, all paths in turn, after checking that they agree (eager bfloat16 agrees with nothing)."""
    results = {name: f() for name, f in paths.items() if name != "eager" or dtype != torch.bfloat16}
    for name, result in results.items():
        for ours, theirs in zip(results["ours"], result):
            if not torch.allclose(ours.double(), theirs.double(), atol=2e-2 * theirs.double().abs().max(), rtol=2e-2):
                raise InputError(f"ours and {name} differ by {(ours.double() - theirs.double()).abs().max():.2g}")
    del results
    times, end = {name: [] for name in paths}, time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 5:
        for name, f in paths.items():
            began = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(t) for name, t in times.items()}


def exponential_floor():
    """Seconds an element of torch.exp on all cores, on a tensor that stays in their caches."""
    x, out, times = torch.randn(1 << 18), torch.empty(1 << 18), []
    for _ in range(200):
        began = time.perf_counter()
        torch.exp(x, out=out)
        times.append(time.perf_counter() - began)
    return statistics.median(times) / x.numel()


def peak(case, operator, path):
    """Bytes that one call adds to the largest size of this process; in a process of its own."""
    def largest():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cases(1, 3, 5, 33, torch.float32)[operator][path]()  # loads what has to be loaded
    f = cases(*case, torch.float32)[operator][path]
    ctypes.CDLL(None).malloc_trim(0)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    ballast = np.ones(max(0, largest() - now), np.uint8)  # fills this process up to its largest size so far
    before = largest()
    f()
    return largest() - before + 0 * len(ballast)


def flags():
    p = Parser(__doc__)
    p.add_argument("what", nargs="?", choices=["ops", "peak"], default="ops")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument("--only", default="", metavar="TEXT", help="only lines with TEXT, as in `ids` or `321, 321`")
    p.add_argument("--seconds", type=float, default=6, help="of rounds for each line (default 6)")
    p.add_argument("--of", nargs="*", help="for peak: what to measure, used by this script itself")
    return p


def main(args):
    if args.what == "peak":
        return print(peak(json.loads(args.of[0]), args.of[1], args.of[2]))
    if not ops.in_use().startswith("kernel"):
        raise InputError(f"the kernels are not in use: {ops.in_use()}")
    machine = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.processor())
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit()}\n")
    print("| operator | input | dtype | ours, ms | reference | best eager | numpy | extra memory, ours / eager, % |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for case in [*SIZES, PLAIN]:
        for dtype in (torch.float32, torch.bfloat16):
            for operator, paths in cases(*case, dtype).items() if args.only in f"{case} {dtype} ops" else ():
                rows.append(line(operator, case, dtype, timed(paths, args.seconds, dtype), dtype == torch.float32))
    for runs in ("in runs", "random"):
        if args.only in f"ids {runs}":
            rows.append(line(f"confusion matrix, ids {runs}", (10, 21, 321, 321), torch.uint8,
                             timed(ids_case(runs=runs == "in runs"), args.seconds, torch.uint8), False))
    n, k, _, size = SIZES[0]
    floor, ours = exponential_floor() * n * k * size * size, rows[0]["ours"]
    print(f"\nFirst row: {ours * 1e3:.1f} ms; the {n * k * size * size / 1e6:.1f} M exponentials alone, by torch.exp: "
          f"{floor * 1e3:.1f} ms, ratio {ours / floor:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "torch": torch.__version__, "commit": commit(),
                                               "floor": floor, "rows": rows}, indent=1) + "\n")


def line(operator, case, dtype, times, memory):
    """Print one row of the table; -> the row"""
    n, k, h, size = case
    row = {"operator": operator, "case": case, "dtype": str(dtype).split(".")[1], **times}
    for path in ("ours", "eager") if memory else ():
        done = subprocess.run([sys.executable, __file__, "peak", "--of", json.dumps(case), operator, path],
                              capture_output=True, text=True, check=True, env=os.environ | SMALL)
        row[f"memory_{path}"] = int(done.stdout) / (4 * n * k * size * size)
    cells = [f"{times[name] / times['ours']:.1f}x" if name in times else "" for name in ("reference", "eager", "numpy")]
    share = f"{100 * row['memory_ours']:.1f} / {100 * row['memory_eager']:.0f}" if memory else ""
    print(f"| {operator} | ({n},{k},{h},{h}) -> {size} | {row['dtype']} | {times['ours'] * 1e3:.2f} | {' | '.join(cells)} | "
          f"{share} |", flush=True)
    return row


if __name__ == "__main__":
    if sys.platform == "linux" and not TUNED.items() <= os.environ.items() and "peak" not in sys.argv:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)
    launch(main, flags)
