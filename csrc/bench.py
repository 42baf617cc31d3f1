"""Time and peak memory of each operator against its reference and against the best eager PyTorch, as a Markdown table.

    python csrc/bench.py [--json FILE]   about 10 minutes on two cores
    python csrc/bench.py --device cuda   on a GPU, against the floors of bench_cuda.py

The best eager PyTorch upsamples once, takes argmax as max(1).indices and counts pairs of ids as int16. malloc keeps its
memory, so that no time goes to page faults. Results are compared first; then all paths run in turn in one process, and
figures are medians over rounds, in which a short call is repeated for 5 ms. Peak memory is of a process of its own.
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

TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
         "MALLOC_TOP_PAD_": str(1 << 28)}
if __name__ == "__main__" and sys.platform == "linux" and not TUNED.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)  # glibc reads them when a process starts
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from cli import InputError, Parser, commit, launch  # noqa: E402
from csrc import bench_cuda, ops  # noqa: E402
from csrc.bench_cases import cases, ids_case  # noqa: E402

SIZES = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)]  # N, K, h = w, H = W
PLAIN = (4, 21, 321, 321)


def check(paths, dtype=None):
    """Errors: InputError where two paths disagree (eager half types agree with nothing)."""
    exact = dtype in (None, torch.float32)
    results = {name: f() for name, f in paths.items() if name in ("ours", "reference") or exact}
    for name, result in results.items():
        for ours, theirs in zip(results["ours"], result):
            ours, theirs, half = ours.double(), theirs.double(), ours.dtype == torch.float16
            least = 6e-8 if half else 0  # a step of what is almost 0
            if not torch.allclose(ours, theirs, atol=2e-2 * theirs.abs().max() + least, rtol=2e-2):
                raise InputError(f"ours and {name} differ by {(ours - theirs).abs().max():.2g}")


def timed(paths, seconds, dtype=None):
    """{name: median seconds}, all paths in turn, after checking that they agree."""
    check(paths, dtype)
    times, end = {name: [] for name in paths}, time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 5:
        for name, f in paths.items():
            calls, began = 0, time.perf_counter()
            while calls == 0 or time.perf_counter() - began < 5e-3:
                f()
                calls += 1
            times[name].append((time.perf_counter() - began) / calls)
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
    """Bytes that one call adds to what this process holds, at the most."""
    def largest():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cases(1, 3, 5, 33, torch.float32)[operator][path]()  # loads what has to be loaded
    f = cases(*case, torch.float32)[operator][path]
    ctypes.CDLL(None).malloc_trim(0)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    ballast = np.ones(max(0, largest() - now), np.uint8)  # fills this process up to its largest size so far
    before = largest()
    f()
    added = largest() - before
    del ballast
    return added


def peak_alone(case, operator, path):
    """`peak` in a process of its own, whose malloc gives memory back when it is freed."""
    words = [sys.executable, __file__, "peak", json.dumps([case, operator, path])]
    env = os.environ | dict.fromkeys(TUNED, str(1 << 14))
    return json.loads(subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout)


def flags():
    p = Parser(__doc__)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the operators run (default cpu)")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument("--only", default="", metavar="TEXT", help="only lines with TEXT, as in `ids` or `321, 321`")
    p.add_argument("--seconds", type=float, default=6, help="of rounds for each operator (default 6)")
    return p


def main(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU here")
    if ops.in_use(args.device) != "kernel":
        raise InputError(f"the kernels are not in use: {ops.in_use(args.device)}")
    machine = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                    if line.startswith("model name")), platform.processor())
    about = {"machine": machine, "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit()}
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    if args.device == "cuda":
        print(torch.cuda.get_device_name() + "\n")
        about["rows"] = bench_cuda.table(args, [*SIZES, PLAIN], cases, check)
    else:
        about["rows"] = operator_table(args) + ids_table(args)
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=1) + "\n")


def operator_table(args):
    print("| operator | input | dtype | ours, ms | reference | best eager | extra memory, ours / eager, % |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for case in [*SIZES, PLAIN]:
        for dtype in (torch.float32, torch.bfloat16):
            for operator, paths in cases(*case, dtype).items() if args.only in f"{case} {dtype} ops" else ():
                times = timed(paths, args.seconds, dtype)
                rows.append(line(operator, case, dtype, times, dtype == torch.float32))
    if rows and rows[0]["operator"] == "cross entropy, labels":
        (n, k, _, size), ours = rows[0]["case"], rows[0]["ours"]
        floor = exponential_floor() * n * k * size * size
        print(f"\nFirst row: {ours * 1e3:.1f} ms; its {n * k * size * size / 1e6:.1f} M exponentials alone, by "
              f"torch.exp: {floor * 1e3:.1f} ms, ratio {ours / floor:.2f}")
        rows.append({"operator": "exponentials of the first row", "ours": floor})
    return rows


def ids_table(args):
    """(10,321,321) class ids of 21 classes, uint8; bincount of int64 is given int64, all else uint8."""
    ways, rows = ("reference", "bincount", "bincount of int16", "numpy"), []
    print(f"\n| confusion matrix of ids | ours, ms | {' | '.join(ways)} |\n|---|---|---|---|---|---|")
    for name, side in (("ids in runs of 13 pixels", 24), ("ids of random pixels", 321)):
        if args.only in name:
            times = timed(ids_case(side), args.seconds)
            rows.append({"operator": name, **times})
            ratios = " | ".join(f"{times[way] / times['ours']:.1f}x" for way in ways)
            print(f"| {name} | {times['ours'] * 1e3:.2f} | {ratios} |", flush=True)
    return rows


def line(operator, case, dtype, times, memory):
    """Print one row of the table; -> the row"""
    n, k, h, size = case
    row = {"operator": operator, "case": case, "dtype": str(dtype).split(".")[1], **times}
    for path in ("ours", "eager") if memory else ():
        row[f"memory_{path}"] = peak_alone(case, operator, path) / (4 * n * k * size * size)
    cells = [f"{times[name] / times['ours']:.1f}x" if name in times else "" for name in ("reference", "eager")]
    share = f"{100 * row['memory_ours']:.1f} / {100 * row['memory_eager']:.0f}" if memory else ""
    print(f"| {operator} | ({n},{k},{h},{h}) -> {size} | {row['dtype']} | {times['ours'] * 1e3:.2f} "
          f"| {' | '.join(cells)} | {share} |", flush=True)
    return row


if __name__ == "__main__":
    if sys.argv[1:2] == ["peak"]:
        print(peak(*json.loads(sys.argv[2])))
    else:
        launch(main, flags)
