"""What only a GPU can show, as a page to paste into an issue: self-check, operators, steps of the training scripts.

    python tests/stress/gpu.py --out gpu.md              # with CUDA_VISIBLE_DEVICES for another GPU than the first
    python tests/stress/gpu.py --gpu -1 --steps 2        # small settings on the CPU, to test this script

The scripts have the paper's settings but random weights, and train on generated images. Each part is a process of its
own; if one fails, the page has its last line, and the others still run.
"""
import argparse
import importlib
import itertools
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common.console import InputError, git_commit, launch, write_atomically  # noqa: E402
from common.distributed import describe_device  # noqa: E402
from common.run import Run  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402

SCRIPTS = "train_base", "train_adv", "train_semi", "train_match"
ON_CPU = "--backbone resnet18 --crop 65 --batch-size 2 --workers 1 --no-amp"
HEAD = """| script | ms a step | images a second\\* | loader\\*\\* | peak of tensors, GiB | reserved, GiB | ops |
|---|---|---|---|---|---|---|
"""
NOTES = """

\\*: labelled and unlabelled. \\*\\*: share of a step's time that the loop waits for images; these are other steps than
the timed ones, which wait for the GPU before they ask for images."""


def flags():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="gpu.md", metavar="FILE", help="the page (default gpu.md)")
    p.add_argument("--gpu", type=int, choices=[0, -1], default=0, help="CUDA device (default 0); -1 is the CPU")
    p.add_argument("--steps", type=int, default=50, help="timed steps of each script (default 50)")
    p.add_argument("--flags", default="", help="more flags of the scripts, such as \"--workers 8\"")
    p.add_argument("--minutes", type=float, default=30, help="limit of each part (default 30)")
    p.add_argument("--script", help=argparse.SUPPRESS)  # a part: print the row of this script
    p.add_argument("--data", help=argparse.SUPPRESS)
    return p


def write_voc(root, count, size=(500, 375)):
    """Write a data set in VOC layout: generated images with as many pixels as those of VOC, as JPEGs of 58 KB."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for name, ids in (("train", range(1, count)), ("val", [0])):
        (root / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"{i}\n" for i in ids))
        for i in ids:
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize(size, Image.BICUBIC)
            pixels = np.asarray(coarse) + rng.normal(0, 10, (size[1], size[0], 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"JPEGImages/{i}.jpg", quality=85)
            label = Image.fromarray(rng.integers(0, 21, (6, 8), np.uint8)).resize(size, Image.NEAREST)
            label.paste(255, (0, 0, size[0], 9))
            label.save(root / f"SegmentationClassAug/{i}.png")


def time_script(args):
    """Return the row of a script: 10 steps of warm-up, --steps that are timed, --steps that measure the loader."""
    module, streams = importlib.import_module(args.script), []
    synchronise = torch.cuda.synchronize if args.gpu >= 0 else lambda: None
    waited, loss, facts, load = [], {}, {}, data.batches

    def batches(*words, **kw):
        batches = load(*words, **kw)
        streams.append(batches)

        def timed():
            while True:
                if "seconds" in facts:
                    synchronise()
                began = perf_counter()
                batch = next(batches)
                waited.append(perf_counter() - began)
                yield batch
        return timed()

    class TimedRun(Run):
        def steps(self, evaluate):
            facts["run"], count = self, itertools.count(1)
            for name, steps in (("warm-up", min(10, args.steps)), ("seconds", args.steps), ("loader", args.steps)):
                synchronise()
                waited.clear()
                began = perf_counter()
                yield from itertools.islice(count, steps)
                synchronise()
                facts[name] = perf_counter() - began

        def log(self, step, **scalars):
            loss.update(scalars)

        def end_step(self, step):
            pass

    module.Run, data.batches = TimedRun, batches
    words = f"--data {args.data} --out {args.data}/out --gpu {args.gpu} --init none".split()
    words += ON_CPU.split() * (args.gpu < 0) + args.flags.split()
    module.main(module.flags().parse_args(words))
    if wrong := [name for name, value in loss.items() if not math.isfinite(value)]:
        raise InputError(f"{wrong[0]} is {float(loss[wrong[0]])} after {2 * args.steps} steps")
    run, seconds = facts["run"], facts["seconds"] / args.steps
    memory = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()] if args.gpu >= 0 else []
    return (f"| {args.script} | {1e3 * seconds:.1f} | {len(streams) * run.args.batch_size / seconds:.1f} | "
            f"{sum(waited) / facts['loader']:.0%} | {' | '.join(f'{x / 2**30:.2f}' for x in memory) or '- | -'} | "
            f"{run.ops} |")


def run_part(command, minutes):
    """Return what a command prints, or "failed" and why in one line."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return f"failed: not finished after {minutes:g} minutes"
    except OSError as e:
        return f"failed: {e}"
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return f"failed (exit status {done.returncode}): {last[:300]}" if done.returncode else done.stdout.strip()


def main(args):
    if args.gpu >= 0 and not torch.cuda.is_available():
        raise InputError(f"--gpu {args.gpu}: {describe_device(torch.device('cpu'), args.gpu)}; install a driver and a "
                         "torch with CUDA, or test this script with --gpu -1")
    if args.script:
        return print(time_script(args))
    device = "cuda" if args.gpu >= 0 else "cpu"
    page, python = [], [sys.executable]

    def add(title, text):
        page.append(f"{title}\n\n{text}\n" if title else text)
        print(page[-1], flush=True)
        write_atomically(Path(args.out), lambda f: f.write_text("\n".join(page)))

    smi = "nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit --format=csv,noheader".split()
    add(f"# {describe_device(torch.device(device))}, commit {git_commit()}", "\n".join([
        f"- nvidia-smi: {'; '.join(run_part(smi, 1).splitlines())}",
        f"- torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Python "
        f"{platform.python_version()}, {platform.platform()}, {os.cpu_count()} CPU cores",
        f"- `{' '.join(['python', *sys.argv])}`"]))
    check = run_part([*python, "-m", "csrc.selfcheck", "cuda:0" if args.gpu >= 0 else "cpu"], args.minutes)
    add("## Self-check of the kernels (csrc/selfcheck.py)", check or "passed")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "voc"
        write_voc(root, 201 if args.gpu >= 0 else 9)
        rows = []
        for script in SCRIPTS:
            part = [*python, __file__, "--script", script, "--data", str(root), "--gpu", str(args.gpu), "--steps",
                    str(args.steps), f"--flags={args.flags}"]
            row = run_part(part, args.minutes).splitlines()[-1]
            rows.append(row if row.startswith("|") else f"| {script} | {row} | | | | | |")
    add("## Training steps", HEAD + "\n".join(rows) + NOTES)
    bench = ["--device", "cuda"] if args.gpu >= 0 else ["--only", "ids", "--seconds", "0.1"]
    add("## Operators (csrc/bench.py)", run_part([*python, "csrc/bench.py", *bench], args.minutes))
    print(f"written to {args.out}")


if __name__ == "__main__":
    launch(main, flags)
