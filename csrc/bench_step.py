"""Time and peak memory of the trainings' steps and of evaluation, kernels against references: `bench.py step`.

The scripts themselves run, on noise of VOC's 21 classes that is loaded beforehand, and change path from step to step. Memory is
what a step adds to what the process holds between steps (weights, momentum, libraries), at the most.
"""
import contextlib
import ctypes
import importlib
import itertools
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
from csrc import ops

PATHS = ("kernel", "reference")
STEP = "--backbone resnet18 --init none --crop 321 --batch-size 4 --split 0.5 --workers 0 --gpu -1"


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


def train(name, iters, around_step, around_evaluation):
    """Run a training, on pictures loaded beforehand, with each step in the context around_step(n), and evaluation, iters / 4
    times, in around_evaluation(n)."""
    script = importlib.import_module(name)
    steps, batches, evaluate = common.Run.steps, data.batches, script.evaluate

    def watched_steps(run, done):
        for step in steps(run, done):
            with around_step(step):
                yield step

    def watched_evaluate(*args):
        for i in range(max(iters // 4, 2)):  # once a path
            with around_evaluation(i):
                result = evaluate(*args)
        return result

    with (patch.object(common.Run, "steps", watched_steps), patch.object(script, "evaluate", watched_evaluate),
          patch.object(data, "batches", lambda *args: itertools.cycle(list(itertools.islice(batches(*args), 4)))),
          tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr)):
        noise(Path(folder) / "data")
        script.main(script.flags().parse_args([*STEP.split(), "--iters", str(iters), "--eval-every", "1000",
                                               "--data", f"{folder}/data", "--out", f"{folder}/out"]))


def step_times(script, iters):
    """{"step": {path: median seconds}, "evaluation": {...}}, the paths in turn"""
    times = {what: {path: [] for path in PATHS} for what in ("step", "evaluation")}

    @contextlib.contextmanager
    def timed(what, i):
        with patch.object(ops, "_choose", lambda *_: PATHS[i % 2]):
            began = time.perf_counter()
            yield
            times[what][PATHS[i % 2]].append(time.perf_counter() - began)

    train(script, iters, lambda i: timed("step", i), lambda i: timed("evaluation", i))
    return {what: {path: statistics.median(t[what == "step":]) for path, t in of.items()} for what, of in times.items()}


def step_peak(script):
    """Bytes that a step and each evaluation add to what is held between steps: [step, evaluation, ...]"""
    found = []
    train(script, 4, lambda i: growth(found) if i == 3 else contextlib.nullcontext(), lambda i: growth(found))
    return found


def table(args, alone):
    print(f"`{STEP}`\n\n| script | | kernels, s | references, s | kernels / references | memory, MB | references, MB | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for script in ("train_base", "train_adv", "train_semi"):
        if args.only not in script:
            continue
        memory = {path: alone("step_peak", script, path=path) for path in PATHS}
        for i, (what, times) in enumerate(step_times(script, args.iters).items()):
            rows.append({"script": script, "what": what, **times, "memory": {path: m[i] for path, m in memory.items()}})
            ours, theirs = (memory[path][i] / 1e6 for path in PATHS)
            print(f"| {script} | {what} | {times['kernel']:.3f} | {times['reference']:.3f} | "
                  f"{times['kernel'] / times['reference']:.2f} | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |", flush=True)
    return rows
