"""Time and peak memory of each operator against its reference and against the best eager PyTorch, as a Markdown table.

    python csrc/bench.py [--json FILE]       the operators, about 10 minutes on two cores
    python csrc/bench.py step [--json FILE]  steps of the trainings and evaluation, and several processes, about 15 minutes
    python csrc/bench.py --device cuda       the operators on a GPU, against their floors (bench_cuda.py)

The best eager PyTorch upsamples once, takes argmax as max(1).indices and counts pairs of ids as int16; malloc keeps its memory,
so no time goes to page faults. All are run in turn in one process, results compared first; figures are medians of rounds, in
which what is short is called for 5 ms. Peak memory is of a process of its own.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

# glibc reads these when a process starts
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cli import InputError, Parser, commit, launch  # noqa: E402
from csrc import bench_cuda, bench_step, ops  # noqa: E402
from csrc.bench_cases import cases, ids_case  # noqa: E402

SIZES = [(10, 21, 41, 321), (2, 19, 97, 769), (2, 150, 65, 513)]  # N, K, h = w, H = W
PLAIN = (4, 21, 321, 321)


def check(paths, dtype=None):
    """That all paths agree (eager half types agree with nothing)."""
    results = {name: f() for name, f in paths.items() if name in ("ours", "reference") or dtype in (None, torch.float32)}
    for name, result in results.items():
        for ours, theirs in zip(results["ours"], result):
            least = 6e-8 if ours.dtype == torch.float16 else 0  # a step of what is almost 0
            if not torch.allclose(ours.double(), theirs.double(), atol=2e-2 * theirs.double().abs().max() + least, rtol=2e-2):
                raise InputError(f"ours and {name} differ by {(ours.double() - theirs.double()).abs().max():.2g}")


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
    """[bytes] that one call adds"""
    found = []
    cases(1, 3, 5, 33, torch.float32)[operator][path]()  # loads what has to be loaded
    f = cases(*case, torch.float32)[operator][path]
    with bench_step.growth(found):
        f()
    return found


ALONE = {"peak": peak, "step_peak": bench_step.step_peak, "step_seconds": bench_step.step_seconds}


def alone(function, *args, processes=None):
    """What a function of ALONE gives in a process of its own, whose memory goes back when it is freed, or in several."""
    command = [sys.executable, __file__, function, json.dumps(args)]
    env = {name: str(1 << 14) for name in TUNED}
    if processes:
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29499"]
        env = {"OMP_NUM_THREADS": str(os.cpu_count() // processes)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | env)
    return json.loads(done.stdout)


def flags():
    p = Parser(__doc__)
    p.add_argument("what", nargs="?", choices=["ops", "step"], default="ops")
    p.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the operators run (default cpu)")
    p.add_argument("--json", metavar="FILE", help="write the figures there")
    p.add_argument("--only", default="", metavar="TEXT", help="only lines with TEXT, as in `ids`, `321, 321` or `semi`")
    p.add_argument("--seconds", type=float, default=6, help="of rounds for each operator (default 6)")
    p.add_argument("--iters", type=int, default=40, help="steps of each training (default 40)")
    p.add_argument("--backbones", nargs="+", default=["resnet18", "efficientnet_lite0"], help="of `step` (default resnet18 "
                   "efficientnet_lite0)")
    p.add_argument("--processes", nargs="+", type=int, default=[1, 2], help="of `step` (default 1 2); they share the cores")
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
        about["rows"] = bench_step.table(args, alone) if args.what == "step" else operator_table(args) + ids_table(args)
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=1) + "\n")


def operator_table(args):
    print("| operator | input | dtype | ours, ms | reference | best eager | extra memory, ours / eager, % |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for case in [*SIZES, PLAIN]:
        for dtype in (torch.float32, torch.bfloat16):
            for operator, paths in cases(*case, dtype).items() if args.only in f"{case} {dtype} ops" else ():
                rows.append(line(operator, case, dtype, timed(paths, args.seconds, dtype), dtype == torch.float32))
    if rows and rows[0]["operator"] == "cross entropy, labels":
        (n, k, _, size), ours = rows[0]["case"], rows[0]["ours"]
        floor = exponential_floor() * n * k * size * size
        print(f"\nFirst row: {ours * 1e3:.1f} ms; its {n * k * size * size / 1e6:.1f} M exponentials alone, by torch.exp: "
              f"{floor * 1e3:.1f} ms, ratio {ours / floor:.2f}")
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
        row[f"memory_{path}"] = alone("peak", case, operator, path)[0] / (4 * n * k * size * size)
    cells = [f"{times[name] / times['ours']:.1f}x" if name in times else "" for name in ("reference", "eager")]
    share = f"{100 * row['memory_ours']:.1f} / {100 * row['memory_eager']:.0f}" if memory else ""
    print(f"| {operator} | ({n},{k},{h},{h}) -> {size} | {row['dtype']} | {times['ours'] * 1e3:.2f} | {' | '.join(cells)} | "
          f"{share} |", flush=True)
    return row


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ALONE:
        result = ALONE[sys.argv[1]](*json.loads(sys.argv[2]))
        sys.exit(result is not None and print(json.dumps(result)))
    if sys.platform == "linux" and not TUNED.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | TUNED)
    launch(main, flags)
