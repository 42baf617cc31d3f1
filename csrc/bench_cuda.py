"""Each operator on a GPU: time against its floor, the best eager PyTorch and torch.compile: `bench.py --device cuda`.

The floor is the larger of two times, by the device's clocks: to move the bytes that have to be moved at least, and to
compute an exponential for each pixel and class (16 a clock and multiprocessor; confusion matrices need none). Calls are
captured in CUDA graphs, so that times are the GPU's alone; eager PyTorch's confusion matrix synchronises and cannot be
captured. What fits stays in the L2 cache.
"""
import statistics
import time

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def floor(operator, case, dtype, gpu):
    """(seconds, "bytes" or "exponentials") on `gpu`, the properties that torch gives; labels are uint8."""
    n, k, h, size = case
    low, full, pixels, item = n * k * h * h, n * k * size * size, n * size * size, dtype.itemsize
    moved = {"cross entropy, labels": low * (item + 4) + pixels, "cross entropy, argmax": low * (item + 4),
             "upsample_softmax": low * (2 * item + 4) + 2 * full * item,
             "confusion matrix, logits": low * item + pixels}
    if h == size:  # read twice, written once; the denominator's logarithm and the label between
        moved = {"cross entropy, labels": 3 * full * item + 11 * pixels,
                 "cross entropy, argmax": 3 * full * item + 10 * pixels}
    bandwidth = 2 * gpu.memory_clock_rate * 1e3 * gpu.memory_bus_width / 8
    exponentials = 0 if operator.startswith("confusion") else full
    return max((moved[operator] / bandwidth, "bytes"),
               (exponentials / (16 * gpu.multi_processor_count * gpu.clock_rate * 1e3), "exponentials"))


def captured(f):
    """A function that does on the GPU what f does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            f()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def time_all(paths, seconds, captures):
    """{name: median seconds} of the paths in turn, calls repeated for about 5 ms"""
    calls = {name: captured(f) if captures(name) else f for name, f in paths.items()}
    times, repeats, end = {name: [] for name in paths}, dict.fromkeys(paths, 1), time.monotonic() + seconds
    while time.monotonic() < end or len(times["ours"]) < 6:
        for name, call in calls.items():
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats[name]):
                call()
            done.record()
            done.synchronize()
            times[name].append(begin.elapsed_time(done) / 1e3 / repeats[name])
            repeats[name] = max(1, round(5e-3 / times[name][-1]))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def peak(f):
    """Bytes that a call adds, at the most."""
    f()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    return torch.cuda.max_memory_allocated() - before


def table(args, sizes, cases, check):
    """Print the table; -> its rows. cases(*case, dtype, device) and check(paths) are those of bench.py."""
    gpu, rows = torch.cuda.get_device_properties(0), []
    print("| operator | input | dtype | ours, us | floor, us | ours / floor | best eager | torch.compile "
          "| extra memory, ours / eager, % |\n|---|---|---|---|---|---|---|---|---|")
    for case in sizes:
        for dtype in DTYPES:
            if args.only not in f"{case} {dtype} ops":
                continue
            for operator, paths in cases(*case, dtype, device="cuda").items():
                check(paths, dtype)
                del paths["reference"]
                (n, k, h, size), (least, bound) = case, floor(operator, case, dtype, gpu)
                tensor = dtype.itemsize * n * k * size * size
                memory = [100 * peak(paths[name]) / tensor for name in ("ours", "eager")]
                counts = operator.startswith("confusion")
                times = time_all(paths, args.seconds, lambda name: name == "ours" or not counts)
                row = {"operator": operator, "case": case, "dtype": str(dtype).split(".")[1], "floor": least,
                       "memory": memory}
                rows.append(row | times)
                ours = times["ours"]
                print(f"| {operator} | ({n},{k},{h},{h}) -> {size} | {row['dtype']} | {ours * 1e6:.1f} "
                      f"| {least * 1e6:.1f} ({bound}) | {ours / least:.2f} | {times['eager'] / ours:.1f}x "
                      f"| {times['compile'] / ours:.1f}x | {memory[0]:.1f} / {memory[1]:.0f} |", flush=True)
    return rows
