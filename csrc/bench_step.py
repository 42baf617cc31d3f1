"""Time and peak memory of the trainings' steps and of evaluation: `bench.py step`.

The scripts themselves run, on noise of VOC's 21 classes that is loaded beforehand, and change path from step to step: kernels,
references, and plain eager PyTorch, which is the references with one upsampling that all losses share. Memory is what a step
adds to what the process holds between steps (weights, momentum, libraries), at the most.
"""
import contextlib
import ctypes
import importlib
import itertools
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
from PIL import Image

import common
import data
import parallel
from csrc import ops

PATHS = ("kernel", "reference", "eager")
BATCH = 4
ROUNDS = 3  # of starting 1, 2, ... processes
STEP = f"--init none --crop 321 --batch-size {BATCH} --split 0.5 --workers 0 --save-every 1000 --gpu -1"


@contextlib.contextmanager
def growth(found):
    """Appends the bytes that this process held more than before, at the most."""
    def largest():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ctypes.CDLL(None).malloc_trim(0)
    now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    ballast = np.ones(max(0, largest() - now), np.uint8)  # fills this process up to its largest size so far
    before = largest()
    yield
    found.append(largest() - before + 0 * len(ballast))


def noise(root, pictures=8, width=500, height=375):
    """A set in VOC layout: labels in blocks."""
    g, ids = np.random.default_rng(0), [str(i) for i in range(pictures)]
    for folder in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in ids:
        label = np.kron(g.integers(0, 21, (height // 25, width // 25)), np.ones((25, 25))).astype(np.uint8)
        Image.fromarray(g.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"JPEGImages/{i}.jpg")
        Image.fromarray(label).save(root / f"SegmentationClassAug/{i}.png")
    for name in ("train_aug", "val"):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(ids))


@contextlib.contextmanager
def running(path):
    """The operators take `path`."""
    upsample, done = ops._upsample, {}
    ops.in_use()  # loads the kernels

    def once(x, size):
        if not x.requires_grad:
            return upsample(x, size)
        if id(x) not in done:
            done[id(x)] = x, upsample(x, size)  # x is kept, so that no other gets its id
        return done[id(x)][1]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(ops, "_choose", lambda *_: "kernel" if path == "kernel" else "reference"))
        if path == "eager":
            stack.enter_context(patch.object(ops, "_upsample", once))
        yield


def train(name, backbone, iters, around_step, around_evaluation):
    """Run a training, on pictures loaded once, each step in the context around_step(n), and iters / 2 evaluations, each in
    around_evaluation(n)."""
    script = importlib.import_module(name)
    steps, batches, whole, evaluate, loaded = common.Run.steps, data.batches, data.Whole, script.evaluate, []

    def watched_steps(run, done):
        for step in steps(run, done):
            with around_step(step):
                yield step

    def loaded_once(*args):
        loaded.extend(whole(*args) if not loaded else ())
        return loaded

    def watched_evaluate(*args):
        for i in range(max(iters // 2, 2 * len(PATHS))):
            with around_evaluation(i):
                result = evaluate(*args)
        return result

    with (patch.object(common.Run, "steps", watched_steps), patch.object(script, "evaluate", watched_evaluate),
          patch.object(data, "batches", lambda *args: itertools.cycle(list(itertools.islice(batches(*args), 4)))),
          patch.object(data, "Whole", loaded_once),
          tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr)):
        noise(Path(folder) / "data")
        script.main(script.flags().parse_args([*STEP.split(), "--backbone", backbone, "--iters", str(iters), "--eval-every",
                                               "1000", "--data", f"{folder}/data", "--out", f"{folder}/out"]))


def step_times(script, backbone, iters):
    """{"step": {path: [seconds, ...]}, "evaluation": {...}}, the n-th ones one after the other; the first round is left out."""
    times = {what: {path: [] for path in PATHS} for what in ("step", "evaluation")}

    @contextlib.contextmanager
    def timed(what, i):
        path = (PATHS + PATHS[::-1])[i % (2 * len(PATHS))]
        with running(path):
            began = time.perf_counter()
            yield
            times[what][path].append(time.perf_counter() - began)

    train(script, backbone, iters, lambda i: timed("step", i - 1), lambda i: timed("evaluation", i))
    return {what: {path: t[1:] for path, t in of.items()} for what, of in times.items()}


def step_peak(script, backbone, path):
    """Bytes that a step and each evaluation add to what is held between steps: [step, evaluation, ...]"""
    found = []
    with running(path):
        train(script, backbone, 4, lambda i: growth(found) if i == 3 else contextlib.nullcontext(), lambda i: growth(found))
    return found


def step_seconds(script, backbone, iters):
    """Median seconds of a step of this process, perhaps one of several; None for all but the first."""
    times = []

    @contextlib.contextmanager
    def timed(_):
        began = time.perf_counter()
        yield
        times.append(time.perf_counter() - began)
    train(script, backbone, iters, timed, lambda _: contextlib.nullcontext())
    return statistics.median(times[1:]) if parallel.RANK == 0 else None


def table(args, alone):
    print(f"`{STEP}`\n\n| script, backbone | | pictures/s: kernels | references | eager | time, kernels / references | / eager "
          "| memory, MB: kernels | references | eager | kernels / references | / eager |" + "\n" + 12 * "|---" + "|")
    rows, scripts = [], ("train_base", "train_adv", "train_semi")
    cases = [(script, net) for script in scripts for net in args.backbones if args.only in f"{script} {net}"]
    for script, backbone in cases:
        memory = {path: alone("step_peak", script, backbone, path) for path in PATHS}
        for i, (what, times) in enumerate(step_times(script, backbone, args.iters).items()):
            bytes_of = {path: memory[path][i] for path in PATHS}
            rows.append({"script": script, "backbone": backbone, "what": what, **times, "memory": bytes_of})
            pictures = 8 if what == "evaluation" else 2 * BATCH if script == "train_semi" else BATCH  # 8: see `noise`
            rates = [f"{pictures / statistics.median(times[path]):.2f}" for path in PATHS]
            sizes = [f"{bytes_of[path] / 1e6:.0f}" for path in PATHS]
            # neighbours in time are compared: the machine's speed may change by half in between
            faster = [f"{statistics.median(a / b for a, b in zip(times['kernel'], times[path])):.2f}" for path in PATHS[1:]]
            smaller = [f"{bytes_of['kernel'] / bytes_of[path]:.2f}" for path in PATHS[1:]]
            print(f"| {script}, {backbone} | {what} | " + " | ".join([*rates, *faster, *sizes, *smaller]) + " |", flush=True)
    print("\n| script, backbone | processes x threads | pictures/s | of one process |\n|---|---|---|---|")
    for script, backbone in cases:
        times = {n: [] for n in args.processes}
        for n in args.processes * ROUNDS:
            times[n].append(alone("step_seconds", script, backbone, max(args.iters // ROUNDS, 2), processes=n))
        for n, seconds in times.items():
            rows.append({"script": script, "backbone": backbone, "what": "scaling", "processes": n, "seconds": seconds})
            pictures = (2 if script == "train_semi" else 1) * BATCH
            of_first = statistics.median(a / b for a, b in zip(times[args.processes[0]], seconds))
            print(f"| {script}, {backbone} | {n} x {os.cpu_count() // n} | {pictures / statistics.median(seconds):.2f} "
                  f"| {of_first:.2f} |", flush=True)
    return rows
